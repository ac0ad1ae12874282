"""The index lock: a flock on the directory `items/` for all processes, one mutex for the threads of this one.

Held for microseconds, around transitions and the rename that goes with each, never around array bytes. The kernel
lets go of it when its holder dies. It cannot be taken away from under a spool: who removes `items/` makes every
rename into it fail, and who makes `items/` again damages the index first, so nobody goes on under a lock that newcomers
do not see. A holder that is stopped makes others wait until their timeout, which names it.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Final, TypeVar

from ..errors import LockTimeout, ReentrantCall, SpoolError
from . import fs

T = TypeVar("T")
_log = logging.getLogger("spoolipc")
TIMEOUT: Final = 10.0
"""Seconds to wait for the lock before LockTimeout."""
_SPINS: Final = 20  # tries at once: a holder is done within some 10 us, a sleep takes at least 60
_FIRST_PAUSE: Final = 50e-6
_LONGEST_PAUSE: Final = 1e-3
BRIEFLY: Final = 1e-3
"""Seconds that a step of an event loop waits for the lock: others of the loop wait for it."""


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


steps: Final[dict[int, list[Callable[[], object]]]] = {}
"""The threads within a locked step, each with what it put off. One of them begins no other step: it might wait for
itself, or for somebody who waits for it."""
os.register_at_fork(after_in_child=steps.clear)


hurried: Final[set[int]] = set()
"""The threads whose steps wait `BRIEFLY` for the lock."""
os.register_at_fork(after_in_child=hurried.clear)


def briefly(step: Callable[[], T]) -> T:
    """What `step` returns, no step of which waits for the lock for longer than `BRIEFLY`: it raises LockTimeout."""
    thread = get_ident()
    hurried.add(thread)
    try:
        return step()
    finally:
        hurried.discard(thread)


def put_off(act: Callable[..., object], *args: object) -> bool:
    """Whether this thread is within a step, so that `act` is done when that has ended: for what is called at any
    moment, by a signal handler, or by the collector as it closes a generator."""
    later = steps.get(get_ident())
    if later is None:
        return False
    later.append(partial(act, *args))
    return True


def catch_up(later: list[Callable[[], object]]) -> None:
    """Do what was put off; nobody is there any more to be told of an error but the log."""
    for act in later:
        try:
            act()
        except SpoolError as error:
            _log.warning("%s", error)


def reentered(path: str) -> ReentrantCall:
    """The error of a step that the thread begins within another."""
    return ReentrantCall(
        f"{path}: was called by a signal handler or a finalizer while this thread works on a spool; let the handler"
        " set a flag or raise an exception, and call from where that is seen"
    )


class IndexLock:
    """The lock on the descriptor of `items/`. Use: `with lock.held():`. `Session.step` does the same without a call.

    path: the spool's, and holder, which says who holds the lock: for the message of LockTimeout.
    """

    def __init__(self, fd: int, path: str, holder: Callable[[], str]) -> None:
        self.fd = fd
        self.path = path
        self.mutex = threading.Lock()
        self._holder = holder

    def take(self, patience: float = TIMEOUT) -> None:
        """Take the lock within `patience` seconds; the caller holds `mutex`. Raises LockTimeout, naming the holder."""
        fd = self.fd
        if get_ident() in hurried:
            patience = BRIEFLY
        deadline = time.monotonic() + patience
        spins, pause = _SPINS, _FIRST_PAUSE
        while not fs.lock(fd, blocking=False):
            if time.monotonic() >= deadline:
                raise self._timeout(patience, self._holder())
            if spins:
                spins -= 1
                fs.yield_core()
            else:
                fs.sleep(pause)
                pause = min(pause * 1.5, _LONGEST_PAUSE)

    def wait_for_threads(self) -> None:
        """Wait `BRIEFLY` until no other thread has `mutex`, which one may that waits for the lock itself. Raises
        LockTimeout. To take the mutex with a timeout would not do: after an interrupt nobody knew who has it."""
        deadline = time.monotonic() + BRIEFLY
        while self.mutex.locked():
            if time.monotonic() >= deadline:
                raise self._timeout(BRIEFLY, "another thread of this process")
            fs.sleep(_FIRST_PAUSE)

    def _timeout(self, patience: float, holder: str) -> LockTimeout:
        what = f"the index lock was not free within {patience:g} s; it is held by {holder}"
        return LockTimeout(errno.ETIMEDOUT, what, self.path)

    def is_free(self) -> bool:
        """Whether nobody holds the lock just now."""
        if not self.mutex.acquire(blocking=False):
            return False
        try:
            if not fs.lock(self.fd, blocking=False):
                return False
            fs.unlock(self.fd)
            return True
        finally:
            self.mutex.release()

    def release(self) -> None:
        """Release the lock; harmless when it is not held. The caller holds `mutex`."""
        try:
            fs.unlock(self.fd)
        except OSError:  # a lock that is kept stops everybody
            fs.unlock(self.fd)

    @contextmanager
    def held(self, patience: float = TIMEOUT) -> Iterator[None]:
        """Hold the lock in the block. Raises LockTimeout, ReentrantCall."""
        thread = get_ident()
        if thread in steps:
            raise reentered(self.path)
        steps[thread] = []  # before the mutex is taken, and until after: a signal may come between any two
        try:
            with self.mutex:
                try:
                    self.take(patience)
                    yield
                finally:
                    self.release()
        finally:
            later = steps.pop(thread, None)  # a child forked within has forgotten it
            if later:
                catch_up(later)


@contextmanager
def exclusively(root: int, path: str) -> Iterator[None]:
    """Hold the lock of the spool at descriptor `root`, opening it for this one use."""
    with (
        fs.Closing(fs.open_directory("items", root)) as fd,
        IndexLock(fd, path, lambda: "another process").held(),
    ):
        yield
