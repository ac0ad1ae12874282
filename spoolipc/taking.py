"""Taking items off the spool for good: `get`, in one locked step for all that is taken.

The items are opened before the lock is taken, as they most likely will be ours; under the lock it is only
seen whether they are still the next. A file does not change while its item waits, and no sequence number is
given twice, so what was opened ahead is the item, or is thrown away.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from . import changes
from . import words as W
from .engine import Payload
from .errors import BadItem, Empty, ShutDown
from .giveup import give_up
from .hands import Hands, Opened, release_pending, take_off
from .holds import Hold
from .party import Party
from .tend import tend

_AHEAD = 64


class Ahead(NamedTuple):
    """An item opened without the lock."""

    seq: int
    opened: Opened


def look_ahead(hands: Hands, limit: int) -> list[Ahead]:
    """Open up to `limit` items that seem to be the next, without the lock."""
    words = hands.party.look()
    found: list[Ahead] = []
    record = words[W.RETURNED] or words[W.READY]
    top = min(words[W.CAPACITY], len(words)) - W.RECORD  # the file may have grown beyond what is mapped
    while len(found) < min(limit, _AHEAD) and W.HEADER <= record <= top:
        seq = words[record + W.SEQ]
        try:
            found.append(Ahead(seq, hands.open_item(words, record, seq)))
        except (BadItem, OSError):
            break  # gone meanwhile, or damaged: the locked step will see which
        record = words[record + W.NEXT]
    return found


def ended(words: memoryview[int], own: int) -> bool:
    """Whether nothing can come any more to a reader that has `own` items in hand."""
    state = words[W.SHUTDOWN]
    return state == W.DISCARDED or (
        state == W.DRAINING and words[W.IN_FLIGHT] <= own and not words[W.DELAYED_COUNT]
    )


def first_item(party: Party, hands: Hands) -> tuple[int, int]:
    """The next item to deliver. Raises Empty, ShutDown.

    A spool that was shut down has ended when nothing waits, and no other reader may give anything back.
    """
    record, queue = changes.first(party.index)
    words = party.index.words
    state = words[W.SHUTDOWN]
    if record and state != W.DISCARDED:
        return record, queue
    if state:
        hands.own = sum(
            words[away + W.STATE] == W.CLAIMED and words[away + W.OWNER] == party.token
            for away in changes.away(party.index)
        )
        if ended(words, hands.own):
            raise ShutDown(f"the spool {party.path} was shut down and has no more items")
    raise Empty(f"no item waits in {party.path}")


def take(party: Party, hands: Hands, limit: int, ahead: list[Ahead], got: list[Payload]) -> None:
    """The locked step of `get`. Raises Empty, ShutDown when there is nothing."""
    tend(party)
    if hands.holds.pending:
        release_pending(party, hands)
    index = party.index
    hands.maps.sweep(index.words)
    ahead.reverse()
    while len(got) < limit:
        try:
            record, queue = first_item(party, hands)
        except (Empty, ShutDown):
            if got:
                return
            raise
        words = index.words
        seq = words[record + W.SEQ]
        try:
            known = ahead and ahead[-1].seq == seq
            opened = ahead.pop().opened if known else hands.open_item(words, record, seq)
        except BadItem as error:
            give_up(party, record, queue, f"process {os.getpid()}", f"damaged: {error}")
            hands.maps.forget(words[record + W.BIRTH])
            continue
        hold = Hold(index, record, seq) if opened.held else None
        take_off(party, hands, record, queue, opened.single, hold)
        got.append(opened.payload)
        if hold is not None:
            hands.holds.add(hold, opened.payload.arrays)
    pass_on(party)


def pass_on(party: Party) -> None:
    """Let another reader look when items are left: two puts may have rung one bell."""
    words = party.index.words
    if words[W.READY] or words[W.RETURNED]:
        party.news("items")
