"""The bells: whoever waits is woken by one ring, in any process, and looks for itself where none comes."""

from __future__ import annotations

import errno
import logging
import mmap
import multiprocessing
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
from watchdog.observers import inotify_c

from spoolipc import bell, watch
from spoolipc.bell import Bells
from spoolipc.errors import SpoolGone

pytestmark = pytest.mark.timeout(30)

SOON = 0.5  # seconds: well under LOOK_EVERY, so that a waiter that only looked by the clock is late
SPAWN = multiprocessing.get_context("spawn")
SOURCES: list[Callable[[], Any]] = [watch._Observed]
if hasattr(inotify_c, "InotifyFD"):  # which the earliest release of watchdog that will do has not
    SOURCES.append(watch._Direct)
ITEM_FLAGS, SPACE_FLAGS, SLOTS = 16, 24, 32


class Board:
    """A stand-in for the index: mapped words, with the flags, a count of items, and slots to report in."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self.words = memoryview(mmap.mmap(file.fileno(), 4096)).cast("Q")
        self.dir = os.path.join(os.path.dirname(path), "bell")

    def flags(self, kind: str) -> memoryview[int]:
        start = ITEM_FLAGS if kind == "items" else SPACE_FLAGS
        return self.words[start : start + bell.BELLS]

    def bells(self, token: int) -> Bells:
        return Bells(self.dir, token, self.flags)


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "bell").mkdir(mode=0o700)
    bell.make(str(tmp_path / "bell"))
    (tmp_path / "board").write_bytes(bytes(4096))
    return str(tmp_path / "board")


@pytest.fixture
def board(path: str) -> Board:
    return Board(path)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins and ends without an observer and with a warning still to give."""
    monkeypatch.delenv("SPOOLIPC_WATCH", raising=False)
    monkeypatch.setattr(watch, "_warned", False)
    monkeypatch.setattr(watch, "_deaf", False)
    assert watch.mode() == "idle"
    yield
    assert not watch._watches
    assert not watch_threads()


def watch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if type(t).__module__.startswith("watchdog.")]


def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.0005)


def start(target: Callable[..., None], *args: Any) -> Any:
    process = SPAWN.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def end(*processes: Any) -> None:
    for process in processes:
        process.join(10)
        assert process.exitcode == 0


def listening(bells: Bells) -> Bells:
    """`bells` after a wait that ended without a ring, its observer proven."""
    until(lambda: bells.wait("items", lambda: False, 0.01) or hears(bells))
    return bells


def hears(bells: Bells) -> bool:
    return any(room.listener is not None and room.listener.hears() for room in bells._rooms.values())


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


# What is on disk


def test_making_the_bells_again_changes_nothing(tmp_path: Path) -> None:
    bell.make(str(tmp_path))
    before = sorted((p.relative_to(tmp_path), p.stat().st_ino, p.stat().st_mode) for p in tmp_path.rglob("*"))
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        bell.make(fd)
    finally:
        os.close(fd)
    after = sorted((p.relative_to(tmp_path), p.stat().st_ino, p.stat().st_mode) for p in tmp_path.rglob("*"))
    assert after == before
    assert len(before) == 2 * 2 * bell.BELLS


@pytest.mark.parametrize(("mode", "file_mode"), [(0o700, 0o600), (0o770, 0o660)])
def test_bells_have_the_permissions_of_the_spool(tmp_path: Path, mode: int, file_mode: int) -> None:
    bell.make(str(tmp_path), mode)
    found = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert found == {mode}
    assert {stat.S_IMODE((p / "ring").stat().st_mode) for p in tmp_path.iterdir()} == {file_mode}


def test_a_link_planted_for_a_bell_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "bell").mkdir()
    (tmp_path / "bell" / "items-0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="items-0"):
        bell.make(str(tmp_path / "bell"))
    assert not list((tmp_path / "elsewhere").iterdir())


# Waking


def answer(path: str, token: int, rounds: int, slot: int) -> None:
    """Wait for the count to reach 1, 2 .. rounds; note each number, when it was reached, and the looks."""
    board = Board(path)
    bells = board.bells(token)

    def reached(number: int) -> bool:
        board.words[slot + 2] += 1
        return board.words[0] >= number

    for number in range(1, rounds + 1):
        assert bells.wait("items", partial(reached, number), 10)
        board.words[slot + 1] = time.monotonic_ns()
        board.words[slot] = number
    assert watch.mode() != "polling"
    bells.close()


def test_none_of_300_idle_waits_in_another_process_misses_its_ring(path: str, board: Board) -> None:
    waiter = start(answer, path, 3, 300, SLOTS)
    ringer = board.bells(0)
    slowest = 0.0
    for number in range(1, 301):
        until(lambda: board.flags("items")[3])
        put = time.monotonic_ns()
        board.words[0] = number
        ringer.ring("items")
        until(lambda n=number: board.words[SLOTS] == n)  # type: ignore[misc]
        slowest = max(slowest, (board.words[SLOTS + 1] - put) / 1e9)
    ringer.close()
    end(waiter)
    assert slowest < SOON


def test_rings_at_any_moment_are_not_missed(path: str, board: Board) -> None:
    """The ringer does not wait for the flag: rings fall before, between and after the waiter's looks."""
    waiter = start(answer, path, 3, 1000, SLOTS)
    ringer = board.bells(0)
    slowest = 0.0
    until(lambda: board.flags("items")[3])
    for number in range(1, 1001):
        put = time.monotonic_ns()
        board.words[0] = number
        os.sched_yield()  # the barrier that letting the index lock go is
        ringer.ring("items")
        until(lambda n=number: board.words[SLOTS] == n)  # type: ignore[misc]
        slowest = max(slowest, (board.words[SLOTS + 1] - put) / 1e9)
        for _ in range(number % 50):
            os.sched_yield()
    ringer.close()
    end(waiter)
    assert slowest < SOON


def test_ring_all_wakes_every_process(path: str, board: Board) -> None:
    slots = {token: SLOTS + 4 * token for token in (1, 2, 3, 4)}
    waiters = [start(answer, path, token, 1, slot) for token, slot in slots.items()]
    until(lambda: all(board.flags("items")[token] for token in slots))
    ringer = board.bells(0)
    put = time.monotonic_ns()
    board.words[0] = 1
    ringer.ring_all("items")
    until(lambda: all(board.words[slot] for slot in slots.values()))
    ringer.close()
    end(*waiters)
    assert max(board.words[slot + 1] - put for slot in slots.values()) / 1e9 < SOON


def test_processes_that_share_a_bell_hear_the_same_ring(path: str, board: Board) -> None:
    slots = {3: SLOTS, 11: SLOTS + 4}
    waiters = [start(answer, path, token, 1, slot) for token, slot in slots.items()]
    until(lambda: board.flags("items")[3] and all(board.words[slot + 2] for slot in slots.values()))
    ringer = board.bells(0)
    put = time.monotonic_ns()
    board.words[0] = 1
    ringer.ring("items")
    until(lambda: all(board.words[slot] for slot in slots.values()))
    ringer.close()
    end(*waiters)
    assert max(board.words[slot + 1] - put for slot in slots.values()) / 1e9 < SOON


@pytest.mark.parametrize("source", SOURCES)
def test_a_thread_is_woken_through_either_of_watchdogs_ways(
    board: Board, monkeypatch: pytest.MonkeyPatch, source: Callable[[], Any]
) -> None:
    monkeypatch.setattr(watch, "_start", source)
    waiter, ringer = listening(board.bells(3)), board.bells(0)
    took: list[float] = []

    def work() -> None:
        assert waiter.wait("items", lambda: board.words[0] == 1, 10)
        took.append(time.monotonic())

    board.flags("items")[3] = 0
    thread = in_thread(work)
    until(lambda: board.flags("items")[3])
    put = time.monotonic()
    board.words[0] = 1
    ringer.ring("items")
    thread.join()
    waiter.close()
    ringer.close()
    assert took[0] - put < SOON


def test_threads_share_one_bell_and_each_gets_its_item(board: Board) -> None:
    waiter, ringer = listening(board.bells(3)), board.bells(0)
    counting = threading.Lock()
    taken = 0

    def take() -> bool:
        nonlocal taken
        with counting:
            if taken < board.words[0]:
                taken += 1
                return True
            return False

    began = time.monotonic()
    threads = [in_thread(lambda: waiter.wait("items", take, 10)) for _ in range(3)]
    for number in range(1, 4):
        until(lambda: board.flags("items")[3])
        board.words[0] = number
        ringer.ring("items")
        until(lambda n=number: taken == n)  # type: ignore[misc]
    for thread in threads:
        thread.join()
    waiter.close()
    ringer.close()
    assert time.monotonic() - began < 1.0


def test_an_interrupt_ends_a_wait_at_once(board: Board) -> None:
    waiter = listening(board.bells(3))
    board.flags("items")[3] = 0
    main = threading.get_ident()
    sent: list[float] = []

    def interrupt() -> None:
        until(lambda: board.flags("items")[3])
        sent.append(time.monotonic())
        signal.pthread_kill(main, signal.SIGINT)

    thread = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        waiter.wait("items", lambda: False, None)
    assert time.monotonic() - sent[0] < SOON
    thread.join()
    assert waiter._rooms["items"].waiting == 0
    waiter.close()


# Who is rung


def set_flags(board: Board, *bells: int, age: float = 0.0) -> None:
    for k in bells:
        board.flags("items")[k] = time.monotonic_ns() - int(age * 1e9)


def flagged(board: Board) -> set[int]:
    return {k for k, flag in enumerate(board.flags("items")) if flag}


def test_a_ring_that_nobody_waits_for_opens_and_writes_nothing(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object) -> NoReturn:
        raise AssertionError("a system call")

    ringer = board.bells(0)
    monkeypatch.setattr(os, "open", forbidden)
    monkeypatch.setattr(os, "pwrite", forbidden)
    ringer.ring("items")
    ringer.ring("space", 5)
    monkeypatch.undo()
    ringer.close()


@pytest.mark.parametrize(("n", "left"), [(0, 4), (1, 3), (3, 1), (9, 0)])
def test_as_many_bells_are_rung_as_there_are_items(board: Board, n: int, left: int) -> None:
    set_flags(board, 0, 2, 5, 7)
    ringer = board.bells(0)
    ringer.ring("items", n)
    ringer.close()
    assert len(flagged(board)) == left


def test_bells_are_rung_in_turn(board: Board) -> None:
    ringer = board.bells(0)
    rung: list[int] = []
    for _ in range(8):
        set_flags(board, *range(8))
        ringer.ring("items")
        rung.extend(set(range(8)) - flagged(board))
    ringer.close()
    assert sorted(rung) == list(range(8))


def test_a_flag_left_by_the_dead_takes_no_sleepers_place(board: Board) -> None:
    set_flags(board, 1, 2, 3, age=60)
    set_flags(board, 4, 5)
    ringer = board.bells(0)
    ringer.ring("items")
    ringer.close()
    assert flagged(board) == {5}


def test_a_failing_bell_does_not_fail_the_ringer(board: Board) -> None:
    set_flags(board, 1)
    os.unlink(os.path.join(board.dir, "items-1", "ring"))
    ringer = board.bells(0)
    ringer.ring("items")
    ringer.close()


def test_a_spool_that_is_gone_is_told_to_ringer_and_waiter(board: Board) -> None:
    def gone(kind: str) -> NoReturn:
        raise SpoolGone("gone")

    bells = Bells(board.dir, 0, gone)
    with pytest.raises(SpoolGone):
        bells.ring("items")
    with pytest.raises(SpoolGone):
        bells.wait("items", lambda: False, 1)
    bells.close()


# Rings that come too late


def test_a_ring_for_one_who_left_is_passed_on(path: str, board: Board) -> None:
    sleeper = start(answer, path, 1, 1, SLOTS)
    until(lambda: board.flags("items")[1])
    left = listening(board.bells(0))
    assert not left.wait("items", lambda: False, 0.01)
    ringer = board.bells(7)  # whose turn begins at bell 0
    put = time.monotonic_ns()
    board.words[0] = 1
    ringer.ring("items")
    until(lambda: board.words[SLOTS])
    left.close()
    ringer.close()
    end(sleeper)
    assert (board.words[SLOTS + 1] - put) / 1e9 < SOON


def test_a_ring_is_passed_on_once_for_each_time_it_was_asked_for(board: Board) -> None:
    left = listening(board.bells(0))
    assert not left.wait("items", lambda: False, 0.01)
    heard = 0

    def hear() -> None:
        nonlocal heard
        heard += 1

    directory = os.path.join(board.dir, "items-0")
    after = watch.listen(directory, hear)  # is told after `left` is
    assert after is not None
    board.flags("items")[0] = 0
    set_flags(board, 4)
    watch._try_out(directory)
    until(lambda: heard == 1)
    assert flagged(board) == set()
    set_flags(board, 4)
    watch._try_out(directory)
    until(lambda: heard == 2)
    assert flagged(board) == {4}
    after.close()
    left.close()


def test_closing_takes_the_flag_back(board: Board) -> None:
    left = listening(board.bells(0))
    assert not left.wait("items", lambda: False, 0.01)
    assert flagged(board) == {0}
    left.close()
    assert flagged(board) == set()
    left.close()


def test_a_closed_ringer_leaves_the_flags_to_others(board: Board) -> None:
    set_flags(board, 4)
    ringer = board.bells(0)
    ringer.close()
    ringer.ring("items")
    assert flagged(board) == {4}


# Time


def test_a_wait_of_no_time_looks_once(board: Board) -> None:
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        return False

    assert not board.bells(0).wait("items", look, 0)
    assert looks == 1
    assert watch.mode() == "idle"


@pytest.mark.parametrize("kind", bell.KINDS)
def test_a_wait_ends_when_its_time_is_over(board: Board, kind: bell.Kind) -> None:
    bells = board.bells(0)
    for timeout in (0.001, 0.1):
        began = time.monotonic()
        assert not bells.wait(kind, lambda: False, timeout)
        assert timeout <= time.monotonic() - began < timeout + SOON
    bells.close()


def test_what_is_there_already_needs_no_observer(board: Board) -> None:
    bells = board.bells(0)
    assert bells.wait("items", lambda: True, None)
    assert watch.mode() == "idle"


def test_short_looks_grow_shorter_while_they_fail_and_longer_when_they_help(board: Board) -> None:
    bells = board.bells(0)
    room = bells._rooms["items"]
    for _ in range(10):
        bells._look_briefly(room, lambda: False, None)
    assert room.spin == bell.SHORT_LOOK[0]
    for _ in range(10):
        room.spin = max(room.spin, 0.01)  # a look is sure to fit
        assert bells._look_briefly(room, lambda: True, None)
        assert room.spin == bell.SHORT_LOOK[1]


# Without inotify


def waits_by_polling(board: Board, bells: Bells) -> None:
    """The item comes without any ring."""
    asked = threading.Event()

    def look() -> bool:
        asked.set()
        return board.words[0] == 1

    def put() -> None:
        asked.wait()
        board.words[0] = 1

    board.words[0] = 0
    thread = in_thread(put)
    began = time.monotonic()
    assert bells.wait("items", look, 10)
    assert time.monotonic() - began < SOON
    thread.join()


def test_polling_can_be_asked_for(
    board: Board, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPOOLIPC_WATCH", "polling")
    bells = board.bells(0)
    waits_by_polling(board, bells)
    assert not bells.wait("items", lambda: False, 0.05)
    assert watch.mode() == "polling"
    assert not watch_threads()
    assert flagged(board) == set()
    assert not caplog.records
    bells.close()
    monkeypatch.undo()


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "inotify instance limit reached"), RuntimeError("no thread")]
)
def test_without_inotify_waits_poll_and_one_warning_says_so(
    board: Board, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail() -> NoReturn:
        raise error

    monkeypatch.setattr(watch, "_start", fail)
    with caplog.at_level(logging.WARNING, "spoolipc"):
        for token in (0, 1):
            bells = board.bells(token)
            assert not bells.wait("items", lambda: False, 0.02)
            waits_by_polling(board, bells)
            bells.close()
    assert watch.mode() == "polling"
    assert [r.name for r in caplog.records] == ["spoolipc"]
    assert str(error) in caplog.text
    assert "polling" in caplog.text


@pytest.mark.parametrize("source", SOURCES)
def test_a_watch_that_cannot_be_added_leaves_no_observer(
    board: Board, monkeypatch: pytest.MonkeyPatch, source: Callable[[], Any]
) -> None:
    def full(self: object, a_watch: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "inotify watch limit reached")

    monkeypatch.setattr(watch, "_start", source)
    monkeypatch.setattr(source, "add", full)
    assert watch.listen(os.path.join(board.dir, "items-0"), lambda: None) is None
    assert not watch_threads()


class Deaf:
    """An observer on a file system that reports nothing."""

    def add(self, a_watch: object) -> None: ...

    def remove(self, a_watch: object) -> None: ...

    def stop(self) -> None: ...


def test_a_file_system_that_reports_nothing_is_polled(
    board: Board, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "_start", Deaf)
    monkeypatch.setattr(watch, "TRIAL", 0.02)
    bells = board.bells(0)
    with caplog.at_level(logging.WARNING, "spoolipc"):
        assert not bells.wait("items", lambda: False, 0.1)
        waits_by_polling(board, bells)
    assert watch.mode() == "polling"
    assert len(caplog.records) == 1
    assert "no event arrived" in caplog.text
    bells.close()


def test_a_directory_that_is_gone_says_nothing_about_inotify(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert watch.listen(str(tmp_path / "gone"), lambda: None) is None
    assert watch.mode() == "idle"
    assert not caplog.records
    assert not watch_threads()


# One observer per process


def test_listeners_share_one_observer_and_the_last_stops_it(board: Board) -> None:
    heard: set[str] = set()
    first = watch.listen(os.path.join(board.dir, "items-0"), lambda: heard.add("first"))
    second = watch.listen(os.path.join(board.dir, "items-0"), lambda: heard.add("second"))
    third = watch.listen(os.path.join(board.dir, "space-0"), lambda: heard.add("third"))
    assert first is not None and second is not None and third is not None  # noqa: PT018
    assert [t.name for t in watch_threads()].count("spoolipc-watch") == 1
    until(lambda: "third" in heard)
    watch._try_out(os.path.join(board.dir, "items-0"))
    until(lambda: heard == {"first", "second", "third"})
    assert watch.mode() == "inotify"
    first.close()
    first.close()
    heard.clear()
    watch._try_out(os.path.join(board.dir, "items-0"))
    until(lambda: heard == {"second"})
    second.close()
    assert [t.name for t in watch_threads()].count("spoolipc-watch") == 1
    third.close()
    assert not watch_threads()
    assert watch.mode() == "idle"


def test_a_listener_that_fails_does_not_silence_the_others(
    board: Board, caplog: pytest.LogCaptureFixture
) -> None:
    directory = os.path.join(board.dir, "items-0")
    heard = threading.Event()

    def fail() -> NoReturn:
        raise ValueError("what a mess")

    bad = watch.listen(directory, fail)
    good = watch.listen(directory, heard.set)
    assert bad is not None
    assert good is not None
    for _ in range(2):
        heard.clear()
        watch._try_out(directory)
        assert heard.wait(10)
    bad.close()
    good.close()
    assert "what a mess" in caplog.text


def test_a_listener_may_close_itself_from_its_own_callback(board: Board) -> None:
    directory = os.path.join(board.dir, "items-0")
    ready, done = threading.Event(), threading.Event()

    def close() -> None:
        ready.wait()
        assert listener is not None
        listener.close()
        done.set()

    listener = watch.listen(directory, close)
    ready.set()
    assert done.wait(10)
    until(lambda: not watch_threads())


def test_opening_and_closing_often_leaves_nothing_open(board: Board) -> None:
    def once() -> None:
        bells = board.bells(0)
        bells.wait("items", lambda: False, 0.002)
        bells.close()

    once()
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(20):
        once()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_bells_dropped_without_close_leave_nothing_open(board: Board) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for token in range(4):
        bells = listening(board.bells(token))
        set_flags(board, token)
        bells.ring("items", 8)
        del bells
    last = listening(board.bells(5))
    assert [os.path.basename(directory) for directory in watch._watches] == ["items-5"]
    last.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_listens_for_itself(board: Board) -> None:
    parent = listening(board.bells(0))
    set_flags(board, 5)
    parent.ring("items", 2)  # so that the child inherits an open bell
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert watch.mode() == "idle"
            parent.reset_after_fork(1)
            code = 2
            assert parent.wait("items", lambda: board.words[0] == 1, 10)
            board.words[SLOTS] = time.monotonic_ns()
            code = 3
            assert watch.mode() == "inotify"
            parent.close()
            assert not watch_threads()
            code = 0
        finally:
            os._exit(code)
    until(lambda: board.flags("items")[1])
    put = time.monotonic_ns()
    board.words[0] = 1
    parent.ring("items")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (board.words[SLOTS] - put) / 1e9 < SOON

    board.flags("items")[0] = 0
    took: list[float] = []

    def work() -> None:
        assert parent.wait("items", lambda: board.words[0] == 2, 10)
        took.append(time.monotonic())

    thread = in_thread(work)  # and the parent's own observer is as it was
    until(lambda: board.flags("items")[0])
    began = time.monotonic()
    board.words[0] = 2
    parent.ring("items")
    thread.join()
    parent.close()
    assert took[0] - began < SOON
