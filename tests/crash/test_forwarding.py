"""A forwarder killed, failed or interrupted at any system call, and begun again, loses and doubles nothing.

Both spools are directories. It is begun again at once, or after a reader of the destination has taken what was there,
or after that and with the destination's index lost as well: the account by id is exact, and in order.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest
from support.account import check_spool
from support.faults import STORE, Event, Hook, Injector, at, fail, forked, interrupt, is_look, kill, partly
from support.forwards import drained, fill
from support.waits import is_locked

from spoolipc import SpoolError, SpoolInUse, SpoolWriter, forward, fsck, gc, stat

COUNT: Final = 3
BATCH: Final = 9000
"""Bytes at once: two of the small items."""


def leave(_: Path) -> list[str]:
    """Nobody does anything meanwhile."""
    return []


def take(path: Path) -> list[str]:
    """A reader takes what is there."""
    return drained(path) if (path / "spool.json").exists() else []


def take_and_lose(path: Path) -> list[str]:
    """And then the index is lost, with all that it could tell."""
    found = take(path)
    (path / "index").unlink(missing_ok=True)
    return found


def tidy(path: Path) -> list[str]:
    """Another session removes what the crashed one left."""
    if (path / "spool.json").exists():
        gc(path)
        assert os.listdir(path / "tmp") == []
    return []


MEANWHILE: Final = (leave, take, take_and_lose, tidy)


class Spools:
    """A source with items, and a destination."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.source, self.destination = place / "source", place / "destination"
        self.ids = fill(self.source, COUNT)

    def forward(self, **options: Any) -> int:
        return forward(self.source, self.destination, until_empty=True, max_bytes=BATCH, **options)

    def verify(self, before: list[str]) -> None:
        """Forward the rest; all there is came once and in order. before: what was taken at the destination."""
        self.forward()
        assert before + drained(self.destination) == self.ids
        for path in (self.source, self.destination):
            left = stat(path)
            assert (left.depth, left.in_flight, left.failed) == (0, 0, 0)
            gc(path)
            check_spool(path, checked=False)
            assert fsck(path).problems == ()
        assert os.listdir(self.destination / "tmp") == []
        shutil.rmtree(self.place)


def events(place: Path, stores: bool = True) -> list[tuple[int, str]]:
    """The calls and stores of a forwarder that change something; of stores one after another, the first."""
    found: list[tuple[int, str]] = []

    def note(event: Event) -> None:
        if not is_look(event) and not (
            found and found[-1] == (event.number - 1, STORE) == (event.number - 1, event.name)
        ):
            found.append((event.number, event.name))

    spools = Spools(place)
    with Injector(note, stores=stores):
        spools.forward()
    spools.verify([])
    assert len(found) > 50
    return found


def each_kill(found: list[tuple[int, str]]) -> Iterator[tuple[int, Hook]]:
    for number, name in found:
        yield number, at(number, kill)
        if name in ("write", "pwrite", "save"):
            yield number, at(number, partly(0.6, kill))


@pytest.mark.parametrize(
    ("turn", "step"),
    [(0, 5), *(pytest.param(turn, 1, marks=pytest.mark.exhaustive) for turn in range(len(MEANWHILE)))],
)
def test_forwarder_killed_at_every_system_call_loses_and_doubles_nothing(
    place: Path, turn: int, step: int
) -> None:
    """step: 5 to try one in five, with each that may follow in its turn."""
    for count, (number, fault) in [*enumerate(each_kill(events(place / "dry")))][::step]:
        spools = Spools(place / "both")

        def work(spools: Spools = spools, fault: Hook = fault) -> None:
            with Injector(fault, stores=True):
                spools.forward()
            kill()

        assert forked(work) < 0
        meanwhile = MEANWHILE[(count + turn) % len(MEANWHILE)]
        try:
            spools.verify(meanwhile(spools.destination))
        except BaseException as failure:
            failure.add_note(f"killed at event {number}, then {meanwhile.__name__}")
            raise


def test_a_killed_forwarder_has_written_no_file_that_was_an_item_before(place: Path) -> None:
    """Whose name would say nothing of what was put. There are such files, which a writer would take."""
    spools = Spools(place / "both")
    with SpoolWriter(spools.destination):
        fill(spools.destination, COUNT)
        drained(spools.destination)
        assert stat(spools.destination).free_files

        def work() -> None:
            with Injector(lambda event: kill() if is_put(event) else None):
                spools.forward()

        assert forked(work) < 0
        spools.verify([])


def is_put(event: Event) -> bool:
    return event.name == "rename" and event.args[0].endswith(".npy")


def faulty(place: Path, act: Hook, error: type[BaseException] | tuple[type[BaseException], ...]) -> None:
    """A fault at each call, in this process."""
    for number, _ in events(place / "dry", stores=False):
        spools = Spools(place / "both")
        try:
            with Injector(at(number, act)):
                spools.forward()
        except error:
            pass
        try:
            spools.verify(take(spools.destination))
        except BaseException as failure:
            failure.add_note(f"at event {number}")
            raise


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_error_at_every_system_call_is_told_and_loses_and_doubles_nothing(
    place: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["spoolipc.forward"], "_LOOK", 0.01)  # what is full is tried again at once
    faulty(place, fail(number), SpoolError)


def test_interrupt_at_every_system_call_loses_and_doubles_nothing(place: Path) -> None:
    faulty(place, interrupt, KeyboardInterrupt)


def begin_another(spools: Spools) -> list[str]:
    """Another forwarder: refused, as the first lives."""
    with suppress(SpoolInUse):
        spools.forward()
    return []


def take_for_crashed(spools: Spools) -> list[str]:
    """Somebody removes the files of the sessions, so that gc takes them for crashed, and another one goes on."""
    for path in (spools.source, spools.destination):
        for name in os.listdir(path / "alive") if (path / "spool.json").exists() else ():
            (path / "alive" / name).unlink()
            gc(path)
    return begin_another(spools)


def take_there(spools: Spools) -> list[str]:
    return take(spools.destination)


@pytest.mark.parametrize("act", [begin_another, take_for_crashed, take_there], ids=lambda act: act.__name__)
def test_whatever_others_do_between_two_calls_of_a_forwarder_nothing_is_lost_or_doubled(
    place: Path, act: Callable[[Spools], list[str]]
) -> None:
    done = 0
    for number, name in events(place / "dry", stores=False):
        spools = Spools(place / "both")
        found: list[str] = []

        def meanwhile(_: Event, spools: Spools = spools, found: list[str] = found) -> None:
            nonlocal done
            if not any(
                is_locked(path) for path in (spools.source, spools.destination) if (path / "items").exists()
            ):
                with ThreadPoolExecutor() as other:
                    found += other.submit(act, spools).result(30)
                done += 1

        with suppress(SpoolInUse), Injector(at(number, meanwhile)):
            spools.forward()
        try:
            spools.verify(found)
        except BaseException as failure:
            failure.add_note(f"before event {number}, {name}")
            raise
    assert done > 10
