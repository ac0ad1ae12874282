"""What can be wrong with a spool, and the three verbs of `fsck --repair`. Nothing operates on the table itself.

The directories are put right: modes closed, missing parts made, what stands in the place of a file that can be made
again removed. Bad files are set aside: a damaged item moves to `failed/` with its reason. Every other disagreement is
settled by building the table again, which keeps what is in flight at sessions that live.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

from ..message import Limits
from . import fs, liveness
from . import table as W
from .gc import gc
from .layout import FILES, PARTS, item_number, make_part, permit, write_limits
from .quarantine import set_file_aside
from .rebuild import limits_in, old_table
from .session import Session
from .table import IndexDamaged, rows
from .visitor import administration

_WHO: Final = "spoolipc fsck"
_REPLACEABLE: Final = ("index", "index.new", "spool.json.new", "shutdown", "sources.json", "sources.json.new")
_REBUILT: Final = ("index", "limits", "unknown", "missing", "size")
"""Kinds that building the table again puts right."""


Kind: TypeAlias = Literal[
    "directory", "index", "limits", "item", "unknown", "missing", "size", "orphan",
    "mode", "owner", "link", "planted", "foreign",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a spool. where: a path below it. what: in words. repaired: it is not there any more.

    kind: "directory", a part that is missing; "index", an invariant of the table that does not hold, and "limits",
    where it contradicts spool.json or the shutdown marker; "item", a damaged one; "unknown" to the table; "missing"
    though the table has it; "size", another than the table has; "orphan", of no item; "mode", open to others, and
    "owner", somebody else; "link", has another name too; "planted", not a regular file; "foreign", none of the
    spool's names.
    """

    kind: Kind
    where: str
    what: str
    repaired: bool = False


def wrong_at_top(root: int, mode: int) -> list[Problem]:
    """What is wrong with a spool's directories, and with the files at its top. mode: the spool's."""
    found = [wrong_status(fs.fstat(root), mode, ".", is_directory=True)]
    for name in (*PARTS, *FILES):
        is_part = name in PARTS
        try:
            found.append(wrong_status(fs.stat_at(name, dir_fd=root), mode, name, is_directory=is_part))
        except FileNotFoundError:
            if is_part:
                found.append(Problem("directory", name, "is missing"))
            elif name == "spool.json":
                found.append(Problem("limits", name, "is missing"))
    return [problem for problem in found if problem is not None]


def wrong_status(
    status: os.stat_result, mode: int, where: str, *, is_directory: bool = False
) -> Problem | None:
    """What is wrong with a file, or a directory, by its status alone. mode: the spool's, which files have without
    execution."""
    if is_directory and not stat.S_ISDIR(status.st_mode):
        return Problem("planted", where, "is not a directory of its own")
    if not is_directory and not stat.S_ISREG(status.st_mode):
        return Problem("planted", where, f"is not a regular file ({stat.filemode(status.st_mode)})")
    if status.st_uid not in (fs.user(), 0) and not mode & 0o070:
        return Problem("owner", where, f"belongs to user {status.st_uid}")
    if status.st_mode & 0o777 & ~mode:
        return Problem("mode", where, f"is open to others (mode {stat.S_IMODE(status.st_mode):o})")
    if not is_directory and status.st_nlink > 1:
        return Problem("link", where, f"is linked from {status.st_nlink - 1} more places")
    return None


def put_right(root: int, problem: Problem, mode: int) -> None:
    """Put a directory, or a file at the top, right where that can be."""
    name = problem.where
    if problem.kind == "directory":
        make_part(root, name, mode)
    elif problem.kind == "limits":
        words = old_table(root)
        limits = Limits() if words is None else limits_in(words)
        write_limits(root, replace(limits, mode=mode))
    elif problem.kind == "mode":
        permit(root, name, mode if name in (".", *PARTS) else mode & 0o666)
    elif problem.kind in ("planted", "link") and name in _REPLACEABLE:
        fs.unlink(name, dir_fd=root)


def repair_all(place: Path, found: list[Problem]) -> None:
    """Repair what can be; what fails is found again by the next look."""
    with administration(place) as session:
        named = [problem for problem in found if problem.where != "."]
        aside = [problem for problem in named if _is_bad_file(problem)]
        for problem in named:
            if problem.kind == "mode":
                part, _, name = problem.where.partition("/")
                directory, mode = session.directories.parts[part], session.directories.file_mode
                _tried(session, problem, permit, directory, name, mode)
        sessions = [problem for problem in found if problem.where.startswith("alive/")]
        if aside or any(problem.kind in _REBUILT for problem in found if problem not in sessions):
            session.step(_rebuild, session, aside, [])
        if sessions or any(problem.kind == "orphan" for problem in found):
            gc(session.path)


def _is_bad_file(problem: Problem) -> bool:
    name = problem.where.removeprefix("items/")
    return problem.kind in ("item", "planted") and item_number(name) is not None


def _tried(session: Session, problem: Problem, work: Callable[..., object], *args: object) -> None:
    session.directories.say(
        logging.WARNING, "%s: repairing %s, which %s", session.path, problem.where, problem.what
    )
    try:
        work(*args)
    except OSError as error:
        session.directories.say(
            logging.WARNING, "%s: %s was not repaired: %s", session.path, problem.where, error
        )


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
    found = records[(records[:, W.STATE] == W.IN_FLIGHT) & (records[:, W.SEQ] == number)]
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
