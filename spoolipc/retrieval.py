"""What the dead have in their hands, taken out of them a few milliseconds at a time, however much it is."""

from __future__ import annotations

import time
from collections import Counter

from . import changes
from . import words as W
from .census import AnySpool, dead_among
from .index import Index
from .party import Party
from .tend import drop_file, return_item

_STEP = 0.002
"""Seconds after which a locked step that removes files ends."""


def abandoned(spool: AnySpool) -> tuple[Index | None, list[tuple[int, int]]]:
    """The records in the hands of dead parties, those longest there first, each with its owner."""
    index = spool.index
    if index is None:
        return None, []
    words = index.words
    held = [(record, words[record + W.OWNER]) for record in reversed(changes.away(index))]
    dead = dead_among(spool, {owner for _, owner in held if owner})
    return index, [(record, owner) for record, owner in held if owner in dead]


def settle(party: Party, index: Index, records: list[tuple[int, int]]) -> tuple[int, Counter[str]]:
    """Take some of `records` out of dead hands; returns how many were looked at and what became of them."""
    counts: Counter[str] = Counter()
    if party.index is not index:
        return len(records), counts  # rebuilt meanwhile: nothing is in anybody's hands
    words = index.words
    until = time.monotonic() + _STEP
    for done, (record, owner) in enumerate(records):
        if time.monotonic() > until:
            return done, counts
        if words[record + W.OWNER] != owner:
            continue
        if words[record + W.STATE] == W.CLAIMED:
            returned = return_item(party, record, "its reader died", 0)
            counts["returned_items" if returned else "given_up_items"] += 1
        else:
            counts["bytes_freed"] += words[record + W.BYTES]
            counts["abandoned_files"] += 1
            drop_file(party, record)
    return len(records), counts


def foreseen(spool: AnySpool, index: Index, records: list[tuple[int, int]]) -> Counter[str]:
    """What `settle` would do."""
    counts: Counter[str] = Counter()
    words = index.words
    most = words[W.MAX_ATTEMPTS]
    for record, _ in records:
        if words[record + W.STATE] == W.CLAIMED:
            last = most and words[record + W.ATTEMPT] >= most
            counts["given_up_items" if last else "returned_items"] += 1
        else:
            counts["abandoned_files"] += 1
            counts["bytes_freed"] += words[record + W.BYTES]
    return counts
