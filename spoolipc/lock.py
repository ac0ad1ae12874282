"""The index lock: one flock for all processes, one mutex for the threads of this one.

Held for microseconds, around index changes and the rename that goes with them, never around array bytes.
The kernel lets go of it when its holder dies. A holder that is stopped makes others wait until their
timeout, which names it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from filelock import lock_descriptor, unlock_descriptor

from .errors import LockTimeout
from .ownfile import open_own

NAME = "index.lock"
TIMEOUT = 10.0
"""Seconds to wait for the lock before LockTimeout."""
_SPINS = 20
_FIRST_PAUSE = 50e-6
_LONGEST_PAUSE = 1e-3


def open_lock(root: int, mode: int = 0o600) -> int:
    """Open (and make) the lock file in the spool's directory; returns its descriptor. Raises UnsafeSpool."""
    return open_own(root, NAME, os.O_RDWR | os.O_CREAT, mode)


@contextmanager
def exclusively(root: int, mode: int = 0o600) -> Iterator[None]:
    """Hold the lock of the spool at descriptor `root`, opening it for this one use."""
    lock = IndexLock(open_lock(root, mode), lambda: "another process")
    try:
        with lock.mutex:
            lock.take()
            yield
    finally:
        try:
            lock.close()
        except BaseException:  # a signal
            if lock.fd >= 0:
                lock.drop()
            raise


class IndexLock:
    """The lock on one descriptor. Use: `with lock.mutex:` then take(), and drop() in a finally.

    holder: says who holds the lock, for the message of LockTimeout.
    """

    def __init__(self, fd: int, holder: Callable[[], str]) -> None:
        self.fd = fd
        self.mutex = threading.Lock()
        self._holder = holder

    def take(self, timeout: float | None = None) -> None:
        """Take the lock within `timeout` seconds, or TIMEOUT; the caller holds `mutex`.

        Raises LockTimeout, naming the holder. Contended, it tries again at once for a few microseconds, as
        most holders are done by then, and then sleeps between tries.
        """
        if lock_descriptor(self.fd, blocking=False):
            return
        for _ in range(_SPINS):
            os.sched_yield()
            if lock_descriptor(self.fd, blocking=False):
                return
        if timeout is None:
            timeout = TIMEOUT
        deadline = time.monotonic() + timeout
        pause = _FIRST_PAUSE
        while not lock_descriptor(self.fd, blocking=False):
            if time.monotonic() >= deadline:
                raise LockTimeout(
                    errno.ETIMEDOUT,
                    f"the index lock was not free within {timeout:g} s; it is held by {self._holder()}",
                )
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)

    def renewed(self, root: int, mode: int) -> bool:
        """Whether the lock file had been removed by hand; then a new one is taken in the place of the old.

        Newcomers and those who were there before hold different locks until this is called. The caller holds the lock.
        """
        if os.fstat(self.fd).st_nlink:
            return False
        fd = open_lock(root, mode)
        try:
            os.dup2(fd, self.fd, inheritable=False)
        finally:
            os.close(fd)
        self.take()
        return True

    def drop(self) -> None:
        """Release the lock; harmless when it is not held. The caller holds `mutex`."""
        try:
            unlock_descriptor(self.fd)
        except OSError:  # never seen; but a lock that is kept stops everybody
            unlock_descriptor(self.fd)

    def close(self) -> None:
        """Close the descriptor, which releases the lock if nobody shares it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
