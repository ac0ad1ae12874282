"""Who still looks at a file: the arrays given out, and what happens to the file when the last view of them is gone.

A file is written again only when nobody can see it change: no array over it is left (an array's every view
keeps the array alive), and no fork happened while there was one, as the child has the views too.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from .index import Index

NO_FILE: Final = 2**64 - 1
"""Stands for the number of a file that is not an item yet."""


class Hold:
    """One file with arrays over it. record, index: where it is known; alone: nobody forked meanwhile."""

    __slots__ = ("alone", "index", "left", "number", "record")

    def __init__(self, index: Index, record: int, number: int, *, alone: bool = True) -> None:
        self.index = index
        self.record = record
        self.number = number
        self.left = 0
        self.alone = alone


class _Watch(weakref.ref[Any]):
    __slots__ = ("hold", "holds")
    hold: Hold
    holds: Holds


def _gone(watch: weakref.ref[Any]) -> None:
    # Runs at any moment, on any thread, even inside the lock: it only takes note.
    assert isinstance(watch, _Watch)
    hold, holds = watch.hold, watch.holds
    holds.watches.pop(id(watch), None)
    hold.left -= 1
    if not hold.left:
        holds.pending.append(hold)


class Holds:
    """The files that this party's arrays look at. `pending` are those nobody looks at any more."""

    def __init__(self) -> None:
        self.pending: deque[Hold] = deque()
        self.watches: dict[int, _Watch] = {}
        _all.add(self)

    def add(self, hold: Hold, arrays: Sequence[Any]) -> None:
        """Watch the arrays over a file."""
        hold.left += len(arrays)
        for array in arrays:
            watch = _Watch(array, _gone)
            watch.hold = hold
            watch.holds = self
            self.watches[id(watch)] = watch

    def live(self) -> list[Hold]:
        """The files still looked at, each once."""
        return list({id(watch.hold): watch.hold for watch in list(self.watches.values())}.values())


_all: weakref.WeakSet[Holds] = weakref.WeakSet()


def _no_longer_alone() -> None:
    for holds in list(_all):
        for hold in holds.live():
            hold.alone = False


os.register_at_fork(before=_no_longer_alone)
