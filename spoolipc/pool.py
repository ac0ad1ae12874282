"""What the pool may hold, which of its files to take, and when it pays to wake who waits: decisions, from the words of
the index alone."""

from __future__ import annotations

from collections.abc import Container

from . import words as W
from .index import Index

LARGE = 1 << 18
"""Bytes from which mapping a file's pages costs more than looking for one already mapped."""
_LOOKS = 4
_LOOKS_LARGE = 64


def may_pool(words: memoryview[int], size: int) -> bool:
    """Whether the pool may hold a file of `size` bytes more: up to `recycle_bytes`, or what a backlog of late took.

    A backlog that comes and goes would otherwise have its files unlinked and made again, which takes 16
    writers of 54 MB, with up to 100 items waiting, twice as long.
    """
    limit, pooled, items = words[W.RECYCLE_BYTES], words[W.POOL_BYTES], words[W.ITEM_BYTES]
    return limit > 0 and (pooled + size <= limit or pooled + items <= max(words[W.PEAK_BYTES], items))


def worth_waking(words: memoryview[int]) -> bool:
    """Whether there is room enough that a writer who waits for it should be woken: half of `maxsize`.

    A wake-up costs more than a put. With 16 writers blocked, one for each single place took two thirds of all time;
    a writer that is woken for some places fills them one after another. Who waits looks 20 times a second besides.
    """
    maxsize = words[W.MAXSIZE]
    if not maxsize:  # who waits, waits for bytes
        return True
    left = maxsize - words[W.READY_COUNT] - words[W.RETURNED_COUNT] - words[W.DELAYED_COUNT]
    return left >= maxsize >> 1


def must_trim(words: memoryview[int]) -> bool:
    """Whether the pool holds more than it may."""
    pooled = words[W.POOL_BYTES]
    return pooled > words[W.RECYCLE_BYTES] and pooled + words[W.ITEM_BYTES] > words[W.PEAK_BYTES]


def lower_peak(words: memoryview[int]) -> int:
    """What PEAK_BYTES is after a second: it halves in ten, but not below what is there."""
    peak = words[W.PEAK_BYTES]
    return max(words[W.ITEM_BYTES], peak - (peak >> 4) - 1) if peak else 0


def find_pooled(
    index: Index, head: int, size: int, most: int, mapped: Container[int], *, only_mapped: bool = False
) -> tuple[int, int]:
    """A pooled file of `size` to `most` bytes, as (record, the position that links to it).

    Zeros when none is found in a constant number of looks. head: `words.bucket(size)`.

    mapped: birth numbers of files whose pages the asker has mapped; of large files, such a one is preferred.
    """
    words = index.words
    record = words[head]
    if record and size < LARGE and size <= words[index.record(record, W.POOLED) + W.BYTES] <= most:
        return record, head
    link = head
    found = (0, 0)
    for _ in range(_LOOKS_LARGE if size >= LARGE else _LOOKS):
        record = words[link]
        if not record:
            break
        index.record(record, W.POOLED)
        if size <= words[record + W.BYTES] <= most:
            if size < LARGE or words[record + W.BIRTH] in mapped:
                return record, link
            if not found[0]:
                found = record, link
        link = record + W.NEXT
    if only_mapped:
        return 0, 0
    if found[0]:
        return found
    for higher in range(head + 1, min(head + 5, W.BUCKETS + 192)):
        record = words[higher]
        if record and words[index.record(record, W.POOLED) + W.BYTES] <= most:
            return record, higher
    return 0, 0


def any_pooled(index: Index) -> tuple[int, int]:
    """A pooled file to give up for space, the largest first: (record, link), or zeros."""
    words = index.words
    if words[W.POOL_COUNT]:
        for head in range(W.BUCKETS + 191, W.BUCKETS - 1, -1):
            if words[head]:
                return index.record(words[head], W.POOLED), head
    return 0, 0
