"""A pipeline of three stages with back-pressure: frames are made, filtered, and summed up, each stage in a process.

Between two stages lies a spool of four items. The last stage is the slowest, so the others wait for it, and no more
than four frames ever lie before it, however many there are. Each stage ends when the writers before it have left.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from spoolipc import SpoolReader, SpoolWriter

MAXSIZE = 4


def make(target: Path, frames: int) -> float:
    """The first stage: frame n is full of n. Returns the seconds it took, most of them waiting."""
    start = time.perf_counter()
    with SpoolWriter(target, maxsize=MAXSIZE) as writer:
        for number in range(frames):
            writer.put(np.full((500, 500), number, np.float32), meta={"number": number})
    return time.perf_counter() - start


def smooth(source: Path, target: Path) -> int:
    """The second stage: take each frame, and put it with every pixel replaced by the mean of its neighbours."""
    done = 0
    with SpoolReader(source, end="writers") as reader, SpoolWriter(target, maxsize=MAXSIZE) as writer:
        for item in reader.items():
            frame = item.array
            neighbours = [np.roll(frame, step, axis) for step in (-1, 1) for axis in (0, 1)]
            writer.put(np.mean(neighbours, axis=0), meta=item.meta)
            done += 1
    return done


def add_up(source: Path, pause: float) -> tuple[list[int], float, int]:
    """The last and slowest stage: the numbers of the frames, the sum of their pixels, and the most that waited."""
    numbers, total, most = [], 0.0, 0
    with SpoolReader(source, end="writers") as reader:
        for item in reader.items():
            most = max(most, reader.qsize())
            numbers.append(item.meta["number"])
            total += float(item.array.mean())
            time.sleep(pause)
    return numbers, total, most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=60, help="how many frames are made (default 60)")
    parser.add_argument(
        "--pause", type=float, default=0.02, help="seconds the last stage takes (default 0.02)"
    )
    options = parser.parse_args()
    if options.frames < 1 or options.pause < 0:
        parser.error("--frames must be at least 1, and --pause at least 0")

    with tempfile.TemporaryDirectory(prefix="spoolipc-stages-") as directory:
        made, smoothed = Path(directory, "made"), Path(directory, "smoothed")
        with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as processes:
            last = processes.submit(add_up, smoothed, options.pause)
            middle = processes.submit(smooth, made, smoothed)
            seconds = processes.submit(make, made, options.frames).result()
            done, (numbers, total, most) = middle.result(), last.result()

    print(
        f"{done} frames went through three stages; making them took {seconds:.1f} s, the last stage sets the pace"
    )
    print(f"at most {most} frames waited before the slow stage, of {MAXSIZE} allowed")
    in_order = numbers == list(range(options.frames))
    print(f"every frame arrived once, in order: {in_order}")
    right = abs(total - sum(range(options.frames))) < 1e-3 * options.frames
    print(f"the means are right: {right}")
    sys.exit(not (in_order and right and most <= MAXSIZE))


if __name__ == "__main__":
    main()
