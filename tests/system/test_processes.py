"""Between processes every item arrives once, whole and in its writer's order, and an end is heard by all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spoolipc import Empty, Full, ShutDown, SpoolReader, SpoolWriter
from spoolipc import words as W
from spoolipc.engine import Delivery
from spoolipc.npy import Array

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of threads, from Python 3.12
WRITERS = 4
READERS = 4
ITEMS = 2000
"""Of each writer."""
SIZES = (1_000, 3_000, 12_000, 17_000, 40_000, 100_000, 200_000)
"""Bytes of the arrays, about; those below 16 KB are copied, the others views of the file."""


def item(writer: int, number: int) -> Array:
    """The item's writer and number, and a content that follows from them."""
    size = SIZES[(number * 5 + writer) % len(SIZES)] // 8 + number % 7
    array = np.arange(size, dtype="u8")
    array += np.uint64(writer << 40 | number << 20)
    array[:2] = writer, number
    return array


def identity(array: Array) -> tuple[int, int] | None:
    """Writer and number of an item, None if its content does not follow from them."""
    writer, number = int(array[0]), int(array[1])
    if writer < WRITERS and number < ITEMS and (array == item(writer, number)).all():
        return writer, number
    return None


def put_all(path: Path, writer: int, _: Connection) -> None:
    with SpoolWriter(path, maxsize=50) as spool:
        for number in range(ITEMS):
            spool.put(item(writer, number), timeout=50)


def get_all(path: Path, me: int, pipe: Connection) -> None:
    """Every reader keeps the last few views and looks at them again later."""
    seen: list[tuple[int, int] | None] = []
    kept: list[Array] = []
    with SpoolReader(path) as spool:
        for array in spool:
            seen.append(identity(array))
            kept.append(array)
            if len(kept) > me:
                assert identity(kept.pop(0)) is not None
    pipe.send(seen)


class Family:
    """Processes of one test, each with a pipe to it; none outlives the test."""

    def __init__(self, method: str) -> None:
        self._context: Any = multiprocessing.get_context(method)
        self._members: list[tuple[Any, Connection]] = []

    def start(self, work: Callable[..., None], *args: Any) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(*args, theirs))
        process.start()
        theirs.close()
        self._members.append((process, ours))
        return ours  # type: ignore[no-any-return]

    def process(self, pipe: Connection) -> Any:
        return next(process for process, ours in self._members if ours is pipe)

    def end(self, pipe: Connection) -> None:
        process = self.process(pipe)
        process.join(30)
        assert process.exitcode == 0

    def clear(self) -> None:
        for process, pipe in self._members:
            pipe.close()
            if process.is_alive():
                process.kill()
            process.join()


@pytest.fixture(params=["spawn", "fork"])
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    family = Family(request.param)
    yield family
    family.clear()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def received(pipe: Connection, seconds: float = 50.0) -> Any:
    assert pipe.poll(seconds), "the other process says nothing"
    return pipe.recv()


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until a condition that another process brings about holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not reached"
        time.sleep(0.0005)


def test_every_item_arrives_once_and_whole_and_each_writers_in_order(path: Path, family: Family) -> None:
    with SpoolWriter(path, maxsize=50) as spool:
        writers = [family.start(put_all, path, writer) for writer in range(WRITERS)]
        readers = [family.start(get_all, path, reader) for reader in range(READERS)]
        for pipe in writers:
            family.end(pipe)
        spool.shutdown()
        seen = [received(pipe) for pipe in readers]
        for pipe in readers:
            family.end(pipe)
    everything = [one for of_reader in seen for one in of_reader]
    assert None not in everything
    assert sorted(everything) == [(writer, number) for writer in range(WRITERS) for number in range(ITEMS)]
    for of_reader in seen:
        for writer in range(WRITERS):
            numbers = [number for who, number in of_reader if who == writer]
            assert numbers == sorted(numbers)
    assert list((path / "items").iterdir()) == []
    assert list((path / "tmp").iterdir()) == []
    assert list((path / "failed").iterdir()) == []


def test_arrays_go_back_and_forth(path: Path, tmp_path: Path, family: Family) -> None:
    back = tmp_path / "back"
    echo = family.start(return_all, path, back)
    with SpoolWriter(path) as writer, SpoolReader(back) as reader:
        for number in range(300):
            sent = item(number % WRITERS, number)
            writer.put(sent)
            assert (reader.get(timeout=20) == sent).all()
        writer.shutdown()
    family.end(echo)


def return_all(path: Path, back: Path, _: Connection) -> None:
    with SpoolReader(path) as reader, SpoolWriter(back) as writer:
        for array in reader:
            writer.put(array)


def settle_flags(path: Path) -> memoryview[int]:
    """The words of the index, with the flags of a new one cleared, which are set as nobody knows who waits."""
    words = SpoolReader(path)._source.party.look()
    for flag in range(8):
        words[W.ITEM_FLAGS + flag] = words[W.SPACE_FLAGS + flag] = 0
    return words


def just_asleep(words: memoryview[int], flags: int) -> Callable[[], bool]:
    """Whether somebody went to sleep within the last tenth of a second, and so will not look by itself soon."""
    return lambda: max(words[flags : flags + 8]) > time.monotonic_ns() - 100_000_000


@pytest.mark.parametrize("immediate", [False, True])
def test_shutdown_wakes_who_waits_in_other_processes(path: Path, family: Family, immediate: bool) -> None:
    full, empty = path.with_name("full"), path.with_name("empty")
    with SpoolWriter(full, maxsize=1) as one, SpoolWriter(empty) as two:
        one.put(np.zeros(1))
        space, items = settle_flags(full), settle_flags(empty)
        putters = [family.start(put_until_shutdown, full) for _ in range(2)]
        getters = [family.start(get_until_shutdown, empty) for _ in range(2)]
        for pipe in putters + getters:
            assert received(pipe) == "begins"
        for spool, words, flags, waiting in (
            (one, space, W.SPACE_FLAGS, putters),
            (two, items, W.ITEM_FLAGS, getters),
        ):
            until(just_asleep(words, flags))
            assert wait(waiting, 0) == []
            began = time.monotonic()
            spool.shutdown(immediate)
            assert max(map(received, waiting)) - began < 0.8  # not the look once a second
        for pipe in putters + getters:
            family.end(pipe)


def put_until_shutdown(path: Path, pipe: Connection) -> None:
    with SpoolWriter(path) as writer:
        pipe.send("begins")
        with pytest.raises(ShutDown):
            writer.put(np.zeros(10_000))
        pipe.send(time.monotonic())


def get_until_shutdown(path: Path, pipe: Connection) -> None:
    with SpoolReader(path) as reader:
        pipe.send("begins")
        with pytest.raises(ShutDown):
            reader.get()
        pipe.send(time.monotonic())


def test_iteration_in_another_process_ends_with_the_last_item(path: Path, family: Family) -> None:
    with SpoolWriter(path) as writer:
        counting = family.start(count, path)
        for size in range(100):
            writer.put(np.zeros(size * 100))
        writer.shutdown()
        assert received(counting) == sum(range(100)) * 100
        family.end(counting)


def count(path: Path, pipe: Connection) -> None:
    with SpoolReader(path) as reader:
        pipe.send(sum(len(array) for array in reader))


def test_blocked_put_goes_on_when_another_process_takes_an_item(path: Path, family: Family) -> None:
    with SpoolWriter(path, maxsize=1) as writer:
        taking = family.start(take_on_demand, path)
        assert received(taking) == "begins"
        writer.put(np.zeros(10_000))
        with pytest.raises(Full):
            writer.put_nowait(np.zeros(10_000))
        for _ in range(20):
            taking.send("take")
            writer.put(np.zeros(10_000), timeout=20)
        taking.send("end")
        family.end(taking)


def take_on_demand(path: Path, pipe: Connection) -> None:
    with SpoolReader(path) as reader:
        pipe.send("begins")
        while pipe.recv() == "take":
            reader.get(timeout=20)


def test_dead_readers_items_are_delivered_to_a_waiting_one(path: Path, family: Family) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for number in range(6):
            writer.put(item(0, number))
        holding = family.start(hold, path, 4)
        assert received(holding) == [0, 1, 2, 3]
        assert [identity(reader.get_nowait()) for _ in range(2)] == [(0, 4), (0, 5)]
        with pytest.raises(Empty):
            reader.get_nowait()
        os.kill(family.process(holding).pid, signal.SIGKILL)
        began = time.monotonic()
        deliveries: list[Delivery] = []
        while len(deliveries) < 4:
            assert reader._source.wait_items(began + 20)
            deliveries += reader._source.claim(4, None)
        assert time.monotonic() - began < 3
        assert [delivery.attempt for delivery in deliveries] == [2, 2, 2, 2]
        loaded = [identity(reader._source.load(delivery).arrays[0]) for delivery in deliveries]
        assert loaded == [(0, 0), (0, 1), (0, 2), (0, 3)]
        reader._source.ack(deliveries)


def hold(path: Path, most: int, pipe: Connection) -> None:
    reader = SpoolReader(path)
    deliveries = reader._source.claim(most, None)
    pipe.send([int(reader._source.load(delivery).arrays[0][1]) for delivery in deliveries])
    pipe.recv()


def test_processes_that_come_at_once_make_one_spool(path: Path, family: Family) -> None:
    comers = [family.start(come, path, number) for number in range(6)]
    for pipe in comers:
        assert received(pipe) == "ready"
    for pipe in comers:
        pipe.send("go")
    for pipe in comers:
        family.end(pipe)
    with SpoolReader(path) as reader:
        assert sorted(int(reader.get_nowait()[0]) for _ in comers) == list(range(6))
        assert reader.empty()


def come(path: Path, number: int, pipe: Connection) -> None:
    pipe.send("ready")
    pipe.recv()
    with SpoolWriter(path, maxsize=10) as writer:
        writer.put(np.array([number]))
