"""Items of many pieces: what can never fit, and puts that are given up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats
import numpy as np
import pytest

from nats_engine.server import Server
from spoolipc import SpoolWriter, TooLarge
from spoolipc.nats.producer import NatsProducer


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Server]:
    """A server on which the account of the user u may have 100 MB in files and 50 MB in memory."""
    account = (
        "{ jetstream: { max_store: 100000000, max_memory: 50000000 }, users: [{ user: u, password: p }] }"
    )
    store = f'jetstream {{ store_dir: "{tmp_path / "store"}" }}'
    server = Server(tmp_path, f"{store}\naccounts {{ a: {account} }}")
    yield server
    server.stop()


def test_item_that_can_never_fit_is_too_large_and_nothing_is_sent(
    limited: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the account may have is known, and what the stream may; what the servers have is told to nobody."""
    address = f"nats://u:p@{limited.address}"

    def never(self: NatsProducer, packed: Any) -> Any:
        raise AssertionError("a piece is sent")

    async def bound(stream: str, size: int) -> None:
        client = await nats.connect(address)
        config = json.loads((await client.request(f"$JS.API.STREAM.INFO.{stream}")).data)["config"]
        asked = json.dumps(config | {"max_bytes": size}).encode()
        said = json.loads((await client.request(f"$JS.API.STREAM.UPDATE.{stream}", asked)).data)
        assert said["config"]["max_bytes"] == size
        await client.close()

    monkeypatch.setattr(NatsProducer, "_pieces", never)
    with (
        SpoolWriter(f"{address}/file") as filed,
        SpoolWriter(f"{address}/memory?storage=memory", checksum=True) as kept,
    ):
        for writer, size in ((filed, 100_000_000), (kept, 50_000_000)):
            with pytest.raises(TooLarge, match=f"can never fit: this account of the servers may have {size}"):
                writer.put(np.broadcast_to(np.uint8(0), (size,)), timeout=5)
            with pytest.raises(TooLarge, match="can never fit: an item on servers may have 274877906944"):
                writer.put(np.broadcast_to(np.uint8(0), (10**13,)), timeout=5)
        asyncio.run(bound("spoolipc-file-items", 60_000_000))
        with pytest.raises(TooLarge, match="can never fit: the stream may have 60000000"):
            filed.put_many([np.zeros(3), np.broadcast_to(np.uint8(0), (70_000_000,))], timeout=5)
        assert filed.qsize() == 1
