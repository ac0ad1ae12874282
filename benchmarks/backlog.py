"""What put and get cost when nothing waits, when a thousand items wait, and when very many do."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spoolipc import SpoolReader, SpoolWriter

NBYTES = 1_000
PER_ITEM = 6_000
"""Bytes of memory that a small item takes on /dev/shm, its page and inode."""


def backlog(scratch: Path, waiting: Sequence[int], count: int) -> list[dict[str, float]]:
    """Median seconds of a put and of a get of 1 KB, one after the other, by how many items wait meanwhile."""
    rows = []
    array = np.random.default_rng(0).random(NBYTES // 8)
    path = scratch / "backlog"
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        filled = 0
        for asked in sorted(waiting):
            room = shutil.disk_usage(scratch).free // (2 * PER_ITEM)
            target = min(asked, filled + room, int(os.statvfs(scratch).f_favail * 0.9) or asked)
            began = time.perf_counter()
            for start in range(filled, target, 64):
                writer.put_many([array] * min(64, target - start))
            filling = time.perf_counter() - began
            puts, gets = [], []
            for _ in range(count):
                began = time.perf_counter()
                writer.put(array)
                between = time.perf_counter()
                reader.get()
                gets.append(time.perf_counter() - between)
                puts.append(between - began)
            half = count // 2
            rows.append(
                {
                    "asked": asked,
                    "waiting": target,
                    "put": statistics.median(puts[half:]),
                    "get": statistics.median(gets[half:]),
                    "filling": filling / max(1, target - filled),
                }
            )
            filled = target
    shutil.rmtree(path)
    return rows
