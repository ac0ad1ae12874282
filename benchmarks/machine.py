"""The machine a run is made on, and how sizes and times are written."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np

SIZES = (1_000, 16_000, 64_000, 1_000_000, 8_000_000, 54_000_000)
QUICK_SIZES = (1_000, 64_000, 1_000_000, 54_000_000)


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
        "filelock": version("filelock"),
        "watchdog": version("watchdog"),
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
