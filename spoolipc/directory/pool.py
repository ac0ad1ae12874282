"""Room, and what the pool may hold: decisions, from the words of the table alone."""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from . import table as W
from .table import Words, bucket, record_in

LARGE: Final = 1 << 18
"""Bytes from which mapping a file's pages costs more than looking for one already mapped."""


_MANY: Final = 1 << 62  # more items than there will ever be


_LOOKS: Final = 4  # files of a bucket differ by a fifth: the first or second nearly always fits


_LOOKS_LARGE: Final = 64  # a look costs 0.3 us, the page faults of a large file not mapped yet 0.2 ms a MB


def waiting(words: Words) -> int:
    """How many items wait, delayed ones included."""
    return words[W.READY_LENGTH] + words[W.REDELIVERY_LENGTH] + words[W.DELAYED_COUNT]


def has_room(words: Words, need: int) -> bool:
    """Whether the spool's own limits leave room for `need` bytes; without the lock, a hint."""
    maxsize, max_bytes = words[W.MAXSIZE], words[W.MAX_BYTES]
    if maxsize and words[W.READY_LENGTH] + words[W.REDELIVERY_LENGTH] + words[W.DELAYED_COUNT] >= maxsize:
        return False
    return not (max_bytes and words[W.ITEM_BYTES] + need > max_bytes)


def places(words: Words, size: int) -> int:
    """How many more items in files of `size` bytes the spool's own limits allow; without the lock, a hint."""
    maxsize, max_bytes = words[W.MAXSIZE], words[W.MAX_BYTES]
    left = _MANY
    if maxsize:
        left = maxsize - words[W.READY_LENGTH] - words[W.REDELIVERY_LENGTH] - words[W.DELAYED_COUNT]
    return min(left, (max_bytes - words[W.ITEM_BYTES]) // size) if max_bytes else left


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
    """Whether the pool may hold a file of `size` bytes more: up to `recycle_bytes`, or what a backlog of late took.

    A backlog that comes and goes would otherwise have its files unlinked and made again, which takes 16 writers of
    54 MB, with up to 100 items waiting, twice as long.
    """
    limit, pooled, items = words[W.RECYCLE_BYTES], words[W.POOL_BYTES], words[W.ITEM_BYTES]
    return limit > 0 and (pooled + size <= limit or pooled + items <= max(words[W.PEAK_BYTES], items))


def must_trim(words: Words) -> bool:
    """Whether the pool holds more than it may."""
    pooled = words[W.POOL_BYTES]
    return pooled > words[W.RECYCLE_BYTES] and pooled + words[W.ITEM_BYTES] > words[W.PEAK_BYTES]


def lower_peak(words: Words) -> int:
    """What PEAK_BYTES is after a second: it halves in ten, but not below what is there."""
    peak = words[W.PEAK_BYTES]
    return max(words[W.ITEM_BYTES], peak - (peak >> 4) - 1) if peak else 0


def find_pooled(
    words: Words, size: int, most: int, mapped: Container[int], only_mapped: bool = False
) -> tuple[int, int]:
    """A pooled file of `size` to `most` bytes, as (record, the position that links to it).

    Zeros when none is found in a constant number of looks. mapped: generations of the files whose pages the asker has
    mapped; of large files, such a one is preferred, or with `only_mapped` asked for.
    """
    link = head = bucket(size)
    record = words[head]
    if record and size < LARGE and size <= words[record_in(words, record, W.POOLED) + W.BYTES] <= most:
        return record, head
    found = (0, 0)
    for _ in range(_LOOKS_LARGE if size >= LARGE else _LOOKS):
        record = words[link]
        if not record:
            break
        record_in(words, record, W.POOLED)
        if size <= words[record + W.BYTES] <= most:
            if size < LARGE or words[record + W.GENERATION] in mapped:
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


def largest_pooled(words: Words) -> tuple[int, int]:
    """A pooled file to evict for space, the largest first: (record, link), or zeros."""
    if words[W.POOL_COUNT]:
        for head in range(W.BUCKETS + W.BUCKET_COUNT - 1, W.BUCKETS - 1, -1):
            if words[head]:
                return record_in(words, words[head], W.POOLED), head
    return 0, 0
