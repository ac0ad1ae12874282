"""What is kept gives way: consumed files never keep a put waiting, on however small a file system."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from support.account import check_spool
from support.arrays import Array
from support.calls import Call
from support.damage import crash
from support.faults import Event, Injector, at
from support.mounts import tmpfs
from support.peer import Peer
from support.waits import until

from spoolipc import (
    Empty,
    Full,
    SpoolReader,
    SpoolWriter,
    failed_drop,
    failed_list,
    failed_retry,
    fsck,
    gc,
    purge,
    stat,
)
from spoolipc.cli.text import stat_lines
from spoolipc.directory import producer, receiving, staging

MIB = 1 << 20
LITTLE = MIB  # what a spool without items may take: its table

pytestmark = pytest.mark.fault


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs as large as a container's `/dev/shm`."""
    with tmpfs(tmp_path / "disk", "64m") as place:
        yield place


@pytest.fixture
def few_files(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that takes 120 files."""
    with tmpfs(tmp_path / "disk", "64m,nr_inodes=120") as place:
        yield place


def used(disk: Path) -> int:
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def frame(mib: int | float) -> Array:
    return np.ones(int(mib * MIB) - 1024, "u1")


def put_until_full(writer: SpoolWriter, array: Array) -> int:
    count = 0
    while True:
        try:
            writer.put_nowait(array)
        except Full:
            return count
        count += 1


def read_all(reader: SpoolReader) -> None:
    """Get all there is, and let go of it."""
    while True:
        try:
            reader.get_nowait()
        except Empty:
            return


@pytest.mark.parametrize("size", [0.01, 1, 6, 20])
def test_after_all_is_read_a_put_of_any_size_fits_again(disk: Path, size: float) -> None:
    """While the others that have the files mapped do nothing."""
    path, foreign = disk / "spool", disk / "foreign"
    foreign.write_bytes(bytes(54 * MIB if size < 1 else 0))  # of small ones some hundreds will do
    with Peer(path) as peer, SpoolWriter(path) as writer, SpoolReader(path) as reader:
        peer.run("idle = SpoolReader(path), SpoolWriter(path)")
        for _ in range(3):  # the files come round, so that all have them mapped
            assert put_until_full(writer, frame(size)) >= 3
            peer.run("idle[0].get(); idle[0].get(); idle[1].put(np.ones(9_000, 'u1'), timeout=10)")
            read_all(reader)
            peer.run("try: idle[0].get_nowait()\nexcept Empty: pass")  # and lets go of what it got
        foreign.unlink()
        for other in (size, 1.9 * size, size / 3, 40):
            writer.put_nowait(frame(other))
            reader.get_nowait()
        check_spool(path)


def test_an_idle_spool_leaves_room_for_another_and_for_other_programs(disk: Path) -> None:
    with SpoolWriter(disk / "a") as writer, SpoolReader(disk / "a") as reader:
        for _ in range(10):
            writer.put_nowait(frame(6))
        read_all(reader)
        with SpoolWriter(disk / "b") as other:
            other.put_nowait(frame(6))
        np.save(disk / "array.npy", frame(24))


def test_an_idle_spool_keeps_less_than_is_free(disk: Path) -> None:
    with SpoolWriter(disk / "a") as writer, SpoolReader(disk / "a") as reader:
        for _ in range(4):
            writer.put_nowait(frame(12))
            writer.put_nowait(frame(2))
            read_all(reader)
        status = os.statvfs(disk)
        assert stat(disk / "a").free_bytes <= status.f_bavail * status.f_frsize


def test_the_pool_shrinks_as_others_take_the_space(disk: Path, spend: Callable[[float], None]) -> None:
    with SpoolWriter(disk / "a") as writer, SpoolReader(disk / "a") as reader:
        writer.put_many([frame(4)] * 6)
        read_all(reader)
        for number in range(3):
            (disk / str(number)).write_bytes(bytes(13 * MIB))
            spend(1.1)
            read_all(reader)  # keeps house
            free = os.statvfs(disk)
            assert stat(disk / "a").free_bytes <= free.f_bavail * free.f_frsize
        assert stat(disk / "a").free_files < 4


@pytest.mark.parametrize("error", [errno.EDQUOT, errno.ENOSPC])
@pytest.mark.parametrize("call", ["open_at", "save", "allocate", "write"])
def test_a_refused_write_evicts_whatever_statvfs_says(spool: Path, error: int, call: str) -> None:
    size = 0.004 if call == "write" else 1
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put_many([frame(size)] * 5)
        read_all(reader)
        assert stat(spool).free_files == 5

        def refuse(event: Event) -> None:
            makes = event.name == call and (call != "open_at" or event.args[1] & os.O_CREAT)
            if makes and len(os.listdir(spool / "free")) > 2:
                raise OSError(error, os.strerror(error))

        with SpoolWriter(spool) as other, Injector(refuse):
            if call == "allocate":
                with other.loan(3 * MIB, "u1", timeout=0) as lent:
                    lent[:] = 1
            else:
                other.put_nowait(frame(3 * size))
        assert stat(spool).free_files <= 2


def test_a_table_that_cannot_grow_evicts(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put_many([frame(1)] * 5)
        read_all(reader)
        small = np.zeros(1)

        def refuse(event: Event) -> None:
            if event.name == "allocate" and os.listdir(spool / "free"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with Injector(refuse):
            for _ in range(300):
                writer.put_nowait(small)
        assert stat(spool).free_files == 0


def test_files_that_the_file_system_lacks_are_taken_from_the_pool(few_files: Path) -> None:
    path = few_files / "spool"
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        assert put_until_full(writer, np.zeros(10)) > 80
        read_all(reader)
        writer.put_nowait(np.zeros(10_000))
        with SpoolReader(path) as other:
            assert len(other.get_nowait()) == 10_000
        (path / "spare").unlink()  # which would do for one
        put_until_full(writer, np.zeros(10))
        with SpoolReader(path) as other:  # all that wait leave a place for who takes them
            read_all(other)
        check_spool(path)


def take_every_file(disk: Path) -> None:
    made = 0
    while os.statvfs(disk).f_favail:
        (disk / str(made)).touch()
        made += 1


def test_a_spool_without_a_pool_is_opened_and_looked_after_where_others_took_every_file(
    few_files: Path,
) -> None:
    path = few_files / "spool"
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.put_many([np.zeros(10)] * 9)
        for _ in range(3):
            reader.receive().reject("unwanted")
    calls: list[Callable[[], object]] = [
        lambda: gc(path),
        lambda: failed_drop(path, [1]),
        lambda: failed_retry(path, [2]),
        lambda: purge(path),
    ]
    for call in calls:
        take_every_file(few_files)
        with SpoolReader(path) as only:
            assert len(only.get_nowait()) == 10
        take_every_file(few_files)
        call()
    with SpoolWriter(path, maxsize=100) as writer:
        assert (writer.qsize(), stat(path).failed) == (0, 1)


def test_who_opens_a_spool_evicts_for_the_file_he_needs(few_files: Path) -> None:
    path = few_files / "spool"
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.put_many([np.zeros(10)] * 20)
        read_all(reader)
        assert stat(path).free_files > 10
        (path / "spare").unlink()  # which would do for one
        take_every_file(few_files)
        with SpoolReader(path), SpoolWriter(path, maxsize=100):
            assert gc(path).crashed_sessions == 0


def test_what_other_sessions_of_the_process_have_let_go_of_gives_way(disk: Path) -> None:
    """They make no call meanwhile, as one thread has them all."""
    with SpoolWriter(disk / "a") as writer, SpoolReader(disk / "a") as reader:
        for array in (frame(40), frame(2)):
            writer.put_many([frame(2)] * 20)
            del reader.get_many(20)[:]
            writer.put_nowait(array)
            reader.get_nowait()
        writer.put_many([frame(2)] * 20)
        del reader.get_many(20)[:]
        with SpoolWriter(disk / "b") as other, SpoolReader(disk / "b") as receiving:
            other.put_nowait(frame(40))
            assert len(receiving.get_nowait()) == len(frame(40))
        check_spool(disk / "a")


def test_what_other_sessions_of_the_process_let_go_of_while_a_put_waits_gives_way(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer, "RETRY_AFTER", 0.05)
    with SpoolWriter(disk / "spool") as writer, SpoolReader(disk / "spool") as reader:
        writer.put_many([frame(20)] * 3)
        kept = reader.get()
        putting = Call(writer.put, frame(20))
        putting.until_asleep()
        del kept  # and makes no call
        putting.result()


def test_an_idle_writer_of_another_process_keeps_few_large_files(disk: Path) -> None:
    path = disk / "spool"
    with Peer(path) as peer, SpoolReader(path) as reader, SpoolWriter(path) as writer:
        peer.run("writer = SpoolWriter(path); array = np.ones(300_000, 'u1')")
        for count in (90, 40, 90, 40):
            peer.run(f"writer.put_many([array] * {count})")
            read_all(reader)
        assert (stat(path).pinned_by or {}).get(str(peer.pid), 0) < 2 * MIB
        writer.put_nowait(frame(60))


def test_frames_through_a_small_file_system_take_no_longer_than_without_recycling(disk: Path) -> None:
    def seconds(name: str, recycle_bytes: int | None) -> float:
        path = disk / name
        with SpoolWriter(path, maxsize=8, recycle_bytes=recycle_bytes) as writer, SpoolReader(path) as reader:
            began = time.monotonic()
            for _ in range(4):
                putting = Call(writer.put_many, [frame(20)] * 5)
                for _ in range(5):
                    reader.get(timeout=20)
                putting.result()
            return time.monotonic() - began

    assert seconds("recycling", None) < 5 * seconds("not", 0)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_reject_evicts_for_its_reason_and_without_one_is_no_problem(disk: Path, pooled: bool) -> None:
    path = disk / "spool"
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.put_many([np.zeros(1000)] * 2)
        writer.put(np.ones(1000))
        reader.get_many(2)
        if not pooled:
            writer.put_many([np.zeros(1000)] * 2)
        with open(disk / "foreign", "wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        reader.receive().reject("unwanted")
        assert fsck(path).problems == ()
        (letter,) = failed_list(path)
        assert letter.reason == ("unwanted" if pooled else "unknown: its history is lost")


def test_a_file_system_without_a_size_has_room(tmp_path: Path) -> None:
    path = tmp_path / "disk" / "spool"
    with tmpfs(path.parent, "0,nr_inodes=0"), SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in range(2):
            writer.put_nowait(frame(2))
            assert len(reader.get_nowait()) == len(frame(2))
        assert stat(path).free_files == 1  # as it keeps files to be written again
        assert not writer.full()


def test_what_the_pool_may_not_hold_is_emptied_whoever_maps_it(disk: Path) -> None:
    with SpoolWriter(disk / "spool") as writer, SpoolReader(disk / "spool") as reader:
        for _ in range(3):
            writer.put(frame(10))  # from the second on through a mapping, which is kept
            reader.receive().ack()
        writer.put(frame(10))
        (disk / "foreign").write_bytes(bytes(64 * MIB - used(disk) - 2 * MIB))
        writer.put(np.ones(1000))  # to a new file, for which it is seen how little is free
        before = used(disk)
        reader.receive().ack()
        assert used(disk) <= before - 10 * MIB


# Waiting


def test_a_put_that_waits_says_once_for_what_and_who_holds_it(
    disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(staging, "PATIENCE", 0.0)
    path = disk / "spool"
    with Peer(path) as peer, SpoolWriter(path) as writer:
        peer.run("reader = SpoolReader(path)")
        writer.put_many([frame(20)] * 3)
        peer.run("kept = reader.get_many(3)")
        assert not writer.full()
        putting = Call(writer.put, frame(20))
        until(lambda: stat(path).wanted_bytes)
        found = stat(path)
        assert (found.wanted_bytes, found.pinned_by) == (20 * MIB, {str(peer.pid): 60 * MIB})
        until(writer.full)
        assert f"pinned by process {peer.pid}" in "\n".join(stat_lines(found))
        peer.run("del kept\ntry: reader.get_nowait()\nexcept Empty: pass")
        putting.result()
        assert stat(path).wanted_bytes == 0
        assert not writer.full()
    said = [record.message for record in caplog.records if "lacks" in record.message]
    assert len(said) == 1
    assert f"arrays shown or filled by process {peer.pid} {60 * MIB}" in said[0]


@pytest.mark.parametrize("writers", [0, 1])
def test_a_get_that_waits_where_no_writer_was_says_so_once(
    spool: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, writers: int
) -> None:
    monkeypatch.setattr(receiving, "PATIENCE", 0.0)
    with SpoolReader(spool) as reader, ExitStack() as stack:
        for _ in range(writers):
            stack.enter_context(SpoolWriter(spool))
        for _ in range(3):
            with pytest.raises(Empty):
                reader.get(timeout=0.01)
    assert len([record for record in caplog.records if "is the path right" in record.message]) == 1 - writers


# Leaving


@pytest.mark.parametrize("first", ["writer", "reader"])
def test_the_last_session_to_leave_empties_the_pool(disk: Path, first: str) -> None:
    path = disk / "spool"
    writer, reader = SpoolWriter(path, preallocate=(3, MIB)), SpoolReader(path)
    writer.put(frame(4))
    reader.get()
    sessions = [writer, reader] if first == "writer" else [reader, writer]
    sessions[0].close()
    assert stat(path).free_files >= 3
    sessions[1].close()
    assert stat(path).free_files == 0
    assert list((path / "free").iterdir()) == []
    assert used(disk) < LITTLE
    check_spool(path)


def test_of_two_sessions_that_leave_at_once_one_empties_the_pool(tmp_path: Path) -> None:
    for number in range(1, 100):
        path = tmp_path / f"{number}"
        writer, reader = SpoolWriter(path, preallocate=(2, 10_000)), SpoolReader(path)
        with Injector(at(number, lambda _, reader=reader: reader.close())) as calls:  # type: ignore[misc]
            writer.close()
        reader.close()
        assert list((path / "free").iterdir()) == [], f"the other left before call {number}"
        if len(calls.met) < number:
            return
    raise AssertionError("to leave takes too many calls")


def test_a_writer_that_leaves_takes_along_what_it_lent(spool: Path) -> None:
    writer = SpoolWriter(spool)
    loan = writer.loan(5000)
    loan.__enter__()
    assert os.listdir(spool / "tmp")
    writer.close()
    assert os.listdir(spool / "tmp") == []
    loan.discard()


def test_of_sessions_that_leave_at_once_one_empties_the_pool(spool: Path) -> None:
    for _ in range(10):
        sessions = [SpoolWriter(spool, preallocate=(3, 1000)), *[SpoolReader(spool) for _ in range(3)]]
        for call in [Call(session.close) for session in sessions]:
            call.result()
        assert list((spool / "free").iterdir()) == []


def test_gc_empties_the_pool_where_no_session_is_there(disk: Path) -> None:
    path = disk / "spool"
    crash(path, f"writer = SpoolWriter(path, preallocate=(3, {MIB}))")
    with SpoolReader(path):
        assert (gc(path).pooled_files, gc(path, dry_run=True).pooled_files) == (0, 0)
        crash(path, "reader = SpoolReader(path)")
    crash(path, f"writer = SpoolWriter(path, preallocate=(3, {MIB}))")
    would = gc(path, dry_run=True)
    assert (would.pooled_files, would.bytes_freed >= 3 * MIB) == (3, True)
    did = gc(path)
    assert (did.pooled_files, did.bytes_freed) == (3, would.bytes_freed)
    assert used(disk) < LITTLE


# An emptied file is a SIGBUS for who looks at its pages

STOP_IN_A_LOOK = """
import os, signal
from spoolipc.directory import itemfile, receiving
def stopping(*args, real=receiving.parse):
    os.kill(os.getpid(), signal.SIGSTOP)
    return real(*args)
receiving.parse = itemfile.parse = stopping
"""


def stop_in(peer: Peer, code: str) -> None:
    peer.start("ask", code)
    peer.until_stopped()


@pytest.mark.parametrize("looker", ["reader.get_nowait().sum()", "fsck(path).items"])
def test_who_was_stopped_looking_at_an_item_lives_on_when_it_is_taken_and_evicted(
    disk: Path, looker: str
) -> None:
    path = disk / "spool"
    with Peer(path) as peer, SpoolWriter(path) as writer, SpoolReader(path) as reader:
        peer.run("reader = SpoolReader(path)")
        peer.run(STOP_IN_A_LOOK)
        writer.put(frame(20))
        stop_in(peer, f"int({looker})")
        read_all(reader)
        assert stat(path).free_files == 1
        with pytest.raises(Full):
            writer.put_nowait(frame(50))  # evicts it, though that does not help yet
        assert stat(path).free_files == 0
        writer.put_nowait(np.ones(1000, "u1"))
        peer.go()
        if looker.startswith("reader"):
            peer.until_stopped()  # the next item is now another, and it looks at that
            peer.go()
        assert peer.answer() >= 0
        peer.run("reader.close()")
        putting = Call(writer.put, frame(50))
        for _ in range(2 - looker.startswith("reader")):
            reader.get(timeout=20)  # and lets go of what is no more
        putting.result()
        assert fsck(path).clean


def test_who_crashed_looking_at_an_item_keeps_nothing(disk: Path) -> None:
    path = disk / "spool"
    with Peer(path) as peer, Peer(path) as idle, SpoolWriter(path) as writer, SpoolReader(path) as reader:
        idle.run("reader, writer = SpoolReader(path), SpoolWriter(path)")
        peer.run("reader = SpoolReader(path)")
        peer.run(STOP_IN_A_LOOK)
        writer.put(frame(20))
        stop_in(peer, "int(reader.get_nowait().sum())")
        peer.kill()
        idle.run("reader.get(); writer.put(np.ones(1000, 'u1')); reader.get()")
        writer.put_nowait(frame(60))
        read_all(reader)


def test_readers_and_writers_live_through_evictions_under_their_eyes(disk: Path) -> None:
    """Two readers look at the same items, and each put evicts what the one before left."""
    path, count = disk / "spool", 100
    read = """
def read():
    got = 0
    with SpoolReader(path) as reader:
        while True:
            try:
                array = reader.get(timeout=60)
            except ShutDown:
                return got
            assert (array == array[0]).all()
            got += 1
"""
    with Peer(path) as one, Peer(path) as other, SpoolWriter(path) as writer:
        for peer in (one, other):
            peer.run(read)
            peer.start("ask", "read()")
        for number in range(count):
            writer.put(np.full((7 if number % 2 else 19) * MIB, number % 251, "u1"), timeout=60)
        writer.shutdown()
        assert one.answer() + other.answer() == count
    assert fsck(path).clean
