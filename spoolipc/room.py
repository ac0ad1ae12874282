"""Whether there is room for an item: `maxsize`, `max_bytes` and the file system's free space."""

from __future__ import annotations

import os

from . import pool
from . import words as W
from .errors import TooLarge
from .party import Party
from .tend import evict

PAGE = 4096
MANY = 1 << 62
"""More items than there will ever be."""


def rounded(size: int) -> int:
    """The size of the file for `size` bytes: whole pages, so that a later item of nearly the size fits too."""
    return (size + PAGE - 1) // PAGE * PAGE


def room(words: memoryview[int], need: int) -> bool:
    """Whether the spool's own limits leave room for `need` bytes; seen without the lock, a hint."""
    maxsize, max_bytes = words[W.MAXSIZE], words[W.MAX_BYTES]
    if maxsize and words[W.READY_COUNT] + words[W.RETURNED_COUNT] + words[W.DELAYED_COUNT] >= maxsize:
        return False
    return not (max_bytes and words[W.ITEM_BYTES] + need > max_bytes)


def places(words: memoryview[int], size: int) -> int:
    """How many more items in files of `size` bytes the spool's own limits allow; likewise a hint."""
    maxsize, max_bytes = words[W.MAXSIZE], words[W.MAX_BYTES]
    left = MANY
    if maxsize:
        left = maxsize - words[W.READY_COUNT] - words[W.RETURNED_COUNT] - words[W.DELAYED_COUNT]
    return min(left, (max_bytes - words[W.ITEM_BYTES]) // size) if max_bytes else left


def fits(party: Party, need: int) -> bool:
    """Whether the file system has `need` bytes free."""
    with party:
        status = os.fstatvfs(party.layout.root)
    return need <= status.f_bavail * status.f_frsize


def refuse_impossible(party: Party, need: int) -> None:
    """Raise TooLarge when `need` bytes could never fit, however long the caller waits."""
    with party:
        status = os.fstatvfs(party.layout.root)
    total, limit = status.f_blocks * status.f_frsize, party.index.words[W.MAX_BYTES]
    if (limit and need > limit) or need > total:
        raise TooLarge(
            f"an item of {need} bytes can never fit into {party.path}: max_bytes is {limit or 'not set'} and the"
            f" file system has {total} bytes ({status.f_bavail * status.f_frsize} free)"
        )


def make_room(party: Party, need: int) -> bool:
    """Unlink pooled files until the file system has `need` bytes; False when that is not enough."""
    index = party.index
    while not fits(party, need):
        record, link = pool.any_pooled(index)
        if not record:
            return False
        evict(party, record, link)
    return room(index.words, need)
