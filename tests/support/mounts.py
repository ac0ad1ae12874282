"""Small file systems, which may be filled without harm to anybody."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def tmpfs(place: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size`, as mount(8) writes it, at a new directory; skips the test where none can be mounted."""
    if os.geteuid():
        pytest.skip("only root can mount")
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
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
