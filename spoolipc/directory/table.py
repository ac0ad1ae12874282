"""The table: what each 64-bit word of the mapped index file means, and what must hold of all of them together.

A header of `HEADER` words, then records of `RECORD` words. A record stands for one file, from the moment it is known
until it is unlinked, and is named by the position of its first word; 0 is no record. Records are linked into lists:
two queues of waiting items, one list of those in flight or delayed, one list for each size of pooled files, one of
unused records; those pinned or reserved are on none. `docs/format.md` draws it.

Pure: positions, structures and checks; nothing here maps, locks or writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import Final, NewType, TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = "memoryview[int]"
Rows: TypeAlias = npt.NDArray[np.uint64]
Token = NewType("Token", int)
"""A session's random number, its file name in `alive/`."""

WORD: Final = 8
HEADER: Final = 1024
RECORD: Final = 16
MAGIC_VALUE: Final = int.from_bytes(b"SPOOLIDX", "little")
VERSION_VALUE: Final = 3
ALL_BITS: Final = 2**64 - 1


class IndexDamaged(Exception):
    """The index is missing, damaged or of another boot: it must be built again."""


class _Positions:
    """Hands out positions one after the other."""

    def __init__(self) -> None:
        self.next = 0

    def __call__(self, count: int = 1) -> int:
        self.next += count
        return self.next - count


@dataclass(frozen=True, slots=True)
class Queue:
    """Where the header keeps one queue: its first record, its last, and how many there are."""

    head: int
    tail: int
    length: int


def together(*positions: int) -> Callable[..., tuple[int, ...]]:
    """What reads the words at these positions, in rising order, by one call, which takes as long as to read two or
    three of them by themselves: `read(words)`, or of a record `read(words, record * WORD)`."""
    layout, at = "=", 0
    for position in positions:
        layout += f"{(position - at) * WORD}xQ"
        at = position + 1
    return Struct(layout).unpack_from


# Header: the guard, which is compared as a whole at every step
_at = _Positions()
MAGIC: Final = _at()
VERSION: Final = _at()
BOOT: Final = _at(2)  # the boot in which this index was built
CAPACITY: Final = _at()  # words in use, the header included
MARK: Final = _at()  # kind of the transition under way, CLEAN when none
GUARD: Final = _at.next * WORD  # bytes
# Header
HOLDER: Final = _at()  # token of the last to take the lock
# Header: what a put or get changes
NEXT_SEQ: Final = _at()
NEXT_SEQ_CHECK: Final = _at()  # NEXT_SEQ with all bits turned: a number given twice would cost an item
READY: Final = Queue(_at(), _at(), _at())  # items never delivered, or never since the last rebuild
READY_HEAD, READY_TAIL, READY_LENGTH = READY.head, READY.tail, READY.length
ITEM_BYTES: Final = _at()  # of files waiting or in flight
POOL_BYTES: Final = _at()
POOL_COUNT: Final = _at()
PEAK_BYTES: Final = _at()  # the most that ITEM_BYTES was of late: so much free/ may fill up again
DELIVERED_TOTAL: Final = _at()
REDELIVERY: Final = Queue(_at(), _at(), _at())  # items requeued, delivered before all others
REDELIVERY_HEAD, REDELIVERY_LENGTH = REDELIVERY.head, REDELIVERY.length
ACTIVE: Final = _at()  # head of the list of records in flight or delayed
IN_FLIGHT_COUNT: Final = _at()
DELAYED_COUNT: Final = _at()
UNUSED: Final = _at()  # head of the list of records that stand for nothing
EDGE: Final = _at()  # position of the first record never used
FIRST_SEQ: Final = _at()  # NEXT_SEQ when this index was built
_at()  # room for one word more
DONE_TOTAL: Final = _at()  # tasks said to be done, of those in DELIVERED_TOTAL
SHUTDOWN: Final = _at()  # OPEN, DRAINING or DISCARDED
NEXT_DUE: Final = _at()  # monotonic ns at which a lease or delay ends, 0 for none
HOUSEKEPT: Final = _at()  # monotonic ns of the last round of housekeeping
MAXSIZE: Final = _at()  # the limits, as spool.json has them
MAX_BYTES: Final = _at()
RECYCLE_BYTES: Final = _at()
MAX_ATTEMPTS: Final = _at()
GROUPS: Final = _at(16)  # room for groups of readers
# Header: who waits, the pool, the journal, who looks
MOST_WAITERS: Final = 32
TOKENS: Final = _at(MOST_WAITERS)
KINDS: Final = _at(MOST_WAITERS)
SINCES: Final = _at(MOST_WAITERS)
SINCES_BYTES: Final = slice(SINCES * WORD, (SINCES + MOST_WAITERS) * WORD)
NOBODY: Final = bytes(MOST_WAITERS * WORD)
"""What is there when no session waits."""
BUCKET_COUNT: Final = 192
BUCKETS: Final = _at(BUCKET_COUNT)  # heads of the pooled files by size
JOURNAL_ROOM: Final = 64  # stores of one transition
SUBJECT: Final = _at()  # number of the file that the transition moves
STORES: Final = _at()  # how many stores the journal holds
JOURNAL: Final = _at(2 * JOURNAL_ROOM)  # the position of each and its value, in turn
LOOKS: Final = _at(MOST_WAITERS)  # by place: 1 while that reader looks at an item that is not in flight at it
SHARE_BYTES: Final = (
    _at()
)  # what the pool may hold of the file system, as of late: half of what is free without it
SHARE_FILES: Final = _at()
WANTED: Final = _at(
    MOST_WAITERS
)  # by place: bytes for which that writer waits, as the file system lacks them
WRITERS: Final = _at()  # monotonic ns at which a writer last came or left
ENDING: Final = _at()  # somebody waits until no item of a lower number is left, 0 for nobody
assert _at.next <= HEADER

# Record
_at = _Positions()
STATE: Final = _at()
NEXT: Final = _at()
PREV: Final = _at()  # in the ACTIVE list only
SEQ: Final = _at()  # the item's sequence number
PUT_TIME: Final = _at()  # wall clock, ns
ATTEMPT: Final = _at()  # how often it was delivered and not settled
FLAGS: Final = _at()
DATA_END: Final = _at()  # where in the file the footer begins, 0 when not known
EXPIRES: Final = _at()  # wall clock, ns, 0 for never
GROUP_SET: Final = _at()  # groups that have yet to take it
DUE: Final = _at()  # monotonic ns at which its lease or delay ends, 0 for none
LOAN: Final = _at()  # token of the writer that still has the loaned array, 0 for none
OWNER: Final = _at()  # token of the session that has it, or last had it
FILE: Final = _at()  # number of the file for as long as it is there: its name in free/; no other gets it
BYTES: Final = _at()  # the file's size
assert _at.next < RECORD
ITEM: Final = Struct("=9Q")
"""SEQ to LOAN, what a record says of its item before it is one."""
ITEM_AT: Final = SEQ

# States of a record
NOTHING: Final = 0
WAITING: Final = 1  # in items/, to be delivered
IN_FLIGHT: Final = 2  # in items/, received by OWNER and not settled
DELAYED: Final = 3  # in items/, requeued and not yet due
PINNED: Final = 4  # in free/, consumed; an array of OWNER still shows it
RESERVED: Final = 5  # in free/, being written by OWNER
POOLED: Final = 6  # in free/, waiting to be written
IN_ITEMS: Final = (WAITING, IN_FLIGHT, DELAYED)
IN_FREE: Final = (PINNED, RESERVED, POOLED)
IN_ACTIVE: Final = (IN_FLIGHT, DELAYED)
OWNED: Final = (IN_FLIGHT, PINNED, RESERVED)
UNLISTED: Final = (PINNED, RESERVED)  # found by their owner, which is rarely asked for

# Flags of a record
NEVER_AGAIN: Final = 1  # its file is not written again: it must survive power loss, or a fork may show it
HAS_METADATA: Final = 2  # the footer has names or metadata

# States of the spool
OPEN: Final = 0
DRAINING: Final = 1  # no more puts; what waits is delivered
DISCARDED: Final = 2  # no more puts and no more gets

# What a waiting session waits for
FOR_ITEMS: Final = 1
FOR_SPACE: Final = 2
FOR_END: Final = 3  # of the items that were put

FIRST_DONATED: Final = 2**63
"""Numbers of files that never held an item begin here."""
LAST_SEQ: Final = 10**18
"""Sequence numbers are below this: a file of a higher number was not put by this package."""

NOT_ZERO: Final[dict[int, tuple[int, ...]]] = {
    WAITING: (SEQ, FILE, BYTES),
    IN_FLIGHT: (SEQ, FILE, BYTES, ATTEMPT, OWNER),
    DELAYED: (SEQ, FILE, BYTES, ATTEMPT, DUE),
    PINNED: (FILE, BYTES, OWNER),
    RESERVED: (FILE, BYTES, OWNER),
    POOLED: (FILE, BYTES),
}
ZERO: Final[dict[int, tuple[int, ...]]] = {
    NOTHING: (FILE,),
    WAITING: (DUE,),
    PINNED: (DUE,),
    RESERVED: (DUE,),
    POOLED: (DUE, LOAN),
}
"""By state, the words of a record that are never zero and those that always are; the others are the last item's."""


@lru_cache(1024)
def bucket(size: int) -> int:
    """The header word of the pooled files of about `size` bytes: four buckets to a doubling."""
    pages = (size + 4095) >> 12
    length = pages.bit_length()
    if length < 3:
        return BUCKETS + pages
    return BUCKETS + min(length * 4 + ((pages >> (length - 3)) & 3), BUCKET_COUNT - 1)


def known(words: Words, record: int) -> int:
    """`record` if it can be the position of one. Raises IndexDamaged."""
    if not HEADER <= record < words[CAPACITY] or (record - HEADER) % RECORD:
        raise IndexDamaged("the index links to no record")
    return record


def record_in(words: Words, record: int, state: int) -> int:
    """`record` if it stands for a file in `state`. Raises IndexDamaged."""
    if not HEADER <= record < words[CAPACITY] or (record - HEADER) % RECORD or words[record + STATE] != state:
        raise IndexDamaged("a list of the index holds a record of another state")
    return record


def active(words: Words) -> list[int]:
    """The records in flight or delayed, latest first. Raises IndexDamaged."""
    return linked(words, ACTIVE)


def linked(words: Words, head: int) -> list[int]:
    """The records of the list that begins at `head`. Raises IndexDamaged."""
    found: list[int] = []
    record = words[head]
    limit = (words[CAPACITY] - HEADER) // RECORD
    while record:
        if len(found) >= limit:
            raise IndexDamaged("a list of records does not end")
        found.append(known(words, record))
        record = words[record + NEXT]
    return found


def rows(words: Words, *states: int) -> Rows:
    """The records, used now or once, one a row: a view of the words; with `states`, a copy of those in one of them."""
    end = min(max(words[EDGE], HEADER), len(words))
    end -= (end - HEADER) % RECORD
    records = np.frombuffer(words, np.uint64)[HEADER:end].reshape(-1, RECORD)
    return records[_among(records[:, STATE], states)] if states else records


def _among(values: npt.NDArray[np.uint64], asked: Collection[int]) -> npt.NDArray[np.bool]:
    """Which values are one of those asked for, as a rule a few."""
    if len(asked) > 8:
        return np.isin(values, np.array(list(asked), np.uint64))
    found = np.zeros(len(values), bool)
    for each in asked:
        found |= values == each
    return found


def owned(words: Words, owners: Collection[int]) -> list[int]:
    """The records that sessions of these tokens have: those in flight in the order in which they were claimed, then
    those pinned or reserved, for which every record is looked at: 10 ms for a million. Raises IndexDamaged."""
    in_flight = [
        record
        for record in reversed(active(words))
        if words[record + STATE] == IN_FLIGHT and words[record + OWNER] in owners
    ]
    return in_flight + _found(words, OWNER, owners, UNLISTED)


def held(words: Words) -> dict[int, int]:
    """Bytes of files pinned or reserved, by the token of who has them."""
    records = rows(words, *UNLISTED)
    owners = set(records[:, OWNER].tolist())
    return {owner: int(records[records[:, OWNER] == owner, BYTES].sum()) for owner in owners}


def lent(words: Words, lenders: Collection[int]) -> list[int]:
    """The records of items, or of what is left of them, that still bear the LOAN of these tokens."""
    return _found(words, LOAN, lenders, (*IN_ITEMS, PINNED))


def _found(words: Words, field: int, tokens: Collection[int], states: tuple[int, ...]) -> list[int]:
    records = rows(words)
    found = _among(records[:, field], tokens) & _among(records[:, STATE], states)
    at: list[int] = (np.flatnonzero(found) * RECORD + HEADER).tolist()
    return at


def owners(words: Words) -> set[int]:
    """The tokens of the sessions that have something."""
    return set(rows(words, *OWNED)[:, OWNER].tolist())


def files(words: Words, states: tuple[int, ...]) -> dict[int, int]:
    """The sizes of the files whose records are in one of `states`, all of `items/` or all of `free/`, by the numbers in
    their names."""
    records = rows(words, *states)
    numbers = records[:, SEQ if states[0] in IN_ITEMS else FILE]
    return dict(zip(numbers.tolist(), records[:, BYTES].tolist(), strict=True))


def violations(words: Words) -> list[str]:
    """The invariants of the table that do not hold, in words; nothing where all is well.

    words: with no transition under way, up to the last record ever used.
    """
    check = _Check(words)
    check.lists()
    check.fields()
    check.sums()
    check.numbers()
    return check.found


def _by_state(words: dict[int, tuple[int, ...]]) -> npt.NDArray[np.bool]:
    """Whether a word, by the state of its record and its place in it, is one of these; of no state that is unknown."""
    table = np.zeros((POOLED + 2, RECORD), bool)
    for state, places in words.items():
        table[state, list(places)] = True
    return table


_NEVER_ZERO: Final = _by_state(NOT_ZERO)
_EVER_ZERO: Final = _by_state(ZERO)
_IN_ITEMS, _IN_ACTIVE, _UNLISTED = (
    np.isin(np.arange(POOLED + 2), states) for states in (IN_ITEMS, IN_ACTIVE, UNLISTED)
)


class _Check:
    """One look at all invariants."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self.records = rows(words)
        self.states = np.minimum(self.records[:, STATE], POOLED + 1).astype(np.intp)  # those unknown are one
        self.end = HEADER + len(self.records) * RECORD
        self.seen = bytearray(len(self.records))
        self.found: list[str] = []

    def expect(self, what: str, said: int, found: int) -> None:
        if said != found:
            self.found.append(f"{what}: the index says {said}, its records {found}")

    def walk(self, name: str, head: int, states: tuple[int, ...]) -> Iterator[int]:
        """The records of one list, until it ends or goes astray, which is noted."""
        words, record = self.words, self.words[head]
        while record:
            if not HEADER <= record < self.end or (record - HEADER) % RECORD:
                self.found.append(f"{name} links to {record}, where no record is")
                return
            row = (record - HEADER) // RECORD
            if self.seen[row]:
                self.found.append(f"{name} links to a record that is on a list already")
                return
            self.seen[row] = 1
            if words[record + STATE] not in states:
                self.found.append(f"{name} holds a record of state {words[record + STATE]}")
            yield record
            record = words[record + NEXT]

    def lists(self) -> None:
        """Every record is on the one list that its state says."""
        words = self.words
        for name, queue in (("the queue", READY), ("the redelivery queue", REDELIVERY)):
            count, last = 0, 0
            for record in self.walk(name, queue.head, (WAITING,)):
                count, last = count + 1, record
            self.expect(f"length of {name}", words[queue.length], count)
            self.expect(f"end of {name}", words[queue.tail], last)
        previous, astray = 0, 0
        for record in self.walk("the list of active records", ACTIVE, IN_ACTIVE):
            astray += words[record + PREV] != previous
            previous = record
        self.expect("wrong links back in the list of active records", 0, astray)
        for head in filter(words.__getitem__, range(BUCKETS, BUCKETS + BUCKET_COUNT)):
            for record in self.walk("the pool", head, (POOLED,)):
                if bucket(words[record + BYTES]) != head:
                    self.found.append("the pool holds a file among those of another size")
        for _ in self.walk("the list of unused records", UNUSED, (NOTHING,)):
            pass
        unlisted = int(_UNLISTED[self.states].sum())
        self.expect("records on no list", unlisted, self.seen.count(0))

    def fields(self) -> None:
        """Every word of a record is what its state says belongs there."""
        states = self.records[:, STATE]
        self.expect("records of unknown state", 0, int((states > POOLED).sum()))
        if not np.where(self.records == 0, _NEVER_ZERO[self.states], _EVER_ZERO[self.states]).any():
            return
        for state in range(POOLED + 1):
            of_state = self.records[states == state]
            if not len(of_state):
                continue
            for field in NOT_ZERO.get(state, ()):
                self.expect(
                    f"records of state {state} without word {field}", 0, int((of_state[:, field] == 0).sum())
                )
            for field in ZERO.get(state, ()):
                self.expect(
                    f"records of state {state} with word {field}", 0, int((of_state[:, field] != 0).sum())
                )

    def sums(self) -> None:
        """Counts and bytes in the header are those of the records."""
        words, states, sizes = self.words, self.records[:, STATE], self.records[:, BYTES]

        self.expect("items in flight", words[IN_FLIGHT_COUNT], int((states == IN_FLIGHT).sum()))
        self.expect("items delayed", words[DELAYED_COUNT], int((states == DELAYED).sum()))
        self.expect("files in the pool", words[POOL_COUNT], int((states == POOLED).sum()))
        self.expect("bytes of items", words[ITEM_BYTES], int(sizes[_IN_ITEMS[self.states]].sum()))
        self.expect("bytes in the pool", words[POOL_BYTES], int(sizes[states == POOLED].sum()))

    def numbers(self) -> None:
        """Sequence numbers, file numbers and times are possible."""
        records, words, states = self.records, self.words, self.records[:, STATE]
        items = records[_IN_ITEMS[self.states]]
        self.expect("items of the same number", 0, len(items) - len(set(items[:, SEQ].tolist())))
        self.expect("numbers not given out yet", 0, int((items[:, SEQ] >= words[NEXT_SEQ]).sum()))
        self.expect("the check of the next number", words[NEXT_SEQ_CHECK], words[NEXT_SEQ] ^ ALL_BITS)
        used = records[states != NOTHING, FILE]
        self.expect("files with two records", 0, len(used) - len(set(used.tolist())))
        due = records[_IN_ACTIVE[self.states], DUE]
        due = due[due > 0]
        if due.size and not 0 < words[NEXT_DUE] <= int(due.min()):
            self.found.append("a lease or delay ends before anybody would look")
