"""A lent array is the very memory that readers will see: put without a copy, or not put at all."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from audit import audit
from support.peer import Peer

from spoolipc import (
    Empty,
    Full,
    ShutDown,
    SpoolReader,
    SpoolWriter,
    TooLarge,
    UnsupportedArray,
)
from spoolipc import words as W
from spoolipc.npy import Array

LARGE = 5000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def writer(path: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(path) as writer:
        yield writer
        audit(writer._sink.party)


@pytest.fixture
def reader(path: Path) -> Iterator[SpoolReader]:
    with SpoolReader(path) as reader:
        yield reader


def inode_of(array: Array) -> int:
    """The inode of the file whose mapping an array lies in, as the kernel says."""
    address = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return int(inode)
    raise AssertionError("the array is in no mapping")


def inodes(path: Path, part: str) -> list[int]:
    return [file.stat().st_ino for file in (path / part).iterdir()]


def reserved(writer: SpoolWriter) -> int:
    """Consumed files that some writer has in its hands."""
    words = writer._sink.party.look()
    return sum(words[record + W.STATE] == W.RESERVED for record in range(W.HEADER, words[W.EDGE], W.RECORD))


def lend(writer: SpoolWriter, value: float, size: int = LARGE) -> int:
    """Put by a loan; returns the inode of its memory."""
    with writer.loan(size) as array:
        array[:] = value
        return inode_of(array)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), 0, 3, (3, 0), (40, 50, 3), LARGE], ids=str)
@pytest.mark.parametrize("dtype", ["f8", "u1", ">c8", "M8[us]", "S5", [("a", "i1"), ("b", "f8")]], ids=str)
def test_what_was_filled_in_is_what_readers_get(
    writer: SpoolWriter, reader: SpoolReader, order: str, shape: int | tuple[int, ...], dtype: object
) -> None:
    expected = np.full(shape, np.ones((), dtype), dtype, order)  # type: ignore[call-overload]
    for _ in range(3):
        with writer.loan(shape, dtype, order=order, meta={"m": 1}) as array:  # type: ignore[arg-type]
            assert array.shape == expected.shape
            assert array.dtype == expected.dtype
            assert array.flags.fnc == expected.flags.fnc
            assert array.flags.writeable
            array[...] = expected
        with reader.receive(block=False) as item:
            assert item.meta == {"m": 1}
            assert item.array.dtype == expected.dtype
            assert item.array.flags.fnc == expected.flags.fnc
            assert (item.array == expected).all()


@pytest.mark.parametrize("durability", ["none", "fsync"])
def test_nothing_is_copied_the_item_is_the_file_that_was_filled(
    path: Path, reader: SpoolReader, durability: str
) -> None:
    with SpoolWriter(path, durability=durability) as writer:  # type: ignore[arg-type]
        for number in range(5):
            memory = lend(writer, number)
            assert inodes(path, "items") == [memory]
            found = reader.get()
            assert (found == number).all()
            assert inode_of(found) == memory
            del found


def test_item_file_is_plain_npy(writer: SpoolWriter, path: Path) -> None:
    with writer.loan((30, 40), ">f4", order="F", meta="m") as array:
        array[:] = np.arange(1200).reshape(30, 40)
    (file,) = (path / "items").iterdir()
    found = np.load(file, allow_pickle=False)
    assert found.flags.f_contiguous
    assert found.dtype == ">f4"
    assert (found == np.arange(1200).reshape(30, 40)).all()


def test_item_is_seen_at_the_end_of_the_block_and_not_before(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    with writer.loan(LARGE) as array:
        array[:] = 1
        with pytest.raises(Empty):
            reader.get_nowait()
    assert (reader.get_nowait() == 1).all()


@pytest.mark.parametrize("warm", [False, True], ids=["new file", "consumed file"])
@pytest.mark.parametrize("error", [RuntimeError("no luck"), KeyboardInterrupt()], ids=repr)
def test_exception_discards_it_and_leaves_nothing(
    writer: SpoolWriter, reader: SpoolReader, path: Path, warm: bool, error: BaseException
) -> None:
    if warm:
        for _ in range(4):
            writer.put(np.zeros(LARGE))
            reader.get()
    held = reserved(writer)
    with pytest.raises(type(error)) as raised, writer.loan(LARGE):
        raise error
    assert raised.value is error
    assert writer.empty()
    assert list((path / "tmp").iterdir()) == []
    assert reserved(writer) <= held
    lend(writer, 2)
    assert (reader.get() == 2).all()


def test_array_kept_after_an_exception_is_nobody_elses_memory(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    for _ in range(4):
        writer.put(np.zeros(LARGE))
        reader.get()
    kept: list[Array] = []

    def failing() -> None:
        with writer.loan(LARGE) as array:
            kept.append(array)
            raise RuntimeError

    for _ in range(3):
        with pytest.raises(RuntimeError):
            failing()
    for number in range(6):
        writer.put(np.full(LARGE, number))
        kept[number % 3][:] = -1
        assert (reader.get() == number).all()


def test_array_is_read_only_after_the_block(writer: SpoolWriter) -> None:
    with writer.loan(LARGE) as array:
        array[:] = 1
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2
    with pytest.raises(ValueError, match="read-only"):
        array[1:][0] = 2


@pytest.mark.parametrize("how", ["get", "receive"])
def test_array_kept_keeps_its_file_from_being_written_again(
    writer: SpoolWriter, reader: SpoolReader, how: str
) -> None:
    kept: list[Array] = []
    memory = []
    for number in range(4):
        with writer.loan(LARGE) as array:
            array[:] = number
        memory.append(inode_of(array))
        kept.append(array[10:20])
        del array
        if how == "get":
            reader.get()
        else:
            reader.receive().ack()
    assert len(set(memory)) == 4
    for _ in range(20):
        assert lend(writer, -1) not in memory
        reader.get()
    assert [set(view) for view in kept] == [{0.0}, {1.0}, {2.0}, {3.0}]
    kept.clear()
    gc.collect()
    again = set()
    for _ in range(20):
        again.add(lend(writer, -1))
        reader.get()
    assert again & set(memory)


def test_steady_loans_go_round_in_a_few_files(writer: SpoolWriter, reader: SpoolReader) -> None:
    used = set()
    for number in range(50):
        used.add(lend(writer, number))
        assert (reader.get() == number).all()
    assert len(used) <= 4


def test_index_lost_during_the_loan_costs_nothing(
    writer: SpoolWriter, reader: SpoolReader, path: Path
) -> None:
    for number in range(6):
        with writer.loan(LARGE, meta=number) as array:
            array[:] = number
            (path / "index").unlink()
            assert reader.empty()  # whoever looks builds it again, without the file that is lent
        with reader.receive(block=False) as item:
            assert item.meta == number
            assert (item.array == number).all()
        assert (array == number).all()


def test_file_removed_during_the_loan_costs_a_copy(path: Path, reader: SpoolReader) -> None:
    writer = SpoolWriter(path)
    for number in range(4):
        with writer.loan(LARGE) as array:
            array[:] = number
            for part in ("tmp", "free"):
                for file in (path / part).iterdir():
                    file.unlink()
        assert (reader.get_nowait() == number).all()
    writer.close()


def test_loan_waits_for_room_when_it_begins(path: Path, reader: SpoolReader) -> None:
    with SpoolWriter(path, maxsize=1) as writer:
        writer.put(np.zeros(3))
        for block, timeout in ((False, None), (True, 0.01), (True, 0.0)):
            with pytest.raises(Full), writer.loan(3, block=block, timeout=timeout):
                pytest.fail("the loan was given")
        with ThreadPoolExecutor(1) as aside:
            future = aside.submit(lend, writer, 5, 9000)
            assert reader.get()[0] == 0
            future.result(10)
        assert reader.get()[0] == 5


def test_loan_waits_for_room_when_it_ends(path: Path, reader: SpoolReader) -> None:
    with SpoolWriter(path, maxsize=1) as writer, SpoolWriter(path) as other:
        filled = threading.Event()

        def lending() -> None:
            with writer.loan(LARGE) as array:
                array[:] = 5
                other.put(np.zeros(3))
                filled.set()

        with ThreadPoolExecutor(1) as aside:
            future = aside.submit(lending)
            assert filled.wait(10)
            assert reader.get(timeout=10)[0] == 0
            future.result(10)
        assert reader.get_nowait()[0] == 5


def test_loan_is_refused_where_a_put_would_be(path: Path) -> None:
    with SpoolWriter(path, max_bytes=100_000) as writer:
        with pytest.raises(TooLarge), writer.loan(100_000):
            pytest.fail("the loan was given")
        with pytest.raises(UnsupportedArray), writer.loan(3, object):
            pytest.fail("the loan was given")
        with pytest.raises(ValueError, match="negative"), writer.loan(-1):
            pytest.fail("the loan was given")
        writer.shutdown()
        with pytest.raises(ShutDown), writer.loan(3):
            pytest.fail("the loan was given")
        assert list((path / "tmp").iterdir()) == []


def test_shutdown_during_the_loan_discards_it(writer: SpoolWriter, path: Path) -> None:
    with pytest.raises(ShutDown), writer.loan(LARGE):
        writer.shutdown()
    assert list((path / "items").iterdir()) == []
    assert list((path / "tmp").iterdir()) == []


def test_writer_killed_during_the_loan_leaves_nothing(path: Path, reader: SpoolReader) -> None:
    with Peer(path) as peer:
        peer.run(
            "writer = SpoolWriter(path); loan = writer.loan(5000); array = loan.__enter__(); array[:] = 1"
        )
        assert len(list((path / "tmp").iterdir())) == 1
        peer.kill()
    with SpoolWriter(path) as writer:
        assert list((path / "tmp").iterdir()) == []
        assert writer.empty()


def test_writer_gone_with_its_array_leaves_no_file_behind(path: Path, reader: SpoolReader) -> None:
    with SpoolWriter(path) as writer:
        with writer.loan(LARGE) as array:
            array[:] = 1
        reader.get()
    assert reader.empty()
    with pytest.raises(Empty):
        reader.get(block=False)  # passes the file on to its lender, who is gone
    with SpoolReader(path):
        assert list((path / "free").iterdir()) == []
    assert (array == 1).all()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_during_the_loan_keeps_the_file_from_being_written_again(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    """The child has the array too, and may look at it, or even write to it, for ever."""
    for _ in range(4):
        lend(writer, 0)
        reader.get()
    awake, go_on = os.pipe()
    with writer.loan(LARGE) as array:
        array[:] = 1
        memory = inode_of(array)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os.read(awake, 1)
            os._exit(0 if (array == 1).all() else 1)
    del array
    reader.get()
    for _ in range(10):
        assert lend(writer, 2) != memory
        reader.get()
    os.write(go_on, b"!")
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    os.close(awake)
    os.close(go_on)


def test_threads_may_lend_at_once(writer: SpoolWriter, reader: SpoolReader) -> None:
    def several(first: int) -> None:
        for number in range(first, first + 30):
            with writer.loan(LARGE) as array:
                array[:] = number
                time.sleep(0)  # let another thread in
                assert (array == number).all()

    seen: list[int] = []
    with ThreadPoolExecutor(4) as aside:
        futures = [aside.submit(several, first) for first in (0, 100, 200, 300)]
        while len(seen) < 120:
            array = reader.get(timeout=10)
            assert (array == array[0]).all()
            seen.append(int(array[0]))
        for future in futures:
            future.result(10)
    assert sorted(seen) == [first + number for first in (0, 100, 200, 300) for number in range(30)]


def test_two_loans_of_one_writer_at_once_are_two_items(writer: SpoolWriter, reader: SpoolReader) -> None:
    for _ in range(4):
        with writer.loan(LARGE) as one, writer.loan(LARGE) as two:
            one[:] = 1
            two[:] = 2
        assert [reader.get()[0], reader.get()[0]] == [2, 1]


def test_block_left_early_commits(writer: SpoolWriter, reader: SpoolReader) -> None:
    """Leaving by break, continue or return is no exception."""
    for _ in range(2):
        with contextlib.suppress(Empty), writer.loan(3) as array:
            array[:] = 4
            continue
    assert reader.qsize() == 2
