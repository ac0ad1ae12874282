"""The directory engine passes the suite of engines: plain, durable, with both sides of one session, and with the second
reader in another process."""

from __future__ import annotations

from contextlib import closing
from functools import cached_property
from pathlib import Path

import pytest

from spoolipc.directory import DirectoryEngine
from spoolipc.directory.pair import DirectoryPair
from spoolipc.engine import Consumer, Engine, Producer
from spoolipc.message import Limits
from spoolipc.testing import (
    DamageSuite,
    EngineSuite,
    LoanSuite,
    OtherProcess,
    PreallocateSuite,
    ProcessSuite,
    RestoreSuite,
    WatchSuite,
)


@pytest.mark.usefixtures("look_often")
class TestDirectoryEngine(
    EngineSuite, LoanSuite, PreallocateSuite, RestoreSuite, WatchSuite, DamageSuite, ProcessSuite
):
    looks = 0.2

    def engine(self, place: str) -> Engine:
        return DirectoryEngine(place)

    def damage(self, seq: int) -> None:
        Path(self.place, "items", f"{seq:020d}.npy").write_bytes(b"broken")


class TestDurableDirectoryEngine(TestDirectoryEngine):
    durability = "fsync"


@pytest.mark.usefixtures("look_often")
class TestBothSidesOfOneSession(EngineSuite, LoanSuite, PreallocateSuite, WatchSuite, DamageSuite):
    looks = TestDirectoryEngine.looks
    engine = TestDirectoryEngine.engine
    damage = TestDirectoryEngine.damage

    @cached_property
    def both(self) -> DirectoryPair:
        return self.opened.enter_context(closing(DirectoryEngine(self.place).pair(Limits())))

    @cached_property
    def producer(self) -> Producer:
        return self.both.producer

    @cached_property
    def consumer(self) -> Consumer:
        return self.both.consumer


for (
    name
) in (  # these close one side and go on with the other, count sessions, or begin anew beside a reader only
    "suites_of_all_capabilities_are_run",
    "delivered_arrays_never_change",
    "stat_counts_every_place",
    "fresh_producer_begins_with_an_empty_open_spool_and_its_limits",
    "fresh_producer_makes_a_spool_and_serves_a_consumer_that_waits",
    "fresh_producer_is_refused_beside_another_and_items_in_flight",
    "shutdown_ends_puts_and_lets_what_waits_be_taken_until_it_is_reopened",
    "closed_session_says_so_and_closing_again_is_harmless",
):
    assert callable(getattr(TestBothSidesOfOneSession, f"test_{name}"))
    setattr(TestBothSidesOfOneSession, f"test_{name}", None)


class TestDirectoryEngineInAnotherProcess(OtherProcess):
    def engine(self, place: str) -> Engine:
        return DirectoryEngine(place)
