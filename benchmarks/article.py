"""The article's experiment, by the functions of examples/article.py: what each carrier takes for all of it."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from spoolipc import SpoolReader, SpoolWriter

EXAMPLES = Path(__file__).parent.parent / "examples"


def article(scratch: Path, workers: int, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of the light run (a number a round) and the heavy run (54 MB a round), by carrier.

    The runs of all carriers take turns. multiprocessing.Queue's heavy run is done once, as it takes long.
    """
    for library in ("OMP", "OPENBLAS", "MKL", "BLIS"):
        os.environ[f"{library}_NUM_THREADS"] = "1"
    example = the_example()
    carriers = {**example.CARRIERS, "loan": ("spoolipc, loan", over_loans)}
    rows: dict[tuple[str, bool], list[float]] = {}
    for number in range(repeats):
        for key, (title, measure) in carriers.items():
            for heavy in (False, True):
                if not (key == "queue" and heavy and number):
                    job = example.Job(title, workers, rounds, heavy, number, scratch)
                    rows.setdefault((key, heavy), []).append(measure(job))
    return [
        {"carrier": key, "title": carriers[key][0], "heavy": heavy, "workers": workers, "seconds": seconds}
        for (key, heavy), seconds in rows.items()
    ]


def the_example() -> Any:
    """The module examples/article.py; spawned workers find it on the same path."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module("article")


def over_loans(job: Any) -> float:
    """Measure the spool with workers that make their array in the memory the consumer will see."""
    example = the_example()
    with tempfile.TemporaryDirectory(prefix="spoolipc-article-", dir=job.place) as directory:
        spool = Path(directory, "spool")
        with (
            SpoolWriter(spool, maxsize=example.MAXSIZE),
            SpoolReader(spool) as reader,
            example.crew(job, put_by_loan, spool) as workers,
        ):
            return float(example.collect(job, reader.get, workers))


def put_by_loan(job: Any, worker: int, gate: Barrier, spool: Path) -> None:
    """A worker's rounds as in the example, but for where the array is made."""
    example = the_example()
    rng = np.random.default_rng([job.seed, worker])
    with SpoolWriter(spool) as writer:
        gate.wait()
        for number in range(worker * job.rounds, (worker + 1) * job.rounds):
            rng.random((500, 500)) @ rng.random((500, 500))
            shape, dtype = (example.HEAVY, np.float64) if job.heavy else ((), np.int64)
            with writer.loan(shape, dtype) as array:
                array[...] = 0
                if job.heavy:
                    array[0, 0, 0] = array[-1, -1, -1] = number
                else:
                    array[()] = number
            del array
