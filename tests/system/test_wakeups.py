"""Who sleeps is woken by the very next item or free place: no wake-up is lost, none waits for the look once a second.

Times are `time.monotonic`, one clock for all processes of the machine, carried in the arrays.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spoolipc import ShutDown, SpoolReader, SpoolWriter
from spoolipc import words as W

SPAWN: Any = multiprocessing.get_context("spawn")
LATEST = 0.5
"""Seconds that no wake-up may take: what watchdog would hold back a rename for."""


class Sleepers:
    """Processes that wait on the spool at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = SpoolReader(path)
        self._words = self._reader._source.party.look()
        for flag in range(8):  # set in a new index, as nobody knows who waits
            self._words[W.ITEM_FLAGS + flag] = self._words[W.SPACE_FLAGS + flag] = 0
        self.members: list[tuple[Any, Connection]] = []

    def start(self, work: Callable[[Path, Connection], None]) -> Connection:
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=work, args=(self._path, theirs))
        process.start()
        self.members.append((process, ours))
        assert ours.poll(30)
        assert ours.recv() == "begins"
        return ours  # type: ignore[no-any-return]

    def wait_until_asleep(self, flags: int) -> None:
        """Wait until somebody's flag is set and every process is off the processor, so that only a ring helps."""
        deadline = time.monotonic() + 20
        while not (any(self._words[flags : flags + 8]) and all(map(self._sleeps, self.members))):
            assert all(process.is_alive() for process, _ in self.members)
            assert time.monotonic() < deadline, (
                f"they never sleep: flags {self._words[flags : flags + 8].tolist()}, "
                f"asleep {list(map(self._sleeps, self.members))}, {self._reader.qsize()} waiting"
            )
            time.sleep(0.0001)

    @staticmethod
    def _sleeps(member: tuple[Any, Connection]) -> bool:
        pid = member[0].pid
        return Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"

    def wait_until_consumed(self) -> None:
        deadline = time.monotonic() + 20
        while not self._reader.empty():
            assert time.monotonic() < deadline, "an item was not taken"
            time.sleep(0.0001)

    def clear(self) -> None:
        for process, pipe in self.members:
            pipe.close()
            if process.is_alive():
                process.kill()
            process.join()
        self._reader.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def sleepers(path: Path) -> Iterator[Sleepers]:
    sleepers = Sleepers(path)
    yield sleepers
    sleepers.clear()


def received(pipe: Connection) -> Any:
    assert pipe.poll(30), "the other process says nothing"
    return pipe.recv()


def late(seconds: list[float]) -> list[float]:
    return [each for each in seconds if not 0 <= each < LATEST]


def read_stamps(path: Path, pipe: Connection) -> None:
    """Get until the end; send how many seconds each item took from just before its put."""
    seconds = []
    with SpoolReader(path) as reader:
        pipe.send("begins")
        for array in reader:
            seconds.append(time.monotonic() - float(array[0]))
    pipe.send(seconds)


def write_stamps(path: Path, pipe: Connection) -> None:
    """Put until the end; send when each put was done."""
    done = []
    with SpoolWriter(path) as writer:
        pipe.send("begins")
        try:
            while True:
                writer.put(np.zeros(1000))
                done.append(time.monotonic())
        except ShutDown:
            pipe.send(done)


@pytest.mark.parametrize("size", [1, 5000])
def test_a_thousand_wake_ups_of_an_idle_reader_none_lost_and_none_late(
    path: Path, sleepers: Sleepers, size: int
) -> None:
    times = 1000 if size == 1 else 200
    with SpoolWriter(path) as writer:
        reader = sleepers.start(read_stamps)
        for _ in range(times):
            sleepers.wait_until_asleep(W.ITEM_FLAGS)
            writer.put(np.full(size, time.monotonic()))
            sleepers.wait_until_consumed()
        writer.shutdown()
        seconds = received(reader)
    assert len(seconds) == times
    assert late(seconds) == []


def test_wake_ups_by_many_short_lived_writers(path: Path, sleepers: Sleepers) -> None:
    reader = sleepers.start(read_stamps)
    for _ in range(100):
        sleepers.wait_until_asleep(W.ITEM_FLAGS)
        with SpoolWriter(path) as writer:
            writer.put(np.full(1, time.monotonic()))
        sleepers.wait_until_consumed()
    with SpoolWriter(path) as writer:
        writer.shutdown()
    seconds = received(reader)
    assert len(seconds) == 100
    assert late(seconds) == []


def test_as_many_sleeping_readers_wake_as_items_come(path: Path, sleepers: Sleepers) -> None:
    """More readers than items, as many, and fewer; sooner or later two of them share a bell."""
    with SpoolWriter(path) as writer:
        readers = [sleepers.start(read_stamps) for _ in range(4)]
        put = 0
        for count in (1, 2, 4, 7) * 20:
            sleepers.wait_until_asleep(W.ITEM_FLAGS)
            for _ in range(count):
                writer.put(np.full(1, time.monotonic()))
            put += count
            sleepers.wait_until_consumed()
        writer.shutdown()
        seconds = [each for reader in readers for each in received(reader)]
    assert len(seconds) == put
    assert late(seconds) == []


def test_wake_ups_of_a_writer_that_waits_for_space(path: Path, sleepers: Sleepers) -> None:
    times = 300
    with SpoolWriter(path, maxsize=1) as other, SpoolReader(path) as reader:
        waiting = sleepers.start(write_stamps)
        freed = []
        for _ in range(times):
            sleepers.wait_until_asleep(W.SPACE_FLAGS)
            freed.append(time.monotonic())
            reader.get(timeout=20)
        sleepers.wait_until_asleep(W.SPACE_FLAGS)
        other.shutdown()
        done = received(waiting)
    assert len(done) == times + 1
    assert late([after - before for before, after in zip(freed, done[1:], strict=True)]) == []


def test_wake_ups_where_nothing_reports_changes(
    path: Path, sleepers: Sleepers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOOLIPC_WATCH", "polling")
    with SpoolWriter(path) as writer:
        reader = sleepers.start(read_stamps)
        for _ in range(100):
            writer.put(np.full(1, time.monotonic()))
            sleepers.wait_until_consumed()
        writer.shutdown()
        seconds = received(reader)
    assert len(seconds) == 100
    assert late(seconds) == []


def test_item_given_back_wakes_a_reader(path: Path, sleepers: Sleepers) -> None:
    """The item is put while nobody sleeps; what wakes the reader is that its holder gives it back."""
    with SpoolWriter(path) as writer, SpoolReader(path) as holder:
        writer.put(np.zeros(1))
        (delivery,) = holder._source.claim(1, None)
        reader = sleepers.start(read_stamps)
        sleepers.wait_until_asleep(W.ITEM_FLAGS)
        began = time.monotonic()
        holder._source.nack(delivery, 0, "on purpose")
        sleepers.wait_until_consumed()
        assert time.monotonic() - began < LATEST
        writer.shutdown()
        assert len(received(reader)) == 1


def test_delay_of_an_item_given_back_is_kept(path: Path, sleepers: Sleepers) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as holder:
        for delay in (0.05, 0.3):
            writer.put(np.zeros(1))
            (delivery,) = holder._source.claim(1, None)
            began = time.monotonic()
            holder._source.nack(delivery, delay, "on purpose")
            holder.get(timeout=20)
            assert delay <= time.monotonic() - began < delay + LATEST
