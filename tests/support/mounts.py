"""Small file systems, which may be filled without harm to anybody."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def tmpfs(place: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size`, as mount(8) writes it, at a new directory; skips the test where none can be mounted."""
    with _mounted(place, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        yield place


@contextmanager
def ext4(place: Path, size: int) -> Iterator[Path]:
    """An ext4 of `size` bytes, likewise, in a file beside it."""
    tool = shutil.which("mkfs.ext4", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if tool is None:
        pytest.skip("mkfs.ext4 is missing")
    image = place.with_suffix(".image")
    image.touch()
    os.truncate(image, size)
    subprocess.run([tool, "-q", "-m", "0", "-O", "^has_journal", image], check=True)
    with _mounted(place, "-o", "loop", str(image)):
        yield place


@contextmanager
def _mounted(place: Path, *options: str) -> Iterator[None]:
    if os.geteuid():
        pytest.skip("only root can mount")
    place.mkdir()
    done = subprocess.run(["mount", *options, place], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def overlay(place: Path, lower: Path) -> Iterator[Path]:
    """The directory `lower` as the lower layer of an overlay at `place`, as an image is to a container."""
    if os.geteuid():
        pytest.skip("only root can mount")
    parts = {name: place.with_name(f"{place.name}-{name}") for name in ("upper", "work")}
    for part in (place, *parts.values()):
        part.mkdir()
    options = f"lowerdir={lower},upperdir={parts['upper']},workdir={parts['work']}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
