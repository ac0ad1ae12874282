"""The servers that `benchmarks.servers` measures, and for each the fastest writer and reader that could be written."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nats
import numpy as np
from nats.js.api import StreamConfig

from spoolipc import ServerUnreachable, SpoolReader, SpoolWriter, StorageError

PIECE = 1_000_000
AHEAD = 64_000_000
"""Bytes that are published ahead of the acknowledgements."""
PROGRAM = Path(sys.executable).with_name("nats-server")
RABBIT = "/usr/lib/rabbitmq/bin/rabbitmq-server"


def together(size: int) -> int:
    """How many arrays of so many bytes go at once, where several can."""
    return max(1, min(64, 8_000_000 // size))


def installed(name: str) -> bool:
    if name == "redis":
        return bool(shutil.which("redis-server") and find_spec("redis"))
    if name == "rabbitmq":
        return bool(Path(RABBIT).exists() and find_spec("pika"))
    return True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@contextmanager
def running(commands: list[list[str]], environment: dict[str, str] | None = None) -> Iterator[None]:
    """These programs, each in a process group of its own."""
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | (environment or {}),
        )
        for command in commands
    ]
    try:
        yield
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            process.wait()


def again(work: Callable[[], Any], *errors: type[Exception]) -> Any:
    """What `work` returns, as soon as the servers serve."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return work()
        except errors:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


# NATS


@contextmanager
def nats_servers(count: int) -> Iterator[str]:
    """Servers that run: a URL of all, without a name."""
    ports, routes = ([free_port() for _ in range(count)] for _ in range(2))
    known = ", ".join(f"nats://127.0.0.1:{port}" for port in routes)
    with tempfile.TemporaryDirectory(prefix="spoolipc-nats-") as place:
        commands = []
        for number, (port, route) in enumerate(zip(ports, routes, strict=True)):
            lines = [f"listen: 127.0.0.1:{port}", f"server_name: n{number}"]
            lines += [f'jetstream {{ store_dir: "{place}/{number}" }}']
            if count > 1:
                lines += [f"cluster {{ name: c, listen: 127.0.0.1:{route}, routes: [{known}] }}"]
            config = Path(place, f"{number}.conf")
            config.write_text("\n".join(lines))
            commands.append([str(PROGRAM), "-c", str(config)])
        with running(commands):
            yield f"nats://{','.join(f'127.0.0.1:{port}' for port in ports)}?replicas={count}"


def opened(url: str, maxsize: int | None = None) -> SpoolWriter:
    """A writer, as soon as the servers serve."""
    writer: SpoolWriter = again(lambda: SpoolWriter(url, maxsize=maxsize), ServerUnreachable, StorageError)
    return writer


def prepare(put: Callable[..., None], url: str, size: int) -> None:
    """Make what is put to."""
    if put is put_spool:
        opened(url.replace("?", f"/bench-{size}?")).close()
    elif put is put_plain:
        asyncio.run(_stream(url, size))


def put_spool(url: str, size: int, count: int) -> None:
    array, most = np.ones(size, np.uint8), together(size)
    with SpoolWriter(url.replace("?", f"/bench-{size}?")) as writer:
        for at in range(0, count, most):
            writer.put_many([array] * min(most, count - at))


def get_spool(url: str, size: int, count: int, ready: Any) -> None:
    with SpoolReader(url.replace("?", f"/bench-{size}?")) as reader:
        ready.set()
        while count > 0:
            count -= len(reader.get_many(together(size)))


async def _client(url: str) -> nats.NATS:
    hosts = url.removeprefix("nats://").partition("?")[0].split(",")

    async def quiet(error: Exception) -> None:
        """What does not serve yet is asked again."""

    return await nats.connect([f"nats://{host}" for host in hosts], error_cb=quiet)


async def _stream(url: str, size: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            client = await _client(url)
            config = StreamConfig(name=f"plain-{size}", subjects=[f"plain-{size}"])
            config.num_replicas, config.retention = int(url[-1]), "workqueue"  # type: ignore[assignment]
            await client.jetstream(timeout=10).add_stream(config)
            await client.close()
            return
        except (nats.errors.Error, OSError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


def put_plain(url: str, size: int, count: int) -> None:
    async def run() -> None:
        client = await _client(url)
        stream = client.jetstream()
        data = np.ones(size, np.uint8).tobytes()
        pieces = [data[at : at + PIECE] for at in range(0, size, PIECE)]
        several, most = pieces * count, max(1, min(512, AHEAD // len(pieces[0])))
        for at in range(0, len(several), most):
            await asyncio.gather(
                *[await stream.publish_async(f"plain-{size}", piece) for piece in several[at : at + most]]
            )
        await client.close()

    asyncio.run(run())


def get_plain(url: str, size: int, count: int, ready: Any) -> None:
    async def run() -> None:
        client = await _client(url)
        subscription = await client.jetstream().pull_subscribe(f"plain-{size}", "reader")
        ready.set()
        for _ in range(count if size > PIECE else 1):
            out, at = np.empty(size, np.uint8), 0
            whole = size if size > PIECE else size * count
            while at < whole:
                left = -((at - whole) // min(size, PIECE))
                for msg in await subscription.fetch(min(left, 256), timeout=60):
                    if size > PIECE:
                        out[at : at + len(msg.data)] = np.frombuffer(msg.data, np.uint8)
                    else:
                        out = np.frombuffer(msg.data, np.uint8)
                    at += len(msg.data)
                    await msg.ack()
        await client.flush()
        await client.close()

    asyncio.run(run())


# Redis Streams, in memory alone


@contextmanager
def redis_server(count: int) -> Iterator[str]:
    import redis

    port = free_port()
    with running([["redis-server", "--port", str(port), "--save", "", "--appendonly", "no"]]):
        again(redis.Redis(port=port).ping, redis.ConnectionError)
        yield str(port)


def put_redis(url: str, size: int, count: int) -> None:
    import redis

    client, data = redis.Redis(port=int(url)), np.ones(size, np.uint8).tobytes()
    for at in range(0, count, together(size)):
        with client.pipeline(transaction=False) as several:
            for _ in range(min(together(size), count - at)):
                several.xadd(f"bench-{size}", {"data": data})
            several.execute()


def get_redis(url: str, size: int, count: int, ready: Any) -> None:
    import redis

    client, name = redis.Redis(port=int(url)), f"bench-{size}"
    with suppress(redis.ResponseError):  # it is there
        client.xgroup_create(name, "readers", "$", mkstream=True)
    ready.set()
    while count:
        for _, messages in client.xreadgroup("readers", "a", {name: ">"}, together(size), 10_000):
            for _, fields in messages:
                array = np.empty(size, np.uint8)
                array[:] = np.frombuffer(fields[b"data"], np.uint8)
            numbers = [number for number, _ in messages]
            with client.pipeline(transaction=False) as several:
                several.xack(name, "readers", *numbers)
                several.xdel(name, *numbers)
                several.execute()
            count -= len(messages)


# RabbitMQ, durable


@contextmanager
def rabbit_server(count: int) -> Iterator[str]:
    import pika

    port = free_port()
    with tempfile.TemporaryDirectory(prefix="spoolipc-rabbit-") as place:
        given = {
            "RABBITMQ_NODENAME": f"bench{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": f"{place}/data",
            "RABBITMQ_LOG_BASE": f"{place}/log",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{place}/plugins",
            "RABBITMQ_PID_FILE": f"{place}/pid",
            "HOME": place,
        }
        with running([[RABBIT]], given):
            again(lambda: _rabbit(str(port)).close(), pika.exceptions.AMQPError, OSError)
            yield str(port)


def _rabbit(url: str) -> Any:
    import pika

    return pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", int(url), heartbeat=0))


def put_rabbit(url: str, size: int, count: int) -> None:
    import pika

    connection, data = _rabbit(url), np.ones(size, np.uint8).tobytes()
    channel = connection.channel()
    channel.queue_declare(f"bench-{size}", durable=True)
    channel.confirm_delivery()
    kept = pika.BasicProperties(delivery_mode=2)
    for _ in range(count):
        channel.basic_publish("", f"bench-{size}", data, kept)
    connection.close()


def get_rabbit(url: str, size: int, count: int, ready: Any) -> None:
    connection = _rabbit(url)
    channel = connection.channel()
    channel.queue_declare(f"bench-{size}", durable=True)
    channel.basic_qos(prefetch_count=max(2, together(size)))
    ready.set()
    for method, _, body in channel.consume(f"bench-{size}"):
        array = np.empty(size, np.uint8)
        array[:] = np.frombuffer(body, np.uint8)
        channel.basic_ack(method.delivery_tag)
        count -= 1
        if not count:
            break
    channel.cancel()
    connection.close()
