"""Giving an item up: it moves to `failed/` with its history, and blocks nobody any more."""

from __future__ import annotations

import logging
import os

from . import changes, history
from . import words as W
from .index import exists
from .layout import item_name
from .party import Party

_log = logging.getLogger("spoolipc")


def give_up(party: Party, record: int, queue: int, who: str, why: str, *, previous: int = 0) -> None:
    """Move an item to `failed/`, in the locked step.

    record, queue: the item waits at the head of `queue`, or after the record `previous` there, or is in
    somebody's hands (`queue` 0). An item that has lost its file is only taken off.
    The reason is written first: a crash after it leaves the item where it was, with one line more in its
    history.
    """
    index, layout = party.index, party.layout
    words = index.words
    seq, attempt = words[record + W.SEQ], words[record + W.ATTEMPT]
    history.note(layout, seq, attempt, who, why)
    if previous:
        stores = changes.leave_behind(index, record, queue, previous)
    else:
        stores = changes.leave(index, record, queue, 0, False)
    stores[W.FAILED_COUNT] = words[W.FAILED_COUNT] + exists(layout.items, seq)

    def move() -> None:
        try:
            os.rename(item_name(seq), item_name(seq), src_dir_fd=layout.items, dst_dir_fd=layout.failed)
        except FileNotFoundError:
            _log.error("%s: item %d has no file any more", party.path, seq)

    index.change(W.LEAVE, seq, stores, move)
    party.news("space")
    if words[W.SHUTDOWN]:
        party.news("items", 8)
    _log.error("%s: item %d is now in failed/: %s", party.path, seq, why)
