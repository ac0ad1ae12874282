"""A spool full of leftovers: `gc` gets through a million of them, shows how far it is, and needs no memory for them."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.damage import item, item_name

from spoolipc import SpoolReader, SpoolWriter, fsck, stat

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(300)]

MILLION = 1_000_000
SOME = 100_000
ITEMS = 50_000
FLAT = 64 * 2**20
"""Bytes that more leftovers may cost: less than a list of a million names takes."""


@pytest.fixture
def path() -> Iterator[Path]:
    """A spool in memory where there is some: a disk would take minutes to make so many files."""
    place = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    yield Path(place, "spool")
    shutil.rmtree(place)


def litter(path: Path) -> None:
    """What crashed sessions may leave, and items that the table does not know."""
    make = os.O_CREAT | os.O_WRONLY
    for part, count, name in (
        ("tmp", MILLION, lambda number: f"{number:016x}-0.npy"),
        ("alive", SOME, lambda number: f"{number:016x}"),
        ("free", SOME, item_name),
    ):
        folder = os.open(path / part, os.O_RDONLY)
        for number in range(10**7, 10**7 + count):
            os.close(os.open(name(number), make, 0o600, dir_fd=folder))
        os.close(folder)
    (path / "index").unlink()
    data = (path / item(1)).read_bytes()
    for number in range(2, ITEMS + 1):
        (path / item(number)).write_bytes(data)
        (path / item(number)).chmod(0o600)


def gc_on_a_terminal(path: Path) -> tuple[str, int]:
    """What `spoolipc gc` shows on a terminal, and the most memory it had, in bytes."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    actions = [(os.POSIX_SPAWN_DUP2, theirs, number) for number in (1, 2)]
    command = [sys.executable, "-m", "spoolipc", "gc", str(path)]
    child = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the terminal is gone with the child
            break
        if not part:
            break
        shown += part
    os.close(ours)
    _, status, usage = os.wait4(child, 0)
    assert status == 0, shown.decode()
    return shown.decode(), usage.ru_maxrss * 1024


def seconds_of(path: Path) -> float:
    """What a put and a get take, the median of some."""
    took = []
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in range(400):
            began = time.perf_counter()
            writer.put(np.zeros(10))
            reader.get_nowait()
            took.append(time.perf_counter() - began)
    return float(np.median(took))


def test_a_million_leftovers(path: Path) -> None:
    empty = path.with_name("empty")
    with SpoolWriter(empty) as writer:
        writer.put(np.zeros(10))
    _, least = gc_on_a_terminal(empty)
    with SpoolWriter(path) as writer:
        writer.put(np.zeros(10))
    litter(path)
    shown, most = gc_on_a_terminal(path)
    assert "gc: " in shown, "no bar was shown"
    assert "names" in shown
    assert most - least < FLAT
    assert [len(os.listdir(path / part)) for part in ("tmp", "alive", "free", "items")] == [0, 0, 0, ITEMS]
    assert stat(path).depth == ITEMS
    assert fsck(path).problems == ()
    assert seconds_of(path) < 4 * seconds_of(empty)
