"""Workers between two queues of arrays, which they turn grey.

`queue_before.py` and `queue_after.py` are one program that differs in the line of an import: whose Queue it is.
Frames of 6 MB go to the workers and grey ones come back. The queues are bounded, so that nobody runs ahead.
"""

from __future__ import annotations

import argparse
import time
from multiprocessing import Process
from typing import Any

import numpy as np

# isort: off
from spoolipc import Queue

SHAPE = (1080, 1920, 3)
AHEAD = 4


def turn_grey(frames: Any, results: Any) -> None:
    """Turn frames grey until None comes."""
    while (frame := frames.get()) is not None:
        results.put((int(frame[0, 0, 0]), frame.mean(axis=2, dtype=np.float32)))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--frames", type=int, default=30, help="how many (default 30)")
    parser.add_argument(
        "--workers", type=int, default=2, help="how many processes turn them grey (default 2)"
    )
    options = parser.parse_args()
    frames: Any = Queue(maxsize=8)
    results: Any = Queue(maxsize=8)
    workers = [Process(target=turn_grey, args=(frames, results)) for _ in range(options.workers)]
    for worker in workers:
        worker.start()
    began, total = time.perf_counter(), 0
    for number in range(options.frames + AHEAD):
        if number < options.frames:
            frames.put(np.full(SHAPE, number, np.uint8))
        if number >= AHEAD:
            index, image = results.get()
            assert (image == index).all()
            total += index
    seconds = time.perf_counter() - began
    for _ in workers:
        frames.put(None)
    for worker in workers:
        worker.join()
    print(f"{options.frames} frames of 6 MB there and grey ones back in {seconds:.2f} s; sum {total}")


if __name__ == "__main__":
    main()
