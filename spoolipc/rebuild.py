"""A lost, torn or outlived index built again from the directories: every file in `items/` is ready.

The new index is written beside the old and renamed over it, so a crash leaves either. Whoever still maps the
old one sees that its file has no name left. What readers had in their hands is delivered again.
"""

from __future__ import annotations

import itertools
import logging
import os
from array import array

from . import bell
from . import words as W
from .changes import turned
from .history import attempts_of, failed_numbers
from .index import NAME, Index, create, install, unlink_missing_ok
from .layout import Layout, Limits, agree, item_name, item_number
from .maps import is_shortage
from .marker import read_shutdown
from .ownfile import open_own

_log = logging.getLogger("spoolipc")
_LEFTOVERS = 4096
DONATED = 2**63
"""Numbers of files that never held an item begin here."""
LAST = 10**18
"""Sequence numbers are below this: a file of a higher number was not put here by this package."""
_MOST_BYTES = 2**44
"""A file that claims more is taken for one of this size, so that sums stay within 64 bits."""


def rebuild(layout: Layout, why: str) -> Index:
    """Build and install the index of `layout`; the caller holds the lock.

    Files in `free/` are unlinked: nobody knows any more who looks at them, and who does keeps the pages. A
    large number of them is left to `gc`. Raises SpoolGone when the directory is gone.
    """
    layout.check_present()
    waiting = sorted(
        number
        for number in map(item_number, os.listdir(layout.items))
        if number is not None and number < LAST
    )
    failed = [number for number in failed_numbers(layout) if number < LAST]
    last = _last_known(layout)
    freed = _clear_free(layout)
    _restore_bells(layout)
    index = _create(layout, len(waiting) * 5 // 4)
    try:
        _fill(index, layout, waiting)
        words = index.words
        words[W.FAILED_COUNT] = len(failed)
        words[W.SHUTDOWN] = read_shutdown(layout)
        known = max([0, *waiting[-1:], *failed, *freed, last])
        words[W.NEXT_SEQ] = words[W.FIRST_SEQ] = known + 1
        words[W.NEXT_SEQ_CHECK] = turned(known + 1)
        set_limits(index, agree(layout, Limits()))
        install(layout, index)
    except BaseException:
        index.close()
        raise
    level = logging.WARNING if known else logging.INFO
    _log.log(level, "%s: %s; built it again with %d items waiting", layout.path, why, len(waiting))
    return index


def _restore_bells(layout: Layout) -> None:
    """Bells are never synced: after a loss of power some may be missing. Without them others wait by polling."""
    try:
        bell.make(layout.parts["bell"], layout.mode)
    except OSError as error:
        _log.warning(
            "%s: the bells are not complete (%s); spoolipc fsck --repair tells more", layout.path, error
        )


def _create(layout: Layout, records: int) -> Index:
    """A new index, in the space of the old where there is no other."""
    try:
        return create(layout, records)
    except OSError as error:
        if not is_shortage(error):
            raise
        unlink_missing_ok(layout.root, NAME)
        return create(layout, records)


def _fill(index: Index, layout: Layout, waiting: list[int]) -> None:
    """Describe the files that wait, in order."""
    words = index.words
    tries = attempts_of(layout, set(waiting))
    position = W.HEADER
    total = 0
    for number in waiting:
        status = os.stat(item_name(number), dir_fd=layout.items, follow_symlinks=False)
        record = [0] * W.RECORD
        record[W.STATE] = W.WAITING
        record[W.NEXT] = position + W.RECORD
        record[W.SEQ] = record[W.FILE] = record[W.BIRTH] = number
        record[W.BYTES] = min(status.st_size, _MOST_BYTES)
        record[W.PUT_TIME] = max(0, status.st_mtime_ns)
        record[W.ATTEMPT] = tries.get(number, 0)
        record[W.FLAGS] = W.DURABLE
        words[position : position + W.RECORD] = array("Q", record)
        total += record[W.BYTES]
        position += W.RECORD
    if waiting:
        words[position - W.RECORD + W.NEXT] = 0
        words[W.READY] = W.HEADER
        words[W.READY_TAIL] = position - W.RECORD
    words[W.READY_COUNT] = len(waiting)
    words[W.EDGE] = position
    words[W.ITEM_BYTES] = total


def set_limits(index: Index, limits: Limits) -> None:
    """Tell the index the limits in force; the caller holds the lock."""
    words = index.words
    words[W.MAXSIZE] = limits.maxsize or 0
    words[W.MAX_BYTES] = limits.max_bytes or 0
    words[W.RECYCLE_BYTES] = limits.recycle_bytes or 0
    words[W.MAX_ATTEMPTS] = limits.max_attempts or 0


def _clear_free(layout: Layout) -> list[int]:
    numbers = []
    with os.scandir(layout.free) as entries:
        for entry in itertools.islice(entries, _LEFTOVERS):
            number = item_number(entry.name)
            if number is not None:
                unlink_missing_ok(layout.free, entry.name)
                if number < DONATED:
                    numbers.append(number)
    return numbers


def _last_known(layout: Layout) -> int:
    """The last sequence number the old index gave out, where it can still be read."""
    try:
        with open(open_own(layout.root, NAME, os.O_RDONLY), "rb") as file:
            words = array("Q", file.read(W.HEADER * W.WORD))
    except (OSError, ValueError):
        return 0
    if len(words) < W.HEADER or (words[W.MAGIC], words[W.VERSION]) != (W.MAGIC_VALUE, W.VERSION_VALUE):
        return 0
    seq = words[W.NEXT_SEQ]
    return seq - 1 if 0 < seq < LAST and words[W.NEXT_SEQ_CHECK] == turned(seq) else 0
