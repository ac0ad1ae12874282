"""Who is alive: each party that opens a spool holds a lock on `alive/TOKEN` until it ends.

A party is dead exactly when its lock can be taken or its file is gone. The kernel releases the lock at
death, so there is no pid to be reused, no clock and no heartbeat, and it holds between containers that share
the directory. Files are made and judged under the index lock only: nobody sees one between making and
locking.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets

from filelock import lock_descriptor

from .ownfile import open_own


def new_token() -> int:
    """A random token of 63 bits, never zero."""
    return secrets.randbits(62) + 1


def token_name(token: int) -> str:
    """The file name of a token in `alive/`."""
    return f"{token:016x}"


def announce(alive: int, token: int, mode: int = 0o600) -> int:
    """Make and lock the file of `token`; the caller holds the index lock. Returns the locked descriptor.

    A crash after the open leaves an unlocked file: a dead party with nothing in its hands.
    """
    fd = open_own(alive, token_name(token), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    try:
        with contextlib.suppress(OSError):  # only told in messages, and a full disk must keep no reader away
            os.write(fd, f"{os.getpid()}\n".encode())
        if not lock_descriptor(fd, blocking=False):
            raise OSError(errno.EWOULDBLOCK, "a file just made is locked by somebody else", token_name(token))
    except BaseException:
        os.close(fd)
        os.unlink(token_name(token), dir_fd=alive)
        raise
    return fd


def is_dead(alive: int, token: int) -> bool:
    """Whether the party of `token` has ended; the caller holds the index lock."""
    try:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(token_name(token), flags, dir_fd=alive)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            return True  # planted: no party has such a file
        raise
    try:
        return lock_descriptor(fd, blocking=False)
    finally:
        os.close(fd)


def process_of(alive: int, token: int) -> str:
    """The pid written by the party of `token`, for messages only; "unknown" where there is none."""
    try:
        fd = os.open(
            token_name(token), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=alive
        )
    except OSError:
        return "unknown"
    try:
        return os.read(fd, 32).decode("ascii", "replace").strip() or "unknown"
    finally:
        os.close(fd)


def withdraw(alive: int, token: int, fd: int) -> None:
    """End the party: remove its file, then let go of its lock."""
    try:
        os.unlink(token_name(token), dir_fd=alive)
    except FileNotFoundError:
        pass
    finally:
        os.close(fd)
