"""Setting an item aside, and the history of what failed: one line of JSON a failure in `failed/SEQ.jsonl`.

A dead letter is `failed/SEQ.npy`, or `SEQ.failed.npy` at the top of the spool where `failed/` did not take it, as where
that is full or a file system of its own: an item that has failed stops nobody.

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
from collections.abc import Callable
from typing import Any, Final

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
_ASIDE: Final = ".failed.npy"
_TOP: Final = "."
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
        name, mode = history_name(number), directories.file_mode
        with fs.Closing(fs.open_own(directories.failed, name, flags, mode)) as fd:
            # A crash or a full disk may have ended the last line early: it must not spoil this one.
            end = fs.fstat(fd).st_size
            is_cut = end > 0 and fs.pread(fd, 1, end - 1) != b"\n"
            fs.write_whole(fd, (b"\n" if is_cut else b"") + line.encode() + b"\n")

    try:
        with_room(directories, journal, append)
    except OSError as error:
        directories.say(
            logging.WARNING, "%s: the history of item %d lacks %s (%s)", directories.path, number, line, error
        )


def read_history(directories: Directories, number: int) -> tuple[Failure, ...]:
    """The failures of an item, oldest first; a torn last line is left out, and a file that cannot be read."""
    try:
        text = fs.read_own(directories.failed, history_name(number), _LONGEST)
    except OSError as error:
        if fs.is_own_limit(error):
            raise
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


def aside_number(name: str) -> int | None:
    """The number in the name of a dead letter that `failed/` did not take, or None for any other name."""
    return item_number(name.removesuffix(_ASIDE) + ".npy") if name.endswith(_ASIDE) else None


def letter_at(directories: Directories, number: int) -> tuple[str, str]:
    """Where the dead letter of a number is: the part of the spool, and its name there."""
    aside = f"{number:020d}{_ASIDE}"
    return (_TOP, aside) if fs.exists(directories.root, aside) else ("failed", item_name(number))


def failed_numbers(directories: Directories) -> list[int]:
    """The numbers of the dead letters, in order."""
    found = {*map(item_number, fs.list_names(directories.failed))}
    found.update(map(aside_number, fs.list_names(directories.root)))
    return sorted(number for number in found if number is not None)


def is_known(directories: Directories, number: int) -> bool:
    """Whether there is an item, or a dead letter, of a number: looked for in the order in which it moves."""
    if fs.exists(directories.items, item_name(number)):
        return True
    part, name = letter_at(directories, number)
    return fs.exists(directories.places[part], name)


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
    """Make an item a dead letter: the first that waits, or one in flight or delayed; the caller holds the index lock.

    One that has lost its file, or whose file cannot be moved at all, is only forgotten. The reason is written first: a
    crash after it leaves the item where it was, with one line more in its history.
    """
    seq = journal.words[record + SEQ]
    note_failure(directories, journal, seq, journal.words[record + ATTEMPT], who, why)

    def move(part: str, name: str) -> None:
        with_room(
            directories, journal, lambda: journal.commit(dead_letter(journal.words, record, part, name))
        )

    try:
        is_gone = False
        with contextlib.suppress(OSError):  # else whoever moves it finds out
            is_gone = not fs.exists(directories.items, item_name(seq))
        if is_gone:
            directories.check()  # a move begun would be taken for one that happened
            raise FileNotFoundError(errno.ENOENT, "is not there")
        said = _moved(seq, move)
    except OSError as error:
        if not fs.is_of_file(error):
            raise
        move("", "")
        is_lost = isinstance(error, FileNotFoundError)
        stays = f"cannot be moved ({error.strerror}); it stays where it is, and is delivered no more"
        said = "has no file any more" if is_lost else stays
    directories.say(logging.ERROR, "%s: item %d %s: %s", directories.path, seq, said, why)


def set_file_aside(directories: Directories, number: int, who: str, why: str) -> None:
    """Make a dead letter of the file of an item that no record stands for, or whose record is to be built again."""
    note_failure(directories, None, number, 0, who, why)

    def move(part: str, name: str) -> None:
        place = directories.places[part]
        fs.rename(item_name(number), name, src_dir_fd=directories.items, dst_dir_fd=place)

    said = _moved(number, move)
    directories.say(logging.ERROR, "%s: item %d %s: %s", directories.path, number, said, why)


def _moved(number: int, move: Callable[[str, str], None]) -> str:
    """Move an item's file to `failed/`, or to the top where that does not take it, by `move(part, name)`; what to say.
    Raises OSError where neither can be done."""
    try:
        move("failed", item_name(number))
    except OSError as error:
        if not fs.is_of_file(error):
            raise
        aside = f"{number:020d}{_ASIDE}"
        move(_TOP, aside)
        return f"is now a dead letter as {aside}, which failed/ does not take ({error.strerror})"
    return "is now in failed/"
