"""A DataLoader fed with images by another process: `python -m benchmarks.dataloader`. Needs torch.

The usual way is a dataset that reads a `multiprocessing.Queue`, through which every array is pickled to a worker.
Beside it are `SpoolDataset` with as many workers, and with none: the loop then reads the spool itself. All take turns;
what is told is the median of the rounds in images a second, of which a batch is made of so many.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from spoolipc import SpoolWriter
from spoolipc.torch import SpoolDataset

WORKERS = 2
ROUNDS = 5
IMAGES = {"224 x 224": ((224, 224, 3), 64, 6400), "1080p": ((1080, 1920, 3), 8, 320)}
"""By name: the shape of an image, how many make a batch, and how many pass in a round."""
CONTEXT = multiprocessing.get_context("fork")


class QueueDataset(IterableDataset[Any]):
    """What a queue gives, until it gives None."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def __iter__(self) -> Iterator[Any]:
        while (array := self.queue.get()) is not None:
            yield torch.from_numpy(array)


def images(shape: tuple[int, ...], count: int) -> Iterator[Any]:
    image = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    for _ in range(count):
        yield image


def through_queue(scratch: str, shape: tuple[int, ...], batch: int, count: int, workers: int) -> float:
    """Seconds for all images through a multiprocessing.Queue."""
    queue: Any = CONTEXT.Queue(4 * batch)

    def produce() -> None:
        for image in images(shape, count):
            queue.put(image)
        for _ in range(workers):
            queue.put(None)

    return timed(DataLoader(QueueDataset(queue), batch, num_workers=workers), produce, count)


def through_spool(scratch: str, shape: tuple[int, ...], batch: int, count: int, workers: int) -> float:
    """Seconds for all images through a spool."""

    def produce() -> None:
        with SpoolWriter(scratch, maxsize=4 * batch) as writer:
            for image in images(shape, count):
                writer.put(image)

    return timed(DataLoader(SpoolDataset(scratch), batch, num_workers=workers), produce, count)


def timed(loader: Any, produce: Callable[[], None], count: int) -> float:
    producer = CONTEXT.Process(target=produce)
    start = time.perf_counter()
    producer.start()
    seen = sum(len(batch) for batch in loader)
    seconds = time.perf_counter() - start
    producer.join()
    if seen != count:
        raise RuntimeError(f"{seen} images came, of {count}")
    return seconds


WAYS: dict[str, tuple[Callable[..., float], int]] = {
    f"multiprocessing.Queue, {WORKERS} workers": (through_queue, WORKERS),
    f"SpoolDataset, {WORKERS} workers": (through_spool, WORKERS),
    "SpoolDataset, no workers": (through_spool, 0),
}


def main() -> None:
    torch.set_num_threads(1)
    rates: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for size, (shape, batch, count) in IMAGES.items():
            for way, (measure, workers) in WAYS.items():
                with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
                    seconds = measure(str(Path(scratch, "spool")), shape, batch, count, workers)
                rates.setdefault((way, size), []).append(count / seconds)
    print("| images a second | " + " | ".join(IMAGES) + " |")
    print("|---|" + "--:|" * len(IMAGES))
    for way in WAYS:
        print(
            f"| {way} | " + " | ".join(f"{statistics.median(rates[way, size]):.0f}" for size in IMAGES) + " |"
        )


if __name__ == "__main__":
    main()
