"""After a fork, child and parent both work, no view changes, and neither hides the other's crash."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.faults import Event, Forked, Injector
from support.waits import is_locked, until, until_asleep

from spoolipc import Empty, Full, Item, LeaseExpired, SpoolReader, SpoolWriter, stat
from spoolipc.directory import DirectoryEngine
from spoolipc.engine import ConsumerOptions
from spoolipc.message import Ack

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of threads, from Python 3.12
SIZE = 5000
"""Of float64: 40 KB, which is given out as a view of the file."""
LATEST = 0.8
"""Seconds that no wake-up may take: what is missed by one who fell asleep just now takes one."""
Array = np.ndarray[Any, Any]


@pytest.fixture
def gate() -> Iterator[int]:
    """An eventfd for the child to wait at."""
    fd = os.eventfd(0, os.EFD_SEMAPHORE)
    yield fd
    os.close(fd)


ready = gate  # another one, for the parent to wait at


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_of(number: float) -> Array:
    return np.full(SIZE, number)


def traffic(writer: SpoolWriter, reader: SpoolReader) -> None:
    """Write every file again that may be."""
    for number in range(60):
        writer.put(full_of(-number))
        assert (reader.get() == -number).all()


def drained(reader: SpoolReader) -> Iterator[Array]:
    with contextlib.suppress(Empty):
        while True:
            yield reader.get_nowait()


def test_child_is_a_session_of_its_own_once_it_uses_the_spool(
    writer: SpoolWriter, spool: Path, gate: int, ready: int
) -> None:
    def sessions() -> set[str]:
        return set(os.listdir(spool / "alive"))

    def work() -> None:
        os.eventfd_read(gate)
        writer.put(full_of(1))
        os.eventfd_write(ready, 1)
        os.eventfd_read(gate)

    before = sessions()
    child = Forked(work)
    assert sessions() == before
    os.eventfd_write(gate, 1)
    os.eventfd_read(ready)
    assert len(sessions()) == len(before) + 1
    assert before < sessions()
    os.eventfd_write(gate, 1)
    assert child.ended() == 0


def test_child_that_uses_no_spool_keeps_no_file_of_it_mapped(
    writer: SpoolWriter, reader: SpoolReader, spool: Path
) -> None:
    """The memory of a file that is removed would be kept with it."""

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(spool))

    def work() -> None:
        assert mapped() == 0

    traffic(writer, reader)
    assert mapped() > 0
    assert Forked(work).ended() == 0


@pytest.mark.parametrize("end", ["exit", "close", "crash"])
@pytest.mark.parametrize("used", [True, False])
def test_end_of_the_child_is_not_the_parents(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, end: str, used: bool
) -> None:
    for number in range(3):
        writer.put(full_of(number))
    item = reader.receive()
    ours = set(os.listdir(spool / "alive"))

    def work() -> None:
        if used:
            assert (reader.get() == 1).all()
            writer.put(full_of(3))
        if end == "close":
            reader.close()
            writer.close()
        elif end == "crash":
            crash()

    assert Forked(work).ended() == (-signal.SIGKILL if end == "crash" else 0)
    with SpoolReader(spool) as other:  # looks for crashed sessions
        assert [float(array[0]) for array in drained(other)] == ([2, 3] if used else [1, 2])
    assert set(os.listdir(spool / "alive")) >= ours
    item.ack()
    writer.put(full_of(4))
    assert (reader.get() == 4).all()


@pytest.mark.parametrize("generations", [1, 2])
def test_crash_of_the_parent_is_noticed_though_a_child_lives_that_never_used_the_spool(
    writer: SpoolWriter, spool: Path, gate: int, ready: int, generations: int
) -> None:
    writer.put(full_of(1))

    def descend(item: Item, left: int) -> None:
        if left == 0:
            os.eventfd_write(ready, 1)
            os.eventfd_read(gate)
            return
        Forked(lambda: descend(item, left - 1))
        if left < generations:
            os.eventfd_read(gate)

    def parent() -> None:
        item = SpoolReader(spool).receive()
        descend(item, generations)
        crash()

    child = Forked(parent)
    os.eventfd_read(ready)
    assert child.ended() == -signal.SIGKILL
    try:
        with SpoolReader(spool) as reader:
            assert (reader.get(timeout=5) == 1).all()
    finally:
        os.eventfd_write(gate, generations)


def test_grandchild_closes_no_descriptor_of_its_parent(writer: SpoolWriter, reader: SpoolReader) -> None:
    """The numbers of the descriptors that the child let go of are given out again before it forks."""
    writer.put(full_of(1))

    def work() -> None:
        files = [os.memfd_create(f"file {number}") for number in range(60)]

        def look() -> None:
            for fd in files:
                os.fstat(fd)
            assert (reader.get() == 1).all()

        assert Forked(look).ended() == 0
        for fd in files:
            os.fstat(fd)

    assert Forked(work).ended() == 0


@pytest.mark.parametrize("acknowledged", ["before the fork", "after the fork"])
def test_views_alive_at_the_fork_stay_in_the_child_when_the_parent_lets_go(
    writer: SpoolWriter, reader: SpoolReader, gate: int, acknowledged: str
) -> None:
    for number in range(6):
        writer.put(full_of(number))
    items = [reader.receive() for _ in range(6)]
    views = [item.array for item in items]
    if acknowledged == "before the fork":
        for item in items:
            item.ack()
        items.clear()
        del item

    def work() -> None:
        os.eventfd_read(gate)
        for number, view in enumerate(views):
            assert (view == number).all()

    child = Forked(work)
    views.clear()
    while items:
        items.pop().ack()
    gc.collect()
    traffic(writer, reader)
    os.eventfd_write(gate, 1)
    assert child.ended() == 0


def test_view_alive_at_the_fork_stays_in_the_child_when_the_parent_has_dropped_it_before_the_end(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, gate: int
) -> None:
    consumer = DirectoryEngine(spool).consumer(ConsumerOptions())
    writer.put(full_of(1))
    claims = consumer.claim(1, None, None)
    views = list(consumer.load(claims[0]).arrays)

    def work() -> None:
        os.eventfd_read(gate)
        assert (views[0] == 1).all()

    child = Forked(work)
    views.clear()
    gc.collect()
    consumer.settle(claims, Ack())
    traffic(writer, reader)
    os.eventfd_write(gate, 1)
    assert child.ended() == 0
    consumer.close()


def test_views_alive_at_the_fork_stay_in_the_parent_whatever_the_child_does(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    for number in range(6):
        writer.put(full_of(number))
    views = [reader.get() for _ in range(5)]

    def work() -> None:
        views.clear()
        gc.collect()
        reader.get()
        traffic(writer, reader)

    assert Forked(work).ended() == 0
    for number, view in enumerate(views):
        assert (view == number).all()


def test_views_got_in_a_child_stay_when_it_forks_and_crashes(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, gate: int, ready: int
) -> None:
    """A crashed reader's files are not written again, as its child may look at them."""
    writer.put(full_of(1))
    checked = spool.parent / "checked"

    def work() -> None:
        view = reader.get()

        def look() -> None:
            os.eventfd_read(gate)
            assert (view == 1).all()
            checked.touch()

        Forked(look)
        os.eventfd_write(ready, 1)
        crash()

    child = Forked(work)
    os.eventfd_read(ready)
    assert child.ended() == -signal.SIGKILL
    with SpoolReader(spool) as other:
        traffic(writer, other)
    os.eventfd_write(gate, 1)
    until(checked.exists)


def test_many_threads_of_a_child_may_use_the_spool_at_once(writer: SpoolWriter, reader: SpoolReader) -> None:
    def work() -> None:
        together = threading.Barrier(8)

        def one(number: int) -> None:
            together.wait(10)
            for _ in range(10):
                writer.put(full_of(number))
                reader.get(timeout=10)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(one, range(8)))

    for _ in range(5):
        assert Forked(work).ended() == 0


def test_fork_from_a_thread_while_others_put_get_and_wait(spool: Path) -> None:
    with (
        SpoolWriter(spool, maxsize=4) as writer,
        SpoolReader(spool) as reader,
        ThreadPoolExecutor(4) as threads,
    ):
        stop = threading.Event()
        counts = [0, 0]

        def putting() -> None:
            while not stop.is_set():
                with contextlib.suppress(Full):
                    writer.put(np.full(1 + 700 * (counts[0] % 9), 5.0), timeout=0.2)
                    counts[0] += 1

        def getting() -> None:
            while not stop.is_set():
                with contextlib.suppress(Empty):
                    assert (reader.get(timeout=0.2) == 5).all()
                    counts[1] += 1

        def work() -> None:
            for _ in range(3):
                with contextlib.suppress(Full):
                    writer.put(np.full(3000, 5.0), timeout=5)
                with contextlib.suppress(Empty):
                    assert (reader.get(timeout=5) == 5).all()

        def went_on() -> Callable[[], bool]:
            """Whether both sides go on; or one has failed, as is seen below."""
            seen = list(counts)
            return lambda: any(one.done() for one in running) or (counts[0] > seen[0] and counts[1] > seen[1])

        running = [threads.submit(run) for run in (putting, putting, getting, getting)]
        try:
            for _ in range(30):
                assert Forked(work).ended() == 0
                until(went_on())
        finally:
            stop.set()
        for one in running:
            one.result(20)
        for array in drained(reader):
            assert (array == 5).all()


def test_fork_while_another_thread_opens_the_spool_leaves_no_session_locked(spool: Path) -> None:
    stop = threading.Event()

    def opening() -> None:
        while not stop.is_set():
            SpoolReader(spool).close()

    def work() -> None:
        locked = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                if "FLOCK" in Path(f"/proc/self/fdinfo/{name}").read_text():
                    locked.append(os.readlink(f"/proc/self/fd/{name}"))
        alive = str(spool / "alive") + os.sep
        assert not [name for name in locked if name.startswith(alive) and not name.endswith(" (deleted)")]

    with ThreadPoolExecutor(2) as aside:
        running = [aside.submit(opening) for _ in range(2)]
        try:
            for _ in range(120):
                assert Forked(work).ended() == 0
        finally:
            stop.set()
        for one in running:
            one.result(20)


def test_fork_waits_for_another_thread_that_announces_a_session(spool: Path) -> None:
    """Else the child would have its locked file and not know, and hide its crash."""
    SpoolReader(spool).close()
    children: list[Forked] = []

    def work() -> None:
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                assert not os.readlink(f"/proc/self/fd/{name}").startswith(f"{spool}/alive/")

    with ThreadPoolExecutor(1) as aside:

        def fork(event: Event) -> None:
            if event.name == "write" and not children:  # who it is, in a file that is not locked yet
                aside.submit(lambda: children.append(Forked(work)))
                time.sleep(0.2)  # long enough for a fork that does not wait

        with Injector(fork):
            SpoolReader(spool).close()
    (child,) = children
    assert child.ended() == 0


def test_child_keeps_no_descriptor_of_what_its_parent_hears(reader: SpoolReader) -> None:
    """It would read events that are its parent's."""
    with pytest.raises(Empty):
        reader.get(timeout=0.05)

    def heard() -> list[str]:
        paths = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return [path for path in paths if os.path.islink(path) and os.readlink(path) == "anon_inode:inotify"]

    assert len(heard()) == 1

    def look() -> None:
        assert heard() == []

    assert Forked(look).ended() == 0


def test_child_that_waits_is_woken_and_so_is_its_parent(
    writer: SpoolWriter, reader: SpoolReader, gate: int
) -> None:
    """Both waited before the fork, so that what tells of events was inherited."""
    with pytest.raises(Empty):
        reader.get(timeout=0.05)
    threads: list[int] = []

    def woken() -> float:
        """Seconds from just before the put of the next item."""
        threads.append(threading.get_native_id())
        array = reader.get(timeout=10)
        return time.monotonic() - float(array[0])

    def work() -> None:
        assert woken() < LATEST
        assert stat(reader.path).waiting_mode == "inotify"
        os.eventfd_read(gate)

    child = Forked(work)
    until_asleep(child.pid)
    writer.put(np.array([time.monotonic()]))
    until(reader.empty)
    with ThreadPoolExecutor(1) as aside:
        waiting = aside.submit(woken)
        until(lambda: threads)
        until_asleep(os.getpid(), threads[0])
        writer.put(np.array([time.monotonic()]))
        assert waiting.result(20) < LATEST
    os.eventfd_write(gate, 1)
    assert child.ended() == 0


def test_child_finds_a_spool_deleted_after_the_fork_gone(writer: SpoolWriter, spool: Path, gate: int) -> None:
    def work() -> None:
        os.eventfd_read(gate)
        for _ in range(2):
            with pytest.raises(OSError, match="no spool"):
                writer.put(full_of(1))
        writer.close()

    child = Forked(work)
    shutil.rmtree(spool)
    os.eventfd_write(gate, 1)
    assert child.ended() == 0
    assert not spool.exists()


BETWEEN = """
import os, signal, sys
got = []
os.register_at_fork(before=lambda: got.append(reader.get()))  # before ours is registered, so it runs after it
import numpy as np
from spoolipc import SpoolReader, SpoolWriter

with SpoolWriter(sys.argv[1]) as writer, SpoolReader(sys.argv[1]) as reader:
    writer.put(np.full(5000, 7.0))
    awake, go_on = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os.read(awake, 1)
        os._exit(0 if (got[0] == 7).all() else 1)
    got.clear()
    for number in range(20):
        writer.put(np.full(5000, float(number)))
        assert (reader.get() == number).all()
    os.write(go_on, b"!")
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_view_made_when_the_fork_had_begun_stays_in_the_child(spool: Path) -> None:
    ran = subprocess.run([sys.executable, "-W", "error", "-c", BETWEEN, spool], check=False, timeout=60)
    assert ran.returncode == 0


@pytest.mark.parametrize("looked", ["array", "meta", "never"])
def test_an_item_that_the_parent_holds_never_changes_in_the_child(
    writer: SpoolWriter, reader: SpoolReader, gate: int, looked: str
) -> None:
    """It stays as it was looked at before the fork; what was not cannot be had any more."""
    writer.put(full_of(1), meta="one")
    item = reader.receive()
    if looked != "never":
        getattr(item, looked)

    def work() -> None:
        os.eventfd_read(gate)
        if looked == "array":
            assert (item.array == 1).all()
        else:
            with pytest.raises(LeaseExpired):
                item.array  # noqa: B018
        if looked == "never":
            with pytest.raises(LeaseExpired):
                item.meta  # noqa: B018
        else:
            assert item.meta == "one"

    child = Forked(work)
    item.array  # noqa: B018
    item.ack()
    traffic(writer, reader)
    os.eventfd_write(gate, 1)
    assert child.ended() == 0


def test_fork_while_another_thread_makes_a_spool_keeps_its_lock_from_nobody(spool: Path, gate: int) -> None:
    children: list[Forked] = []

    def fork(event: Event) -> None:
        if event.name == "sync" and not children:  # under the lock
            with ThreadPoolExecutor(1) as aside:
                aside.submit(lambda: children.append(Forked(lambda: os.eventfd_read(gate)))).result(20)

    with ThreadPoolExecutor(1) as threads, Injector(fork):
        made = threads.submit(SpoolWriter, spool).result(20)
    try:
        assert not is_locked(spool)
        made.put(full_of(1))
        made.close()
    finally:
        os.eventfd_write(gate, 1)
    assert children[0].ended() == 0
