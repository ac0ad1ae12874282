"""Who sleeps is woken by the very next item or free place: no wake-up is lost, none waits for the look once a second.

Times are `time.monotonic`, one clock for all processes of the machine, carried in the arrays.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.faults import Injector
from support.peer import Peer
from support.waits import is_locked, naps, polls, start_waiting, until, until_asleep

from spoolipc import Empty, SpoolReader, SpoolWriter, failed_retry

LOOK = 1.0
"""Seconds after which whoever sleeps looks by itself."""
LATEST = 0.8
"""Seconds that no wake-up may take: what is missed by one who fell asleep just now takes LOOK."""
Peers = contextlib.ExitStack
READ_STAMPS = "[time.monotonic() - float(array[0]) for array in reader]"
"""How long each item took from just before its put."""


@pytest.fixture
def peers(spool: Path) -> Iterator[Peers]:
    with contextlib.ExitStack() as peers:
        yield peers


def reading(peers: Peers, spool: Path) -> Peer:
    """A process that reads to the end and answers with how long each item took; it sleeps already."""
    peer = peers.enter_context(Peer(spool))
    peer.run("reader = SpoolReader(path)")
    start_waiting(peer, READ_STAMPS)
    return peer


def stamp(size: int = 1) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.full(size, time.monotonic())


def none_is_late(seconds: list[float], count: int) -> None:
    assert len(seconds) == count
    assert [each for each in seconds if not 0 <= each < LATEST] == []


@pytest.mark.parametrize(("times", "size", "lasting"), [(100, 1, True), (40, 5000, True), (40, 1, False)])
def test_idle_reader_is_woken_by_each_item(
    spool: Path, peers: Peers, times: int, size: int, lasting: bool
) -> None:
    """Of one writer, or each of one that lives for that item only."""
    with SpoolWriter(spool) as one:
        reader = reading(peers, spool)
        for _ in range(times):
            until_asleep(reader.pid)
            with contextlib.nullcontext(one) if lasting else SpoolWriter(spool) as writer:
                writer.put(stamp(size))
            until(lambda: not one.qsize())
        one.shutdown()
        none_is_late(reader.answer(), times)


def test_reader_is_woken_at_whatever_moment_an_item_comes(spool: Path, peers: Peers) -> None:
    """It is stopped on its way to sleep, microsecond by microsecond, and the item is put meanwhile."""
    with SpoolWriter(spool) as writer:
        reader = reading(peers, spool)
        put = 0
        for number in range(3000):
            moment = time.monotonic() + number % 1000 * 1e-6
            while time.monotonic() < moment:
                pass
            reader.stop()
            if not is_locked(spool):
                writer.put(stamp())
                put += 1
            reader.go()
            while writer.qsize():
                os.sched_yield()
        writer.shutdown()
        none_is_late(reader.answer(), put)


def test_as_many_sleeping_readers_wake_as_items_come(spool: Path, peers: Peers) -> None:
    """More readers than items, as many, and fewer."""
    with SpoolWriter(spool) as writer:
        readers = [reading(peers, spool) for _ in range(4)]
        put = 0
        for count in (1, 2, 4, 7) * 4:
            for reader in readers:
                until_asleep(reader.pid)
            for _ in range(count):
                writer.put(stamp())
            put += count
            until(lambda: not writer.qsize())
        writer.shutdown()
        none_is_late([each for reader in readers for each in reader.answer()], put)


TWENTY = """
import threading
readers = [SpoolReader(path), SpoolReader(path)]
found = []
def wait(k):
    array = readers[k % 2].get()
    found.append(time.monotonic() - float(array[0]))
threads = [threading.Thread(target=wait, args=(k,)) for k in range(5)]
for thread in threads:
    thread.start()
ids = [thread.native_id for thread in threads]
"""


def test_one_item_wakes_one_of_twenty_waiters_and_nineteen_more_the_rest(spool: Path, peers: Peers) -> None:
    """Four processes, two readers in each, and threads that share them."""
    with SpoolWriter(spool) as writer:
        four = [peers.enter_context(Peer(spool)) for _ in range(4)]
        for peer in four:
            peer.run(TWENTY)
            for thread in peer.ask("ids"):
                until_asleep(peer.pid, thread)
        writer.put(stamp())
        until(lambda: not writer.qsize())
        until(lambda: sum(peer.ask("len(found)") for peer in four) == 1)
        writer.put_many([stamp() for _ in range(19)])
        for peer in four:
            peer.run("for thread in threads: thread.join()")
        none_is_late([each for peer in four for each in peer.ask("found")], 20)


def test_crashed_waiter_takes_no_wake_up_from_others(spool: Path, peers: Peers) -> None:
    """Until it is known to have crashed it may: then the next item waits for the look once a second."""
    with SpoolWriter(spool) as writer:
        sleeper = reading(peers, spool)
        for crashing in [reading(peers, spool) for _ in range(5)]:
            crashing.kill()
        writer.put(stamp())
        until(lambda: not writer.qsize())
        slept = naps(sleeper.pid)
        until(lambda: naps(sleeper.pid) >= slept + 3)  # it looked by itself, and again
        for _ in range(10):
            until_asleep(sleeper.pid)
            writer.put(stamp())
            until(lambda: not writer.qsize())
        writer.shutdown()
        first, *others = sleeper.answer()
        assert first < LOOK + LATEST
        none_is_late(others, 10)


@pytest.mark.parametrize("end", ["crashed", "stopped"])
def test_another_is_woken_in_the_place_of_one_that_cannot_wake(spool: Path, peers: Peers, end: str) -> None:
    """It has waited longer, so it is rung first."""
    with SpoolWriter(spool) as writer:
        first, sleeper = reading(peers, spool), reading(peers, spool)
        if end == "crashed":
            first.kill()
        else:
            first.stop()
            slept = naps(sleeper.pid)
            until(
                lambda: naps(sleeper.pid) >= slept + 3
            )  # it looks once a second, which the other does no more
            until_asleep(sleeper.pid)
        writer.put(stamp())
        until(lambda: not writer.qsize())
        writer.shutdown()
        none_is_late(sleeper.answer(), 1)


def test_waiter_that_is_interrupted_as_it_is_woken_wakes_another(spool: Path, peers: Peers) -> None:
    with SpoolWriter(spool) as writer:
        first = peers.enter_context(Peer(spool))
        first.run(
            "reader = SpoolReader(path)\ndef end():\n try: reader.get()\n except KeyboardInterrupt: pass"
        )
        start_waiting(first, "end()")
        sleeper = reading(peers, spool)
        first.stop()
        os.kill(first.pid, signal.SIGINT)
        writer.put(stamp())  # rings the first, which has waited longer
        first.go()
        first.answer()
        until(lambda: not writer.qsize())
        writer.shutdown()
        none_is_late(sleeper.answer(), 1)


def test_waiter_that_ran_out_of_time_takes_no_wake_up_from_others(spool: Path, peers: Peers) -> None:
    with SpoolWriter(spool) as writer, contextlib.ExitStack() as left:
        sleeper = reading(peers, spool)
        for number in range(20):
            reader = left.enter_context(SpoolReader(spool))
            with pytest.raises(Empty):
                reader.get(timeout=0.05)
            if number % 2:
                reader.close()
            until_asleep(sleeper.pid)
            writer.put(stamp())
            until(lambda: not writer.qsize())
        writer.shutdown()
        none_is_late(sleeper.answer(), 20)


def test_writer_that_waits_for_space_is_woken_by_each_free_place(spool: Path, peers: Peers) -> None:
    times = 60
    with SpoolWriter(spool, maxsize=1) as other, SpoolReader(spool) as reader:
        writer = peers.enter_context(Peer(spool))
        writer.run("writer = SpoolWriter(path); writer.put(np.zeros(1000))")
        start_waiting(writer, f"[[writer.put(np.zeros(1000)), time.monotonic()][1] for _ in range({times})]")
        freed = []
        for _ in range(times):
            until_asleep(writer.pid)
            freed.append(time.monotonic())
            reader.get(timeout=20)
            until(other.full)
        none_is_late([after - before for before, after in zip(freed, writer.answer(), strict=True)], times)


@pytest.mark.parametrize("how", ["requeued", "retried"])
def test_item_that_is_requeued_or_retried_wakes_a_reader(spool: Path, peers: Peers, how: str) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as holder:
        writer.put_many([np.zeros(1)] * 10)
        items = [holder.receive() for _ in range(10)]
        for item in items if how == "retried" else []:
            item.reject("no")
        reader = peers.enter_context(Peer(spool))
        reader.run("reader = SpoolReader(path)")
        start_waiting(reader, "[[reader.get(), time.monotonic()][1] for _ in range(10)]")
        began = []
        for item in items:
            until_asleep(reader.pid)
            began.append(time.monotonic())
            item.nack() if how == "requeued" else failed_retry(spool, [item.seq])
            until(lambda: not writer.qsize())
        none_is_late([came - each for came, each in zip(reader.answer(), began, strict=True)], 10)


@pytest.mark.parametrize("knows", [True, False], ids=["itself", "another"])
def test_reader_sleeps_until_the_delay_of_an_item_ends(spool: Path, peers: Peers, knows: bool) -> None:
    """Whether it requeued the item itself, or sleeps already, knowing nothing of the delay, when another does."""
    with SpoolWriter(spool) as writer, SpoolReader(spool) as holder:
        writer.put(np.zeros(1))
        peer = peers.enter_context(Peer(spool))
        peer.run("reader = SpoolReader(path); files = []")
        peer.run("count = lambda frame, *_: files.append(frame.f_code.co_filename)")
        wait = "[sys.setprofile(count), reader.get(), time.monotonic()][2]"
        if knows:
            peer.run("item = reader.receive(); began = time.monotonic(); item.nack(delay=0.3)")
            began = peer.ask("began")
            start_waiting(peer, wait)
        else:
            item = holder.receive()
            start_waiting(peer, wait)
            began = time.monotonic()
            item.nack(delay=0.3)
        slept = naps(peer.pid)
        assert 0.3 <= peer.answer() - began < LATEST
        assert naps(peer.pid) - slept < 20  # it does not poll
        assert (
            peer.ask("sum('spoolipc/directory' in file for file in [*files])") < 5000
        )  # nor look without a pause


@pytest.mark.parametrize("side", ["items", "space"])
def test_interrupt_ends_a_wait_at_once_and_the_next_call_works(spool: Path, peers: Peers, side: str) -> None:
    call = {"items": "reader.get()", "space": "writer.put(np.zeros(3))"}[side]
    with SpoolWriter(spool, maxsize=1) as writer, SpoolReader(spool) as reader:
        peer = peers.enter_context(Peer(spool))
        peer.run(
            "reader, writer = SpoolReader(path), SpoolWriter(path)\n"
            f"def end():\n try: {call}\n except KeyboardInterrupt: return time.monotonic()"
        )
        if side == "space":
            writer.put(np.zeros(3))
        start_waiting(peer, "end()")
        began = time.monotonic()
        os.kill(peer.pid, signal.SIGINT)
        none_is_late([peer.answer() - began], 1)
        if side == "space":
            reader.get()
            peer.run(call)
        else:
            writer.put(np.zeros(3))
            assert peer.ask("len(reader.get_nowait())") == 3


def test_polling_can_be_asked_for_and_then_wakes_too(
    spool: Path, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOOLIPC_WATCH", "polling")
    with SpoolWriter(spool) as writer:
        reader = peers.enter_context(Peer(spool))
        reader.run(
            "import logging, threading\nlines = []\nkeep = logging.Handler()\nkeep.emit = lines.append\n"
            "logging.getLogger('spoolipc').addHandler(keep)\nreader = SpoolReader(path)"
        )
        reader.start("ask", READ_STAMPS)
        for _ in range(20):
            until(polls(reader.pid))
            writer.put(stamp())
            until(lambda: not writer.qsize())
        writer.shutdown()
        none_is_late(reader.answer(), 20)
        assert reader.ask("[stat(path).waiting_mode, threading.active_count(), len(lines)]") == [
            "polling",
            1,
            0,
        ]


WAIT_AND_LEAVE = """
import gc, os, threading
def once(close):
    reader = SpoolReader(path)
    try: reader.get(timeout=0.01)
    except Empty: pass
    if close: reader.close()
def opened():
    gc.collect()
    return [len(os.listdir("/proc/self/fd")), threading.active_count()]
"""


def test_get_that_waits_takes_the_lock_only_as_its_time_is_up(spool: Path) -> None:
    """Before it sleeps, looks say that there is nothing; it is made sure of in the end."""
    with SpoolWriter(spool), SpoolReader(spool) as reader:
        taken = []
        for _ in range(5):  # the first takes a place among those who wait, another may keep house
            with Injector() as calls, pytest.raises(Empty):
                reader.get(timeout=0.001)
            taken.append(calls.met.count("lock"))
    assert min(taken) == 1


@pytest.mark.parametrize("close", [True, False], ids=["closed", "dropped"])
def test_sessions_that_waited_leave_no_descriptor_and_no_thread(spool: Path, close: bool) -> None:
    with SpoolWriter(spool), Peer(spool) as peer:
        peer.run(WAIT_AND_LEAVE)
        before = peer.ask("opened()")
        peer.run(f"for _ in range(20): once({close})")
        peer.run(
            "gc.collect(); once(True)"
        )  # what was dropped is let go of at the latest when another one closes
        assert peer.ask("opened()") == before
