"""How fast arrays pass here: spoolipc beside multiprocessing.Queue and the limit, a warmed SharedMemory ring.

What is measured, and how, is in `benchpair.py`.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import watchdog.version

from .benchlinks import SHM, QueueLink, RingLink, SpoolLink
from .benchpair import MakeLink, Measured, compare

SIZES = (1_000, 16_000, 64_000, 1_000_000, 8_000_000, 54_000_000)
QUICK_SIZES = (1_000, 64_000, 1_000_000, 54_000_000)


@dataclass(frozen=True)
class BenchResult:
    """What `bench` measured, the machine, and the versions in use."""

    machine: dict[str, str]
    results: tuple[Measured, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Times per message, one row for each kind and size, with spoolipc's ratio to each of the others."""
        names = list(dict.fromkeys(one.carrier for one in self.results))
        others = [name for name in names if name != "spoolipc"]
        head = ["", "size", *names, *(f"{name} / spoolipc" for name in others)]
        lines = [_row(head), _row(["---", *["--:"] * (len(head) - 1)])]
        for kind, nbytes in dict.fromkeys((one.kind, one.nbytes) for one in self.results):
            here = {one.carrier: one for one in self.results if (one.kind, one.nbytes) == (kind, nbytes)}
            times = [show_seconds(here[name].median) if name in here else "" for name in names]
            ours = here["spoolipc"].median
            ratios = [f"{here[name].median / ours:.2f}" if name in here else "" for name in others]
            lines.append(_row([kind, show_bytes(nbytes), *times, *ratios]))
        failed = [
            f"{one.carrier}, {show_bytes(one.nbytes)}: {one.error}" for one in self.results if one.error
        ]
        return "\n".join(lines + failed)


def bench(
    directory: str | os.PathLike[str] | None = None,
    *,
    sizes: Sequence[int] | None = None,
    rounds: int | None = None,
    seconds: float | None = None,
    quick: bool = False,
) -> BenchResult:
    """Measure spoolipc, multiprocessing.Queue and the limit, one way and round trip.

    directory: where the spools are made, and removed again; by default /dev/shm where there is one.
    sizes: bytes of the float64 arrays. rounds: times that the carriers take turns. seconds: time that one turn
    should last. quick: fewer sizes, shorter and fewer rounds, wherever these are not given.

    Raises ValueError for a size under 8 bytes, OSError when the directory cannot be written. A carrier that
    fails is reported with its error in the result.
    """
    sizes = tuple(sizes or (QUICK_SIZES if quick else SIZES))
    if min(sizes) < 8:
        raise ValueError(f"the smallest array is one float64 of 8 bytes, not {min(sizes)}")
    if directory is None:
        directory = SHM if os.access(SHM, os.W_OK) else tempfile.gettempdir()
    links: dict[str, MakeLink] = {
        "limit": RingLink,
        "spoolipc": SpoolLink,
        "multiprocessing.Queue": QueueLink,
    }
    results: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="spoolipc-bench-", dir=directory) as scratch:
        for nbytes in sizes:
            with_place = {
                (name, "memory" if name != "spoolipc" else "spool"): make for name, make in links.items()
            }
            results += compare(
                with_place,
                nbytes,
                Path(scratch),
                rounds=rounds or (3 if quick else 5),
                seconds=seconds or (0.05 if quick else 0.2),
            )
    return BenchResult(machine(), tuple(results))


def machine() -> dict[str, str]:
    """The machine and the versions that a result belongs to."""
    models = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((line.split()[1] for line in _lines("/proc/meminfo")), "0")
    return {
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(memory) / 2**20:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "filelock": filelock.__version__,
        "watchdog": ".".join(map(str, (watchdog.version.VERSION_INFO))),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def show_seconds(seconds: float) -> str:
    """A time with its unit, to three figures."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us" if seconds == seconds else "-"


def show_bytes(nbytes: int) -> str:
    """A size with its unit."""
    for unit, scale in (("MB", 1_000_000), ("KB", 1_000)):
        if nbytes >= scale:
            return f"{nbytes / scale:g} {unit}"
    return f"{nbytes} B"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
