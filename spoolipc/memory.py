"""The engine of one process: spools in memory, for its threads, and for the tests of programs that use spoolipc.

    memory://NAME

The first who opens a name makes the spool; it lives until the process ends or `clear(NAME)`, whoever closes. Each
item is kept as the bytes of a whole item file, so that what is refused, and what comes back, is what it would be in a
directory; nothing can damage one, so checksums are not stored. The limits hold, `max_bytes` for those bytes;
`recycle_bytes` and `mode` are agreed on and mean nothing.

Every operation is one step under the spool's one condition, and whoever waits, waits on it. No clock runs aside: leases
and delays that ended are seen by the next step, and by those who wait. A forked child has a copy of every spool, which
nobody else would see, so there every operation is refused.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import warnings
import weakref
from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from typing import Any, Final

from . import errors
from . import message as values
from .engine import ConsumerOptions, ProducerOptions, retry
from .format import footer as footers
from .format import item as items
from .message import Deadline, Delivery, Limits, Message

_log = logging.getLogger("spoolipc")
_LONGEST_SLEEP: Final = 3600.0
_MEMORY: Final = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True, eq=False)
class _Item:
    """An item. image: the bytes of its file. owner: at whom it was in flight last. due: monotonic seconds when its
    lease ends, or when it is to be delivered again. given: tells when nobody can settle it any more."""

    image: bytes | bytearray
    put_time: int
    seq: int = 0
    attempt: int = 0
    owner: Consumer | None = None
    due: float = 0.0
    history: list[values.Failure] = field(default_factory=list)
    given: weakref.ref[Delivery] | None = None

    def message(self, writable: bool = False) -> Message:
        """What is in it, the arrays as read-only views, or as copies."""
        blocks, tail = items.parse(self.image, len(self.image))
        return items.message(self.image, blocks, tail, copy=writable, writeable=writable)

    def letter(self) -> values.DeadLetter:
        """What is told of it as a dead letter."""
        arrays, names, meta, put_time, _ = self.message()
        each = zip(names or (None,) * len(arrays), arrays, strict=True)
        stored = tuple(values.StoredArray(name, str(a.dtype), a.shape, a.nbytes) for name, a in each)
        size, history, when = len(self.image), tuple(self.history), put_time / 1e9
        return values.DeadLetter(
            self.seq, "", size, history[-1].why, self.attempt, history, stored, meta, when, ""
        )


class _Spool:
    """A spool's state, which is changed in its steps only, and the spool as it is looked after from outside.

    fresh: what was never delivered, in order. requeued: what was, by when it is due; it comes first. dead: the dead
    letters. bytes: of all but those. now: the time of this step, in monotonic seconds.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.process = os.getpid()
        self.changed = threading.Condition()
        self.busy = 0  # the thread that is in a step
        self.asked: dict[str, int] = {}
        self.limits = values.DEFAULTS
        self.state: values.State = "open"
        self.sessions = set[_Session]()
        self.fresh, self.requeued = deque[_Item](), list[_Item]()
        self.in_flight, self.dead = dict[int, _Item](), dict[int, _Item]()
        self.bytes = self.puts = self.gets = 0
        self.now = 0.0

    @contextmanager
    def step(self, session: _Session | None = None) -> Iterator[_Spool]:
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

    def look(self, session: _Session | None) -> None:
        """See which leases have ended, what was dropped, whether the session is open. Raises SpoolClosed."""
        self.now = time.monotonic()
        for item in [item for item in self.in_flight.values() if item.due <= self.now]:
            self.fail(item, "its lease ended")
        if session is None:
            return
        if session not in self.sessions:
            role = "writer" if isinstance(session, Producer) else "reader"
            raise errors.SpoolClosed(f"{self.path}: this {role} was closed; open a new one")
        while session.dropped:
            item, attempt = session.dropped.popleft()
            if self.in_flight.get(item.seq) is item and item.attempt == attempt:
                self.fail(item, "it was dropped unsettled")
                what = f"item {item.seq} of {self.path} was dropped unsettled; it is redelivered"
                warnings.warn(f"{what}. Use: with reader.receive()", ResourceWarning, stacklevel=1)

    def agree(self, asked: Limits) -> None:
        """Let limits be decided by who asks first. Raises LimitMismatch."""
        for name, value in asdict(asked).items():
            if value is not None and self.asked.get(name, value) != value:
                raise errors.LimitMismatch(
                    f"{self.path}: has {name}={self.asked[name]}, not {value}; leave {name} out to take what is there"
                )
        self.change(asked)

    def change(self, asked: Limits) -> None:
        """Let the limits asked for be in force, whatever they were."""
        self.asked |= {name: value for name, value in asdict(asked).items() if value is not None}
        self.limits = replace(values.DEFAULTS, **self.asked)
        self.changed.notify_all()

    def empty(self) -> int:
        """Remove what waits; how many items."""
        gone = [*self.requeued, *self.fresh]
        self.bytes -= sum(len(item.image) for item in gone)
        self.requeued, self.fresh = [], deque()
        self.changed.notify_all()
        return len(gone)

    def waiting(self) -> int:
        return len(self.requeued) + len(self.fresh)

    def full(self) -> bool:
        return self.waiting() >= (self.limits.maxsize or math.inf)

    def check_room(self, size: int) -> None:
        """Raise ShutDown, TooLarge, or Full when there is no room now."""
        most, path = self.limits.max_bytes or math.inf, self.path
        if self.state != "open":
            raise errors.ShutDown(f"{path}: was shut down; SpoolWriter(path, reopen=True) opens it again")
        if size > most:
            raise errors.TooLarge(f"{path}: an item of {size} bytes can never fit: max_bytes is {most}")
        if self.full():
            raise errors.Full(f"{path}: full: {self.waiting()} items wait, maxsize={self.limits.maxsize}")
        if self.bytes + size > most:
            raise errors.Full(f"{path}: full: {self.bytes} bytes taken, max_bytes={most}, {size} needed")

    def append(self, item: _Item) -> int:
        """Make it the last item."""
        item.seq = self.puts = self.puts + 1
        self.bytes += len(item.image)
        self.fresh.append(item)
        self.changed.notify_all()
        return item.seq

    def deliverable(self, asking: Consumer, limit: int) -> list[_Item]:
        """Up to `limit` items to be delivered next. Raises Empty, and ShutDown when none can come any more."""
        due = (item for item in chain(self.requeued, self.fresh) if item.due <= self.now)
        if found := list(islice(due, limit)):
            return found
        others = self.requeued or any(item.owner is not asking for item in self.in_flight.values())
        if self.state == "discarded" or (self.state == "draining" and not others):
            what = "was shut down and has no more items; a writer begins again with fresh=True"
            raise errors.ShutDown(f"{self.path}: {what}")
        raise errors.Empty(f"{self.path}: no item waits")

    def claim(self, asking: Consumer, limit: int, lease: float) -> list[_Item]:
        """Deliver them: they are in flight now. Raises as `deliverable` does."""
        found = self.deliverable(asking, limit)
        for item in found:
            (self.requeued if item.attempt else self.fresh).remove(item)
            item.attempt, item.owner, item.due = item.attempt + 1, asking, self.now + lease
            self.in_flight[item.seq] = item
        self.changed.notify_all()
        return found

    def forget(self, item: _Item) -> None:
        """Let an item in flight be gone, and its bytes be free."""
        del self.in_flight[item.seq]
        self.bytes -= len(item.image)
        self.changed.notify_all()

    def restore(self, item: _Item) -> None:
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
        self.changed.notify_all()

    def fail(self, item: _Item, why: str, delay: float = 0.0, last: bool = False) -> None:
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
            self.changed.notify_all()

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
                if self.state != "open":
                    raise errors.ShutDown(f"{self.path}: was shut down")
                del self.dead[item.seq]
                done[item.seq] = self.append(_Item(item.image, item.put_time))
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
            clear(self.path.removeprefix("memory://"))

    def set_limits(self, limits: Limits) -> Limits:
        with self.step():
            self.change(limits)
            return self.limits

    def letters(self, seqs: Iterable[int] | None) -> list[_Item]:
        """Dead letters in the order of their numbers; None for all. Raises NoSuchItem."""
        wanted = sorted(self.dead) if seqs is None else values.numbers_of(seqs)
        for seq in wanted:
            if seq not in self.dead:
                raise errors.NoSuchItem(f"{self.path}: has no dead letter {seq}; see failed_list()")
        return [self.dead[seq] for seq in wanted]


class _Session:
    """One side of an open spool."""

    def __init__(self, spool: _Spool, limits: Limits, reopen: bool = False, fresh: bool = False) -> None:
        self._spool, self.path = spool, spool.path
        self.dropped = deque[tuple[_Item, int]]()  # of deliveries that are gone: the item, and its attempt
        with spool.step():
            if fresh and (spool.in_flight or any(isinstance(one, Producer) for one in spool.sessions)):
                raise errors.SpoolInUse(f"{spool.path}: is in use: it has another writer, or items in flight")
            if fresh:
                spool.empty()
                spool.change(limits)
            spool.agree(limits)
            spool.state = "open" if reopen else spool.state
            spool.sessions.add(self)

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
            spool.changed.notify_all()

    def _wait(self, until: Deadline) -> bool:
        """Wait, within a step, until another try may help; False when the deadline is past."""
        now, spool = time.monotonic(), self._spool
        ends = [now + _LONGEST_SLEEP, math.inf if until is None else until]
        if min(ends) <= now:
            return False
        away = (*spool.in_flight.values(), *spool.requeued[:1])
        ends += [item.due for item in away if item.due > spool.now]
        spool.busy = 0  # meanwhile others may be, a signal handler of this thread too
        spool.changed.wait(max(0.0, min(ends) - now))
        spool.busy = threading.get_ident()
        spool.look(self)
        return True


class Producer(_Session):
    """A writer's side."""

    def put(self, messages: Sequence[Message], until: Deadline) -> list[int]:
        """Put messages; all are made first, so that none is put where one cannot be stored."""
        made = [_made(message) for message in messages]
        seqs: list[int] = []
        with self._spool.step(self) as spool:
            try:
                for item in made:
                    self._await_room(len(item.image), until)
                    seqs.append(spool.append(item))
            except errors.SpoolError as error:
                error.seqs = tuple(seqs)
                raise
        return seqs

    def loan(self, spec: values.ArraySpec, meta: values.Json, until: Deadline) -> Loan:
        layout, message = items.layout_of_spec(spec), Message((), None, meta)
        size = _size(layout, message)
        with self._spool.step(self):
            self._await_room(size, until)
        return Loan(self, layout, message, bytearray(size))

    def full(self) -> bool:
        with self._spool.step(self) as spool:
            return spool.full()

    def shutdown(self, immediate: bool) -> None:
        with self._spool.step(self) as spool:
            if immediate:
                spool.state = "discarded"
                spool.empty()
            elif spool.state == "open":
                spool.state = "draining"
            spool.changed.notify_all()

    def _await_room(self, size: int, until: Deadline) -> None:
        retry(lambda: self._spool.check_room(size), self._wait, until)


class Loan:
    """An array over the bytes of an item that is not in the spool yet."""

    def __init__(self, producer: Producer, layout: items.Layout, message: Message, image: bytearray) -> None:
        self._producer, self._layout, self._message = producer, layout, message
        self._image: bytearray | None = image
        (block,), (header,) = layout.blocks, layout.headers
        image[block.offset - len(header) : block.offset] = header
        self.array = items.view(image, block, writeable=True)

    def commit(self, until: Deadline) -> int:
        image = self._image
        if image is None:
            raise errors.AlreadySettled("this loan was committed or discarded before")
        with self._producer._spool.step(self._producer) as spool:
            self._producer._await_room(len(image), until)
            self.array.flags.writeable = False
            self._image, now = None, time.time_ns()
            image[self._layout.end :] = _footer(self._layout, self._message, now)
            return spool.append(_Item(image, now))

    def discard(self) -> None:
        self._image = None


class _Taken(list[Message]):
    """What a take has taken, and the items."""

    items: list[_Item]


class Consumer(_Session):
    """A reader's side."""

    def take(self, limit: int, until: Deadline, writable: bool = False) -> _Taken:
        with self._spool.step(self) as spool:
            found = retry(lambda: spool.claim(self, limit, math.inf), self._wait, until)
            spool.gets += len(found)
            for item in found:
                spool.forget(item)
            taken = _Taken(item.message(writable) for item in found)
            taken.items = found
            return taken

    def put_back(self, taken: list[Message], start: int = 0) -> None:
        assert isinstance(taken, _Taken)
        with suppress(errors.SpoolError), self._spool.step(self) as spool:
            while len(taken.items) > start:
                spool.restore(taken.items.pop())

    def claim(self, limit: int, lease: float | None, until: Deadline) -> list[Delivery]:
        seconds = math.inf if lease is None else lease
        with self._spool.step(self) as spool:
            found = retry(lambda: spool.claim(self, limit, seconds), self._wait, until)
            return [self._delivery(item) for item in found]

    def _delivery(self, item: _Item) -> Delivery:
        delivery = Delivery(item.seq, item.attempt, item.put_time, len(item.image), None)
        what, dropped = (item, item.attempt), self.dropped
        item.given = weakref.ref(
            delivery, lambda _: dropped.append(what)
        )  # at any moment: it only takes note
        return delivery

    def peek(self, until: Deadline) -> values.Peeked:
        with self._spool.step(self) as spool:
            (item,) = retry(lambda: spool.deliverable(self, 1), self._wait, until)
            _, names, meta, put_time, _ = item.message()
            return values.Peeked(item.seq, item.attempt, put_time / 1e9, len(item.image), names, meta)

    def load(self, delivery: Delivery, writable: bool = False) -> Message:
        with self._spool.step(self):
            return self._in_flight(delivery).message(writable)

    def describe(self, delivery: Delivery) -> values.Contents:
        return values.Contents(*self.load(delivery)[1:])

    def settle(self, deliveries: Sequence[Delivery], verdict: values.Verdict) -> None:
        with self._spool.step(self) as spool:
            for delivery in deliveries:
                item = self._in_flight(delivery)
                match verdict:
                    case values.Ack():
                        spool.gets += 1
                        spool.forget(item)
                    case values.Nack(delay, reason):
                        spool.fail(item, reason, delay)
                    case values.Reject(reason):
                        spool.fail(item, reason, last=True)
                    case values.Extend(lease):
                        item.due = spool.now + lease
                        spool.changed.notify_all()  # who waits for it may have to wake sooner

    def _in_flight(self, delivery: Delivery) -> _Item:
        item = self._spool.in_flight.get(delivery.seq)
        if item is None or (item.owner, item.attempt) != (self, delivery.attempt):
            raise errors.LeaseExpired(
                f"{self.path}: item {delivery.seq} is in flight here no more: its lease ended, or it was settled"
            )
        return item


class MemoryEngine:
    """The spool `memory://NAME`."""

    crosses_processes = False

    def __init__(self, name: str) -> None:
        if not name:
            raise ValueError("a spool in memory needs a name: memory://NAME")
        self._name = name

    def producer(self, options: ProducerOptions) -> Producer:
        if options.durability != "none":
            raise ValueError(f"memory://{self._name} ends with the process: durability can only be 'none'")
        return Producer(self._spool(), options.limits, options.reopen or options.fresh, options.fresh)

    def consumer(self, options: ConsumerOptions) -> Consumer:
        return Consumer(self._spool(), options.limits)

    def admin(self) -> _Spool:
        if self._name not in _spools:
            raise errors.NotASpool(f"memory://{self._name}: there is no spool here, in this process")
        return self._spool()

    def _spool(self) -> _Spool:
        return _spools.setdefault(self._name, _Spool(f"memory://{self._name}"))


def clear(name: str) -> None:
    """Forget the spool `memory://NAME`: who opens the name next makes a new one. Sessions still open keep the old."""
    _spools.pop(name, None)


_spools: dict[str, _Spool] = {}
_NO_FILES: Final[dict[str, Any]] = {
    **dict.fromkeys(("free_files", "free_bytes", "pinned_files", "pinned_bytes", "wanted_bytes"), 0),
    **{"file_system": "memory", "in_memory": True, "waiting_mode": "condition"},
    **{"index_damage": "", "stuck_on": "", "pinned_by": {}},
}
"""What `stat` says of every spool in memory."""


def _footer(layout: items.Layout, message: Message, put_time: int) -> bytes:
    number = bytes.fromhex(message.id) or os.urandom(16)
    return footers.pack(layout.end, put_time, number, message.names, message.meta)


def _size(layout: items.Layout, message: Message) -> int:
    """Bytes of an item. Raises TooLarge for more than the memory of the machine."""
    size = layout.end + footers.SIZE + footers.json_size(message.names, message.meta)
    if size > _MEMORY:
        raise errors.TooLarge(f"{size} bytes can never fit: this machine has {_MEMORY}")
    return size


def _made(message: Message) -> _Item:
    """The item of a message that is put now."""
    layout, now = items.layout_of(message.arrays), time.time_ns()
    _size(layout, message)
    return _Item(b"".join((*items.parts(layout, message.arrays), _footer(layout, message, now))), now)
