"""Compare two trees of the package: `python -m benchmarks.compare OLD_TREE NEW_TREE`.

Both are measured in one session, in turns: a worker process of one tree does a short batch, then that of the other,
and in the next round the other way round, so that whatever else the machine does meets both. A ratio is that of the
two batches of a round, which are neighbours in time. What counts is the median of the ratios; beside it is where the
middle half of them lies. Workers are started afresh a few times, because how a process happens to lie in memory is
part of its speed.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .measures import NAMES, WAKE

PROGRAM = Path(__file__).with_name("measures.py")
STARTS = 3
"""How often the workers of a measurement are started afresh."""
TIMEOUT = 120.0
PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
Rounds = list[list[float]]
"""The figures of each round in microseconds: one, or one of each of many waits."""


class Worker:
    """A process that makes one measurement of the package of one tree. Raises RuntimeError with what went wrong."""

    def __init__(self, tree: Path, name: str, place: str) -> None:
        self._tree = tree
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM), name, f"{place}/spool"],
            env=os.environ | threads | {"PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def check(self) -> None:
        """Wait until it is ready, and see that it measures the right tree."""
        package = Path(self._answer()).parent
        if package != self._tree / "spoolipc":
            raise RuntimeError(f"{self._tree} was to be measured, not {package}")

    def batch(self) -> list[float]:
        """The figures of one more batch."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        figures: list[float] = self._answer()
        return figures

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT)
        line = self._process.stdout.readline() if ready else '{"error": "no answer"}'
        answer = json.loads(line or '{"error": "the worker ended early"}')
        if isinstance(answer, dict):
            raise RuntimeError(f"{self._tree}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Let it end, and its own processes with it, which wait for it."""
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def measure(trees: tuple[Path, Path], name: str, rounds: int) -> tuple[Rounds, Rounds]:
    """The figures of both trees, in as many rounds, with workers of their own."""
    with ExitStack() as stack:
        workers = []
        for tree in trees:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="spoolipc-compare-", dir=PLACE))
            workers.append(Worker(tree, name, place))
            stack.callback(workers[-1].close)
        for worker in workers:
            worker.check()
        found: tuple[Rounds, Rounds] = [], []
        for number in range(rounds):
            for side in (0, 1) if number % 2 else (1, 0):
                found[side].append(workers[side].batch())
        return found


def compare(trees: tuple[Path, Path], names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Make the measurements, and sum up each; one that fails has an `error` instead of figures."""
    found: dict[str, tuple[Rounds, Rounds]] = {name: ([], []) for name in names}
    errors: dict[str, str] = {}
    for name in tqdm([*names] * STARTS, disable=None, leave=False):
        if name not in errors:
            try:
                for side, more in zip(found[name], measure(trees, name, -(-rounds // STARTS)), strict=True):
                    side.extend(more)
            except (RuntimeError, OSError) as error:
                errors[name] = str(error)
    rows: list[dict[str, Any]] = []
    for name, sides in found.items():
        rows.append({"name": name, "error": errors[name]} if name in errors else summary(name, *sides))
        if name == WAKE and name not in errors:
            rows.append(late(f"{name}, p99", *sides))
    return rows


def summary(name: str, old: Rounds, new: Rounds) -> dict[str, Any]:
    """Medians over the rounds, and the ratio within a round: its median and quartiles."""
    olds, news = (np.array([np.median(figures) for figures in side]) for side in (old, new))
    low, ratio, high = np.percentile(news / olds, (25, 50, 75))
    row = {
        "name": name,
        "old": np.median(olds),
        "new": np.median(news),
        "ratio": ratio,
        "low": low,
        "high": high,
    }
    plain = {key: value if isinstance(value, str) else float(value) for key, value in row.items()}
    return plain | {"rounds": [olds.tolist(), news.tolist()]}


def late(name: str, old: Rounds, new: Rounds) -> dict[str, Any]:
    """The 99th percentile of all waits together."""
    olds, news = (float(np.percentile(np.concatenate(side), 99)) for side in (old, new))
    return {"name": name, "old": olds, "new": news, "ratio": news / olds}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| us | old | new | new / old | middle half |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | failed: {row['error']} | | | |")
            continue
        spread = f"{row['low']:.2f} to {row['high']:.2f}" if "low" in row else ""
        lines.append(
            f"| {row['name']} | {row['old']:,.1f} | {row['new']:,.1f} | {row['ratio']:.3f} | {spread} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("old", type=Path, metavar="OLD_TREE", help="a directory that holds spoolipc/")
    parser.add_argument("new", type=Path, metavar="NEW_TREE")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each side in each measurement (30)")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", default=[""], help="measurements whose name has this"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    names = [name for name in NAMES if any(text in name for text in options.only)]
    began = time.monotonic()
    load = os.getloadavg()[0]
    rows = compare((options.old.resolve(), options.new.resolve()), names, options.rounds)
    print(table(rows))
    print(
        f"\ntook {time.monotonic() - began:.0f} s; load average before {load:.1f}, after {os.getloadavg()[0]:.1f}"
    )
    if options.json:
        options.json.write_text(json.dumps({"command": sys.argv[1:], "results": rows}, indent=1) + "\n")
    raise SystemExit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
