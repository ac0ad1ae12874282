"""A camera and its analysts: one process puts frames, several get them, each frame going to one of them.

Each consumer is a loop over the reader, which ends when the camera has shut the spool down and no frame is
left. The frames here are counted ones: every pixel of frame 7 is 7.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from spoolipc import SpoolReader, SpoolWriter


def film(spool: Path, frames: int) -> int:
    """The camera: put every frame, waiting while 8 are unseen, then say that there are no more."""
    with SpoolWriter(spool) as writer:
        for number in range(frames):
            writer.put(np.full((480, 640), number, dtype=np.uint16))
        writer.shutdown()
    return frames


def analyse(spool: Path) -> list[int]:
    """An analyst: look at each frame in place, without a copy, and return the numbers of those it saw."""
    seen = []
    with SpoolReader(spool) as reader:
        for frame in reader:
            assert frame.min() == frame.max(), "a torn frame"
            seen.append(int(frame[0, 0]))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--frames", type=int, default=300, help="how many frames the camera takes (default 300)"
    )
    parser.add_argument("--consumers", type=int, default=3, help="how many processes get them (default 3)")
    options = parser.parse_args()
    if options.frames < 0 or options.consumers < 1:
        parser.error("--frames must be at least 0, and --consumers at least 1")

    with tempfile.TemporaryDirectory(prefix="spoolipc-camera-") as directory:
        spool = Path(directory, "frames")
        with SpoolWriter(
            spool, maxsize=8
        ):  # made before either side starts: the first to open sets the limit
            pass
        with ProcessPoolExecutor(options.consumers + 1, mp_context=get_context("spawn")) as processes:
            analysts = [processes.submit(analyse, spool) for _ in range(options.consumers)]
            filmed = processes.submit(film, spool, options.frames).result()
            shares = [analyst.result() for analyst in analysts]

    for name, share in enumerate(shares):
        print(f"consumer {name} saw {len(share)} frames, in order: {share == sorted(share)}")
    everything = sorted(number for share in shares for number in share)
    complete = everything == list(range(filmed))
    print(f"{filmed} frames taken, each seen exactly once: {complete}")
    sys.exit(not complete)


if __name__ == "__main__":
    main()
