"""For how long an event loop is held up while 54 MB arrays pass: `python -m benchmarks.loop`.

A clock in the loop sleeps for half a millisecond again and again, and notes by how much it woke late. The spool is on
`/dev/shm`; the other side is a process with a blocking face.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from spoolipc import SpoolReader, SpoolWriter
from spoolipc.aio import AsyncSpoolReader, AsyncSpoolWriter

ITEMS, SHAPE, NAP = 60, (1500, 1500, 3), 0.5e-3
SPAWN = get_context("spawn")


def put_all(path: Path) -> None:
    array = np.random.default_rng().random(SHAPE)
    with SpoolWriter(path) as writer:
        for _ in range(ITEMS):
            writer.put(array)
        writer.shutdown()


def get_all(path: Path) -> None:
    with SpoolReader(path) as reader:
        for array in reader:
            array[::100].sum()


@contextlib.asynccontextmanager
async def clock(name: str) -> AsyncIterator[None]:
    """Print by how much the loop was late while the block ran."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(NAP)
            late.append((time.perf_counter() - before - NAP) * 1e3)

    ticking, began = asyncio.create_task(tick()), time.perf_counter()
    yield
    each = (time.perf_counter() - began) / ITEMS * 1e3
    ticking.cancel()
    median, most = np.percentile(late, [50, 99])
    print(f"| {name} | {each:.1f} ms | {median:.2f} ms | {most:.2f} ms | {max(late):.2f} ms |", flush=True)


async def put(path: Path) -> None:
    array = np.random.default_rng().random(SHAPE)
    other = SPAWN.Process(target=get_all, args=(path,))
    async with AsyncSpoolWriter(path, maxsize=4) as writer:
        other.start()
        async with clock("put"):
            for _ in range(ITEMS):
                await writer.put(array)
        await writer.shutdown()
    other.join()


async def get(path: Path, copy: bool) -> None:
    other = SPAWN.Process(target=put_all, args=(path,))
    async with AsyncSpoolReader(path, maxsize=4) as reader:
        other.start()
        await reader.wait()
        out = np.empty(SHAPE)
        async with clock("get(out=)" if copy else "get"):
            for _ in range(ITEMS):
                array = await reader.get(out=out if copy else None)
                array[::100].sum()
                del array
    other.join()


async def nothing() -> None:
    async with clock("nothing"):
        await asyncio.sleep(1)


def main() -> None:
    print("| 54 MB | an item | median | p99 | longest |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        asyncio.run(nothing())
        asyncio.run(put(Path(directory, "put")))
        asyncio.run(get(Path(directory, "get"), copy=False))
        asyncio.run(get(Path(directory, "out"), copy=True))


if __name__ == "__main__":
    main()
