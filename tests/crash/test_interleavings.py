"""Whatever another process does between two calls of an operation, nothing is lost, nothing is delivered twice.

Of every pair of operations: one process is stopped before each of its system calls, and another, which has the spool
open as well, does the second operation whole; unless the lock keeps it out, as it would wait then. The first goes on,
both use what they have once more, and the account of what was put and what was delivered must be exact.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest
from support.account import check_spool
from support.faults import Event, Injector, forked
from support.scenarios import arrays, value_of
from support.waits import is_locked

import spoolipc
from spoolipc import Empty, Item, LeaseExpired, ShutDown, SpoolReader, SpoolWriter
from spoolipc.directory import layout

GONE_ON: Final = (Empty, ShutDown, LeaseExpired)
"""What an operation may say when the other came first; of a lost index too: the item is then delivered again."""


class Side:
    """What one process does with a spool: its sessions, an item in flight, and the account of what it put and got."""

    def __init__(self, path: Path, first: int) -> None:
        self.path = path
        self.writer, self.reader = SpoolWriter(path), SpoolReader(path)
        self.put: list[int] = []
        self.got: list[int] = []
        self.shown: list[tuple[int, Any]] = []
        self.values = itertools.count(first)
        self.item: Item | None = None
        self.met: list[str] = []  # the calls so far, where they are counted
        self.passed: set[int] = set()  # the numbers of those before which nobody acts

    def add(self, *kinds: str, writer: SpoolWriter | None = None) -> None:
        for kind, value in zip(kinds, self.values, strict=False):
            with suppress(ShutDown):
                (writer or self.writer).put(arrays(value, kind), block=False)
                self.put.append(value)

    def add_many(self) -> None:
        values = list(itertools.islice(self.values, 4))
        batch = [arrays(value, kind) for value, kind in zip(values, ("small", "large") * 2, strict=True)]
        try:
            seqs = self.writer.put_many(batch, block=False)
        except ShutDown as error:
            seqs = list(error.seqs)
        self.put += values[: len(seqs)]

    def lend(self) -> None:
        value = next(self.values)
        with suppress(ShutDown):
            with self.writer.loan((100, 80), "f8", block=False) as array:
                array[...] = value
            self.put.append(value)

    def show(self, *found: Any) -> None:
        """What was got is whole, and kept."""
        self.shown += [(value_of(array), array) for array in found]

    def take(self, *limits: int, reader: SpoolReader | None = None) -> None:
        """Get one for each limit of 0, and many for any other."""
        reader = reader or self.reader
        for limit in limits:
            with suppress(*GONE_ON):
                found = reader.get_many(limit, block=False) if limit else [reader.get_nowait()]
                self.show(*found)
                self.got += map(value_of, found)

    def receive(self) -> None:
        with suppress(*GONE_ON):
            self.item = self.reader.receive(block=False)
            self.show(self.item.array)

    def ack(self) -> None:
        assert self.item is not None
        with suppress(*GONE_ON):
            self.item.ack()
            self.got.append(value_of(self.item.array))

    def nack(self) -> None:
        assert self.item is not None
        with suppress(*GONE_ON):
            self.item.nack()

    def peek(self) -> None:
        with suppress(*GONE_ON):
            self.reader.peek(block=False)

    def open(self) -> None:
        with SpoolWriter(self.path) as writer, SpoolReader(self.path) as reader:
            self.add("large", writer=writer)
            self.take(0, reader=reader)
            self.add("small", writer=writer)

    def close(self) -> None:
        self.reader.close()
        self.writer.close()

    def fork(self) -> None:
        """A child puts and gets with what it inherited; its calls count as those of this process."""
        ours, theirs = Pipe()

        def both() -> None:
            self.add("large")
            self.take(0)

        def work() -> None:
            both()
            theirs.send((self.put, self.got, next(self.values), self.met, self.passed))

        assert forked(work) == 0
        self.put, self.got, value, met, passed = ours.recv()
        self.values = itertools.count(value)
        self.passed |= passed
        self.met.extend(met[len(self.met) :])
        both()

    def lose_the_index(self) -> None:
        with suppress(FileNotFoundError):
            (self.path / "index").unlink()
        SpoolReader(self.path).close()

    def end(self) -> tuple[list[int], list[int]]:
        """Go on, and close; returns what was put and got."""
        with suppress(spoolipc.SpoolClosed):
            for kind in ("small", "large"):
                self.add(kind)
                self.take(0)
        self.close()
        for value, array in self.shown:
            assert value_of(array) == value
        return self.put, self.got


OPERATIONS: Final[dict[str, Callable[[Side], object]]] = {
    "put": lambda side: side.add("small", "large"),
    "put_many": Side.add_many,
    "loan": Side.lend,
    "get": lambda side: side.take(0, 0),
    "get_many": lambda side: side.take(3),
    "receive": Side.receive,
    "ack": Side.ack,
    "nack": Side.nack,
    "peek": Side.peek,
    "gc": lambda side: spoolipc.gc(side.path),
    "fsck": lambda side: spoolipc.fsck(side.path, repair=True),
    "open": Side.open,
    "close": Side.close,
    "shutdown": lambda side: side.writer.shutdown(),
    "fork": Side.fork,
}
OTHERS: Final = OPERATIONS | {"lose_the_index": Side.lose_the_index}


class Other:
    """The other process: a server, warm since the test began."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        self._pid = os.fork()
        if not self._pid:
            self._pipe.close()
            try:
                _serve(theirs)
            finally:
                os._exit(1)
        theirs.close()

    def ask(self, *asked: Any) -> Any:
        """Have it begin, do an operation, or end."""
        self._pipe.send(asked)
        error, answer = self._pipe.recv()
        assert not error, error
        return answer

    def close(self) -> None:
        self._pipe.close()
        os.waitpid(self._pid, 0)


def _serve(pipe: Connection) -> None:
    side: Any = None
    while True:
        name, *args = pipe.recv()
        try:
            answer = None
            if name == "begin":
                side = Side(*args)
                side.receive()
            elif name == "end":
                answer, side = side.end(), None
            else:
                OTHERS[name](side)
            pipe.send(("", answer))
        except Exception:
            pipe.send((traceback.format_exc(), None))


@pytest.fixture
def other() -> Iterator[Other]:
    with closing(Other()) as other:
        yield other


def is_opening() -> bool:
    """Whether the call is one of those by which every session begins: amid them others act in the operation "open"."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not layout.open_directories.__code__:
        frame = frame.f_back
    return frame is not None


def begun(path: Path, other: Other) -> Side:
    """A spool in use: four items wait, each side has one in flight, and there are files to be written again."""
    side = Side(path, 0)
    side.add("large", "small", "large", "small")
    side.take(4)
    side.shown.clear()
    side.add(*("large", "small") * 3)
    side.receive()
    other.ask("begin", path, 1000)
    return side


def settled(side: Side, other: Other) -> None:
    """Both go on and leave; then what was put and what was delivered must be the same, and the rest in order."""
    put, got = (mine + others for mine, others in zip(side.end(), other.ask("end"), strict=True))
    fresh = []
    with SpoolReader(side.path) as rest, suppress(Empty, ShutDown):
        while True:
            item = rest.receive(block=False)
            got.append(value_of(item.array))
            fresh += [item.seq] if item.attempt == 1 else []
            item.ack()
    assert sorted(got) == sorted(put)
    assert fresh == sorted(fresh)
    spoolipc.gc(side.path)
    check_spool(side.path)


CORE: Final = {
    *((name, "get") for name in OPERATIONS.keys() - {"gc", "fsck", "open", "fork"}),
    *(("put", "lose_the_index"), ("loan", "gc"), ("get", "put_many"), ("get_many", "close")),
}
PAIRS: Final = [
    pytest.param(*pair, marks=[] if pair in CORE else pytest.mark.exhaustive)
    for pair in itertools.product(OPERATIONS, OTHERS)
]
"""Those beyond the core are for who has minutes."""


@pytest.mark.parametrize(("name", "then"), PAIRS)
def test_another_process_acts_between_any_two_calls(place: Path, name: str, then: str, other: Other) -> None:
    path, number, acted = place / "spool", 0, 0
    passed: set[int] = set()
    while True:
        side = begun(path, other)

        def act(event: Event, number: int = number) -> None:
            nonlocal acted
            if not number and (is_locked(path) or (name != "open" and is_opening())):
                passed.add(event.number)
            elif event.number == number and not is_locked(path):
                acted += 1
                other.ask(then)

        try:
            with Injector(act) as injector:
                side.met, side.passed = injector.met, passed
                OPERATIONS[name](side)
            settled(side, other)
        except BaseException as failure:
            failure.add_note(f"{name}: {then} before call {number}")
            raise
        shutil.rmtree(path)
        if number > len(injector.met):
            break
        number = next(n for n in itertools.count(number + 1) if n not in passed)
    assert acted


def test_peek_tells_of_no_other_item_though_the_file_is_written_again(place: Path) -> None:
    path, number, told = place / "spool", 0, set()
    while True:
        number += 1
        with SpoolWriter(path) as writer, SpoolReader(path) as reader, SpoolReader(path) as peeking:
            seqs = [writer.put(arrays(0, "small"), meta=seq) for seq in (1, 2)]

            def act(
                event: Event, number: int = number, both: tuple[SpoolWriter, SpoolReader] = (writer, reader)
            ) -> None:
                if event.number == number and event.name != "lock" and not is_locked(path):
                    both[1].get_nowait()
                    both[0].put(arrays(0, "small"), meta=3)

            with Injector(act) as injector:
                seen = peeking.peek(block=False)
        assert seen.meta == seen.seq, f"at call {number}"
        told.add(seen.seq)
        shutil.rmtree(path)
        if number > len(injector.met):
            break
    assert seqs == [1, 2]
    assert told <= {1, 2}
