"""The doorbells: how a process waits for an item, or for space, without polling.

    bell/
      items-0/ring ... items-7/ring    rung for those who wait for items
      space-0/ring ... space-7/ring    rung for those who wait for space

Each kind has eight bells and, in the mapped index, eight flag words. A waiter belongs to bell `token % 8`. It
sets that bell's flag, looks again, and sleeps until somebody writes a byte to the bell's `ring` file, the
only file in the directory it watches. Whoever makes an item available rings as many bells as there are items,
not all of them: a bell with its flag set, cleared before the write. No flag set means no system call.

    waiter: ticket; flag = now; barrier; look; sleep while the ticket is unchanged
    ringer: item visible; barrier; flag seen; flag = 0; write

Either the waiter's look sees the item or the ringer sees the flag; and a flag cleared is always followed by a
write that every waiter who had set it hears. A process that hears a ring it asked for but no longer waits for
passes it on, once for each time it set its flag, so that no ring circulates.

A ring is a hint: the waiter wakes once a second in any case, to look and to set its flag again. So a flag
older than that is nobody's who sleeps. It was left by a process that died, was stopped or went on to other
work; its bell is rung beside the others and takes no waiter's place. Nothing needs repair.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Final, Literal, Protocol

from . import watch
from .errors import SpoolError
from .ownfile import open_own

Kind = Literal["items", "space"]

BELLS: Final = 8
LOOK_EVERY: Final = 1.0  # seconds a sleeper waits before it looks again unasked ...
LOOK_FOR_SPACE: Final = 0.05  # ... who waits for space, as not every single place is rung for
SHORT_LOOK: Final = (5e-6, 200e-6)  # seconds of looking before sleeping: least and most
CROWDED: Final = 50e-6  # seconds: a look that takes longer gave the core to somebody with work to do
SOON: Final = 1e-3  # seconds: a sleep that ends within it would better have been a longer look
FRESH: Final = 1_500_000_000  # nanoseconds: a sleeper's flag is never older, LOOK_EVERY and some delay
POLL: Final = (0.5e-3, 20e-3)  # seconds between looks where no bell can be heard: first and longest
KINDS: Final[tuple[Kind, ...]] = ("items", "space")


class Flags(Protocol):
    """The flag words of one kind: eight integers of 64 bits, in practice a slice of the mapped index.

    Each says when somebody at that bell last meant to sleep, in nanoseconds of the monotonic clock, or 0.
    """

    def __getitem__(self, k: int, /) -> int: ...

    def __setitem__(self, k: int, value: int, /) -> None: ...

    def __iter__(self) -> Iterator[int]: ...


def make(bell_dir: int | str, mode: int = 0o700) -> None:
    """Make the bells in an existing directory, given by path or descriptor; what is there stays.

    mode: permission bits of the directories; the files have the same without execution.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    root = os.dup(bell_dir) if isinstance(bell_dir, int) else os.open(bell_dir, flags)
    try:
        for name in (f"{kind}-{k}" for kind in KINDS for k in range(BELLS)):
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=root)
            fd = os.open(name, flags, dir_fd=root)
            try:
                _permit(fd, mode)
                _make_ring(fd, mode & 0o666)
            finally:
                os.close(fd)
    finally:
        os.close(root)


def _make_ring(directory: int, mode: int) -> None:
    fd = open_own(directory, watch.RING, os.O_WRONLY | os.O_CREAT, mode)
    try:
        os.pwrite(fd, b"\0", 0)  # allocated now, so that ringing never fails for want of space
    finally:
        os.close(fd)


def _permit(fd: int, mode: int) -> None:
    if os.fstat(fd).st_mode & 0o777 != mode:
        os.fchmod(fd, mode)


class _Room:
    """Where the threads of this process wait for one kind."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # around the next four; held for a few stores
        self.ticket = 0  # rings heard
        self.waiting = 0  # threads
        self.armed = False  # we set our flag and have heard no ring since
        self.sleepers: list[threading.Lock] = []  # each released once to wake the thread that sleeps on it
        self.asked = False  # for a listener
        self.listener: watch.Listener | None = None
        self.spin = SHORT_LOOK[1]

    def wake(self) -> bool:
        """Count a ring and wake all who sleep; says whether it was asked for and nobody waits any more."""
        with self.lock:
            self.ticket += 1
            left = self.armed and not self.waiting
            self.armed = False
            sleepers, self.sleepers = self.sleepers, []
        # Not a Condition: that would wake them while it holds the lock they need next.
        for sleeper in sleepers:
            sleeper.release()
        return left

    def sleep(self, ticket: int, seconds: float) -> None:
        """Sleep until a ring later than `ticket` is heard."""
        sleeper = threading.Lock()
        sleeper.acquire()
        with self.lock:
            if self.ticket != ticket:
                return
            self.sleepers.append(sleeper)
        try:
            sleeper.acquire(timeout=seconds)
        finally:
            if sleeper in self.sleepers:
                with self.lock, suppress(ValueError):
                    self.sleepers.remove(sleeper)


def _rung(bells: weakref.ref[Bells], kind: Kind) -> None:
    """What the observer calls. It does not keep the bells alive, so they may be dropped without a close."""
    there = bells()
    if there is not None:
        there._rung(kind)


def _close_all(fds: dict[tuple[Kind, int], int]) -> None:
    while fds:
        with suppress(OSError):
            os.close(fds.popitem()[1])


class Bells:
    """The bells of one spool, as one of its parties rings and hears them. Threads may share it.

    bell_dir: path of the directory filled by `make`.
    token: this party's number, which chooses its bell.
    flags: gives the eight flag words of a kind as they are mapped now. It is also called in the observer's
        thread, so it must take no lock that is held around a call of `close`. It may raise SpoolError.
    """

    def __init__(self, bell_dir: str, token: int, flags: Callable[[Kind], Flags]) -> None:
        self._dir = bell_dir
        self._flags = flags
        self._fds: dict[tuple[Kind, int], int] = {}
        weakref.finalize(self, _close_all, self._fds).atexit = False
        self._closed = False  # for listening
        self._silent = False  # for ringing
        self._start(token)

    def _start(self, token: int) -> None:
        self._bell = token % BELLS
        self._next = self._bell
        self._rooms: dict[Kind, _Room] = {kind: _Room() for kind in KINDS}
        self._listening = threading.Lock()  # asking for a listener
        self._telling = threading.Lock()  # a callback runs
        self._striking = threading.Lock()  # a `ring` file is written

    def reset_after_fork(self, token: int | None = None) -> None:
        """In a forked child, before anything else: start afresh, with the child's own token if it is given.

        The parent's threads, which may have held our locks, are not here; its listeners are forgotten.
        """
        self._start(self._bell if token is None else token)
        _close_all(self._fds)

    def ring(self, kind: Kind, n: int = 1) -> None:
        """Wake somebody for each of `n` items (or free places) that others can see already.

        Call it after the index lock was let go: that is the memory barrier between making the item visible
        and reading the flags. Raises only what `flags` raises.
        """
        words = self._flags(kind)
        if any(words):
            self._next = (self._next + 1) % BELLS
            self._ring(kind, words, n, self._next)

    def ring_all(self, kind: Kind) -> None:
        """Wake everybody, flag or not: for what concerns all, such as a shutdown."""
        words = self._flags(kind)
        for k in range(BELLS):
            words[k] = 0
            self._strike(kind, k)

    def wait(self, kind: Kind, look: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until `look()` is true, at most `timeout` seconds (None: for ever).

        Returns whether it is. `look` is called often, at least once, and its exceptions pass through, as does
        what `flags` raises. After a true answer the caller rings again if more than it takes is left.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if look():
            return True
        if timeout is not None and timeout <= 0:
            return False
        room = self._rooms[kind]
        if self._look_briefly(room, look, deadline):
            return True
        began = time.monotonic()
        listener = self._listen(kind, room)
        with room.lock:
            room.waiting += 1
            ticket = seen = room.ticket  # seen: the last ring that a look came after
        pause = POLL[0]
        try:
            while True:
                if listener is not None:
                    self._arm(kind, room)
                if look():
                    seen = ticket
                    return True
                seen = ticket
                if listener is not None and listener.hears():
                    nap = LOOK_EVERY if kind == "items" else LOOK_FOR_SPACE
                else:
                    nap, pause = pause, min(2 * pause, POLL[1])
                if deadline is not None:
                    nap = min(nap, deadline - time.monotonic())
                    if nap <= 0:
                        return False
                room.sleep(ticket, nap)
                ticket = room.ticket
                if ticket != seen:  # rung: look before the flag is set again, most often for nothing
                    if look():
                        seen = ticket
                        return True
                    seen = ticket
        finally:
            if time.monotonic() - began < SOON:
                room.spin = SHORT_LOOK[1]
            with room.lock:
                room.waiting -= 1
                unanswered = room.ticket != seen and not room.waiting
            if unanswered:
                self._pass_on(kind)

    def close(self) -> None:
        """Stop listening, take our flags back and close the files. Who still waits here goes on polling."""
        with self._listening:
            self._closed = True
            listeners = [room.listener for room in self._rooms.values() if room.listener is not None]
            for room in self._rooms.values():
                room.listener = None
        for listener in listeners:
            listener.close()
        with self._telling:  # a callback that still runs may be using the flags
            pass
        for kind, room in self._rooms.items():
            armed = room.armed
            room.wake()
            if armed:
                self._withdraw(kind)
        with self._striking:
            self._silent = True
            _close_all(self._fds)

    def _look_briefly(self, room: _Room, look: Callable[[], bool], deadline: float | None) -> bool:
        """Look for a moment, for less time the less it helped: a look costs 1 us, a wake-up over 100.

        A wait that was short all the same brings the full moment back: two parties that answer each other
        would else sleep for ever because they slept once.
        """
        least, most = SHORT_LOOK
        now = time.monotonic()
        end = now + room.spin
        if deadline is not None and deadline < end:
            end = deadline
        while now < end:
            os.sched_yield()  # whoever has something to put may need this core
            if look():
                room.spin = most
                return True
            before, now = now, time.monotonic()
            if now - before > CROWDED:
                break
        room.spin = max(room.spin / 2, least)
        return False

    def _listen(self, kind: Kind, room: _Room) -> watch.Listener | None:
        with self._listening:
            if not room.asked and not self._closed:
                room.asked = True
                room.listener = watch.listen(
                    self._path(kind, self._bell), partial(_rung, weakref.ref(self), kind)
                )
            return room.listener

    def _arm(self, kind: Kind, room: _Room) -> None:
        words = self._flags(kind)
        with room.lock:
            room.armed = True
        words[self._bell] = time.monotonic_ns()
        # The flag must reach memory before the look that follows reads it: entering the scheduler is a full
        # barrier, which a plain store followed by a plain load is not.
        os.sched_yield()

    def _rung(self, kind: Kind) -> None:
        """Called in the observer's thread when our bell was rung."""
        with self._telling:
            if self._rooms[kind].wake() and not self._closed:
                self._pass_on(kind)

    def _pass_on(self, kind: Kind) -> None:
        """Ring for somebody else, other bells first: those at ours heard what we heard."""
        with suppress(SpoolError, OSError, ValueError):  # ValueError: the index was unmapped meanwhile
            words = self._flags(kind)
            if any(words):
                self._ring(kind, words, 1, self._bell + 1)

    def _withdraw(self, kind: Kind) -> None:
        """Leave no flag that nobody answers: clear ours, and let others at this bell set it again."""
        with suppress(SpoolError, OSError, ValueError):
            self._flags(kind)[self._bell] = 0
            self._strike(kind, self._bell)
        self._pass_on(kind)  # a ring on its way to us finds nobody

    def _ring(self, kind: Kind, words: Flags, n: int, start: int) -> None:
        fresh = time.monotonic_ns() - FRESH
        for step in range(BELLS):
            if n <= 0 or self._silent:
                return
            k = (start + step) % BELLS
            since = words[k]
            if since:
                words[k] = 0  # before the write: a flag set after this is for the next ring
                self._strike(kind, k)
                n -= since > fresh

    def _strike(self, kind: Kind, k: int) -> None:
        """Write to one bell. A failure is kept quiet: the item is there, and sleepers look once a second."""
        with self._striking, suppress(OSError):  # locked, so that no descriptor is closed under the write
            if self._silent:
                return
            fd = self._fds.get((kind, k))
            if fd is None:
                fd = self._fds[kind, k] = watch.open_ring(self._path(kind, k))
            os.pwrite(fd, b"\0", 0)

    def _path(self, kind: Kind, k: int) -> str:
        return os.path.join(self._dir, f"{kind}-{k}")
