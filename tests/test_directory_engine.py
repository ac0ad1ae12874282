"""The directory engine keeps the contract of engines."""

from __future__ import annotations

from typing import Any

from contract import EngineContract

from spoolipc.engine import Sink, Source
from spoolipc.layout import Limits
from spoolipc.sink import DirectorySink
from spoolipc.source import DirectorySource


class TestDirectoryEngine(EngineContract):
    def sink(self, place: str, limits: Limits | None = None, *, reopen: bool = False) -> Sink[Any]:
        return DirectorySink(place, limits or Limits(), "none", reopen=reopen)

    def source(self, place: str, limits: Limits | None = None) -> Source:
        return DirectorySource(place, limits or Limits())

    def dead_letters(self, place: str) -> list[int]:
        import spoolipc

        return [letter.seq for letter in spoolipc.failed_list(place)]


class TestDurableDirectoryEngine(TestDirectoryEngine):
    def sink(self, place: str, limits: Limits | None = None, *, reopen: bool = False) -> Sink[Any]:
        return DirectorySink(place, limits or Limits(), "fsync", reopen=reopen)
