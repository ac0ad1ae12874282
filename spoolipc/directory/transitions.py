"""Every arrow of the state machine, and what the pool may hold: pure functions of the table's words.

A file's record goes round:

    NOTHING --put_new--> WAITING --claim--> IN_FLIGHT --requeue--> WAITING or DELAYED
                         WAITING, IN_FLIGHT --consume--> PINNED, POOLED or NOTHING
                         WAITING <--restore-- PINNED, POOLED
                         WAITING, IN_FLIGHT, DELAYED --dead_letter--> NOTHING
    PINNED, RESERVED --release--> POOLED --reserve--> RESERVED --put--> WAITING
    PINNED, RESERVED --drop--> NOTHING <--evict-- POOLED

A transition is a value: its kind, which says how to tell after a crash whether it happened; the number of the file it
moves; its stores, a position and its new value in turn; and the move. `Journal.commit` makes it. The stores are
computed from the words before it; where two list operations of one transition touch the same word, the later wins, and
they are ordered so that this is right. Sums are not checked here: one that a damaged word makes negative or too large
does not fit into the journal, and the commit refuses it before anything is stored.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import repeat
from typing import Final, TypeAlias, cast

from ..message import Limits
from . import table as W
from .layout import free_name, item_name
from .table import IndexDamaged, Queue, Words, bucket, record_in

Stores: TypeAlias = list[int]
"""Positions and values in turn, as the journal holds them: a dict takes twice as long to make and to store."""

# Kinds: how to tell, after a crash, whether the transition happened
CLEAN: Final = 0  # there is none
MEMORY: Final = 1  # stores only: it happened
ARRIVE: Final = 2  # it happened if items/SUBJECT exists
LEAVE: Final = 3  # it happened if items/SUBJECT does not exist
UNLINK: Final = 4  # free/SUBJECT is removed, now or before
DONATE: Final = 5  # it happened if free/SUBJECT exists
FOLLOW: Final = 6  # SHUTDOWN and the limits become what the marker file and spool.json say


Move: TypeAlias = tuple[str, str, str, str]
"""The change of a name that goes with a transition: from a part of the spool ("." is its top) and a name to another
part and name; without another part, an unlinking of what may be gone already."""
Transition: TypeAlias = tuple[int, int, Stores, Move | None]
"""Kind, number of the file moved, stores, move. Plain, as a named tuple costs a call each on the path of every put."""


store: Final = cast(Callable[[Words, int, int], None], operator.setitem)
"""`store(words, position, value)`: an assignment that `map` can make."""


def make(words: Words, stores: Stores) -> None:
    """Make stores, in their order."""
    any(map(store, repeat(words), stores[::2], stores[1::2]))  # in half the time that a loop takes


# Lists


def _append(words: Words, stores: Stores, queue: Queue, record: int) -> None:
    tail = words[queue.tail]
    stores += (tail + W.NEXT if tail else queue.head, record, queue.tail, record)
    stores += (queue.length, words[queue.length] + 1, record + W.NEXT, 0)


def _prepend(words: Words, stores: Stores, queue: Queue, record: int) -> None:
    head = words[queue.head]
    stores += (queue.head, record, queue.length, words[queue.length] + 1, record + W.NEXT, head)
    if not head:
        stores += (queue.tail, record)


def _pop(words: Words, stores: Stores, record: int) -> None:
    """Take a record off the queue that it heads."""
    queue = W.REDELIVERY if words[W.REDELIVERY_HEAD] == record else W.READY
    following, length = words[record + W.NEXT], queue.length
    stores += (queue.head, following, length, words[length] - 1)
    if not following:
        stores += (queue.tail, 0)


def _activate(words: Words, stores: Stores, record: int) -> None:
    head = words[W.ACTIVE]
    stores += (W.ACTIVE, record, record + W.NEXT, head, record + W.PREV, 0)
    if head:
        stores += (head + W.PREV, record)


def _deactivate(words: Words, stores: Stores, record: int) -> None:
    following, previous = words[record + W.NEXT], words[record + W.PREV]
    stores += (previous + W.NEXT if previous else W.ACTIVE, following, record + W.DUE, 0)
    if following:
        stores += (following + W.PREV, previous)


def _pool(words: Words, stores: Stores, record: int, size: int) -> None:
    head = bucket(size)
    stores += (record + W.STATE, W.POOLED, record + W.NEXT, words[head], head, record)
    stores += (W.POOL_BYTES, words[W.POOL_BYTES] + size, W.POOL_COUNT, words[W.POOL_COUNT] + 1)


def _unpool(words: Words, stores: Stores, record: int, link: int) -> None:
    stores += (link, words[record + W.NEXT], W.POOL_COUNT, words[W.POOL_COUNT] - 1)
    stores += (W.POOL_BYTES, words[W.POOL_BYTES] - words[record + W.BYTES])


def _forget(words: Words, stores: Stores, record: int) -> None:
    stores += (record + W.STATE, W.NOTHING, record + W.NEXT, words[W.UNUSED])
    stores += (record + W.FILE, 0, W.UNUSED, record)


def _take_unused(words: Words, record: int) -> Stores:
    """The stores that take a record given by `Journal.unused_record`."""
    if words[W.UNUSED] == record:
        return [W.UNUSED, words[record + W.NEXT]]
    return [W.EDGE, record + W.RECORD]


def _due_no_later(words: Words, stores: Stores, due: int) -> None:
    if not words[W.NEXT_DUE] or due < words[W.NEXT_DUE]:
        stores += (W.NEXT_DUE, due)


# Putting


def next_seq(words: Words) -> int:
    """The next sequence number. Raises IndexDamaged when it cannot be trusted: a put would overwrite an item."""
    seq = words[W.NEXT_SEQ]
    if words[W.NEXT_SEQ_CHECK] != seq ^ W.ALL_BITS:
        raise IndexDamaged("the next sequence number is damaged")
    return seq


_BEFORE_PUT: Final = W.together(
    *(W.NEXT_SEQ, W.NEXT_SEQ_CHECK, W.READY_TAIL, W.READY_LENGTH, W.ITEM_BYTES, W.POOL_BYTES, W.POOL_COUNT)
)
_POOLED: Final = W.together(W.NEXT, W.BYTES)


def put(words: Words, record: int, size: int, name: str, owner: int, successor: int, link: int) -> Transition:
    """RESERVED by `owner` becomes WAITING, last in order, under the number that the transition moves; the caller
    describes the item in its record before the commit.

    size, name: of its file in free/. successor, link: a pooled file as `find_pooled` gives it, which becomes RESERVED
    in its stead, or zeros. Raises IndexDamaged, as `next_seq` does.
    """
    seq, check, tail, length, items, pooled, count = _BEFORE_PUT(words)
    if check != seq ^ W.ALL_BITS:
        next_seq(words)
    stores = [tail + W.NEXT if tail else W.READY_HEAD, record, W.READY_TAIL, record]
    stores += (W.READY_LENGTH, length + 1, record + W.STATE, W.WAITING, record + W.NEXT, 0)
    stores += (W.NEXT_SEQ, seq + 1, W.NEXT_SEQ_CHECK, seq + 1 ^ W.ALL_BITS, W.ITEM_BYTES, items + size)
    if successor:
        following, room = _POOLED(words, successor * W.WORD)
        stores += (link, following, successor + W.STATE, W.RESERVED, successor + W.OWNER, owner)
        stores += (W.POOL_COUNT, count - 1, W.POOL_BYTES, pooled - room)
    return (ARRIVE, seq, stores, ("free", name, "items", str(seq).zfill(20) + ".npy"))


def put_new(words: Words, record: int, size: int, source: str, name: str) -> Transition:
    """NOTHING becomes WAITING: a file of `size` bytes that is `name` in the part `source`, tmp/ or that of a dead
    letter; the caller has described the item in its record."""
    seq = next_seq(words)
    stores = _take_unused(words, record)
    stores += (record + W.STATE, W.WAITING, record + W.FILE, seq, record + W.BYTES, size, record + W.DUE, 0)
    _append(words, stores, W.READY, record)
    stores += (W.NEXT_SEQ, seq + 1, W.NEXT_SEQ_CHECK, seq + 1 ^ W.ALL_BITS)
    stores += (W.ITEM_BYTES, words[W.ITEM_BYTES] + size)
    return (ARRIVE, seq, stores, (source, name, "items", item_name(seq)))


# Getting


def first(words: Words) -> int:
    """The next record to deliver, 0 when nothing waits. Raises IndexDamaged."""
    record = words[W.REDELIVERY_HEAD] or words[W.READY_HEAD]
    if record:
        return record_in(words, record, W.WAITING)
    if words[W.REDELIVERY_LENGTH] or words[W.READY_LENGTH]:
        raise IndexDamaged("a queue of the index counts records it does not link")
    return 0


def claim(words: Words, record: int, owner: int, due: int, released: int = 0) -> Transition:
    """WAITING, the first, becomes IN_FLIGHT at `owner`, until `due` (monotonic ns, 0 for no lease); `released` as for
    `consume`."""
    stores: Stores = []
    _pop(words, stores, record)
    _activate(words, stores, record)
    stores += (record + W.STATE, W.IN_FLIGHT, record + W.OWNER, owner, record + W.DUE, due)
    stores += (record + W.ATTEMPT, words[record + W.ATTEMPT] + 1)
    stores += (W.IN_FLIGHT_COUNT, words[W.IN_FLIGHT_COUNT] + 1)
    if due:
        _due_no_later(words, stores, due)
    if released:
        _pool(words, stores, released, words[released + W.BYTES])
    return (MEMORY, 0, stores, None)


_BEFORE_GET: Final = W.together(W.ITEM_BYTES, W.PEAK_BYTES, W.DELIVERED_TOTAL)
_DELIVERED: Final = W.together(W.STATE, W.SEQ, W.LOAN, W.FILE, W.BYTES)


def consume(words: Words, record: int, owner: int, keep: bool, released: int = 0) -> Transition:
    """WAITING, the first, or IN_FLIGHT leaves items/, delivered for good.

    keep: its file moves to free/, PINNED by `owner`, or POOLED where that is 0; else it is unlinked (NOTHING).
    released: a PINNED record without a LOAN that becomes POOLED in the same transition.
    """
    state, seq, loan, number, size = _DELIVERED(words, record * W.WORD)
    items, peak, total = _BEFORE_GET(words)
    stores = [W.ITEM_BYTES, items - size, W.DELIVERED_TOTAL, total + 1]
    if items > peak:
        stores += (W.PEAK_BYTES, items)
    if state == W.WAITING:
        _pop(words, stores, record)
    else:
        stores += (W.IN_FLIGHT_COUNT, words[W.IN_FLIGHT_COUNT] - 1)
        _deactivate(words, stores, record)
    name = str(seq).zfill(20) + ".npy"
    if not keep:
        _forget(words, stores, record)
        return (LEAVE, seq, stores, ("items", name, "", ""))
    if owner:
        stores += (record + W.STATE, W.PINNED, record + W.OWNER, owner)
        if owner == loan:  # the lender itself, who may still have the array
            stores += (record + W.LOAN, 0)
    else:
        if loan:
            stores += (record + W.LOAN, 0)
        _pool(words, stores, record, size)
    if released:
        _pool(words, stores, released, words[released + W.BYTES])
    return (LEAVE, seq, stores, ("items", name, "free", free_name(number)))


def requeue(words: Words, record: int, due: int, counted: int = 0) -> Transition:
    """IN_FLIGHT or DELAYED becomes WAITING, before all never delivered, or DELAYED until `due` (monotonic ns).
    counted: 1 where being in flight was no attempt."""
    stores: Stores = [record + W.ATTEMPT, words[record + W.ATTEMPT] - counted] if counted else []
    if words[record + W.STATE] == W.IN_FLIGHT:
        stores += (W.IN_FLIGHT_COUNT, words[W.IN_FLIGHT_COUNT] - 1)
        delayed = words[W.DELAYED_COUNT]
    else:
        delayed = words[W.DELAYED_COUNT] - 1
    if due:
        stores += (record + W.STATE, W.DELAYED, record + W.DUE, due, W.DELAYED_COUNT, delayed + 1)
        _due_no_later(words, stores, due)
    else:
        stores += (W.DELAYED_COUNT, delayed)
        _deactivate(words, stores, record)
        stores += (record + W.STATE, W.WAITING)
        _append(words, stores, W.REDELIVERY, record)
    return (MEMORY, 0, stores, None)


def restore(words: Words, record: int, link: int, counted: int = 0) -> Transition:
    """PINNED, or POOLED with the position that links to it, becomes WAITING again, the first: nobody received
    it. The file is not written again, as who was interrupted may show it. SEQ is the item that it holds. counted: 1
    where it was in flight before it was taken, which is no attempt."""
    seq = words[record + W.SEQ]
    stores = [W.ITEM_BYTES, words[W.ITEM_BYTES] + words[record + W.BYTES]]
    stores += (W.DELIVERED_TOTAL, words[W.DELIVERED_TOTAL] - 1, record + W.STATE, W.WAITING)
    stores += (record + W.ATTEMPT, words[record + W.ATTEMPT] - counted)
    stores += (record + W.FLAGS, words[record + W.FLAGS] | W.NEVER_AGAIN)
    if link:
        _unpool(words, stores, record, link)
    _prepend(words, stores, W.REDELIVERY, record)
    return (ARRIVE, seq, stores, ("free", free_name(words[record + W.FILE]), "items", item_name(seq)))


def extend(words: Words, record: int, due: int) -> Transition:
    """IN_FLIGHT stays so until `due` (monotonic ns)."""
    stores = [record + W.DUE, due]
    _due_no_later(words, stores, due)
    return (MEMORY, 0, stores, None)


def _removal(words: Words, record: int) -> Stores:
    """The stores by which WAITING, the first, IN_FLIGHT or DELAYED becomes NOTHING."""
    stores = [W.ITEM_BYTES, words[W.ITEM_BYTES] - words[record + W.BYTES]]
    state = words[record + W.STATE]
    if state == W.WAITING:
        _pop(words, stores, record)
    else:
        counter = W.IN_FLIGHT_COUNT if state == W.IN_FLIGHT else W.DELAYED_COUNT
        stores += (counter, words[counter] - 1)
        _deactivate(words, stores, record)
    _forget(words, stores, record)
    return stores


def dead_letter(words: Words, record: int, part: str, name: str) -> Transition:
    """WAITING, the first, IN_FLIGHT or DELAYED moves to `name` in `part`, as a dead letter. Without a part it is only
    forgotten: its file is gone, or cannot be moved."""
    seq = words[record + W.SEQ]
    stores = _removal(words, record)
    if not part:
        return (MEMORY, 0, stores, None)
    return (LEAVE, seq, stores, ("items", item_name(seq), part, name))


def discard(words: Words, record: int) -> Transition:
    """WAITING, the first, DELAYED, or IN_FLIGHT at a crashed session is removed, delivered to nobody."""
    seq = words[record + W.SEQ]
    return (LEAVE, seq, _removal(words, record), ("items", item_name(seq), "", ""))


# Recycling


def release(words: Words, record: int) -> Transition:
    """PINNED or RESERVED becomes POOLED: no array shows the file and nobody writes it any more."""
    stores = [record + W.LOAN, 0]
    if words[record + W.STATE] == W.RESERVED:  # what it holds is that item no more: see `restore`
        stores += (record + W.SEQ, 0)
    _pool(words, stores, record, words[record + W.BYTES])
    return (MEMORY, 0, stores, None)


def drop(words: Words, record: int) -> Transition:
    """PINNED or RESERVED becomes NOTHING: the file is unlinked."""
    stores: Stores = []
    _forget(words, stores, record)
    return _unlinking(words, record, stores)


def reserve(words: Words, record: int, link: int, owner: int) -> Transition:
    """POOLED becomes RESERVED by the writer `owner`."""
    stores = [record + W.STATE, W.RESERVED, record + W.OWNER, owner]
    _unpool(words, stores, record, link)
    return (MEMORY, 0, stores, None)


def evict(words: Words, record: int, link: int) -> Transition:
    """POOLED becomes NOTHING: the file is unlinked."""
    stores: Stores = []
    _unpool(words, stores, record, link)
    _forget(words, stores, record)
    return _unlinking(words, record, stores)


def _unlinking(words: Words, record: int, stores: Stores) -> Transition:
    number = words[record + W.FILE]
    return (UNLINK, number, stores, ("free", item_name(number), "", ""))


def donate(words: Words, record: int, number: int, size: int, name: str) -> Transition:
    """NOTHING becomes POOLED: a file of `size` bytes made ahead, `name` in tmp/."""
    stores = _take_unused(words, record)
    stores += (record + W.FILE, number, record + W.BYTES, size)
    stores += (record + W.SEQ, 0, record + W.LOAN, 0, record + W.DUE, 0)
    _pool(words, stores, record, size)
    return (DONATE, number, stores, ("tmp", name, "free", item_name(number)))


def end_loan(words: Words, record: int, *, shared: bool) -> Transition:
    """The writer's array over an item's file is gone. shared: a child forked meanwhile may have it for ever."""
    flags = words[record + W.FLAGS] | (W.NEVER_AGAIN if shared else 0)
    return (MEMORY, 0, [record + W.LOAN, 0, record + W.FLAGS, flags], None)


def pass_to_lender(words: Words, record: int) -> Transition:
    """PINNED by its reader becomes PINNED by the writer that lent its array, and may still have it."""
    return (MEMORY, 0, [record + W.OWNER, words[record + W.LOAN], record + W.LOAN, 0], None)


# The spool as a whole


def set_shutdown(state: int) -> Transition:
    """The marker file and SHUTDOWN become `state`."""
    return (FOLLOW, state, [W.SHUTDOWN, state], None)


def set_limits(limits: Limits) -> Transition:
    """spool.json.new, which holds these limits, becomes spool.json, and they are those of the table."""
    return (FOLLOW, 0, limit_stores(limits), (".", "spool.json.new", ".", "spool.json"))


def limit_stores(limits: Limits) -> Stores:
    """The stores that make these the limits of the table."""
    stores = [W.MAXSIZE, limits.maxsize or 0, W.MAX_BYTES, limits.max_bytes or 0]
    stores += (W.RECYCLE_BYTES, limits.recycle_bytes or 0, W.MAX_ATTEMPTS, limits.max_attempts or 0)
    return stores
