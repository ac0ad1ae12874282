"""How soon a reader that sleeps has what was just put: from the call of put until get has returned."""

from __future__ import annotations

import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from spoolipc import SpoolReader, SpoolWriter

from .crew import together
from .pair import SPAWN

PAUSE = 0.01
"""Seconds between messages, so that the reader has gone to sleep."""


def wake(scratch: Path, count: int) -> dict[str, dict[str, float]]:
    """Seconds from put to got for an idle reader: median, 99th percentile and longest of `count` wake-ups."""
    queue = SPAWN.Queue()
    path = scratch / "wake"
    spool = together((put_spool, (path, count)), (get_spool, (path, count)))[1]
    plain = together((put_queue, (queue, count)), (get_queue, (queue, count)))[1]
    return {"spoolipc": summary(spool), "multiprocessing.Queue": summary(plain)}


def summary(seconds: list[float]) -> dict[str, float]:
    late = np.sort(seconds[10:])
    return {
        "median": float(np.median(late)),
        "p99": float(np.percentile(late, 99)),
        "longest": float(late[-1]),
        "count": len(late),
    }


def put_all(put: Any, gate: Barrier, count: int) -> None:
    gate.wait()
    array = np.zeros(125, np.int64)
    for _ in range(count + 10):
        time.sleep(PAUSE)
        array[0] = time.perf_counter_ns()
        put(array)


def get_all(get: Any, gate: Barrier, count: int) -> list[float]:
    gate.wait()
    late = []
    for _ in range(count + 10):
        array = get()
        late.append((time.perf_counter_ns() - int(array[0])) / 1e9)
    return late


def put_spool(gate: Barrier, path: Path, count: int) -> None:
    with SpoolWriter(path) as writer:
        put_all(writer.put, gate, count)


def get_spool(gate: Barrier, path: Path, count: int) -> list[float]:
    with SpoolReader(path) as reader:
        return get_all(reader.get, gate, count)


def put_queue(gate: Barrier, queue: Any, count: int) -> None:
    put_all(queue.put, gate, count)


def get_queue(gate: Barrier, queue: Any, count: int) -> list[float]:
    return get_all(queue.get, gate, count)
