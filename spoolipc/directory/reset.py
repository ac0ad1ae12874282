"""Starting again: a spool emptied, given other limits, begun anew, or removed.

Items go one by one, each by the transition that discards it, some in a step: a crash leaves the rest, which wait as
before. Limits change in one transition, whose move puts the new spool.json in the place of the old. To remove a spool
is to shut it down at once, and to unlink its names when nothing is left in it: the index, then spool.json, after which
it is no spool, and last items/, whose lock is held meanwhile, so that whoever makes it again waits and finds it gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Container
from functools import partial
from pathlib import Path
from typing import Final

from ..errors import NotASpool, SpoolInUse, StorageError
from ..message import Limits
from . import fs, housekeeping, liveness, transitions
from . import table as W
from .dead_letters import drop_letter
from .gc import is_ours
from .layout import FILES, PARTS, open_root, stage_limits
from .lock import exclusively
from .quarantine import failed_numbers
from .session import MEMBERS, Session
from .table import active
from .visitor import administration

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


def remove(path: str | os.PathLike[str]) -> None:
    """Delete the spool at `path` with all that is in it. Raises SpoolInUse, and what `purge` raises."""
    place = Path(os.path.abspath(os.fspath(path)))
    try:
        with administration(place) as session:
            session.step(_end, session)
            while session.step(housekeeping.discard_if_shut_down, session):
                pass
            for number in failed_numbers(session.directories):
                session.step(drop_letter, session, number)
            session.step(_remove, session)
    except NotASpool:
        if not _finish_removal(place):
            raise
    with contextlib.suppress(OSError):  # a mount point, perhaps, or made again by now
        fs.rmdir(place)


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


def _end(session: Session) -> tuple[None, int, int]:
    """Shut it down at once. A step."""
    _refuse_company(session, ())
    _refuse_foreign(session)
    if session.journal.words[W.SHUTDOWN] != W.DISCARDED:
        session.journal.commit(transitions.set_shutdown(W.DISCARDED))
    return None, 0, 0


def _remove(session: Session) -> tuple[None, int, int]:
    """Remove what is left of a spool in which nothing is left. A step."""
    _refuse_company(session, ())
    _remove_names(session.directories.root)
    return None, 0, 0


def _remove_names(root: int) -> None:
    """The caller holds the lock. Without its index a spool is whole; without spool.json it is none."""
    for name in ("index", "spool.json", *FILES):
        fs.unlink_missing_ok(root, name)
    for part in reversed(PARTS):
        with contextlib.suppress(FileNotFoundError):
            with fs.Closing(fs.open_directory(part, root)) as fd:
                for name in filter(partial(is_ours, part), fs.list_names(fd)):
                    fs.unlink_missing_ok(fd, name)
            fs.rmdir(part, dir_fd=root)


def _finish_removal(place: Path) -> bool:
    """Finish a removal that ended early: where there is neither spool.json nor an index, but items/ and no name that
    is not the spool's. Whether that was so."""
    with (
        contextlib.suppress(NotASpool, FileNotFoundError),
        fs.Closing(open_root(place)) as root,
        exclusively(root, str(place)),
    ):
        if set(fs.list_names(root)) <= {*PARTS, *FILES} - {"spool.json", "index"}:
            _remove_names(root)
            return True
    return False


def _refuse_foreign(session: Session) -> None:
    """Raise StorageError where a directory of the spool holds what is none of its own."""
    for part, fd in session.directories.places.items():
        for name in fs.list_names(fd):
            if not is_ours(part, name):
                name = os.path.normpath(f"{part}/{name}")
                what = f"holds {name!r}, which is not the spool's; move it away first"
                raise StorageError(errno.ENOTEMPTY, what, session.path)


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
