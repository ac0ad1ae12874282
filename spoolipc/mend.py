"""What `fsck` repairs: each damage by the smallest change that leaves nobody's work worse off.

Every repair looks again, under the index lock, whether there is still something to repair: the spool may be
in use. A damaged item is moved aside with its reason, never removed. Only an index that contradicts itself or
does not know an item is built again whole; what readers had in hands is then delivered again.
"""

from __future__ import annotations

import os

import numpy as np

from . import alive, history
from . import words as W
from .giveup import give_up
from .index import Index, Torn, exists
from .layout import Layout, Limits, agree, item_name
from .ledger import IN_FREE, IN_ITEMS, position, table
from .marker import read_shutdown
from .party import Party
from .rebuild import set_limits
from .sweep import gc
from .tend import drop_file, evict

_WHO = "spoolipc fsck"


class Mender:
    """Repairs one spool, as a party of it."""

    def __init__(self, party: Party) -> None:
        self._party = party
        self._rebuilt = False
        self._swept = False

    def rebuild(self) -> None:
        """Build the index again, once."""
        if not self._rebuilt:
            self._rebuilt = True
            self._party.run(_tear, [])

    def sweep(self) -> None:
        """Remove what belongs to nobody, once."""
        if not self._swept:
            self._swept = True
            gc(self._party.path)

    def set_aside(self, number: int, why: str) -> None:
        """Move a damaged item to `failed/`, or take one off that has lost its file."""
        self._party.run(_set_aside, number, why)

    def drop_lost(self, number: int) -> None:
        """Forget a file of `free/` that is not there, or not as the index has it."""
        self._party.run(_drop_lost, number)

    def measure(self, number: int) -> None:
        """Correct the size that the index has of an item."""
        self._party.run(_measure, number)

    def explain(self, number: int, why: str) -> None:
        """Give a dead letter a reason."""
        self._party.run(_explain, number, why)

    def restate(self) -> None:
        """Make the index say what spool.json, the shutdown marker and `failed/` say."""
        self._party.run(_restate)


def permit(directory: int, name: str, mode: int) -> None:
    """Give a file or directory of ours its mode, following no link."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _tear(party: Party, done: list[bool]) -> None:
    if not done:
        done.append(True)
        raise Torn("fsck found it damaged")


def _record_of(index: Index, number: int, states: tuple[int, ...]) -> int:
    """The position of the record of a file, 0 when there is none."""
    records = table(index.words)
    rows = np.flatnonzero((records[:, W.FILE] == number) & np.isin(records[:, W.STATE], states))
    return position(int(rows[0])) if rows.size else 0


def _before(index: Index, record: int, state: int) -> int:
    """The record of `state` that links to `record`, 0 when there is none."""
    records = table(index.words)
    rows = np.flatnonzero((records[:, W.NEXT] == record) & (records[:, W.STATE] == state))
    return position(int(rows[0])) if rows.size else 0


def _place(index: Index, record: int) -> tuple[int, int]:
    """The queue in which a record waits and the one before it there, zeros for a record in somebody's
    hands."""
    words = index.words
    if words[record + W.STATE] != W.WAITING:
        return 0, 0
    previous = 0
    candidate = words[W.RETURNED]
    for _ in range(words[W.RETURNED_COUNT]):
        if candidate == record:
            return W.RETURNED, previous
        previous, candidate = candidate, words[index.known(candidate) + W.NEXT]
    previous = _before(index, record, W.WAITING)
    if not previous and words[W.READY] != record:
        raise Torn("an item waits in no queue")
    return W.READY, previous


def _set_aside(party: Party, number: int, why: str) -> None:
    index, layout = party.index, party.layout
    record = _record_of(index, number, IN_ITEMS)
    if record:
        owner = index.words[record + W.OWNER]
        if not owner or alive.is_dead(layout.alive, owner):  # else its reader finds out by itself
            queue, previous = _place(index, record)
            give_up(party, record, queue, _WHO, why, previous=previous)
    elif exists(layout.items, number):
        # The index does not know it. A crash before the count is corrected leaves that to the next fsck.
        history.note(layout, number, 0, _WHO, why)
        name = item_name(number)
        os.rename(name, name, src_dir_fd=layout.items, dst_dir_fd=layout.failed)
        index.change(W.MEMORY, 0, {W.FAILED_COUNT: _count_failed(layout)})


def _drop_lost(party: Party, number: int) -> None:
    index = party.index
    record = _record_of(index, number, IN_FREE)
    if not record:
        return
    if index.words[record + W.STATE] != W.POOLED:
        drop_file(party, record)
        return
    head = W.bucket(index.words[record + W.BYTES])
    previous = _before(index, record, W.POOLED)
    if not previous and index.words[head] != record:
        raise Torn("a pooled file is in no list")
    evict(party, record, previous + W.NEXT if previous else head)


def _measure(party: Party, number: int) -> None:
    index = party.index
    record = _record_of(index, number, IN_ITEMS)
    if record and exists(party.layout.items, number):
        size = os.stat(item_name(number), dir_fd=party.layout.items, follow_symlinks=False).st_size
        words = index.words
        total = max(0, words[W.ITEM_BYTES] - words[record + W.BYTES] + size)
        index.change(W.MEMORY, 0, {record + W.BYTES: size, W.ITEM_BYTES: total})


def _explain(party: Party, number: int, why: str) -> None:
    layout = party.layout
    if exists(layout.failed, number) and not history.read(layout, number):
        history.forget(layout, number)  # a torn line in it would spoil the next
        history.note(layout, number, 0, _WHO, why)


def _restate(party: Party) -> None:
    layout, index = party.layout, party.index
    set_limits(index, agree(layout, Limits()))
    said = {W.SHUTDOWN: read_shutdown(layout), W.FAILED_COUNT: _count_failed(layout)}
    index.change(W.MEMORY, 0, said)


def _count_failed(layout: Layout) -> int:
    """How many dead letters there are."""
    return len(history.failed_numbers(layout))
