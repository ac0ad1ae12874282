"""Housekeeping: what ended leases, ended delays and crashed sessions left is requeued or removed.

`round_of` is a bounded round in one locked step, once a second, by whoever is around: however large the backlog, only
active records and a bounded number of names are looked at, and every record only when a session has crashed. What is
more than one step should do is left to the next. `gc` (`gc.py`) does the same without the bound.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection
from typing import Final

from ..message import Deadline
from . import fs, liveness, pool, sources, transitions
from . import table as W
from .doorbell import leave_places
from .layout import read_shutdown, temporary_owner
from .quarantine import forget_history, note_failure, set_aside
from .session import EVERY, MEMBERS, Look, Session
from .table import IndexDamaged, Words, active, lent, linked, owned

_NAMES: Final = 4096  # of a directory looked at in one round: about a millisecond
_UNLINKED: Final = 64
_SESSIONS: Final = 256  # of alive/
_AT_ONCE: Final = 256  # records settled in one round: some milliseconds
_EVERY_NS: Final = int(EVERY * 1e9)
_DISCARDED_AT_ONCE: Final = 64
_TRIM_BYTES: Final = 1 << 28  # evicted in one round, above the files that must go


_LEFT: Final = W.together(W.READY_HEAD, W.REDELIVERY_HEAD, W.SHUTDOWN, W.ENDING)
# Whom to wake when items have left the spool


def pass_on(words: Words, gone: int) -> int:
    """How many who wait for items are to look, after a step in which so many left the spool: all when it may be at an
    end; another one when items are left, as two puts may have woken one. A step."""
    ready, redelivery, state, ending = _LEFT(words)
    if gone and (state or ending) and at_end(words):
        return MEMBERS
    return 1 if ready or redelivery else 0


def at_end(words: Words) -> int:
    """How many who wait to wake after items left the spool: all, when it was shut down, or none of those is left whose
    end somebody awaits; else nobody. Who is woken looks, and says again what he waits for. A step."""
    below = words[W.ENDING]
    if not words[W.SHUTDOWN] and (not below or is_left(words, below)):
        return 0
    words[W.ENDING] = 0
    return MEMBERS


def is_left(words: Words, below: int) -> bool:
    """Whether an item of a number below this is left; for `LAST_SEQ`, whether any waits. A step."""
    ready = words[W.READY_HEAD]
    if ready and words[ready + W.SEQ] < below:
        return True
    records = linked(words, W.REDELIVERY_HEAD)
    if below < W.LAST_SEQ:
        records += active(words)
    return any(words[record + W.SEQ] < below for record in records)


def await_end(words: Words, below: int) -> None:
    """Say that somebody waits until no item of a number below this is left. A step."""
    words[W.ENDING] = min(below, words[W.ENDING] or below)


def join(session: Session, below: int, until: Deadline) -> bool:
    """Wait until no item of a number below this is left; false when the deadline is past."""
    while session.step(_await_those, session, below):
        if not session.wait("end", until, *end_of(session, below)):
            return not session.step(_await_those, session, below)
    return True


def end_of(session: Session, below: int) -> tuple[Look, Callable[[], None]]:
    """How to wait for the end that `_await_those` said is awaited."""
    return lambda words: not 0 < words[W.ENDING] <= below, lambda: round_if_due(session)


def _await_those(session: Session, below: int) -> tuple[bool, int, int]:
    """Whether an item of a number below this is left, to be awaited. A step."""
    words = session.journal.words
    left = is_left(words, below)
    if left:
        await_end(words, below)
    return left, 0, 0


# Settling one record, in a locked step


def redeliver(session: Session, record: int, why: str, due: int) -> tuple[bool, int, int]:
    """Requeue an item in flight, at once or at `due` (monotonic ns); false when that was its last attempt and it was
    dead-lettered. Also how many who wait to wake. A step."""
    journal, directories = session.journal, session.directories
    words = journal.words
    attempt, most = words[record + W.ATTEMPT], words[W.MAX_ATTEMPTS]
    who = f"process {liveness.process_of(directories.alive, words[record + W.OWNER])}"
    if most and attempt >= most:
        set_aside(directories, journal, record, who, f"{why}; that was attempt {attempt} of {most}")
        return False, at_end(journal.words), 1
    note_failure(directories, journal, words[record + W.SEQ], attempt, who, why)
    journal.commit(transitions.requeue(words, record, due))
    return True, MEMBERS if due else 1, 0  # after a delay all who wait must know when to look


def put_right(session: Session, record: int, why: str) -> tuple[int, int]:
    """Take a record from who has it no more: an item waits again, or is dead-lettered after its last attempt; a file
    of `free/` is unlinked, as a fork of the crashed session may still show it. Whom to wake. A step."""
    journal = session.journal
    state = journal.words[record + W.STATE]
    if state == W.IN_FLIGHT:
        _, items, space = redeliver(session, record, why, 0)
        return items, space
    if state == W.DELAYED:
        journal.commit(transitions.requeue(journal.words, record, 0))
        return 1, 0
    journal.commit(transitions.drop(journal.words, record))
    return 0, 0


# A bounded round


def is_due(housekept: int, due: int) -> bool:
    """Whether nobody has kept house within the second, or a lease or delay has ended.

    housekept, due: the words HOUSEKEPT and NEXT_DUE.
    """
    now = fs.monotonic_ns()
    return not now - _EVERY_NS <= housekept <= now or 0 < due <= now


def round_if_due(session: Session) -> None:
    """One round of housekeeping, when nobody kept house within the second or something has ended."""
    words = session.look()
    if is_due(words[W.HOUSEKEPT], words[W.NEXT_DUE]):
        session.step(round_of, session)
        words = session.look()
    if words[W.HOUSEKEPT] != session.looked_at:
        session.step(session.see_itself)


def round_of(session: Session) -> tuple[None, int, int]:
    """One round. A step."""
    now = fs.monotonic_ns()
    crashed = _crashed(session)
    items, space, left = _settle_round(session, crashed, now)
    words = session.journal.words
    words[W.HOUSEKEPT] = now
    if crashed:
        left |= end_loans(session, crashed)
        left |= _remove_temporary(session, crashed)
    leave_places(words, crashed)
    for token in () if left else crashed - _stuck(session):
        session.directories.remove("alive", liveness.token_name(token))
    words[W.PEAK_BYTES] = pool.lower_peak(words)
    _trim(session)
    discard_if_shut_down(session)  # what its maker did not live to remove, or a reader requeued since
    return None, items, space


def _crashed(session: Session) -> set[int]:
    """Sessions of a file in `alive/` that have crashed; of very many names, some are looked at. A step."""
    alive = session.directories.alive
    with fs.scan(alive) as entries:
        names = [entry.name for entry in itertools.islice(entries, _NAMES)]
    if len(names) > _SESSIONS:
        names = random.sample(names, _SESSIONS)
    asked = set(map(liveness.token_of, names)) - {0, session.token} - _stuck(session)
    return liveness.crashed_among(alive, asked)


def _stuck(session: Session) -> set[int]:
    """Crashed sessions of which all is settled but a file that cannot be removed: who comes later tries that again."""
    names = session.directories.stuck
    return {*map(temporary_owner, names), *map(liveness.token_of, names)} if names else set()


def _settle_round(session: Session, crashed: set[int], now: int) -> tuple[int, int, bool]:
    """Put right what ended: whom to wake, and whether something is left for the next round. A step."""
    words = session.journal.words
    items = space = soonest = settled = 0
    for record in reversed(active(words)):
        if settled == _AT_ONCE:
            soonest = now  # the next step goes on
            break
        ends = words[record + W.DUE]
        if 0 < ends <= now:
            more, room = put_right(session, record, "its lease ended")
            items, space, settled = items + more, space + room, settled + 1
        elif ends and (not soonest or ends < soonest):
            soonest = ends
    rest = owned(session.journal.words, crashed) if crashed else []
    most = _AT_ONCE - settled
    for record in rest[:most]:
        more, room = put_right(session, record, "its reader crashed")
        items, space = items + more, space + room
    is_left = len(rest) > most
    session.journal.words[W.NEXT_DUE] = now if is_left else soonest
    return items, space, is_left


def end_loans(session: Session, lenders: Collection[int]) -> bool:
    """Nothing comes back to these lenders, who may still show what they lent: it is not written again. Whether some is
    left for the next step. A step."""
    journal = session.journal
    records = lent(journal.words, lenders)
    for record in records[:_AT_ONCE]:
        journal.commit(transitions.end_loan(journal.words, record, shared=True))
    return len(records) > _AT_ONCE


def _remove_temporary(session: Session, crashed: set[int]) -> bool:
    """Remove temporary files of crashed sessions; whether some may be left. A step."""
    directories, removed = session.directories, 0
    if not sources.settle(session, crashed)[0]:
        return True
    with fs.scan(directories.tmp) as entries:
        for entry in itertools.islice(entries, _NAMES):
            if temporary_owner(entry.name) in crashed:
                if removed == _UNLINKED:
                    return True
                directories.remove("tmp", entry.name)
                removed += 1
        return next(entries, None) is not None


def _trim(session: Session) -> None:
    """Evict pooled files that a backlog, now gone, had left, or for which the file system has no room any more: some in
    each round. A step."""
    directories, words = session.directories, session.journal.words
    pool.share(words, fs.room(directories.root))
    size, files = pool.surplus(words)
    pool.evict(directories, session.journal, min(size, _TRIM_BYTES), files)


def discard_if_shut_down(session: Session) -> tuple[int, int, int]:
    """Discard some of what is left in a spool that was shut down at once; how many: 0 when none is left, or the spool
    was reopened. A step.

    Raises IndexDamaged, having removed none, when the index alone says that the spool was discarded.
    """
    if session.journal.words[W.SHUTDOWN] != W.DISCARDED:
        return 0, 0, 0
    if read_shutdown(session.directories.root) != W.DISCARDED:
        raise IndexDamaged("the index says that the spool was discarded, and no marker does")
    return discard_some(session, W.LAST_SEQ)


def discard_some(session: Session, below: int) -> tuple[int, int, int]:
    """Discard some of the items that nobody has: those requeued, those never delivered with a number below `below`, and
    those in flight at crashed sessions; how many. A step."""
    journal, crashed = session.journal, _crashed(session)
    words, ownerless = journal.words, list[int]()
    words[W.ENDING] = 0  # who awaits an end is woken by this as well
    for record in active(words):
        state = words[record + W.STATE]
        if state == W.DELAYED or (state == W.IN_FLIGHT and words[record + W.OWNER] in crashed):
            ownerless.append(record)
    for count in range(_DISCARDED_AT_ONCE):
        record = transitions.first(words)
        if not record or (record == words[W.READY_HEAD] and words[record + W.SEQ] >= below):
            if not ownerless:
                return count, MEMBERS, MEMBERS
            record = ownerless.pop()
        seq, attempt = words[record + W.SEQ], words[record + W.ATTEMPT]
        try:
            journal.commit(transitions.discard(words, record))
        except OSError as error:
            if not fs.is_of_file(error):
                raise
            set_aside(session.directories, journal, record, "", f"could not be removed: {error.strerror}")
            continue
        if attempt:
            forget_history(session.directories, seq)
    return _DISCARDED_AT_ONCE, MEMBERS, MEMBERS
