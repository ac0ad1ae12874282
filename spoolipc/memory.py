"""The engine of one process: spools in memory, for its threads, and for the tests of programs that use spoolipc.

    memory://NAME

The first who opens a name makes the spool; it lives until the process ends or `clear(NAME)`, whoever closes. Each
item is kept as the bytes of a whole item file, so that what is refused, and what comes back, is what it would be in a
directory; nothing can damage one, so checksums are not stored. The limits hold, `max_bytes` for those bytes;
`recycle_bytes` and `mode` are agreed on and mean nothing.

Every operation is one step under the spool's one condition, and whoever waits, waits on it. No clock runs aside: leases
and delays that ended are seen by the next step, and by those who wait. A forked child has a copy of every spool, which
nobody else sees; fork while no other thread uses one.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Final, TypeVar

from . import message as values
from .engine import ConsumerOptions, ProducerOptions, retry
from .errors import (
    AlreadySettled,
    Empty,
    Full,
    LeaseExpired,
    LimitMismatch,
    NoSuchItem,
    NotASpool,
    ShutDown,
    SpoolClosed,
    TooLarge,
)
from .format import footer as footers
from .format import item as items
from .message import Deadline, Delivery, Limits, Message

T = TypeVar("T")
_log = logging.getLogger("spoolipc")
_LONGEST_SLEEP: Final = 3600.0


@dataclass(slots=True, eq=False)
class _Item:
    """An item. image: the bytes of its file. due: monotonic seconds when its lease or delay ends."""

    image: bytearray
    put_time: int
    seq: int = 0
    attempt: int = 0
    place: _Place | None = None
    owner: Consumer | None = None
    due: float = 0.0
    history: list[values.Failure] = field(default_factory=list)

    def message(self) -> Message:
        """What is in it, the arrays as read-only views."""
        return items.message(self.image, *items.parse(self.image, len(self.image)), copy=False)


_Place = OrderedDict[int, _Item]


class _Spool:
    """A spool's state. Everything is done under its condition, which is notified of every change."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.changed = threading.Condition()
        self.asked: dict[str, int] = {}
        self.state: values.State = "open"
        self.waiting, self.redelivered, self.delayed = _Place(), _Place(), _Place()
        self.in_flight, self.failed = _Place(), _Place()
        self.bytes = self.puts = self.gets = self.sessions = 0
        self.agree(Limits())

    def agree(self, asked: Limits) -> None:
        """Let limits be decided by who asks first. Raises LimitMismatch."""
        given = {name: value for name, value in asdict(asked).items() if value is not None}
        for name, value in given.items():
            if self.asked.get(name, value) != value:
                raise LimitMismatch(
                    f"{self.path} has {name}={self.asked[name]}, not {value}; leave {name} out to take what is there,"
                    " or use another name"
                )
        self.asked |= given
        self.limits = replace(values.DEFAULTS, **self.asked)
        self.most_items = self.limits.maxsize or math.inf
        self.most_bytes = self.limits.max_bytes or math.inf
        self.most_attempts = self.limits.max_attempts or math.inf

    def qsize(self) -> int:
        return len(self.waiting) + len(self.redelivered) + len(self.delayed)

    def check_fits(self, size: int) -> None:
        """Raise TooLarge for what there will never be room for."""
        if size > self.most_bytes:
            raise TooLarge(
                f"an item of {size} bytes can never fit into {self.path}: max_bytes is {self.most_bytes}"
            )

    def check_room(self, size: int) -> None:
        """Raise ShutDown, or Full when there is no room now."""
        if self.state != "open":
            raise ShutDown(
                f"the spool {self.path} was shut down; SpoolWriter(path, reopen=True) opens it again"
            )
        if self.qsize() >= self.most_items or self.bytes + size > self.most_bytes:
            raise Full(f"the spool {self.path} had no room in time")

    def append(self, item: _Item) -> int:
        """Make it the last item."""
        self.puts += 1
        item.seq = self.puts
        self.bytes += len(item.image)
        self.move(item, self.waiting)
        return item.seq

    def next_item(self, asking: Consumer) -> _Item:
        """The item to be delivered next. Raises Empty, and ShutDown when nothing can come any more."""
        for item in (self.redelivered or self.waiting).values():
            return item
        others = any(item.owner is not asking for item in self.in_flight.values())
        if self.state == "discarded" or (self.state == "draining" and not others and not self.delayed):
            raise ShutDown(f"the spool {self.path} was shut down and has no more items")
        raise Empty(f"no item waits in {self.path}")

    def move(self, item: _Item, place: _Place | None) -> None:
        """Let an item be in another place, None for nowhere any more, and in nobody's flight."""
        if item.place is not None:
            del item.place[item.seq]
        if place is None or place is self.failed:
            self.bytes -= len(item.image)
        if place is not None:
            place[item.seq] = item
        item.place, item.owner = place, None
        self.changed.notify_all()

    def requeue(self, item: _Item, why: str, delay: float = 0.0) -> None:
        """What becomes of an item in flight that was not settled otherwise."""
        if item.attempt >= self.most_attempts:
            self.dead_letter(item, f"{why}; that was attempt {item.attempt} of {self.most_attempts}")
        elif self.state == "discarded":
            self.move(item, None)
        else:
            item.history.append(_failure(item, why))
            self.move(item, self.delayed if delay > 0 else self.redelivered)
            if delay > 0:
                item.due = time.monotonic() + delay

    def dead_letter(self, item: _Item, why: str) -> None:
        item.history.append(_failure(item, why))
        self.move(item, self.failed)
        _log.error("%s: item %d is now a dead letter: %s", self.path, item.seq, why)

    def next_due(self) -> float:
        """When the next lease or delay ends, in monotonic seconds."""
        return min(
            (item.due for item in (*self.in_flight.values(), *self.delayed.values())), default=math.inf
        )

    def tick(self) -> None:
        """See which leases and delays have ended."""
        now = time.monotonic()
        for item in [item for item in self.in_flight.values() if item.due <= now]:
            self.requeue(item, "its lease ended")
        for item in sorted(self.delayed.values(), key=lambda item: item.due):
            if item.due <= now:
                self.move(item, self.redelivered)


class _Session:
    """One side of an open spool."""

    def __init__(self, spool: _Spool, asked: Limits) -> None:
        self._spool = spool
        self._closed = False
        with spool.changed:
            spool.agree(asked)
            spool.sessions += 1

    @property
    def path(self) -> str:
        return self._spool.path

    @property
    def maxsize(self) -> int:
        return self._spool.limits.maxsize or 0

    def qsize(self) -> int:
        with self._step() as spool:
            return spool.qsize()

    def close(self) -> None:
        spool = self._spool
        with spool.changed:
            spool.sessions -= not self._closed
            self._closed = True
            for item in [item for item in spool.in_flight.values() if item.owner is self]:
                spool.requeue(item, "its reader left")
            spool.changed.notify_all()

    @contextmanager
    def _step(self) -> Iterator[_Spool]:
        """The spool, for a step that nobody sees half done. Raises SpoolClosed."""
        with self._spool.changed:
            self._check_open()
            self._spool.tick()
            yield self._spool

    def _check_open(self) -> None:
        if self._closed:
            raise SpoolClosed(f"this session of {self.path} was closed")

    def _wait(self, until: Deadline) -> bool:
        """Wait, within a step, until another try may help; False when the deadline is past."""
        now = time.monotonic()
        end = min(now + _LONGEST_SLEEP, math.inf if until is None else until)
        if end <= now:
            return False
        self._spool.changed.wait(max(0.0, min(end, self._spool.next_due()) - now))
        self._check_open()
        self._spool.tick()
        return True


class Producer(_Session):
    """A writer's side."""

    def __init__(self, spool: _Spool, options: ProducerOptions) -> None:
        super().__init__(spool, options.limits)
        if options.reopen:
            with self._step():
                spool.state = "open"

    def put(self, messages: Sequence[Message], until: Deadline) -> list[int]:
        """Put messages; all are looked at first, so that none is put where one must be refused."""
        ready = [self._item(message) for message in messages]
        seqs: list[int] = []
        with self._step() as spool:
            for item in ready:
                spool.check_fits(len(item.image))
            try:
                for item in ready:
                    self._await_room(len(item.image), until)
                    seqs.append(spool.append(item))
            except (Full, ShutDown) as error:
                error.seqs = tuple(seqs)
                raise
        return seqs

    def loan(self, spec: values.ArraySpec, meta: values.Json, until: Deadline) -> Loan:
        layout = items.layout_of_spec(spec)
        size = layout.end + len(_footer(layout, 0, Message((), None, meta)))
        with self._step() as spool:
            spool.check_fits(size)
            self._await_room(size, until)
        image, (block,), (header,) = bytearray(size), layout.blocks, layout.headers
        image[block.offset - len(header) : block.offset] = header
        return Loan(self, layout, meta, image)

    def full(self) -> bool:
        with self._step() as spool:
            return spool.qsize() >= spool.most_items

    def shutdown(self, immediate: bool) -> None:
        with self._step() as spool:
            if immediate:
                spool.state = "discarded"
                for place in (spool.waiting, spool.redelivered, spool.delayed):
                    for item in list(place.values()):
                        spool.move(item, None)
            elif spool.state == "open":
                spool.state = "draining"
            spool.changed.notify_all()

    def _await_room(self, size: int, until: Deadline) -> None:
        retry(lambda: self._spool.check_room(size), self._wait, until)

    def _item(self, message: Message) -> _Item:
        layout = items.layout_of(message.arrays)
        image = bytearray(layout.end + len(_footer(layout, 0, message)))
        items.store(image, layout, message.arrays)
        return _sealed(image, layout, message)


class Loan:
    """An array over the bytes of an item that is not in the spool yet."""

    def __init__(self, producer: Producer, layout: items.Layout, meta: values.Json, image: bytearray) -> None:
        self.array = items.view(image, layout.blocks[0], writeable=True)
        self._producer = producer
        self._layout = layout
        self._meta = meta
        self._image: bytearray | None = image

    def commit(self, until: Deadline) -> int:
        image = self._image
        if image is None:
            raise AlreadySettled("this loan was committed or discarded before")
        with self._producer._step() as spool:
            self._producer._await_room(len(image), until)
            self.array.flags.writeable = False
            self._image = None
            return spool.append(_sealed(image, self._layout, Message((), None, self._meta)))

    def discard(self) -> None:
        self._image = None


class Consumer(_Session):
    """A reader's side."""

    def __init__(self, spool: _Spool, options: ConsumerOptions) -> None:
        super().__init__(spool, options.limits)

    def take(self, limit: int, until: Deadline) -> list[Message]:
        return self._several(self._take, limit, until)

    def claim(self, limit: int, lease: float | None, until: Deadline) -> list[Delivery]:
        return self._several(lambda: self._claim(lease), limit, until)

    def peek(self, until: Deadline) -> values.Peeked:
        with self._step():
            item = retry(lambda: self._spool.next_item(self), self._wait, until)
            message, size = item.message(), len(item.image)
            when = message.put_time / 1e9
            return values.Peeked(item.seq, item.attempt, when, size, message.names, message.meta)

    def load(self, delivery: Delivery) -> Message:
        with self._step():
            return self._in_flight(delivery).message()

    def describe(self, delivery: Delivery) -> values.Contents:
        message = self.load(delivery)
        return values.Contents(message.names, message.meta, message.put_time, message.id)

    def settle(self, deliveries: Sequence[Delivery], verdict: values.Verdict) -> None:
        with self._step() as spool:
            for delivery in deliveries:
                item = self._in_flight(delivery)
                match verdict:
                    case values.Ack():
                        spool.gets += 1
                        spool.move(item, None)
                    case values.Nack(delay, reason):
                        spool.requeue(item, reason, delay)
                    case values.Reject(reason):
                        spool.dead_letter(item, reason)
                    case values.Extend(lease):
                        item.due = time.monotonic() + lease
                        spool.changed.notify_all()  # who waits for it may have to wake sooner

    def _several(self, step: Callable[[], T], limit: int, until: Deadline) -> list[T]:
        """What `step` returns, up to `limit` times, having waited only for the first."""
        with self._step():
            found = [retry(step, self._wait, until)]
            with suppress(Empty, ShutDown):
                while len(found) < limit:
                    found.append(step())
            return found

    def _take(self) -> Message:
        item = self._spool.next_item(self)
        self._spool.gets += 1
        self._spool.move(item, None)
        return item.message()

    def _claim(self, lease: float | None) -> Delivery:
        item = self._spool.next_item(self)
        self._spool.move(item, self._spool.in_flight)
        item.attempt += 1
        item.owner = self
        item.due = math.inf if lease is None else time.monotonic() + lease
        return Delivery(item.seq, item.attempt, item.put_time, len(item.image), item)

    def _in_flight(self, delivery: Delivery) -> _Item:
        item: _Item = delivery.handle
        if item.owner is not self or item.attempt != delivery.attempt:
            raise LeaseExpired(
                f"item {delivery.seq} of {self.path} is not in flight at this reader any more: its lease ended, or it"
                " was settled already; it may have been redelivered"
            )
        return item


class Admin:
    """A spool looked after from outside."""

    def __init__(self, spool: _Spool) -> None:
        self._spool = spool

    def stat(self) -> values.SpoolStat:
        with self._step() as spool:
            first = next(iter((spool.redelivered or spool.waiting).values()), None)
            return values.SpoolStat(
                path=spool.path,
                state=spool.state,
                depth=len(spool.waiting) + len(spool.redelivered),
                delayed=len(spool.delayed),
                in_flight=len(spool.in_flight),
                bytes=spool.bytes,
                oldest_age=max(0.0, (time.time_ns() - first.put_time) / 1e9) if first else None,
                failed=len(spool.failed),
                puts=spool.puts,
                gets=spool.gets,
                free_files=0,
                free_bytes=0,
                pinned_files=0,
                pinned_bytes=0,
                live_sessions=spool.sessions,
                limits=spool.limits,
                file_system="memory",
                in_memory=True,
                waiting_mode="condition",
                index_damage="",
                stuck_on="",
            )

    def failed_list(self) -> list[values.DeadLetter]:
        with self._step() as spool:
            return [_letter(item) for _, item in sorted(spool.failed.items())]

    def failed_retry(self, seqs: Iterable[int] | None) -> values.Retried:
        done: dict[int, int] = {}
        with self._step() as spool:
            for item in self._letters(seqs):
                if spool.state != "open":
                    raise ShutDown(f"the spool {spool.path} was shut down")
                del spool.failed[item.seq]
                done[item.seq] = spool.append(_Item(item.image, item.put_time))
        return values.Retried(done, {})

    def failed_drop(self, seqs: Iterable[int] | None) -> list[int]:
        with self._step() as spool:
            return [spool.failed.pop(item.seq).seq for item in self._letters(seqs)]

    @contextmanager
    def _step(self) -> Iterator[_Spool]:
        with self._spool.changed:
            self._spool.tick()
            yield self._spool

    def _letters(self, seqs: Iterable[int] | None) -> list[_Item]:
        failed = self._spool.failed
        wanted = sorted(failed if seqs is None else set(seqs))
        for seq in wanted:
            if seq not in failed:
                raise NoSuchItem(
                    f"{self._spool.path} has no dead letter {seq}; failed_list() tells those it has"
                )
        return [failed[seq] for seq in wanted]


class MemoryEngine:
    """The spool `memory://NAME`."""

    crosses_processes = False

    def __init__(self, name: str) -> None:
        if not name:
            raise ValueError("a spool in memory needs a name: memory://NAME")
        self._name = name

    def producer(self, options: ProducerOptions) -> Producer:
        if options.durability != "none":
            raise ValueError(
                f"memory://{self._name} ends with the process; its durability can only be 'none'"
            )
        return Producer(self._spool(), options)

    def consumer(self, options: ConsumerOptions) -> Consumer:
        return Consumer(self._spool(), options)

    def admin(self) -> Admin:
        with _opening:
            if self._name not in _spools:
                raise NotASpool(f"there is no spool memory://{self._name} in this process")
            return Admin(_spools[self._name])

    def _spool(self) -> _Spool:
        with _opening:
            return _spools.setdefault(self._name, _Spool(f"memory://{self._name}"))


def clear(name: str) -> None:
    """Forget the spool `memory://NAME`: who opens the name next makes a new one. Sessions still open keep the old."""
    with _opening:
        _spools.pop(name, None)


_opening = threading.Lock()
_spools: dict[str, _Spool] = {}


def _footer(layout: items.Layout, put_time: int, message: Message) -> bytes:
    number = bytes.fromhex(message.id) or os.urandom(16)
    return footers.pack(layout.end, put_time, number, message.names, message.meta)


def _sealed(image: bytearray, layout: items.Layout, message: Message) -> _Item:
    """The item whose headers and data are in `image`; the footer is added."""
    put_time = time.time_ns()
    image[layout.end :] = _footer(layout, put_time, message)
    return _Item(image, put_time)


def _failure(item: _Item, why: str) -> values.Failure:
    return values.Failure(item.attempt, time.time(), f"process {os.getpid()}", why)


def _letter(item: _Item) -> values.DeadLetter:
    message = item.message()
    names: Sequence[str | None] = message.names or (None,) * len(message.arrays)
    return values.DeadLetter(
        seq=item.seq,
        path="",
        bytes=len(item.image),
        reason=item.history[-1].why,
        attempts=item.attempt,
        history=tuple(item.history),
        arrays=tuple(
            values.StoredArray(name, str(array.dtype), array.shape, array.nbytes)
            for name, array in zip(names, message.arrays, strict=True)
        ),
        meta=message.meta,
        put_time=message.put_time / 1e9,
        damage="",
    )
