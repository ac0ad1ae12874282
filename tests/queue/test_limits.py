"""The limits of a spool are decided by the first who asks, hold for all, and what can never fit is refused at once."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.arrays import Array
from support.calls import Call
from support.faults import Event, Injector, fail

from spoolipc import Full, LimitMismatch, ShutDown, SpoolReader, SpoolWriter, StorageError, TooLarge
from spoolipc.directory import fs
from spoolipc.directory.session import Side

PAGE = 4096
NAMES = ("maxsize", "max_bytes", "recycle_bytes", "max_attempts")


def pages(count: int) -> Array:
    """An array whose file has this many pages."""
    return np.ones(count * PAGE - 1024, "u1")


class TestAgreement:
    @pytest.mark.parametrize("first", [SpoolWriter, SpoolReader])
    @pytest.mark.parametrize("second", [SpoolWriter, SpoolReader])
    @pytest.mark.parametrize("name", NAMES)
    def test_first_who_asks_decides_and_another_value_is_an_error(
        self, spool: Path, first: Any, second: Any, name: str
    ) -> None:
        with first(spool, **{name: 7}):
            with pytest.raises(LimitMismatch, match=f"{name}=7, not 8"):
                second(spool, **{name: 8})
            with pytest.raises(ValueError, match=str(spool)):
                second(spool, **{name: 0})
            second(spool, **{name: 7}).close()
            second(spool).close()
        with pytest.raises(LimitMismatch):
            second(spool, **{name: 8})
        assert json.loads((spool / "spool.json").read_text())[name] == 7

    @pytest.mark.parametrize("value", [-1, 1.5, True, "3", 2**63, 2**64], ids=repr)
    @pytest.mark.parametrize("name", NAMES)
    def test_limit_that_is_no_possible_number_is_refused_and_makes_nothing(
        self, spool: Path, name: str, value: Any
    ) -> None:
        with pytest.raises(ValueError, match=name):
            SpoolWriter(spool, **{name: value})
        assert not spool.exists()
        most: Any = {name: 2**63 - 1}
        SpoolWriter(spool, **most).close()
        SpoolReader(spool).close()

    def test_of_many_who_ask_at_once_one_decides(self, spool: Path) -> None:
        def ask(maxsize: int) -> int | None:
            try:
                with SpoolWriter(spool, maxsize=maxsize) as writer:
                    return writer.maxsize
            except LimitMismatch:
                return None

        with ThreadPoolExecutor(8) as threads:
            found = {size for size in threads.map(ask, range(1, 17)) if size is not None}
        assert len(found) == 1


class TestBytes:
    def test_larger_than_the_limit_is_refused_at_once_with_the_numbers(self, spool: Path) -> None:
        with SpoolWriter(spool, max_bytes=10 * PAGE) as writer:
            for put in (writer.put, writer.put_nowait):
                with pytest.raises(TooLarge, match=rf"{11 * PAGE} bytes.*max_bytes is {10 * PAGE}.*free"):
                    put(pages(11))
            assert isinstance(TooLarge(), ValueError)
            writer.put_nowait(pages(10))

    def test_larger_than_the_file_system_is_refused_at_once(self, writer: SpoolWriter, spool: Path) -> None:
        huge = np.broadcast_to(np.uint8(0), (1 << 50,))
        with pytest.raises(TooLarge, match=r"max_bytes is not set.*file system has \d+ bytes \(\d+ free"):
            writer.put(huge)
        assert list((spool / "tmp").iterdir()) == []
        assert writer.empty()

    @pytest.mark.parametrize("used", [False, True])
    def test_metadata_counts(self, spool: Path, used: bool) -> None:
        """It lies in the file too, so it may be what makes an item too large, or the spool full."""
        with SpoolWriter(spool, max_bytes=4 * PAGE) as writer, SpoolReader(spool) as reader:
            for _ in range(2 if used else 0):
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

    def test_blocked_put_goes_on_when_there_are_bytes_enough(self, spool: Path) -> None:
        with SpoolWriter(spool, max_bytes=10 * PAGE) as writer, SpoolReader(spool) as reader:
            for _ in range(10):
                writer.put(pages(1))
            waiting = Call(writer.put, pages(3))
            waiting.until_asleep()
            for _ in range(3):
                assert not waiting.done
                reader.get_nowait()
            assert waiting.result() == 11

    @pytest.mark.usefixtures("no_look")
    @pytest.mark.parametrize("maxsize", [0, 100])
    @pytest.mark.parametrize("how", ["ack", "reject"])
    def test_blocked_put_is_woken_when_an_item_is_settled(self, spool: Path, how: str, maxsize: int) -> None:
        """Though others wait still."""
        with SpoolWriter(spool, max_bytes=3 * PAGE, maxsize=maxsize) as writer, SpoolReader(spool) as reader:
            writer.put_many([pages(2), pages(1)])
            waiting = Call(writer.put, pages(2))
            waiting.until_asleep()
            item = reader.receive()
            assert not waiting.done
            if how == "ack":
                item.ack()
            else:
                item.reject("unwanted")
            assert waiting.result() == 3

    def test_small_item_is_put_though_a_large_one_waits_for_room(self, spool: Path) -> None:
        writer, other, reader = (
            SpoolWriter(spool, max_bytes=10 * PAGE),
            SpoolWriter(spool),
            SpoolReader(spool),
        )
        with writer, other, reader:
            for _ in range(10):
                writer.put(pages(1))
            large = Call(writer.put, pages(8))
            large.until_asleep()
            small = Call(other.put, pages(1))
            reader.get_nowait()
            assert small.result() == 11
            for _ in range(8):
                reader.get_nowait()
            assert large.result() == 12


class TestFileSystem:
    """What the kernel says of the file system is changed here; one that is really full is another test's."""

    @pytest.fixture
    def free(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        free = [1 << 40]

        def status(_: object) -> os.statvfs_result:
            available = free[0] // PAGE
            return os.statvfs_result((PAGE, PAGE, 1000, available, available, 9, 9, 9, 0, 255))

        monkeypatch.setattr(fs, "statvfs", status)
        return free

    def test_too_little_free_space_is_full(self, writer: SpoolWriter, free: list[int]) -> None:
        free[0] = 2 * PAGE
        with pytest.raises(Full):
            writer.put_nowait(pages(3))
        with pytest.raises(Full):
            writer.put(pages(3), timeout=0.05)
        writer.put_nowait(pages(2))
        waiting = Call(writer.put, pages(3))
        waiting.until_asleep()
        free[0] = 3 * PAGE
        assert waiting.result() == 2
        with pytest.raises(TooLarge, match=rf"{1000 * PAGE} bytes \({3 * PAGE} free"):
            writer.put(pages(1001))

    def test_consumed_files_give_way_before_a_put_waits(
        self, spool: Path, writer: SpoolWriter, reader: SpoolReader, free: list[int]
    ) -> None:
        for _ in range(5):
            writer.put(pages(2))
        for _ in range(5):
            reader.get_nowait()
        with SpoolWriter(spool) as other:  # the first may have kept one
            free[0] = PAGE
            with pytest.raises(Full):
                other.put_nowait(pages(3))
        assert len(list((spool / "free").iterdir())) <= 1

    def test_what_is_reserved_gives_way_before_a_put_waits(
        self, spool: Path, writer: SpoolWriter, reader: SpoolReader, free: list[int]
    ) -> None:
        for _ in range(2):
            writer.put(pages(2))
        for _ in range(2):
            reader.get_nowait()
        writer.put(pages(2))  # into one of the two, and reserves the other
        assert len(list((spool / "free").iterdir())) == 1
        reader.close()  # a session of the same process would let it go too
        free[0] = PAGE
        with pytest.raises(Full):
            writer.put_nowait(pages(3))
        assert not list((spool / "free").iterdir())

    def test_a_session_for_which_no_file_can_be_made_says_so(self, spool: Path) -> None:
        SpoolWriter(spool).close()
        (spool / "spare").unlink()  # which is for that

        def refuse(event: Event) -> None:
            if event.name == "open_at" and event.args[1] & os.O_EXCL:
                fail(errno.ENOSPC)(event)

        with Injector(refuse), pytest.raises(StorageError) as raised:
            SpoolReader(spool)
        assert raised.value.errno == errno.ENOSPC

    def test_a_session_that_was_closed_is_not_asked_to_give_way(
        self, tmp_path: Path, writer: SpoolWriter, free: list[int]
    ) -> None:
        """The numbers of its descriptors are others' by now."""
        closed = SpoolReader(tmp_path / "other")
        side = closed._consumer
        assert isinstance(side, Side)
        number = side.session.directories.root
        closed.close()
        others = [os.open("/", os.O_RDONLY) for _ in range(20)]
        assert number in others
        free[0] = PAGE
        asked: list[Any] = []
        with Injector(lambda event: asked.extend(event.args[:1])), pytest.raises(Full):
            writer.put_nowait(pages(3))
        assert number not in asked
        for fd in others:
            os.close(fd)


def test_maxsize_holds_for_many_threads_at_once(spool: Path) -> None:
    def put_some(writer: SpoolWriter) -> None:
        for _ in range(50):
            writer.put(pages(1))

    most = 0
    with SpoolWriter(spool, maxsize=3) as writer, SpoolReader(spool) as reader:
        calls = [Call(put_some, writer) for _ in range(4)]
        for _ in range(200):
            most = max(most, reader.qsize())
            reader.get(timeout=10)
        for call in calls:
            call.result()
        assert most <= 3
        writer.shutdown()
        with pytest.raises(ShutDown):
            reader.get()


@pytest.mark.parametrize("delay", [0, 1000])
def test_redelivered_and_delayed_items_count(spool: Path, delay: float) -> None:
    with SpoolWriter(spool, maxsize=2, preallocate=(4, PAGE)) as writer, SpoolReader(spool) as reader:
        for _ in range(20):  # until whatever is remembered of the last put is used
            writer.put(pages(2))
            reader.get()
        writer.put_nowait(pages(2))
        item = reader.receive()
        writer.put_nowait(pages(2))
        item.nack(delay)
        assert writer.full()
        with pytest.raises(Full):
            writer.put_nowait(pages(2))
        reader.get()
        writer.put_nowait(pages(2))


def test_room_that_another_took_meanwhile_is_full_and_nothing_is_left(spool: Path) -> None:
    with SpoolWriter(spool, maxsize=2) as writer, SpoolWriter(spool) as other:
        writer.put(pages(9))  # and knows that there is room for one more
        other.put(pages(9))
        with pytest.raises(Full):
            writer.put_nowait(pages(9))
        assert list((spool / "tmp").iterdir()) == []
