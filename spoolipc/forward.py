"""Forwarding: items moved from one spool to another, each once, whatever crashes when.

An item is acknowledged at its source when the destination has it, and the destination keeps, with the items and in one
with them, the ids of those that came last. So whoever forwards again after a crash knows which of the items that are
delivered once more are there already: those of the last batch may be, as the next one is put when they are
acknowledged.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress

from .connect import connect
from .engine import Consumer, ConsumerOptions, Destination, End, ProducerOptions
from .errors import BadItem, Empty, LeaseExpired, ShutDown, UnsupportedOperation
from .message import NOW, Ack, Delivery, Message, duration, one_of, whole

Place = str | os.PathLike[str]
Moved = Callable[[int, int], None]
"""Told after each batch: items, bytes."""
_TOGETHER = 64


def forward(
    source: Place,
    destination: Place,
    *,
    max_bytes: int = 64 << 20,
    rate: float | None = None,
    end: End = "shutdown",
    until_empty: bool = False,
    moved: Moved | None = None,
) -> int:
    """Move items from one spool to another, in order, until the source has ended; returns how many.

    destination: a spool on servers; of others none can keep which items it has from where. max_bytes: most bytes that
    are on their way at once, if it is not one item that is larger. rate: most bytes a second. end: as for SpoolReader.
    until_empty: end when nothing waits. moved: called after each batch with its items and bytes.

    An item that cannot be read is a dead letter of the source. One process forwards from a source to a destination:
    another that is begun meanwhile raises SpoolInUse, or makes the first one do so. While the destination is full, or
    its servers are away, this waits.
    """
    one_of("end", end, "shutdown", "writers")
    whole("max_bytes", max_bytes, 1)
    pace = _Pace(None if rate is None else duration("rate", rate, positive=True))
    total = 0
    with (
        closing(connect(destination).producer(ProducerOptions())) as producer,
        closing(connect(source).consumer(ConsumerOptions(end=end, values=True, create=False))) as consumer,
    ):
        if not isinstance(producer, Destination):
            what = "cannot keep which items it has from where, as a spool on servers can"
            raise UnsupportedOperation(f"{producer.path}: {what}")
        known = set(producer.forwarded(consumer.path))
        waiting: list[Delivery] = []
        while True:
            try:
                waiting = waiting or consumer.claim(_TOGETHER, None, NOW if until_empty else None)
                batch = _batch(consumer, waiting, known, max_bytes)
            except (ShutDown, Empty):
                return total
            if not batch:
                continue
            count = producer.put_forwarded(consumer.path, [message for _, message in batch], None)
            try:
                consumer.settle([delivery for delivery, _ in batch[:count]], Ack())
            except LeaseExpired:  # they will be delivered again
                known = set(producer.forwarded(consumer.path))
            done = {delivery.seq for delivery, _ in batch[:count]}
            waiting = [delivery for delivery in waiting if delivery.seq not in done]
            nbytes = sum(message.nbytes for _, message in batch[:count])
            total += count
            if moved is not None:
                moved(count, nbytes)
            pace.wait(nbytes)


def _batch(
    consumer: Consumer, waiting: list[Delivery], known: set[str], max_bytes: int
) -> list[tuple[Delivery, Message]]:
    """The first of these items that may be on their way together. Those that the destination has are acknowledged, and
    with those that cannot be read taken out of `waiting`."""
    batch: list[tuple[Delivery, Message]] = []
    for delivery in list(waiting):
        if batch and sum(message.nbytes for _, message in batch) + delivery.size > max_bytes:
            break
        with suppress(BadItem, LeaseExpired):
            if not known or consumer.describe(delivery).id not in known:
                batch.append((delivery, consumer.load(delivery)))
                continue
            consumer.settle([delivery], Ack())
        waiting.remove(delivery)
    return batch


class _Pace:
    """So many bytes a second at most."""

    def __init__(self, rate: float | None) -> None:
        self._rate, self._free = rate, time.monotonic()

    def wait(self, nbytes: int) -> None:
        """Wait until so many bytes more may be sent."""
        if self._rate is not None:
            self._free = max(self._free, time.monotonic()) + nbytes / self._rate
            threading.Event().wait(max(0.0, self._free - time.monotonic()))
