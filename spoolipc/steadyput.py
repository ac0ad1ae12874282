"""Putting in the steady state: an array like the last one goes into a consumed file of its size.

In a busy spool nearly every call is such a one, and a small array costs little beside the instructions around it. So
this way is written out once more, in as few instructions as can be, above all under the lock, with nothing in it for
what is out of the ordinary: there it stops, and the caller goes the general way (`committing.py`), which also has the
words for what is wrong. The change is `changes.put`, written as a row of words; a crash leaves the same behind.
`steadyget.py` is its counterpart.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from . import footer
from . import words as W
from .changes import turned
from .engine import Array
from .layout import item_name
from .maps import write_small
from .newfile import SMALL
from .party import Party
from .pool import LARGE, find_pooled
from .room import MANY, places, rounded
from .spares import Spare, spare_of
from .stock import MOST_SPARES, Plan, Stock


class Written(NamedTuple):
    """A file that holds an item not yet committed, and the time in it, ns."""

    spare: Spare
    put_time: int


def put_again(stock: Stock, arrays: Sequence[Array]) -> list[int]:
    """Put arrays of the kind that `stock.plan` is for, from the first on, into reserved files that are mapped.

    Returns the sequence numbers of those that were put: all, some or none.
    """
    plan, party = stock.plan, stock.party
    if plan is None or (stock.places <= 0 and not _look_for_places(stock, plan)):
        return []
    index = party.index
    written: list[Written] = []
    done: list[tuple[int, int]] = []
    try:
        for array in arrays[: stock.places]:
            if not _store(stock, plan, array, written):
                break
        if written:
            party.try_run(index, _commit_all, stock, plan, written, done)
    finally:
        # One that an interrupted commit has made an item is found out before it is written again: its name is gone.
        stock.spares += [spare for spare, _ in written[len(done) :]]
    if done and index.is_awaited():
        party.ring("items", len(done))
    for _, successor in done:
        if successor:
            stock.spares.append(spare_of(index, successor))
        elif not index.words[plan.pool]:
            stock.lack(plan.need)
    return [seq for seq, _ in done]


def _look_for_places(stock: Stock, plan: Plan) -> bool:
    """Whether the spool, full of late, has room again."""
    stock.places = places(stock.party.look(), rounded(plan.need))
    return stock.places > 0


def _store(stock: Stock, plan: Plan, array: Array, written: list[Written]) -> bool:
    """Write an array into a consumed file, if both are as they should be."""
    if array.dtype is not plan.dtype or array.shape != plan.shape or not array.flags.c_contiguous:
        return False
    try:
        spare = stock.spares.pop()
    except IndexError:
        return False
    put_time = time.time_ns()
    written.append(Written(spare, put_time))
    if not plan.need <= spare.size <= plan.most or not _write(stock, plan, spare, array, put_time):
        stock.spares.append(written.pop().spare)
        return False
    return True


def _write(stock: Stock, plan: Plan, spare: Spare, array: Array, put_time: int) -> bool:
    """Write header, data and footer, through the kept mapping or, where a small file has none, by `pwrite`."""
    mapping = stock.maps.kept(spare.birth)
    if mapping is None:
        return _write_unmapped(stock, plan, spare, array, put_time)
    try:
        status = os.stat(spare.name, dir_fd=stock.party.layout.free, follow_symlinks=False)
    except OSError:
        return False
    if status[1:3] != mapping.identity or status[6] != spare.size or status[3] != 1:
        return False
    start, end, buffer = plan.start, plan.end, mapping.buffer
    buffer[start - len(plan.header) : start] = plan.header
    if end <= SMALL:
        buffer[start:end] = array  # type: ignore[call-overload]
    else:
        np.copyto(np.ndarray(plan.shape, plan.dtype, buffer, start), array)
    buffer[end : plan.need] = footer.pack_plain(end, put_time)
    return True


def _write_unmapped(stock: Stock, plan: Plan, spare: Spare, array: Array, put_time: int) -> bool:
    if plan.end > SMALL or stock.maps.wanted(spare.birth):
        return False
    parts = (plan.header, array, footer.pack_plain(plan.end, put_time))
    party = stock.party
    try:
        with party:  # so that no close meanwhile gives the descriptor to another directory
            status = os.stat(spare.name, dir_fd=party.layout.free, follow_symlinks=False)
            if status[6] != spare.size or status[3] != 1 or not stat.S_ISREG(status[0]):
                return False
            write_small(party.layout.free, spare.name, b"".join(parts))  # type: ignore[arg-type]
    except OSError:
        return False
    return True


def _commit_all(
    party: Party, stock: Stock, plan: Plan, written: list[Written], done: list[tuple[int, int]]
) -> None:
    """The locked step of a put."""
    for one in written:
        if not _commit(party, stock, plan, one, done):
            break


def _commit(party: Party, stock: Stock, plan: Plan, one: Written, done: list[tuple[int, int]]) -> bool:
    """Make an item of a written file, and reserve the next file of its kind: `changes.put`.

    Adds the sequence number to `done`, and the record of that next file or 0. A crash before the rename leaves a
    reserved file, after it an item.
    """
    spare, put_time = one
    index, record, size = party.index, spare.record, spare.size
    words = index.words
    # fmt: off
    seq, check, ready, tail, count, items, pool, pooled, gots, peak, \
        returned, delayed, shutdown, tended, maxsize, max_bytes = W.FLOW_TO_PUT.unpack_from(index.map, W.FLOW_AT)
    # fmt: on
    if (
        shutdown
        or (maxsize and count + returned + delayed >= maxsize)
        or (max_bytes and items + size > max_bytes)
        or stock.holds.pending
        or spare.index is not index
        or words[record + W.STATE] != W.RESERVED
        or check != turned(seq)
    ):
        stock.places = 0
        return False
    if tended != stock.maps.swept:
        stock.maps.sweep(words)
    need, link = plan.need, plan.pool
    successor = words[link]
    if len(stock.spares) >= MOST_SPARES:
        successor = 0
    elif need >= LARGE or (
        successor and not need <= words[index.record(successor, W.POOLED) + W.BYTES] <= plan.most
    ):
        only_mapped = stock.keeps_to_mapped(need)
        successor, link = find_pooled(index, link, need, plan.most, stock.maps, only_mapped=only_mapped)
    W.ITEM.pack_into(index.map, (record + W.SEQ) * W.WORD, seq, put_time, 0, 0, 0, 0, plan.end, 0, 0)
    following, previous = words[record + W.NEXT], words[record + W.PREV]
    positions: tuple[int, ...] = (
        tail + W.NEXT if tail else record + W.NEXT,
        record + W.STATE,
        record + W.NEXT,
        record + W.FILE,
        previous + W.NEXT if previous else W.AWAY,
        (following or record) + W.PREV,
    )
    values: tuple[int, ...] = record, W.WAITING, 0, seq, successor or following, successor or previous
    if successor:
        state = successor + W.STATE
        positions += link, state, successor + W.OWNER, successor + W.NEXT, successor + W.PREV
        values += words[successor + W.NEXT], W.RESERVED, party.token, following, previous
        pool, pooled = pool - words[successor + W.BYTES], pooled - 1
    ready, count, items = ready or record, count + 1, items + size
    flow = seq + 1, turned(seq + 1), ready, record, count, items, pool, pooled, gots, peak
    layout = party.layout
    try:
        index.flow(
            W.ARRIVE, seq, flow, positions, values, (spare.name, layout.free, item_name(seq), layout.items)
        )
    except OSError:
        return False
    done.append((seq, successor))
    left = maxsize - count - returned - delayed if maxsize else MANY
    stock.places = min(left, (max_bytes - items) // size) if max_bytes else left
    return True
