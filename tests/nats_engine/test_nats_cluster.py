"""Three servers of which one is killed, the one that leads or another, while items are put and received."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import nats
import numpy as np
import pytest

from nats_engine.server import Cluster, Server
from spoolipc import Empty, ServerUnreachable, SpoolReader, SpoolWriter, StorageError, stat
from spoolipc.message import Message

COUNT = 300
LARGE = 300_000


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.stop()


def made(url: str) -> SpoolWriter:
    """A writer of a spool that has no limit of attempts, as soon as the servers have found together."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return SpoolWriter(url, max_attempts=0)
        except (ServerUnreachable, StorageError):
            assert time.monotonic() < deadline


def leader(cluster: Cluster, name: str) -> Server:
    """The server that leads the stream of items."""

    async def ask() -> str:
        client = await nats.connect([f"nats://127.0.0.1:{server.port}" for server in cluster.servers])
        try:
            while True:
                reply = await client.request(f"$JS.API.STREAM.INFO.spoolipc-{name}-items", timeout=10)
                if word := json.loads(reply.data).get("cluster", {}).get("leader"):
                    return str(word)
        finally:
            await client.close()

    return cluster.servers[int(asyncio.run(ask())[1:])]


@pytest.mark.parametrize("victim", ["follower", "leader"])
def test_killed_server_loses_and_doubles_nothing(cluster: Cluster, victim: str) -> None:
    url = cluster.url(victim)
    acknowledged: Counter[str] = Counter()
    half, done = threading.Event(), threading.Event()

    def put(writer: SpoolWriter) -> set[str]:
        ids = set()
        for number in range(COUNT):
            message = Message((np.full(LARGE if number % 20 == 0 else 10, number),), id=f"{number:032x}")
            writer._producer.put([message], None)
            ids.add(message.id)
            if number == COUNT // 3:
                half.set()
        done.set()
        return ids

    def receive() -> None:
        with SpoolReader(url) as reader:
            while not done.is_set() or sum(acknowledged.values()) < COUNT:
                with suppress(Empty, ServerUnreachable):  # within a second
                    item = reader.receive(timeout=1)
                    assert (item.array == int(item.id, 16)).all()
                    item.ack()
                    acknowledged[item.id] += 1

    with made(url) as writer, ThreadPoolExecutor() as threads:
        putting, receiving = threads.submit(put, writer), threads.submit(receive)
        assert half.wait(60)
        first = leader(cluster, victim)
        killed = first if victim == "leader" else next(s for s in cluster.servers if s is not first)
        killed.stop(kill=True)
        threading.Event().wait(1.0)  # some traffic without it
        killed.start()
        ids: Any = putting.result(150)
        receiving.result(150)
    assert set(acknowledged) == ids
    assert set(acknowledged.values()) == {1}
    found = stat(url)
    assert (found.depth, found.in_flight, found.failed) == (0, 0, 0)
