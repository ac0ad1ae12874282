"""A fork at every place: whatever there is, whatever is under way, and whichever thread forks.

A spool is in use, with one of each that a process may hold: a writer, a reader, an item looked at and one that was not,
an array that was got, a loan, an iterator amid its items. In the midst of one more operation, before each of its
calls, the process forks twice. Each child tries to settle what it inherited, puts and gets; one keeps its arrays, one
drops everything; the parent goes on meanwhile and writes all files again that may be.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from support.account import check_spool
from support.faults import Event, Forked, Injector, at

import spoolipc
from spoolipc import AlreadySettled, Empty, LeaseExpired, SpoolReader, SpoolWriter

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of threads, from Python 3.12
SIZE: Final = 5000
CHILDS: Final = 1000.0
LONG: Final = 10
"""Bytes in which a child tells a number."""


def full_of(number: float) -> Any:
    return np.full(SIZE, number)


class Stage:
    """A process that holds one of each. put, got: the account of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer, self.reader = SpoolWriter(path), SpoolReader(path)
        self.put = [float(number) for number in range(12)]
        self.writer.put_many(map(full_of, self.put))
        self.view = self.reader.get()
        self.seen, self.unseen = self.reader.receive(), self.reader.receive()
        self.shown = self.seen.array
        self.iterator: Any = self.reader.items()
        self.third: Any = next(self.iterator)
        self.got = [0.0, 1.0, 2.0, 3.0]  # all of these will be settled
        self.loan: Any = self.writer.loan(SIZE)
        self.loan.array[:] = 12.0

    def take(self, array: Any) -> None:
        self.got.append(float(array[0]))

    def add(self, number: float) -> None:
        self.writer.put(full_of(number))
        self.put.append(number)

    def lend(self, number: float) -> None:
        with self.writer.loan(SIZE) as array:
            array[:] = number
        self.put.append(number)

    def receive(self) -> None:
        with self.reader.receive() as item:
            self.take(item.array)

    def commit(self) -> None:
        if self.loan is not None:
            self.loan.commit()
            self.put.append(12.0)
            self.loan = None

    def step_on(self) -> None:
        self.third = next(self.iterator)
        self.got.append(float(self.third.array[0]))

    def open(self) -> None:
        with SpoolWriter(self.path) as writer, SpoolReader(self.path) as reader:
            writer.put(full_of(50.0))
            self.put.append(50.0)
            self.take(reader.get())

    def settle(self) -> None:
        """All that is held."""
        self.seen.ack()
        self.unseen.ack()
        self.commit()
        self.third.ack()
        self.iterator.close()
        del self.view, self.shown

    def write_all_again(self) -> None:
        for number in range(30):
            self.add(-1.0 - number)
            self.take(self.reader.get())

    def rest(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                self.take(self.reader.get_nowait())


OPERATIONS: Final[dict[str, Callable[[Stage], object]]] = {
    "put": lambda stage: stage.add(40.0),
    "get": lambda stage: stage.take(stage.reader.get()),
    "receive and ack": Stage.receive,
    "nack": lambda stage: stage.reader.receive().nack(),
    "lend": lambda stage: stage.lend(41.0),
    "commit a loan": Stage.commit,
    "preallocate": lambda stage: SpoolWriter(stage.path, preallocate=(3, 400_000)).close(),
    "open": Stage.open,
    "iterate": Stage.step_on,
    "gc": lambda stage: spoolipc.gc(stage.path),
}
WAYS: Final = ("keeps", "drops")


def childs_part(stage: Stage, way: str, gate: int, told: int) -> None:
    """What the child does with what it inherited; it tells what it got."""
    for item in (stage.seen, stage.unseen, stage.third):
        with pytest.raises((LeaseExpired, AlreadySettled)):
            item.ack()
    if way == "drops":
        del stage.view, stage.shown, stage.seen, stage.unseen, stage.third, stage.iterator, stage.loan
        gc.collect()
    stage.writer.put(full_of(CHILDS))
    got = stage.reader.get(timeout=20)
    os.write(told, f"{got[0]:{LONG}}".encode())
    os.eventfd_read(gate)
    assert (got == got[0]).all()
    if way == "keeps":
        assert (stage.view == 0).all()
        assert (stage.shown == 1).all()
        assert (stage.seen.array == 1).all()
    stage.reader.close()
    stage.writer.close()


def forked_amid(path: Path, operation: str, number: int, threads: ThreadPoolExecutor | None) -> int:
    """Fork children before that call of an operation, in another thread if one is given; how many calls there were."""
    stage, gate = Stage(path), os.eventfd(0, os.EFD_SEMAPHORE)
    hear, told = os.pipe()
    children: list[Forked] = []
    forks: list[Future[None]] = []

    def fork(_: object = None) -> None:
        children.extend(Forked(partial(childs_part, stage, way, gate, told)) for way in WAYS)

    def act(event: Event) -> None:
        if threads is None:
            fork()
        else:
            forks.append(threads.submit(fork))
            with contextlib.suppress(TimeoutError):  # where a session is announced it waits for us
                forks[0].result(0.3)

    try:
        with Injector(at(number, act)) as injector:
            OPERATIONS[operation](stage)
        for done in forks:
            done.result(20)
        stage.settle()
        stage.write_all_again()
        os.eventfd_write(gate, len(children))
        for child in children:
            assert child.ended() == 0
            stage.put.append(CHILDS)
            stage.got.append(float(os.read(hear, LONG)))
        stage.rest()
        assert sorted(stage.got) == sorted(stage.put)
        stage.reader.close()
        stage.writer.close()
        spoolipc.gc(path)
        check_spool(path)
    finally:
        for fd in (gate, hear, told):
            os.close(fd)
    shutil.rmtree(path)
    return len(injector.met)


@pytest.fixture(params=["itself", "another"])
def threads(request: pytest.FixtureRequest) -> Iterator[ThreadPoolExecutor | None]:
    """The thread that forks, None for that which is in the operation."""
    if request.param == "itself":
        yield None
    else:
        with ThreadPoolExecutor(1) as threads:
            yield threads


@pytest.mark.parametrize(
    "operation",
    [pytest.param(name, marks=[] if name == "put" else pytest.mark.exhaustive) for name in OPERATIONS],
)
def test_forked_before_any_call(place: Path, operation: str, threads: ThreadPoolExecutor | None) -> None:
    calls = forked_amid(place / "spool", operation, 0, threads)
    assert calls
    for number in range(1, calls + 1):
        try:
            forked_amid(place / "spool", operation, number, threads)
        except BaseException as failure:
            failure.add_note(f"{operation}: forked before call {number} of {calls}")
            raise
