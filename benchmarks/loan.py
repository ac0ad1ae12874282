"""What a round trip costs when nobody copies and nobody reads: loan there, get, loan back, get."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path

from spoolipc import SpoolReader, SpoolWriter

from .crew import together

WARM_UP = 30


def loan(scratch: Path, sizes: Sequence[int], count: int) -> dict[int, float]:
    """Median seconds of a round trip by loans, by the bytes of the float64 array; its first element is set and read."""
    trips = {}
    for nbytes in sizes:
        there, back = scratch / f"there-{nbytes}", scratch / f"back-{nbytes}"
        trips[nbytes] = together((ping, (there, back, nbytes, count)), (pong, (there, back, nbytes, count)))[
            0
        ]
    return trips


def ping(gate: Barrier, there: Path, back: Path, nbytes: int, count: int) -> float:
    with SpoolWriter(there, maxsize=2) as writer, SpoolReader(back, maxsize=2) as reader:
        gate.wait()
        trips = []
        for number in range(WARM_UP + count):
            began = time.perf_counter()
            with writer.loan(nbytes // 8) as array:
                array[0] = number
            del array
            got = reader.get()
            if got[0] != number:
                raise ValueError("another array came back")
            del got
            trips.append(time.perf_counter() - began)
        return statistics.median(trips[WARM_UP:])


def pong(gate: Barrier, there: Path, back: Path, nbytes: int, count: int) -> None:
    with SpoolReader(there, maxsize=2) as reader, SpoolWriter(back, maxsize=2) as writer:
        gate.wait()
        for _ in range(WARM_UP + count):
            got = reader.get()
            number = got[0]
            del got
            with writer.loan(nbytes // 8) as array:
                array[0] = number
            del array
