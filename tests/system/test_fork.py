"""After a fork, child and parent both work, no view changes, and neither hides the other's death."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from spoolipc import Empty, Full, SpoolReader, SpoolWriter
from spoolipc import words as W
from spoolipc.npy import Array

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of threads, from Python 3.12
SIZE = 5000
"""Of float64: 40 KB, which is given out as a view of the file."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def writer(path: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(path) as writer:
        yield writer


@pytest.fixture
def reader(path: Path) -> Iterator[SpoolReader]:
    with SpoolReader(path) as reader:
        yield reader


class Forked:
    """A forked child that runs a function; `ended` says how it went."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                signal.alarm(40)
                work()
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)

    def ended(self, seconds: float = 30.0) -> int:
        deadline = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError("the child hangs")
            time.sleep(0.001)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Pipe:
    """A pipe of single bytes between a process and its forks."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def send(self) -> None:
        os.write(self._write, b".")

    def wait(self) -> None:
        assert os.read(self._read, 1) == b"."

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


@pytest.fixture
def pipes() -> Iterator[tuple[Pipe, Pipe]]:
    pair = Pipe(), Pipe()
    yield pair
    for pipe in pair:
        pipe.close()


def full_of(number: float) -> Array:
    return np.full(SIZE, number)


def tokens(path: Path) -> set[str]:
    return set(os.listdir(path / "alive"))


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until a condition that another process brings about holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not reached"
        time.sleep(0.001)


def test_child_and_parent_both_put_and_get(writer: SpoolWriter, reader: SpoolReader) -> None:
    def both_ways(base: int) -> None:
        for number in range(50):
            writer.put(full_of(base + number))
            assert (reader.get(timeout=20) >= 0).all()

    writer.put(full_of(0))
    reader.get()
    child = Forked(lambda: both_ways(100))
    both_ways(0)
    assert child.ended() == 0
    assert reader.empty()


def test_child_is_a_party_of_its_own_once_it_uses_the_spool(
    writer: SpoolWriter, path: Path, pipes: tuple[Pipe, Pipe]
) -> None:
    to_child, to_parent = pipes
    before = tokens(path)

    def work() -> None:
        to_child.wait()
        writer.put(full_of(1))
        to_parent.send()
        to_child.wait()

    child = Forked(work)
    assert tokens(path) == before
    to_child.send()
    to_parent.wait()
    assert len(tokens(path)) == len(before) + 1
    assert before < tokens(path)
    to_child.send()
    assert child.ended() == 0


@pytest.mark.parametrize("end", ["exit", "close", "killed"])
@pytest.mark.parametrize("used", [True, False])
def test_end_of_the_child_is_not_the_parents(
    writer: SpoolWriter, reader: SpoolReader, path: Path, end: str, used: bool
) -> None:
    for number in range(3):
        writer.put(full_of(number))
    (delivery,) = reader._source.claim(1, None)
    ours = tokens(path)

    def work() -> None:
        if used:
            assert (reader.get() == 1).all()
            writer.put(full_of(3))
        if end == "close":
            reader.close()
            writer.close()
        elif end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)

    child = Forked(work)
    assert child.ended() == (-signal.SIGKILL if end == "killed" else 0)
    with SpoolReader(path) as other:  # looks for the dead
        found = [float(array[0]) for array in drained(other)]
    assert found == ([2, 3] if used else [1, 2])
    assert tokens(path) >= ours
    reader._source.ack([delivery])
    writer.put(full_of(4))
    assert (reader.get() == 4).all()


def drained(reader: SpoolReader) -> Iterator[Array]:
    with contextlib.suppress(Empty):
        while True:
            yield reader.get_nowait()


@pytest.mark.parametrize("generations", [1, 2])
def test_death_of_the_parent_is_noticed_though_a_child_lives_that_never_used_the_spool(
    writer: SpoolWriter, path: Path, pipes: tuple[Pipe, Pipe], generations: int
) -> None:
    to_child, to_parent = pipes
    writer.put(full_of(1))

    def descend(reader: SpoolReader, left: int) -> None:
        if left == 0:
            to_parent.send()
            to_child.wait()
            return
        Forked(lambda: descend(reader, left - 1))
        if left < generations:
            to_child.wait()

    def parent() -> None:
        reader = SpoolReader(path)
        reader._source.claim(1, None)
        descend(reader, generations)
        os.kill(os.getpid(), signal.SIGKILL)

    child = Forked(parent)
    to_parent.wait()
    assert child.ended() == -signal.SIGKILL
    try:
        with SpoolReader(path) as reader:
            assert (reader.get(timeout=5) == 1).all()
    finally:
        for _ in range(generations):
            to_child.send()


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


def test_views_alive_at_the_fork_stay_in_the_child_when_the_parent_lets_go(
    writer: SpoolWriter, reader: SpoolReader, pipes: tuple[Pipe, Pipe]
) -> None:
    to_child, _ = pipes
    for number in range(6):
        writer.put(full_of(number))
    views = [reader.get() for _ in range(6)]

    def work() -> None:
        to_child.wait()
        for number, view in enumerate(views):
            assert (view == number).all()

    child = Forked(work)
    views.clear()
    gc.collect()
    for number in range(60):
        writer.put(full_of(-number))
        assert (reader.get() == -number).all()
    to_child.send()
    assert child.ended() == 0


def test_views_alive_at_the_fork_stay_in_the_parent_whatever_the_child_does(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    for number in range(6):
        writer.put(full_of(number))
    views = [reader.get() for _ in range(5)]

    def work() -> None:
        views.clear()
        gc.collect()
        for number in range(60):
            writer.put(full_of(-number))
            reader.get()

    assert Forked(work).ended() == 0
    for number, view in enumerate(views):
        assert (view == number).all()


def test_view_loaded_before_the_fork_stays_in_the_child_when_the_parent_acknowledges(
    writer: SpoolWriter, reader: SpoolReader, pipes: tuple[Pipe, Pipe]
) -> None:
    to_child, _ = pipes
    writer.put(full_of(1))
    (delivery,) = reader._source.claim(1, None)
    views = [reader._source.load(delivery).arrays[0]]

    def work() -> None:
        to_child.wait()
        assert (views[0] == 1).all()

    child = Forked(work)
    views.clear()
    gc.collect()
    reader._source.ack([delivery])
    for number in range(60):
        writer.put(full_of(-number))
        reader.get()
    to_child.send()
    assert child.ended() == 0


def test_views_got_in_a_child_stay_when_it_forks_and_dies(
    writer: SpoolWriter, reader: SpoolReader, path: Path, pipes: tuple[Pipe, Pipe]
) -> None:
    """The dead reader's files are not written again, as its child may look at them."""
    to_child, to_parent = pipes
    writer.put(full_of(1))
    checked = path.parent / "checked"

    def work() -> None:
        view = reader.get()

        def look() -> None:
            to_child.wait()
            assert (view == 1).all()
            checked.touch()

        Forked(look)
        to_parent.send()
        os.kill(os.getpid(), signal.SIGKILL)

    child = Forked(work)
    to_parent.wait()
    assert child.ended() == -signal.SIGKILL
    with SpoolReader(path) as other:
        for number in range(60):
            writer.put(full_of(-number))
            other.get()
    to_child.send()
    until(checked.exists)


def test_many_threads_of_a_child_may_use_the_spool_at_once(writer: SpoolWriter, reader: SpoolReader) -> None:
    def work() -> None:
        failures: list[BaseException] = []
        together = threading.Barrier(8)

        def one(number: int) -> None:
            try:
                together.wait(10)
                for _ in range(10):
                    writer.put(full_of(number))
                    reader.get(timeout=10)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert failures == []

    for _ in range(5):
        assert Forked(work).ended() == 0


def test_fork_from_a_thread_while_others_put_get_and_wait(path: Path) -> None:
    with SpoolWriter(path, maxsize=4) as writer, SpoolReader(path) as reader:
        stop = threading.Event()
        counts = [0, 0]
        failures: list[BaseException] = []

        def putting() -> None:
            try:
                while not stop.is_set():
                    with contextlib.suppress(Full):
                        writer.put(np.full(1 + 700 * (counts[0] % 9), 5.0), timeout=0.2)
                        counts[0] += 1
            except BaseException as error:
                failures.append(error)

        def getting() -> None:
            try:
                while not stop.is_set():
                    with contextlib.suppress(Empty):
                        assert (reader.get(timeout=0.2) == 5).all()
                        counts[1] += 1
            except BaseException as error:
                failures.append(error)

        def work() -> None:
            for _ in range(3):
                with contextlib.suppress(Full):
                    writer.put(np.full(3000, 5.0), timeout=5)
                with contextlib.suppress(Empty):
                    assert (reader.get(timeout=5) == 5).all()

        threads = [threading.Thread(target=run) for run in (putting, putting, getting, getting)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(30):
                assert Forked(work).ended() == 0
                until(both_went_on(counts, failures))
        finally:
            stop.set()
            for thread in threads:
                thread.join(20)
        assert failures == []
        for array in drained(reader):
            assert (array == 5).all()


def both_went_on(counts: list[int], failures: list[BaseException]) -> Callable[[], object]:
    seen = list(counts)
    return lambda: (counts[0] > seen[0] and counts[1] > seen[1]) or failures


def test_fork_while_another_thread_opens_the_spool_leaves_no_token_locked(
    path: Path,
) -> None:
    stop = threading.Event()

    def opening() -> None:
        while not stop.is_set():
            SpoolReader(path).close()

    def work() -> None:
        locked = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                if "FLOCK" in Path(f"/proc/self/fdinfo/{name}").read_text():
                    locked.append(os.readlink(f"/proc/self/fd/{name}"))
        alive = str(path / "alive") + os.sep
        assert not [name for name in locked if name.startswith(alive) and not name.endswith(" (deleted)")]

    thread = threading.Thread(target=opening)
    thread.start()
    try:
        for _ in range(100):
            assert Forked(work).ended() == 0
    finally:
        stop.set()
        thread.join(20)


def test_child_that_waits_is_woken_and_so_is_its_parent(
    path: Path, writer: SpoolWriter, reader: SpoolReader, pipes: tuple[Pipe, Pipe]
) -> None:
    """Both waited before the fork, so that an observer was inherited."""
    to_child, _ = pipes
    with pytest.raises(Empty):
        reader.get(timeout=0.05)
    words = writer._sink.party.look()
    for flag in range(8):
        words[W.ITEM_FLAGS + flag] = 0

    def work() -> None:
        began = time.monotonic()
        array = reader.get(timeout=10)
        assert time.monotonic() - array[0] < 0.8, "woken by the look once a second"
        assert began < array[0]
        to_child.wait()

    child = Forked(work)
    until(lambda: any(words[W.ITEM_FLAGS : W.ITEM_FLAGS + 8]))
    writer.put(np.array([time.monotonic()]))
    until(reader.empty)
    result: list[float] = []

    def wait() -> None:
        array = reader.get(timeout=10)
        result.append(time.monotonic() - array[0])

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: any(words[W.ITEM_FLAGS : W.ITEM_FLAGS + 8]))
    writer.put(np.array([time.monotonic()]))
    thread.join(20)
    assert result[0] < 0.8
    to_child.send()
    assert child.ended() == 0


def test_child_finds_a_spool_deleted_after_the_fork_gone(
    writer: SpoolWriter, path: Path, pipes: tuple[Pipe, Pipe]
) -> None:
    to_child, _ = pipes

    def work() -> None:
        to_child.wait()
        for _ in range(2):
            with pytest.raises(OSError, match="no spool"):
                writer.put(full_of(1))
        writer.close()

    child = Forked(work)
    shutil.rmtree(path)
    to_child.send()
    assert child.ended() == 0
    assert not path.exists()
