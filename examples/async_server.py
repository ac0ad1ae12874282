"""An asyncio server that lets processes compute: clients send it a number, it answers with the mean of an image.

The server draws the image (1080p, 6 MB) and puts it into one spool, from which worker processes take it; the answers
come back by another. Each request awaits its own answer, beside all others, and a clock in the same loop tells for how
long the longest turn of the loop held it up: what is large is put in a thread, and waiting needs none.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from spoolipc import SpoolReader, SpoolWriter
from spoolipc.aio import AsyncSpoolReader, AsyncSpoolWriter


def work(images: Path, answers: Path) -> int:
    """A worker: the mean of each image, under the number of its request; returns how many it did."""
    done = 0
    with SpoolReader(images) as reader, SpoolWriter(answers) as writer:
        for item in reader.items():
            writer.put(np.array(item.array.mean()), meta=item.meta)
            done += 1
    return done


class Server:
    """Answers each line, a number, with a line: the mean of an image of that number."""

    def __init__(self, images: AsyncSpoolWriter, answers: AsyncSpoolReader) -> None:
        self.images, self.answers = images, answers
        self.awaited: dict[int, asyncio.Future[float]] = {}

    async def hear(self) -> None:
        """Hand each answer to the request that awaits it."""
        while True:
            item = await self.answers.take()
            self.awaited.pop(item.meta).set_result(float(item.array))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client."""
        while line := await reader.readline():
            number, answer = int(line), asyncio.get_running_loop().create_future()
            self.awaited[number] = answer
            image = await asyncio.to_thread(np.full, (1080, 1920, 3), number % 256, np.uint8)
            await self.images.put(image, meta=number)
            writer.write(f"{await answer}\n".encode())
        writer.close()


async def ask(address: tuple[str, int], numbers: range) -> bool:
    """A client: ask for each number; whether all answers were right."""
    reader, writer = await asyncio.open_connection(*address)
    right = True
    for number in numbers:
        writer.write(f"{number}\n".encode())
        right &= float(await reader.readline()) == number % 256
    writer.close()
    return right


async def watch_the_clock() -> float:
    """The longest time, in seconds, for which the loop was held up, until this is cancelled."""
    loop, longest = asyncio.get_running_loop(), 0.0
    try:
        while True:
            before = loop.time()
            await asyncio.sleep(0.001)
            longest = max(longest, loop.time() - before - 0.001)
    except asyncio.CancelledError:
        return longest


async def run(images: Path, answers: Path, clients: int, requests: int) -> tuple[bool, float]:
    """Serve so many clients in this loop; whether all answers were right, and the longest hold-up of the loop."""
    async with AsyncSpoolWriter(images) as writer, AsyncSpoolReader(answers) as reader:
        server = Server(writer, reader)
        async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listening:
            address = listening.sockets[0].getsockname()
            hearing, clock = asyncio.create_task(server.hear()), asyncio.create_task(watch_the_clock())
            asked = [ask(address, range(each, clients * requests, clients)) for each in range(clients)]
            right = all(await asyncio.gather(*asked))
            hearing.cancel()
            clock.cancel()
        await writer.shutdown()
        return right, await clock


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=8, help="how many clients ask at once (default 8)")
    parser.add_argument("--requests", type=int, default=20, help="how many requests each makes (default 20)")
    parser.add_argument("--workers", type=int, default=2, help="how many processes compute (default 2)")
    options = parser.parse_args()
    if min(options.clients, options.requests, options.workers) < 1:
        parser.error("--clients, --requests and --workers must be at least 1")

    with tempfile.TemporaryDirectory(prefix="spoolipc-server-") as directory:
        images, answers = Path(directory, "images"), Path(directory, "answers")
        with SpoolWriter(images, maxsize=8), SpoolWriter(answers):
            pass  # made before either side starts: the first to open sets the limit
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as processes:
            working = [processes.submit(work, images, answers) for _ in range(options.workers)]
            right, longest = asyncio.run(run(images, answers, options.clients, options.requests))
            shares = [worker.result() for worker in working]

    print(f"{options.workers} workers did {sum(shares)} images")
    print(f"the loop was held up for {longest * 1000:.1f} ms at most")
    print(f"{options.clients * options.requests} requests answered, each right: {right}")
    sys.exit(not right)


if __name__ == "__main__":
    main()
