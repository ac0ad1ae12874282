"""Spools on NATS servers beside plain nats-py that moves the same bytes: `python -m benchmarks.servers [--quick]`.

The servers run here, one and then three, each with its data in files. An array is put, and then got, one after the
other: the figures are milliseconds an array, the median. Plain nats-py publishes the bytes as they are, in pieces of a
megabyte, all at once, and waits for the acknowledgements; it fetches them into one array and acknowledges each.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nats
import numpy as np
from nats.js.api import StreamConfig

from spoolipc import ServerUnreachable, SpoolReader, SpoolWriter, StorageError

SIZES = {1_000: 300, 64_000: 200, 1_000_000: 60, 54_000_000: 12}
PIECE = 1_000_000
PROGRAM = Path(sys.executable).with_name("nats-server")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@contextmanager
def servers(count: int) -> Iterator[list[str]]:
    """Servers that run: their hosts and ports."""
    ports, routes = ([free_port() for _ in range(count)] for _ in range(2))
    known = ", ".join(f"nats://127.0.0.1:{port}" for port in routes)
    running = []
    with tempfile.TemporaryDirectory(prefix="spoolipc-nats-") as place:
        for number, (port, route) in enumerate(zip(ports, routes, strict=True)):
            lines = [f"listen: 127.0.0.1:{port}", f"server_name: n{number}"]
            lines += [f'jetstream {{ store_dir: "{place}/{number}" }}']
            if count > 1:
                lines += [f"cluster {{ name: c, listen: 127.0.0.1:{route}, routes: [{known}] }}"]
            config = Path(place, f"{number}.conf")
            config.write_text("\n".join(lines))
            running.append(subprocess.Popen([PROGRAM, "-c", config], stderr=subprocess.DEVNULL))
        try:
            yield [f"127.0.0.1:{port}" for port in ports]
        finally:
            for server in running:
                server.terminate()
            for server in running:
                server.wait()


def opened(url: str) -> SpoolWriter:
    """A writer, as soon as the servers serve."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return SpoolWriter(url)
        except (ServerUnreachable, StorageError):
            if time.monotonic() > deadline:
                raise


def spool(hosts: list[str], size: int, count: int) -> tuple[float, float]:
    """Seconds a put and a get."""
    url = f"nats://{','.join(hosts)}/bench-{size}?replicas={len(hosts)}"
    array, puts, gets = np.ones(size, np.uint8), [], []
    with opened(url) as writer, SpoolReader(url) as reader:
        for _ in range(count):
            began = time.perf_counter()
            writer.put(array)
            put = time.perf_counter()
            found = reader.get()
            puts.append(put - began)
            gets.append(time.perf_counter() - put)
            assert len(found) == size
    return float(np.median(puts)), float(np.median(gets))


async def plain(hosts: list[str], size: int, count: int) -> tuple[float, float]:
    """The same by nats-py alone."""
    client = await nats.connect([f"nats://{host}" for host in hosts])
    stream, name = client.jetstream(), f"plain-{size}"
    config = StreamConfig(name=name, subjects=[name], num_replicas=len(hosts))
    config.retention = "workqueue"  # type: ignore[assignment]
    await stream.add_stream(config)
    subscription = await stream.pull_subscribe(name, "reader")
    data, puts, gets = memoryview(np.ones(size, np.uint8)), [], []
    pieces: list[Any] = [bytes(data[at : at + PIECE]) for at in range(0, size, PIECE)]
    for _ in range(count):
        began = time.perf_counter()
        await asyncio.gather(*[await stream.publish_async(name, piece) for piece in pieces])
        put = time.perf_counter()
        out, at = np.empty(size, np.uint8), 0
        while at < size:
            for msg in await subscription.fetch(len(pieces), timeout=30):
                out[at : at + len(msg.data)] = np.frombuffer(msg.data, np.uint8)
                at += len(msg.data)
                await msg.ack()
        puts.append(put - began)
        gets.append(time.perf_counter() - put)
    await client.close()
    return float(np.median(puts)), float(np.median(gets))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer arrays")
    quick = parser.parse_args().quick
    print("| servers | bytes | spoolipc put | get | nats-py put | get | ratio, one way |")
    print("|---|---|---|---|---|---|---|")
    for nodes in (1, 3):
        with servers(nodes) as hosts:
            for size, usual in SIZES.items():
                count = max(3, usual // 10) if quick else usual
                own = [1e3 * each for each in spool(hosts, size, count)]
                bare = [1e3 * each for each in asyncio.run(plain(hosts, size, count))]
                figures = " | ".join(f"{each:.2f}" for each in (*own, *bare))
                print(f"| {nodes} | {size:,} | {figures} | {sum(bare) / sum(own):.2f} |", flush=True)


if __name__ == "__main__":
    main()
