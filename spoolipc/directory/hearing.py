"""How this process hears that a session's file was written to: by inotify, and by no thread of its own.

All sessions of a process share one descriptor of inotify: of the threads that wait, one reads it for all, and so does
an event loop that finds it readable. Where inotify cannot be had (its limits are used up, the file system
reports nothing, or SPOOLIPC_WATCH=polling is set in the environment) who waits looks at intervals, and the log says so
once.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal, Protocol

from . import fs
from .lock import no_fork

_log = logging.getLogger("spoolipc")


_PAUSE: Final = 0.5e-3  # seconds between two looks whether it did
TRIAL: Final = 0.1  # seconds within which a new watch must hear its own ring


_EVENT: Final = struct.Struct("iIII")


_BUFFER: Final = 4096


class Hearer(Protocol):
    """A session's doorbell, as it is heard. file: what is watched. number: of its watch, -1 for none. tickets: rings
    heard. closed: the session was."""

    number: int
    tickets: int
    closed: bool

    @property
    def file(self) -> str:
        """The path of the file that is written to."""

    def heard(self) -> None:
        """The file was written to."""

    def ring_oneself(self) -> None:
        """Write to the file."""


class Ears:
    """What this process hears: one descriptor of inotify, read by one of the threads that wait, for all of them."""

    def __init__(self) -> None:
        self.fd = -1
        self._lock = threading.RLock()  # for a few stores; a signal handler may wait amid them
        self._doorbells: dict[int, weakref.ref[Hearer]] = {}
        self._sleepers: dict[int, tuple[threading.Lock, Hearer]] = {}
        self._is_read = False

    def add(self, doorbell: Hearer) -> None:
        """Listen for a doorbell."""
        with self._lock:
            if self.fd < 0:
                self.fd = fs.watch_open()
            number = fs.watch_add(self.fd, doorbell.file)
            # One dropped without a close is forgotten at any moment, also where this thread has the lock.
            self._doorbells[number] = weakref.ref(doorbell, functools.partial(self._doorbells.pop, number))
            doorbell.number = number

    def renew(self, doorbell: Hearer) -> None:
        """Listen to the file that took the place of its own; who sleeps sleeps on."""
        with self._lock:
            before = doorbell.number
            try:
                self.add(doorbell)
            except OSError:
                self.remove(doorbell)
            self._doorbells.pop(before, None)

    def remove(self, doorbell: Hearer) -> None:
        """Listen for it no more, and wake its threads. The watch itself goes with the file."""
        with self._lock:
            self._doorbells.pop(doorbell.number, None)
            doorbell.number = -1
            self._wake(lambda other: other is doorbell)
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if not self._doorbells and not self._is_read and self.fd >= 0:
            fs.close(self.fd)
            self.fd = -1

    def sleep(self, doorbell: Hearer, ticket: int, until: float) -> None:
        """Sleep until a ring later than `ticket` is heard, or until then (monotonic seconds)."""
        while doorbell.tickets == ticket and doorbell.number >= 0 and not doorbell.closed:
            seconds = until - time.monotonic()
            if seconds <= 0:
                return
            with self._lock:
                reads = not self._is_read
                sleeper = threading.Lock()
                if reads:
                    self._is_read = True
                else:
                    sleeper.acquire()
                    self._sleepers[id(sleeper)] = sleeper, doorbell
            try:
                if reads:
                    self._read(seconds)
                else:
                    sleeper.acquire(timeout=seconds)
            finally:
                with self._lock:
                    self._sleepers.pop(id(sleeper), None)
                    if reads:
                        self._is_read = False
                        self._close_if_unused()
                        for other, _ in list(self._sleepers.values())[:1]:  # it reads now
                            other.release()
                            self._sleepers.pop(id(other))

    def drain(self) -> None:
        """Read what is there, for all: an event loop found the descriptor readable."""
        with self._lock:  # nobody closes it meanwhile
            if self.fd >= 0:
                self._read(0)

    def _read(self, seconds: float) -> None:
        if not fs.poll(self.fd, seconds):
            return
        try:
            events = fs.read(self.fd, _BUFFER)
        except BlockingIOError:
            return
        numbers = {number for number, _, _, _ in _EVENT.iter_unpack(events[: len(events) // 16 * 16])}
        with self._lock:
            for number, ref in list(self._doorbells.items()):
                doorbell = ref()
                if doorbell is None:
                    self._doorbells.pop(number, None)
                elif number in numbers or -1 in numbers:  # -1: the kernel's queue overflowed
                    doorbell.heard()
            self._wake(lambda other: other.number in numbers or -1 in numbers)

    def _wake(self, concerned: Callable[[Hearer], bool]) -> None:
        for key, (sleeper, doorbell) in list(self._sleepers.items()):
            if concerned(doorbell):
                del self._sleepers[key]
                sleeper.release()


_ears: Ears | None = None


_ears_lock = threading.RLock()


_deaf = False  # the last attempt to listen failed


_warned = False


def ears() -> Ears | None:
    """What this process hears with, None where nobody has waited yet."""
    return _ears


def listen(doorbell: Hearer) -> Ears | None:
    """Have the process hear a doorbell; None where it cannot: look at intervals. The log says so once."""
    global _ears, _deaf
    if _is_forced():
        return None
    try:
        with no_fork, _ears_lock:
            if _ears is None:
                _ears = Ears()
            ears, is_new = _ears, doorbell.number < 0
            if is_new:
                ears.add(doorbell)
        if is_new:
            _try_out(ears, doorbell)
        _deaf = False
        return ears
    except FileNotFoundError:
        return None  # the spool is gone, which says nothing about inotify
    except OSError as error:
        _deaf = True
        _complain(str(error))
        return None


def _try_out(ears: Ears, doorbell: Hearer) -> None:
    """Ring ourselves: a local file system has the event ready when the write returns. Raises OSError."""
    heard = doorbell.tickets
    doorbell.ring_oneself()
    until = time.monotonic() + TRIAL
    while not fs.poll(ears.fd, 0) and doorbell.tickets == heard:  # another thread may have read it
        if time.monotonic() > until:
            ears.remove(doorbell)
            raise OSError(f"no event arrived from {doorbell.file}")
        fs.sleep(_PAUSE)


def mode() -> Literal["inotify", "polling"]:
    """How this process waits, or would: found out without a ring, which would wake somebody."""
    if _is_forced() or _deaf:
        return "polling"
    if _ears is None or _ears.fd < 0:
        try:
            fs.close(fs.watch_open())
        except OSError:
            return "polling"
    return "inotify"


def _is_forced() -> bool:
    return os.environ.get("SPOOLIPC_WATCH") == "polling"


def _complain(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        _log.warning("inotify is unavailable (%s): waiting falls back to polling", reason)


def _after_fork_in_child() -> None:
    global _ears, _ears_lock, _deaf
    if _ears is not None and _ears.fd >= 0:
        with suppress(OSError):
            fs.close(_ears.fd)
    _ears, _ears_lock, _deaf = None, threading.RLock(), False


os.register_at_fork(after_in_child=_after_fork_in_child)
