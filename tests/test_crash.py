"""Whoever dies wherever in whatever change leaves a spool that the next call of anyone repairs by itself.

Every scenario of `crash.py` is killed at every one of its system calls, and before every store to the index;
its interrupted calls are taken back. After each, another process holds the spool against what the child had
said: what was put is delivered once and whole and in order, what was not acknowledged comes again with its
attempt counted, nothing is left behind, and putting and getting go on at once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from crash import SCENARIOS, Crew, Report

pytestmark = [pytest.mark.exhaustive, pytest.mark.fault, pytest.mark.timeout(300)]
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is missing")
READ_AS_ONE = ("collect_garbage", "repair_by_fsck")
"""They look at the index as one buffer, which the tripwire on its stores is not; each change they make is in others."""
INTERRUPTED = [
    *(
        "put_small",
        "put_recycled",
        "get_large",
        "get_damaged",
        "claim_and_load",
        "ack_large",
        "nack",
        "reject",
    ),
    *("put_again_small", "get_again_large", "receive_again_large"),
    *("close_reader", "shutdown_immediately", "tend_the_dead", "rebuild_a_deleted_index"),
]


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    crew = Crew(2 * (os.cpu_count() or 1))
    yield crew
    crew.close()


def check(report: Report, least: int) -> None:
    """All faults happened, and nothing went wrong after any."""
    assert not report.failures, "\n".join(report.failures[:3])
    assert report.faults >= least
    assert report.missed <= report.faults // 10, "the places are not where the first run met them"


@needs_strace
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_system_call(crew: Crew, name: str) -> None:
    check(crew.run_all(name, "kill"), least=3)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in READ_AS_ONE])
def test_killed_before_every_store_to_the_index(crew: Crew, name: str) -> None:
    check(crew.run_all(name, "store"), least=6)


@pytest.mark.parametrize("name", INTERRUPTED)
def test_interrupted_wherever_a_signal_can_come(crew: Crew, name: str) -> None:
    check(crew.run_all(name, "signal"), least=50)
