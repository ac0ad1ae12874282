"""Three servers of which one is killed, or cut off, the one that leads or another, while items are put and received."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import nats
import numpy as np
import pytest
from support.peer import Peer

from nats_engine import network
from nats_engine.server import Cluster, Server
from nats_engine.traffic import Traffic, made
from spoolipc import ServerUnreachable

SOME = 40


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.stop()


def leader(cluster: Cluster, name: str) -> Server:
    """The server that leads the stream of items."""

    async def ask() -> str:
        client = await nats.connect([f"nats://{server.address}" for server in cluster.servers])
        try:
            while True:
                reply = await client.request(f"$JS.API.STREAM.INFO.spoolipc-{name}-items", timeout=10)
                if word := json.loads(reply.data).get("cluster", {}).get("leader"):
                    return str(word)
        finally:
            await client.close()

    return cluster.servers[int(asyncio.run(ask())[1:])]


def chosen(cluster: Cluster, victim: str, name: str) -> Server:
    first = leader(cluster, name)
    return next(s for s in cluster.servers if s is not first) if victim == "follower" else first


def test_killed_server_loses_and_doubles_nothing(cluster: Cluster) -> None:
    url = cluster.url("killed")
    made(url).close()
    for prefix, victim in enumerate(["follower", "leader"]):
        with Traffic(url, f"{prefix:08x}") as traffic:
            traffic.until(SOME)
            killed = chosen(cluster, victim, "killed")
            killed.stop(kill=True)
            traffic.until(SOME)
            killed.start()
            traffic.until(SOME)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
@pytest.mark.fault
@pytest.mark.skipif(not network.possible(), reason="network namespaces need root, unshare and ip")
def test_server_or_client_that_is_cut_off_loses_and_doubles_nothing(tmp_path: Path) -> None:
    with Peer(tmp_path, *network.IN_NAMESPACES) as peer:
        peer.run("from nats_engine import test_nats_cluster as cluster; cluster.cut_each_off(path)")


def cut_each_off(place: str) -> None:
    """All connections begin at the server that is cut off; from the other servers alone in the end."""
    cluster = Cluster(Path(place), network.connect())
    made(cluster.url("cut")).close()
    for prefix, victim in enumerate(["follower", "leader", "client", "from the servers"]):
        server = chosen(cluster, "follower" if victim == "client" else victim, "cut")
        with Traffic(f"{server.url('cut')}?replicas=3", f"{prefix:08x}") as traffic:
            traffic.until(SOME)
            host, *others = sorted(
                network.SERVERS, key=lambda each: each != f"n{cluster.servers.index(server)}"
            )
            if victim == "client":
                network.cut("client")
                began = time.monotonic()
                with pytest.raises(ServerUnreachable):
                    traffic.writer.put(np.zeros(10), timeout=1.0)
                assert time.monotonic() - began < 15
                network.heal("client")
            elif victim == "from the servers":
                network.part(host, others)
                traffic.until(SOME)
                network.part(host, others, "del")
            else:
                network.cut(host)
                traffic.until(SOME)
                network.heal(host)
            traffic.until(SOME)
    cluster.stop()
