"""What can be wrong with a spool, and what is seen by the status of a file alone."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias

from . import fs
from .layout import (
    FILES,
    PARTS,
)

Kind: TypeAlias = Literal[
    "directory", "index", "limits", "item", "unknown", "missing", "size", "orphan",
    "mode", "owner", "link", "planted", "foreign", "failed",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a spool. where: a path below it. what: in words. repaired: it is not there any more.

    kind: "directory", a part that is missing; "index", an invariant of the table that does not hold, and "limits",
    where it contradicts spool.json or the shutdown marker; "item", a damaged one; "unknown" to the table; "missing"
    though the table has it; "size", another than the table has; "orphan", of no item; "mode", open to others, and
    "owner", somebody else; "link", has another name too; "planted", not a regular file; "foreign", none of the
    spool's names; "failed", a dead letter without a reason.
    """

    kind: Kind
    where: str
    what: str
    repaired: bool = False


def wrong_at_top(root: int, mode: int) -> list[Problem]:
    """What is wrong with a spool's directories, and with the files at its top. mode: the spool's."""
    found = wrong_directory(fs.fstat(root), mode, ".")
    for name in PARTS:
        try:
            found += wrong_directory(fs.stat_at(name, dir_fd=root), mode, name)
        except FileNotFoundError:
            found.append(Problem("directory", name, "is missing"))
    for name in FILES:
        with suppress(FileNotFoundError):
            problem = wrong_file(fs.stat_at(name, dir_fd=root), mode, name)
            if problem is not None:
                found.append(problem)
    return found


def wrong_directory(status: os.stat_result, mode: int, where: str) -> list[Problem]:
    """What is wrong with a directory by its status alone."""
    if not stat.S_ISDIR(status.st_mode):
        return [Problem("planted", where, "is not a directory of its own")]
    if status.st_uid not in (os.geteuid(), 0) and not mode & 0o070:
        return [Problem("owner", where, f"belongs to user {status.st_uid}")]
    if status.st_mode & 0o777 & ~mode:
        return [Problem("mode", where, f"is open to others (mode {stat.S_IMODE(status.st_mode):o})")]
    return []


def wrong_file(status: os.stat_result, mode: int, where: str) -> Problem | None:
    """What is wrong with a file by its status alone. mode: the spool's, which files have without execution."""
    if not stat.S_ISREG(status.st_mode):
        return Problem("planted", where, f"is not a regular file ({stat.filemode(status.st_mode)})")
    if status.st_uid not in (os.geteuid(), 0) and not mode & 0o070:
        return Problem("owner", where, f"belongs to user {status.st_uid}")
    if status.st_mode & 0o777 & ~mode:
        return Problem("mode", where, f"is open to others (mode {stat.S_IMODE(status.st_mode):o})")
    if status.st_nlink > 1:
        return Problem("link", where, f"is linked from {status.st_nlink - 1} more places")
    return None
