"""Who waits while the index is truncated, overwritten or deleted is woken by the next item, or place, as ever."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.peer import Peer
from support.waits import start_waiting, until

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


Damage = Callable[[Path], None]
pytestmark = pytest.mark.parametrize("damage", [truncate, shorten, overwrite, delete])


def test_waiting_reader_survives_and_gets_the_next_item(spool: Path, damage: Damage) -> None:
    with SpoolWriter(spool) as writer, Peer(spool) as peer:
        peer.run("reader = SpoolReader(path)")
        start_waiting(peer, "int(reader.get(timeout=20)[0])")
        damage(spool / "index")
        until(lambda: not stat(spool).index_damage)  # it looks once a second, and repairs what it finds
        writer.put(np.full(3, 5))
        assert peer.answer() == 5
        peer.run("reader.close()")


def test_waiting_writer_survives_and_puts_when_there_is_room(spool: Path, damage: Damage) -> None:
    with SpoolReader(spool, maxsize=1) as reader, Peer(spool) as peer:
        peer.run("writer = SpoolWriter(path); writer.put(np.full(3, 1))")
        start_waiting(peer, "writer.put(np.full(3, 2), timeout=20)")
        damage(spool / "index")
        assert int(reader.get(timeout=20)[0]) == 1
        assert peer.answer() == 2
        assert int(reader.get(timeout=20)[0]) == 2
        peer.run("writer.close()")
