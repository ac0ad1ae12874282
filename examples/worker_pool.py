"""A pool of workers that loses nothing: one is killed at work, and one item is beyond everybody.

Each worker receives an image, works on it and acknowledges it by leaving the block. The first is killed in the
midst of its second image: another receives that image again, as attempt 2. Image 5 is damaged in a way that
makes the work fail; after three attempts it is a dead letter with its history, and the rest flows.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from spoolipc import SpoolReader, SpoolWriter, failed_list

POISON = 5


def work(spool: Path, results: Connection, dies: bool) -> None:
    """One worker: report (number, attempt) of each image done. `dies`: be killed in the midst of the second."""
    with SpoolReader(spool, lease=60.0) as reader:
        done = 0
        for item in reader.items():  # ends when the spool was shut down and everything in it is settled
            if dies and done == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            number = item.meta["number"]
            try:
                with item:  # acknowledged at its end, requeued with the error when it raises
                    if item.array.max() == 0:
                        raise ValueError(f"image {number} is black")
            except ValueError:
                continue
            results.send((number, item.attempt))
            done += 1
    results.close()


def collect(results: Connection) -> list[tuple[int, int]]:
    """What a worker reports, until it has ended."""
    found = []
    try:
        while True:
            found.append(results.recv())
    except EOFError:
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=40, help="how many images (default 40)")
    parser.add_argument("--workers", type=int, default=3, help="how many processes (default 3)")
    options = parser.parse_args()
    if min(options.images, options.workers) < 2:
        parser.error(
            "--images and --workers must be at least 2: one worker is killed in the midst of its second image"
        )

    processes = get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="spoolipc-pool-") as directory:
        spool = Path(directory, "images")
        with SpoolWriter(spool, max_attempts=3) as writer:
            for number in range(options.images):
                image = np.full((480, 640), 0 if number == POISON else 255, np.uint8)
                writer.put(image, meta={"number": number})
            writer.shutdown()
        workers, ends = [], []
        for number in range(options.workers):
            end, other = processes.Pipe(duplex=False)
            worker = processes.Process(target=work, args=(spool, other, number == 0))
            worker.start()
            other.close()
            workers.append(worker)
            ends.append(end)
            if number == 0:
                end.poll(30)  # it has done its first image, before the others can take them all
        with ThreadPoolExecutor(options.workers) as threads:
            shares = list(threads.map(collect, ends))
        for worker in workers:
            worker.join()
        letters = failed_list(spool)

    done = sorted(number for share in shares for number, _ in share)
    again = sorted(number for share in shares for number, attempt in share if attempt > 1)
    print(f"the first worker ended with {workers[0].exitcode}, others did again: {again}")
    wanted = [number for number in range(options.images) if number != POISON]
    complete = done == wanted
    print(f"every image but the black one was done exactly once: {complete}")
    for letter in letters:
        print(f"dead letter: image {letter.meta['number']}, {letter.attempts} attempts")
        for failure in letter.history:
            print(f"  attempt {failure.attempt}: {failure.why}")
    sys.exit(not complete)


if __name__ == "__main__":
    main()
