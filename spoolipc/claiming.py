"""Items in a reader's hands: claimed, and settled later. Every function is a locked step (`Party.run`)."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Final

from . import changes
from . import words as W
from .engine import Delivery
from .errors import Empty, LeaseExpired, ShutDown
from .giveup import give_up
from .hands import Hands, release_pending, take_off
from .holds import Hold
from .index import Index
from .party import Party
from .taking import first_item, pass_on
from .tend import return_item, tend

_LONGEST: Final = 1e9


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
    single: bool | None = None


def claim(party: Party, hands: Hands, limit: int, due: int, taken: list[Delivery]) -> None:
    """Take up to `limit` items in hand until `due` (monotonic ns, 0 for no lease), adding them to `taken`.

    Raises Empty, ShutDown.
    """
    tend(party)
    if hands.holds.pending:
        release_pending(party, hands)
    index = party.index
    taken.clear()  # what was taken before the index proved torn is not in hand any more
    while len(taken) < limit:
        try:
            record, queue = first_item(party, hands)
        except (Empty, ShutDown):
            if taken:
                return
            raise
        delivery = _delivery(index, record)
        delivery.attempt += 1
        taken.append(delivery)  # first, so that `put_down` finds it whenever a signal comes
        index.change(W.MEMORY, 0, changes.claim(index, record, queue, party.token, due))
    party.news("space", len(taken))
    pass_on(party)


def put_down(party: Party, taken: list[Delivery]) -> None:
    """Give back at once what a claim took that was interrupted before anybody had it."""
    for delivery in taken:
        with contextlib.suppress(LeaseExpired):
            record = _in_hand(party, delivery)
            party.index.change(W.MEMORY, 0, changes.give_back(party.index, record, 0))
            party.news("items")


def peek(party: Party, hands: Hands) -> Delivery:
    """The next item, left where it is. Raises Empty, ShutDown."""
    tend(party)
    record, _ = first_item(party, hands)
    delivery = _delivery(party.index, record)
    delivery.handle.peeked = True
    return delivery


def _delivery(index: Index, record: int) -> Delivery:
    words = index.words
    seq = words[record + W.SEQ]
    claim = Claim(index, record, seq, words[record + W.END])
    put_time = words[record + W.PUT_TIME] if claim.end else 0
    return Delivery(seq, words[record + W.ATTEMPT], put_time, words[record + W.BYTES], claim)


def due_in(seconds: float) -> int:
    """So many seconds from now, in monotonic ns."""
    return time.monotonic_ns() + int(min(seconds, _LONGEST) * 1e9)


def expired(party: Party, seq: int) -> LeaseExpired:
    """The error for an item that is not in this reader's hands any more."""
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
        raise expired(party, claim.seq)
    if 0 < words[record + W.DUE] <= time.monotonic_ns():
        return_item(party, record, "its lease ended", 0)
        raise expired(party, claim.seq)
    return record


def ack(party: Party, hands: Hands, deliveries: list[Delivery]) -> None:
    """Take items in hand off the spool, emptying the list. Raises LeaseExpired."""
    release_pending(party, hands)
    while deliveries:
        delivery = deliveries[0]
        record = _in_hand(party, delivery)
        hold = delivery.handle.hold
        looked_at = hold is not None and (hold.left > 0 or not hold.alone)
        single = delivery.handle.single
        if single is None:
            single = hands.is_single(delivery.seq)
        take_off(party, hands, record, 0, single, hold if looked_at else None)
        if hold is not None and looked_at and not hold.left:
            hands.holds.pending.append(hold)
        deliveries.pop(0)


def nack(party: Party, hands: Hands, delivery: Delivery, delay: float, why: str) -> None:
    """Give an item back, at once or after `delay` seconds. Raises LeaseExpired."""
    record = _in_hand(party, delivery)
    return_item(party, record, why, due_in(delay) if delay > 0 else 0)


def reject(party: Party, hands: Hands, delivery: Delivery, why: str) -> None:
    """Give an item up. Raises LeaseExpired."""
    record = _in_hand(party, delivery)
    hands.maps.forget(party.index.words[record + W.BIRTH])
    give_up(party, record, 0, f"process {os.getpid()}", why)


def give_up_peeked(party: Party, hands: Hands, delivery: Delivery, why: str) -> None:
    """Give up an item that was peeked at and is still the next. Raises LeaseExpired."""
    record, queue = changes.first(party.index)
    if not record or party.index.words[record + W.SEQ] != delivery.seq:
        raise expired(party, delivery.seq)
    hands.maps.forget(party.index.words[record + W.BIRTH])
    give_up(party, record, queue, f"process {os.getpid()}", why)


def extend(party: Party, hands: Hands, delivery: Delivery, lease: float) -> None:
    """Let an item's lease end `lease` seconds from now. Raises LeaseExpired."""
    record = _in_hand(party, delivery)
    words = party.index.words
    due = due_in(lease)
    stores = {record + W.DUE: due}
    if not words[W.NEXT_DUE] or due < words[W.NEXT_DUE]:
        stores[W.NEXT_DUE] = due
    party.index.change(W.MEMORY, 0, stores)
