"""Ctrl-C, wherever it comes, leaves objects that go on, a lock that is free, and loses and doubles nothing.

KeyboardInterrupt is raised before and after each call, and at each place in the package where Python delivers signals.
What was interrupted may have been done or not.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.faults import Injector, at, interrupt, interrupted_at
from support.peek import peek_table
from support.scenarios import Run, every_or_core

import spoolipc
from spoolipc import SpoolReader, SpoolWriter, stat
from spoolipc.directory.recycling import Recycler, Reserved

PACKAGE = str(Path(spoolipc.__file__).parent)
ANYWHERE = (
    "put_small put_into_a_consumed_file put_again get_large get_again get_with_a_damaged_one_before receive ack_read"
    " receive_and_acknowledge nack_and_ack_the_second_attempt reject lend_and_commit close shutdown_immediately"
    " open_after_a_crash rebuild_a_deleted_index"
).split()


@pytest.fixture(autouse=True)
def unraisable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What interrupts a finalizer is told to nobody."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", every_or_core())
def test_interrupted_before_or_after_any_call(place: Path, name: str, after: bool) -> None:
    path = place / "spool"
    with Run(path, name) as run:
        met = run.with_fault()
    for number, call in enumerate(met, 1):
        fault = at(number, interrupt)
        try:
            with Run(path, name) as run:
                if after:
                    run.with_fault(after=lambda event, _, fault=fault: fault(event))  # type: ignore[misc]
                elif (
                    call != "close"
                ):  # Python delivers no signal between the begin of a `finally` and a call in C
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


def test_file_that_an_interrupted_put_reserved_goes_when_its_session_does(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, array = place / "spool", np.zeros(50_000)

    def interrupted(recycler: Recycler, record: int) -> Reserved:
        raise KeyboardInterrupt

    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in range(9):
            writer.put(array)
            reader.get()
        monkeypatch.setattr(Recycler, "reserved_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.put_many([array] * 9)
        assert peek_table(path).of("reserved")
    assert not peek_table(path).of("reserved")


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
