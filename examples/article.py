"""The experiment of a known article, on real processes: what does it cost to queue a large array?

Each of N workers repeats: two random 500x500 matrices, their product, and one object put on a queue of 100.
The object is a number, or the article's np.zeros((1500, 1500, 3)) of 54 MB; the queue is
multiprocessing.Queue, a spool, or spoolipc.Queue in the place of the first. The consumer checks every object
it gets, and that each came exactly once. The clock runs from the moment all workers are ready until the last
object was checked.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spoolipc import Queue, SpoolReader, SpoolWriter

MAXSIZE = 100
HEAVY = (1500, 1500, 3)
HEAVY_BYTES = 8 * 1500 * 1500 * 3
IN_MEMORY = ("tmpfs", "ramfs")
SPAWN = multiprocessing.get_context("spawn")
Crew = tuple[Barrier, list[SpawnProcess]]


@dataclass(frozen=True)
class Job:
    """One run of the experiment; a spool is made in `place`."""

    title: str
    workers: int
    rounds: int
    heavy: bool
    seed: int
    place: Path


def work(job: Job, worker: int) -> Iterator[Any]:
    """Do one worker's rounds; each yields its object, stamped with a number that no other round has."""
    rng = np.random.default_rng([job.seed, worker])
    for number in range(worker * job.rounds, (worker + 1) * job.rounds):
        rng.random((500, 500)) @ rng.random((500, 500))
        if job.heavy:
            array = np.zeros(HEAVY)
            array[0, 0, 0] = array[-1, -1, -1] = number
            yield array
        else:
            yield number


def check(job: Job, received: Any) -> int:
    """Check an object and return its number: the type, the stamps in both corners, 2,700 zeros between them."""
    array = np.asarray(received)
    number = int(array.flat[0])
    if job.heavy:
        good = array.shape == HEAVY and array.dtype == np.float64
        good = good and array[-1, -1, -1] == number and array[::50, ::50].sum() == number
    else:
        good = array.shape == () and array.dtype == np.int64
    if not good:
        raise SystemExit(f"a damaged object arrived: {array.dtype} {array.shape}, stamped {number}")
    return number


# Each carrier is a pair: what the consumer does, and what each worker does with its objects.


def over_queue(job: Job, make: Callable[[int], Any]) -> float:
    """Measure multiprocessing.Queue, which pickles the object and sends it through a pipe, or what stands for it."""
    carrier = make(MAXSIZE)
    with crew(job, put_on_queue, carrier) as workers:
        return collect(job, carrier.get, workers)


def put_on_queue(job: Job, worker: int, gate: Barrier, carrier: Any) -> None:
    gate.wait()
    for item in work(job, worker):
        carrier.put(item)


def over_spool(job: Job) -> float:
    """Measure the spool. Whoever opens it first sets its limits; the workers take what is there."""
    with tempfile.TemporaryDirectory(prefix="spoolipc-article-", dir=job.place) as directory:
        spool = Path(directory, "spool")
        with (
            SpoolWriter(spool, maxsize=MAXSIZE),
            SpoolReader(spool) as reader,
            crew(job, put_on_spool, spool) as workers,
        ):
            return collect(job, reader.get, workers)


def put_on_spool(job: Job, worker: int, gate: Barrier, spool: Path) -> None:
    with SpoolWriter(spool) as writer:
        gate.wait()
        for item in work(job, worker):
            writer.put(np.asarray(item))


def over_memory(job: Job) -> float:
    """Measure the floor: the worker copies its object once into memory of its own and queues the number."""
    carrier = SPAWN.Queue(MAXSIZE)
    with crew(job, copy_in_memory, carrier) as workers:
        return collect(replace(job, heavy=False), carrier.get, workers)


def copy_in_memory(job: Job, worker: int, gate: Barrier, carrier: Any) -> None:
    own = np.ones(HEAVY if job.heavy else ())
    gate.wait()
    for item in work(job, worker):
        np.copyto(own, item)
        carrier.put(int(own.flat[0]))


CARRIERS: dict[str, tuple[str, Callable[[Job], float]]] = {
    "queue": ("multiprocessing.Queue", partial(over_queue, make=SPAWN.Queue)),
    "spool": ("spoolipc", over_spool),
    "drop-in": ("spoolipc.Queue", partial(over_queue, make=Queue)),
    "floor": ("floor", over_memory),
}


@contextlib.contextmanager
def crew(job: Job, task: Callable[..., None], carrier: Any) -> Iterator[Crew]:
    """Start the workers, which wait at the gate for each other and the consumer; none outlives the block."""
    gate = SPAWN.Barrier(job.workers + 1)
    names = range(job.workers)
    workers = [SPAWN.Process(target=run_worker, args=(job, name, task, gate, carrier)) for name in names]
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is the parent's
    try:
        for process in workers:
            process.start()
        signal.signal(signal.SIGINT, interrupt)
        yield gate, workers
        for process in workers:
            process.join()
    finally:
        signal.signal(signal.SIGINT, interrupt)
        for process in workers:
            if process.is_alive():
                process.terminate()
                process.join()


def run_worker(job: Job, worker: int, task: Callable[..., None], gate: Barrier, carrier: Any) -> None:
    try:
        task(job, worker, gate, carrier)
    except BaseException:
        gate.abort()  # else the others would wait for one that never starts
        raise


def collect(job: Job, get: Callable[..., Any], crew: Crew) -> float:
    """Let the workers go, take and check everything they make, and return the seconds it took."""
    gate, workers = crew
    missing = set(range(job.workers * job.rounds))
    gate.wait(timeout=300)
    began = time.perf_counter()
    with tqdm(desc=job.title, total=len(missing), unit="round", mininterval=0.5) as bar:
        while missing:
            try:
                number = check(job, get(timeout=1))
            except queue.Empty:
                if any(process.exitcode for process in workers):
                    raise SystemExit("a worker failed") from None
                continue
            if number not in missing:
                raise SystemExit(f"object {number} arrived twice, or was never sent")
            missing.remove(number)
            bar.update()
    return time.perf_counter() - began


def file_system(place: Path) -> str:
    """The type of the file system a directory is on, by the mount table."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return max((len(point), kind) for point, kind in mounts if place.resolve().is_relative_to(point))[1]


def free_bytes(place: Path) -> int:
    """The room in a directory; where it is kept in memory, no more than the memory available."""
    free = shutil.disk_usage(place).free
    if file_system(place) in IN_MEMORY:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = min(free, int(meminfo["MemAvailable"].split()[0]) * 1024)
    return free


def choose_place(asked: Path | None, needed: int) -> Path:
    """The directory asked for, else /dev/shm if there is room, else the usual one for temporary files."""
    shm = Path("/dev/shm")
    if asked is None:
        fits = os.access(shm, os.W_OK | os.X_OK) and free_bytes(shm) >= needed
        asked = shm if fits else Path(tempfile.gettempdir())
    free = free_bytes(asked)
    if free < needed:
        raise SystemExit(
            f"{asked} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB may be waiting on the spool: "
            "choose another place with --dir, or fewer --workers"
        )
    return asked


def print_table(seconds: dict[str, list[float]]) -> None:
    print("\n| seconds | the number | 54 MB array | array / number |\n|---|--:|--:|--:|")
    for name, (light, heavy) in seconds.items():
        print(f"| {CARRIERS[name][0]} | {light:.2f} | {heavy:.2f} | {heavy / light:.1f} |")
    for over, under in (("queue", "spool"), ("drop-in", "spool"), ("queue", "floor"), ("spool", "floor")):
        if over in seconds and under in seconds:
            light, heavy = (above / below for above, below in zip(seconds[over], seconds[under], strict=True))
            print(f"| {over} / {under} | {light:.2f} | {heavy:.2f} | |")


def parse() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--workers", type=int, default=16, help="processes that put (default 16, as in the article)")
    add("--rounds", type=int, default=20, help="rounds of each (default 20; the article's are 100)")
    add("--dir", type=Path, help="where the spool is made (default: /dev/shm if all fits, else TMPDIR)")
    add(
        "--carriers",
        nargs="+",
        choices=CARRIERS,
        default=["queue", "spool", "drop-in"],
        help="which ones to measure",
    )
    add("--floor", action="store_true", help="measure the floor too: the array is copied once and not sent")
    add("--seed", type=int, default=0, help="of the random matrices (default 0)")
    options = parser.parse_args()
    if min(options.workers, options.rounds) < 1:
        parser.error("--workers and --rounds must be at least 1")
    options.carriers = dict.fromkeys(options.carriers + ["floor"] * options.floor)
    return options


def main() -> None:
    options = parse()
    for library in ("OMP", "OPENBLAS", "MKL", "BLIS"):
        os.environ[f"{library}_NUM_THREADS"] = "1"  # a worker reads it when it imports NumPy
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleaned up after as Ctrl-C is
    waiting = min(MAXSIZE, options.workers * options.rounds) + options.workers
    place = choose_place(options.dir, waiting * HEAVY_BYTES)
    print(f"{options.workers} workers, {options.rounds} rounds each, {os.cpu_count()} cores")
    medium = "RAM" if file_system(place) in IN_MEMORY else "disk"
    print(f"the spool is made in {place}, which is {medium} ({file_system(place)})", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in options.carriers}
    try:
        for name, measured in seconds.items():
            label, measure = CARRIERS[name]
            for heavy in (False, True):
                title = f"{label}, {'array' if heavy else 'number'}"
                job = Job(title, options.workers, options.rounds, heavy, options.seed, place)
                measured.append(measure(job))
    except threading.BrokenBarrierError:
        sys.exit("a worker could not start")
    except KeyboardInterrupt:
        sys.exit("interrupted: the workers are stopped and the spool is removed")
    print_table(seconds)


if __name__ == "__main__":
    main()
