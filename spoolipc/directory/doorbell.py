"""The doorbell: how a session waits for an item, or for space, without polling.

The table names up to 32 waiting sessions: token, what for, since when. A waiting session watches its own file in
`alive/` and sleeps until somebody writes to it. Whoever makes an item available rings for as many sessions as there are
items, those first that have waited longest and live. Nobody waiting means no system call.

    waiter: since = now; barrier; look; sleep until the file is written to
    ringer: item visible; barrier; since seen; since = 0; write

Either the waiter's look sees the item or the ringer sees that it waits; and `since` cleared is always followed by a
write that the waiter hears. One that was rung and no longer waits rings for the next.

A ring is a hint: a waiter looks once a second in any case, and says again that it waits. So an entry older than that
is nobody's who sleeps: a session that was stopped, or went on to other work. It is rung beside the others and takes no
other's wake-up, and neither does that of a crashed session, whose file says that it is one. A session that finds no
place among the 32 looks at intervals.

No thread is started. All sessions of a process share one descriptor of inotify: of the threads that wait, one reads it
for all, and so does an event loop that finds it readable. Where inotify cannot be had (its limits are used up, the file
system reports nothing, or SPOOLIPC_WATCH=polling is set in the environment) who waits looks at intervals, and the log
says so once.
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
from itertools import compress
from typing import Final, Literal, Protocol

from ..errors import SpoolError
from . import fs
from . import table as W
from .layout import Directories
from .liveness import crashed_among, ring, token_name
from .lock import no_fork
from .table import Token, Words

_log = logging.getLogger("spoolipc")
Kind = Literal["items", "space", "end"]
LOOK_EVERY: Final = {"items": 1.0, "space": 0.05, "end": 1.0}
"""Seconds a sleeper waits before it looks again unasked; for space less, as not every single place is rung for."""
FRESH: Final = 1_500_000_000  # ns: a sleeper's `since` is never older, a look each second and some delay
SHORT_LOOK: Final = (5e-6, 200e-6)  # seconds of looking before sleeping: least and most
CROWDED: Final = 50e-6  # seconds: a look that takes longer gave the core to somebody with work to do
SOON: Final = 1e-3  # seconds: a sleep that ends within it would better have been a longer look
POLL: Final = (0.5e-3, 20e-3)  # seconds between looks where nothing can be heard: first and longest
_TRIAL: Final = 0.1  # seconds within which a new watch must hear its own ring
_PAUSE: Final = 0.5e-3  # seconds between two looks whether it did
_EVENT: Final = struct.Struct("iIII")
_BUFFER: Final = 4096
_CODES: Final[dict[Kind, int]] = {"items": W.FOR_ITEMS, "space": W.FOR_SPACE, "end": W.FOR_END}


class Host(Protocol):
    """What a doorbell needs of its session."""

    path: str
    token: Token
    directories: Directories

    def peek_words(self) -> Words | None:
        """The table's words, to be looked at without the lock; None where they cannot be."""

    def take_place(self, kind: int) -> int:
        """A place among those who wait, -1 where there is none: a locked step."""


def take_place(words: Words, token: Token, kind: int, alive: int) -> int:
    """The place of a session among those who wait, taken if it has none; -1 where there is none. A step."""
    if token in (tokens := _tokens(words)):
        return tokens.index(token)
    if 0 not in tokens:
        leave_places(words, crashed_among(alive, set(tokens)))
    if 0 not in (tokens := _tokens(words)):
        return -1
    place = tokens.index(0)
    words[W.SINCES + place] = words[W.LOOKS + place] = words[W.WANTED + place] = 0
    words[W.KINDS + place], words[W.TOKENS + place] = kind, token
    return place


def leave_places(words: Words, leaving: set[int]) -> None:
    """Sessions of these tokens wait, look and want no more. A step."""
    for place, token in enumerate(_tokens(words)):
        if token in leaving:
            words[W.SINCES + place] = words[W.TOKENS + place] = 0
            words[W.LOOKS + place] = words[W.WANTED + place] = 0


def _tokens(words: Words) -> list[int]:
    """Who has each of the places, 0 where nobody has."""
    return words[W.TOKENS : W.TOKENS + W.MOST_WAITERS].tolist()


class Doorbell:
    """One session's place among those who wait, and its way to wake others. Threads may share it."""

    def __init__(self, host: Host) -> None:
        self._host = weakref.ref(host)
        self.reset()

    def reset(self) -> None:
        """Start afresh: the table is another, or this is a forked child."""
        self._place = -1
        self.tickets = 0  # rings heard
        self._told: list[Callable[[], None]] = []  # what event loops want called at each
        self._waiting = 0  # threads
        self._lock = threading.RLock()  # around the two above; a signal handler may wait amid a wait
        self._spin = SHORT_LOOK[1]
        self.closed = False
        self.number = -1  # of its watch

    def forget_place(self) -> None:
        """The table was built again: take a place in the new one when the next wait begins."""
        self._place = -1

    def renew_watch(self) -> None:
        """The file is another one: listen to that."""
        if self.number >= 0:
            ears.renew(self)

    @property
    def file(self) -> str:
        """The path of the file that is written to."""
        host = self._host()
        return os.path.join(host.path, "alive", token_name(host.token)) if host is not None else ""

    def _look(self) -> tuple[Host | None, Words | None]:
        """The session, and the table's words; None for what is not there any more."""
        host = self._host()
        return host, host.peek_words() if host is not None else None

    # Ringing

    def ring(self, kind: Kind, count: int) -> None:
        """Wake `count` waiting sessions, for so many items (or places) that others can see already.

        Call it after the index lock was let go: that is the memory barrier between making the item visible and reading
        who waits.
        """
        host, words = self._look()
        if host is None or words is None:
            return
        code = _CODES[kind]
        sinces = words[W.SINCES : W.SINCES + W.MOST_WAITERS].tolist()
        places = compress(range(W.MOST_WAITERS), sinces)
        asleep = sorted((sinces[place], place) for place in places if words[W.KINDS + place] == code)
        fresh = fs.monotonic_ns() - FRESH
        for since, place in asleep:
            if count <= 0:
                return
            token = words[W.TOKENS + place]
            words[W.SINCES + place] = 0  # before the write: a `since` set after this is for the next ring
            if token and ring(host.directories.alive, token) and since > fresh:
                count -= 1

    def ring_all(self) -> None:
        """Wake everybody: for what concerns all, such as a shutdown."""
        for kind in _CODES:
            self.ring(kind, W.MOST_WAITERS)

    # Waiting

    def wait(self, kind: Kind, look: Callable[[], bool], seconds: float) -> bool:
        """Wait until `look()` is true, at most so many seconds; returns whether it is.

        kind: what is waited for. Of two threads of a session that wait for both, one may have to look unasked.
        look: called often, at least once; its exceptions pass through. After a true answer the caller rings again if
        more than it takes is left.
        """
        if look():
            return True
        if seconds <= 0:
            return False
        until = time.monotonic() + seconds
        if self._look_briefly(look, until):
            return True
        began = time.monotonic()
        with self._lock:
            self._waiting += 1
        found = False
        try:
            found = self._sleep_until(kind, look, until)
            return found
        finally:
            if time.monotonic() - began < SOON:
                self._spin = SHORT_LOOK[1]
            self._leave(kind, None if found else look)

    def enter(self, news: Callable[[], None]) -> None:
        """An event loop waits from now on: `news` is called, in any thread, by each ring and by the close."""
        with self._lock:
            self._waiting += 1
            self._told.append(news)

    def leave(self, kind: Kind, news: Callable[[], None], look: Callable[[], bool]) -> None:
        """The event loop that wants `news` waits no longer; of `look` see `_leave`."""
        with self._lock:
            if news not in self._told:  # it began to wait before a fork, or the session was closed
                return
            self._told.remove(news)
        self._leave(kind, look)

    def _sleep_until(self, kind: Kind, look: Callable[[], bool], until: float) -> bool:
        ears.listen(self)
        pause = POLL[0]
        while True:
            ticket = self.tickets
            armed = self.arm(kind)
            if look():
                return True
            nap = LOOK_EVERY[kind]
            if self.number < 0 or not armed:
                nap, pause = min(nap, pause), min(2 * pause, POLL[1])
            now = time.monotonic()
            if now >= until:
                return False
            if self.number < 0:
                fs.sleep(min(nap, until - now))
            else:
                ears.sleep(self, ticket, min(now + nap, until))
            # When rung, look before saying again that we wait, which is most often for nothing.
            if self.tickets != ticket and look():
                return True

    def _look_briefly(self, look: Callable[[], bool], until: float) -> bool:
        """Look for a moment, for less time the less it helped: a look costs 1 us, a wake-up over 50.

        A wait that was short all the same brings the full moment back: two sessions that answer each other would else
        sleep for ever because they slept once.
        """
        least, most = SHORT_LOOK
        now = time.monotonic()
        end = min(now + self._spin, until)
        while now < end:
            fs.yield_core()  # whoever has something to put may need this core
            if look():
                self._spin = most
                return True
            before, now = now, time.monotonic()
            if now - before > CROWDED:
                break
        self._spin = max(self._spin / 2, least)
        return False

    def arm(self, kind: Kind) -> bool:
        """Say that this session waits for `kind`; false where there is no place to say it. Look at the spool after."""
        host, words = self._look()
        if host is None or words is None:
            return False
        if self._place < 0 or words[W.TOKENS + self._place] != host.token:
            self._place = host.take_place(_CODES[kind])
            words = host.peek_words()
            if self._place < 0 or words is None:
                return False
        words[W.KINDS + self._place] = _CODES[kind]
        words[W.SINCES + self._place] = fs.monotonic_ns()
        # This store must reach memory before the look that follows reads: entering the scheduler is a full barrier,
        # which a plain store followed by a plain load is not.
        fs.yield_core()
        return True

    def _leave(self, kind: Kind, look: Callable[[], bool] | None) -> None:
        """One thread waits no longer; the last one takes back that the session does.

        look: of one that leaves without what it waited for. It may have been rung since it looked last, so if there is
        something now, another is woken for it.
        """
        with self._lock:
            self._waiting -= 1
            last = not self._waiting
        with suppress(SpoolError, OSError):
            host, words = self._look()
            if last and host and words and self._place >= 0 and words[W.TOKENS + self._place] == host.token:
                words[W.SINCES + self._place] = 0
            if look is not None:
                fs.yield_core()  # a barrier, as in `arm`
                if look():
                    self.ring(kind, 1)

    def heard(self) -> None:
        """Called by whoever read that our file was written to."""
        with self._lock:
            self.tickets += 1
            for news in self._told:
                news()

    def close(self) -> None:
        """Wait no more: whoever still does wakes and finds the session closed."""
        self.closed = True
        self.heard()
        if self.number >= 0:
            with suppress(OSError):
                self.ring_oneself()  # one of our threads may be the one that reads
            ears.remove(self)

    def ring_oneself(self) -> None:
        """Write to our own file. Raises OSError, and UnsafeSpool for what was planted in its place."""
        host = self._host()
        if host is not None:
            alive, name = host.directories.alive, token_name(host.token)
            with fs.Closing(fs.open_own(alive, name, os.O_WRONLY)) as fd:
                fs.pwrite(fd, b"\n", 0)


class Ears:
    """What this process hears. fd: of inotify, -1 where nobody listens; read by one of those who wait, for all."""

    def __init__(self) -> None:
        self._has_warned = False
        self._reset()

    def _reset(self) -> None:
        self.fd = -1
        self._is_deaf = False  # the last attempt to listen failed
        self._lock = threading.RLock()  # for a few stores; a signal handler may wait amid them
        self._doorbells: dict[int, weakref.ref[Doorbell]] = {}
        self._sleepers: dict[threading.Lock, Doorbell] = {}
        self._is_read = False

    def listen(self, doorbell: Doorbell) -> None:
        """Hear a doorbell; where that cannot be it has no number, and the log says so once."""
        if _is_forced():
            return
        try:
            with no_fork, self._lock:
                is_new = doorbell.number < 0
                if is_new:
                    self._add(doorbell)
            if is_new:
                self._try_out(doorbell)
            self._is_deaf = False
        except FileNotFoundError:
            pass  # the spool is gone, which says nothing about inotify
        except OSError as error:
            if not self._has_warned:
                _log.warning("inotify is unavailable (%s): waiting falls back to polling", error)
            self._is_deaf = self._has_warned = True

    def _add(self, doorbell: Doorbell) -> None:
        """The caller holds the lock."""
        if self.fd < 0:
            self.fd = fs.watch_open()
        number = fs.watch_add(self.fd, doorbell.file)
        # One dropped without a close is forgotten at any moment, also where this thread has the lock.
        self._doorbells[number] = weakref.ref(doorbell, functools.partial(self._doorbells.pop, number))
        doorbell.number = number

    def _try_out(self, doorbell: Doorbell) -> None:
        """Ring ourselves: a local file system has the event ready when the write returns. Raises OSError."""
        heard = doorbell.tickets
        doorbell.ring_oneself()
        until = time.monotonic() + _TRIAL
        while not fs.poll(self.fd, 0) and doorbell.tickets == heard:  # another thread may have read it
            if time.monotonic() > until:
                self.remove(doorbell)
                raise OSError(f"no event arrived from {doorbell.file}")
            fs.sleep(_PAUSE)

    def renew(self, doorbell: Doorbell) -> None:
        """Listen to the file that took the place of its own; who sleeps sleeps on."""
        with self._lock:
            before = doorbell.number
            try:
                self._add(doorbell)
            except OSError:
                self.remove(doorbell)
            self._doorbells.pop(before, None)

    def remove(self, doorbell: Doorbell) -> None:
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

    def sleep(self, doorbell: Doorbell, ticket: int, until: float) -> None:
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
                    self._sleepers[sleeper] = doorbell
            try:
                if reads:
                    self._read(seconds)
                else:
                    sleeper.acquire(timeout=seconds)
            finally:
                with self._lock:
                    self._sleepers.pop(sleeper, None)
                    if reads:
                        self._is_read = False
                        self._close_if_unused()
                        for other in list(self._sleepers)[:1]:  # it reads now
                            del self._sleepers[other]
                            other.release()

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
                # -1: the kernel's queue overflowed.
                if doorbell is not None and (number in numbers or -1 in numbers):
                    doorbell.heard()
            self._wake(lambda other: other.number in numbers or -1 in numbers)

    def _wake(self, concerned: Callable[[Doorbell], bool]) -> None:
        for sleeper, doorbell in list(self._sleepers.items()):
            if concerned(doorbell):
                del self._sleepers[sleeper]
                sleeper.release()

    def mode(self) -> Literal["inotify", "polling"]:
        """How this process waits, or would: found out without a ring, which would wake somebody."""
        if _is_forced() or self._is_deaf:
            return "polling"
        if self.fd < 0:
            try:
                fs.close(fs.watch_open())
            except OSError:
                return "polling"
        return "inotify"

    def forked(self) -> None:
        """In a forked child, nobody listens yet."""
        if self.fd >= 0:
            with suppress(OSError):
                fs.close(self.fd)
        self._reset()


def _is_forced() -> bool:
    return os.environ.get("SPOOLIPC_WATCH") == "polling"


ears: Final = Ears()
os.register_at_fork(after_in_child=ears.forked)
