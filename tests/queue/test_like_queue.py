"""put, get and what goes with them mean what they mean for queue.Queue; a closed side says so."""

from __future__ import annotations

import gc
import os
import pickle
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.calls import Call
from support.peer import Peer

from spoolipc import Empty, Full, ShutDown, SpoolReader, SpoolWriter

LARGE = 5000
"""Of float64: 40 KB, which is given out as a view of the file."""


def descriptors() -> Counter[str]:
    """What this process has open, without the numbers in names."""
    gc.collect()
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[re.sub(r"[0-9]+", "#", os.readlink(f"/proc/self/fd/{name}"))] += 1
    return found


def test_errors_are_those_of_queue() -> None:
    assert issubclass(ShutDown, getattr(queue, "ShutDown", Exception))
    assert issubclass(Full, queue.Full)
    assert issubclass(Empty, queue.Empty)


@pytest.mark.parametrize("timeout", [0, 0.05, 0.3])
def test_empty_and_full_are_raised_when_the_timeout_is_over_and_not_before(
    spool: Path, reader: SpoolReader, timeout: float
) -> None:
    with SpoolWriter(spool, maxsize=1) as writer:
        writer.put(np.zeros(1))
        assert writer.full()
        for size in (1, LARGE):
            began = time.monotonic()
            with pytest.raises(queue.Full):
                writer.put(np.zeros(size), timeout=timeout)
            assert time.monotonic() - began >= timeout
        with pytest.raises(queue.Full):
            writer.put(np.zeros(1), False, -1)  # as in queue.Queue, this timeout means nothing
        reader.get()
        assert not writer.full()
        for get in (reader.get, lambda **kw: reader.get_many(5, **kw), reader.receive, reader.peek):
            began = time.monotonic()
            with pytest.raises(queue.Empty):
                get(timeout=timeout)
            assert time.monotonic() - began >= timeout
        with pytest.raises(queue.Empty):
            reader.get(False, -1)


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan")])
def test_negative_timeout_is_a_value_error_even_when_it_need_not_wait(
    writer: SpoolWriter, reader: SpoolReader, timeout: float
) -> None:
    with pytest.raises(ValueError, match="non-negative"):
        writer.put(np.zeros(1), timeout=timeout)
    writer.put(np.zeros(1))
    with pytest.raises(ValueError, match="non-negative"):
        reader.get(timeout=timeout)
    assert reader.qsize() == 1


def test_blocked_get_takes_what_comes(writer: SpoolWriter, reader: SpoolReader) -> None:
    waiting = Call(reader.get)
    waiting.until_asleep()
    writer.put(np.arange(4))
    assert waiting.result().tolist() == [0, 1, 2, 3]


def test_blocked_put_goes_on_when_there_is_room(spool: Path, reader: SpoolReader) -> None:
    with SpoolWriter(spool, maxsize=1) as writer:
        writer.put(np.zeros(1))
        waiting = Call(writer.put, np.ones(1))
        waiting.until_asleep()
        assert reader.get_nowait() == 0
        assert waiting.result() == 2
        assert reader.get_nowait() == 1


def test_closing_twice_is_harmless_and_use_after_it_is_an_error(spool: Path) -> None:
    writer, reader = SpoolWriter(spool), SpoolReader(spool)
    for _ in range(2):
        writer.close()
        reader.close()
    for use in (lambda: writer.put(np.zeros(1)), reader.get_nowait, reader.qsize, writer.qsize):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_closing_ends_the_waits_of_other_threads(spool: Path) -> None:
    with SpoolWriter(spool, maxsize=1) as other:
        other.put(np.zeros(1))
        writer = SpoolWriter(spool)
        putting = Call(writer.put, np.zeros(LARGE))
        putting.until_asleep()
        writer.close()
        assert isinstance(putting.error(), ValueError)
        with SpoolReader(spool) as taking:
            taking.get()
        reader = SpoolReader(spool)
        getting = Call(reader.get)
        getting.until_asleep()
        reader.close()
        assert isinstance(getting.error(), ValueError)


@pytest.mark.parametrize("size", [10, 40_000])
def test_closing_amid_traffic_of_other_threads_ends_it_with_a_clear_error(spool: Path, size: int) -> None:
    def going_on(step: Callable[[], object], going: threading.Semaphore) -> None:
        while True:
            step()
            going.release()

    for _ in range(10):
        writer, reader, going = SpoolWriter(spool), SpoolReader(spool), threading.Semaphore(0)
        steps = (lambda writer=writer: writer.put(np.zeros(size)), reader.get) * 2
        calls = [Call(going_on, step, going) for step in steps]
        for _ in range(20):
            assert going.acquire(timeout=30)
        writer.close()
        reader.close()
        for call in calls:
            assert isinstance(call.error(), ValueError)
            assert "closed" in str(call.error())
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put(np.ones(3))
        assert sum(int(array.sum()) for array in reader.get_many(100_000)) == 3
    assert list((spool / "tmp").iterdir()) == []


def test_repr_names_the_path(writer: SpoolWriter, reader: SpoolReader, spool: Path) -> None:
    assert repr(writer) == f"SpoolWriter({str(spool)!r})"
    assert repr(reader) == f"SpoolReader({str(spool)!r})"


def work(writer: SpoolWriter, reader: SpoolReader) -> None:
    for size in (1, LARGE, 2 * LARGE):
        writer.put(np.zeros(size))
        reader.get_nowait()
    with pytest.raises(Empty):
        reader.get(timeout=0.01)


@pytest.mark.parametrize("closed", [True, False])
def test_sessions_that_are_closed_or_dropped_leave_nothing_open(spool: Path, closed: bool) -> None:
    with SpoolWriter(spool) as staying, SpoolReader(spool) as waiting:
        work(staying, waiting)
        before = descriptors()
        for _ in range(20):
            writer, reader = SpoolWriter(spool), SpoolReader(spool)
            work(writer, reader)
            if closed:
                writer.close()
                reader.close()
            del writer, reader
        opened = descriptors() - before
        assert sum(opened.values()) <= 3, opened  # of those who stay: whom they woke meanwhile
        assert len(list((spool / "alive").iterdir())) == 2


def test_closed_sessions_have_nothing_of_the_spool_open_but_its_table(spool: Path) -> None:
    writer, reader = SpoolWriter(spool), SpoolReader(spool)
    work(writer, reader)
    writer.close()
    reader.close()
    here = re.sub(r"[0-9]+", "#", str(spool))
    left = [name for name in descriptors() if name.startswith(here) and not name.endswith("index")]
    assert left == []


def test_refused_opening_leaves_nothing_open(spool: Path) -> None:
    with SpoolWriter(spool, maxsize=3):
        before = descriptors()
        for _ in range(5):
            with pytest.raises(ValueError, match="maxsize"):
                SpoolWriter(spool, maxsize=4)
        assert descriptors() - before == Counter()


def test_writer_and_reader_can_be_pickled(spool: Path) -> None:
    with SpoolWriter(spool, maxsize=5, durability="fsync") as writer, SpoolReader(spool) as reader:
        other: SpoolWriter = pickle.loads(pickle.dumps(writer))
        another: SpoolReader = pickle.loads(pickle.dumps(reader))
        with other, another, Peer(spool) as peer:
            assert (other.path, another.path, other.maxsize) == (writer.path, reader.path, 5)
            other.put(np.full(LARGE, 1.0))
            peer.run("import pickle")
            peer.run(f"reader, writer = pickle.loads({pickle.dumps((reader, writer))!r})")
            peer.run("writer.put(reader.get(timeout=30) + 1)")
            assert (another.get_nowait() == 2).all()


def test_threads_share_a_writer_and_a_reader(spool: Path) -> None:
    """Eight of each: every item once and whole, no view changed while it was kept."""
    count = 150

    def put(writer: SpoolWriter, me: int) -> None:
        for number in range(count):
            writer.put(np.full(100 + 700 * ((number + me) % 9), me * count + number))

    def get(reader: SpoolReader) -> list[int]:
        seen: list[int] = []
        kept: list[tuple[Any, int]] = []
        for array in reader:
            seen.append(int(array[0]))
            kept.append((array, seen[-1]))
            if len(kept) > 5:
                old, value = kept.pop(0)
                assert (old == value).all()
        assert all((array == value).all() for array, value in kept)
        return seen

    with (
        SpoolWriter(spool, maxsize=40) as writer,
        SpoolReader(spool) as reader,
        ThreadPoolExecutor(16) as threads,
    ):
        getting = [threads.submit(get, reader) for _ in range(8)]
        for future in [threads.submit(put, writer, me) for me in range(8)]:
            future.result(100)
        writer.shutdown()
        seen = [value for future in getting for value in future.result(100)]
    assert sorted(seen) == list(range(8 * count))
