"""Waiting for items or for space: on the bell, with an eye on the clock for what ends by itself."""

from __future__ import annotations

import time
from collections.abc import Callable

from . import words as W
from .errors import SpoolClosed
from .maps import Maps
from .party import Kind, Party
from .tend import TEND_EVERY, is_due, tend

Look = Callable[["memoryview[int]"], bool]


def wait(party: Party, kind: Kind, look: Look, deadline: float | None, maps: Maps) -> bool:
    """Wait until `look(words)` is true (True) or the deadline (monotonic seconds) is past (False).

    look: sees the index's words without the lock, so what it says is a hint. Meanwhile the dead are looked
    for once a second, and a lease or delay is attended to when it ends. maps: the party's; those of files that
    are no more are let go, as their memory may be the very space that somebody waits for.
    """
    until_ns = 0

    def glance() -> bool:
        if party.closed:
            raise SpoolClosed("this was closed while it waited")
        # An index that is not whole any more is repaired by the step that follows a True.
        index = party.index
        if not index.whole():
            return True
        words = index.words
        return look(words) or 0 < words[W.NEXT_DUE] < until_ns

    def found() -> bool:
        index = party.index
        return not index.whole() or look(index.words)

    while True:
        tend_if_due(party)
        if maps.are_due(party.index.words):
            party.run(lambda party: maps.sweep(party.index.words))
        until = _next_event(party)
        if deadline is not None:
            until = min(until, deadline)
        until_ns = int(until * 1e9)
        if party.bells.wait(kind, glance, max(0.0, until - time.monotonic())) and found():
            return True
        if deadline is not None and time.monotonic() >= deadline:
            return False


def tend_if_due(party: Party) -> None:
    """Tend the spool when a lease or delay has ended, or nobody did within the second."""
    party.ready()
    index = party.index
    if not index.whole():
        party.run(tend)
        return
    words = index.words
    if is_due(words[W.TENDED], words[W.NEXT_DUE]):
        party.run(tend)


def _next_event(party: Party) -> float:
    """When to look by the clock at the latest, in monotonic seconds."""
    soonest = time.monotonic() + TEND_EVERY
    index = party.index
    if index.whole() and index.words[W.NEXT_DUE]:
        return min(soonest, index.words[W.NEXT_DUE] / 1e9)
    return soonest
