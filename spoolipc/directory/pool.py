"""Room, what the pool may hold, and how it gives way.

The pool is a convenience: it holds no more than half of what the file system would have free without it, and pooled
files are evicted before anybody waits for space.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container
from contextlib import suppress
from typing import Final, TypeVar

from . import fs, transitions
from . import table as W
from .journal import Journal
from .layout import Directories, item_name
from .liveness import has_crashed, process_of
from .table import IndexDamaged, Words, bucket, record_in

T = TypeVar("T")
MOST_EVICTED: Final = 500
"""Files evicted in one step: about 10 ms."""
_PATIENCE: Final = 200  # times the core is given to a reader that looks at an item: some 100 us

LARGE: Final = 1 << 18
"""Bytes from which mapping a file's pages costs more than looking for one already mapped."""


_MANY: Final = 1 << 62  # more items than there will ever be


_LOOKS: Final = 4  # files of a bucket differ by a fifth: the first or second nearly always fits


_LOOKS_LARGE: Final = 64  # a look costs 0.3 us, the page faults of a large file not mapped yet 0.2 ms a MB


_ROOM: Final = W.together(
    *(W.READY_LENGTH, W.ITEM_BYTES, W.REDELIVERY_LENGTH, W.DELAYED_COUNT, W.MAXSIZE, W.MAX_BYTES)
)
_POOL: Final = W.together(
    *(W.ITEM_BYTES, W.POOL_BYTES, W.POOL_COUNT, W.RECYCLE_BYTES, W.SHARE_BYTES, W.SHARE_FILES)
)


def waiting(words: Words) -> int:
    """How many items wait, delayed ones included."""
    return words[W.READY_LENGTH] + words[W.REDELIVERY_LENGTH] + words[W.DELAYED_COUNT]


def has_room(words: Words, need: int) -> bool:
    """Whether the spool's own limits leave room for `need` bytes; without the lock, a hint."""
    maxsize, max_bytes = words[W.MAXSIZE], words[W.MAX_BYTES]
    if maxsize and words[W.READY_LENGTH] + words[W.REDELIVERY_LENGTH] + words[W.DELAYED_COUNT] >= maxsize:
        return False
    return not (max_bytes and words[W.ITEM_BYTES] + need > max_bytes)


def why_full(words: Words, need: int) -> str:
    """Which of the spool's own limits leaves no room for `need` bytes."""
    maxsize, max_bytes = words[W.MAXSIZE], words[W.MAX_BYTES]
    if maxsize and waiting(words) >= maxsize:
        return f"full: {waiting(words)} items wait, maxsize={maxsize}"
    if max_bytes and words[W.ITEM_BYTES] + need > max_bytes:
        return f"full: {words[W.ITEM_BYTES]} bytes taken, max_bytes={max_bytes}, {need} needed"
    return "there was no room just now"


def places(words: Words, size: int) -> int:
    """How many more items in files of `size` bytes the spool's own limits allow; without the lock, a hint."""
    ready, items, redelivered, delayed, maxsize, max_bytes = _ROOM(words)
    left = maxsize - ready - redelivered - delayed if maxsize else _MANY
    return min(left, (max_bytes - items) // size) if max_bytes else left


def is_worth_waking(words: Words) -> bool:
    """Whether there is room enough that a writer who waits for it should be woken: half of `maxsize`.

    A wake-up costs more than a put. With 16 writers blocked, one for each single place took two thirds of all time; a
    writer that is woken for some places fills them one after another. Who waits looks 20 times a second besides.
    """
    maxsize = words[W.MAXSIZE]
    if not maxsize:  # who waits, waits for bytes
        return True
    return maxsize - waiting(words) >= maxsize >> 1


def may_pool(words: Words, size: int) -> bool:
    """Whether the pool may hold a file of `size` bytes more: up to `recycle_bytes`, or what a backlog of late took, but
    no more than its share of the file system.

    A backlog that comes and goes would otherwise have its files unlinked and made again, which takes 16 writers of
    54 MB, with up to 100 items waiting, twice as long.
    """
    items, pooled, count, limit, share_bytes, share_files = _POOL(words)
    if not limit or pooled + size > share_bytes or count >= share_files:
        return False
    return pooled + size <= limit or pooled + items <= max(words[W.PEAK_BYTES], items)


def share(words: Words, free: tuple[int, int]) -> None:
    """Note how much the pool may take of a file system that has so many bytes and files `free`."""
    words[W.SHARE_BYTES] = (free[0] + words[W.POOL_BYTES]) >> 1
    words[W.SHARE_FILES] = (free[1] + words[W.POOL_COUNT]) >> 1


def surplus(words: Words) -> tuple[int, int]:
    """How many bytes, and how many files, the pool holds more than it may."""
    pooled, backlog = words[W.POOL_BYTES], words[W.PEAK_BYTES] - words[W.ITEM_BYTES]
    most = min(max(words[W.RECYCLE_BYTES], backlog), words[W.SHARE_BYTES])
    return max(0, pooled - most), max(0, words[W.POOL_COUNT] - words[W.SHARE_FILES])


def lower_peak(words: Words) -> int:
    """What PEAK_BYTES is after a second: it halves in ten, but not below what is there."""
    peak = words[W.PEAK_BYTES]
    return max(words[W.ITEM_BYTES], peak - (peak >> 4) - 1) if peak else 0


def find_pooled(
    words: Words, size: int, most: int, mapped: Container[int], only_mapped: bool = False
) -> tuple[int, int]:
    """A pooled file of `size` to `most` bytes, as (record, the position that links to it).

    Zeros when none is found in a constant number of looks. mapped: numbers of the files whose pages the asker has
    mapped; of large files, such a one is preferred, or with `only_mapped` asked for.
    """
    link = head = bucket(size)
    found = (0, 0)
    for _ in range(_LOOKS_LARGE if size >= LARGE else _LOOKS):
        record = words[link]
        if not record:
            break
        record_in(words, record, W.POOLED)
        if size <= words[record + W.BYTES] <= most:
            if size < LARGE or words[record + W.FILE] in mapped:
                return record, link
            if not found[0]:
                found = record, link
        link = record + W.NEXT
    if only_mapped:
        return 0, 0
    if found[0]:
        return found
    for higher in range(head + 1, min(head + 5, W.BUCKETS + W.BUCKET_COUNT)):  # up to twice the size
        record = words[higher]
        if record and words[record_in(words, record, W.POOLED) + W.BYTES] <= most:
            return record, higher
    return 0, 0


def linking(words: Words, record: int) -> int:
    """The position that links to a pooled file."""
    link = bucket(words[record + W.BYTES])
    for _ in range(words[W.POOL_COUNT]):
        if words[link] == record:
            return link
        link = record_in(words, words[link], W.POOLED) + W.NEXT
    raise IndexDamaged("a pooled file is in no list")


def largest_pooled(words: Words) -> tuple[int, int]:
    """A pooled file to evict for space, the largest first: (record, link), or zeros."""
    if words[W.POOL_COUNT]:
        for head in range(W.BUCKETS + W.BUCKET_COUNT - 1, W.BUCKETS - 1, -1):
            if words[head]:
                return record_in(words, words[head], W.POOLED), head
    return 0, 0


# Space that a put waits for


def want(words: Words, token: int, size: int) -> None:
    """Note for how many bytes a writer waits that the file system lacks, 0 for none any more; of one that has a place
    among those who wait. A step."""
    for place in range(W.MOST_WAITERS):
        if words[W.TOKENS + place] == token:
            words[W.WANTED + place] = size


def wanted(words: Words) -> int:
    """The most bytes for which a put waits, as the file system lacks them; 0 as a rule. Without the lock, a hint."""
    waits = words[W.SINCES : W.SINCES + W.MOST_WAITERS].tolist()
    sizes = words[W.WANTED : W.WANTED + W.MOST_WAITERS].tolist()
    return max(size for size, since in zip(sizes, waits, strict=True) if since or not size)


def held_by(directories: Directories, words: Words) -> dict[str, int]:
    """Bytes of files that arrays show or writers have reserved, by process. A step."""
    found: dict[str, int] = {}
    for token, size in W.held(words).items():
        process = process_of(directories.alive, token)
        found[process] = found.get(process, 0) + size
    return found


# Giving way


def evict(directories: Directories, journal: Journal, size: int, files: int = 1) -> int:
    """Evict pooled files, the largest first, until they had `size` bytes together and are `files` at least, or there is
    none left; at most MOST_EVICTED. How many. A step."""
    count = 0
    while count < MOST_EVICTED and (size > 0 or count < files):
        record, link = largest_pooled(journal.words)
        if not record:
            break
        size -= journal.words[record + W.BYTES]
        evict_one(directories, journal, record, link)
        count += 1
    return count


def evict_one(directories: Directories, journal: Journal, record: int, link: int) -> None:
    """Unlink a pooled file, and empty it: whoever still maps it would else keep its blocks. A step.

    No array shows a pooled file and nobody writes it. But a reader looks at items before it takes the lock: one that
    was stopped there might go on long after the item was taken by another, and would be ended by SIGBUS. It says so in
    LOOKS while it does; as the file has lost its name, nobody begins to look at it any more. A file that somebody
    locked, as `fsck` does while it reads one, or that has another name, is not emptied either.
    """
    name = item_name(journal.words[record + W.FILE])
    try:
        fd = fs.open_own(directories.free, name, os.O_WRONLY, linked=True)
    except OSError:
        fd = -1
    try:
        journal.commit(transitions.evict(journal.words, record, link))
        with suppress(OSError):
            is_nameless = fd >= 0 and not fs.fstat(fd).st_nlink
            if is_nameless and fs.lock(fd, blocking=False) and _nobody_looks(directories, journal):
                fs.truncate(fd, 0)
    finally:
        if fd >= 0:
            fs.close(fd)


def _nobody_looks(directories: Directories, journal: Journal) -> bool:
    """Whether all looks at items that began before this call have ended. A step."""
    words = journal.words
    for place in range(W.MOST_WAITERS):
        patience = _PATIENCE
        while words[W.LOOKS + place]:
            if not patience:
                if not has_crashed(directories.alive, words[W.TOKENS + place]):
                    return False
                words[W.LOOKS + place] = 0
            patience -= 1
            fs.yield_core()
    return True


def with_room(directories: Directories, journal: Journal | None, work: Callable[[], T]) -> T:
    """What `work` returns, pooled files evicted while the file system has no room for it; none without a journal. A
    step."""
    while True:
        try:
            return work()
        except OSError as error:
            if journal is None or not fs.is_shortage(error) or not evict(directories, journal, 1):
                raise
