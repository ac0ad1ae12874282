"""stat says what is in a spool, changes nothing, and works where nothing else does."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.damage import crash, item, picture, stop_in_step
from support.peek import peek_table, poke
from support.peer import Peer

from spoolipc import SpoolReader, SpoolWriter, stat

BIG = np.arange(100_000)


@pytest.fixture
def path(spool: Path) -> Path:
    SpoolWriter(spool, maxsize=10, max_bytes=10**9).close()
    return spool


def said(path: Path) -> dict[str, Any]:
    return asdict(stat(path))


def test_every_state_of_an_item_is_counted(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in range(6):
            writer.put(BIG)
        view = reader.get()
        reader.get()
        in_flight, delayed, unwanted = (reader.receive() for _ in range(3))
        delayed.nack(delay=1000)
        unwanted.reject("unwanted")
        reader.qsize()
        found = said(path)
        size = os.path.getsize(path / item(6))
        assert [found[name] for name in ("depth", "delayed", "in_flight", "failed")] == [1, 1, 1, 1]
        assert found["bytes"] == 3 * size
        assert found["free_files"] + found["pinned_files"] == 2
        assert found["free_bytes"] + found["pinned_bytes"] == 2 * size
        assert found["pinned_files"] >= 1
        assert (found["puts"], found["gets"], found["live_sessions"]) == (6, 2, 2)
        assert 0 <= found["oldest_age"] < 60
        assert (view == BIG).all()
        in_flight.ack()


def test_it_changes_nothing_and_counts_neither_itself_nor_a_crashed_session(path: Path) -> None:
    crash(path, "writer = SpoolWriter(path)")
    assert len(os.listdir(path / "alive")) == 1
    assert said(path)["live_sessions"] == 0
    with SpoolWriter(path) as writer:
        writer.put(BIG)
        before, sessions = picture(path), os.listdir(path / "alive")
        assert [said(path)["live_sessions"] for _ in range(2)] == [1, 1]
        assert picture(path) == before
        assert os.listdir(path / "alive") == sessions


def test_the_oldest_item_is_the_first_put_or_the_first_to_be_redelivered(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in range(2):
            writer.put(BIG)
        reader.receive().nack()
    table, now = peek_table(path), time.time_ns()
    assert (table.redelivered, table.queue) == ((1,), (2,))
    for first, second, age in ((7000, 10**6, 10**6), (10**6, 7000, 10**6), (-1000, -1000, 0)):
        for seq, seconds in ((1, first), (2, second)):
            poke(path, "put_time", now - seconds * 10**9, table.row(seq))
        found = stat(path).oldest_age
        assert found is not None
        assert age <= found < age + 6000


@pytest.mark.damaged
@pytest.mark.parametrize("damage", ["deleted", "zeros"])
def test_a_damaged_index_is_told_and_not_repaired(path: Path, damage: str) -> None:
    with SpoolWriter(path) as writer:
        for _ in range(2):
            writer.put(BIG)
        writer.shutdown()
    if damage == "deleted":
        (path / "index").unlink()
    else:
        (path / "index").write_bytes(bytes(10**5))
    before = picture(path)
    found = stat(path)
    assert found.index_damage
    assert (found.depth, found.failed, found.state, found.limits.maxsize) == (2, 0, "draining", 10)
    assert found.bytes > 2 * BIG.nbytes
    assert picture(path) == before


@pytest.mark.damaged
def test_damaged_links_do_not_break_it(path: Path) -> None:
    with SpoolWriter(path) as writer:
        writer.put(BIG)
    for value in (2**64 - 1, 7, peek_table(path).row(1).at):
        for head in ("owned_head", "queue_head"):
            poke(path, head, value)
        assert stat(path).depth == 1


def test_a_stopped_holder_of_the_lock_is_named(path: Path) -> None:
    with Peer(path) as peer:
        peer.run("writer = SpoolWriter(path)")
        stop_in_step(peer)
        try:
            found = said(path)
            assert found["stuck_on"].startswith(f"process {peer.pid} (alive/")
            assert (found["live_sessions"], found["pinned_files"], found["depth"]) == (None, None, 0)
        finally:
            peer.go()
        peer.answer()
        assert (stat(path).stuck_on, stat(path).depth) == ("", 1)


def file_system(path: Path) -> str:
    """As the kernel's mount table has it."""
    rows = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(len(row[1]), number, row[2]) for number, row in enumerate(rows) if path.is_relative_to(row[1])]
    return max(above)[2]


def test_the_file_system_and_the_way_of_waiting_are_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = stat(path)
    assert found.file_system == file_system(path)
    assert found.in_memory == (found.file_system in ("tmpfs", "ramfs"))
    assert found.waiting_mode in ("inotify", "polling")
    monkeypatch.setenv("SPOOLIPC_WATCH", "polling")
    assert stat(path).waiting_mode == "polling"


@pytest.mark.damaged
def test_index_that_was_cut_off_is_told(path: Path) -> None:
    os.truncate(path / "index", (path / "index").stat().st_size - 4096)
    assert stat(path).index_damage == "the index is shorter than it says"
