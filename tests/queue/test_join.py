"""join waits until all that was put before it is done, is woken by what ends that, and costs the others little."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.faults import forked
from support.peer import Peer
from support.waits import until_asleep

from spoolipc import SpoolReader, SpoolWriter, failed_list, purge, stat
from spoolipc.directory import doorbell
from spoolipc.directory.liveness import ring

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of threads, from Python 3.12
Ending = Callable[[SpoolReader], object]


def one(number: float) -> np.ndarray[Any, Any]:
    return np.full(3, number)


@contextmanager
def joining(writer: SpoolWriter, timeout: float | None = None) -> Iterator[Future[bool]]:
    """A join in another thread, which sleeps."""
    threads: list[int] = []

    def join() -> bool:
        threads.append(threading.get_native_id())
        return writer.join(timeout)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(join)
        while not threads:
            os.sched_yield()
        until_asleep(os.getpid(), threads[0])
        assert not future.done()
        try:
            yield future
        finally:
            if not future.done():
                writer.close()


def ack(reader: SpoolReader) -> None:
    reader.receive().ack()


def reject(reader: SpoolReader) -> None:
    reader.receive().reject("bad")


def last_nack(reader: SpoolReader) -> None:
    reader.receive().nack()


def close(reader: SpoolReader) -> None:
    """With the last attempt of an item in flight."""
    held = reader.receive()
    reader.close()
    assert not held.settled


def empty(reader: SpoolReader) -> None:
    assert purge(reader.path) == 1


ENDINGS: list[Ending] = [SpoolReader.get, ack, reject, last_nack, close, empty]


@pytest.mark.usefixtures("no_look")
@pytest.mark.parametrize("end", ENDINGS, ids=lambda end: end.__name__)
def test_join_is_woken_by_what_takes_the_last_item_off(spool: Path, end: Ending) -> None:
    with SpoolWriter(spool, max_attempts=1) as writer, SpoolReader(spool) as reader:
        writer.put(one(1))
        with joining(writer) as joined:
            end(reader)
            assert joined.result(20)


@pytest.mark.usefixtures("no_look")
def test_join_in_each_of_several_processes_is_woken(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader, Peer(spool) as other:
        other.run("writer = SpoolWriter(path)")
        writer.put_many([one(1), one(2)])
        other.start("ask", "writer.join(20)")
        with joining(writer) as joined:
            while reader.qsize():
                reader.get()
            assert joined.result(20)
        assert other.answer()


def test_join_is_woken_once_and_not_by_every_item(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rings: list[int] = []

    def counted(alive: int, token: int) -> bool:
        rings.append(token)
        return ring(alive, token)

    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader, SpoolWriter(spool) as other:
        slow = reader.receive() if writer.put(one(0)) else None
        writer.put_many([one(number) for number in range(100)])
        with joining(writer) as joined:
            monkeypatch.setattr(doorbell, "ring", counted)
            for number in range(200):
                other.put(one(number))
                reader.receive().ack()
            assert reader.qsize() == 100
            assert not joined.done()
            assert slow is not None
            slow.ack()
            assert joined.result(20)
        assert len(rings) <= 2


@pytest.mark.usefixtures("look_often")
def test_join_goes_on_when_a_reader_is_killed_and_another_does_its_work(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader, Peer(spool) as other:
        writer.put(one(1))
        other.run("reader = SpoolReader(path); item = reader.receive()")
        with joining(writer) as joined:
            other.kill()
            with reader.receive(timeout=20) as item:
                assert (item.attempt, joined.done()) == (2, False)
            assert joined.result(20)


@pytest.mark.usefixtures("look_often")
def test_join_finds_an_item_whose_last_reader_was_killed_a_dead_letter(spool: Path) -> None:
    with SpoolWriter(spool, max_attempts=1) as writer, Peer(spool) as other:
        writer.put(one(1))
        other.run("reader = SpoolReader(path); item = reader.receive()")
        with joining(writer) as joined:
            other.kill()
            assert joined.result(20)
    assert [letter.seq for letter in failed_list(spool)] == [1]


def test_join_goes_on_with_the_index_that_was_built_again(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put_many([one(1), one(2)])
        with joining(writer) as joined:
            (spool / "index").unlink()
            reader.get()
            assert not joined.done()
            reader.get()
            assert joined.result(20)


def test_join_after_a_fork_waits_for_what_the_parent_put_too(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put(one(1))
        asked, asks = os.pipe()

        def child() -> None:
            assert not writer.join(0)
            os.write(asks, b".")
            assert writer.join(20)

        def take() -> None:
            os.close(asks)
            with open(asked, "rb") as answer:
                assert answer.read(1) == b"."
            assert stat(spool).live_sessions == 3  # the child has a session of its own
            reader.get()

        assert forked(child, take) == 0


def test_interrupt_ends_a_join_and_the_writer_goes_on(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put(one(1))
        main = threading.main_thread()

        def interrupt() -> None:
            until_asleep(os.getpid(), main.native_id or 0)
            signal.pthread_kill(main.ident or 0, signal.SIGINT)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(interrupt)
            with pytest.raises(KeyboardInterrupt):
                writer.join()
        assert not writer.join(timeout=0)
        reader.get()
        assert writer.join(timeout=0)


@pytest.mark.parametrize("timeout", ["5", -1, float("nan")])
def test_timeout_that_is_no_number_of_seconds_is_refused(writer: SpoolWriter, timeout: Any) -> None:
    with pytest.raises(ValueError, match="timeout must be a non-negative number of seconds"):
        writer.join(timeout)
