"""Who is alive: each session holds a lock on `alive/TOKEN` until it ends.

A session has crashed exactly when that lock can be taken. The kernel releases the lock at death, so there is no pid to
be reused, no clock and no heartbeat, and it holds between containers that share the directory. Files are made and
judged under the index lock only: nobody sees one between making and locking. A session that leaves removes its file
last, when it owns nothing. So a file that is not there was removed by somebody else, and its session may live: it makes
the file again, and until then keeps what it has.

Writers also share a lock on `tmp/`: there is a writer exactly when nobody can have that lock for himself. A forked
child inherits it, and so counts as a writer from the fork on, before it has a session of its own.

The file begins with a newline, and a session is woken by writing that newline again (`doorbell.py`); then a line of
JSON says who it is, for messages only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from itertools import islice
from typing import Any, Final, Literal, get_args

from . import fs
from .table import Token

Role = Literal["writer", "reader", "admin"]
SPARE: Final = "spare"
"""A file at the top of the spool, laid by for who opens it where no more files can be made."""
_UNKNOWN: Final = ("unknown", "session")
_HEX: Final = frozenset("0123456789abcdef")
_NAMES: Final = 4096  # looked at in one step: about a millisecond
_SESSIONS: Final = 256  # asked in one step


def new_token() -> Token:
    """A random token of 62 bits, never zero."""
    return Token(secrets.randbits(62) + 1)


def token_name(token: int) -> str:
    """The file name of a token in `alive/`."""
    return f"{token:016x}"


def token_of(name: str) -> int:
    """The token in a name of `alive/`, 0 for any other name."""
    return int(name, 16) if len(name) == 16 and _HEX.issuperset(name) else 0


def announce(root: int, alive: int, token: Token, role: Role, mode: int) -> int:
    """Make and lock the file of `token`; the caller holds the index lock. Returns the locked descriptor.

    A crash after the open leaves an unlocked file: a crashed session that owns nothing.
    """
    try:
        fd = fs.open_own(alive, token_name(token), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        if not fs.is_shortage(error) or not fs.exists(root, SPARE):
            raise
        fs.rename(SPARE, token_name(token), src_dir_fd=root, dst_dir_fd=alive)
        fd = fs.open_own(alive, token_name(token), os.O_RDWR | os.O_TRUNC)
    try:
        said = json.dumps({"pid": os.getpid(), "role": role})
        with contextlib.suppress(OSError):  # only told in messages, and a full disk must keep no reader away
            fs.write(fd, f"\n{said}\n".encode())
        if not fs.lock(fd, blocking=False):
            raise OSError(errno.EWOULDBLOCK, "a file just made is locked by somebody else", token_name(token))
    except BaseException:
        fs.close(fd)
        fs.unlink_missing_ok(alive, token_name(token))
        raise
    return fd


def has_crashed(alive: int, token: int, *, missing: bool = False) -> bool:
    """Whether the session of `token` has ended without leaving; the caller holds the index lock.

    missing: the answer for one whose file is not there. False where its file cannot be opened: others can tell.
    """
    try:
        fd = fs.open_at(token_name(token), os.O_RDONLY | fs.CAREFUL, dir_fd=alive)
    except FileNotFoundError:
        return missing
    except OSError as error:
        return error.errno in fs.NO_FILE  # no session has such a file
    try:
        return fs.lock(fd, blocking=False)
    finally:
        fs.close(fd)


def is_alone(alive: int, token: int) -> bool:
    """Whether no session but that of `token`, 0 for none, is alive; the caller holds the index lock."""
    others = {token_of(name) for name in fs.list_names(alive)} - {0, token}
    return all(has_crashed(alive, other) for other in others)


def seems_alone(alive: int, token: int, crashed: set[int]) -> bool | None:
    """The same, in short steps: None where another call is needed. False where there are very many names, which are
    left to housekeeping and gc. crashed: those of whom it is known for ever; the caller holds the index lock."""
    with fs.scan(alive) as entries:
        names = [entry.name for entry in islice(entries, _NAMES)]
    others = {*map(token_of, names)} - {0, token} - crashed
    for other in islice(others, _SESSIONS):
        if not has_crashed(alive, other):
            return False
        crashed.add(other)
    if len(others) > _SESSIONS:
        return None
    return len(names) < _NAMES


def crashed_among(alive: int, tokens: set[int]) -> set[int]:
    """Which of `tokens` are of sessions that have crashed, or have lost their file; the caller holds the index lock."""
    return {token for token in tokens if has_crashed(alive, token, missing=True)}


def has_writer(root: int) -> bool:
    """Whether there is a writer, or that cannot be known; the caller holds the index lock."""
    try:
        fd = fs.open_directory("tmp", root)
    except OSError:
        return True
    try:
        return not fs.lock(fd, blocking=False)
    except OSError:
        return True
    finally:
        fs.close(fd)


def leave_writers(root: int, tmp: int) -> bool:
    """Count as a writer no more; whether no other is left. The caller holds the index lock. Not by letting go of the
    lock, which a forked child may share, but of the descriptor."""
    try:
        fs.replace(fs.open_directory("tmp", root), tmp)
    except OSError:  # no descriptor is left, say: it ends with the session
        return False
    return not has_writer(root)


def ring(alive: int, token: int) -> bool:
    """Wake the session of `token`; false when it has crashed or its file is gone, so that another can be woken."""
    try:
        fd = fs.open_own(alive, token_name(token), os.O_RDWR)
    except OSError:
        return False
    try:
        if fs.lock(fd, blocking=False):
            return False
        fs.pwrite(fd, b"\n", 0)  # over the same byte: no block is needed, even on a full file system
        return True
    except OSError:
        return False
    finally:
        fs.close(fd)


def process_of(alive: int, token: int) -> str:
    """The pid written by the session of `token`, for messages only; "unknown" where there is none."""
    return said_by(alive, token)[0]


def said_by(alive: int, token: int) -> tuple[str, str]:
    """The pid and the role written by the session of `token`; "unknown" and "session" where there are none."""
    try:
        with fs.Closing(fs.open_at(token_name(token), os.O_RDONLY | fs.CAREFUL, dir_fd=alive)) as fd:
            said: Any = json.loads(fs.read(fd, 256))
        role = said["role"]
        return str(int(said["pid"])), role if role in get_args(Role) else _UNKNOWN[1]
    except (OSError, ValueError, TypeError, KeyError):
        return _UNKNOWN
