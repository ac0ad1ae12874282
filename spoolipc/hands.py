"""A reader's hands: how it opens an item's file, takes it off the spool, and lets go of it when nobody looks."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from . import changes, history, npy, pool
from . import words as W
from .checksum import verify
from .engine import Array, Payload
from .errors import BadItem
from .footer import Footer
from .holds import Hold, Holds
from .index import unlink_missing_ok
from .layout import Limits, item_name
from .loans import release
from .maps import MOST_MAPPED, Maps, check_regular, is_shortage, read_small
from .newfile import SMALL
from .party import Party
from .tend import tend


class Opened(NamedTuple):
    """An item's file, read: views of its pages (`held`), or arrays of their own when it is small.

    single: the file has no other name, so that it may be written again.
    """

    payload: Payload
    held: bool
    single: bool


class Hands:
    """A reader's party, the files its arrays look at, and the mappings it keeps.

    asked: limits, None for what is there. own: items in hand, as they were last counted.
    verify: compare every item with its checksum.
    """

    def __init__(self, path: str | os.PathLike[str], asked: Limits, *, verify: bool = False) -> None:
        self.party = Party(path, asked)
        self.verify = verify
        self.own = 0
        self._forget()
        self.party.on_adopt = self._forget
        self.party.run(tend, force=True)

    def _forget(self) -> None:
        """Start afresh: the index is another, or this is a forked child."""
        self.holds = Holds()
        self.maps = Maps(writable=False, most_bytes=MOST_MAPPED)

    def open_item(self, words: memoryview[int], record: int, seq: int) -> Opened:
        """Map and read an item's file. Raises BadItem, OSError.

        words, record: where the index says of which birth the file is.
        """
        layout = self.party.layout
        name = item_name(seq)
        try:
            status = os.stat(name, dir_fd=layout.items, follow_symlinks=False)
        except FileNotFoundError:
            layout.check_present()
            raise BadItem("its file is missing") from None
        check_regular(status)
        size = status.st_size
        if not size:
            raise BadItem("the file is empty")
        birth = words[record + W.BIRTH]
        buffer: mmap.mmap | bytes
        if size <= SMALL and not self.maps.wanted(birth):
            buffer = read_small(layout.items, name, size)
        else:
            buffer = self.maps.of(layout.items, name, status, birth, record)
        blocks, tail = npy.parse(buffer, size)
        if self.verify:
            verify(buffer, tail)
        arrays = tuple(npy.view(buffer, block, writeable=False) for block in blocks)
        small = tail.data_end <= SMALL
        if small and isinstance(buffer, mmap.mmap):
            arrays = tuple(_copied(array) for array in arrays)
        return Opened(_payload(arrays, tail), not small, status.st_nlink == 1)

    def first_to_pool(self) -> int:
        """The record of the first file that no array looks at any more, if nothing keeps it from the pool, else 0."""
        hold, words = self.holds.pending[0], self.party.index.words
        record = hold.record
        if (
            hold.alone
            and hold.index is self.party.index
            and words[record + W.STATE] == W.HELD
            and words[record + W.OWNER] == self.party.token
            and words[record + W.FILE] == hold.number
            and not words[record + W.LOAN]
            and not words[record + W.FLAGS] & W.DURABLE
            and pool.may_pool(words, words[record + W.BYTES])
        ):
            return record
        return 0

    def is_single(self, seq: int) -> bool:
        """Whether an item's file is a regular one that has no other name."""
        try:
            status = os.stat(item_name(seq), dir_fd=self.party.layout.items, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _copied(array: Array) -> Array:
    copy = array.copy(order="K")
    copy.flags.writeable = False
    return copy


def _payload(arrays: tuple[Array, ...], tail: Footer) -> Payload:
    return Payload(arrays, tail.names, tail.meta)


def take_off(party: Party, hands: Hands, record: int, queue: int, single: bool, hold: Hold | None) -> None:
    """An item leaves the spool for good: its file goes to `free/` to be written again, or is unlinked.

    hold: the arrays that look at the file, None when there are none.
    """
    index = party.index
    words = index.words
    seq, size = words[record + W.SEQ], words[record + W.BYTES]
    attempt = words[record + W.ATTEMPT]
    # Whoever had the item in hand before may still look at its file.
    keep = (
        single
        and attempt == (0 if queue else 1)
        and not words[record + W.FLAGS] & W.DURABLE
        and pool.may_pool(words, size)
    )
    if not keep:
        hands.maps.forget(words[record + W.BIRTH])
    holder = words[record + W.LOAN] if hold is None else party.token
    if keep and queue:
        stores = changes.get(index, record, queue, holder)
    else:
        stores = changes.delivered(index, changes.leave(index, record, queue, holder, keep))
    if hold is None:
        stores[record + W.LOAN] = 0
    try:
        index.change(W.LEAVE, seq, stores, _leaving(party, item_name(seq), keep))
    except OSError as error:
        if not keep or not is_shortage(error):
            raise
        # A full file system has no block for another name in `free/`; taking items must make room all the same.
        take_off(party, hands, record, queue, False, hold)
        return
    party.news("space")
    if words[W.SHUTDOWN]:
        party.news("items", 8)
    if attempt > (0 if queue else 1):
        history.forget(party.layout, seq)


def _leaving(party: Party, name: str, keep: bool) -> Callable[[], None]:
    """The system call that goes with an item's leaving: its file is moved to `free/`, or unlinked."""
    layout = party.layout
    if keep:
        return partial(os.rename, name, name, src_dir_fd=layout.items, dst_dir_fd=layout.free)
    return partial(unlink_missing_ok, layout.items, name)


def release_pending(party: Party, hands: Hands) -> None:
    """Files that no array looks at any more go to the pool, or away when it is full or a fork may look at them."""
    pending = hands.holds.pending
    while pending:
        hold = pending.popleft()
        words = party.index.words
        record = hold.record
        if (
            hold.index is not party.index
            or words[record + W.STATE] != W.HELD
            or words[record + W.OWNER] != party.token
            or words[record + W.FILE] != hold.number
        ):
            continue
        birth = words[record + W.BIRTH]
        if not release(party, record, hold.alone):
            hands.maps.forget(birth)
