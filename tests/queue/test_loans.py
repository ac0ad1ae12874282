"""A lent array is the very memory that readers will see: put without a copy, or not put at all."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.arrays import Array, inode_of, same
from support.calls import Call
from support.faults import Event, Injector
from support.peek import peek_table

from spoolipc import AlreadySettled, Empty, Full, Loan, ShutDown, SpoolReader, SpoolWriter, StorageError
from spoolipc.memory import clear

LARGE = 5000


def files(spool: Path, part: str) -> list[Path]:
    return list((spool / part).iterdir())


def lend(writer: SpoolWriter, value: float, size: int = LARGE) -> int:
    """Put by a loan; returns the inode of its memory."""
    with writer.loan(size) as array:
        array[:] = value
        return inode_of(array)


@pytest.fixture
def warm(writer: SpoolWriter, reader: SpoolReader) -> None:
    """Have consumed files go round."""
    for _ in range(4):
        writer.put(np.zeros(LARGE))
        reader.get()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (3, 0), (40, 50, 3)], ids=str)
@pytest.mark.parametrize("dtype", [">c8", [("a", "i1"), ("b", "f8")]], ids=str)
def test_what_was_filled_in_is_what_readers_get(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, order: Any, shape: Any, dtype: Any
) -> None:
    expected = np.full(shape, np.ones((), dtype), dtype, order)
    for _ in range(3):
        with writer.loan(shape, dtype, order=order, meta={"m": 1}) as array:
            assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
            assert array.flags.fnc == expected.flags.fnc
            assert array.flags.writeable
            array[...] = expected
        same(np.load(files(spool, "items")[0], allow_pickle=False), expected)
        with reader.receive(block=False) as item:
            assert item.meta == {"m": 1}
            same(item.array, expected)


@pytest.mark.parametrize("durability", ["none", "fsync"])
def test_nothing_is_copied_the_item_is_the_file_that_was_filled(
    spool: Path, reader: SpoolReader, durability: Any
) -> None:
    with SpoolWriter(spool, durability=durability) as writer:
        for number in range(5):
            memory = lend(writer, number)
            assert [file.stat().st_ino for file in files(spool, "items")] == [memory]
            found = reader.get()
            assert (found == number).all()
            assert inode_of(found) == memory
            del found


@pytest.mark.parametrize("consumed", [False, True], ids=["new file", "consumed file"])
@pytest.mark.parametrize("error", [RuntimeError("no luck"), KeyboardInterrupt()], ids=repr)
def test_exception_discards_it_and_leaves_nothing(
    writer: SpoolWriter,
    reader: SpoolReader,
    spool: Path,
    request: pytest.FixtureRequest,
    consumed: bool,
    error: BaseException,
) -> None:
    if consumed:
        request.getfixturevalue("warm")
    reserved = len(peek_table(spool).of("reserved"))
    with pytest.raises(type(error)) as raised, writer.loan(LARGE):
        raise error
    assert raised.value is error
    assert writer.empty()
    assert files(spool, "tmp") == []
    assert len(peek_table(spool).of("reserved")) <= reserved
    lend(writer, 2)
    assert (reader.get() == 2).all()


@pytest.mark.usefixtures("warm")
def test_array_kept_after_an_exception_is_nobody_elses_memory(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    kept: list[Array] = []
    for _ in range(3):
        with contextlib.suppress(ZeroDivisionError), writer.loan(LARGE) as array:
            kept.append(array)
            array[0] = 1 // 0
    for number in range(6):
        writer.put(np.full(LARGE, number))
        kept[number % 3][:] = -1
        assert (reader.get() == number).all()


@pytest.mark.parametrize("consumed", [False, True], ids=["new file", "consumed file"])
def test_loan_that_is_dropped_is_discarded_by_the_next_loan_with_a_warning(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, request: pytest.FixtureRequest, consumed: bool
) -> None:
    if consumed:
        request.getfixturevalue("warm")
    array = writer.loan(LARGE).array
    with pytest.warns(ResourceWarning, match="neither committed nor discarded"):
        writer.loan(3).discard()
    assert files(spool, "tmp") == []
    for number in range(6):
        writer.put(np.full(LARGE, number))
        array[:] = -1
        assert (reader.get() == number).all()


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


def test_table_lost_during_the_loan_costs_nothing(
    writer: SpoolWriter, reader: SpoolReader, spool: Path
) -> None:
    for number in range(6):
        with writer.loan(LARGE, meta=number) as array:
            array[:] = number
            (spool / "index").unlink()
            with pytest.raises(Empty):  # whoever looks builds it again, without the file that is lent
                reader.get_nowait()
        with reader.receive(block=False) as item:
            assert item.meta == number
            assert (item.array == number).all()
        assert (array == number).all()


def test_file_removed_during_the_loan_costs_a_copy(spool: Path, reader: SpoolReader) -> None:
    with SpoolWriter(spool) as writer:
        for number in range(4):
            with writer.loan(LARGE) as array:
                array[:] = number
                memory = inode_of(array)
                (file,) = [
                    file
                    for file in files(spool, "tmp") + files(spool, "free")
                    if file.stat().st_ino == memory
                ]
                file.unlink()
            assert (reader.get_nowait() == number).all()


def test_loan_waits_for_room_when_it_begins(spool: Path, reader: SpoolReader) -> None:
    with SpoolWriter(spool, maxsize=1) as writer:
        writer.put(np.zeros(3))
        for block, timeout in ((False, None), (True, 0.01), (True, 0.0)):
            with pytest.raises(Full), writer.loan(3, block=block, timeout=timeout):
                pytest.fail("the loan was given")
        lending = Call(lend, writer, 5, 9000)
        lending.until_asleep()
        assert reader.get()[0] == 0
        lending.result()
        assert reader.get()[0] == 5


@pytest.fixture(params=["directory", "memory"])
def full(request: pytest.FixtureRequest, spool: Path) -> Iterator[tuple[SpoolWriter, Loan, SpoolReader]]:
    """A writer and its loan, for which there is no room now, and the reader that can make some."""
    path = spool if request.param == "directory" else "memory://full"
    with SpoolWriter(path, maxsize=1) as writer, SpoolReader(path) as reader:
        loan = writer.loan(LARGE)
        loan.array[:] = 1
        writer.put(np.zeros(3))
        yield writer, loan, reader
    clear("full")


def test_of_two_threads_that_commit_a_loan_the_later_is_told_that_it_is_committed(
    full: tuple[SpoolWriter, Loan, SpoolReader],
) -> None:
    _, loan, reader = full
    first = Call(loan.commit)
    first.until_asleep()
    later = Call(loan.commit)
    later.until_asleep_or_done()
    assert (reader.get(timeout=30) == 0).all()
    assert (reader.get(timeout=30) == 1).all()
    assert first.result() == 2
    assert isinstance(later.error(), AlreadySettled)
    assert reader.empty()


@pytest.mark.parametrize("fails", [False, True])
def test_discard_while_another_thread_commits_is_for_the_case_that_this_fails(
    full: tuple[SpoolWriter, Loan, SpoolReader], fails: bool
) -> None:
    writer, loan, reader = full
    commit = Call(loan.commit)
    commit.until_asleep()
    loan.discard()
    if fails:
        writer.shutdown()
        assert isinstance(commit.error(), ShutDown)
    assert (reader.get(timeout=30) == 0).all()
    if not fails:
        assert commit.result() == 2
        assert (reader.get(timeout=30) == 1).all()
    with pytest.raises(AlreadySettled):
        loan.commit(block=False)
    assert reader.empty()


def test_writer_gone_with_its_array_leaves_no_file_behind(spool: Path, reader: SpoolReader) -> None:
    with SpoolWriter(spool) as writer:
        with writer.loan(LARGE) as array:
            array[:] = 1
        reader.get()
    with pytest.raises(Empty):
        reader.get(block=False)  # passes the file on to its lender, who is gone
    with SpoolReader(spool):
        assert files(spool, "free") == []
    assert (array == 1).all()


@pytest.mark.usefixtures("warm")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_during_the_loan_keeps_the_file_from_being_written_again(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    """The child has the array too, and may look at it, or even write to it, for ever."""
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


def test_array_stays_read_only_after_its_block(writer: SpoolWriter, reader: SpoolReader) -> None:
    """So does its base; what is a view of it already, numpy lets nobody change."""
    for number in range(3):
        with writer.loan(LARGE) as array:
            array[:] = number
        base = array.base
        assert base is not None
        for one in (array, base, array[5:], base.view("f8")):
            assert not one.flags.writeable
            with pytest.raises(ValueError, match="WRITEABLE"):
                one.setflags(write=True)
        assert (reader.get() == number).all()


def test_loan_that_was_put_and_may_not_be_durable_is_put_once(spool: Path, reader: SpoolReader) -> None:
    def sync(event: Event) -> None:
        if event.name == "sync" and files(spool, "items"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with SpoolWriter(spool, durability="fsync") as writer:
        loan = writer.loan(LARGE)
        array = loan.array
        array[:] = 1
        with pytest.raises(StorageError, match=r"items 1 to 1 .*durable") as caught, Injector(sync):
            loan.commit()
        assert caught.value.seqs == (1,)
        for one in (array, array.base):
            with pytest.raises(ValueError, match="WRITEABLE"):
                one.setflags(write=True)  # type: ignore[union-attr]
        with pytest.raises(AlreadySettled):
            loan.commit()
        loan.discard()
    assert (reader.get() == 1).all()
    assert reader.empty()


@pytest.mark.usefixtures("warm")
def test_base_kept_alone_keeps_its_file_from_being_written_again(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    with writer.loan(LARGE) as array:
        array[:] = 7
        kept = array.base
        del array
    assert kept is not None
    before = kept.tobytes()
    reader.get()
    for number in range(20):
        lend(writer, number)
        reader.get()
    assert kept.tobytes() == before
