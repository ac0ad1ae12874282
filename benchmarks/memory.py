"""Do the processes, and the pool of consumed files, keep their size over thousands of messages?"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from .carriers.own import SpoolLink
from .pair import WINDOW, Pair

EVERY = 0.05
"""Seconds between two looks."""


def memory(scratch: Path, count: int, nbytes: int = 1_000_000) -> dict[str, Any]:
    """Pass `count` messages after as many as a tenth for warming up; resident bytes of both sides, and bytes in free/.

    resident: anonymous memory, what the process itself took; mapped: pages of files and shared memory.
    """
    pair = Pair(SpoolLink, nbytes, scratch)
    samples: list[dict[str, int]] = []
    try:
        pair.measure("one way", max(1, count // 10), WINDOW)
        samples.append(look(pair, scratch))
        done = threading.Event()
        failed: list[Exception] = []

        def finish() -> None:
            try:
                pair.finish()
            except Exception as error:
                failed.append(error)
            done.set()

        pair.start("one way", count, WINDOW)
        waiter = threading.Thread(target=finish)
        waiter.start()
        while not done.wait(EVERY):
            samples.append(look(pair, scratch))
        waiter.join()
        if failed:
            raise failed[0]
        samples.append(look(pair, scratch))
    finally:
        pair.close()
    first, last = samples[0], samples[-1]
    most = {key: max(sample[key] for sample in samples) for key in first}
    return {
        "count": count,
        "nbytes": nbytes,
        "first": first,
        "last": last,
        "most": most,
        "looks": len(samples),
    }


def look(pair: Pair, scratch: Path) -> dict[str, int]:
    seen = {}
    for name, pid in zip(("producer", "consumer"), pair.pids, strict=True):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = {
            key: int(value.split()[0]) * 1024
            for key, value in (line.split(":", 1) for line in lines)
            if " kB" in value
        }
        seen[f"{name} resident"] = fields["RssAnon"]
        seen[f"{name} mapped"] = fields["RssShmem"] + fields["RssFile"]
    seen["free files"] = seen["free bytes"] = 0
    for file in scratch.glob("*/0/spool/free/*"):
        try:
            seen["free bytes"] += file.stat().st_size
        except FileNotFoundError:
            continue
        seen["free files"] += 1
    return seen
