"""Writers and readers on servers that nobody closes."""

from __future__ import annotations

import asyncio
import contextlib
import gc as collector
import signal
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest

from nats_engine.server import Server
from spoolipc import (
    Empty,
    Full,
    JoinableQueue,
    LimitMismatch,
    ServerUnreachable,
    ShutDown,
    SpoolReader,
    SpoolWriter,
    remove,
    stat,
)
from spoolipc.aio import AsyncSpoolReader, AsyncSpoolWriter
from spoolipc.nats import session
from spoolipc.nats.producer import NatsProducer
from spoolipc.nats.spool import Spool


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    return server.url(request.node.name.replace("[", "-").rstrip("]"))


def test_writer_dropped_without_close_has_left(url: str) -> None:
    with SpoolReader(url, end="writers") as reader:
        writer = SpoolWriter(url)
        writer.put(np.ones(3))
        assert reader.get(timeout=30).sum() == 3
        del writer
        collector.collect()
        with pytest.raises(ShutDown):
            reader.get(timeout=30)
        assert stat(url).live_sessions == 1


def test_everybody_dropped_at_once_has_left_and_the_spool_can_be_removed(url: str) -> None:
    faces = [SpoolWriter(url), SpoolReader(url, end="writers"), SpoolReader(url), JoinableQueue(path=url)]
    assert stat(url).live_sessions == 5
    faces.clear()
    collector.collect()
    assert stat(url).live_sessions == 0
    remove(url)


def test_item_of_a_reader_that_is_dropped_with_it_is_requeued(url: str) -> None:
    with SpoolWriter(url) as writer, SpoolReader(url) as other:
        writer.put(np.ones(3))
        reader = SpoolReader(url)
        item = reader.receive(timeout=30)
        assert stat(url).in_flight == 1
        del item, reader
        collector.collect()
        with other.receive(timeout=30) as item:
            assert item.attempt == 2
        assert stat(url).live_sessions == 2


def test_item_that_is_held_keeps_its_dropped_reader(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_RENEW", 0.01)
    with SpoolWriter(url) as writer:
        writer.put(np.ones(3))
        item = SpoolReader(url).receive(timeout=30)
        collector.collect()
        assert stat(url).in_flight == 1
        item.ack()
        assert (stat(url).in_flight, stat(url).depth) == (0, 0)


def test_faces_of_asyncio_dropped_after_their_loop_have_left(url: str) -> None:
    async def run() -> None:
        writer, reader = AsyncSpoolWriter(url), AsyncSpoolReader(url)
        await writer.put(np.ones(3))
        assert (await reader.get()).sum() == 3

    asyncio.run(run())
    collector.collect()
    assert stat(url).live_sessions == 0


def interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def interrupted_put(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = NatsProducer._pieces

    def interrupting(self: NatsProducer, packed: Any) -> Any:
        for number, request in enumerate(pieces(self, packed)):
            if number == 20:
                interrupt()
            yield request

    monkeypatch.setattr(NatsProducer, "_pieces", interrupting)
    SpoolWriter(url, fresh=True).put(np.zeros(20_000_000))


def interrupted_get(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pull = Spool.pull

    def interrupting(self: Spool, limit: int, seconds: float = 0.0) -> Any:
        if seconds:
            interrupt()
        return pull(self, limit, seconds)

    monkeypatch.setattr(Spool, "pull", interrupting)
    SpoolReader(url).get()


@pytest.mark.parametrize(
    ("name", "call", "error"),
    [
        ("limits", lambda url, _: SpoolWriter(url, maxsize=7), LimitMismatch),
        ("put", lambda url, _: SpoolWriter(url).put(np.zeros(3)), ShutDown),
        ("get", lambda url, _: SpoolReader(url).get(), ShutDown),
        ("many", lambda url, _: SpoolWriter(url).put_many([np.zeros(3)] * 3, timeout=0), Full),
        ("receive", lambda url, _: SpoolReader(url).receive(timeout=0.1), Empty),
        ("put-interrupted", interrupted_put, KeyboardInterrupt),
        ("get-interrupted", interrupted_get, KeyboardInterrupt),
    ],
)
def test_who_is_dropped_with_an_error_has_left_before_the_collector_runs(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: str, call: Any, error: Any
) -> None:
    url = server.url(f"error-{name}")
    with SpoolWriter(url, maxsize=2) as writer:
        if error is ShutDown:
            writer.shutdown()
    collector.collect()
    collector.disable()
    try:
        with contextlib.suppress(error):
            call(url, monkeypatch)
            raise AssertionError("no error")
        assert stat(url).live_sessions == 0
    finally:
        collector.enable()


@pytest.mark.parametrize("face", [SpoolWriter, partial(SpoolReader, end="writers")])
def test_opening_that_fails_at_its_end_leaves_nobody(
    url: str, monkeypatch: pytest.MonkeyPatch, face: Any
) -> None:
    SpoolWriter(url).close()

    async def away(self: Spool) -> Any:
        raise ServerUnreachable("away")

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "remove_orphans", away)
        patch.setattr(Spool, "counts", away)
        with pytest.raises(ServerUnreachable) as held:
            face(url)
    assert (str(held.value), stat(url).live_sessions) == ("away", 0)
