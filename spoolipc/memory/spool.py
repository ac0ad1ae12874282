"""A spool in memory: its state, the steps that change it, and what is told of it from outside."""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
import time
import warnings
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Final, TypeVar

from .. import errors
from .. import message as values
from ..format import item as items
from ..message import Deadline, Delivery, Limits, Message

_log = logging.getLogger("spoolipc")
T = TypeVar("T")
_LONGEST_SLEEP: Final = 3600.0
_LOOK_EVERY: Final = 1.0


@dataclass(slots=True, eq=False)
class Item:
    """An item. image: the bytes of its file. owner: at whom it was in flight last. due: monotonic seconds when its
    lease ends, or when it is to be delivered again. given: tells when nobody can settle it any more."""

    image: bytearray | memoryview
    put_time: int
    seq: int = 0
    attempt: int = 0
    owner: Session | None = None
    due: float = 0.0
    history: list[values.Failure] = field(default_factory=list)
    given: weakref.ref[Delivery] | None = None

    def message(self, writable: bool = False) -> Message:
        """What is in it, the arrays as read-only views, or as copies."""
        blocks, tail = items.parse(self.image, len(self.image))
        known = self.seq, self.attempt, len(self.image)
        return items.message(self.image, blocks, tail, known, copy=writable, writeable=writable)

    def letter(self) -> values.DeadLetter:
        """What is told of it as a dead letter."""
        arrays, names, meta, put_time, *_ = self.message()
        each = zip(names or (None,) * len(arrays), arrays, strict=True)
        stored = tuple(values.StoredArray(name, str(a.dtype), a.shape, a.nbytes) for name, a in each)
        size, history, when = len(self.image), tuple(self.history), put_time / 1e9
        return values.DeadLetter(
            self.seq, "", size, history[-1].why, self.attempt, history, stored, meta, when, ""
        )


class Spool:
    """A spool's state, which is changed in its steps only, and the spool as it is looked after from outside.

    fresh: what was never delivered, in order. requeued: what was, by when it is due; it comes first. dead: the dead
    letters. told: what event loops want called at each change. bytes: of all but the dead letters. news: writers that
    came and items that were put. now: the time of this step, in monotonic seconds.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.process = os.getpid()
        self.changed = threading.Condition()
        self.told: list[Callable[[], None]] = []
        self.busy = 0  # the thread that is in a step
        self.asked, self.limits = Limits(), values.DEFAULTS
        self.state: values.State = "open"
        self.sessions = weakref.WeakSet[Session]()  # one dropped unclosed has left
        self.fresh, self.requeued = deque[Item](), list[Item]()
        self.in_flight, self.dead = dict[int, Item](), dict[int, Item]()
        self.bytes = self.puts = self.gets = self.news = 0
        self.now = 0.0

    @contextmanager
    def step(self, session: Session | None = None) -> Iterator[Spool]:
        """The spool, for a step that nobody sees half done. Raises SpoolClosed, UnsupportedOperation after a fork,
        ReentrantCall amid another step of this thread."""
        if os.getpid() != self.process:  # the lock may have been forked while it was held
            raise errors.UnsupportedOperation(
                f"{self.path}: is in the memory of process {self.process}, not of this one;"
                " between processes use a spool in a directory"
            )
        if self.busy == threading.get_ident():
            raise errors.ReentrantCall(f"{self.path}: was called by a signal handler amid another call")
        with self.changed:
            self.busy = threading.get_ident()
            try:
                self.look(session)
                yield self
            finally:
                self.busy = 0

    def look(self, session: Session | None) -> None:
        """See which leases have ended, what was dropped, whether the session is open. Raises SpoolClosed."""
        self.now = time.monotonic()
        for item in [item for item in self.in_flight.values() if item.due <= self.now]:
            self.fail(item, "its lease ended")
        if session is None:
            return
        if session not in self.sessions:
            raise errors.SpoolClosed(f"{self.path}: this {session.role} was closed; open a new one")
        while session.dropped:
            item, attempt = session.dropped.popleft()
            if self.in_flight.get(item.seq) is item and item.attempt == attempt:
                self.fail(item, "it was dropped unsettled")
                what = f"item {item.seq} of {self.path} was dropped unsettled; it is redelivered"
                warnings.warn(f"{what}. Use: with reader.receive()", ResourceWarning, stacklevel=1)

    def notify(self) -> None:
        """Tell threads and event loops of a change."""
        self.changed.notify_all()
        for news in self.told:
            news()

    def agree(self, asked: Limits) -> None:
        """Let limits be decided by who asks first. Raises LimitMismatch."""
        for name, (there, value) in values.differing(self.asked, asked).items():
            remedy = f"change it (spoolipc.set_limits({self.path!r}, {name}={value}))"
            what = f"has {name}={there}, not {value}; leave {name} out to take what is there, or {remedy}"
            raise errors.LimitMismatch(f"{self.path}: {what}")
        self.change(asked)

    def change(self, asked: Limits) -> None:
        """Let the limits asked for be in force, whatever they were."""
        self.asked = values.completed(asked, self.asked)
        self.limits = values.completed(self.asked, values.DEFAULTS)
        self.notify()

    def empty(self) -> int:
        """Remove what waits; how many items."""
        gone = [*self.requeued, *self.fresh]
        self.bytes -= sum(len(item.image) for item in gone)
        self.requeued, self.fresh = [], deque()
        self.notify()
        return len(gone)

    def has_writer(self) -> bool:
        return any(session.role == "writer" for session in self.sessions)

    def check_end(self, last: int) -> None:
        """Raise Full where an item of this number or a lower one waits or is in flight."""
        items = (*self.requeued, *self.in_flight.values(), *islice(self.fresh, 1))
        if any(item.seq <= last for item in items):
            raise errors.Full

    def waiting(self) -> int:
        return len(self.requeued) + len(self.fresh)

    def full(self) -> bool:
        return self.waiting() >= (self.limits.maxsize or math.inf)

    def check_open(self) -> None:
        """Raise ShutDown where no more is put."""
        if self.state != "open":
            raise errors.shut_down(self.path)

    def check_room(self, size: int) -> None:
        """Raise ShutDown, TooLarge, or Full when there is no room now."""
        self.check_open()
        most, path = self.limits.max_bytes or math.inf, self.path
        if size > most:
            raise errors.TooLarge(f"{path}: an item of {size} bytes can never fit: max_bytes is {most}")
        if self.full():
            raise errors.Full(f"{path}: full: {self.waiting()} items wait, maxsize={self.limits.maxsize}")
        if self.bytes + size > most:
            raise errors.Full(f"{path}: full: {self.bytes} bytes taken, max_bytes={most}, {size} needed")

    def append(self, item: Item) -> int:
        """Make it the last item."""
        item.seq = self.puts = self.puts + 1
        self.bytes += len(item.image)
        self.news += 1
        self.fresh.append(item)
        self.notify()
        return item.seq

    def deliverable(self, asking: Session, limit: int) -> list[Item]:
        """Up to `limit` items to be delivered next. Raises Empty, and ShutDown when none can come any more."""
        due = (item for item in chain(self.requeued, self.fresh) if item.due <= self.now)
        if found := list(islice(due, limit)):
            return found
        others = self.requeued or any(item.owner is not asking for item in self.in_flight.values())
        if self.state == "discarded" or (self.state == "draining" and not others):
            raise errors.nothing_left(self.path)
        if self.news > asking.began and not others and not self.has_writer():
            raise errors.nothing_left(self.path, writers_left=True)
        raise errors.Empty(f"{self.path}: no item waits")

    def claim(self, asking: Session, limit: int, lease: float) -> list[Item]:
        """Deliver them: they are in flight now. Raises as `deliverable` does."""
        found = self.deliverable(asking, limit)
        for item in found:
            (self.requeued if item.attempt else self.fresh).remove(item)
            item.attempt, item.owner, item.due = item.attempt + 1, asking, self.now + lease
            self.in_flight[item.seq] = item
        self.notify()
        return found

    def forget(self, item: Item) -> None:
        """Let an item in flight be gone, and its bytes be free."""
        del self.in_flight[item.seq]
        self.bytes -= len(item.image)
        self.notify()

    def restore(self, item: Item) -> None:
        """Let an item that was taken wait again in its place, as if it had never been."""
        if self.state == "discarded":
            return
        self.gets -= 1
        self.bytes += len(item.image)
        item.attempt, item.due = item.attempt - 1, 0.0
        if item.attempt:
            self.requeued.insert(0, item)
        else:
            self.fresh.appendleft(item)
        self.notify()

    def fail(self, item: Item, why: str, delay: float = 0.0, last: bool = False) -> None:
        """Requeue an item in flight, or make it a dead letter: when its attempts are used up, or this is its last."""
        most = self.limits.max_attempts
        if most and item.attempt >= most and not last:
            why, last = f"{why}; that was attempt {item.attempt} of {most}", True
        item.history.append(values.Failure(item.attempt, time.time(), f"process {os.getpid()}", why))
        if last:
            self.forget(item)
            self.dead[item.seq] = item
            _log.error("%s: item %d is now a dead letter: %s", self.path, item.seq, why)
        elif self.state == "discarded":
            self.forget(item)
        else:
            item.due = self.now + delay
            insort(self.requeued, self.in_flight.pop(item.seq), key=lambda item: item.due)
            self.notify()

    # As it is looked after from outside

    def stat(self) -> values.SpoolStat:
        with self.step():
            waiting = [item for item in (*self.requeued, *self.fresh) if item.due <= self.now]
            return values.SpoolStat(
                path=self.path,
                state=self.state,
                depth=len(waiting),
                delayed=self.waiting() - len(waiting),
                in_flight=len(self.in_flight),
                bytes=self.bytes,
                oldest_age=max(0.0, (time.time_ns() - waiting[0].put_time) / 1e9) if waiting else None,
                failed=len(self.dead),
                puts=self.puts,
                gets=self.gets,
                live_sessions=len(self.sessions),
                limits=self.limits,
                **_NO_FILES,
            )

    def failed_list(self, seqs: Iterable[int] | None = None) -> list[values.DeadLetter]:
        with self.step():
            return [item.letter() for item in self.letters(seqs)]

    def failed_retry(self, seqs: Iterable[int] | None) -> values.Retried:
        done: dict[int, int] = {}
        with self.step():
            for item in self.letters(seqs):
                self.check_open()
                del self.dead[item.seq]
                done[item.seq] = self.append(Item(item.image, item.put_time))
        return values.Retried(done, {})

    def failed_drop(self, seqs: Iterable[int] | None) -> list[int]:
        with self.step():
            return [self.dead.pop(item.seq).seq for item in self.letters(seqs)]

    def purge(self) -> int:
        with self.step():
            return self.empty()

    def remove(self) -> None:
        with self.step():
            if self.sessions:
                raise errors.SpoolInUse(f"{self.path}: is in use: {len(self.sessions)} sessions have it open")
            if self.is_there():
                clear(self.path.removeprefix("memory://"))

    def is_there(self) -> bool:
        """Whether who opens its name comes to it, and not to none or another one."""
        return spools.get(self.path.removeprefix("memory://")) is self

    def set_limits(self, limits: Limits) -> Limits:
        with self.step():
            self.change(limits)
            return self.limits

    def letters(self, seqs: Iterable[int] | None) -> list[Item]:
        """Dead letters in the order of their numbers; None for all. Raises NoSuchItem."""
        wanted = sorted(self.dead) if seqs is None else values.numbers_of(seqs)
        for seq in wanted:
            if seq not in self.dead:
                raise errors.NoSuchItem(f"{self.path}: has no dead letter {seq}; see failed_list()")
        return [self.dead[seq] for seq in wanted]


class Session:
    """One side of an open spool."""

    role: str
    is_remote = False
    began = math.inf

    def __init__(self, spool: Spool, limits: Limits, reopen: bool = False, fresh: bool = False) -> None:
        self._spool, self.path = spool, spool.path
        self.dropped = deque[tuple[Item, int]]()
        with spool.step():
            if not spool.is_there():
                raise errors.SpoolGone(errno.ENOENT, "this spool was removed", spool.path)
            if fresh and (count := len(spool.in_flight)) + (has_writer := spool.has_writer()):
                why = "it has another writer" if has_writer else f"items in flight at readers: {count}"
                raise errors.SpoolInUse(f"{spool.path}: is in use: {why}")
            if fresh:
                spool.empty()
                spool.change(limits)
            spool.agree(limits)
            spool.state = "open" if reopen else spool.state
            spool.sessions.add(self)
            spool.news += self.role == "writer"

    @property
    def maxsize(self) -> int:
        return self._spool.limits.maxsize or 0

    def qsize(self) -> int:
        with self._spool.step(self) as spool:
            return spool.waiting()

    def close(self) -> None:
        with self._spool.step() as spool:
            spool.sessions.discard(self)
            for item in [item for item in spool.in_flight.values() if item.owner is self]:
                spool.fail(item, "its reader left")
            spool.notify()

    def _wait(self, until: Deadline) -> bool:
        """Wait, within a step, until another try may help; False when the deadline is past."""
        spool, left = self._spool, math.inf if until is None else until - time.monotonic()
        if left <= 0:
            return False
        spool.busy = 0  # meanwhile others may be, a signal handler of this thread too
        spool.changed.wait(min(left, self.pause()))
        spool.busy = threading.get_ident()
        spool.look(self)
        return True

    def pause(self) -> float:
        """Seconds until the next lease or delay ends, an hour at most; or until to see whether a writer was dropped
        unclosed. A step."""
        spool = self._spool
        away = (*spool.in_flight.values(), *spool.requeued[:1])
        ends = [item.due for item in away if item.due > spool.now]
        longest = _LONGEST_SLEEP if self.began == math.inf else _LOOK_EVERY
        return max(0.0, min([longest, *(end - time.monotonic() for end in ends)]))

    def briefly(self, step: Callable[[], T]) -> T:
        return step()


def clear(name: str) -> None:
    """Forget the spool `memory://NAME`: who opens the name next makes a new one. Sessions still open keep the old."""
    spools.pop(name, None)


spools: dict[str, Spool] = {}
_NO_FILES: Final[dict[str, Any]] = {
    **dict.fromkeys(("free_files", "free_bytes", "pinned_files", "pinned_bytes", "wanted_bytes"), 0),
    **{"file_system": "memory", "in_memory": True, "waiting_mode": "condition"},
    **{"index_damage": "", "stuck_on": "", "pinned_by": {}},
}
"""What `stat` says of every spool in memory."""
