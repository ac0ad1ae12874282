"""However many items a call is about, it holds the lock for a few at a time: everybody else has a turn between."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from support.faults import Event, Injector, forked, interrupt, kill
from support.peer import Peer

import spoolipc
from spoolipc import Empty, SpoolReader, SpoolWriter

MANY: Final = 600
"""More than any step may do at once."""
LARGE: Final = 2100
"""Of float64: more than the 16 KB up to which an array is a copy and not a view of the file."""


class Steps(Injector):
    """Counts the calls and stores of each locked step in its block."""

    def __init__(self) -> None:
        super().__init__(self._leave, self._enter, stores=True)
        self.lengths: list[int] = []
        self._lock: object = None
        self._since = 0

    def _enter(self, event: Event, result: Any) -> None:
        if event.name == "lock" and result and self._lock is None:
            self._lock, self._since = event.args[0], event.number

    def _leave(self, event: Event) -> None:
        if event.name == "unlock" and event.args[0] == self._lock:
            self._lock = None
            self.lengths.append(event.number - self._since)


class Stage:
    """A spool in use, and what a case does with it."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count, self.size = path, count, LARGE
        self.writer, self.reader = SpoolWriter(path), SpoolReader(path)
        self.kept: list[Any] = []

    def fill(self) -> None:
        self.writer.put_many([np.zeros(self.size)] * self.count)

    def fill_small(self) -> None:
        self.size = 3
        self.fill()

    def received(self) -> None:
        self.fill()
        self.kept = [self.reader.receive() for _ in range(self.count)]

    def got(self) -> None:
        self.fill()
        self.kept = [self.reader.get() for _ in range(self.count)]

    def rejected(self) -> None:
        self.received()
        while self.kept:
            self.kept.pop().reject("no good")

    def lent(self) -> None:
        self.kept = [self.writer.loan(self.size) for _ in range(self.count)]

    def committed(self) -> None:
        self.lent()
        for loan in self.kept:
            self.kept.append(loan.array)
            loan.commit()
            if len(self.kept) == 2 * self.count:
                break

    def damaged(self) -> None:
        self.fill()
        for file in (self.path / "items").iterdir():
            os.truncate(file, 10)

    def discarded(self) -> None:
        """A shutdown that was killed when it had only begun."""
        self.fill()

        def work() -> None:
            with Injector(lambda event: kill() if event.name == "unlink" else None):
                self.writer.shutdown(immediate=True)

        assert forked(work)

    def left_files(self) -> None:
        """As many sessions crashed that had nothing."""
        for number in range(self.count):
            (self.path / "alive" / f"{number + 1:016x}").touch(mode=0o600)

    def left_alone(self) -> None:
        """And nobody else is there."""
        self.close()
        self.left_files()

    def left_staged(self) -> None:
        """A session crashed that had staged as many files."""
        (self.path / "alive" / f"{1:016x}").touch(mode=0o600)
        for number in range(self.count):
            (self.path / "tmp" / f"{1:016x}-{number}.npy").touch(mode=0o600)

    def crash_of(self, begin: Callable[[], object]) -> None:
        def work() -> None:
            begin()
            kill()

        assert forked(work)

    def put(self) -> None:
        self.writer.put(np.zeros(self.size))

    def get_all(self, **options: Any) -> None:
        assert len(self.reader.get_many(2 * self.count, block=False, **options)) == self.count

    def get_verified(self) -> None:
        with SpoolReader(self.path, verify=True) as reader:
            assert len(reader.get_many(self.count)) == self.count

    def get_nothing(self) -> None:
        with suppress(Empty):
            self.reader.get_nowait()

    def get_interrupted(self) -> None:
        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr("spoolipc.queue.copied", interrupt)
            self.get_all(copy=True)

    def drop(self) -> None:
        self.kept.clear()
        self.put()
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            self.get_all_that_wait()

    def get_all_that_wait(self) -> None:
        for _ in range(3):
            with suppress(Empty):
                self.reader.get_nowait()

    def close(self) -> None:
        self.reader.close()
        self.writer.close()

    def open(self) -> None:
        SpoolReader(self.path).close()

    def begin_anew(self) -> None:
        self.close()
        SpoolWriter(self.path, fresh=True).close()

    def reopen(self) -> None:
        SpoolWriter(self.path, reopen=True).close()


def nothing(_: Stage) -> None:
    """What is to be done begins with an empty spool."""


CASES: Final[dict[str, tuple[Callable[[Stage], object], Callable[[Stage], object]]]] = {
    "put_many": (nothing, Stage.fill),
    "put_many, small": (nothing, Stage.fill_small),
    "get_many": (Stage.fill, Stage.get_all),
    "get_many, small": (Stage.fill_small, Stage.get_all),
    "get_many, copied": (Stage.fill, lambda stage: stage.get_all(copy=True)),
    "get_many, verified": (Stage.fill, Stage.get_verified),
    "get_many, interrupted": (Stage.fill, Stage.get_interrupted),
    "get_many, interrupted, small": (Stage.fill_small, Stage.get_interrupted),
    "get past damaged items": (Stage.damaged, Stage.get_nothing),
    "items dropped": (Stage.received, Stage.drop),
    "arrays dropped": (Stage.got, Stage.drop),
    "loans dropped": (Stage.lent, Stage.drop),
    "lent arrays dropped": (Stage.committed, Stage.drop),
    "close with items": (Stage.received, Stage.close),
    "close with arrays": (Stage.got, Stage.close),
    "close with loans": (Stage.lent, Stage.close),
    "close with lent arrays": (Stage.committed, Stage.close),
    "open after a crash with items": (lambda stage: stage.crash_of(stage.received), Stage.open),
    "open after a crash with arrays": (lambda stage: stage.crash_of(stage.got), Stage.open),
    "open after a crash with loans": (lambda stage: stage.crash_of(stage.lent), Stage.open),
    "open after a crash with lent arrays": (lambda stage: stage.crash_of(stage.committed), Stage.open),
    "open after crashes": (Stage.left_files, lambda stage: stage.kept.append(SpoolReader(stage.path))),
    "open after a crash with staged files": (Stage.left_staged, Stage.open),
    "close after crashes": (Stage.left_files, Stage.close),
    "gc after crashes, a dry run": (Stage.left_alone, lambda stage: spoolipc.gc(stage.path, dry_run=True)),
    "gc after a crash with items": (
        lambda stage: stage.crash_of(stage.received),
        lambda stage: spoolipc.gc(stage.path),
    ),
    "purge": (Stage.fill, lambda stage: spoolipc.purge(stage.path)),
    "fresh": (Stage.fill, Stage.begin_anew),
    "shutdown": (Stage.fill, lambda stage: stage.writer.shutdown(immediate=True)),
    "reopen": (Stage.discarded, Stage.reopen),
    "failed_retry": (Stage.rejected, lambda stage: spoolipc.failed_retry(stage.path, None)),
    "failed_drop": (Stage.rejected, lambda stage: spoolipc.failed_drop(stage.path, None)),
}
CORE: Final = (
    "put_many",
    "get_many",
    "get_many, small",
    "arrays dropped",
    "close with items",
    "open after a crash with items",
    "open after a crash with staged files",
    "open after crashes",
    "purge",
)


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in CORE else pytest.mark.exhaustive) for case in CASES]
)
def test_no_step_grows_with_the_number_of_items(tmp_path: Path, case: str) -> None:
    begin, act = CASES[case]
    longest = []
    for count in (MANY, 2 * MANY):
        stage = Stage(tmp_path / str(count), count)
        begin(stage)
        with Steps() as steps:
            act(stage)
        stage.close()
        longest.append(max(steps.lengths))
    assert longest[1] < 1.2 * longest[0] + 20, longest


def test_another_reader_has_a_turn_amid_a_long_get_many(
    spool: Path, writer: SpoolWriter, reader: SpoolReader
) -> None:
    """Each gets its own in order, and both together everything."""
    writer.put_many([np.array([number]) for number in range(MANY)])
    others: list[int] = []

    def turn(event: Event, _: Any) -> None:
        if event.name == "unlock" and len(others) < 4:
            others.append(other.ask("int(reader.get_nowait()[0])"))

    with Peer(spool) as other:
        other.run("reader = SpoolReader(path)")
        with Injector(after=turn):
            found = [int(array[0]) for array in reader.get_many(MANY)]
        other.run("reader.close()")
    assert len(others) == 4
    assert others == sorted(others)
    assert found == sorted(found)
    assert sorted(found + others) == list(range(MANY))


@pytest.mark.parametrize("size", [3, LARGE])
def test_what_an_interrupt_puts_back_waits_in_its_order_before_all_else(
    spool: Path, writer: SpoolWriter, reader: SpoolReader, size: int
) -> None:
    """Files taken in the first steps are written again by nobody before the last one has ended."""
    numbers = list(range(MANY))
    for number in numbers:
        writer.put(np.full(size, number))
    for item in [reader.receive() for _ in range(3)]:
        item.nack()
    steps = itertools.count()

    def late(event: Event, _: Any) -> None:
        if event.name == "unlock":
            if next(steps) == 4:
                interrupt()
            other.run(f"for _ in range(3): writer.put(np.full({size}, -1))")

    with Peer(spool) as other:
        other.run("writer = SpoolWriter(path)")
        with Injector(after=late), pytest.raises(KeyboardInterrupt):
            reader.get_many(MANY)
        other.run("writer.close()")
    assert [int(array[0]) for array in reader.get_many(MANY)] == numbers
