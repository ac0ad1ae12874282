"""The index lock: a flock on the directory `items/` for all processes, one mutex for the threads of this one.

Held for microseconds, around transitions and the rename that goes with each, never around array bytes. The kernel
lets go of it when its holder dies. It cannot be taken away from under a spool: who removes `items/` makes every
rename into it fail, and who makes `items/` again damages the index first, so nobody goes on under a lock that newcomers
do not see. A holder that is stopped makes others wait
until their timeout, which names it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from ..errors import LockTimeout
from . import fs

TIMEOUT: Final = 10.0
"""Seconds to wait for the lock before LockTimeout."""
_SPINS: Final = 20  # tries at once: a holder is done within some 10 us, a sleep takes at least 60
_FIRST_PAUSE: Final = 50e-6
_LONGEST_PAUSE: Final = 1e-3


no_fork = threading.RLock()
"""Use: `with no_fork:`. A block in which no thread of this process forks, which waits for its end; keep it short.

For what a child must not inherit half done: a lock taken but not yet known to the session that closes it in the child,
or Python's own lock on a module being imported, which nobody would release in the child.
"""


class Forks:
    """How many forks of this process began, and how many of these ended.

    What was made while so many had `ended` is in no child as long as no more have `begun`: a fork that was under way
    may have taken it along.
    """

    def __init__(self) -> None:
        self.begun = self.ended = 0
        os.register_at_fork(before=self._begin, after_in_parent=self._end, after_in_child=self._end)

    def _begin(self) -> None:
        no_fork.acquire()
        self.begun += 1

    def _end(self) -> None:
        self.ended += 1
        no_fork.release()


forks: Final = Forks()


class IndexLock:
    """The lock on the descriptor of `items/`. Use: `with lock.mutex:` then take(), and release() in a finally.

    holder: says who holds the lock, for the message of LockTimeout.
    """

    def __init__(self, fd: int, holder: Callable[[], str]) -> None:
        self.fd = fd
        self.mutex = threading.Lock()
        self._holder = holder

    def take(self, patience: float = TIMEOUT) -> None:
        """Take the lock within `patience` seconds; the caller holds `mutex`. Raises LockTimeout, naming the holder."""
        fd = self.fd
        if fs.lock(fd):
            return
        for _ in range(_SPINS):
            fs.yield_core()
            if fs.lock(fd):
                return
        deadline = time.monotonic() + patience
        pause = _FIRST_PAUSE
        while not fs.lock(fd):
            if time.monotonic() >= deadline:
                raise LockTimeout(
                    errno.ETIMEDOUT,
                    f"the index lock was not free within {patience:g} s; it is held by {self._holder()}",
                )
            fs.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)

    def release(self) -> None:
        """Release the lock; harmless when it is not held. The caller holds `mutex`."""
        try:
            fs.unlock(self.fd)
        except OSError:  # a lock that is kept stops everybody
            fs.unlock(self.fd)


@contextmanager
def exclusively(root: int) -> Iterator[None]:
    """Hold the lock of the spool at descriptor `root`, opening it for this one use."""
    fd = fs.open_directory("items", root)
    lock = IndexLock(fd, lambda: "another process")
    try:
        with lock.mutex:
            lock.take()
            yield
    finally:
        fs.close(fd)  # lets go of it
