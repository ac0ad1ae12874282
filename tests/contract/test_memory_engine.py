"""The memory engine passes the suite of engines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spoolipc import memory
from spoolipc.engine import Engine
from spoolipc.testing import EngineSuite, LoanSuite, RestoreSuite, WatchSuite


class TestMemoryEngine(EngineSuite, LoanSuite, RestoreSuite, WatchSuite):
    looks = 0.1  # it has none for crashed sessions

    @pytest.fixture(autouse=True)
    def _clear(self) -> Iterator[None]:
        yield
        memory.clear(self.place)

    def engine(self, place: str) -> Engine:
        return memory.MemoryEngine(place)
