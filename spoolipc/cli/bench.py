"""How fast arrays pass between two processes here: by a spool, by multiprocessing.Queue, and at the limit.

The receiving process adds up every byte where it lies, and checks the sum. At most WINDOW arrays are on the way. The
carriers take turns, and the first turn of each is not counted.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import queue
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import cycle, product
from multiprocessing import resource_tracker
from time import perf_counter
from typing import Any

import numpy as np

from spoolipc import SpoolReader, SpoolWriter, __version__
from spoolipc.connect import shown

SIZES, KINDS, WINDOW, TIMEOUT = (1_000, 64_000, 1_000_000, 54_000_000), ("one way", "round trip"), 8, 120.0
SPAWN = multiprocessing.get_context("spawn")
_SIDE: list[Any] = []


class Ring:
    """The limit: slots in shared memory, copied into and read where they are. `get` frees what it gave before."""

    def __init__(self, nbytes: int) -> None:
        self._memory: Any = SPAWN.RawArray(ctypes.c_double, WINDOW * (nbytes // 8))
        self._free, self._filled = SPAWN.Semaphore(WINDOW - 1), SPAWN.Semaphore(0)

    @cached_property
    def _slots(self) -> cycle[Any]:
        return cycle(np.frombuffer(self._memory).reshape(WINDOW, -1))

    def put(self, array: Any) -> None:
        self._free.acquire()
        np.copyto(next(self._slots), array)
        self._filled.release()

    def get(self) -> Any:
        self._free.release()
        self._filled.acquire()
        return next(self._slots)


CARRIERS: dict[str, Callable[[str, int], tuple[Any, Any]]] = {  # the putting and the getting end
    "spoolipc": lambda path, nbytes: (SpoolWriter(path, maxsize=WINDOW), SpoolReader(path)),
    "multiprocessing.Queue": lambda path, nbytes: (SPAWN.Queue(WINDOW),) * 2,
    "limit": lambda path, nbytes: (Ring(nbytes),) * 2,
}


def bench(directory: str | None = None, *, quick: bool = False) -> dict[str, Any]:
    """Measure every carrier at every size (bytes of a float64 array), one way and round trip.

    The spools are made in `directory`, /dev/shm where there is one, and removed again. quick: fewer arrays and turns.
    Raises OSError, and ValueError for a `directory` that cannot be used.
    """
    if directory is not None and not (os.path.isdir(directory) and os.access(directory, os.W_OK)):
        raise ValueError(f"{shown(directory)}: is not a directory that spools can be made in")
    place = directory or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    results: list[dict[str, Any]] = []
    for nbytes in SIZES:
        count = min(max((10**8 if quick else 4 * 10**8) // nbytes, 4), 2_000)
        took: dict[tuple[str, str], list[float]] = {key: [] for key in product(KINDS, CARRIERS)}
        with ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="spoolipc-bench-", dir=place))
            with ThreadPoolExecutor(1) as aside:  # where no signal interrupts what is half started
                started = aside.map(partial(_pair, stack, scratch, nbytes), CARRIERS)
                pairs = dict(zip(CARRIERS, started, strict=True))
            for _, (kind, name) in product(range(3 if quick else 6), took):
                took[kind, name].append(_ask(pairs[name], kind, count))
        for (kind, name), (_, *seconds) in took.items():
            results.append({"carrier": name, "kind": kind, "nbytes": nbytes, "seconds": seconds})
    machine = {"cores": len(os.sched_getaffinity(0)), "kernel": platform.release(), "numpy": np.__version__}
    machine |= {"python": platform.python_version(), "spoolipc": __version__}
    return {"machine": machine, "results": results}


def _pair(stack: ExitStack, scratch: str, nbytes: int, name: str) -> list[Any]:
    """Start the two processes of a carrier; in a thread of its own, as they leave Ctrl-C to the first process."""
    there, back = (CARRIERS[name](f"{scratch}/{name}.{way}", nbytes) for way in ("there", "back"))
    for end in there + back:
        stack.callback(getattr(end, "close", int))
    resource_tracker.ensure_running()  # which changes the mask
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sides = (there[0], back[1], True, nbytes), (back[0], there[1], False, nbytes)
    return [stack.enter_context(SPAWN.Pool(1, _begin, side)) for side in sides]


def _ask(pair: list[Any], kind: str, count: int) -> float:
    """Let a pair of processes pass arrays; returns the seconds of one."""
    said: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for pool in pair:
        pool.apply_async(_pass, (kind == "round trip", count), callback=said.put, error_callback=said.put)
    for _ in pair:
        if isinstance(answer := said.get(timeout=TIMEOUT), BaseException):
            raise OSError(f"an array could not be passed: {answer}") from answer
    return float(answer)


def _begin(*side: Any) -> None:
    _SIDE.extend(side)


def _pass(both: bool, count: int) -> float:
    """Pass `count` arrays, and WINDOW more before and after them, one way or there and back."""
    out, into, leads, nbytes = _SIDE
    array = np.random.default_rng(nbytes).random(nbytes // 8)
    total, times = np.add.reduce(array.view(np.uint64)), []
    for _ in range(count + 2 * WINDOW):
        if leads:
            out.put(array)
        if (both or not leads) and np.add.reduce(into.get().view(np.uint64)) != total:
            raise OSError("a damaged array arrived")
        if both and not leads:
            out.put(array)
        times.append(perf_counter())
    return float(times[-WINDOW - 1] - times[WINDOW - 1]) / count
