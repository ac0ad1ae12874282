"""Each change of the index as the stores that make it: functions of the words alone, with no effect.

A file's record goes round:

    NOTHING --put--> WAITING --get--> HELD --release--> POOLED --reserve--> RESERVED --put--> WAITING
                     WAITING --claim--> CLAIMED --ack--> HELD, POOLED or NOTHING
                                        CLAIMED --give back--> WAITING or DELAYED

and every change here is one arrow. The stores are computed from the words before the change; where two list
operations of one change touch the same word, the later wins, and they are ordered so that this is right.
"""

from __future__ import annotations

from . import words as W
from .index import Index, Torn

Stores = dict[int, int]


def _less(words: memoryview[int], position: int, amount: int) -> int:
    value = words[position] - amount
    if value < 0:
        raise Torn("a count of the index is below zero")
    return value


def _append(words: memoryview[int], stores: Stores, queue: int, record: int) -> None:
    """Put a record at the end of the READY or RETURNED queue."""
    tail = words[queue + 1]
    stores[tail + W.NEXT if tail else queue] = record
    stores[queue + 1] = record
    stores[queue + 2] = words[queue + 2] + 1


def _pop(words: memoryview[int], stores: Stores, queue: int, record: int) -> None:
    """Take the first record off a queue."""
    following = words[record + W.NEXT]
    stores[queue] = following
    if not following:
        stores[queue + 1] = 0
    stores[queue + 2] = _less(words, queue + 2, 1)


def _hand_out(words: memoryview[int], stores: Stores, record: int) -> None:
    """Put a record on the list of those in somebody's hands."""
    head = words[W.AWAY]
    stores[record + W.NEXT] = head
    stores[record + W.PREV] = 0
    if head:
        stores[head + W.PREV] = record
    stores[W.AWAY] = record


def _take_back(words: memoryview[int], stores: Stores, record: int) -> None:
    """Take a record off the list of those in somebody's hands."""
    following, previous = words[record + W.NEXT], words[record + W.PREV]
    stores[previous + W.NEXT if previous else W.AWAY] = following
    if following:
        stores[following + W.PREV] = previous
    stores[record + W.OWNER] = 0
    stores[record + W.DUE] = 0


def _replace(words: memoryview[int], stores: Stores, record: int, other: int) -> None:
    """Put another record in the place of one on the list of those in somebody's hands."""
    following, previous = words[record + W.NEXT], words[record + W.PREV]
    stores[other + W.NEXT] = following
    stores[other + W.PREV] = previous
    stores[previous + W.NEXT if previous else W.AWAY] = other
    if following:
        stores[following + W.PREV] = other


def _forget(words: memoryview[int], stores: Stores, record: int) -> None:
    """Make a record stand for nothing. Its other words are left as they are."""
    stores[record + W.STATE] = W.NOTHING
    stores[record + W.NEXT] = words[W.UNUSED]
    stores[record + W.BIRTH] = 0
    stores[W.UNUSED] = record


def _pool(words: memoryview[int], stores: Stores, record: int, size: int) -> None:
    """Put a file of free/ into the pool."""
    head = W.bucket(size)
    stores[record + W.STATE] = W.POOLED
    stores[record + W.NEXT] = words[head]
    stores[head] = record
    stores[W.POOL_BYTES] = words[W.POOL_BYTES] + size
    stores[W.POOL_COUNT] = words[W.POOL_COUNT] + 1


def turned(number: int) -> int:
    """A word with all bits turned."""
    return number ^ 0xFFFF_FFFF_FFFF_FFFF


def next_seq(words: memoryview[int]) -> int:
    """The next sequence number. Raises Torn when it cannot be trusted: a put would overwrite a waiting item."""
    seq = words[W.NEXT_SEQ]
    if words[W.NEXT_SEQ_CHECK] != turned(seq):
        raise Torn("the next sequence number is damaged")
    return seq


def describe(index: Index, record: int, seq: int, put_time: int, flags: int, loan: int, end: int = 0) -> None:
    """Write what a record says of its item, before the change that makes it one."""
    W.ITEM.pack_into(index.map, (record + W.SEQ) * W.WORD, seq, put_time, 0, 0, flags, loan, end, 0, 0)


def put(index: Index, record: int, successor: int, link: int) -> Stores:
    """RESERVED becomes WAITING, last in order; the caller has described it.

    successor, link: a pooled file as `find_pooled` gives it, which becomes RESERVED in its stead, or zeros.
    """
    words = index.words
    seq, _, _, tail, count, items, pool, pooled, _, _ = W.FLOW.unpack_from(index.map, W.FLOW_AT)
    size = words[record + W.BYTES]
    stores = {
        record + W.STATE: W.WAITING,
        record + W.FILE: seq,
        tail + W.NEXT if tail else W.READY: record,
        W.READY_TAIL: record,
        W.READY_COUNT: count + 1,
        W.NEXT_SEQ: seq + 1,
        W.NEXT_SEQ_CHECK: turned(seq + 1),
        W.ITEM_BYTES: items + size,
    }
    if successor:
        _replace(words, stores, record, successor)
        stores[successor + W.STATE] = W.RESERVED
        stores[successor + W.OWNER] = words[record + W.OWNER]
        stores[link] = words[successor + W.NEXT]
        stores[W.POOL_BYTES] = pool - words[successor + W.BYTES]
        stores[W.POOL_COUNT] = pooled - 1
    else:
        _take_back(words, stores, record)
    stores[record + W.NEXT] = 0
    return stores


def put_new(index: Index, record: int, seq: int, size: int) -> Stores:
    """NOTHING becomes WAITING: a file of `size` bytes written for this item; the caller has described it."""
    stores = index.taken(record)
    stores[record + W.BIRTH] = seq
    stores[record + W.BYTES] = size
    stores[record + W.OWNER] = 0
    _arrive(index.words, stores, record, seq, size)
    return stores


def _arrive(words: memoryview[int], stores: Stores, record: int, seq: int, size: int) -> None:
    stores[record + W.STATE] = W.WAITING
    stores[record + W.NEXT] = 0
    stores[record + W.FILE] = seq
    _append(words, stores, W.READY, record)
    stores[W.NEXT_SEQ] = seq + 1
    stores[W.NEXT_SEQ_CHECK] = turned(seq + 1)
    stores[W.ITEM_BYTES] = words[W.ITEM_BYTES] + size


def first(index: Index) -> tuple[int, int]:
    """The next record to deliver and the queue it heads; (0, READY) when nothing waits."""
    words = index.words
    for queue in (W.RETURNED, W.READY):
        if words[queue]:
            return index.record(words[queue], W.WAITING), queue
        if words[queue + 2]:
            raise Torn("a queue of the index counts records it does not link")
    return 0, W.READY


def claim(index: Index, record: int, queue: int, owner: int, due: int) -> Stores:
    """WAITING becomes CLAIMED by `owner`, until `due` (monotonic ns, 0 for no lease)."""
    words = index.words
    stores: Stores = {}
    _pop(words, stores, queue, record)
    _hand_out(words, stores, record)
    stores[record + W.STATE] = W.CLAIMED
    stores[record + W.OWNER] = owner
    stores[record + W.DUE] = due
    stores[record + W.ATTEMPT] = words[record + W.ATTEMPT] + 1
    stores[W.IN_FLIGHT] = words[W.IN_FLIGHT] + 1
    _sooner(words, stores, due)
    return stores


def _sooner(words: memoryview[int], stores: Stores, due: int) -> None:
    if due and (not words[W.NEXT_DUE] or due < words[W.NEXT_DUE]):
        stores[W.NEXT_DUE] = due


def get(index: Index, record: int, queue: int, holder: int) -> Stores:
    """WAITING at the head of `queue` moves to free/, delivered: HELD by `holder`, or POOLED where that is 0."""
    words = index.words
    _, _, _, _, _, items, _, _, gots, peak = W.FLOW.unpack_from(index.map, W.FLOW_AT)
    size, following = words[record + W.BYTES], words[record + W.NEXT]
    stores = {
        queue: following,
        queue + 2: words[queue + 2] - 1,
        W.ITEM_BYTES: items - size,
        W.GOTS: gots + 1,
        record + W.OWNER: holder,
    }
    if not following:
        stores[queue + 1] = 0
    if items > peak:
        stores[W.PEAK_BYTES] = items
    if holder:
        _hand_out(words, stores, record)
        stores[record + W.STATE] = W.HELD
    else:
        _pool(words, stores, record, size)
    return stores


def leave(index: Index, record: int, queue: int, holder: int, keep: bool) -> Stores:
    """An item leaves items/: WAITING at the head of `queue` (not kept, see `get`), CLAIMED or DELAYED (`queue` 0).

    keep: its file goes to free/, else it is gone and the record becomes NOTHING.
    holder: token of the party that still looks at the kept file (HELD), 0 to pool it at once.
    """
    words = index.words
    stores: Stores = {}
    if queue:
        _pop(words, stores, queue, record)
    elif words[record + W.STATE] == W.CLAIMED:
        stores[W.IN_FLIGHT] = _less(words, W.IN_FLIGHT, 1)
        if not (keep and holder):
            _take_back(words, stores, record)
    else:
        stores[W.DELAYED_COUNT] = _less(words, W.DELAYED_COUNT, 1)
        _take_back(words, stores, record)
    size = words[record + W.BYTES]
    stores[W.ITEM_BYTES] = _less(words, W.ITEM_BYTES, size)
    if words[W.ITEM_BYTES] > words[W.PEAK_BYTES]:
        stores[W.PEAK_BYTES] = words[W.ITEM_BYTES]
    if not keep:
        _forget(words, stores, record)
        return stores
    if holder:
        stores[record + W.STATE] = W.HELD
        stores[record + W.OWNER] = holder
        stores[record + W.DUE] = 0
    else:
        _pool(words, stores, record, words[record + W.BYTES])
    return stores


def leave_behind(index: Index, record: int, queue: int, previous: int) -> Stores:
    """As `leave` without keeping the file, for a WAITING record that follows `previous` in `queue`."""
    following = index.words[record + W.NEXT]
    stores = leave(index, record, queue, 0, False)
    del stores[queue]
    stores[previous + W.NEXT] = following
    if not following:
        stores[queue + 1] = previous
    return stores


def delivered(index: Index, stores: Stores) -> Stores:
    """Add to `stores` that one more item was delivered for good."""
    stores[W.GOTS] = index.words[W.GOTS] + 1
    return stores


def give_back(index: Index, record: int, due: int) -> Stores:
    """CLAIMED or DELAYED becomes WAITING, before all never delivered, or DELAYED until `due` (ns)."""
    words = index.words
    stores: Stores = {}
    if words[record + W.STATE] == W.CLAIMED:
        stores[W.IN_FLIGHT] = _less(words, W.IN_FLIGHT, 1)
        delayed = words[W.DELAYED_COUNT]
    else:
        delayed = _less(words, W.DELAYED_COUNT, 1)
    if due:
        stores[record + W.STATE] = W.DELAYED
        stores[record + W.OWNER] = 0
        stores[record + W.DUE] = due
        stores[W.DELAYED_COUNT] = delayed + 1
        _sooner(words, stores, due)
        return stores
    stores[W.DELAYED_COUNT] = delayed
    _take_back(words, stores, record)
    stores[record + W.STATE] = W.WAITING
    stores[record + W.NEXT] = 0
    _append(words, stores, W.RETURNED, record)
    return stores


def release(index: Index, record: int) -> Stores:
    """HELD or RESERVED becomes POOLED: nobody looks at the file or writes it any more."""
    words = index.words
    stores: Stores = {}
    _take_back(words, stores, record)
    stores[record + W.LOAN] = 0
    _pool(words, stores, record, words[record + W.BYTES])
    return stores


def donate(index: Index, record: int, number: int, size: int) -> Stores:
    """NOTHING becomes POOLED: a file of `size` bytes made ahead."""
    words = index.words
    stores = index.taken(record)
    stores[record + W.FILE] = stores[record + W.BIRTH] = number
    stores[record + W.BYTES] = size
    stores[record + W.OWNER] = stores[record + W.LOAN] = 0
    _pool(words, stores, record, size)
    return stores


def drop(index: Index, record: int) -> Stores:
    """HELD or RESERVED becomes NOTHING: the file is unlinked."""
    words = index.words
    stores: Stores = {}
    _take_back(words, stores, record)
    _forget(words, stores, record)
    return stores


def _unpool(words: memoryview[int], stores: Stores, record: int, link: int) -> None:
    stores[link] = words[record + W.NEXT]
    stores[W.POOL_BYTES] = _less(words, W.POOL_BYTES, words[record + W.BYTES])
    stores[W.POOL_COUNT] = _less(words, W.POOL_COUNT, 1)


def reserve(index: Index, record: int, link: int, owner: int) -> Stores:
    """POOLED becomes RESERVED by the writer `owner`."""
    words = index.words
    stores: Stores = {}
    _unpool(words, stores, record, link)
    _hand_out(words, stores, record)
    stores[record + W.STATE] = W.RESERVED
    stores[record + W.OWNER] = owner
    return stores


def evict(index: Index, record: int, link: int) -> Stores:
    """POOLED becomes NOTHING: the file is unlinked."""
    words = index.words
    stores: Stores = {}
    _unpool(words, stores, record, link)
    _forget(words, stores, record)
    return stores


def away(index: Index) -> list[int]:
    """The records in somebody's hands or delayed, latest first."""
    words = index.words
    found: list[int] = []
    record = words[W.AWAY]
    limit = (words[W.CAPACITY] - W.HEADER) // W.RECORD
    while record:
        if len(found) >= limit:
            raise Torn("the list of files in hands does not end")
        found.append(index.known(record))
        record = words[record + W.NEXT]
    return found
