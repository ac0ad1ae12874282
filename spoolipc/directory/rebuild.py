"""A table built again from the directories: every file in `items/` is ready.

The new index is written beside the old and renamed over it, so a crash leaves either. Whoever still maps the old one
sees that another file stands at its name. What is in flight at a session that lives stays so where its row in the old
table still checks; everything else waits again, in the order of its numbers. Lost with the old table are delays, the
order of redelivery, and attempts that ended in a crash nobody has noticed yet.

It looks at every item in one locked step, about 10 us each.
"""

from __future__ import annotations

import itertools
import logging
from array import array
from typing import Final

import numpy as np

from ..message import Limits
from . import fs
from .journal import NAME, Journal, boot_words, create, install
from .layout import Directories, agree, item_name, item_number, read_shutdown
from .liveness import has_crashed
from .quarantine import MOST_ATTEMPTS, attempts_of, failed_numbers
from .table import (
    ACTIVE,
    ALL_BITS,
    ATTEMPT,
    BOOT,
    BYTES,
    DUE,
    EDGE,
    FAILED_COUNT,
    FILE,
    FIRST_DONATED,
    FIRST_SEQ,
    FLAGS,
    GENERATION,
    HEADER,
    IN_FLIGHT,
    IN_FLIGHT_COUNT,
    ITEM_BYTES,
    LAST_SEQ,
    MAGIC,
    MAGIC_VALUE,
    MAX_ATTEMPTS,
    MAX_BYTES,
    MAXSIZE,
    NEVER_AGAIN,
    NEXT,
    NEXT_DUE,
    NEXT_SEQ,
    NEXT_SEQ_CHECK,
    OWNER,
    PREV,
    PUT_TIME,
    READY,
    RECORD,
    RECYCLE_BYTES,
    SEQ,
    SHUTDOWN,
    STATE,
    VERSION,
    VERSION_VALUE,
    WAITING,
    WORD,
    Words,
    rows,
)

_log = logging.getLogger("spoolipc")
_LEFTOVERS: Final = 4096  # files of free/ unlinked here; more are left to gc, in short steps
_MOST_BYTES: Final = (
    2**44
)  # a file that claims more is taken for one of this size, so that sums stay within 64 bits
_LONGEST_INDEX: Final = 2**34


def rebuild(directories: Directories, why: str) -> Journal:
    """Build and install the index; the caller holds the lock.

    Files in `free/` are unlinked: nobody knows any more who looks at them, and who does keeps the pages. Raises
    SpoolGone when the directory is gone.
    """
    fs.check_present(directories.root, str(directories.path))
    listed = map(item_number, fs.list_names(directories.items))
    waiting = sorted(number for number in listed if number is not None and number < LAST_SEQ)
    failed = [number for number in failed_numbers(directories) if number < LAST_SEQ]
    old = _old_table(directories)
    freed = _clear_free(directories)
    journal = _create(directories, len(waiting) * 5 // 4)
    words = journal.words
    _fill(words, directories, waiting, _still_in_flight(directories, old, set(waiting)))
    known = max([0, *waiting[-1:], *failed, *freed, _last_seq(old)])
    words[FAILED_COUNT] = len(failed)
    words[SHUTDOWN] = read_shutdown(directories.root)
    words[NEXT_SEQ] = words[FIRST_SEQ] = known + 1
    words[NEXT_SEQ_CHECK] = known + 1 ^ ALL_BITS
    set_limits(words, agree(directories, Limits()))
    install(directories, journal)
    if known:
        _log.warning("%s: %s; built it again with %d items", directories.path, why, len(waiting))
    return journal


def set_limits(words: Words, limits: Limits) -> None:
    """Tell the index the limits in force; the caller holds the lock."""
    words[MAXSIZE] = limits.maxsize or 0
    words[MAX_BYTES] = limits.max_bytes or 0
    words[RECYCLE_BYTES] = limits.recycle_bytes or 0
    words[MAX_ATTEMPTS] = limits.max_attempts or 0


def _create(directories: Directories, records: int) -> Journal:
    """A new index, in the space of the old where there is no other."""
    try:
        return create(directories, records)
    except OSError as error:
        if not fs.is_shortage(error):
            raise
        fs.unlink_missing_ok(directories.root, NAME)
        return create(directories, records)


def _old_table(directories: Directories) -> Words | None:
    """The words of the old index, None where it cannot be read or is not of this format and boot."""
    try:
        text = fs.read_own(directories.root, NAME, _LONGEST_INDEX)
    except OSError:
        return None
    words: Words = memoryview(text[: len(text) // WORD * WORD]).cast("Q")
    if len(words) < HEADER or (words[MAGIC], words[VERSION]) != (MAGIC_VALUE, VERSION_VALUE):
        return None
    return words


def _last_seq(old: Words | None) -> int:
    """The last sequence number the old index gave out, 0 where it does not tell."""
    if old is None:
        return 0
    seq = old[NEXT_SEQ]
    return seq - 1 if 0 < seq < LAST_SEQ and old[NEXT_SEQ_CHECK] == seq ^ ALL_BITS else 0


def _still_in_flight(directories: Directories, old: Words | None, there: set[int]) -> dict[int, list[int]]:
    """The rows of the items that live sessions have in flight, by number."""
    if old is None or (old[BOOT], old[BOOT + 1]) != boot_words():
        return {}
    records = rows(old)
    mine = (records[:, STATE] == IN_FLIGHT) & (records[:, SEQ] == records[:, FILE]) & (records[:, OWNER] > 0)
    mine &= (records[:, ATTEMPT] > 0) & (records[:, ATTEMPT] < MOST_ATTEMPTS)
    found = records[mine]
    alive = {
        int(owner) for owner in np.unique(found[:, OWNER]) if not has_crashed(directories.alive, int(owner))
    }
    numbers, counts = np.unique(found[:, SEQ], return_counts=True)
    once = set(numbers[counts == 1].tolist()) & there
    return {row[SEQ]: row for row in found.tolist() if row[OWNER] in alive and row[SEQ] in once}


def _fill(
    words: Words, directories: Directories, waiting: list[int], in_flight: dict[int, list[int]]
) -> None:
    """Describe the files of items/, in order: those in flight in the ACTIVE list, the others in the queue."""
    tries = attempts_of(directories, set(waiting))
    position, total, last_waiting, last_active = HEADER, 0, 0, 0
    for number in waiting:
        status = fs.stat_at(item_name(number), dir_fd=directories.items)
        record = [0] * RECORD
        record[SEQ] = record[FILE] = record[GENERATION] = number
        record[BYTES] = max(1, min(status.st_size, _MOST_BYTES))
        record[PUT_TIME] = max(0, status.st_mtime_ns)
        record[FLAGS] = NEVER_AGAIN  # nobody knows whether it must survive the loss of power
        old = in_flight.get(number)
        if old is not None:
            record[STATE], record[PREV] = IN_FLIGHT, last_active
            record[ATTEMPT], record[OWNER], record[DUE] = old[ATTEMPT], old[OWNER], old[DUE]
            words[last_active + NEXT if last_active else ACTIVE] = position
            words[IN_FLIGHT_COUNT] += 1
            if old[DUE] and (not words[NEXT_DUE] or old[DUE] < words[NEXT_DUE]):
                words[NEXT_DUE] = old[DUE]
            last_active = position
        else:
            record[STATE], record[ATTEMPT] = WAITING, tries.get(number, 0)
            words[last_waiting + NEXT if last_waiting else READY.head] = position
            words[READY.length] += 1
            last_waiting = position
        words[position : position + RECORD] = array("Q", record)
        total += record[BYTES]
        position += RECORD
    words[READY.tail] = last_waiting
    words[EDGE] = position
    words[ITEM_BYTES] = total


def _clear_free(directories: Directories) -> list[int]:
    numbers = []
    with fs.scan(directories.free) as entries:
        for entry in itertools.islice(entries, _LEFTOVERS):
            number = item_number(entry.name)
            if number is not None:
                fs.unlink_missing_ok(directories.free, entry.name)
                if number < FIRST_DONATED:
                    numbers.append(number)
    return numbers
