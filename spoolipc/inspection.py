"""What `fsck` looks at: every file of a spool, the index, and each against the other.

A look that changes nothing. The index is copied under its lock and studied without it; as the spool may be in
use meanwhile, what the copy and a listing disagree on is looked at again in a locked step before it is called
a problem.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np

from . import history
from . import words as W
from .census import Progress, batches, strangers_at_top, token_of
from .errors import BadItem
from .failed import read_item
from .index import exists
from .layout import item_name, item_number
from .ledger import IN_FREE, IN_ITEMS, Table, index_problems, table, wrong_sizes
from .mend import Mender, permit
from .onlooker import Onlooker
from .premises import Kind, Problem, wrong_file
from .rebuild import LAST
from .reconcile import contradictions, disagreements, is_orphaned
from .tend import temporary_owner

Mend = Callable[[Mender], None]
Found = list[tuple[Problem, Mend | None]]


_MOST_OF_A_KIND = 10_000
_SLICE = 65536
_AT_ONCE: Final[dict[Kind, Mend]] = {
    "missing": Mender.rebuild,
    "unknown": Mender.rebuild,
    "size": Mender.rebuild,
    "orphan": Mender.sweep,
}
"""What repairs very many problems of a kind faster than one by one."""


class Inspection:
    """One look at all of a spool. found: problems, each with its repair, if there is one.

    items, bytes: item files looked at, in `items/` and `failed/`.
    """

    def __init__(self, spool: Onlooker, progress: Progress | None) -> None:
        self.spool = spool
        self.found: Found = []
        self.items = 0
        self.bytes = 0
        self._progress = progress
        self._counts: Counter[Kind] = Counter()
        self._damaged: set[int] = set()
        self._seen = 0

    def run(self) -> None:
        """Look at everything."""
        words = self.spool.run(Onlooker.snapshot)
        self._index(words)
        items = self._files("items")
        free = self._files("free")
        if words is not None:
            self._compare(words, items, IN_ITEMS)
            self._compare(words, free, IN_FREE)
        self._files("failed")
        self._names("tmp", temporary_owner)
        self._names("alive", token_of)
        for name in strangers_at_top(self.spool.layout):
            self._note(Problem("stranger", name, "is none of the spool's names"))
        for kind, count in self._counts.items():
            if count > _MOST_OF_A_KIND:
                more = Problem(kind, ".", f"{count - _MOST_OF_A_KIND} more of this kind")
                self.found.insert(0, (more, _AT_ONCE.get(kind)))

    def _note(self, problem: Problem, mend: Mend | None = None) -> None:
        """Keep a problem. Of a kind of which there are very many, the rest is only counted: the next look
        names it."""
        self._counts[problem.kind] += 1
        if self._counts[problem.kind] <= _MOST_OF_A_KIND:
            self.found.append((problem, mend))

    def _looked_at(self, count: int) -> None:
        self._seen += count
        if self._progress is not None:
            self._progress(self._seen, None)

    def _index(self, words: memoryview[int] | None) -> None:
        if words is None:
            self._note(Problem("index", "index", self.spool.damage), Mender.rebuild)
            return
        for what in index_problems(words):
            self._note(Problem("index", "index", what), Mender.rebuild)
        for what in self.spool.run(contradictions):
            self._note(Problem("limits", "index", what), Mender.restate)

    def _names(self, part: str, known: Callable[[str], int]) -> None:
        """Look at the files of a part that holds no items: known(name) is 0 for a stranger."""
        directory = self.spool.layout.parts[part]
        for names in batches(directory):
            for name in names:
                if known(name):
                    self._status(directory, f"{part}/{name}", name)
                else:
                    self._note(Problem("stranger", f"{part}/{name}", "is none of the spool's names"))
            self._looked_at(len(names))

    def _status(self, directory: int, where: str, name: str) -> os.stat_result | None:
        """A file's status; None when it is gone or not a regular file."""
        layout = self.spool.layout
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        problem = wrong_file(status, layout.mode, where)
        if problem is None:
            return status
        number = item_number(name)
        if problem.kind == "mode":
            self._note(problem, _permission(directory, name, layout.file_mode))
        elif problem.kind == "planted" and directory == layout.items and number is not None:
            self._note(problem, partial(Mender.set_aside, number=number, why=problem.what))
        elif (
            problem.kind != "planted" or directory != layout.failed or number is None
        ):  # else set aside already
            self._note(problem)
        return status if problem.kind != "planted" else None

    def _files(self, part: str) -> tuple[Table, Table]:
        """Look at the files of a part that holds items; returns their numbers and sizes."""
        directory = self.spool.layout.parts[part]
        numbers, sizes = array("Q"), array("Q")
        for names in batches(directory):
            for name in names:
                where = f"{part}/{name}"
                number = item_number(name)
                if number is None or (part != "free" and number >= LAST):
                    self._other(directory, part, name)
                    continue
                status = self._status(directory, where, name)
                if status is not None:
                    numbers.append(number)
                    sizes.append(status.st_size)
                    if part == "items":
                        self._item(number, where)
                if part == "failed":
                    self._reason(number, where)
            self._looked_at(len(names))
        return np.array(numbers, np.uint64), np.array(sizes, np.uint64)

    def _other(self, directory: int, part: str, name: str) -> None:
        number = history.history_number(name)
        if part == "failed" and number is not None:
            self._status(directory, f"{part}/{name}", name)
            if self.spool.run(is_orphaned, number):
                problem = Problem("orphan", f"{part}/{name}", "is the history of an item that is no more")
                self._note(problem, Mender.sweep)
        else:
            self._note(Problem("stranger", f"{part}/{name}", "is none of the spool's names"))

    def _item(self, number: int, where: str) -> None:
        layout = self.spool.layout
        try:
            size, _, _ = read_item(layout, layout.items, number, whole=True)
            said = ""
        except FileNotFoundError:
            return  # taken meanwhile
        except BadItem as error:
            size, said = 0, str(error)
            if not exists(layout.items, number):
                return  # taken while it was read, and its file written again
        self.items += 1
        self.bytes += size
        if said:
            self._damaged.add(number)
            mend = partial(Mender.set_aside, number=number, why=f"damaged: {said}")
            self._note(Problem("item", where, said), mend)

    def _reason(self, number: int, where: str) -> None:
        if not history.read(self.spool.layout, number) and exists(self.spool.layout.failed, number):
            why = "unknown: its history was lost"
            self._note(
                Problem("failed", where, "has no reason"), partial(Mender.explain, number=number, why=why)
            )

    def _compare(self, words: memoryview[int], listed: tuple[Table, Table], states: tuple[int, ...]) -> None:
        """Hold the files of a part against the records of its states."""
        numbers, sizes = listed
        records = table(words)
        records = records[np.isin(records[:, W.STATE], states)]
        part = "items" if states is IN_ITEMS else "free"
        suspects = np.setxor1d(numbers, records[:, W.FILE])
        for start in range(0, len(suspects), _SLICE):
            self._disagreement(part, *self.spool.run(disagreements, suspects[start : start + _SLICE], states))
        for number, said, size in wrong_sizes(records, numbers, sizes):
            if number not in self._damaged:
                mend = partial(Mender.measure if part == "items" else Mender.drop_lost, number=number)
                what = f"has {size} bytes, the index says {said}"
                self._note(Problem("size", f"{part}/{item_name(number)}", what), mend)

    def _disagreement(self, part: str, unknown: list[int], missing: list[int]) -> None:
        for number in unknown:
            where = f"{part}/{item_name(number)}"
            if part == "items":
                self._note(
                    Problem("unknown", where, "is an item that the index does not know"), Mender.rebuild
                )
            else:
                self._note(
                    Problem("orphan", where, "is a file that no item and no process needs"), Mender.sweep
                )
        for number in missing:
            mend = partial(Mender.set_aside, number=number, why="its file is missing")
            lost = partial(Mender.drop_lost, number=number)
            problem = Problem("missing", f"{part}/{item_name(number)}", "is in the index, but not there")
            self._note(problem, mend if part == "items" else lost)


def _permission(directory: int, name: str, mode: int) -> Mend:
    return lambda mender: permit(directory, name, mode)
