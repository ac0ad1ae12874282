"""Workers between two queues of arrays. `queue_before.py` and `queue_after.py` differ in the line of the import."""

from __future__ import annotations

import time
from multiprocessing import Process
from typing import Any

import numpy as np

# isort: off
from multiprocessing import Queue

SHAPE = (1080, 1920, 3)
FRAMES = 30


def grey(frames: Any, results: Any) -> None:
    """Turn frames grey until None comes."""
    while (frame := frames.get()) is not None:
        results.put((int(frame[0, 0, 0]), frame.mean(axis=2, dtype=np.float32)))


def main() -> None:
    frames: Any = Queue(maxsize=8)
    results: Any = Queue(maxsize=8)
    workers = [Process(target=grey, args=(frames, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    began = time.perf_counter()
    total = 0
    for number in range(FRAMES + 4):
        if number < FRAMES:
            frames.put(np.full(SHAPE, number, np.uint8))
        if number >= 4:
            index, image = results.get()
            assert image.shape == SHAPE[:2]
            assert image[5, 5] == index
            total += index
    seconds = time.perf_counter() - began
    for _ in workers:
        frames.put(None)
    for worker in workers:
        worker.join()
    print(f"{FRAMES} frames of {np.prod(SHAPE) / 1e6:.0f} MB there and back in {seconds:.2f} s; sum {total}")


if __name__ == "__main__":
    main()
