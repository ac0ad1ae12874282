"""The limits of a spool are decided by the first who asks, hold for all, and what can never fit is refused at once."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit import party_of

from spoolipc import (
    Empty,
    Full,
    LimitMismatch,
    ShutDown,
    SpoolReader,
    SpoolWriter,
    TooLarge,
    room,
)
from spoolipc import words as W
from spoolipc.tend import tend

PAGE = 4096
SPAWN = multiprocessing.get_context("spawn")
NAMES = ("maxsize", "max_bytes", "recycle_bytes", "max_attempts")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def pages(count: int) -> np.ndarray[Any, Any]:
    """An array whose file has this many pages."""
    return np.ones(count * PAGE - 1024, "u1")


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until a condition that another thread or process brings about holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not reached"
        time.sleep(0.0005)


def when_waiting_for_space(writer: SpoolWriter, waiting: Future[Any]) -> None:
    words = writer._sink.party.look()
    until(lambda: any(words[W.SPACE_FLAGS : W.SPACE_FLAGS + 8]) or waiting.done())
    assert not waiting.done()


def settle_flags(writer: SpoolWriter) -> None:
    """A new index has every flag set, as nobody knows who waits: clear them."""
    words = writer._sink.party.look()
    for flag in range(8):
        words[W.SPACE_FLAGS + flag] = 0


class TestAgreement:
    @pytest.mark.parametrize("first", [SpoolWriter, SpoolReader])
    @pytest.mark.parametrize("second", [SpoolWriter, SpoolReader])
    @pytest.mark.parametrize("name", NAMES)
    def test_first_who_asks_decides_and_another_value_is_an_error(
        self, path: Path, first: Any, second: Any, name: str
    ) -> None:
        with first(path, **{name: 7}):
            with pytest.raises(LimitMismatch, match=f"{name}=7, not 8"):
                second(path, **{name: 8})
            with pytest.raises(ValueError, match=str(path)):
                second(path, **{name: 0})
            second(path, **{name: 7}).close()
            second(path).close()
        with pytest.raises(LimitMismatch):
            second(path, **{name: 8})
        assert json.loads((path / "spool.json").read_text())[name] == 7

    def test_who_asks_later_decides_what_nobody_asked_before(self, path: Path) -> None:
        with SpoolReader(path) as reader, SpoolWriter(path) as writer:
            assert (reader.maxsize, writer.maxsize) == (0, 0)
            writer.put_nowait(np.zeros(1))
            with SpoolWriter(path, maxsize=2) as asking:
                assert (reader.maxsize, writer.maxsize, asking.maxsize) == (2, 2, 2)
            writer.put_nowait(np.zeros(1))
            with pytest.raises(Full):
                writer.put_nowait(np.zeros(1))
            with pytest.raises(LimitMismatch):
                SpoolReader(path, maxsize=3)
        with SpoolWriter(path) as writer:
            assert writer.maxsize == 2
            assert writer.full()

    def test_no_limit_is_a_limit_that_was_asked_for(self, path: Path) -> None:
        with SpoolWriter(path, maxsize=0), pytest.raises(LimitMismatch):
            SpoolReader(path, maxsize=5)

    def test_limits_hold_after_a_lost_index(self, path: Path) -> None:
        with SpoolWriter(path, maxsize=2) as writer:
            writer.put(np.zeros(1))
            (path / "index").unlink()
            writer.put(np.zeros(1))
            with pytest.raises(Full):
                writer.put_nowait(np.zeros(1))
            assert writer.maxsize == 2

    @pytest.mark.parametrize("value", [-1, 1.5, True, "3"], ids=repr)
    @pytest.mark.parametrize("name", NAMES)
    def test_limit_that_is_no_whole_number_is_refused_and_makes_nothing(
        self, path: Path, name: str, value: Any
    ) -> None:
        with pytest.raises(ValueError, match=name):
            SpoolWriter(path, **{name: value})
        assert not path.exists()

    def test_limits_of_another_process_hold_here(self, path: Path) -> None:
        with SpoolReader(path) as reader:
            assert asked(path, 3) == "open"
            assert reader.maxsize == 3
            assert "maxsize=3, not 4" in asked(path, 4)
            assert asked(path, None) == "open"
        with pytest.raises(LimitMismatch):
            SpoolWriter(path, maxsize=4)

    def test_of_many_who_ask_at_once_one_decides(self, path: Path, aside: ThreadPoolExecutor) -> None:
        def ask(maxsize: int) -> int | None:
            try:
                with SpoolWriter(path, maxsize=maxsize) as writer:
                    return writer.maxsize
            except LimitMismatch:
                return None

        found = {size for size in aside.map(ask, range(1, 17)) if size is not None}
        assert len(found) == 1


def asked(path: Path, maxsize: int | None) -> str:
    ours, theirs = SPAWN.Pipe()
    child = SPAWN.Process(target=ask, args=(path, maxsize, theirs))
    child.start()
    assert ours.poll(30)
    said: str = ours.recv()
    child.join(30)
    return said


def ask(path: Path, maxsize: int | None, pipe: Connection) -> None:
    try:
        SpoolWriter(path, maxsize=maxsize)
        pipe.send("open")
    except LimitMismatch as error:
        pipe.send(str(error))


class TestBytes:
    def test_bytes_of_waiting_items_are_limited(self, path: Path) -> None:
        with SpoolWriter(path, max_bytes=10 * PAGE) as writer, SpoolReader(path) as reader:
            writer.put(pages(4))
            writer.put(pages(6))
            for size in (1, 6, 10):
                with pytest.raises(Full):
                    writer.put_nowait(pages(size))
                with pytest.raises(Full):
                    writer.put(pages(size), timeout=0.02)
            reader.get_nowait()
            with pytest.raises(Full):
                writer.put_nowait(pages(5))
            writer.put_nowait(pages(4))
            assert writer.qsize() == 2

    def test_bytes_of_items_in_hand_count(self, path: Path) -> None:
        with SpoolWriter(path, max_bytes=4 * PAGE) as writer, SpoolReader(path) as reader:
            writer.put(pages(4))
            (delivery,) = reader._source.claim(1, None)
            with pytest.raises(Full):
                writer.put_nowait(pages(1))
            reader._source.ack([delivery])
            writer.put_nowait(pages(4))

    def test_limit_can_be_used_whole_again_and_again(self, path: Path) -> None:
        with SpoolWriter(path, max_bytes=12 * PAGE) as writer, SpoolReader(path) as reader:
            for sizes in ((12,), (6, 6), (1,) * 12, (5, 4, 3), (12,)) * 4:
                for size in sizes:
                    writer.put_nowait(pages(size))
                with pytest.raises(Full):
                    writer.put_nowait(pages(1))
                for size in sizes:
                    assert len(reader.get_nowait()) == len(pages(size))

    def test_larger_than_the_limit_is_refused_at_once_with_the_numbers(self, path: Path) -> None:
        with SpoolWriter(path, max_bytes=10 * PAGE) as writer:
            for put in (writer.put, writer.put_nowait):
                with pytest.raises(TooLarge, match=rf"{11 * PAGE} bytes.*max_bytes is {10 * PAGE}.*free"):
                    put(pages(11))
            assert isinstance(TooLarge(), ValueError)
            writer.put_nowait(pages(10))

    def test_larger_than_the_file_system_is_refused_at_once(self, path: Path) -> None:
        huge = np.broadcast_to(np.uint8(0), (1 << 50,))
        with SpoolWriter(path) as writer:
            with pytest.raises(TooLarge, match=r"max_bytes is not set.*file system has \d+ bytes \(\d+ free"):
                writer.put(huge)
            assert list((path / "tmp").iterdir()) == []
            assert writer.empty()

    @pytest.mark.parametrize("used", [False, True])
    def test_metadata_counts(self, path: Path, used: bool) -> None:
        """It lies in the file too, so it may be what makes an item too large, or the spool full."""
        with SpoolWriter(path, max_bytes=4 * PAGE) as writer, SpoolReader(path) as reader:
            if used:
                for _ in range(2):
                    writer.put(np.zeros(1))
                    reader.get_nowait()
            with pytest.raises(TooLarge):
                writer.put(np.zeros(1), meta="x" * 4 * PAGE)
            writer.put(np.zeros(1), meta="x" * 2 * PAGE)
            for timeout in (0.0, 0.05):
                with pytest.raises(Full):
                    writer.put(np.zeros(1), meta="x" * PAGE, timeout=timeout)
            with pytest.raises(Full):
                writer.put_nowait({"a": np.zeros(1), "b": np.zeros(PAGE // 8)})
            writer.put_nowait(np.zeros(1))

    def test_blocked_put_goes_on_when_there_are_bytes_enough(
        self, path: Path, aside: ThreadPoolExecutor
    ) -> None:
        with SpoolWriter(path, max_bytes=10 * PAGE) as writer, SpoolReader(path) as reader:
            for _ in range(10):
                writer.put(pages(1))
            settle_flags(writer)
            waiting = aside.submit(writer.put, pages(3))
            when_waiting_for_space(writer, waiting)
            for _ in range(3):
                assert not waiting.done()
                reader.get_nowait()
            assert waiting.result(10) == 11

    def test_small_item_is_put_though_a_large_one_waits_for_room(
        self, path: Path, aside: ThreadPoolExecutor
    ) -> None:
        writer, other, reader = SpoolWriter(path, max_bytes=10 * PAGE), SpoolWriter(path), SpoolReader(path)
        with writer, other, reader:
            for _ in range(10):
                writer.put(pages(1))
            settle_flags(writer)
            large = aside.submit(writer.put, pages(8))
            when_waiting_for_space(writer, large)
            small = aside.submit(other.put, pages(1))
            reader.get_nowait()
            assert small.result(10) == 11
            for _ in range(8):
                reader.get_nowait()
            assert large.result(10) == 12


class TestFileSystem:
    """What `statvfs` says is changed here; a file system that is really full is tested in `test_crash.py`."""

    @pytest.fixture
    def free(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        free = [1 << 40]

        class Status:
            f_frsize = PAGE
            f_blocks = 1000

            @property
            def f_bavail(self) -> int:
                return free[0] // PAGE

        class System:
            @staticmethod
            def fstatvfs(fd: int) -> Status:
                return Status()

        monkeypatch.setattr(room, "os", System)
        return free

    def test_too_little_free_space_is_full(
        self, path: Path, free: list[int], aside: ThreadPoolExecutor
    ) -> None:
        with SpoolWriter(path) as writer:
            free[0] = 2 * PAGE
            with pytest.raises(Full):
                writer.put_nowait(pages(3))
            with pytest.raises(Full):
                writer.put(pages(3), timeout=0.05)
            writer.put_nowait(pages(2))
            waiting = aside.submit(writer.put, pages(3))
            until(lambda: writer._sink.party.bells._rooms["space"].waiting or waiting.done())
            assert not waiting.done()
            free[0] = 3 * PAGE
            assert waiting.result(10) == 2
            with pytest.raises(TooLarge, match=rf"{1000 * PAGE} bytes \({3 * PAGE} free"):
                writer.put(pages(1001))

    def test_consumed_files_give_way_before_a_put_waits(self, path: Path, free: list[int]) -> None:
        with SpoolWriter(path) as writer, SpoolReader(path) as reader:
            for _ in range(5):
                writer.put(pages(2))
            for _ in range(5):
                reader.get_nowait()
            with SpoolWriter(path) as other:  # the first may have kept one
                free[0] = PAGE
                with pytest.raises(Full):
                    other.put_nowait(pages(3))
            assert len(list((path / "free").iterdir())) <= 1


def bytes_in_pool(face: SpoolWriter | SpoolReader) -> int:
    return party_of(face).look()[W.POOL_BYTES]


def test_recycled_bytes_are_what_a_backlog_left_and_soon_within_the_limit(path: Path) -> None:
    with SpoolWriter(path, recycle_bytes=8 * PAGE) as writer, SpoolReader(path) as reader:
        for _ in range(20):
            writer.put(pages(2))
        for left in range(19, -1, -1):
            reader.get_nowait()
            assert bytes_in_pool(reader) <= (20 - left) * 2 * PAGE
        assert bytes_in_pool(reader) >= 36 * PAGE
        for _ in range(60):
            before = bytes_in_pool(reader)
            writer._sink.party.run(tend, force=True)
            assert 8 * PAGE <= bytes_in_pool(reader) <= before
        assert bytes_in_pool(reader) == 8 * PAGE
        assert sum(file.stat().st_size for file in (path / "free").iterdir()) <= 10 * PAGE


def test_the_pool_is_trimmed_in_short_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spoolipc.tend._TRIM_FILES", 3)
    with SpoolWriter(path, recycle_bytes=PAGE) as writer, SpoolReader(path) as reader:
        writer.put_many([pages(2)] * 20)
        reader.get_many(20)
        left = bytes_in_pool(reader)
        writer._sink.party.look()[W.PEAK_BYTES] = 0
        writer._sink.party.run(tend, force=True)
        assert bytes_in_pool(reader) == left - 3 * 2 * PAGE


def test_nothing_is_recycled_when_the_limit_is_zero(path: Path) -> None:
    with SpoolWriter(path, recycle_bytes=0) as writer, SpoolReader(path) as reader:
        for size in (1, 9) * 5:
            writer.put(pages(size))
            reader.get_nowait()
        with pytest.raises(Empty):
            reader.get_nowait()
        assert list((path / "free").iterdir()) == []


def test_maxsize_holds_for_many_threads_at_once(path: Path, aside: ThreadPoolExecutor) -> None:
    most = 0
    with SpoolWriter(path, maxsize=3) as writer, SpoolReader(path) as reader:
        futures = [aside.submit(lambda: [writer.put(pages(1)) for _ in range(50)]) for _ in range(4)]
        for _ in range(200):
            most = max(most, reader.qsize())
            reader.get(timeout=10)
        for future in futures:
            future.result(10)
        assert most <= 3
        writer.shutdown()
        with pytest.raises(ShutDown):
            reader.get()
