"""Forwarding: items moved from one spool to another, each once, whatever crashes when.

An item is acknowledged at its source when the destination has it, and the destination keeps, with the items and in one
with them, the ids of those that came last. So whoever forwards again after a crash knows which of the items that are
delivered once more are there already: those that were put and are not known to have been acknowledged. An end that is
away is opened again, with pauses, until it is there.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import chain
from typing import Final, Protocol, TypeVar, cast

from .connect import connect
from .engine import (
    Consumer,
    ConsumerOptions,
    Destination,
    Durability,
    End,
    Known,
    Producer,
    ProducerOptions,
    Source,
)
from .errors import (
    BadItem,
    Empty,
    Full,
    LeaseExpired,
    LockTimeout,
    NotASpool,
    ServerUnreachable,
    ShutDown,
    SpoolGone,
    StorageError,
    TooLarge,
    UnsupportedOperation,
)
from .message import NOW, Ack, Delivery, Message, Reject, flag, one_of, whole

Place = str | os.PathLike[str]
T = TypeVar("T")
Moved = Callable[[int, int], None]
"""Told after each batch: items, bytes."""
_log = logging.getLogger("spoolipc")
_AT_ONCE: Final = 64
_TOGETHER: Final = 256
"""Items on their way at once: what servers store together takes some milliseconds, however little it is."""
_LOOK: Final = 2.0
"""Seconds after which a wait for items or room looks whether to stop."""
_LONGEST_PAUSE: Final = 15.0
_AWAY: Final = (ServerUnreachable, SpoolGone, NotASpool, LockTimeout)


def forward(
    source: Place,
    destination: Place,
    *,
    max_bytes: int = 64 << 20,
    rate: float | None = None,
    end: End = "shutdown",
    until_empty: bool = False,
    keep: bool = False,
    durability: Durability = "none",
    stop: threading.Event | None = None,
    moved: Moved | None = None,
) -> int:
    """Move items from one spool to another, in order, until the source has ended; returns how many.

    source, destination: directories or URLs of servers; a spool in memory is refused with UnsupportedOperation.
    max_bytes: most bytes that are on their way at once, if it is not one item that is larger. rate: most bytes a
    second. end: as for SpoolReader. until_empty: end when nothing waits. keep: copy the items, those in flight
    included, and leave them to the readers of the source; called again with it, go on after the last that was copied.
    durability: of the destination, as for SpoolWriter. stop: end as soon as it is set, with nothing in doubt. moved:
    called after each batch with its items and bytes.

    An item that cannot be read, or that the destination never takes, is a dead letter of the source; with `keep` it is
    passed over, and the log says so. One that went on from the destination and came back to the source is another one.
    One process forwards from a source to a destination: another that is begun meanwhile raises SpoolInUse, or makes the
    first one do so. While the destination, or its disk, is full, or an end is away, this waits, and the log says so
    once, and when it goes on. Servers that do not answer may be away from the first. A destination that is not there is
    made, but not again where it was removed since: it is waited for. Raises NotASpool for a source that is not there
    when it is first looked for, and for a destination that cannot be made a spool then; ValueError where both are one
    spool; UnsafeSpool, AccessDenied, StorageError.
    """
    one_of("end", end, "shutdown", "writers")
    if flag("keep", keep) and end == "writers":
        raise ValueError('keep=True leaves all items at the source, which end="writers" would wait for')
    for place in (source, destination):
        if not connect(place).crosses_processes:
            what = "is in the memory of one process; a forwarder needs spools that outlive it"
            raise UnsupportedOperation(f"{os.fsdecode(place)}: {what}")
    if rate is not None and not rate > 0:
        raise ValueError(f"rate must be a positive number of bytes a second, not {rate!r}")
    one = _Forwarder(stop or threading.Event(), moved, rate, whole("max_bytes", max_bytes, 1), until_empty)
    reading = ConsumerOptions(end=end, values=True, create=False)

    def writing() -> ProducerOptions:
        return ProducerOptions(durability=durability, create=one.is_new)

    def move() -> None:
        with ExitStack() as ends:
            consumer = one.opened("source", lambda: connect(source).consumer(reading))
            ends.enter_context(closing(consumer))
            producer = one.opened("destination", lambda: connect(destination).producer(writing()))
            ends.enter_context(closing(producer))
            take, give = cast(_From, consumer), cast(_To, producer)
            if take.identity() == give.identity():
                what = "" if take.path == give.path else f", as {give.path} is the same spool"
                raise ValueError(f"{take.path} is both source and destination{what}")
            if keep:
                one.copy(take, give, lambda: connect(source).admin().stat().state != "open")
            else:
                one.move(take, give)

    one.run(move)
    return one.total


class _From(Consumer, Source, Protocol):
    """A consumer of any spool outside memory."""


class _To(Producer, Destination, Protocol):
    """A producer of any spool outside memory."""


class _Forwarder:
    """What was forwarded, and with what it goes on. is_new: the end that is being opened never was before."""

    def __init__(
        self,
        stop: threading.Event,
        moved: Moved | None,
        rate: float | None,
        max_bytes: int,
        until_empty: bool,
    ) -> None:
        self.total = 0
        self._stop, self._moved, self._rate = stop, moved, rate
        # No more at once than a second's: else the rate would come in bursts.
        self._max_bytes = max_bytes if rate is None else int(min(max_bytes, rate + 1))
        self._until_empty = until_empty
        self._free = time.monotonic()
        self._pause, self._said = 0.0, ""
        self._known = set[str]()
        self.is_new = False

    def opened(self, end: str, opening: Callable[[], T]) -> T:
        """One of the ends, opened. Where there is no spool, one is waited for only if it has been there, and only else
        made: what was removed may come back, as with its disk."""
        self.is_new = end not in self._known
        opened = opening()
        self._known.add(end)
        self.is_new = False
        return opened

    def run(self, work: Callable[[], None]) -> None:
        """Do it, again and again while one of its ends is away."""
        while not self._stop.is_set():
            try:
                return work()
            except _AWAY as error:
                if isinstance(error, NotASpool) and self.is_new:
                    raise
                self._pause = min(2 * self._pause or 0.1, _LONGEST_PAUSE)
                self._waits(str(error).split(": ")[0], error)  # its path is what each begins with
            self._stop.wait(self._pause)

    def _waits(self, what: str, error: object) -> None:
        """Tell what is waited for, once until it goes on."""
        if what != self._said:
            _log.warning("%s; forwarding waits for it", error)
            self._said = what

    def _goes_on(self) -> None:
        """Nothing is waited for but items."""
        self._pause = 0.0
        if self._said:
            _log.warning("forwarding goes on")
            self._said = ""

    # Moving

    def move(self, consumer: _From, producer: _To) -> None:
        """Until the source has ended, or nothing waits. What is claimed and not put goes back, without an attempt
        more."""
        while producer.full():  # of one that is killed amid waiting, it would have one more
            self._has_no_room(producer)
            if self._stop.wait(0.2):
                return
        waiting: list[Delivery] = []
        try:
            self._move(consumer, producer, waiting)
        finally:
            if waiting:
                with suppress(*_AWAY):
                    consumer.unclaim(waiting)

    def _move(self, consumer: _From, producer: _To, waiting: list[Delivery]) -> None:
        """The same. waiting: what is claimed and neither put nor a dead letter."""
        source = consumer.name()
        known = producer.forwarded(source)
        here = {*known.acknowledged.items(), *known.put.items()}
        done: list[str] = []
        while not self._stop.is_set():
            try:
                if not waiting:
                    waiting += self._claim(consumer)
            except ShutDown:
                return
            except Empty:
                if self._until_empty:
                    return
                self._goes_on()
                continue
            batch = self._batch(consumer, waiting, here, done)
            while batch:
                try:
                    count = self._put(producer, source, [message for _, message in batch], done)
                except TooLarge as error:  # the first
                    with suppress(LeaseExpired):
                        consumer.settle(waiting[:1], Reject(str(error)))
                    del waiting[0], batch[0]
                    continue
                if not count:
                    return
                arrived, batch = batch[:count], batch[count:]
                done = _acknowledge(consumer, arrived)
                del waiting[:count]
                here |= {(one.id, one.seq) for _, one in arrived if one.id not in done}  # these come again
                self._count(producer, [message for _, message in arrived])
                del arrived  # their files make room at the source, whose disk may be that of the destination

    def _claim(self, consumer: _From) -> list[Delivery]:
        """Some items, as many as may be on their way together. Raises Empty, ShutDown."""
        found = consumer.claim(_AT_ONCE, None, NOW if self._until_empty else time.monotonic() + _LOOK)
        with suppress(Empty, ShutDown):
            while (
                len(found) in range(_AT_ONCE, _TOGETHER)
                and sum(each.size for each in found) < self._max_bytes
            ):
                found += consumer.claim(min(_AT_ONCE, _TOGETHER - len(found)), None, NOW)
        return found

    def _batch(
        self, consumer: _From, waiting: list[Delivery], here: set[tuple[str, int]], done: list[str]
    ) -> list[tuple[Delivery, Message]]:
        """The first of `waiting`, that may be on their way together. Taken out of it are those before that the
        destination has, by their ids and numbers, which are acknowledged, and those that cannot be read."""
        batch: dict[str, tuple[Delivery, Message]] = {}
        total = 0
        for delivery in list(waiting):
            if batch and total + delivery.size > self._max_bytes:
                break
            with suppress(BadItem, LeaseExpired):
                message = consumer.load(delivery)
                if message.id in batch:  # it went round and came again
                    break
                if (message.id, message.seq) not in here:
                    batch[message.id] = delivery, message
                    total += message.nbytes
                    continue
                done += _acknowledge(consumer, [(delivery, message)])
            waiting.remove(delivery)
        return [*batch.values()]

    def _put(self, producer: _To, source: str, messages: Sequence[Message], done: Sequence[str]) -> int:
        """Put the first of them, as soon as there is room; how many: none when this is to stop. Raises TooLarge where
        the first is what never fits."""
        while not self._stop.is_set():
            try:
                return producer.put_forwarded(source, messages, time.monotonic() + _LOOK, done)
            except Full:
                self._has_no_room(producer)
            except TooLarge:
                if len(messages) == 1:
                    raise
                messages = messages[: len(messages) // 2]
            except StorageError as error:
                if error.errno != errno.ENOSPC:
                    raise
                if len(messages) == 1:
                    self._has_no_room(producer)
                    self._stop.wait(_LOOK)
                messages = messages[: max(1, len(messages) // 2)]
        return 0

    def _has_no_room(self, producer: _To) -> None:
        what = f"{producer.path}: has no room"
        self._waits(what, what)

    def _count(self, producer: _To, messages: Sequence[Message]) -> None:
        """These were forwarded: tell so, and wait as the rate has it."""
        self._pause = 0.0
        nbytes = sum(message.nbytes for message in messages)
        self.total += len(messages)
        if self._moved is not None:
            self._moved(len(messages), nbytes)
        if self._said and not producer.full():  # what is full most of the time is told once
            self._goes_on()
        if self._rate is not None:
            self._free = max(self._free, time.monotonic()) + nbytes / self._rate
            self._stop.wait(min(max(0.0, self._free - time.monotonic()), threading.TIMEOUT_MAX))

    # Copying

    def copy(self, consumer: _From, producer: _To, has_ended: Callable[[], bool]) -> None:
        """Until the source was shut down and all is copied, or all that is there."""
        source = f"{consumer.name()} kept"
        known = producer.forwarded(source)
        after = max(chain(known.acknowledged.values(), known.put.values()), default=0)
        ending = self._until_empty
        while not self._stop.is_set():
            before = after
            for batch in self._batches(consumer.browse(after)):
                while batch and not self._stop.is_set():
                    try:
                        count = self._put(producer, source, batch, [*known.put])
                    except TooLarge as error:
                        _log.error("%s: item %d is passed over: %s", consumer.path, batch[0].seq, error)
                        after = batch.pop(0).seq
                        continue
                    if not count:
                        return
                    known = Known({}, {message.id: message.seq for message in batch[:count]})
                    after = max(known.put.values())
                    self._count(producer, batch[:count])
                    batch = batch[count:]
            if ending:
                return
            if after == before:
                self._goes_on()
                self._stop.wait(1.0)
                ending = has_ended()

    def _batches(self, messages: Iterator[Message]) -> Iterator[list[Message]]:
        """The same, as many together as may be on their way at once."""
        batch: list[Message] = []
        total = 0
        for message in messages:
            if batch and (total + message.nbytes > self._max_bytes or len(batch) == _TOGETHER):
                yield batch
                batch, total = [], 0
            batch.append(message)
            total += message.nbytes
        if batch:
            yield batch


def _acknowledge(consumer: _From, batch: Sequence[tuple[Delivery, Message]]) -> list[str]:
    """Acknowledge what is in flight still; the ids of these."""
    try:
        consumer.settle([delivery for delivery, _ in batch], Ack())
    except LeaseExpired:
        if len(batch) == 1:
            return []
        return [each for one in batch for each in _acknowledge(consumer, [one])]
    return [message.id for _, message in batch]
