"""Whoever is killed wherever in whatever operation leaves a spool that the next call of anyone repairs by itself.

Every scenario is killed before each of its system calls, before each of its stores to the table, half way through each
of its writes, and at its end. After each, another process holds the spool against what was said of it: what was put
is delivered once and whole and in order, what was not acknowledged comes again with its attempt counted, nothing is
left behind, and putting and getting go on at once.
"""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from support.faults import STORE, Hook, Injector, at, forked, kill, partly
from support.scenarios import ALONE, SCENARIOS, Log, Run, Stage, verify

from spoolipc import SpoolReader

WRITES = ("save", "write", "pwrite")


def events(place: Path, name: str) -> list[str]:
    """The names of the calls and stores of a scenario in which nothing goes wrong."""
    with Run(place / "dry", name) as run:
        return run.with_fault(stores=True)


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


def kill_all(place: Path, name: str, faults: list[tuple[int, Hook]]) -> None:
    assert faults
    for number, fault in faults:
        try:
            killed(place / "spool", name, fault, watched=name not in ALONE and number % 2 == 1)
        except BaseException as failure:
            failure.add_note(f"{name} killed at event {number}")
            raise


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_system_call(place: Path, name: str) -> None:
    met = events(place, name)
    # Before each call, and after each: before the store that follows it, if one does.
    faults = [
        (number, at(number, kill))
        for number, (before, event) in enumerate(pairwise(["", *met]), 1)
        if STORE not in (before, event) or before != event
    ]
    for number, call in enumerate(met, 1):
        if call in WRITES:
            faults += [(number, at(number, partly(part, kill))) for part in (0.01, 0.6)]
    kill_all(place, name, [*faults, (len(met) + 1, kill_never)])


def kill_never(_: object) -> None:
    """Let it come to its end, where it is killed."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_before_every_store_to_the_index(place: Path, name: str) -> None:
    met = events(place, name)
    kill_all(place, name, [(n, at(n, kill)) for n, event in enumerate(met, 1) if event == STORE])
