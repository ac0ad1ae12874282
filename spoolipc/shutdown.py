"""The end of a spool: no more puts, and no more gets when it was immediate. It outlives the processes and the index.

The marker file comes first, the index after it; after a crash between, the next holder of the lock lets the index
follow the marker.
"""

from __future__ import annotations

from collections.abc import Callable

from . import changes
from . import words as W
from .index import Torn, unlink_missing_ok
from .layout import item_name
from .marker import read_shutdown, write_shutdown
from .party import Party

_AT_ONCE = 64


def shut_down(party: Party, immediate: bool) -> None:
    """Let nobody put any more; with `immediate`, let nobody get and remove what waits."""
    party.run(set_state, W.DISCARDED if immediate else W.DRAINING)
    party.bells.ring_all("items")
    party.bells.ring_all("space")
    if immediate:
        while party.run(discard):
            pass


def set_state(party: Party, state: int) -> None:
    """The locked step: DISCARDED is not taken back by a later DRAINING, only by OPEN."""
    now = party.index.words[W.SHUTDOWN]
    if now == state or (now == W.DISCARDED and state == W.DRAINING):
        return
    while now == W.DISCARDED and discard(party):
        pass  # who shut down died before all was removed
    party.index.change(W.FOLLOW, 0, {W.SHUTDOWN: state}, lambda: write_shutdown(party.layout, state))


def discard(party: Party) -> bool:
    """Remove some of the items that wait, in the locked step; False when none is left, or the spool was reopened.

    Raises Torn, having removed none, when the index alone says that the spool was discarded.
    """
    index = party.index
    if index.words[W.SHUTDOWN] == W.DISCARDED and read_shutdown(party.layout) != W.DISCARDED:
        raise Torn("the index says that the spool was discarded, and no marker does")
    for _ in range(_AT_ONCE):
        record, queue = changes.first(index)
        if not record or index.words[W.SHUTDOWN] != W.DISCARDED:
            return False
        seq = index.words[record + W.SEQ]
        index.change(
            W.LEAVE,
            seq,
            changes.leave(index, record, queue, 0, False),
            _removal(party.layout.items, item_name(seq)),
        )
    return True


def _removal(items: int, name: str) -> Callable[[], None]:
    return lambda: unlink_missing_ok(items, name)
