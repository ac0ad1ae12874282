"""A table built again from the directories: every file in `items/` is ready.

The new index is written beside the old and renamed over it, so a crash leaves either. Whoever still maps the old one
sees that another file stands at its name. What is in flight at a session that lives stays so where its row in the old
table still checks; everything else waits again, in the order of its numbers. Lost with the old table are delays, the
order of redelivery, and attempts that ended in a crash nobody has noticed yet.

It looks at every item in one locked step, about 10 us each; the log says how long that held up everybody else.
"""

from __future__ import annotations

import itertools
import logging
import time
from array import array
from collections import Counter
from typing import Final

from ..errors import NotASpool
from ..message import Limits
from . import fs
from . import table as W
from .journal import NAME, Journal, create, install, is_of_this_boot, set_limits
from .layout import Directories, agree, item_name, item_number, read_shutdown
from .liveness import has_crashed
from .quarantine import MOST_ATTEMPTS, attempts_of, failed_numbers
from .table import Words, rows

_LEFTOVERS: Final = 4096  # files of free/ unlinked here; more are left to gc, in short steps
_MOST_BYTES: Final = (
    2**44
)  # a file that claims more is taken for one of this size, so that sums stay within 64 bits
_LONGEST_INDEX: Final = 2**34


def rebuild(directories: Directories, why: str) -> Journal:
    """Build and install the index; the caller holds the lock.

    Files in `free/` are unlinked: nobody knows any more who looks at them, and who does keeps the pages. Without
    spool.json the limits are those of the old index. Raises NotASpool where that does not tell them either.
    """
    began = time.monotonic()
    listed = map(item_number, fs.list_names(directories.items))
    waiting = sorted(number for number in listed if number is not None and number < W.LAST_SEQ)
    failed = [number for number in failed_numbers(directories) if number < W.LAST_SEQ]
    old = old_table(directories.root)
    freed = _clear_free(directories)
    journal = _create(directories, len(waiting) * 5 // 4)
    words = journal.words
    _fill(words, directories, waiting, _still_in_flight(directories, old, set(waiting)))
    known = max([0, *waiting[-1:], *failed, *freed, _last_seq(old)])
    words[W.SHUTDOWN] = read_shutdown(directories.root)
    words[W.NEXT_SEQ] = words[W.FIRST_SEQ] = known + 1
    words[W.NEXT_SEQ_CHECK] = known + 1 ^ W.ALL_BITS
    words[W.DONE_TOTAL] = -_in_work(old) & W.ALL_BITS
    set_limits(words, _limits(directories, old))
    install(directories, journal)
    if known:
        what, took = "%s: %s; built it again with %d items, locked for %.1f s", time.monotonic() - began
        directories.say(logging.WARNING, what, directories.path, why, len(waiting), took)
    return journal


def _limits(directories: Directories, old: Words | None) -> Limits:
    try:
        return agree(directories, Limits())
    except NotASpool:
        if old is None:
            raise
        return limits_in(old)


def limits_in(words: Words) -> Limits:
    """The limits as an index tells them, which may be damaged."""
    said = [words[at] for at in (W.MAXSIZE, W.MAX_BYTES, W.RECYCLE_BYTES, W.MAX_ATTEMPTS)]
    return Limits(*(value if value < 2**63 else 0 for value in said))


def _create(directories: Directories, records: int) -> Journal:
    """A new index, in the space of the old where there is no other."""
    try:
        return create(directories, records)
    except OSError as error:
        if not fs.is_shortage(error):
            raise
        fs.unlink_missing_ok(directories.root, NAME)
        return create(directories, records)


def old_table(root: int) -> Words | None:
    """The words of an index, damaged perhaps; None where it cannot be read or is not of this format."""
    try:
        text = fs.read_own(root, NAME, _LONGEST_INDEX)
    except OSError:
        return None
    words: Words = memoryview(text[: len(text) // W.WORD * W.WORD]).cast("Q")
    if len(words) < W.HEADER or (words[W.MAGIC], words[W.VERSION]) != (W.MAGIC_VALUE, W.VERSION_VALUE):
        return None
    return words


def _last_seq(old: Words | None) -> int:
    """The last sequence number the old index gave out, 0 where it does not tell."""
    if old is None:
        return 0
    seq = old[W.NEXT_SEQ]
    return seq - 1 if 0 < seq < W.LAST_SEQ and old[W.NEXT_SEQ_CHECK] == seq ^ W.ALL_BITS else 0


def _in_work(old: Words | None) -> int:
    """Items that the old index knows to be delivered and not said to be done, 0 where it does not tell."""
    count = old[W.DELIVERED_TOTAL] - old[W.DONE_TOTAL] & W.ALL_BITS if old is not None else 0
    return count if count <= _last_seq(old) else 0


def _still_in_flight(directories: Directories, old: Words | None, there: set[int]) -> dict[int, list[int]]:
    """The rows of the items that live sessions have in flight, by number."""
    if old is None or not is_of_this_boot(directories, old):
        return {}
    records = rows(old)
    mine = (records[:, W.STATE] == W.IN_FLIGHT) & (records[:, W.OWNER] > 0)
    mine &= (records[:, W.ATTEMPT] > 0) & (records[:, W.ATTEMPT] < MOST_ATTEMPTS)
    found = records[mine].tolist()
    alive = {owner for owner in {row[W.OWNER] for row in found} if not has_crashed(directories.alive, owner)}
    counts = Counter(row[W.SEQ] for row in found)
    once = {number for number in there if counts[number] == 1}
    return {row[W.SEQ]: row for row in found if row[W.OWNER] in alive and row[W.SEQ] in once}


def _fill(
    words: Words, directories: Directories, waiting: list[int], in_flight: dict[int, list[int]]
) -> None:
    """Describe the files of items/, in order: those in flight in the ACTIVE list, the others in the queue."""
    tries = attempts_of(directories, set(waiting))
    position, total, last_waiting, last_active = W.HEADER, 0, 0, 0
    for number in waiting:
        status = fs.stat_at(item_name(number), dir_fd=directories.items)
        record = [0] * W.RECORD
        record[W.SEQ] = record[W.FILE] = number
        record[W.BYTES] = max(1, min(status.st_size, _MOST_BYTES))
        record[W.PUT_TIME] = max(0, status.st_mtime_ns)
        record[W.FLAGS] = W.NEVER_AGAIN  # nobody knows whether it must survive the loss of power
        old = in_flight.get(number)
        if old is not None:
            record[W.STATE], record[W.PREV] = W.IN_FLIGHT, last_active
            record[W.ATTEMPT], record[W.OWNER], record[W.DUE] = old[W.ATTEMPT], old[W.OWNER], old[W.DUE]
            words[last_active + W.NEXT if last_active else W.ACTIVE] = position
            words[W.IN_FLIGHT_COUNT] += 1
            if old[W.DUE] and (not words[W.NEXT_DUE] or old[W.DUE] < words[W.NEXT_DUE]):
                words[W.NEXT_DUE] = old[W.DUE]
            last_active = position
        else:
            record[W.STATE], record[W.ATTEMPT] = W.WAITING, tries.get(number, 0)
            words[last_waiting + W.NEXT if last_waiting else W.READY.head] = position
            words[W.READY.length] += 1
            last_waiting = position
        words[position : position + W.RECORD] = array("Q", record)
        total += record[W.BYTES]
        position += W.RECORD
    words[W.READY.tail] = last_waiting
    words[W.EDGE] = position
    words[W.ITEM_BYTES] = total


def _clear_free(directories: Directories) -> list[int]:
    numbers = []
    with fs.scan(directories.free) as entries:
        for entry in itertools.islice(entries, _LEFTOVERS):
            number = item_number(entry.name)
            if number is not None:
                directories.remove("free", entry.name)
                if number < W.FIRST_DONATED:
                    numbers.append(number)
    return numbers
