"""The worker of `benchmarks.compare`: one measurement of the `spoolipc` on its path, a batch for each line it reads.

It is run as a program of its own and imports nothing of this package, so that PYTHONPATH alone says which tree is
measured.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

import spoolipc
from spoolipc import SpoolReader, SpoolWriter

SPAWN = multiprocessing.get_context("spawn")
BATCH = 0.03
"""Seconds that a batch in one process should take."""
WAKES, PAUSE = 50, 0.01
"""Waits in a batch, and seconds before each, in which the reader falls asleep."""
WRITERS, READERS, EACH = 16, 4, 100
"""Processes, and messages of each writer in a batch."""
PATIENCE = 60.0
Batch = Callable[[], list[float]]


def timed(step: Callable[[], object], per: int = 1) -> Batch:
    """A batch of `step`: the mean microseconds of one, or of each of the `per` messages in it."""
    count = 1

    def batch() -> list[float]:
        began = time.perf_counter()
        for _ in range(count):
            step()
        return [(time.perf_counter() - began) * 1e6 / count / per]

    for _ in range(20):  # to the steady state: files go round, mappings are kept
        step()
    count = max(3, int(BATCH * 1e6 / batch()[0] / per))
    return batch


@contextmanager
def alone(path: str, nbytes: int, make: Callable[[SpoolWriter, SpoolReader, Any], Any]) -> Iterator[Batch]:
    """A batch in one process, with a writer and a reader of its own."""
    with SpoolWriter(path, maxsize=128) as writer, SpoolReader(path) as reader:
        array = np.random.default_rng(0).random(nbytes // 8)
        step = make(writer, reader, array)
        yield timed(*step) if isinstance(step, tuple) else timed(step)


def put_get(writer: SpoolWriter, reader: SpoolReader, array: Any) -> Callable[[], object]:
    def step() -> None:
        writer.put(array)
        reader.get()

    return step


def put_meta_get(writer: SpoolWriter, reader: SpoolReader, array: Any) -> Callable[[], object]:
    meta = {"camera": 3, "exposure": 0.004, "taken": "2026-01-01T00:00:00"}

    def step() -> None:
        writer.put(array, meta=meta)
        reader.get()

    return step


def put_get_two(writer: SpoolWriter, reader: SpoolReader, array: Any) -> Callable[[], object]:
    both = {"left": array, "right": array.copy()}

    def step() -> None:
        writer.put(both)
        reader.get()

    return step


def receive_ack(writer: SpoolWriter, reader: SpoolReader, array: Any) -> Callable[[], object]:
    def step() -> None:
        writer.put(array)
        item = reader.receive()
        item.array[:1]
        item.ack()

    return step


def loan_get(writer: SpoolWriter, reader: SpoolReader, array: Any) -> Callable[[], object]:
    def step() -> None:
        with writer.loan(array.shape, array.dtype) as lent:
            lent[0] = 1
        del lent  # else its file is in use, and cannot go round
        reader.get()

    return step


def many(writer: SpoolWriter, reader: SpoolReader, array: Any) -> tuple[Callable[[], object], int]:
    batch = [array] * 64

    def step() -> None:
        writer.put_many(batch)
        got = 0
        while got < 64:
            got += len(reader.get_many(64 - got))

    return step, 64


def child(job: Callable[..., None], *arguments: Any) -> tuple[Any, Any]:
    """A process, and the pipe through which it is told and tells."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=job, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


@contextmanager
def children(*jobs: tuple[Any, ...]) -> Iterator[list[Any]]:
    """The pipes to processes that are ready."""
    started = [child(*job) for job in jobs]
    try:
        pipes = [pipe for _, pipe in started]
        for pipe in pipes:
            pipe.recv()
        yield pipes
    finally:
        for _, pipe in started:
            pipe.close()  # which ends it
        for process, _ in started:
            process.join(10)
            process.kill()
            process.join()


@contextmanager
def wake(path: str) -> Iterator[Batch]:
    """Microseconds from the call of put until a reader that slept has the array, of many."""
    with SpoolWriter(path) as writer, children((sleeper, path)) as (pipe,):

        def batch() -> list[float]:
            pipe.send(WAKES)
            stamp = np.zeros(125, np.int64)
            for _ in range(WAKES):
                time.sleep(PAUSE)
                stamp[0] = time.perf_counter_ns()
                writer.put(stamp)
            return [float(one) for one in pipe.recv()]

        batch()
        yield batch


def sleeper(pipe: Any, path: str) -> None:
    with SpoolReader(path) as reader:
        pipe.send("ready")
        for count in iter_orders(pipe):
            pipe.send(
                [(-int(reader.get(timeout=PATIENCE)[0]) + time.perf_counter_ns()) / 1e3 for _ in range(count)]
            )


def iter_orders(pipe: Any) -> Iterator[Any]:
    try:
        while True:
            yield pipe.recv()
    except EOFError:
        return


@contextmanager
def crowd(path: str) -> Iterator[Batch]:
    """Microseconds a message, 64 KB from 16 writers to 4 readers; an array of one number ends a reader's turn."""
    jobs = [(put_share, path)] * WRITERS + [(get_share, path)] * READERS
    with SpoolWriter(path, maxsize=100) as writer, children(*jobs) as pipes:

        def batch() -> list[float]:
            began = time.perf_counter()
            for pipe in pipes:
                pipe.send(EACH)
            for pipe in pipes[:WRITERS]:
                pipe.recv()
            for _ in range(READERS):
                writer.put(np.zeros(1))
            got = [pipe.recv() for pipe in pipes[WRITERS:]]
            took = time.perf_counter() - began
            if sum(got) != WRITERS * EACH:
                raise RuntimeError(f"{WRITERS * EACH} were put, {sum(got)} arrived")
            return [took * 1e6 / sum(got)]

        batch()
        yield batch


def put_share(pipe: Any, path: str) -> None:
    array = np.random.default_rng(0).random(8_000)
    with SpoolWriter(path) as writer:
        pipe.send("ready")
        for count in iter_orders(pipe):
            for _ in range(count):
                writer.put(array, timeout=PATIENCE)
            pipe.send(count)


def get_share(pipe: Any, path: str) -> None:
    with SpoolReader(path) as reader:
        pipe.send("ready")
        for _ in iter_orders(pipe):
            got = 0
            while (array := reader.get(timeout=PATIENCE)).size > 1:
                array.sum()
                got += 1
            del array
            pipe.send(got)


KB, MB = 1_000, 1_000_000
ALONE: dict[str, tuple[int, Any]] = {
    **{f"put, get, {show}": (size, put_get) for show, size in
       (("1 KB", KB), ("64 KB", 64 * KB), ("1 MB", MB), ("54 MB", 54 * MB))},
    **{f"put with metadata, get, {show}": (size, put_meta_get) for show, size in
       (("1 KB", KB), ("64 KB", 64 * KB), ("1 MB", MB), ("54 MB", 54 * MB))},
    "put, get, a dict of 2 x 32 KB": (32 * KB, put_get_two),
    "put, receive, array, ack, 1 KB": (KB, receive_ack),
    "put, receive, array, ack, 1 MB": (MB, receive_ack),
    "loan, get, 1 KB": (KB, loan_get),
    "loan, get, 64 KB": (64 * KB, loan_get),
    "loan, get, 1 MB": (MB, loan_get),
    "put_many, get_many, 64 x 1 KB": (KB, many),
}  # fmt: skip
"""Bytes of an array, and what one step of a batch is."""
WAKE = "idle reader woken, 1 KB"
PROCESSES = {"16 writers to 4 readers, 64 KB": crowd, WAKE: wake}
NAMES = [*ALONE, *PROCESSES]


def measurement(name: str, path: str) -> AbstractContextManager[Batch]:
    """A measurement by its name, with a spool at `path`."""
    return PROCESSES[name](path) if name in PROCESSES else alone(path, *ALONE[name])


def main(name: str, path: str) -> None:
    """Answer with the package that is measured, and then each line of stdin with the figures of a batch."""
    try:
        with measurement(name, path) as batch:
            print(json.dumps(spoolipc.__file__), flush=True)
            for _ in sys.stdin:
                print(json.dumps(batch()), flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
