"""The parts of a spool that must be in order before anybody can open it: their kind, mode, owner and links.

Opening refuses what is wrong here; `fsck` names all of it and puts right what can be put right without the
index.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from . import alive, bell, watch
from .census import token_of
from .layout import FILES, OPEN_DIRECTORY, PARTS
from .lock import NAME as LOCK
from .mend import permit

Kind = Literal[
    "directory", "index", "limits", "item", "unknown", "missing", "size", "orphan",
    "mode", "owner", "link", "planted", "stranger", "failed",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a spool. where: a path below it. what: in words. repaired: it is not there any more.

    kind: "directory", a part that is missing; "index", which contradicts itself, and "limits", which
    contradict spool.json or the shutdown marker; "item", a damaged one; "unknown" to the index; "missing"
    though the index has it; "size", another than the index has; "orphan", of no item; "mode", open to others,
    and "owner", somebody else; "link", has another name too; "planted", not a regular file; "stranger", none
    of our names; "failed", a dead letter without a reason.
    """

    kind: Kind
    where: str
    what: str
    repaired: bool = False


Repair = Callable[[], None]
_RINGS = [f"bell/{kind}-{k}/{watch.RING}" for kind in bell.KINDS for k in range(bell.BELLS)]
_REPLACEABLE = ("index", "index.new", "index.lock", "spool.json.new", "shutdown")


def wrong_file(status: os.stat_result, mode: int, where: str) -> Problem | None:
    """What is wrong with a file by its status alone. mode: the spool's, which files have without
    execution."""
    if not stat.S_ISREG(status.st_mode):
        return Problem("planted", where, f"is not a regular file ({stat.filemode(status.st_mode)})")
    if status.st_uid not in (os.geteuid(), 0) and not mode & 0o070:
        return Problem("owner", where, f"belongs to user {status.st_uid}")
    if status.st_mode & 0o777 & ~mode:
        return Problem("mode", where, f"is open to others (mode {stat.S_IMODE(status.st_mode):o})")
    if status.st_nlink > 1:
        return Problem("link", where, f"is linked from {status.st_nlink - 1} more places")
    return None


def check_premises(root: int) -> list[tuple[Problem, Repair | None]]:
    """What is wrong with a spool's directories and the files at its top, each with its repair, if there is
    one.

    root: descriptor of a directory that has a spool.json.
    """
    mode = _mode(root)
    found: list[tuple[Problem, Repair | None]] = []
    status = os.fstat(root)
    found += _wrong_directory(status, mode, ".", lambda: os.fchmod(root, mode))
    for name in PARTS:
        try:
            status = os.stat(name, dir_fd=root, follow_symlinks=False)
        except FileNotFoundError:
            found.append((Problem("directory", name, "is missing"), _maker(root, name, mode)))
            continue
        found += _wrong_directory(status, mode, name, _permitter(root, name, mode))
        if name == "bell" and (lost := sum(not _is_ring(root, ring) for ring in _RINGS)):
            found.append((Problem("directory", name, f"lacks {lost} of its bells"), _maker(root, name, mode)))
    for name in FILES:
        with suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=root, follow_symlinks=False)
            problem = wrong_file(status, mode, name)
            if problem is not None:
                found.append((problem, _file_repair(root, problem, mode & 0o666)))
    return found


def _mode(root: int) -> int:
    """The mode in spool.json, 0700 where it says none that is possible."""
    try:
        fd = os.open("spool.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=root)
        with open(fd, "rb") as file:
            mode = json.loads(file.read(65536))["mode"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0o700
    return mode if isinstance(mode, int) and mode & 0o700 == 0o700 and not mode & ~0o770 else 0o700


def _is_ring(root: int, name: str) -> bool:
    try:
        status = os.stat(name, dir_fd=root, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _wrong_directory(
    status: os.stat_result, mode: int, where: str, repair: Repair
) -> list[tuple[Problem, Repair | None]]:
    if not stat.S_ISDIR(status.st_mode):
        return [(Problem("planted", where, "is not a directory of its own"), None)]
    if status.st_uid not in (os.geteuid(), 0) and not mode & 0o070:
        return [(Problem("owner", where, f"belongs to user {status.st_uid}"), None)]
    if status.st_mode & 0o777 & ~mode:
        said = f"is open to others (mode {stat.S_IMODE(status.st_mode):o})"
        return [(Problem("mode", where, said), repair)]
    return []


def _permitter(root: int, name: str, mode: int) -> Repair:
    return lambda: permit(root, name, mode)


def _maker(root: int, name: str, mode: int) -> Repair:
    def make() -> None:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=root)
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=root)
        try:
            os.fchmod(fd, mode)
            if name == "bell":
                bell.make(fd, mode)
        finally:
            os.close(fd)

    return make


def _file_repair(root: int, problem: Problem, mode: int) -> Repair | None:
    name = problem.where
    if problem.kind == "mode":
        return _permitter(root, name, mode)
    if problem.kind in ("planted", "link") and name in _REPLACEABLE:
        return partial(_remove, root, name)
    return None


def _remove(root: int, name: str) -> None:
    """Remove a file that the next who opens the spool makes anew. A lock that somebody may hold must stay, as
    otherwise two would each hold one."""
    if name == LOCK and _is_open(root):
        raise OSError(errno.EBUSY, "the spool is in use", name)
    os.unlink(name, dir_fd=root)


def _is_open(root: int) -> bool:
    """Whether any party is alive."""
    alive_directory = os.open("alive", OPEN_DIRECTORY, dir_fd=root)
    try:
        tokens = map(token_of, os.listdir(alive_directory))
        return any(token and not alive.is_dead(alive_directory, token) for token in tokens)
    finally:
        os.close(alive_directory)
