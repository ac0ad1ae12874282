"""The engine on servers passes the suite of engines: plain, with items in pieces, and with the second reader in another
process."""

from __future__ import annotations

import hashlib

import pytest

from nats_engine.server import Server
from spoolipc.engine import Engine
from spoolipc.nats import NatsEngine
from spoolipc.testing import EngineSuite, OtherProcess, ProcessSuite, RestoreSuite, Suite, WatchSuite


class OnServer(Suite):
    """A spool of the server, by a name of its own for each place."""

    @pytest.fixture(autouse=True)
    def _served(self, server: Server) -> None:
        self.server = server

    def engine(self, place: str) -> Engine:
        name = hashlib.sha256(place.encode()).hexdigest()[:24]
        return NatsEngine(self.server.url(name))


class TestNatsEngine(OnServer, EngineSuite, RestoreSuite, WatchSuite, ProcessSuite):
    """Items of a message each."""


class TestNatsEngineInPieces(OnServer, EngineSuite, RestoreSuite, WatchSuite, ProcessSuite):
    """Large items of several messages."""

    @pytest.fixture(autouse=True)
    def _served(self, small_server: Server) -> None:
        self.server = small_server


for name in (
    "item_in_flight_at_a_killed_reader_is_redelivered_until_its_last_attempt",
):  # half a minute; none is large
    assert callable(getattr(TestNatsEngineInPieces, f"test_{name}"))
    setattr(TestNatsEngineInPieces, f"test_{name}", None)


class TestNatsEngineInAnotherProcess(OnServer, OtherProcess):
    """The second reader in another process."""
