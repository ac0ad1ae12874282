"""Tending the spool: what ended leases, ended delays and dead parties left is put back.

Once a second, by whoever is around.

However large the backlog, only files in somebody's hands are looked at, and a bounded number of names in
`tmp/`; what is more than one step should do is left to the next. `gc` does the same without the bound.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from typing import Final

from . import alive, changes, history, pool
from . import words as W
from .giveup import give_up
from .index import Torn, unlink_missing_ok
from .layout import item_name
from .party import Party
from .shutdown import discard

TEND_EVERY: Final = 1.0
"""Seconds between two looks for the dead."""
_TEND_EVERY_NS: Final = int(TEND_EVERY * 1e9)
_TEMPORARY = re.compile(r"([0-9a-f]{16})-\d+\.npy")
_NAMES = 64
_AT_ONCE = 256
"""Files put back in one locked step at most."""
_TRIM_FILES: Final = 500
_TRIM_BYTES: Final = 1 << 28
"""Pooled files unlinked in one locked step at most: about 10 ms."""


def is_due(tended: int, due: int) -> bool:
    """Whether nobody has tended the spool within the second, or a lease or delay has ended.

    tended, due: the words TENDED and NEXT_DUE.
    """
    now = time.monotonic_ns()
    return not now - _TEND_EVERY_NS <= tended <= now or 0 < due <= now


def tend(party: Party, *, force: bool = False) -> None:
    """One round of tending, in the locked step; does nothing when somebody did it within the second."""
    index = party.index
    words = index.words
    if not force and not is_due(words[W.TENDED], words[W.NEXT_DUE]):
        return
    now = time.monotonic_ns()
    if party.lock.renewed(party.layout.root, party.layout.file_mode):
        raise Torn("index.lock was removed while in use")
    dead: dict[int, bool] = {}
    soonest = put = 0
    for record in reversed(changes.away(index)):
        if put == _AT_ONCE:
            soonest = now  # the next step goes on
            break
        owner, ends = words[record + W.OWNER], words[record + W.DUE]
        if owner and owner != party.token and is_dead(party, owner, dead):
            put_back(party, record, "its reader died")
            put += 1
        elif 0 < ends <= now:
            put_back(party, record, "its lease ended" if owner else "")
            put += 1
        elif ends and (not soonest or ends < soonest):
            soonest = ends
        words = index.words
    words[W.NEXT_DUE] = soonest
    words[W.TENDED] = now
    with os.scandir(party.layout.tmp) as entries:
        for entry in itertools.islice(entries, _NAMES):
            token = temporary_owner(entry.name)
            if token and token != party.token and is_dead(party, token, dead):
                unlink_missing_ok(party.layout.tmp, entry.name)
    for token, gone in dead.items():
        if gone:
            unlink_missing_ok(party.layout.alive, alive.token_name(token))
    words[W.PEAK_BYTES] = pool.lower_peak(words)
    trim(party)
    if words[W.SHUTDOWN] == W.DISCARDED:
        discard(party)  # what its maker did not live to remove, or a reader gave back since


def is_dead(party: Party, token: int, known: dict[int, bool]) -> bool:
    """Whether a party has ended, asking the kernel once for each token."""
    if token not in known:
        known[token] = alive.is_dead(party.layout.alive, token)
    return known[token]


def temporary_owner(name: str) -> int:
    """The token in a temporary file's name, 0 for any other name."""
    match = _TEMPORARY.fullmatch(name)
    return int(match[1], 16) if match else 0


def put_back(party: Party, record: int, why: str) -> None:
    """Take a file out of the hands it is in: an item waits again, or is given up after its last attempt;
    a file of `free/` is unlinked, as a fork of the dead may still look at it."""
    index = party.index
    words = index.words
    state = words[record + W.STATE]
    if state == W.CLAIMED:
        return_item(party, record, why, 0)
    elif state == W.DELAYED:
        index.change(W.MEMORY, 0, changes.give_back(index, record, 0))
        party.news("items")
    else:
        drop_file(party, record)


def drop_file(party: Party, record: int) -> None:
    """Unlink a file of `free/` that is in somebody's hands."""
    index = party.index
    index.change(
        W.UNLINK, index.words[record + W.FILE], changes.drop(index, record), lambda: _unlink(party, record)
    )


def evict(party: Party, record: int, link: int) -> None:
    """Unlink a pooled file."""
    index = party.index
    number = index.words[record + W.FILE]
    index.change(
        W.UNLINK,
        number,
        changes.evict(index, record, link),
        lambda: unlink_missing_ok(party.layout.free, item_name(number)),
    )


def trim(party: Party) -> None:
    """Unlink pooled files that a backlog, now gone, had left: some at each tending."""
    words = party.index.words
    count = size = 0
    while pool.must_trim(words) and count < _TRIM_FILES and size < _TRIM_BYTES:
        record, link = pool.any_pooled(party.index)
        if not record:
            break
        count, size = count + 1, size + words[record + W.BYTES]
        evict(party, record, link)


def _unlink(party: Party, record: int) -> None:
    unlink_missing_ok(party.layout.free, item_name(party.index.words[record + W.FILE]))


def return_item(party: Party, record: int, why: str, due: int) -> bool:
    """Give back a claimed item, at once or at `due` (monotonic ns); False when that was its last attempt
    and it was given up."""
    index = party.index
    words = index.words
    seq, attempt = words[record + W.SEQ], words[record + W.ATTEMPT]
    who = f"process {alive.process_of(party.layout.alive, words[record + W.OWNER])}"
    most = words[W.MAX_ATTEMPTS]
    if most and attempt >= most:
        give_up(party, record, 0, who, f"{why}; that was attempt {attempt} of {most}")
        return False
    history.note(party.layout, seq, attempt, who, why)
    index.change(W.MEMORY, 0, changes.give_back(index, record, due))
    party.news("items", 8 if due else 1)  # all who wait must know when to look
    return True
