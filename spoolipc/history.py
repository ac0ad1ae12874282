"""Why deliveries of an item failed: one line of JSON per failure in `failed/SEQ.jsonl`.

The file exists only while there is something to tell: it is removed when the item is acknowledged after all,
and stays beside `failed/SEQ.npy` when the item is given up. It outlives the index, and so does the number of
attempts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from dataclasses import dataclass
from typing import Any

from .errors import UnsafeSpool
from .layout import Layout, item_number
from .ownfile import open_own

_log = logging.getLogger("spoolipc")
_NAME = re.compile(r"(\d{20})\.jsonl")
_LONGEST = 1 << 20
_MOST_ATTEMPTS = 1 << 32


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed delivery. when: wall clock in seconds. who: the reader's process, where known."""

    attempt: int
    when: float
    who: str
    why: str


def history_name(number: int) -> str:
    """The file name of an item's history."""
    return f"{number:020d}.jsonl"


def history_number(name: str) -> int | None:
    """The number in a history's file name, or None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def note(layout: Layout, number: int, attempt: int, who: str, why: str) -> None:
    """Add a failure to an item's history; the caller holds the index lock.

    Where it cannot be written, as on a full file system, the log has it: that must keep nobody from the
    items.
    """
    line = json.dumps({"attempt": attempt, "when": time.time(), "who": who, "why": why[:4096]})
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    try:
        fd = open_own(layout.failed, history_name(number), flags, layout.file_mode)
        try:
            os.write(fd, line.encode() + b"\n")
        finally:
            os.close(fd)
    except OSError as error:
        _log.warning("%s: the history of item %d lacks %s (%s)", layout.path, number, line, error)


def read(layout: Layout, number: int) -> tuple[Failure, ...]:
    """The failures of an item, oldest first; a torn last line is left out."""
    try:
        fd = open_own(layout.failed, history_name(number), os.O_RDONLY)
    except (FileNotFoundError, UnsafeSpool):
        return ()
    with open(fd, "rb") as file:
        lines = file.read(_LONGEST).splitlines()
    return tuple(failure for failure in map(_parse, lines) if failure is not None)


def _parse(line: bytes) -> Failure | None:
    try:
        said: Any = json.loads(line)
        failure = Failure(int(said["attempt"]), float(said["when"]), str(said["who"]), str(said["why"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return failure if 0 <= failure.attempt < _MOST_ATTEMPTS else None


def forget(layout: Layout, number: int) -> None:
    """Remove an item's history: it was delivered after all. What cannot be removed is left to `gc`."""
    with contextlib.suppress(OSError):
        os.unlink(history_name(number), dir_fd=layout.failed)


def failed_numbers(layout: Layout) -> list[int]:
    """The numbers of the items in `failed/`, in order."""
    return sorted(number for number in map(item_number, os.listdir(layout.failed)) if number is not None)


def attempts_of(layout: Layout, numbers: set[int]) -> dict[int, int]:
    """How often each of `numbers` failed, for those that did."""
    found = {}
    for name in os.listdir(layout.failed):
        number = history_number(name)
        if number is not None and number in numbers:
            failures = read(layout, number)
            found[number] = max((failure.attempt for failure in failures), default=0)
    return found
