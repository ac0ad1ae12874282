"""Many writers and readers on one spool: does it keep the throughput of one to one, and does nobody starve?"""

from __future__ import annotations

import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from spoolipc import Empty, ShutDown, SpoolReader, SpoolWriter

from .crew import Crew
from .pair import source

LOOK = 0.005
"""Seconds between two looks that measure the wait for the lock."""


def crowd(scratch: Path, writers: int, readers: int, nbytes: int, total: int, maxsize: int) -> dict[str, Any]:
    """Pass `total` arrays; every one is read whole and counted.

    Returns messages per second, the longest wait for the lock, put and get in seconds, and how evenly the
    readers were served (the fewest over the most).
    """
    path = scratch / f"crowd-{writers}-{readers}-{maxsize}-{time.monotonic_ns()}"
    each = total // writers
    jobs = [(put_share, (path, maxsize, writer, each, nbytes)) for writer in range(writers)]
    crew = Crew([*jobs, *[(get_share, (path, maxsize, nbytes))] * readers, (wait_for_lock, (path, maxsize))])
    try:
        puts = crew.results(range(writers))
        with SpoolWriter(path) as last:
            last.shutdown()
        *gets, longest_wait = crew.results(range(writers, writers + readers + 1))
    finally:
        crew.close()
    seen = [stamp for got in gets for stamp in got["seen"]]
    if len(seen) != each * writers or len(set(seen)) != len(seen):
        raise RuntimeError(
            f"{each * writers} were put, {len(seen)} arrived, {len(set(seen))} of them different"
        )
    served = [len(got["seen"]) for got in gets]
    return {
        "writers": writers,
        "readers": readers,
        "maxsize": maxsize,
        "nbytes": nbytes,
        "per_second": len(seen) / (max(got["ended"] for got in gets) - min(put["began"] for put in puts)),
        "longest_lock_wait": longest_wait,
        "longest_put": max(put["longest"] for put in puts),
        "evenness": min(served) / max(served),
    }


def wait_for_lock(gate: Barrier, path: Path, maxsize: int) -> float:
    """Seconds of the longest look at the next item: each takes the lock, and waits for nothing else."""
    longest = 0.0
    with SpoolReader(path, maxsize=maxsize) as spool:
        gate.wait()
        while True:
            time.sleep(LOOK)
            began = time.perf_counter()
            try:
                spool.peek(block=False)
            except Empty:
                pass
            except ShutDown:
                return longest
            longest = max(longest, time.perf_counter() - began)


def put_share(
    gate: Barrier, path: Path, maxsize: int, writer: int, each: int, nbytes: int
) -> dict[str, float]:
    array = source(nbytes)
    longest = 0.0
    with SpoolWriter(path, maxsize=maxsize) as spool:
        gate.wait()
        first = time.perf_counter()
        for number in range(each):
            array[0] = writer * each + number
            began = time.perf_counter()
            spool.put(array)
            longest = max(longest, time.perf_counter() - began)
    return {"began": first, "longest": longest}


def get_share(gate: Barrier, path: Path, maxsize: int, nbytes: int) -> dict[str, Any]:
    rest = source(nbytes)[1:].view(np.uint64).sum()
    seen = []
    ended = 0.0
    with SpoolReader(path, maxsize=maxsize) as spool:
        gate.wait()
        while True:
            try:
                array = spool.get()
            except ShutDown:
                break
            if array[1:].view(np.uint64).sum() != rest:
                raise ValueError("a damaged array arrived")
            seen.append(int(array[0]))
            ended = time.perf_counter()
    return {"seen": seen, "ended": ended}
