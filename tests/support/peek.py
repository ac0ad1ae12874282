"""A look at a spool's table from outside: the only place in the tests that knows how it is stored."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from spoolipc.directory import table as W
from spoolipc.directory.transitions import CLEAN

State = Literal["nothing", "waiting", "in_flight", "delayed", "pinned", "reserved", "pooled"]
IN_ITEMS: Final[tuple[State, ...]] = ("waiting", "in_flight", "delayed")
IN_FREE: Final[tuple[State, ...]] = ("pinned", "reserved", "pooled")
_STATES: Final[tuple[State, ...]] = (
    "nothing", "waiting", "in_flight", "delayed", "pinned", "reserved", "pooled",
)  # fmt: skip

_HEADER: Final = {
    "magic": W.MAGIC,
    "version": W.VERSION,
    "boot": W.BOOT,
    "capacity": W.CAPACITY,
    "transition": W.MARK,
    "journal_length": W.STORES,
    "journal": W.JOURNAL,  # positions of stores, then their values
    "next_seq": W.NEXT_SEQ,
    "queue_head": W.READY.head,
    "queue_tail": W.READY.tail,
    "queue_count": W.READY.length,
    "redelivered_head": W.REDELIVERY.head,
    "redelivered_tail": W.REDELIVERY.tail,
    "redelivered_count": W.REDELIVERY.length,
    "owned_head": W.ACTIVE,  # of the files that a session has, and of the delayed items
    "unused_head": W.UNUSED,
    "first_bucket": W.BUCKETS,
    "item_bytes": W.ITEM_BYTES,
    "pooled_bytes": W.POOL_BYTES,
    "pooled": W.POOL_COUNT,
    "in_flight": W.IN_FLIGHT_COUNT,
    "delayed": W.DELAYED_COUNT,
    "shutdown": W.SHUTDOWN,  # 0, 1 draining, 2 discarded
    "housekeeping_time": W.HOUSEKEPT,
    "maxsize": W.MAXSIZE,
}
_RECORD: Final = {"state": W.STATE, "next": W.NEXT, "seq": W.SEQ, "put_time": W.PUT_TIME, "file": W.FILE}
HEADER_BYTES: Final = W.HEADER * W.WORD
COUNTS: Final = range(W.MARK, W.GROUPS)
"""Positions of the words that queues, counts and limits are in; those before them say what the file is."""
POSITIONS: Final = range(W.MARK, W.HEADER + 12 * W.RECORD)
"""Positions of nearly all words of a small table, but for those that say what the file is."""
RECORDS: Final = range(W.HEADER, W.HEADER + 13 * W.RECORD, W.RECORD)
"""What the links of a small table may hold."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record. owner, loan: tokens, 0 for none. file: the number in the file's name.

    at: where it stands, which is what links to it hold.
    """

    at: int
    state: State
    seq: int
    attempt: int
    owner: int
    loan: int
    due: int
    durable: bool
    has_metadata: bool
    file: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Peek:
    """A table at one moment. queue, redelivered: sequence numbers in the order in which they will be delivered."""

    rows: tuple[Row, ...]
    queue: tuple[int, ...]
    redelivered: tuple[int, ...]
    pooled: tuple[int, ...]
    counts: dict[str, int]
    clean: bool
    holder: int

    def of(self, *states: State) -> list[Row]:
        """The rows in one of `states`."""
        return [row for row in self.rows if row.state in states]

    def row(self, seq: int) -> Row:
        """The row of the item `seq`, which is in `items/`."""
        (found,) = [row for row in self.rows if row.state in IN_ITEMS and row.seq == seq]
        return found


def peek_table(path: str | os.PathLike[str]) -> Peek:
    """The table of the spool at `path`, read without its lock: nothing may change it meanwhile."""
    words = memoryview(Path(path, "index").read_bytes()).cast("Q")

    def row(at: int) -> Row:
        return Row(
            at,
            _STATES[words[at + W.STATE]],
            words[at + W.SEQ],
            words[at + W.ATTEMPT],
            words[at + W.OWNER],
            words[at + W.LOAN],
            words[at + W.DUE],
            bool(words[at + W.FLAGS] & W.NEVER_AGAIN),
            bool(words[at + W.FLAGS] & W.HAS_METADATA),
            words[at + (W.SEQ if words[at + W.STATE] in W.IN_ITEMS else W.FILE)],
            words[at + W.BYTES],
        )

    def linked(head: int, field: int) -> tuple[int, ...]:
        found, at = [], words[head]
        while at:
            found.append(words[at + field])
            at = words[at + W.NEXT]
            assert len(found) <= words[W.CAPACITY], "a list does not end"
        return tuple(found)

    counts = {
        "next_seq": words[W.NEXT_SEQ],
        "waiting": words[W.READY.length] + words[W.REDELIVERY.length],
        "redelivered": words[W.REDELIVERY.length],
        "in_flight": words[W.IN_FLIGHT_COUNT],
        "delayed": words[W.DELAYED_COUNT],
        "pooled": words[W.POOL_COUNT],
        "pooled_bytes": words[W.POOL_BYTES],
        "item_bytes": words[W.ITEM_BYTES],
        "delivered_total": words[W.DELIVERED_TOTAL],
        "capacity": (words[W.CAPACITY] - W.HEADER) // W.RECORD,
    }
    pooled = tuple(
        file for head in range(W.BUCKETS, W.BUCKETS + W.BUCKET_COUNT) for file in linked(head, W.FILE)
    )
    return Peek(
        tuple(row(at) for at in range(W.HEADER, words[W.EDGE], W.RECORD)),
        linked(W.READY.head, W.SEQ),
        linked(W.REDELIVERY.head, W.SEQ),
        pooled,
        counts,
        words[W.MARK] == CLEAN,
        words[W.HOLDER],
    )


def poke(path: str | os.PathLike[str], name: str | int, value: int | str, row: Row | None = None) -> int:
    """Overwrite one word of the table in place, as a stray store would; returns what was there.

    name: of a field of the header, or of the record that `row` shows; "bucket" with a row is the head of the pooled
    files of its size. An int is the word's position. value: a str is the state of that name.
    """
    if isinstance(name, int):
        at = name
    elif row is None:
        at = _HEADER[name]
    else:
        at = W.bucket(row.bytes) if name == "bucket" else row.at + _RECORD[name]
    if isinstance(value, str):
        value = next(code for code, state in enumerate(_STATES) if state == value)
    with open(Path(path, "index"), "r+b") as file:
        file.seek(at * W.WORD)
        before = file.read(W.WORD)
        file.seek(at * W.WORD)
        file.write(value.to_bytes(W.WORD, "little"))
    return int.from_bytes(before, "little")
