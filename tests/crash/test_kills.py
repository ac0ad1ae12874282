"""Whoever is killed wherever in whatever operation leaves a spool that the next call of anyone repairs by itself.

Every scenario is killed before each of its system calls that change something, before each of its stores to the table,
half way through each of its writes, and at its end; before any other call, a crash leaves what one before the next
change does. After each, another process holds the spool against what was said of it: what was put is delivered once
and whole and in order, what was not acknowledged comes again with its attempt counted, nothing is left behind, and
putting and getting go on at once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from support.faults import STORE, Event, Hook, Injector, at, forked, is_look, kill, partly
from support.scenarios import ALONE, SCENARIOS, Log, Run, Stage, verify

from spoolipc import SpoolReader

WRITES = ("save", "write", "pwrite")


def changes(place: Path, name: str) -> tuple[list[tuple[int, str]], int]:
    """Number and name of each call and store of a scenario that changes something, and the number after the last."""
    found: list[tuple[int, str]] = []

    def note(event: Event) -> None:
        if not is_look(event):
            found.append((event.number, event.name))

    with Run(place / "dry", name) as run:
        return found, len(run.with_fault(note, stores=True)) + 1


def killed(path: Path, name: str, fault: Hook, *, watched: bool) -> None:
    """Let a scenario be killed by `fault` or at its end, and verify what it left.

    watched: another session has the spool open meanwhile.
    """
    log, ready, go = Log(), os.pipe(), os.pipe()
    bystanders: list[SpoolReader] = []

    def work() -> None:
        steps = SCENARIOS[name](Stage(path, log))
        next(steps)
        os.write(ready[1], b"r")
        os.read(go[0], 1)
        with Injector(fault, stores=True):
            list(steps)
            kill()

    def watch() -> None:
        try:
            if os.read(ready[0], 1) and watched and (path / "spool.json").exists():
                bystanders.append(SpoolReader(path))
        finally:
            os.write(go[1], b"g")

    try:
        assert forked(work, watch) < 0
        verify(path, log, *bystanders)
    except BaseException as failure:
        failure.add_note("\n".join(map(str, log.lines())))
        raise
    finally:
        for fd in (*ready, *go):
            os.close(fd)
        shutil.rmtree(path, ignore_errors=True)


def kills(place: Path, name: str) -> Iterator[tuple[int, Hook, bool]]:
    """Each kill of a scenario: at which event, how, and whether another session has the spool open meanwhile."""
    found, end = changes(place, name)
    assert found
    for (last, before), (number, event) in pairwise([(0, ""), *found, (end, "")]):  # or when all is done
        # Of stores one after another, the first is what follows a rename; of the others one way will do.
        follows = (number, event) == (last + 1, before) and event == STORE
        ways = (False,) if name in ALONE else (number % 2 == 0,) if follows else (False, True)
        for hook in (kill, *(partly(part, kill) for part in (0.01, 0.6) if event in WRITES)):
            yield from ((number, at(number, hook), watched) for watched in ways)


@pytest.mark.parametrize(
    "rest", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["some", "rest"]
)
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_system_call_and_store(place: Path, name: str, rest: bool) -> None:
    """rest: all but one in seven, which `make test` tries."""
    for count, (number, fault, watched) in enumerate(kills(place, name)):
        if (count % 7 > 0) == rest:
            try:
                killed(place / "spool", name, fault, watched=watched)
            except BaseException as failure:
                failure.add_note(f"{name} killed at event {number}")
                raise
