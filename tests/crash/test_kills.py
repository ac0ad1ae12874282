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


def kill_all(place: Path, name: str, faults: list[tuple[int, Hook]], parity: int = 0) -> None:
    """Kill a scenario by one fault after another; another session watches every second time."""
    assert faults
    for count, (number, fault) in enumerate(faults):
        try:
            killed(place / "spool", name, fault, watched=name not in ALONE and count % 2 == parity)
        except BaseException as failure:
            failure.add_note(f"{name} killed at event {number}")
            raise


@pytest.mark.parametrize("parity", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_system_call(place: Path, name: str, parity: int) -> None:
    found, end = changes(place, name)
    # Of stores one after another, the first: what the store after a rename finds.
    faults: list[tuple[int, Hook]] = [
        (number, at(number, kill))
        for (last, before), (number, event) in pairwise([(0, ""), *found])
        if event != STORE or (last, before) != (number - 1, STORE)
    ]
    for number, event in found:
        if event in WRITES:
            faults += [(number, at(number, partly(part, kill))) for part in (0.01, 0.6)]
    kill_all(place, name, [*faults, (end, at(end, kill))], parity)  # the last is killed when all is done


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_before_every_store_to_the_index(place: Path, name: str) -> None:
    found, _ = changes(place, name)
    kill_all(place, name, [(number, at(number, kill)) for number, event in found if event == STORE])
