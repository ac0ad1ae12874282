"""One server for all tests that do not end it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nats_engine.server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with its data in files and messages of a megabyte at most, as servers are by default."""
    server = Server(tmp_path_factory.mktemp("nats"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One with messages of 64 KB at most."""
    server = Server(tmp_path_factory.mktemp("nats"), "max_payload: 65536")
    yield server
    server.stop()
