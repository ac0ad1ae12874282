"""Ctrl-C, wherever it comes, leaves objects that go on, a lock that is free, and loses and doubles nothing.

KeyboardInterrupt is raised before and after each call, and at each place in the package where Python delivers signals.
What was interrupted may have been done or not.
"""

from __future__ import annotations

import functools
import shutil
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.account import check_spool
from support.faults import Event, Injector, at, interrupt, interrupted_at
from support.peek import peek_table
from support.scenarios import CORE, SCENARIOS, Run

import spoolipc
from spoolipc import Empty, LockTimeout, SpoolReader, SpoolWriter, set_limits, stat
from spoolipc.directory import fs
from spoolipc.directory.lock import IndexLock
from spoolipc.directory.recycling import Recycler

PACKAGE = str(Path(spoolipc.__file__).parent)
ANYWHERE = (
    "put_small put_into_a_consumed_file put_again get_large get_again get_with_a_damaged_one_before"
    " receive_and_acknowledge nack_and_ack_the_second_attempt reject lend_and_commit close shutdown_immediately"
    " open_after_a_crash rebuild_a_deleted_index"
).split()

AFTER = [pytest.param(True, id="after"), pytest.param(False, id="before", marks=pytest.mark.exhaustive)]
"""An interrupt after a call comes before the next one as well, and loses what the call returned."""


@pytest.fixture(autouse=True)
def unraisable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What interrupts a finalizer is told to nobody."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


@pytest.mark.parametrize(
    ("name", "after", "step"),
    [
        *(pytest.param(name, True, 3, id=f"{name}-after-some") for name in CORE),
        *(
            pytest.param(
                name, after, 1, id=f"{name}-{'after' if after else 'before'}", marks=pytest.mark.exhaustive
            )
            for name, after in product(SCENARIOS, (True, False))
        ),
    ],
)
def test_interrupted_amid_an_operation(place: Path, name: str, after: bool, step: int) -> None:
    path = place / "spool"
    with Run(path, name) as run:
        met = run.with_fault()
    for number, call in [*enumerate(met, 1)][::step]:
        fault = at(number, interrupt)
        try:
            with Run(path, name) as run:
                if after:
                    run.with_fault(after=lambda event, _, fault=fault: fault(event))  # type: ignore[misc]
                elif call != "close":  # between the begin of a `finally` and a call in C comes no signal
                    run.with_fault(fault)
        except BaseException as failure:
            failure.add_note(f"{name}: call {number}, {call}")
            raise


@pytest.mark.parametrize("verify", [False, True], ids=["receive", "get verified"])
def test_interrupted_reader_leaves_nothing_in_flight(place: Path, verify: bool) -> None:
    path, number = place / "spool", 0
    while True:
        number += 1
        with SpoolWriter(path) as writer, SpoolReader(path, verify=verify) as reader:
            writer.put(np.zeros(5000))
            got, fault = None, at(number, interrupt)
            with Injector(after=lambda event, _, fault=fault: fault(event)) as injector:  # type: ignore[misc]
                with suppress(KeyboardInterrupt):
                    got = reader.get() if verify else reader.receive()
                calls = len(injector.met)
            if got is None:
                assert stat(path).in_flight == 0, f"interrupted after call {number}"
            del got
        shutil.rmtree(path)
        if number > calls:
            break
    assert number > 3


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def without_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gets the lock."""
    monkeypatch.setattr(fs, "lock", lambda *_, **options: False)
    monkeypatch.setattr(IndexLock, "take", functools.partialmethod(IndexLock.take, 0))


@pytest.mark.parametrize("how", ["interrupted", "without the lock"])
def test_file_that_a_failed_put_reserved_is_found_by_the_next(
    place: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path, array, other = place / "spool", np.zeros(5_000), np.zeros(50_000)

    def fail_to_put() -> None:
        with monkeypatch.context() as patch:
            if how == "interrupted":
                patch.setattr(Recycler, "reserved_at", interrupted)
            else:
                without_lock(patch)
            with pytest.raises((KeyboardInterrupt, LockTimeout)):
                writer.put(array)

    with SpoolWriter(path) as writer, SpoolReader(path) as reader, writer.loan(5_000) as lent:
        for _ in range(5):
            for _ in range(9):  # and some more files lie in the pool
                for _ in range(9):
                    writer.put(array)
                for _ in range(9):
                    reader.get()
            lent[0] = 1
            fail_to_put()
            writer.put(other)
            reader.get()
        # That which is lent, and those of the next puts
        assert len(peek_table(path).of("reserved")) <= 1 + 2
        lent[:] = 1
        fail_to_put()
    assert not peek_table(path).of("reserved")


def test_files_written_for_one_call_are_not_taken_for_those_of_a_failed_put(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [np.full(5_000, number) for number in range(3)]
    with SpoolWriter(place / "spool") as writer, SpoolReader(place / "spool") as reader:
        for _ in range(9):  # so that files enough go round
            writer.put_many(arrays)
            assert len(reader.get_many(3)) == 3
        with pytest.raises(Empty):
            reader.get(block=False)  # and all of them are in the pool
        monkeypatch.setattr(Recycler, "stock_up", lambda *_: None)  # each file is reserved when it is needed
        for count in (1, 2, 3):
            with monkeypatch.context() as patch:
                without_lock(patch)
                with pytest.raises(LockTimeout):
                    writer.put_many(arrays[:count])
            writer.put_many(arrays)
            for array, got in zip(arrays, reader.get_many(3), strict=True):
                assert (array == got).all()
            del got
            with pytest.raises(Empty):
                reader.get(block=False)


def puts(path: Path, way: str) -> int:
    """Put five items; how many."""
    size = 3 if way.startswith("small") else 5000
    durability: Any = "fsync" if way == "small and durable" else "none"
    with SpoolWriter(path, durability=durability, checksum=True) as writer:
        writer.put_many([np.full(size, number) for number in range(5)])
    return 5


WAYS = ["small", "large", "small and durable", "large and verified", "small and copied", "received again"]


def take(reader: SpoolReader, way: str) -> list[Any]:
    return reader.get_many(4, copy=way == "small and copied")


def rest(path: Path) -> list[float]:
    """The numbers of the items that are left, in the order in which they come."""
    found = []
    with SpoolReader(path) as reader, suppress(Empty):
        while True:
            found.append(float(np.ravel(reader.get_nowait())[0]))
    return found


def check_what_is_left(path: Path, reader: SpoolReader, taken: int, where: str) -> None:
    """All but the first `taken` are, in their order."""
    assert rest(path) == list(range(taken, 5)), where
    reader.close()
    check_spool(path)
    shutil.rmtree(path)


def open_to_take(path: Path, way: str) -> SpoolReader:
    count = puts(path, way)
    reader = SpoolReader(path, verify=way == "large and verified")
    if way == "received again":
        for item in [reader.receive() for _ in range(count)]:
            item.nack()
    return reader


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("after", AFTER)
def test_a_get_many_interrupted_at_any_call_leaves_every_item_for_the_next_get(
    place: Path, way: str, after: bool
) -> None:
    path, number, got = place / "spool", 0, list[Any]()
    while not got:
        number += 1
        reader, fault = open_to_take(path, way), at(number, interrupt)
        faults = {"after": lambda event, _, fault=fault: fault(event)} if after else {"before": fault}
        with Injector(**faults) as injector, suppress(KeyboardInterrupt):
            got = take(reader, way)
        check_what_is_left(path, reader, len(got), f"call {number}: {injector.met[number - 1 :]}")
    assert number > 10


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", WAYS)
def test_a_get_many_interrupted_wherever_a_signal_can_come_leaves_every_item(place: Path, way: str) -> None:
    path, number, got = place / "spool", 0, list[Any]()
    while not got:
        number += 1
        reader = open_to_take(path, way)
        with interrupted_at(number, PACKAGE), suppress(KeyboardInterrupt):
            got = take(reader, way)
        check_what_is_left(path, reader, len(got), f"place {number}")
    assert number > 100


def test_a_get_many_whose_arrays_cannot_all_be_copied_returns_those_that_can(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = place / "spool", list[Any]()

    def short(message: Any) -> Any:
        if len(made) == 2:
            raise MemoryError
        made.append(message)
        return message

    puts(path, "large")
    with SpoolReader(path) as reader:
        monkeypatch.setattr("spoolipc.queue.copied", short)
        assert len(reader.get_many(4, copy=True)) == 2
        with pytest.raises(MemoryError):
            reader.get_many(4, copy=True)
        made.clear()
        assert rest(path) == [2, 3, 4]


@pytest.mark.parametrize("way", ["small", "large", "large and verified"])
@pytest.mark.parametrize("recycle_bytes", [None, 0])
def test_an_item_whose_arrays_cannot_be_copied_waits_for_the_next_get(
    place: Path, monkeypatch: pytest.MonkeyPatch, way: str, recycle_bytes: int | None
) -> None:
    path = place / "spool"
    puts(path, way)
    set_limits(path, recycle_bytes=recycle_bytes)

    def short(message: Any) -> Any:
        raise MemoryError

    with SpoolReader(path, verify=way == "large and verified") as reader, monkeypatch.context() as patch:
        patch.setattr("spoolipc.format.item._copied", short)
        for _ in range(3):
            with pytest.raises(MemoryError):
                reader.get(copy=True)
        patch.undo()
        assert [float(reader.get_nowait(copy=True)[0]) for _ in range(5)] == list(range(5))
    check_spool(path)


def test_a_timeout_that_a_signal_handler_raises_passes_through_and_loses_nothing(place: Path) -> None:
    path, moved = place / "spool", list[Event]()

    def late(event: Event) -> None:
        if event.name == "rename":
            moved.append(event)
            if len(moved) == 3:
                raise TimeoutError("of a handler")

    puts(path, "large")
    with SpoolReader(path) as reader, Injector(late), pytest.raises(TimeoutError, match="of a handler"):
        reader.get_many(4)
    assert rest(path) == list(range(5))


def test_no_code_runs_as_arrays_and_items_go_that_would_swallow_an_interrupt(place: Path) -> None:
    path, calls = place / "spool", []
    puts(path, "large")
    with SpoolReader(path) as reader:
        held = [reader.get(), reader.receive(), reader.receive()]
        held.append(held[1].array)
        before = sys.getprofile()
        sys.setprofile(
            lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None
        )
        try:
            held.clear()
        finally:
            sys.setprofile(before)
        assert calls == []
        with pytest.warns(ResourceWarning):
            assert reader.qsize() == 4


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ANYWHERE)
def test_interrupted_wherever_a_signal_can_come(place: Path, name: str) -> None:
    path = place / "spool"
    with Run(path, name) as run:
        count = run.traced(lambda: interrupted_at(0, PACKAGE))
    for number in range(1, count + 1):
        try:
            with Run(path, name) as run:
                run.traced(lambda n=number: interrupted_at(n, PACKAGE))  # type: ignore[misc]
        except BaseException as failure:
            failure.add_note(f"{name}: interrupted at place {number}")
            raise
