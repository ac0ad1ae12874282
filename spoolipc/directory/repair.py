"""The three verbs of `fsck --repair`. Nothing operates on the table itself.

The directories are put right: modes closed, missing parts made, what stands in the place of a file that can be made
again removed. Bad files are set aside: a damaged item moves to `failed/` with its reason. Every other disagreement is
settled by building the table again, which keeps what is in flight at sessions that live.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ..message import Limits
from . import fs, liveness
from . import table as W
from .gc import gc
from .layout import (
    PARTS,
    item_name,
    item_number,
    make_part,
)
from .problems import Problem
from .quarantine import (
    forget_history,
    note_failure,
    read_history,
    set_file_aside,
)
from .session import Session, owns_nothing
from .table import IndexDamaged, rows

_log = logging.getLogger("spoolipc")
_WHO: Final = "spoolipc fsck"


_REPLACEABLE: Final = ("index", "index.new", "spool.json.new", "shutdown")


_REBUILT: Final = ("index", "limits", "unknown", "missing", "size")
"""Kinds that building the table again puts right."""


def put_right(root: int, problem: Problem, mode: int) -> None:
    """Put a directory, or a file at the top, right where that can be."""
    name = problem.where
    if problem.kind == "directory":
        make_part(root, name, mode)
    elif problem.kind == "mode":
        _permit(root, name, mode if name in (".", *PARTS) else mode & 0o666)
    elif problem.kind in ("planted", "link") and name in _REPLACEABLE:
        fs.unlink(name, dir_fd=root)


def _permit(directory: int, name: str, mode: int) -> None:
    """Give a file or directory of the spool its mode, following no link."""
    fd = fs.open_at(name, os.O_RDONLY | fs.CAREFUL, dir_fd=directory)
    try:
        fs.fchmod(fd, mode)
    finally:
        fs.close(fd)


def repair_all(place: Path, found: list[Problem]) -> None:
    """Repair what can be; what fails is found again by the next look."""
    session = Session(place, Limits(), "admin", create=False)
    try:
        named = [problem for problem in found if problem.where != "."]
        aside = [problem for problem in named if _is_bad_file(problem)]
        for problem in named:
            if problem.kind == "mode":
                part, _, name = problem.where.partition("/")
                _tried(
                    session,
                    problem,
                    _permit,
                    session.directories.parts[part],
                    name,
                    session.directories.file_mode,
                )
            elif problem.kind == "failed":
                _tried(session, problem, session.step, _explain, session, problem)
        if aside or any(problem.kind in _REBUILT for problem in found):
            with session.explaining():
                session.step(_rebuild, session, aside, [])
        if any(problem.kind == "orphan" for problem in found):
            gc(session.path)
    finally:
        session.close(owns_nothing)


def _is_bad_file(problem: Problem) -> bool:
    name = problem.where.removeprefix("items/")
    return problem.kind in ("item", "planted") and item_number(name) is not None


def _tried(session: Session, problem: Problem, work: Callable[..., object], *args: object) -> None:
    _log.warning("%s: repairing %s, which %s", session.path, problem.where, problem.what)
    try:
        work(*args)
    except OSError as error:
        _log.warning("%s: %s was not repaired: %s", session.path, problem.where, error)


def _set_aside(session: Session, problem: Problem) -> None:
    """Move a bad file to failed/. One that a live session has in flight stays: its reader finds out by itself."""
    directories = session.directories
    name = problem.where.removeprefix("items/")
    number = item_number(name)
    assert number is not None
    if fs.exists(directories.items, name) and not _is_in_flight(session, number):
        why = problem.what if problem.kind == "planted" else f"damaged: {problem.what}"
        set_file_aside(directories, number, _WHO, why)


def _is_in_flight(session: Session, number: int) -> bool:
    records = rows(session.journal.words)
    found = records[(records[:, W.STATE] == W.IN_FLIGHT) & (records[:, W.FILE] == number)]
    alive = session.directories.alive
    return any(not liveness.has_crashed(alive, int(owner)) for owner in found[:, W.OWNER])


def _rebuild(session: Session, aside: list[Problem], done: list[bool]) -> tuple[None, int, int]:
    """Set bad files aside and build the table again. A step, which is begun again with the new one.

    The old table is made one that does not hold first: after a crash in between, whoever comes next builds it again.
    """
    if not done:
        done.append(True)
        session.journal.words[W.CAPACITY] = W.ALL_BITS
        for problem in aside:
            _tried(session, problem, _set_aside, session, problem)
        raise IndexDamaged("fsck found that it is not as the directories are")
    return None, 0, 0


def _explain(session: Session, problem: Problem) -> tuple[None, int, int]:
    """Give a dead letter a reason. A step."""
    directories = session.directories
    number = item_number(problem.where.removeprefix("failed/"))
    assert number is not None
    if fs.exists(directories.failed, item_name(number)) and not read_history(directories, number):
        forget_history(directories, number)  # a torn line in it would spoil the next
        note_failure(directories, number, 0, _WHO, "unknown: its history was lost")
    return None, 0, 0
