"""One file, one user, one place stops nobody else: what cannot be moved, removed or read costs that file alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.account import check_spool
from support.damage import crash, item, item_name
from support.faults import Event, Injector, fail

from spoolipc import (
    BadItem,
    Empty,
    SpoolReader,
    SpoolWriter,
    StorageError,
    failed_drop,
    failed_list,
    failed_retry,
    fsck,
    gc,
    purge,
    remove,
    stat,
)
from spoolipc.cli.main import main

LARGE = np.arange(10_000)
Hook = Callable[[Event], object]


def directory_of(fd: int) -> str:
    return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))


def refuse_into(part: str, error: int) -> Hook:
    """No file can be moved into a part, as where it is full, closed, or a file system of its own."""

    def hook(event: Event) -> None:
        if event.name == "rename" and directory_of(event.options["dst_dir_fd"]) == part:
            fail(error)(event)

    return hook


def refuse_names(error: int, *names: str) -> Hook:
    """These files can be neither moved nor removed, as where they are immutable."""

    def hook(event: Event) -> None:
        if event.name in ("rename", "unlink") and event.args[0] in names:
            fail(error)(event)

    return hook


def said(caplog: pytest.LogCaptureFixture, what: str) -> list[str]:
    return [record.message for record in caplog.records if what in record.message]


# Dead letters


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_dead_letter_that_failed_does_not_take_is_counted_listed_retried_and_dropped(
    spool: Path, error: int
) -> None:
    with SpoolWriter(spool, max_attempts=1) as writer, SpoolReader(spool) as reader:
        writer.put_many([np.full(5000, number) for number in range(5)])
        crash(spool, "reader = SpoolReader(path)\nitem = reader.receive()")
        (spool / item(3)).write_bytes(b"damaged")
        with Injector(refuse_into("failed", error)):
            gc(spool)  # the crashed reader's had no attempt left
            reader.receive().reject("not wanted")
            assert int(reader.get()[0]) == 3
        assert stat(spool).failed == 3
        letters = failed_list(spool)
        assert [letter.seq for letter in letters] == [1, 2, 3]
        assert [letter.reason for letter in letters][1] == "not wanted"
        assert int(np.load(letters[0].path)[0]) == 0
        check_spool(spool)
        gc(spool)
        assert failed_list(spool) == letters
        (spool / "index").unlink()
        assert reader.qsize() == 1
        assert stat(spool).failed == 3
        assert failed_retry(spool, [2]).seqs == {2: 6}
        assert failed_drop(spool) == [1, 3]
        assert stat(spool).failed == 0
        assert [int(array[0]) for array in reader.get_many(9)] == [4, 1]
    assert sorted(os.listdir(spool)) == [
        "alive",
        "failed",
        "free",
        "index",
        "items",
        "spare",
        "spool.json",
        "tmp",
    ]


def test_a_spool_with_dead_letters_that_failed_did_not_take_is_removed_whole(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put(LARGE)
        with Injector(refuse_into("failed", errno.EXDEV)):
            reader.receive().reject("not wanted")
    remove(spool)
    assert not spool.exists()


@pytest.mark.damaged  # the item stays where it is, until the table is built again
def test_a_dead_letter_that_cannot_be_moved_at_all_is_delivered_no_more(
    spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with SpoolWriter(spool, max_attempts=1) as writer, SpoolReader(spool) as reader:
        writer.put_many([np.full(5000, number) for number in range(4)])
        crash(spool, "reader = SpoolReader(path)\nitem = reader.receive()")
        (spool / item(2)).write_bytes(b"damaged")
        with Injector(refuse_names(errno.EPERM, item_name(1), item_name(2))):
            assert [int(reader.get(timeout=20)[0]) for _ in range(2)] == [2, 3]
            gc(spool)
            with pytest.raises(Empty):
                reader.get_nowait()
        assert stat(spool).in_flight == 0
        for seq in (1, 2):
            assert len(said(caplog, f"item {seq} cannot be moved")) == 1
    assert {problem.kind for problem in fsck(spool).problems} == {"unknown", "item"}
    fsck(spool, repair=True)
    check_spool(spool)


def test_a_damaged_item_that_failed_does_not_take_is_set_aside_by_fsck(spool: Path) -> None:
    with SpoolWriter(spool) as writer:
        writer.put_many([LARGE, LARGE])
    (spool / item(1)).write_bytes(b"damaged")
    with Injector(refuse_into("failed", errno.EXDEV)):
        assert fsck(spool, repair=True).clean
    assert [letter.seq for letter in failed_list(spool)] == [1]
    assert stat(spool).depth == 1


# Items that are discarded


@pytest.mark.damaged
def test_an_item_that_cannot_be_removed_keeps_no_other_from_being_purged(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put_many([LARGE] * 3)
        with Injector(refuse_names(errno.EPERM, item_name(2))):
            assert purge(spool) == 3
            writer.put(LARGE)
            assert len(reader.get_nowait()) == LARGE.size
        assert os.listdir(spool / "items") == [item_name(2)]


@pytest.mark.damaged
def test_an_item_that_cannot_be_removed_stops_nobody_in_a_spool_that_was_shut_down_at_once(
    spool: Path,
) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool):
        writer.put_many([LARGE] * 3)
        with Injector(refuse_names(errno.EIO, item_name(1))):
            writer.shutdown(immediate=True)
            with SpoolReader(spool) as other:
                assert other.qsize() == 0


# Places that take no file


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("size", [10, 10_000])
def test_items_are_taken_where_free_takes_no_file(spool: Path, error: int, size: int) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader, Injector(refuse_into("free", error)):
        for _ in range(2):
            writer.put_many([np.full(size, number) for number in range(5)])
            assert int(reader.get_nowait()[0]) == 0
            assert [int(array[0]) for array in reader.get_many(2)] == [1, 2]
            with reader.receive(block=False) as received:
                assert int(received.array[0]) == 3
            assert int(reader.get_nowait(copy=True)[0]) == 4
    check_spool(spool)


def test_an_item_that_cannot_be_taken_off_can_be_rejected_and_stops_nobody_then(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put_many([np.full(5000, number) for number in range(2)])
        with Injector(refuse_names(errno.EPERM, item_name(1))):
            with pytest.raises(StorageError, match=item_name(1)):
                reader.get_nowait()
            reader.receive(block=False).reject("its file cannot be moved")
            assert int(reader.get_nowait()[0]) == 1
    fsck(spool, repair=True)
    with SpoolReader(spool) as reader:
        assert int(reader.get_nowait()[0]) == 0


def test_an_error_of_a_signal_handler_is_not_taken_for_one_of_a_file(spool: Path) -> None:
    def late(event: Event) -> None:
        if event.name in ("rename", "unlink") and str(event.args[0]).endswith(".npy"):
            met.append(event)
            raise TimeoutError("of a handler")

    def once(event: Event) -> None:
        if not met:
            late(event)

    met: list[Event] = []
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put_many([LARGE, LARGE])
        received = reader.receive()
        for call in (reader.get_nowait, lambda: received.reject("unwanted"), lambda: purge(spool)):
            for act in (late, once):
                met.clear()
                with Injector(act), pytest.raises(TimeoutError, match="of a handler"):
                    call()
        assert stat(spool).failed == 0
        received.nack()
        assert len(reader.get_many(2)) == 2


@pytest.mark.parametrize(
    ("name", "call"), [("list_names", stat), ("fstat", stat), ("fstat", fsck), ("lock", SpoolReader)]
)
def test_an_error_of_a_signal_handler_as_a_spool_is_opened_or_looked_at_is_none_of_the_spools(
    spool: Path, name: str, call: Callable[[Path], object]
) -> None:
    def late(event: Event) -> None:
        if event.name == name:
            raise TimeoutError("of a handler")

    SpoolWriter(spool).close()
    with Injector(late), pytest.raises(TimeoutError, match=r"^of a handler$") as caught:
        call(spool)
    assert type(caught.value) is TimeoutError


def test_no_descriptor_for_the_reason_is_no_other_error(spool: Path) -> None:
    def late(event: Event) -> None:
        if event.name == "list_names":
            met.append(event)
        if met and event.name in ("list_names", "stat_at"):
            fail(errno.EMFILE)(event)

    SpoolWriter(spool).close()
    met: list[Event] = []
    with Injector(late), pytest.raises(StorageError, match=f"^{spool}: .*ulimit -n"):
        stat(spool)


# Files that nobody needs


@pytest.mark.parametrize(
    ("part", "error"), [("free", errno.EPERM), ("tmp", errno.EBUSY), ("alive", errno.EIO)]
)
def test_a_file_of_a_crashed_session_that_cannot_be_removed_stops_nobody_and_is_said_once(
    spool: Path, caplog: pytest.LogCaptureFixture, spend: Callable[[float], None], part: str, error: int
) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put_many([np.full(5000, number) for number in range(4)])
        before = set(os.listdir(spool / "alive"))
        crash(
            spool,
            "writer, reader = SpoolWriter(path), SpoolReader(path)\n"
            "shown = reader.get(); item = reader.receive(); lent = writer.loan(9000, float)",
        )
        names = set(os.listdir(spool / part)) - before
        assert names
        with Injector(refuse_names(error, *names)):
            for _ in range(5):
                spend(1.5)
                with suppress(Empty):
                    reader.get_many(9, block=False)
        assert stat(spool).gets == 4
        for name in names:
            assert len(said(caplog, f"{part}/{name}")) == 1
        assert gc(spool).not_removed == ()
        check_spool(spool)


def test_gc_goes_on_past_a_file_that_it_cannot_remove_and_says_so(
    spool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crash(
        spool,
        "writer, reader = SpoolWriter(path), SpoolReader(path)\n"
        "lent = [writer.loan(9000, float) for _ in range(3)]",
    )
    before = os.listdir(spool / "alive")
    with Injector(refuse_names(errno.EPERM, sorted(os.listdir(spool / "tmp"))[0], before[0])):
        found = gc(spool)
        assert (found.temporary_files, found.crashed_sessions) == (2, 1)
        assert len(found.not_removed) == 2
        why = f"alive/{before[0]}: {os.strerror(errno.EPERM)}"
        assert why in found.not_removed
        assert main(["gc", str(spool)]) == 1
        assert f"  could not be removed: {why}" in capsys.readouterr().out.splitlines()
    assert main(["gc", str(spool)]) == 0
    assert os.listdir(spool / "tmp") == []


def test_a_file_in_free_that_cannot_be_removed_keeps_nobody_from_building_the_index_again(
    spool: Path,
) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put_many([LARGE] * 3)
        shown = reader.get()
        (name,) = set(os.listdir(spool / "free"))
        (spool / "index").unlink()
        with Injector(refuse_names(errno.EPERM, name)):
            assert reader.qsize() == 2
        assert np.array_equal(shown, LARGE)
        assert writer.put(LARGE) == 4
        assert gc(spool).orphaned_files == 1


# Items that cannot be read


def refuse_reading(error: int, name: str) -> Hook:
    """A file cannot be opened, or what is open of it cannot be read, as where the device has lost it."""

    def hook(event: Event) -> None:
        if event.name == "open_at" and event.args[0] == name:
            fail(error)(event)
        if event.name in ("read", "pread") and os.readlink(f"/proc/self/fd/{event.args[0]}").endswith(name):
            fail(error)(event)

    return hook


@pytest.mark.parametrize("size", [10, 10_000])
@pytest.mark.parametrize("way", ["get", "receive", "peek"])
def test_an_item_that_cannot_be_read_is_a_dead_letter_and_stops_nobody(
    spool: Path, size: int, way: str
) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put_many([np.full(size, number) for number in range(3)])
        with Injector(refuse_reading(errno.EIO, item_name(1))):
            assert [problem.kind for problem in fsck(spool).problems] == ["item"]
            if way == "get":
                assert int(reader.get_nowait()[0]) == 1
            elif way == "peek":
                assert reader.peek(block=False).seq == 2
            else:
                with pytest.raises(BadItem), reader.receive(block=False) as received:
                    assert received.array is None
            (letter,) = failed_list(spool)
            assert (letter.seq, letter.damage) == (1, f"cannot be read: {os.strerror(errno.EIO)}")
            assert letter.damage in letter.reason
            assert list(failed_retry(spool).damaged) == [1]
        assert failed_retry(spool).seqs == {1: 4}
