"""The getting side of the directory engine.

`get` is one locked step: look at the first item, map it, move its file out of `items/`. A crash before the
move leaves the item waiting; after it the item is gone, as with any queue. `claim` and `ack` are two steps
with the work between them: a crash before the second gives the item to another reader.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from . import changes, history, npy
from . import words as W
from .contents import read_contents
from .engine import Array, Contents, Delivery, Payload
from .errors import BadItem, Empty, LeaseExpired, ShutDown
from .footer import Footer
from .giveup import give_up
from .holds import Hold, Holds
from .index import Index, exists, unlink_missing_ok
from .layout import Limits, item_name
from .loans import release
from .maps import MOST_MAPPED, Maps, check_regular
from .newfile import SMALL
from .party import Party
from .tend import drop_file, return_item, tend
from .waiting import wait

_LONGEST: Final = 1e9
"""Seconds of the longest lease or delay, 31 years."""


@dataclass(slots=True)
class Claim:
    """An item in this reader's hands, as the index knows it.

    end: where the footer begins, 0 when not known. hold: its arrays, once loaded. single: its file was seen
    to have no other name, so that it may be written again.
    """

    index: Index
    record: int
    seq: int
    end: int
    peeked: bool = False
    hold: Hold | None = None
    single: bool = False


class Opened(NamedTuple):
    """An item's file, read: views of its pages (`held`), or arrays of their own when it is small.

    single: the file has no other name, so that it may be written again.
    """

    payload: Payload
    held: bool
    single: bool


class DirectorySource:
    """A reader's party in a spool directory. asked: limits, None for what is there."""

    def __init__(self, path: str | os.PathLike[str], asked: Limits) -> None:
        self.party = Party(path, asked)
        self.own = 0
        self._forget()
        self.party.on_adopt = self._forget
        self.party.run(tend, force=True)

    def _forget(self) -> None:
        """Start afresh: the index is another, or this is a forked child."""
        self.holds = Holds()
        self.maps = Maps(writable=False, most_bytes=MOST_MAPPED)

    def get(self, limit: int) -> list[Payload]:
        """Take up to `limit` items off the spool for good. Raises Empty, ShutDown."""
        got: list[Payload] = []
        self.party.run(_get, self, limit, got)
        return got

    def claim(self, limit: int, lease: float | None) -> list[Delivery]:
        """Take up to `limit` items in hand, for `lease` seconds or as long as this party lives.

        Raises Empty, ShutDown.
        """
        taken: list[Delivery] = []
        self.party.run(_claim, self, limit, lease, taken)
        return taken

    def load(self, delivery: Delivery) -> Payload:
        """The contents of an item in hand; its arrays are read-only views. Raises BadItem, having given the item up."""
        claim: Claim = delivery.handle
        index = self.party.index
        if claim.index is not index:
            raise _expired(self.party, claim.seq)
        try:
            with self.party:
                opened = self._open(index, claim.record, claim.seq)
        except BadItem as error:
            self.party.run(_reject, self, delivery, f"damaged: {error}")
            raise
        claim.single = opened.single
        if opened.held:
            claim.hold = claim.hold or Hold(index, claim.record, claim.seq)
            self.holds.add(claim.hold, opened.payload.arrays)
        return opened.payload

    def contents(self, delivery: Delivery) -> Contents:
        """What an item in hand, or one peeked at, says of itself; its arrays are not mapped.

        Raises BadItem, having given the item up, and LeaseExpired when it is elsewhere now.
        """
        claim: Claim = delivery.handle
        name = item_name(delivery.seq)
        items = self.party.layout.items
        with self.party:
            try:
                said = read_contents(items, name, claim.end)
            except FileNotFoundError:
                self.party.layout.check_present()
                raise _expired(self.party, delivery.seq) from None
            except BadItem as error:
                step = _give_up_peeked if claim.peeked else _reject
                self.party.run(step, self, delivery, f"damaged: {error}")
                raise
            if claim.peeked and not exists(items, delivery.seq):
                # Somebody has got it, and its file may have been written again while it was read.
                raise _expired(self.party, delivery.seq)
            return said

    def peek(self) -> Delivery:
        """The next item, left where it is. Raises Empty, ShutDown."""
        return self.party.run(_peek, self)

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Take items in hand off the spool for good. Raises LeaseExpired for one not in hand any more."""
        self.party.run(_ack, self, list(deliveries))

    def nack(self, delivery: Delivery, delay: float, why: str) -> None:
        """Give an item back, to be delivered again after `delay` seconds."""
        self.party.run(_nack, self, delivery, delay, why)

    def reject(self, delivery: Delivery, why: str) -> None:
        """Give an item up: it becomes a dead letter in `failed/`."""
        self.party.run(_reject, self, delivery, why)

    def extend(self, delivery: Delivery, lease: float) -> None:
        """Keep an item in hand for `lease` seconds from now."""
        self.party.run(_extend, self, delivery, lease)

    def wait_items(self, deadline: float | None) -> bool:
        """Wait until there may be an item; False when the deadline (monotonic seconds) is past."""
        if self.holds.pending:
            self.party.run(release_pending, self)
        own = self.own

        def look(words: memoryview[int]) -> bool:
            if words[W.RETURNED] or words[W.READY]:
                return True
            return _ended(words, own)

        return wait(self.party, "items", look, deadline)

    def qsize(self) -> int:
        """How many items wait."""
        return self.party.qsize()

    def close(self) -> None:
        """Leave: what is in hand is given back; files that are still looked at lose their names."""
        self.party.close(self._leave)
        self._forget()

    def _leave(self, party: Party) -> None:
        release_pending(party, self)
        words = party.index.words
        for record in reversed(changes.away(party.index)):
            if words[record + W.OWNER] == party.token:
                if words[record + W.STATE] == W.CLAIMED:
                    return_item(party, record, "its reader left", 0)
                elif words[record + W.STATE] == W.HELD:
                    drop_file(party, record)

    def _open(self, index: Index, record: int, seq: int) -> Opened:
        """Map and read an item's file. Raises BadItem, OSError."""
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
        buffer = self.maps.of(layout.items, name, status, index.words[record + W.BIRTH], record)
        blocks, tail = npy.parse(buffer, size)
        arrays = tuple(npy.view(buffer, block, writeable=False) for block in blocks)
        small = tail.data_end <= SMALL
        if small:
            arrays = tuple(_copied(array) for array in arrays)
        return Opened(_payload(arrays, tail), not small, status.st_nlink == 1)


def _copied(array: Array) -> Array:
    copy = array.copy(order="K")
    copy.flags.writeable = False
    return copy


def _payload(arrays: tuple[Array, ...], tail: Footer) -> Payload:
    return Payload(arrays, tail.names, tail.meta)


def _ended(words: memoryview[int], own: int) -> bool:
    """Whether nothing can come any more to a reader that has `own` items in hand."""
    state = words[W.SHUTDOWN]
    return state == W.DISCARDED or (
        state == W.DRAINING and words[W.IN_FLIGHT] <= own and not words[W.DELAYED_COUNT]
    )


def _first(party: Party, source: DirectorySource) -> tuple[int, int]:
    """The next item to deliver. Raises Empty, ShutDown.

    A spool that was shut down has ended when nothing waits, and no other reader may give anything back.
    """
    record, queue = changes.first(party.index)
    words = party.index.words
    state = words[W.SHUTDOWN]
    if record and state != W.DISCARDED:
        return record, queue
    if state:
        source.own = sum(
            words[away + W.STATE] == W.CLAIMED and words[away + W.OWNER] == party.token
            for away in changes.away(party.index)
        )
        if _ended(words, source.own):
            raise ShutDown(f"the spool {party.path} was shut down and has no more items")
    raise Empty(f"no item waits in {party.path}")


def _get(party: Party, source: DirectorySource, limit: int, got: list[Payload]) -> None:
    tend(party)
    if source.holds.pending:
        release_pending(party, source)
    index = party.index
    source.maps.sweep(index.words)
    while len(got) < limit:
        try:
            record, queue = _first(party, source)
        except (Empty, ShutDown):
            if got:
                return
            raise
        words = index.words
        seq = words[record + W.SEQ]
        try:
            opened = source._open(index, record, seq)
        except BadItem as error:
            give_up(party, record, queue, f"process {os.getpid()}", f"damaged: {error}")
            source.maps.forget(words[record + W.BIRTH])
            continue
        hold = Hold(index, record, seq) if opened.held else None
        take_off(party, source, record, queue, opened.single, hold)
        got.append(opened.payload)
        if hold is not None:
            source.holds.add(hold, opened.payload.arrays)
    _pass_on(party)


def take_off(
    party: Party, source: DirectorySource, record: int, queue: int, single: bool, hold: Hold | None
) -> None:
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
        and words[W.POOL_BYTES] + size <= words[W.RECYCLE_BYTES]
    )
    if not keep:
        source.maps.forget(words[record + W.BIRTH])
    lender = words[record + W.LOAN]
    stores = changes.leave(index, record, queue, lender if hold is None else party.token, keep)
    if hold is None:
        stores[record + W.LOAN] = 0
    changes.delivered(index, stores)
    index.change(W.LEAVE, seq, stores, _leaving(party, item_name(seq), keep))
    party.news("space")
    if words[W.SHUTDOWN]:
        party.news("items", 8)
    if attempt > (0 if queue else 1):
        history.forget(party.layout, seq)


def _leaving(party: Party, name: str, keep: bool) -> Callable[[], None]:
    layout = party.layout
    if keep:
        return lambda: os.rename(name, name, src_dir_fd=layout.items, dst_dir_fd=layout.free)
    return lambda: unlink_missing_ok(layout.items, name)


def release_pending(party: Party, source: DirectorySource) -> None:
    """Files that no array looks at any more go to the pool, or away when it is full or a fork may look at them."""
    pending = source.holds.pending
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
            source.maps.forget(birth)


def _claim(
    party: Party, source: DirectorySource, limit: int, lease: float | None, taken: list[Delivery]
) -> None:
    tend(party)
    if source.holds.pending:
        release_pending(party, source)
    index = party.index
    taken.clear()  # what was taken before the index proved torn is not in hand any more
    due = _due(lease) if lease is not None else 0
    while len(taken) < limit:
        try:
            record, queue = _first(party, source)
        except (Empty, ShutDown):
            if taken:
                return
            raise
        index.change(W.MEMORY, 0, changes.claim(index, record, queue, party.token, due))
        taken.append(_delivery(index, record))
    party.news("space", len(taken))
    _pass_on(party)


def _pass_on(party: Party) -> None:
    """Let another reader look when items are left: two puts may have rung one bell."""
    words = party.index.words
    if words[W.READY] or words[W.RETURNED]:
        party.news("items")


def _peek(party: Party, source: DirectorySource) -> Delivery:
    tend(party)
    record, _ = _first(party, source)
    delivery = _delivery(party.index, record)
    delivery.handle.peeked = True
    return delivery


def _delivery(index: Index, record: int) -> Delivery:
    words = index.words
    seq = words[record + W.SEQ]
    claim = Claim(index, record, seq, words[record + W.END])
    put_time = words[record + W.PUT_TIME] if claim.end else 0
    return Delivery(seq, words[record + W.ATTEMPT], put_time, words[record + W.BYTES], claim)


def _due(seconds: float) -> int:
    """So many seconds from now, in monotonic ns."""
    return time.monotonic_ns() + int(min(seconds, _LONGEST) * 1e9)


def _expired(party: Party, seq: int) -> LeaseExpired:
    return LeaseExpired(
        f"item {seq} of {party.path} is not in this reader's hands any more: its lease ended, or it was settled"
        " already; it may have been delivered again"
    )


def _in_hand(party: Party, delivery: Delivery) -> int:
    """The record of an item that is still in this reader's hands. Raises LeaseExpired."""
    claim: Claim = delivery.handle
    words, record = party.index.words, claim.record
    if (
        claim.index is not party.index
        or words[record + W.STATE] != W.CLAIMED
        or words[record + W.OWNER] != party.token
        or words[record + W.SEQ] != claim.seq
        or words[record + W.ATTEMPT] != delivery.attempt
    ):
        raise _expired(party, claim.seq)
    if 0 < words[record + W.DUE] <= time.monotonic_ns():
        return_item(party, record, "its lease ended", 0)
        raise _expired(party, claim.seq)
    return record


def _ack(party: Party, source: DirectorySource, deliveries: list[Delivery]) -> None:
    release_pending(party, source)
    while deliveries:
        delivery = deliveries[0]
        record = _in_hand(party, delivery)
        hold = delivery.handle.hold
        looked_at = hold is not None and (hold.left > 0 or not hold.alone)
        take_off(party, source, record, 0, delivery.handle.single, hold if looked_at else None)
        if hold is not None and looked_at and not hold.left:
            source.holds.pending.append(hold)
        deliveries.pop(0)


def _nack(party: Party, source: DirectorySource, delivery: Delivery, delay: float, why: str) -> None:
    record = _in_hand(party, delivery)
    return_item(party, record, why, _due(delay) if delay > 0 else 0)


def _reject(party: Party, source: DirectorySource, delivery: Delivery, why: str) -> None:
    record = _in_hand(party, delivery)
    source.maps.forget(party.index.words[record + W.BIRTH])
    give_up(party, record, 0, f"process {os.getpid()}", why)


def _give_up_peeked(party: Party, source: DirectorySource, delivery: Delivery, why: str) -> None:
    """Give up an item that was peeked at and is still the next. Raises LeaseExpired."""
    record, queue = changes.first(party.index)
    if not record or party.index.words[record + W.SEQ] != delivery.seq:
        raise _expired(party, delivery.seq)
    source.maps.forget(party.index.words[record + W.BIRTH])
    give_up(party, record, queue, f"process {os.getpid()}", why)


def _extend(party: Party, source: DirectorySource, delivery: Delivery, lease: float) -> None:
    record = _in_hand(party, delivery)
    words = party.index.words
    due = _due(lease)
    stores = {record + W.DUE: due}
    if not words[W.NEXT_DUE] or due < words[W.NEXT_DUE]:
        stores[W.NEXT_DUE] = due
    party.index.change(W.MEMORY, 0, stores)
