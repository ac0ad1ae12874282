"""An account of a spool's index against its directories, made independently of `spoolipc fsck`."""

from __future__ import annotations

import os
from collections.abc import Iterator

from spoolipc.layout import item_name
from spoolipc.party import Party

from spoolipc import SpoolReader, SpoolWriter
from spoolipc import words as W

IN_ITEMS = (W.WAITING, W.CLAIMED, W.DELAYED)
IN_FREE = (W.HELD, W.RESERVED, W.POOLED)
LEFTOVERS = (W.NOTHING,)


def party_of(face: SpoolWriter | SpoolReader) -> Party:
    """The party behind a writer or reader."""
    return face._sink.party if isinstance(face, SpoolWriter) else face._source.party


def audit(party: Party, *, orphans: bool = False) -> None:
    """Assert that index and directories say the same; the first locked step of it repairs what it finds.

    orphans: whether free/ may hold files that nobody knows, which `gc` removes.
    """
    party.run(_audit, orphans)


def _linked(words: memoryview[int], head: int, most: int) -> Iterator[int]:
    record = words[head]
    for _ in range(most + 1):
        if not record:
            return
        assert W.HEADER <= record < words[W.CAPACITY], record
        assert not (record - W.HEADER) % W.RECORD, record
        yield record
        record = words[record + W.NEXT]
    raise AssertionError("a list of the index does not end")


def _audit(party: Party, orphans: bool) -> None:
    words = party.index.words
    assert words[W.MARK] == W.CLEAN
    most = (words[W.CAPACITY] - W.HEADER) // W.RECORD
    seen: dict[int, str] = {}

    def walk(name: str, head: int, states: tuple[int, ...]) -> list[int]:
        found = list(_linked(words, head, most))
        for record in found:
            assert record not in seen, f"record {record} is in {seen.get(record)} and in {name}"
            assert words[record + W.STATE] in states, f"state {words[record + W.STATE]} in {name}"
            seen[record] = name
        return found

    waiting = []
    for name, queue in (("ready", W.READY), ("returned", W.RETURNED)):
        found = walk(name, queue, (W.WAITING,))
        assert words[queue + 2] == len(found), f"{name} counts {words[queue + 2]}, has {len(found)}"
        assert words[queue + 1] == (found[-1] if found else 0), f"{name} ends elsewhere"
        waiting += found
    away = walk("away", W.AWAY, (W.CLAIMED, W.DELAYED, W.HELD, W.RESERVED))
    previous = 0
    for record in away:
        assert words[record + W.PREV] == previous, "the list of files in hands is not linked back"
        previous = record
    pooled = []
    for head in range(W.BUCKETS, W.BUCKETS + 192):
        for record in walk(f"bucket {head}", head, (W.POOLED,)):
            assert W.bucket(words[record + W.BYTES]) == head
            pooled.append(record)
    walk("unused", W.UNUSED, LEFTOVERS)
    everything = range(W.HEADER, words[W.EDGE], W.RECORD)
    lost = [record for record in everything if record not in seen]
    assert not lost, f"records {lost} in state {[words[r + W.STATE] for r in lost]} are in no list"

    def files(states: tuple[int, ...]) -> list[int]:
        return sorted(words[r + W.FILE] for r in everything if words[r + W.STATE] in states)

    def size(states: tuple[int, ...]) -> int:
        return sum(words[r + W.BYTES] for r in everything if words[r + W.STATE] in states)

    in_items, in_free = files(IN_ITEMS), files(IN_FREE)
    assert [item_name(n) for n in in_items] == sorted(os.listdir(party.layout.items))
    there = os.listdir(party.layout.free)
    assert set(map(item_name, in_free)) <= set(there)
    assert orphans or len(in_free) == len(there)
    states = [words[r + W.STATE] for r in everything]
    assert words[W.IN_FLIGHT] == states.count(W.CLAIMED)
    assert words[W.DELAYED_COUNT] == states.count(W.DELAYED)
    assert words[W.POOL_COUNT] == len(pooled)
    assert words[W.POOL_BYTES] == size((W.POOLED,))
    assert words[W.ITEM_BYTES] == size(IN_ITEMS)
    assert words[W.NEXT_SEQ] > max(
        [0, *(words[r + W.SEQ] for r in everything if words[r + W.STATE] in IN_ITEMS)]
    )
    failed = [name for name in os.listdir(party.layout.failed) if name.endswith(".npy")]
    assert words[W.FAILED_COUNT] == len(failed)
