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

import math
import os
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

import numpy as np

from .. import errors
from .. import message as values
from ..engine import ConsumerOptions, ProducerOptions, retry
from ..format import footer as footers
from ..format import item as items
from ..message import Deadline, Delivery, Message
from .spool import Item, Session, Spool, clear, spools

__all__ = ["Consumer", "Loan", "MemoryEngine", "Producer", "clear"]
S = TypeVar("S", bound=Session)
_MEMORY: Final = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """One wait of an event loop. look: raises Empty or Full when another try would. A step."""

    def __init__(self, session: Session, look: Callable[[], object], news: Callable[[], None]) -> None:
        self._session, self._look, self._news = session, look, news
        with session._spool.step(session) as spool:
            spool.told.append(news)

    def fileno(self) -> int:
        return -1

    def arm(self) -> float:
        with self._session._spool.step(self._session):
            try:
                self._look()
            except (errors.Empty, errors.Full):
                return self._session.pause()
            except errors.SpoolError:
                pass  # another try meets it as well
            return 0.0

    def drain(self) -> None:
        """There is no descriptor."""

    def close(self) -> None:
        with suppress(errors.SpoolError, ValueError), self._session._spool.step() as spool:
            spool.told.remove(self._news)


class Producer(Session):
    """A writer's side."""

    role = "writer"

    def put(self, messages: Sequence[Message], until: Deadline) -> list[int]:
        """Put messages; all are made first, so that none is put where one cannot be stored."""
        made = [self._made(message) for message in messages]
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

    def watch(self, news: Callable[[], None], lacking: Message | int | None = None) -> Watch:
        if isinstance(lacking, int):
            return Watch(self, partial(self._spool.check_end, lacking), news)
        size = self._size(items.layout_of(lacking.arrays), lacking) if lacking else 0
        return Watch(self, partial(self._spool.check_room, size), news)

    def loan(self, spec: values.ArraySpec, meta: values.Json, until: Deadline) -> Loan:
        layout, message = items.layout_of_spec(spec), Message((), None, meta)
        size = self._size(layout, message)
        with self._spool.step(self):
            self._await_room(size, until)
        return Loan(self, layout, message, bytearray(size))

    def full(self) -> bool:
        with self._spool.step(self) as spool:
            return spool.full()

    def join(self, until: Deadline, last: int = 0) -> int:
        with self._spool.step(self) as spool:
            last = last or spool.puts
            try:
                retry(lambda: spool.check_end(last), self._wait, until)
            except errors.Full:
                return last
            return 0

    def shutdown(self, immediate: bool) -> None:
        with self._spool.step(self) as spool:
            if immediate:
                spool.state = "discarded"
                spool.empty()
            elif spool.state == "open":
                spool.state = "draining"
            spool.notify()

    def _await_room(self, size: int, until: Deadline) -> None:
        retry(lambda: self._spool.check_room(size), self._wait, until)

    def _size(self, layout: items.Layout, message: Message) -> int:
        """Bytes of an item. Raises TooLarge for more than the memory of the machine."""
        size = layout.end + footers.SIZE + footers.json_size(message.names, message.meta)
        if size > _MEMORY:
            what = f"an item of {size} bytes can never fit: this machine has {_MEMORY}"
            raise errors.TooLarge(f"{self.path}: {what}")
        return size

    def _made(self, message: Message) -> Item:
        """The item of a message that is put now."""
        layout, now = items.layout_of(message.arrays), time.time_ns()
        image = np.empty(self._size(layout, message), np.uint8).data
        items.store(image, layout, message.arrays)  # by numpy, which lets other threads run meanwhile
        image[layout.end :] = _footer(layout, message, now)
        return Item(image, now)


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
            return spool.append(Item(image, now))

    def discard(self) -> None:
        self._image = None


class _Taken(list[Message]):
    """What a take has taken, and the items."""

    items: list[Item]


class Consumer(Session):
    """A reader's side."""

    role = "reader"

    def __init__(self, spool: Spool, options: ConsumerOptions) -> None:
        super().__init__(spool, options.limits)
        if options.end == "writers":
            with spool.step(self):
                there = spool.waiting() or spool.in_flight or spool.has_writer()
                self.began = -1 if there else spool.news

    def take(self, limit: int, until: Deadline, writable: bool = False, kept: bool = False) -> _Taken:
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

    def watch(self, news: Callable[[], None], lacking: Message | int | None = None) -> Watch:
        return Watch(self, lambda: self._spool.deliverable(self, 1), news)

    def claim(self, limit: int, lease: float | None, until: Deadline) -> list[Delivery]:
        seconds = math.inf if lease is None else lease
        with self._spool.step(self) as spool:
            found = retry(lambda: spool.claim(self, limit, seconds), self._wait, until)
            return [self._delivery(item) for item in found]

    def _delivery(self, item: Item) -> Delivery:
        delivery = Delivery(item.seq, item.attempt, item.put_time, len(item.image), None)
        what, dropped = (item, item.attempt), self.dropped
        item.given = weakref.ref(
            delivery, lambda _: dropped.append(what)
        )  # at any moment: it only takes note
        return delivery

    def peek(self, until: Deadline) -> values.Peeked:
        with self._spool.step(self) as spool:
            (item,) = retry(lambda: spool.deliverable(self, 1), self._wait, until)
            _, names, meta, put_time, *_ = item.message()
            return values.Peeked(item.seq, item.attempt, put_time / 1e9, len(item.image), names, meta)

    def load(self, delivery: Delivery, writable: bool = False) -> Message:
        with self._spool.step(self):
            return self._in_flight(delivery).message(writable)

    def describe(self, delivery: Delivery) -> values.Contents:
        return values.Contents(*self.load(delivery)[1:5])

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
                        spool.notify()  # who waits for it may have to wake sooner

    def _in_flight(self, delivery: Delivery) -> Item:
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
        reopen = options.reopen or options.fresh
        return self._joined(
            options.create, lambda spool: Producer(spool, options.limits, reopen, options.fresh)
        )

    def consumer(self, options: ConsumerOptions) -> Consumer:
        return self._joined(options.create, lambda spool: Consumer(spool, options))

    def admin(self) -> Spool:
        return self._spool(create=False)

    def _joined(self, create: bool, join: Callable[[Spool], S]) -> S:
        while True:
            with suppress(errors.SpoolGone):  # removed meanwhile
                return join(self._spool(create))

    def _spool(self, create: bool) -> Spool:
        path = f"memory://{self._name}"
        spool = spools.setdefault(self._name, Spool(path)) if create else spools.get(self._name)
        if spool is None:
            what = "there is no spool here, in this process; SpoolWriter(path) makes one"
            raise errors.NotASpool(f"{path}: {what}")
        return spool


def _footer(layout: items.Layout, message: Message, put_time: int) -> bytes:
    number = bytes.fromhex(message.id) or os.urandom(16)
    return footers.pack(layout.end, put_time, number, message.names, message.meta)
