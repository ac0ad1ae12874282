"""Temporary spools: where they are made, who uses them, and their removal when nobody does any more.

A temporary spool is a directory of a random name, on `/dev/shm` or, where that has little room, in the directory for
temporary files. Whoever uses it has a descriptor of that directory that shares the lock (flock) on it. A forked child
inherits the descriptor and so uses the spool from the fork on, whether it touches it or not; the kernel lets go of the
lock with the last duplicate, however that process ends. So nobody uses a spool whose directory can be locked alone. It
is then removed: by who left last, else by whoever makes a temporary spool next, or by `remove_temporary`.

A crash while one is made leaves an empty directory without a lock, a crash while one is removed a part of it under its
name: both are removed like any other.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from pathlib import Path
from typing import Final

from ..errors import SpoolGone
from ..message import flag
from . import fs

_log = logging.getLogger("spoolipc")
PREFIX: Final = "spoolipc-queue-"
IN_MEMORY: Final = Path("/dev/shm")
ENOUGH: Final = 512 * 2**20
"""Bytes that must be free on /dev/shm for a temporary spool to be made there: containers often have 64 MB."""


def _on_disk() -> Path:
    """The directory for temporary files, as `tempfile` finds it."""
    return Path(next(filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))), "/tmp"))


def _places() -> list[str]:
    """Where a temporary spool is made, the best first."""
    with contextlib.suppress(OSError):
        with fs.Closing(fs.open_directory(IN_MEMORY)) as fd:
            size, files = fs.room(fd)
        if size >= ENOUGH and files:
            return [str(IN_MEMORY), fs.nearest(_on_disk())]
    return [fs.nearest(_on_disk())]


def make() -> tuple[str, int]:
    """Make the directory of a temporary spool; its path, and the descriptor that uses it. Raises StorageError."""
    places = _places()
    while True:
        path = os.path.join(places[0], PREFIX + secrets.token_hex(8))
        try:
            fs.make_directory(path)
            return path, use(path)
        except SpoolGone:  # somebody took it for one that was left, before it was locked
            continue
        except OSError as error:
            if len(places) == 1:
                raise fs.storage_error(error, path) from error
            del places[0]


def use(path: str) -> int:
    """A descriptor that uses a temporary spool. Raises SpoolGone when it was removed, or is just being removed."""
    with contextlib.suppress(FileNotFoundError):
        fd = fs.open_directory(Path(path))
        try:
            if fs.lock_shared(fd) and fs.fstat(fd)[1:3] == fs.stat_at(path)[1:3]:  # inode and device
                return fd
        except FileNotFoundError:
            pass
        fs.close(fd)
    what = "this temporary spool is gone, as no process used it any more; keep the queue until others have it"
    raise SpoolGone(errno.ENOENT, what, path)


def inherit(fd: int) -> int:
    """The descriptor that a process was started with to use a temporary spool; the programs that it starts are not."""
    return fs.not_inherited(fd)


def leave(path: str, fd: int) -> None:
    """Use a temporary spool no more; it is removed if nobody does. Never through `fd`: a child may have it too."""
    fs.close(fd)
    _remove_if_unused(path)


def remove_temporary(*, dry_run: bool = False) -> list[str]:
    """Remove the temporary spools that nobody uses any more, those of this user or, for root, of all.

    The ends of processes remove them; what is left is of processes that were killed. Returns the paths.
    dry_run: only say what would be removed.
    """
    is_dry, removed = flag("dry_run", dry_run), list[str]()
    for base in {fs.nearest(IN_MEMORY), fs.nearest(_on_disk())}:
        with contextlib.suppress(OSError):
            names = [name for name in fs.list_names(base) if name.startswith(PREFIX)]
            removed += [path for name in names if _remove_if_unused(path := os.path.join(base, name), is_dry)]
    return sorted(removed)


def _remove_if_unused(path: str, dry_run: bool = False) -> bool:
    try:
        fd = fs.open_directory(Path(path))
    except OSError:  # gone, or another user's
        return False
    try:
        if fs.user() not in (0, fs.fstat(fd).st_uid) or not fs.lock(fd, blocking=False):
            return False
        if not dry_run:
            _empty(fd)
            fs.rmdir(path)
        return True
    except OSError as error:
        _log.warning("%s: cannot be removed: %s", path, error.strerror)
        return False
    finally:
        fs.close(fd)


def _empty(directory: int) -> None:
    """Remove all that is in a directory, following no link."""
    for name in fs.list_names(directory):
        with contextlib.suppress(FileNotFoundError):
            try:
                fs.unlink(name, dir_fd=directory)
            except IsADirectoryError:
                with fs.Closing(fs.open_directory(name, directory)) as inner:
                    _empty(inner)
                fs.rmdir(name, dir_fd=directory)
