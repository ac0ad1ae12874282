"""Items of many pieces: what can never fit, and puts that are given up."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import nats
import numpy as np
import pytest
from support.waits import until

from nats_engine.server import Server
from spoolipc import ServerUnreachable, SpoolReader, SpoolWriter, TooLarge, failed_drop, failed_retry, stat
from spoolipc.nats import link
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


def test_pieces_of_a_put_that_is_interrupted_are_gone_before_the_next(
    small_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, url = NatsProducer._pieces, small_server.url("interrupted")

    def interrupted(self: NatsProducer, packed: Any) -> Any:
        for number, request in enumerate(pieces(self, packed)):
            if number == 300:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            yield request

    with SpoolWriter(url, max_bytes=70_000_000) as writer, SpoolReader(url) as reader:
        for _ in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(NatsProducer, "_pieces", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    writer.put(np.zeros(60_000_000, np.uint8))
            writer.put(np.ones(60_000_000, np.uint8), timeout=0)
            assert reader.get(timeout=20).all()
            assert stat(url).bytes == 0


def test_pieces_of_a_dead_letter_are_gone_when_it_is_dropped(small_server: Server) -> None:
    url = small_server.url("dropped")
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        seq = writer.put(np.zeros(100_000))
        reader.receive(timeout=20).reject("no good")
        assert failed_drop(url) == [seq]
        assert stat(url).bytes == 0


@pytest.mark.parametrize("is_dead", [False, True])
def test_item_whose_put_fails_when_it_is_stored_keeps_its_pieces(
    small_server: Server, monkeypatch: pytest.MonkeyPatch, is_dead: bool
) -> None:
    commit, url, array = NatsProducer._commit, small_server.url(f"stored-{is_dead}"), np.arange(1_000_000)

    async def failing(self: NatsProducer, *args: Any) -> Any:
        await commit(self, *args)
        if is_dead:
            await asyncio.to_thread(lambda: reader.receive(timeout=20).reject("no good"))
        raise ServerUnreachable("away")

    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(NatsProducer, "_commit", failing)
            with pytest.raises(ServerUnreachable, match="away"):
                writer.put(array)
        writer.put(np.zeros(1))
        if is_dead:
            assert reader.get(timeout=20).shape == (1,)
            failed_retry(url)
        assert np.array_equal(reader.get(timeout=20), array)


def test_puts_that_failed_cost_the_next_no_more_than_one_try_where_the_server_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(link, "TRY", 1.0)
    server = Server(tmp_path)
    request.addfinalizer(server.stop)
    with SpoolWriter(server.url("hangs")) as writer:
        writer._producer._given_up.update(f"{number:032x}" for number in range(6))  # type: ignore[attr-defined]
        server.hang()
        began = time.monotonic()
        with pytest.raises(ServerUnreachable):
            writer.put(np.zeros(3), timeout=0.1)
        assert time.monotonic() - began < 5
        server.go()
        until(partial(has_put, writer))
        assert not writer._producer._given_up  # type: ignore[attr-defined]


def has_put(writer: SpoolWriter) -> bool:
    with suppress(ServerUnreachable):
        return bool(writer.put(np.zeros(3), timeout=1))
    return False


def test_pieces_of_a_put_that_failed_are_gone_when_its_writer_is_closed(
    small_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they could not be removed at once."""
    url = small_server.url("failed")

    async def failing(self: NatsProducer, *_: Any) -> Any:
        raise ServerUnreachable("away")

    with SpoolWriter(url) as writer, monkeypatch.context() as patch:
        patch.setattr(NatsProducer, "_commit", failing)
        patch.setattr(NatsProducer, "_is_there", failing)
        with pytest.raises(ServerUnreachable, match="away"):
            writer.put(np.zeros(1_000_000))
        assert stat(url).bytes > 8_000_000
    assert stat(url).bytes == 0
