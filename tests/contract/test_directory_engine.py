"""The directory engine passes the suite of engines: plain, durable, and with the second reader in another process."""

from __future__ import annotations

from pathlib import Path

from spoolipc.directory import DirectoryEngine
from spoolipc.engine import Engine
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


class TestDirectoryEngine(
    EngineSuite, LoanSuite, PreallocateSuite, RestoreSuite, WatchSuite, DamageSuite, ProcessSuite
):
    def engine(self, place: str) -> Engine:
        return DirectoryEngine(place)

    def damage(self, seq: int) -> None:
        Path(self.place, "items", f"{seq:020d}.npy").write_bytes(b"broken")


class TestDurableDirectoryEngine(TestDirectoryEngine):
    durability = "fsync"


class TestDirectoryEngineInAnotherProcess(OtherProcess):
    def engine(self, place: str) -> Engine:
        return DirectoryEngine(place)
