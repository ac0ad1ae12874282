"""Whether an index agrees with itself: its lists, states, counts and sums, as a function of its words
alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from . import words as W

Table = npt.NDArray[np.uint64]
IN_ITEMS: Final = (W.WAITING, W.CLAIMED, W.DELAYED)
IN_FREE: Final = (W.HELD, W.RESERVED, W.POOLED)
IN_HANDS: Final = (W.CLAIMED, W.DELAYED, W.HELD, W.RESERVED)
_BUCKETS = 192


def table(words: memoryview[int]) -> Table:
    """The records of an index, used now or once, one a row: a view of its words."""
    end = min(max(words[W.EDGE], W.HEADER), len(words))
    end -= (end - W.HEADER) % W.RECORD
    return np.frombuffer(words, np.uint64)[W.HEADER : end].reshape(-1, W.RECORD)


def position(row: int) -> int:
    """The position of the record in a row of `table`."""
    return W.HEADER + row * W.RECORD


def files_of(records: Table, states: tuple[int, ...]) -> Table:
    """The numbers of the files whose records are in one of `states`."""
    files: Table = records[np.isin(records[:, W.STATE], states), W.FILE]
    return files


def wrong_sizes(records: Table, numbers: Table, sizes: Table) -> list[tuple[int, int, int]]:
    """The files whose records have another size: (number, size in the record, size of the file).

    numbers, sizes: of the files listed, in any order.
    """
    if not len(numbers):
        return []
    order = np.argsort(numbers)
    place = np.searchsorted(numbers, records[:, W.FILE], sorter=order)
    found = order[np.minimum(place, len(numbers) - 1)]
    wrong = (numbers[found] == records[:, W.FILE]) & (sizes[found] != records[:, W.BYTES])
    return [
        (int(record[W.FILE]), int(record[W.BYTES]), int(size))
        for record, size in zip(records[wrong], sizes[found][wrong], strict=True)
    ]


def index_problems(words: memoryview[int]) -> list[str]:
    """What is wrong with an index, in words; nothing where all is well.

    words: a snapshot with no change under way, up to the last record ever used.
    """
    check = _Check(words)
    check.lists()
    check.sums()
    return check.found


class _Check:
    def __init__(self, words: memoryview[int]) -> None:
        self.words = words
        self.records = table(words)
        self.end = position(len(self.records))
        self.seen = bytearray(len(self.records))
        self.found: list[str] = []

    def _expect(self, what: str, said: int, found: int) -> None:
        if said != found:
            self.found.append(f"{what}: the index says {said}, its records {found}")

    def _walk(self, name: str, head: int, states: tuple[int, ...]) -> Iterator[int]:
        """The records of one list, until it ends or goes astray, which is noted."""
        words, record = self.words, self.words[head]
        while record:
            if not W.HEADER <= record < self.end or (record - W.HEADER) % W.RECORD:
                self.found.append(f"{name} links to {record}, where no record is")
                return
            row = (record - W.HEADER) // W.RECORD
            if self.seen[row]:
                self.found.append(f"{name} links to a record that is on a list already")
                return
            self.seen[row] = 1
            if words[record + W.STATE] not in states:
                self.found.append(f"{name} holds a record of state {words[record + W.STATE]}")
            yield record
            record = words[record + W.NEXT]

    def lists(self) -> None:
        """Every record is on the one list that its state says."""
        words = self.words
        for name, queue in (("the ready queue", W.READY), ("the queue of returned items", W.RETURNED)):
            count, last = 0, 0
            for record in self._walk(name, queue, (W.WAITING,)):
                count, last = count + 1, record
            self._expect(f"length of {name}", words[queue + 2], count)
            self._expect(f"end of {name}", words[queue + 1], last)
        previous, astray = 0, 0
        for record in self._walk("the list of files in hands", W.AWAY, IN_HANDS):
            astray += words[record + W.PREV] != previous
            previous = record
        self._expect("wrong links back in the list of files in hands", 0, astray)
        for head in range(W.BUCKETS, W.BUCKETS + _BUCKETS):
            for record in self._walk("the pool", head, (W.POOLED,)):
                if W.bucket(words[record + W.BYTES]) != head:
                    self.found.append("the pool holds a file among those of another size")
        for _ in self._walk("the list of unused records", W.UNUSED, (W.NOTHING,)):
            pass
        self._expect("records on no list", 0, self.seen.count(0))

    def sums(self) -> None:
        """Counts and bytes in the header are those of the records."""
        words, states = self.words, self.records[:, W.STATE]
        sizes = self.records[:, W.BYTES]

        def size(*of: int) -> int:
            return int(sizes[np.isin(states, of)].sum())

        self._expect("items in flight", words[W.IN_FLIGHT], int((states == W.CLAIMED).sum()))
        self._expect("items delayed", words[W.DELAYED_COUNT], int((states == W.DELAYED).sum()))
        self._expect("files in the pool", words[W.POOL_COUNT], int((states == W.POOLED).sum()))
        self._expect("bytes of items", words[W.ITEM_BYTES], size(*IN_ITEMS))
        self._expect("bytes in the pool", words[W.POOL_BYTES], size(W.POOLED))
        self._expect("records of unknown state", 0, int((states > W.POOLED).sum()))
        self._numbers(states)

    def _numbers(self, states: Table) -> None:
        """Sequence numbers, file numbers and times are possible."""
        records, words = self.records, self.words
        items = records[np.isin(states, IN_ITEMS)]
        self._expect(
            "items whose file has another number", 0, int((items[:, W.SEQ] != items[:, W.FILE]).sum())
        )
        self._expect("numbers not given out yet", 0, int((items[:, W.SEQ] >= words[W.NEXT_SEQ]).sum()))
        used = records[states != W.NOTHING, W.FILE]
        self._expect("files with two records", 0, len(used) - len(np.unique(used)))
        due = records[np.isin(states, (W.CLAIMED, W.DELAYED)), W.DUE]
        due = due[due > 0]
        if due.size and not 0 < words[W.NEXT_DUE] <= int(due.min()):
            self.found.append("a lease or delay ends before anybody would look")
