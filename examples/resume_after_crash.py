"""A consumer is killed in the middle of its work, and another goes on where it stopped.

The spool is a directory, so what waits in it belongs to no process: it outlives the producer, which is gone
before the first consumer starts, and the consumer, which dies by SIGKILL and cleans nothing up.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from spoolipc import SpoolReader, SpoolWriter


def produce(spool: Path, items: int) -> None:
    with SpoolWriter(spool) as writer:
        for number in range(items):
            writer.put(np.full((256, 256), number, dtype=np.float32))
        writer.shutdown()


def consume(spool: Path, results: Path, dies_after: int | None) -> None:
    """Write a line of results for each item; be killed after `dies_after` of them, the reader still open."""
    with SpoolReader(spool) as reader, results.open("a") as file:
        for done, array in enumerate(reader, start=1):
            print(int(array.mean()), file=file, flush=True)
            if done == dies_after:
                os.kill(os.getpid(), signal.SIGKILL)


def run(function: Callable[..., None], *args: object) -> int | None:
    """Run a function in a process of its own; return 0, or minus the number of the signal that killed it."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=20, help="how many arrays are put (default 20)")
    parser.add_argument(
        "--dies-after", type=int, default=7, help="items the first consumer handles (default 7)"
    )
    options = parser.parse_args()
    if min(options.items, options.dies_after) < 1:
        parser.error("--items and --dies-after must be at least 1")

    with tempfile.TemporaryDirectory(prefix="spoolipc-resume-") as directory:
        spool, results = Path(directory, "spool"), Path(directory, "results")
        print(f"producer ended with {run(produce, spool, options.items)}, {options.items} items are waiting")
        ended = run(consume, spool, results, options.dies_after)
        first = results.read_text().split()
        print(f"first consumer ended with {ended}, it had handled {len(first)}: {' '.join(first)}")
        ended = run(consume, spool, results, None)
        everything = results.read_text().split()
        rest = everything[len(first) :]
        print(f"second consumer ended with {ended}, it handled {len(rest)}: {' '.join(rest)}")
        complete = [int(number) for number in everything] == list(range(options.items))
        print(f"every item handled exactly once, in order: {complete}")
    sys.exit(not complete)


if __name__ == "__main__":
    main()
