"""Waiting for what another thread or process brings about, and for one that is to wait itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from filelock import lock_descriptor

from spoolipc.directory import doorbell, housekeeping, session
from support.locks import lock_file
from support.peer import Peer

_STILL = 0.01
"""Seconds in which a thread that sleeps does not wake: longer than any pause between two tries of a lock."""


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until a condition holds that somebody else brings about."""
    deadline, pause = time.monotonic() + seconds, 0.0005
    while not condition():
        assert time.monotonic() < deadline, "the condition was not reached"
        time.sleep(pause)
        pause = min(1.2 * pause, 0.01)  # to ask costs as much as it does


def _seen(pid: int, thread: int) -> tuple[str, int]:
    lines = Path(f"/proc/{pid}/task/{thread or pid}/status").read_text().splitlines()
    said = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return said["State"][0], int(said["voluntary_ctxt_switches"])


def naps(pid: int, thread: int = 0) -> int:
    """How often a thread (the main one, or by its native id) has gone to sleep so far."""
    return _seen(pid, thread)[1]


def until_asleep(pid: int, thread: int = 0, seconds: float = 30.0) -> None:
    """Wait until a thread sleeps and does not wake by itself at once."""
    deadline = time.monotonic() + seconds
    before, since = _seen(pid, thread), time.monotonic()
    while True:
        time.sleep(_STILL / 10)
        now, at = _seen(pid, thread), time.monotonic()
        if now[0] != "S" or now != before:
            before, since = now, at
        elif at - since >= _STILL:
            return
        assert at < deadline, "it never sleeps"


def start_waiting(peer: Peer, code: str, mode: str = "ask") -> None:
    """Begin `code` in a peer, and wait until it waits in it."""
    slept = naps(peer.pid)
    peer.start(mode, code)
    until(lambda: naps(peer.pid) > slept)
    until_asleep(peer.pid)


def polls(pid: int) -> Callable[[], bool]:
    """Whether a process has looked, and gone to sleep again, some times since this call."""
    begun = naps(pid)
    return lambda: naps(pid) >= begun + 10


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock of the spool at `path`."""
    fd = os.open(lock_file(path), os.O_RDONLY)
    try:
        return not lock_descriptor(fd, blocking=False)
    finally:
        os.close(fd)


OFTEN: Final = 0.05
LOOK_OFTEN: Final = f"from support.waits import look_every; look_every({OFTEN})"
"""For a peer that waits for what only a look finds, that the test need not wait for seconds."""


def look_every(
    seconds: float,
    setitem: Callable[[Any, Any, Any], object] = dict.__setitem__,
    setattr: Callable[[Any, str, Any], object] = setattr,
) -> None:
    """Let who waits in this process look unasked, and keep house, so often."""
    for kind in doorbell.LOOK_EVERY:
        setitem(doorbell.LOOK_EVERY, kind, seconds)
    setattr(session, "EVERY", seconds)
    setattr(housekeeping, "_EVERY_NS", int(seconds * 1e9))
