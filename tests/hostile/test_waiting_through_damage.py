"""Who waits while the index is truncated, overwritten or deleted is woken by the next item, or place, as ever."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.peer import Peer

from spoolipc import SpoolReader, SpoolWriter, stat


def truncate(index: Path) -> None:
    os.truncate(index, 0)


def shorten(index: Path) -> None:
    os.truncate(index, 4096)


def overwrite(index: Path) -> None:
    with index.open("r+b") as file:
        file.write(bytes(index.stat().st_size))


def delete(index: Path) -> None:
    index.unlink()


DAMAGES: list[Callable[[Path], None]] = [truncate, shorten, overwrite, delete]


def until_somebody_sleeps(path: Path, kind: str) -> None:
    """Wait until a flag in the index says that somebody waits at a bell."""
    from spoolipc import words as W

    start = W.WORD * (W.ITEM_FLAGS if kind == "items" else W.SPACE_FLAGS)
    pause = threading.Event()
    for _ in range(20_000):
        flags = path.joinpath("index").read_bytes()[start : start + 8 * W.WORD]
        if any(flag > 1 for flag in memoryview(flags).cast("Q")):
            return
        pause.wait(0.001)
    raise AssertionError("nobody waits")


@pytest.mark.parametrize("damage", DAMAGES)
def test_waiting_reader_survives_and_gets_the_next_item(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "spool"
    with SpoolWriter(path) as writer, Peer(path) as peer:
        peer.run("reader = SpoolReader(path)")
        peer.start("ask", "int(reader.get(timeout=20)[0])")
        until_somebody_sleeps(path, "items")
        damage(path / "index")
        # A waiting reader looks once a second, and repairs what it finds.
        pause = threading.Event()
        for _ in range(20_000):
            if stat(path).index_damage == "":
                break
            pause.wait(0.001)
        writer.put(np.full(3, 5))
        assert peer.answer() == 5
        peer.run("reader.close()")


@pytest.mark.parametrize("damage", DAMAGES)
def test_waiting_writer_survives_and_puts_when_there_is_room(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "spool"
    with SpoolReader(path, maxsize=1) as reader, Peer(path) as peer:
        peer.run("writer = SpoolWriter(path); writer.put(np.full(3, 1))")
        peer.start("ask", "writer.put(np.full(3, 2), timeout=20)")
        until_somebody_sleeps(path, "space")
        damage(path / "index")
        assert int(reader.get(timeout=20)[0]) == 1
        assert peer.answer() == 2
        assert int(reader.get(timeout=20)[0]) == 2
        peer.run("writer.close()")


@pytest.mark.parametrize("damage", DAMAGES)
def test_reader_between_calls_finds_everything_that_waits(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "spool"
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for value in range(5):
            writer.put(np.full(3, value))
        damage(path / "index")
        assert writer.qsize() == 5
        writer.put(np.full(3, 5))
        assert [int(reader.get_nowait()[0]) for _ in range(6)] == list(range(6))
