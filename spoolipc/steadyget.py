"""Getting in the steady state: an item like the last one, in a file that came round before.

The counterpart of `steadyput.py`: `get`, and `receive`, the look at the array and `ack`, written out once more in as
few instructions as can be. Where anything is out of the ordinary nothing is done, and the caller goes the general way
(`taking.py`, `claiming.py`). The changes are `changes.get`, `changes.claim` and `changes.leave`, written as rows of
words; a crash leaves the same behind.
"""

from __future__ import annotations

import mmap
import os
import stat
from typing import NamedTuple

import numpy as np

from . import footer, npy
from . import words as W
from .claiming import Claim
from .engine import Array, Delivery
from .errors import BadItem
from .hands import Hands
from .holds import Hold
from .layout import item_name
from .maps import read_small
from .newfile import SMALL
from .party import Party
from .pool import may_pool
from .tend import is_due

_PLAIN = (0, 0, 0)
"""ATTEMPT, FLAGS and LOAN of an item that is nothing special and was never delivered."""
Row = tuple[int, ...]
_TRIES = 3
"""How often to try for an item when other readers are sooner."""


class Seen(NamedTuple):
    """An item as it was seen without the lock: where it is recorded, its row, its array, and who looks at its file."""

    record: int
    row: Row
    array: Array
    hold: Hold | None


def get_again(hands: Hands, limit: int) -> list[Array]:
    """Get the next items, as long as each is a single array like the last one and was never delivered before.

    Returns up to `limit` arrays, perhaps none.
    """
    party = hands.party
    for _ in range(_TRIES):
        words = party.look()
        index, record = party.index, words[W.READY]
        if words[W.RETURNED] or words[W.SHUTDOWN]:
            return []
        seen: list[Seen] = []
        taken: list[Array] = []
        while len(seen) < limit and W.HEADER <= record <= len(words) - W.RECORD:
            row = W.ROW.unpack_from(index.map, record * W.WORD)
            array = open_again(hands, row) if row[W.ATTEMPT : W.END] == _PLAIN else None
            if array is None:
                break
            hold = None if row[W.END] <= SMALL else Hold(index, record, row[W.SEQ])
            seen.append(Seen(record, row, array, hold))
            record = row[W.NEXT]
        if not seen:
            return []
        party.try_run(index, _take, hands, seen, taken)
        if taken:
            if index.is_awaited():
                party.ring("space", len(taken))
                if words[W.READY]:
                    party.ring("items", 1)  # two puts may have rung one bell
            return taken
        if words[W.READY] == seen[0].record:
            return []  # nobody was sooner: something else stands in the way
    return []


def open_again(hands: Hands, row: Row) -> Array | None:
    """The single array in an item's file, read-only: a view of the mapped file, or a copy when it is small.

    row: the item's record. None where the file is not as it should be, or its array not like the last one.
    """
    name, items, end = item_name(row[W.SEQ]), hands.party.layout.items, row[W.END]
    try:
        status = os.stat(name, dir_fd=items, follow_symlinks=False)
    except OSError:
        return None
    if status[6] != row[W.BYTES] or status[3] != 1 or not stat.S_ISREG(status[0]):
        return None
    mapping, small = hands.maps.kept(row[W.BIRTH]), end <= SMALL
    buffer: bytes | mmap.mmap
    if mapping is not None:
        if mapping.identity != status[1:3] or mapping.size != status[6]:
            return None
        buffer = mapping.buffer[: end + footer.SIZE] if small else mapping.buffer
    elif small and not hands.maps.wanted(row[W.BIRTH]):
        try:
            buffer = read_small(items, name, end + footer.SIZE)
        except (OSError, BadItem):
            return None
    else:
        return None
    block = npy.parse_again(buffer, end)
    if block is None or not footer.is_plain(buffer, end):
        return None
    return np.ndarray(block.shape, block.dtype, buffer, block.offset)  # as read-only as the buffer


def _take(party: Party, hands: Hands, seen: list[Seen], taken: list[Array]) -> None:
    """The locked step of a get: take the items that are still the next off the spool, adding them to `taken`."""
    for one in seen:
        if not _take_one(party, hands, *one):
            break
        taken.append(one.array)


def _take_one(party: Party, hands: Hands, record: int, row: Row, array: Array, hold: Hold | None) -> bool:
    """`changes.get`. A crash before the rename leaves the item waiting; after it the file is in hands or pooled, and
    the item gone."""
    index, number, size = party.index, row[W.SEQ], row[W.BYTES]
    words = index.words
    # fmt: off
    seq, check, ready, tail, count, items, pool, pooled, gots, peak, \
        returned, away, shutdown, due, tended, recycle = W.FLOW_TO_GET.unpack_from(index.map, W.FLOW_AT)
    # fmt: on
    if (
        ready != record
        or words[record + W.SEQ] != number
        or words[record + W.STATE] != W.WAITING
        or returned
        or shutdown
        or is_due(tended, due)
        or (pool + size > recycle and not may_pool(words, size))
    ):
        return False
    if tended != hands.maps.swept:
        hands.maps.sweep(words)
    following, done = words[record + W.NEXT], 0
    if hands.holds.pending:
        done = hands.first_to_pool()
        if not done or hold is None:
            return False
    if hold is None:
        positions, values = _pooling(words, record, size)
        pool, pooled = pool + size, pooled + 1
    else:
        positions, values = _entering(words, record, away, done)
        positions += record + W.STATE, record + W.OWNER
        values += W.HELD, party.token
        if done:
            pool, pooled = pool + words[done + W.BYTES], pooled + 1
    tail = tail if following else 0
    flow = seq, check, following, tail, count - 1, items - size, pool, pooled, gots + 1, max(peak, items)
    name, layout = item_name(number), party.layout
    try:
        index.flow(W.LEAVE, number, flow, positions, values, (name, layout.items, name, layout.free))
    except OSError:
        return False
    if done:
        hands.holds.pending.popleft()
    if hold is not None:
        hands.holds.add(hold, (array,))
    return True


def _pooling(words: memoryview[int], record: int, size: int) -> tuple[Row, Row]:
    """The stores, beside those of FLOW, by which a file becomes POOLED: positions and values."""
    head = W.bucket(size)
    return (head, record + W.STATE, record + W.NEXT), (record, W.POOLED, words[head])


def _entering(words: memoryview[int], record: int, away: int, done: int) -> tuple[Row, Row]:
    """The stores that put a record on the list of those in somebody's hands, in the place of `done` if that is a
    file nobody looks at any more, which becomes POOLED; else first, before `away`."""
    after, before = (words[done + W.NEXT], words[done + W.PREV]) if done else (away, 0)
    positions: Row = before + W.NEXT if before else W.AWAY, record + W.NEXT, record + W.PREV
    values: Row = record, after, before
    if after:
        positions += (after + W.PREV,)
        values += (record,)
    if done:
        more, these = _pooling(words, done, words[done + W.BYTES])
        positions, values = positions + more, values + these
    return positions, values


def claim_again(hands: Hands, due: int, taken: list[Delivery]) -> None:
    """Take the next item in hand until `due` (monotonic ns, 0 for no lease) if it was never delivered before."""
    party = hands.party
    words = party.look()
    index, record = party.index, words[W.READY]
    if words[W.RETURNED] or not W.HEADER <= record <= len(words) - W.RECORD:
        return
    row = W.ROW.unpack_from(index.map, record * W.WORD)
    if row[W.ATTEMPT]:
        return
    end = row[W.END]
    claim = Claim(index, record, row[W.SEQ], end)
    delivery = Delivery(claim.seq, 1, row[W.PUT_TIME] if end else 0, row[W.BYTES], claim)
    party.try_run(index, _claim, hands, due, delivery, taken)
    if taken and index.is_awaited():
        party.ring("space", 1)
        if words[W.READY]:
            party.ring("items", 1)


def _claim(party: Party, hands: Hands, due: int, delivery: Delivery, taken: list[Delivery]) -> None:
    """`changes.claim` if the item is still the next, and the pooling of a file that no array looks at any more."""
    claim: Claim = delivery.handle
    index, record = claim.index, claim.record
    words = index.words
    # fmt: off
    seq, check, ready, tail, count, items, pool, pooled, gots, peak, \
        returned, away, shutdown, next_due, tended, _ = W.FLOW_TO_GET.unpack_from(index.map, W.FLOW_AT)
    # fmt: on
    if (
        ready != record
        or words[record + W.SEQ] != delivery.seq
        or words[record + W.STATE] != W.WAITING
        or returned
        or shutdown
        or is_due(tended, next_due)
    ):
        return
    done = 0
    if hands.holds.pending:
        done = hands.first_to_pool()
        if not done:
            return
        pool, pooled = pool + words[done + W.BYTES], pooled + 1
    following = words[record + W.NEXT]
    positions, values = _entering(words, record, away, done)
    positions += record + W.STATE, record + W.OWNER, record + W.DUE, record + W.ATTEMPT, W.IN_FLIGHT
    values += W.CLAIMED, party.token, due, 1, words[W.IN_FLIGHT] + 1
    if due and not 0 < next_due <= due:
        positions += (W.NEXT_DUE,)
        values += (due,)
    tail = tail if following else 0
    flow = seq, check, following, tail, count - 1, items, pool, pooled, gots, peak
    taken.append(delivery)  # first, so that it is put down whenever a signal comes
    index.flow(W.MEMORY, 0, flow, positions, values, None)
    if done:
        hands.holds.pending.popleft()


def ack_again(hands: Hands, delivery: Delivery) -> bool:
    """Acknowledge an item at its first delivery whose array was loaded; False, with nothing done, where anything stands
    in the way."""
    done: list[bool] = []
    claim: Claim = delivery.handle
    party = hands.party
    if claim.single and not party.closed:
        party.try_run(claim.index, _ack, hands, delivery, done)
    return bool(done)


def _ack(party: Party, hands: Hands, delivery: Delivery, done: list[bool]) -> None:
    """`changes.leave`. A crash before the rename leaves the item claimed by the dead, after it it is gone."""
    claim: Claim = delivery.handle
    index, record, hold = claim.index, claim.record, claim.hold
    words = index.words
    # fmt: off
    seq, check, ready, tail, count, items, pool, pooled, gots, peak, \
        _, _, shutdown, _, _, recycle = W.FLOW_TO_GET.unpack_from(index.map, W.FLOW_AT)
    # fmt: on
    row = W.ROW.unpack_from(index.map, record * W.WORD)
    size, number = row[W.BYTES], row[W.SEQ]
    if (
        shutdown
        or row[W.STATE] != W.CLAIMED
        or row[W.OWNER] != party.token
        or number != claim.seq
        or row[W.ATTEMPT] != 1
        or row[W.FLAGS] & W.DURABLE
        or row[W.LOAN]
        or delivery.attempt != 1
        or row[W.DUE]
        or (pool + size > recycle and not may_pool(words, size))
        or (hold is not None and not hold.alone)
    ):
        return
    looked_at = hold is not None and hold.left > 0
    free = 0 if looked_at else record
    if hands.holds.pending:
        free = hands.first_to_pool() if looked_at else 0
        if not free:
            return
    positions: Row = W.IN_FLIGHT, record + W.STATE
    values: Row = words[W.IN_FLIGHT] - 1, W.HELD
    if free:
        after, before = words[free + W.NEXT], words[free + W.PREV]
        positions += (before + W.NEXT if before else W.AWAY,)
        values += (after,)
        if after:
            positions += (after + W.PREV,)
            values += (before,)
        more, these = _pooling(words, free, words[free + W.BYTES])
        positions, values = positions + more, values + these
        pool, pooled = pool + words[free + W.BYTES], pooled + 1
    flow = seq, check, ready, tail, count, items - size, pool, pooled, gots + 1, max(peak, items)
    name, layout = item_name(number), party.layout
    try:
        index.flow(W.LEAVE, number, flow, positions, values, (name, layout.items, name, layout.free))
    except OSError:
        return
    if looked_at and free:
        hands.holds.pending.popleft()
    done.append(True)
