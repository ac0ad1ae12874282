"""What somebody else takes away from a spool is made again or a clear error; it costs no item and doubles none."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.calls import Call
from support.damage import PARTS, crash, item
from support.faults import Event, Injector, fail
from support.locks import lock_file
from support.peek import peek_table
from support.peer import Peer
from support.waits import LOOK_OFTEN, is_locked, start_waiting, until

from spoolipc import (
    Empty,
    Full,
    LockTimeout,
    NotASpool,
    SpoolGone,
    SpoolReader,
    SpoolWriter,
    StorageError,
    failed_list,
    fsck,
    gc,
    stat,
)
from spoolipc.directory.lock import IndexLock

LARGE = np.arange(10_000)


def tokens(path: Path) -> list[Path]:
    """The files in `alive/`."""
    return list((path / "alive").iterdir())


def gives(reader: SpoolReader) -> list[int]:
    """The first element of each item that is left."""
    return [int(array[0]) for array in reader.get_many(100)] if reader.qsize() else []


# Parts of the spool


@pytest.mark.parametrize("array", [np.arange(3), LARGE], ids=["small", "large"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_was_removed_is_made_again_and_all_sessions_go_on(
    spool: Path, part: str, array: np.ndarray
) -> None:
    """Two processes of each kind, so that each finds out by itself or is told by another."""
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader, Peer(spool) as peer:
        peer.run("writer, reader = SpoolWriter(path), SpoolReader(path)")
        for _ in range(3):
            writer.put(array)
            peer.run("writer.put(reader.get())")
            reader.get()
        before = peek_table(spool).counts["next_seq"]
        shutil.rmtree(spool / part)
        if part == "alive":  # else the next call finds out, or within a second
            SpoolReader(spool).close()
        for _ in range(3):
            writer.put(array)
            peer.run("writer.put(reader.get(timeout=10))")
            with reader.receive(timeout=10) as got:
                assert np.array_equal(got.array, array)
            peer.run(f"writer.put(np.arange({array.size}))")
            reader.receive().reject("not wanted")
        assert peek_table(spool).counts["next_seq"] == before + 9
        assert len(failed_list(spool)) == 3
        assert reader.empty()
        assert stat(spool).live_sessions == 4
        gc(spool)


@pytest.mark.parametrize("part", PARTS)
def test_who_opens_a_spool_makes_a_part_again_that_was_removed(spool: Path, part: str) -> None:
    with SpoolWriter(spool, maxsize=7) as writer:
        writer.put(LARGE)
    shutil.rmtree(spool / part)
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        assert writer.maxsize == 7
        assert writer.put(LARGE) == 2
        assert len(reader.get_many(10)) == (1 if part == "items" else 2)


@pytest.mark.parametrize("part", [part for part in PARTS if part != "items"])
@pytest.mark.parametrize("opening", [SpoolReader, SpoolWriter])
def test_who_opens_a_spool_makes_a_part_again_under_the_lock(
    spool: Path, monkeypatch: pytest.MonkeyPatch, opening: Callable[[Path], object], part: str
) -> None:
    SpoolWriter(spool).close()
    shutil.rmtree(spool / part)
    take, fd = IndexLock.take, os.open(lock_file(spool), os.O_RDONLY)
    with monkeypatch.context() as patch:
        patch.setattr(IndexLock, "take", lambda lock, patience=0.0: take(lock, 0.0))
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with pytest.raises(LockTimeout):
                opening(spool)
        finally:
            os.close(fd)
    assert not (spool / part).exists()
    SpoolReader(spool).close()
    assert (spool / part).is_dir()


def test_steps_without_a_rename_do_not_go_on_under_the_lock_of_a_directory_that_was_removed(
    spool: Path,
) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        for number in range(4):
            writer.put(np.array([number]))
        got = reader.receive()
        shutil.rmtree(spool / "items")
        with Peer(spool) as peer:
            peer.run("writer, reader = SpoolWriter(path), SpoolReader(path)\nwriter.put(np.array([9]))")
            peer.run("item = reader.receive()")
            with pytest.raises(Exception, match=r"not in flight|is missing|settled"):
                got.extend(5.0)
            assert reader.qsize() == 0
            peer.run("item.nack()")
            assert [int(reader.get(timeout=10)[0])] == [9]


def test_a_part_that_was_moved_away_and_made_again_by_hand_is_the_one_in_use(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put(LARGE)
        for part in PARTS:
            if part != "items":
                (spool / part).rename(spool.parent / part)
                (spool / part).mkdir(0o700)
        SpoolReader(spool).close()  # after a round of housekeeping, once a second, each looks again
        reader.receive().reject("no")
        writer.put(LARGE)
        assert len(failed_list(spool)) == 1
        assert np.array_equal(reader.get(), LARGE)


@pytest.mark.parametrize("gone", [["items", "index"], ["items", "spool.json"], ["spool.json", "index"]])
def test_a_spool_that_is_being_deleted_is_not_brought_back_and_nothing_is_left_of_a_put(
    spool: Path, gone: list[str]
) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put(LARGE)
        for name in gone:
            shutil.rmtree(spool / name) if (spool / name).is_dir() else (spool / name).unlink()
        left = sorted(os.listdir(spool))
        for call in (lambda: writer.put(LARGE, timeout=1.0), lambda: reader.get(timeout=1.0), reader.receive):
            with pytest.raises(SpoolGone):
                call()
        assert sorted(os.listdir(spool)) == left
        if "tmp" in left:
            assert os.listdir(spool / "tmp") == []
    shutil.rmtree(spool)


@pytest.mark.parametrize("array", [np.arange(3), LARGE], ids=["small", "large"])
def test_a_put_that_items_does_not_take_ends_with_the_remedy_and_leaves_nothing(
    spool: Path, array: np.ndarray
) -> None:
    def refuse(event: Event) -> None:
        if event.name == "rename" and os.readlink(f"/proc/self/fd/{event.options['dst_dir_fd']}").endswith(
            "/items"
        ):
            fail(errno.ENOENT)(event)

    with SpoolWriter(spool) as writer, Injector(refuse) as injector:
        with pytest.raises(StorageError, match=f"{spool}: items/ takes no file any more; run: spoolipc fsck"):
            writer.put(array)
        assert injector.met.count("rename") <= 3
        assert os.listdir(spool / "tmp") == []


# spool.json


def test_without_spool_json_sessions_go_on_with_their_limits_and_a_newcomer_is_told_the_remedy(
    spool: Path,
) -> None:
    with SpoolWriter(spool, maxsize=2, max_attempts=3) as writer, SpoolReader(spool) as reader:
        writer.put(LARGE)
        (spool / "spool.json").unlink()
        newcomers: list[Callable[[Path], object]] = [SpoolReader, SpoolWriter, stat, gc]
        for call in newcomers:
            with pytest.raises(NotASpool, match=f"spoolipc fsck --repair {spool}"):
                call(spool)
        writer.put(LARGE)
        with pytest.raises(Full):
            writer.put_nowait(LARGE)
        os.truncate(spool / "index", 8192 + 128 * 12)  # whoever builds it again has no other place to look
        assert reader.qsize() == 2
        with pytest.raises(Full):
            writer.put_nowait(LARGE)
        assert not fsck(spool).clean
        assert fsck(spool, repair=True).clean
        limits = stat(spool).limits
        assert (limits.maxsize, limits.max_attempts, limits.mode) == (2, 3, 0o700)
        SpoolReader(spool).close()


# What keeps cleaners of old files away


def test_a_cleaner_that_honours_locks_passes_over_a_spool_that_somebody_has_open(spool: Path) -> None:
    """As systemd-tmpfiles does: it takes an exclusive lock on each directory that it enters, or leaves it alone."""
    with SpoolWriter(spool), SpoolReader(spool):
        fd = os.open(spool, os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(fd)
    fd = os.open(spool, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        SpoolWriter(spool).close()  # nor does a cleaner keep anybody out
    finally:
        os.close(fd)


# The files of sessions


def test_a_reader_whose_file_was_removed_keeps_what_it_has_in_flight(spool: Path) -> None:
    with SpoolWriter(spool) as writer, Peer(spool) as peer:
        writer.put(LARGE)
        peer.run("reader = SpoolReader(path)\nitem = reader.receive()")
        for token in tokens(spool):
            token.unlink()
        for _ in range(6):
            with SpoolReader(spool) as reader:  # keeps house as it opens
                assert reader.empty()
        peer.run("item.ack()")
        assert failed_list(spool) == []
        assert stat(spool).in_flight == 0


def test_a_session_makes_its_file_again_and_is_woken_through_it(spool: Path) -> None:
    with SpoolWriter(spool) as writer, Peer(spool) as peer:
        peer.run("reader = SpoolReader(path)")
        peer.start("ask", "int(reader.get(timeout=30)[0])")
        for token in tokens(spool):
            token.unlink()
        with SpoolReader(spool):
            pass
        writer.put(np.array([5]))
        assert peer.answer() == 5
        SpoolReader(spool).close()  # a round of housekeeping; after it each says again that it is there
        writer.put(np.array([6]))
        assert peer.ask("int(reader.get(timeout=30)[0])") == 6
        assert len(tokens(spool)) == 2
        peer.run("writer = SpoolWriter(path)\nwriter.put(np.zeros(1))\nitem = reader.receive()")
        peer.kill()  # it has died with a file, so that this is seen at once
        with SpoolReader(spool) as reader:
            reader.get(timeout=10)


@pytest.mark.usefixtures("no_look")
def test_a_thread_that_waits_hears_through_the_file_that_another_made_again(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        waiting = [Call(reader.get) for _ in range(2)]
        for call in waiting:
            call.until_asleep()
        for token in tokens(spool):
            token.unlink()
        SpoolReader(spool).close()  # a round of housekeeping
        with Injector() as injector, pytest.raises(Empty):
            reader.get_nowait()  # makes the file again
        assert "watch_add" in injector.met
        assert "watch_open" not in injector.met
        writer.put_many([LARGE, LARGE])
        for call in waiting:
            assert np.array_equal(call.result(), LARGE)


def test_the_large_put_of_a_writer_whose_file_was_removed_ends(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        with writer.loan(LARGE.shape, LARGE.dtype) as array:
            for token in tokens(spool):
                token.unlink()
            SpoolReader(spool).close()
            array[:] = LARGE
        assert np.array_equal(reader.get(), LARGE)


def leave_without_a_file(path: Path, options: str = "") -> str:
    """A reader crashes that has two items in flight, and its file is removed; returns its token."""
    with SpoolWriter(path) as writer:
        writer.put_many([LARGE, LARGE])
    crash(path, f"reader = SpoolReader(path{options})\nitems = [reader.receive(), reader.receive()]")
    (token,) = tokens(path)
    token.unlink()
    return token.name


def test_gc_requeues_what_a_session_without_a_file_had_and_says_so(
    spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = leave_without_a_file(spool)
    with SpoolReader(spool) as reader:
        assert reader.empty()
    assert {problem.where for problem in fsck(spool).problems} == {f"alive/{token}"}
    assert gc(spool, dry_run=True).requeued_items == 2
    assert gc(spool).requeued_items == 2
    assert token in caplog.text
    with SpoolReader(spool) as reader:
        assert len(reader.get_many(5)) == 2


@pytest.mark.parametrize("how", ["fsck", "lease"])
def test_what_a_session_without_a_file_had_comes_back_by_fsck_or_when_its_lease_ends(
    spool: Path, how: str
) -> None:
    leave_without_a_file(spool, ", lease=0.2" if how == "lease" else "")
    if how == "fsck":
        assert fsck(spool, repair=True).clean
    with SpoolReader(spool) as reader:
        for _ in range(2):
            assert np.array_equal(reader.get(how == "lease", timeout=10), LARGE)


# What is said


def test_nothing_is_logged_under_the_lock(spool: Path) -> None:
    """A full pipe at stderr would stop everybody."""
    locked = list[bool]()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            locked.append(is_locked(spool))

    handler, log = Handler(), logging.getLogger("spoolipc")
    log.addHandler(handler)
    try:
        with SpoolWriter(spool, max_attempts=1) as writer, SpoolReader(spool) as reader:
            for _ in range(4):
                writer.put(LARGE)
            reader.receive().reject("not wanted")
            reader.receive().nack(reason="failed")
            (spool / item(3)).write_bytes(b"damaged")
            (spool / "index").unlink()
            reader.get()
            writer.put(LARGE)
            (spool / item(5)).write_bytes(b"damaged")
            fsck(spool, repair=True)
    finally:
        log.removeHandler(handler)
    assert len(locked) >= 6
    assert not any(locked)


def test_who_sleeps_makes_its_file_again(spool: Path) -> None:
    """What it has in flight would else not be redelivered if it crashed in its sleep."""
    with SpoolWriter(spool) as writer, Peer(spool) as peer:
        before = set(tokens(spool))
        writer.put(LARGE)
        peer.run(f"{LOOK_OFTEN}; reader = SpoolReader(path); item = reader.receive()")
        start_waiting(peer, "len(reader.get(timeout=60))")
        (file,) = set(tokens(spool)) - before
        file.unlink()
        until(file.exists)
        writer.put(LARGE)
        assert peer.answer() == len(LARGE)


def test_a_session_whose_file_was_exchanged_gives_back_nothing_that_was_taken_from_it(spool: Path) -> None:
    """It counts as crashed, as nobody has the lock on the new file."""
    writer = SpoolWriter(spool)
    with SpoolReader(spool) as reader:
        for _ in range(2):
            writer.put(LARGE)
        reader.get_many(2)
        with pytest.raises(Empty):
            reader.get_nowait()  # and nothing is shown any more
        writer.put(LARGE)  # into one of the two, and reserves the other
        assert len(peek_table(spool).of("reserved")) == 1
        token = writer._producer.session.token  # type: ignore[attr-defined]
        file = spool / "alive" / f"{token:016x}"
        file.unlink()
        file.touch(mode=0o600)
        gc(spool)
        assert not peek_table(spool).of("reserved")
        writer.close()
        assert gives(reader) == [0]
