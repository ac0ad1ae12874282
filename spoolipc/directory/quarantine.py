"""Setting an item aside, and the history of what failed: one line of JSON a failure in `failed/SEQ.jsonl`.

The history exists only while there is something to tell: it is removed when the item is acknowledged after all, and
stays beside `failed/SEQ.npy` when the item is dead-lettered. It outlives the table, and so does the number of attempts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import time
from typing import Any, Final

from ..errors import UnsafeSpool
from ..message import Failure
from . import fs
from .journal import Journal
from .layout import Directories, item_name, item_number
from .pool import with_room
from .table import ATTEMPT, SEQ
from .transitions import dead_letter

_NAME: Final = re.compile(r"(\d{20})\.jsonl")
_LONGEST: Final = 1 << 20
_LONGEST_REASON: Final = 4096
_REFUSED: Final = (errno.EXDEV, errno.EISDIR, errno.EPERM)  # it would be so again
MOST_ATTEMPTS: Final = 1 << 32


def history_name(number: int) -> str:
    """The file name of an item's history."""
    return f"{number:020d}.jsonl"


def history_number(name: str) -> int | None:
    """The number in a history's file name, or None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def note_failure(
    directories: Directories, journal: Journal | None, number: int, attempt: int, who: str, why: str
) -> None:
    """Add a failure to an item's history; the caller holds the index lock.

    Where it cannot be written, as on a full file system, the log has it: that must keep nobody from the items. journal:
    whose pool gives way first, None while the table is not to be trusted.
    """
    line = json.dumps({"attempt": attempt, "when": time.time(), "who": who, "why": why[:_LONGEST_REASON]})
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT

    def append() -> None:
        fd = fs.open_own(directories.failed, history_name(number), flags, directories.file_mode)
        try:
            # A crash or a full disk may have ended the last line early: it must not spoil this one.
            end = fs.fstat(fd).st_size
            is_cut = end > 0 and fs.pread(fd, 1, end - 1) != b"\n"
            fs.write_whole(fd, (b"\n" if is_cut else b"") + line.encode() + b"\n")
        finally:
            fs.close(fd)

    try:
        if journal is None:
            append()
        else:
            with_room(directories, journal, append)
    except OSError as error:
        directories.say(
            logging.WARNING, "%s: the history of item %d lacks %s (%s)", directories.path, number, line, error
        )


def read_history(directories: Directories, number: int) -> tuple[Failure, ...]:
    """The failures of an item, oldest first; a torn last line is left out, and a file that nobody lets us read."""
    try:
        text = fs.read_own(directories.failed, history_name(number), _LONGEST)
    except (FileNotFoundError, PermissionError, UnsafeSpool):
        return ()
    return tuple(failure for line in text.splitlines() if (failure := _parse(line)) is not None)


def _parse(line: bytes) -> Failure | None:
    try:
        said: Any = json.loads(line)
        failure = Failure(int(said["attempt"]), float(said["when"]), str(said["who"]), str(said["why"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return failure if 0 <= failure.attempt < MOST_ATTEMPTS else None


def forget_history(directories: Directories, number: int) -> None:
    """Remove an item's history: it was delivered after all. What cannot be removed is left to `gc`."""
    with contextlib.suppress(OSError):
        fs.unlink(history_name(number), dir_fd=directories.failed)


def failed_numbers(directories: Directories) -> list[int]:
    """The numbers of the items in `failed/`, in order."""
    names = fs.list_names(directories.failed)
    return sorted(number for number in map(item_number, names) if number is not None)


def attempts_of(directories: Directories, numbers: set[int]) -> dict[int, int]:
    """How often each of `numbers` failed, for those that did."""
    found = {}
    for name in fs.list_names(directories.failed):
        number = history_number(name)
        if number is not None and number in numbers:
            failures = read_history(directories, number)
            found[number] = max((failure.attempt for failure in failures), default=0)
    return found


def set_aside(directories: Directories, journal: Journal, record: int, who: str, why: str) -> None:
    """Move an item to `failed/`: the first that waits, or one in flight or delayed; the caller holds the index lock.

    One that has lost its file is only forgotten. One that `failed/` does not take, as where that is a file system of
    its own, stops nobody: it gets another name in `items/`, which is no item's. The reason is written first: a crash
    after it leaves the item where it was, with one line more in its history.
    """
    words = journal.words
    seq = words[record + SEQ]
    note_failure(directories, journal, seq, words[record + ATTEMPT], who, why)
    there = fs.exists(directories.items, item_name(seq))
    if not there:
        directories.check()
    try:
        journal.commit(dead_letter(words, record, there=there))
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        aside = f"{seq:020d}.failed.npy"
        journal.commit(dead_letter(words, record, there=there, aside=aside))
        what = "%s: item %d is left aside as items/%s, as failed/ does not take it (%s): %s"
        directories.say(logging.ERROR, what, directories.path, seq, aside, error.strerror, why)
        return
    if there:
        directories.say(logging.ERROR, "%s: item %d is now in failed/: %s", directories.path, seq, why)
    else:
        directories.say(logging.ERROR, "%s: item %d has no file any more", directories.path, seq)


def set_file_aside(directories: Directories, number: int, who: str, why: str) -> None:
    """Move the file of an item that no record stands for, or whose record is to be built again, to `failed/`."""
    note_failure(directories, None, number, 0, who, why)
    name = item_name(number)
    fs.rename(name, name, src_dir_fd=directories.items, dst_dir_fd=directories.failed)
    directories.say(logging.ERROR, "%s: item %d is now in failed/: %s", directories.path, number, why)
