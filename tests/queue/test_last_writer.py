"""A reader learns of the end at once; with `end="writers"` that is when the last writer has left, however it left."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.faults import Forked, Injector, at, forked, kill
from support.peer import Peer
from support.waits import LOOK_OFTEN, start_waiting, until_asleep

from spoolipc import Empty, ShutDown, SpoolReader, SpoolWriter, stat
from spoolipc.directory import session

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of threads, from Python 3.12
LOOKS = 0.2
"""Seconds in which a reader that looks often has looked for crashed sessions."""
END = "[int(array[0]) for array in reader]"


@pytest.fixture
def reader(spool: Path) -> Iterator[SpoolReader]:
    with SpoolReader(spool, end="writers") as reader:
        yield reader


@pytest.fixture
def gate() -> Iterator[int]:
    """An eventfd for a child to wait at."""
    fd = os.eventfd(0, os.EFD_SEMAPHORE)
    yield fd
    os.close(fd)


ready = gate  # another one, for the parent to wait at


def one(number: float) -> np.ndarray[Any, Any]:
    return np.full(3, number)


@pytest.mark.usefixtures("no_look")
@pytest.mark.parametrize("readers", [1, 3])
def test_who_waits_is_woken_by_the_close_of_the_last_writer(spool: Path, readers: int) -> None:
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        writers = [SpoolWriter(spool) for _ in range(2)]
        opened = [stack.enter_context(SpoolReader(spool, end="writers")) for _ in range(readers)]
        waiting = [pool.submit(list, reader) for reader in opened]
        for writer in writers:
            until_asleep(os.getpid(), _thread_of(pool))
            assert not any(each.done() for each in waiting)
            writer.close()
        assert [each.result(20) for each in waiting] == [[]] * readers


def _thread_of(pool: ThreadPoolExecutor) -> int:
    return max(thread.native_id or 0 for thread in pool._threads)


@pytest.mark.usefixtures("no_look")
@pytest.mark.parametrize("end", ["writers", "shutdown"])
@pytest.mark.parametrize("settle", ["ack", "reject", "last nack", "close"])
def test_who_waits_is_woken_when_the_last_item_in_flight_is_settled(
    spool: Path, settle: str, end: Any
) -> None:
    with ThreadPoolExecutor() as pool, SpoolReader(spool, end=end) as reader:
        with SpoolWriter(spool, max_attempts=1) as writer:
            writer.put(one(1))
            if end == "shutdown":
                writer.shutdown()
        other = SpoolReader(spool)
        item = other.receive()
        waiting = pool.submit(list, reader)
        until_asleep(os.getpid(), _thread_of(pool))
        assert not waiting.done()
        {"ack": item.ack, "reject": lambda: item.reject("bad"), "last nack": item.nack, "close": other.close}[
            settle
        ]()
        assert waiting.result(20) == []
        other.close()


@pytest.mark.parametrize("put", [0, 3])
def test_killed_writer_does_not_leave_readers_waiting(spool: Path, put: int) -> None:
    with Peer(spool) as producer, Peer(spool) as first, Peer(spool) as second:
        for each in (first, second):
            each.run(f'{LOOK_OFTEN}; reader = SpoolReader(path, end="writers")')
        producer.run("writer = SpoolWriter(path)")
        start_waiting(first, END)
        start_waiting(second, END)
        producer.run(f"for number in range({put}): writer.put(np.full(3, number))")
        producer.kill()
        assert sorted(first.answer() + second.answer()) == list(range(put))


@pytest.mark.usefixtures("look_often")
def test_writer_of_a_process_that_ended_without_closing_it_has_left(spool: Path, reader: SpoolReader) -> None:
    assert forked(lambda: SpoolWriter(spool).put(one(1))) == 0
    assert [array[0] for array in reader] == [1]


def test_writer_that_was_dropped_unclosed_has_left(spool: Path, reader: SpoolReader) -> None:
    SpoolWriter(spool).put(one(1))
    gc.collect()
    assert [array[0] for array in reader] == [1]


@pytest.mark.usefixtures("look_often")
def test_stopped_writer_is_there_and_so_is_one_that_does_nothing(spool: Path, reader: SpoolReader) -> None:
    with Peer(spool) as producer:
        producer.run("writer = SpoolWriter(path)")
        with pytest.raises(Empty):
            reader.get(timeout=LOOKS)
        producer.stop()
        with pytest.raises(Empty):
            reader.get(timeout=LOOKS)
        producer.go()


@pytest.mark.usefixtures("look_often")
def test_writer_killed_at_any_call_leaves_nobody_waiting(spool: Path) -> None:
    def write(number: int) -> None:
        with Injector(at(number, kill)), SpoolWriter(spool) as writer:
            writer.put(one(1))

    SpoolWriter(spool).close()
    number, left = 1, 0
    while left == 0:
        with SpoolReader(spool, end="writers") as reader:
            writer = SpoolWriter(spool)  # so that there was one, wherever the other is killed
            left = 0 if forked(lambda number=number: write(number)) else 1  # type: ignore[misc]
            writer.close()
            assert [array[0] for array in reader] in ([], [1])
        number += 3
    assert number > 60


# Forks


@pytest.mark.usefixtures("look_often")
def test_forked_writer_counts_from_the_fork(spool: Path, reader: SpoolReader, gate: int, ready: int) -> None:
    writer = SpoolWriter(spool)

    def work() -> None:
        os.eventfd_read(gate)
        writer.put(one(1))
        writer.close()
        os.eventfd_write(ready, 1)
        os.eventfd_read(gate)

    child = Forked(work)
    writer.close()
    with pytest.raises(Empty):
        reader.get(timeout=LOOKS)
    os.eventfd_write(gate, 1)
    os.eventfd_read(ready)  # the child goes on without it
    assert [array[0] for array in reader] == [1]
    os.eventfd_write(gate, 1)
    assert child.ended() == 0


@pytest.mark.usefixtures("look_often")
@pytest.mark.parametrize("end", ["close", "exit", "crash", "drop"])
@pytest.mark.parametrize("generations", [1, 2])
def test_forked_writer_that_was_never_used_counts_until_it_is_closed(
    spool: Path, reader: SpoolReader, gate: int, ready: int, end: str, generations: int
) -> None:
    held = [SpoolWriter(spool)]

    def work() -> None:
        if generations == 2 and os.fork():
            os._exit(0)
        os.eventfd_read(gate)
        if end == "close":
            held[0].close()
        elif end == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        elif end == "drop":
            held.clear()
            gc.collect()
        if end in ("close", "drop"):
            os.eventfd_write(ready, 1)
            os.eventfd_read(gate)

    child = Forked(work)
    held[0].close()
    if generations == 2:
        assert child.ended() == 0
    with pytest.raises(Empty):
        reader.get(timeout=LOOKS)
    os.eventfd_write(gate, 1)
    if end in ("close", "drop"):
        os.eventfd_read(ready)
    assert list(reader) == []
    os.eventfd_write(gate, 1)
    if generations == 1:
        child.ended()


def test_forked_writer_leaves_no_descriptor_behind_when_it_is_closed_or_used(spool: Path) -> None:
    def open_here() -> list[str]:
        numbers = os.listdir("/proc/self/fd")
        return [name for name in map(_target, numbers) if name.startswith(str(spool))]

    with SpoolWriter(spool) as writer:
        before = len(open_here())

        def use() -> None:
            assert len(open_here()) == 1
            writer.put(one(1))
            assert len(open_here()) == before
            writer.close()
            assert open_here() == []

        def close() -> None:
            writer.close()
            assert open_here() == []

        for work in (use, close):
            assert forked(work) == 0


def _target(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except FileNotFoundError:
        return ""


@pytest.mark.usefixtures("look_often")
def test_forked_writer_counts_on_when_it_could_not_be_opened_again(
    spool: Path, reader: SpoolReader, gate: int, ready: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SpoolWriter(spool)

    def work() -> None:
        def fail(*args: object, **more: object) -> None:
            raise OSError(24, "too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(session, "open_directories", fail)
            with pytest.raises(OSError, match="too many"):
                writer.put(one(1))
        os.eventfd_write(ready, 1)
        os.eventfd_read(gate)
        writer.put(one(2))

    child = Forked(work)
    os.eventfd_read(ready)
    writer.close()
    with pytest.raises(Empty):
        reader.get(timeout=LOOKS)
    os.eventfd_write(gate, 1)
    assert [array[0] for array in reader] == [2]
    assert child.ended() == 0


def test_pickled_writer_counts_from_when_it_is_opened(spool: Path, reader: SpoolReader) -> None:
    writer = SpoolWriter(spool)
    pickled = pickle.dumps(writer)
    other: SpoolWriter = pickle.loads(pickled)
    writer.close()
    with pytest.raises(Empty):
        reader.get(timeout=0.01)
    other.close()
    with pytest.raises(ShutDown):
        reader.get()


def test_reader_keeps_its_end_when_it_is_pickled_and_forked(spool: Path, reader: SpoolReader) -> None:
    SpoolWriter(spool).close()

    def ended() -> None:
        with pytest.raises(ShutDown):
            reader.get()

    assert forked(ended) == 0
    pickled = pickle.dumps(reader)
    with pickle.loads(pickled) as again:
        with pytest.raises(Empty):  # no writer was there since it was opened
            again.get(block=False)
        SpoolWriter(spool).close()
        with pytest.raises(ShutDown):
            again.get()


# What an end leaves


def test_immediate_shutdown_leaves_no_file_of_what_waits(writer: SpoolWriter, spool: Path) -> None:
    writer.put_many(np.full(1 + number, number) for number in range(200))
    writer.shutdown(immediate=True)
    assert list((spool / "items").iterdir()) == []


def test_immediate_shutdown_leaves_no_history_of_what_is_requeued_after_it(
    writer: SpoolWriter, spool: Path
) -> None:
    writer.put(np.zeros(3))
    with SpoolReader(spool) as reader:
        item = reader.receive()
        writer.shutdown(immediate=True)
        item.nack()
    SpoolReader(spool).close()
    assert os.listdir(spool / "failed") == []


def test_who_leaves_leaves_nothing_in_alive_and_tmp(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        lent = writer.loan(5000)
        writer.put(lent.array)
        reader.get()
        reader.close()
        assert len(list((spool / "alive").iterdir())) == 1
        assert len(list((spool / "tmp").iterdir())) == 1
    for part in ("alive", "tmp"):
        assert list((spool / part).iterdir()) == []
    lent.array[:] = 1  # and who has it may write it


# What somebody takes away


def _remove_tmp(spool: Path) -> None:
    shutil.rmtree(spool / "tmp")


def _remove_index(spool: Path) -> None:
    (spool / "index").unlink()


@pytest.mark.usefixtures("look_often")
@pytest.mark.parametrize("damage", [_remove_tmp, _remove_index])
def test_end_is_found_where_a_part_was_removed(spool: Path, damage: Callable[[Path], None]) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool, end="writers") as reader:
        writer.put(one(1))
        damage(spool)
        writer.put(one(2))
        assert [reader.get()[0] for _ in range(2)] == [1, 2]
        with pytest.raises(Empty):
            reader.get(timeout=LOOKS)
        writer.put(one(3))
        writer.close()
        assert [array[0] for array in reader] == [3]
    assert stat(spool).depth == 0
