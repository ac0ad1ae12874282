"""Starting again: a spool emptied, given other limits, or begun anew.

Items go one by one, each by the transition that discards it, some in a step: a crash leaves the rest, which wait as
before. Limits change in one transition, whose move puts the new spool.json in the place of the old.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Container
from typing import Final

from ..errors import SpoolInUse
from ..message import Limits
from . import fs, housekeeping, liveness, transitions
from . import table as W
from .layout import stage_limits
from .session import MEMBERS, Session, administration
from .table import active

_HARMLESS: Final = ("reader", "admin")
"""Roles of the sessions that a spool may be begun anew beside."""


def purge(path: str | os.PathLike[str]) -> int:
    """Remove what waits in the spool at `path`, or is in flight at crashed sessions; returns how many items.

    Raises NotASpool, UnsafeSpool, UnknownVersion, LockTimeout, SpoolGone, StorageError.
    """
    with administration(path) as session:
        below, removed = session.look()[W.NEXT_SEQ], 0
        while some := session.step(housekeeping.discard_some, session, below):
            removed += some
        return removed


def set_limits(path: str | os.PathLike[str], asked: Limits) -> Limits:
    """Let the limits asked for be in force in the spool at `path`; returns all. Raises what `purge` raises, and
    LimitMismatch for another mode."""
    with administration(path) as session:
        return session.step(_set_limits, session, asked)


def begin_anew(session: Session, asked: Limits) -> None:
    """Empty a spool that its only writer has just opened, and set its limits. Raises SpoolInUse.

    A crash leaves some of the items, or none and the limits as they were.
    """
    while session.step(_empty_alone, session):
        pass
    session.step(_set_limits, session, asked)


def _empty_alone(session: Session) -> tuple[int, int, int]:
    """Discard some items. Raises SpoolInUse. A step."""
    _refuse_company(session, _HARMLESS)
    return housekeeping.discard_some(session, W.LAST_SEQ)


def _set_limits(session: Session, asked: Limits) -> tuple[Limits, int, int]:
    """A crash before the move leaves the new spool.json unused, which `gc` removes. A step."""
    limits = stage_limits(session.directories, asked)
    session.journal.commit(transitions.set_limits(limits))
    fs.sync(session.directories.root)
    return limits, 0, MEMBERS


def _refuse_company(session: Session, allowed: Container[str]) -> None:
    """Raise SpoolInUse where a live session of another role has the spool open, or any has an item in flight.

    Belongs into a step.
    """
    alive, words = session.directories.alive, session.journal.words
    others = {liveness.token_of(name) for name in fs.list_names(alive)} - {0, session.token}
    others -= liveness.crashed_among(alive, others)
    for token in others:
        pid, role = liveness.said_by(alive, token)
        if role not in allowed:
            raise SpoolInUse(errno.EBUSY, f"is in use: process {pid} has it open as {role}", session.path)
    for record in active(words):
        if words[record + W.STATE] == W.IN_FLIGHT and words[record + W.OWNER] in others:
            pid = liveness.process_of(alive, words[record + W.OWNER])
            what = f"is in use: item {words[record + W.SEQ]} is in flight at process {pid}"
            raise SpoolInUse(errno.EBUSY, what, session.path)
