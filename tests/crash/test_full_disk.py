"""A full file system is back-pressure or a clear error: nothing torn, nothing lost, no SIGBUS, and it goes on."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.account import check_spool
from support.mounts import ext4, tmpfs
from support.peek import peek_table
from support.waits import until, until_asleep

from spoolipc import Empty, Full, ShutDown, SpoolReader, SpoolWriter, StorageError, failed_list, fsck

FORK = multiprocessing.get_context("fork")
MIB = 1 << 20
LARGEST = 1_300_000
WRITERS = 3
ROUNDS = 40

pytestmark = pytest.mark.fault


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "disk"
    with tmpfs(place, "8m") if request.param == "tmpfs" else ext4(place, 16 * MIB):
        yield place


def array_of(writer: int, count: int) -> np.ndarray[Any, Any]:
    """The array that a writer puts as its `count`th: its size, and every element of it, follow from these."""
    sizes = (100, 9_000, 70_000, 150_000)
    array = np.full(sizes[(writer + count) % len(sizes)], writer * 1000 + count, np.int64)
    array[0] = writer
    return array


def write(path: str, writer: int) -> None:
    with SpoolWriter(path) as sink:
        for count in range(ROUNDS):
            array = array_of(writer, count)
            if count % 4 == 3:
                with sink.loan(array.shape, array.dtype) as lent:
                    lent[:] = array
            else:
                sink.put(array)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill a file system with a foreign file, but for `leave` bytes."""
    file = disk / "foreign"
    with open(file, "wb", buffering=0) as out:
        size = 64 * 1024
        while size:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            if free <= leave:
                break
            try:
                out.write(bytes(min(size, free - leave)))
            except OSError:
                size //= 2
    return file


def put_all(writer: SpoolWriter) -> int:
    """Put until it is full; returns how many were put."""
    for put in itertools.count():
        try:
            writer.put_nowait(array_of(put % 4, put))
        except Full:
            break
    assert put
    return put


def sound(path: Path) -> None:
    """Nothing damaged, nothing dead-lettered, nothing half written."""
    check_spool(path)
    assert failed_list(path) == []
    assert os.listdir(path / "tmp") == []


def test_writers_on_a_full_disk_wait_for_a_slow_reader_and_nothing_is_torn_or_lost(disk: Path) -> None:
    path = disk / "spool"
    with SpoolReader(path) as reader:
        writers = [
            FORK.Process(target=write, args=(str(path), writer), daemon=True) for writer in range(WRITERS)
        ]
        for process in writers:
            process.start()
        seen: dict[int, int] = dict.fromkeys(range(WRITERS), 0)
        fulls = 0
        while sum(seen.values()) < WRITERS * ROUNDS:
            if sum(seen.values()) % 10 == 0:
                # Slow: let the writers run against the wall.
                until(
                    lambda: (
                        os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize < LARGEST
                        or not any(process.is_alive() for process in writers)
                    )
                )
                fulls += any(process.is_alive() for process in writers)
            array = reader.get(timeout=20)
            writer = int(array[0])
            assert np.array_equal(array, array_of(writer, seen[writer]))
            seen[writer] += 1
        for process in writers:
            process.join(20)
            assert process.exitcode == 0
        assert fulls, "the disk was never full"
        with pytest.raises(Empty):
            reader.get_nowait()
        del array
    sound(path)


def test_put_nowait_on_a_full_disk_raises_full_and_leaves_nothing(disk: Path) -> None:
    path = disk / "spool"
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        put = put_all(writer)
        for block in (100, 9_000, 70_000):
            fill(disk)
            with pytest.raises(Full):
                writer.put_nowait(np.ones(block))
            with pytest.raises(Full):
                writer.put(np.ones(block), timeout=0)
            with pytest.raises(Full), writer.loan(block, block=False):
                raise AssertionError("there is no room")
        assert os.listdir(path / "tmp") == []
        for count in range(put):
            assert np.array_equal(reader.get_nowait(), array_of(count % 4, count))
    (disk / "foreign").unlink()
    sound(path)


def test_put_that_waits_goes_on_when_a_foreign_file_is_removed(disk: Path) -> None:
    path = disk / "spool"
    with SpoolWriter(path) as writer, SpoolReader(path) as reader, ThreadPoolExecutor(1) as aside:
        thread, got = aside.submit(threading.get_native_id).result(), []
        for array in (array_of(1, 1), array_of(0, 0)):
            file = fill(disk)
            waiting = aside.submit(writer.put, array)
            until_asleep(os.getpid(), thread)
            assert not waiting.done()
            file.unlink()
            waiting.result(20)
            got.append(reader.get_nowait())  # shown, so that its file does not give way
            assert np.array_equal(got[-1], array)
    sound(path)


def test_index_that_cannot_grow_is_full_and_the_items_stay(disk: Path) -> None:
    path = disk / "spool"
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        records = peek_table(path).counts["capacity"]
        writer.put_many([np.array([count]) for count in range(records)])
        file = fill(disk, 12_000)  # room for the item, not for the index
        with pytest.raises(Full):
            writer.put_nowait(np.array([records]))
        assert writer.qsize() == records
        assert peek_table(path).counts["capacity"] == records
        file.unlink()
        writer.put(np.array([records]), timeout=20)
        assert [int(reader.get_nowait()[0]) for _ in range(records + 1)] == list(range(records + 1))
    sound(path)


def test_spool_that_cannot_be_made_on_a_full_disk_is_a_clear_error_and_is_made_later(disk: Path) -> None:
    file = fill(disk)
    with pytest.raises((StorageError, Full)) as caught:
        SpoolWriter(disk / "spool")
    assert str(disk / "spool") in str(caught.value)
    file.unlink()
    with SpoolWriter(disk / "spool") as writer:
        writer.put(np.zeros(3))
    sound(disk / "spool")


def test_readers_receive_and_requeue_on_a_full_disk(disk: Path) -> None:
    path = disk / "spool"
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.put_many([array_of(0, count) for count in range(4)])
        fill(disk)
        reader.receive().nack(reason="the disk is full")
        with SpoolReader(path) as other:
            item = other.receive()
            assert item.attempt == 2
            assert np.array_equal(item.array, array_of(0, 0))
            item.ack()
            del item
        for count in range(1, 4):
            assert np.array_equal(reader.get_nowait(), array_of(0, count))
        (disk / "foreign").unlink()
    assert fsck(path).clean


def test_a_spool_is_shut_down_and_reopened_on_a_full_disk(disk: Path) -> None:
    path = disk / "spool"
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.put(array_of(0, 0))
        fill(disk)
        writer.shutdown()
        assert [len(array) for array in reader] == [len(array_of(0, 0))]
        (path / "index").unlink()  # the one that is built again goes by the marker
        (disk / "foreign").unlink()
        with SpoolReader(path) as other, pytest.raises(ShutDown):
            other.get_nowait()
        SpoolWriter(path, reopen=True).close()
    sound(path)
