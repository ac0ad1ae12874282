"""Item: what a reader has received and not yet settled. Loan: what a writer computes and has not yet put."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Final, NoReturn, Self

from .engine import Consumer
from .engine import Loan as Lent
from .errors import AlreadySettled, BadItem, LeaseExpired, SpoolError, UnsupportedOperation
from .format.item import copied
from .message import (
    Ack,
    Array,
    Contents,
    Copy,
    Delivery,
    Extend,
    Json,
    Message,
    Nack,
    Reject,
    Verdict,
    deadline_of,
    duration,
    on_write,
)

_log = logging.getLogger("spoolipc")
_ACK: Final = Ack()
_TAKEN_AWAY: Final = "taken away when its lease ended"


class _Here:
    """What one process has, and no other can have."""

    def __reduce__(self) -> NoReturn:
        raise UnsupportedOperation(
            f"{self!r} belongs to this process and cannot be pickled; pass on its array"
        )


class Received(_Here):
    """What is told of an item in flight, by both faces: each settles it in its own way."""

    def __init__(self, consumer: Consumer, delivery: Delivery, copy: Copy = False) -> None:
        self._consumer = consumer
        self._copy = copy
        self._delivery = delivery
        self._contents: Contents | None = None
        self._message: Message | None = None
        self._settled = ""
        self._turn = [None]  # who takes it settles the item
        self.seq = delivery.seq
        self.attempt = delivery.attempt
        self.nbytes = delivery.size

    @property
    def settled(self) -> bool:
        """Whether the item was acknowledged, requeued or rejected."""
        return bool(self._settled)

    @property
    def meta(self) -> Json:
        """What the writer gave as metadata, None if nothing; read without touching the arrays.

        Raises BadItem when the item is damaged: it is then a dead letter. LeaseExpired.
        """
        return self._describe().meta

    @property
    def put_time(self) -> float:
        """When the item was put, wall clock in seconds.

        Raises what `meta` raises: after the loss of the index only the file knows it.
        """
        return (self._delivery.put_time or self._describe().put_time) / 1e9

    @property
    def id(self) -> str:
        """32 hexadecimal digits that no other item has, and that stay its own when it is moved to another spool.

        Raises what `meta` raises.
        """
        return self._message.id if self._message is not None else self._describe().id

    @property
    def array(self) -> Array:
        """The item's array; unless received with `copy`, it is read-only, and over 16 KB a view of the file's pages.

        It stays as it is for as long as any view of it is left, whatever becomes of the item. Raises BadItem
        when the item is damaged (it is then a dead letter), LeaseExpired, TypeError when the item has named arrays.
        """
        message = self._load()
        if message.names is not None:
            raise TypeError(f"item {self.seq} has named arrays ({', '.join(message.names)}); use item.arrays")
        return message.arrays[0]

    @property
    def arrays(self) -> Mapping[str, Array]:
        """The item's named arrays, each as `array` is. An unnamed array is named ""."""
        message = self._load()
        return dict(zip(message.names or ("",), message.arrays, strict=True))

    def _load(self) -> Message:
        if self._message is None:
            try:
                if not self._copy:
                    self._message = self._consumer.load(self._delivery)
                elif on_write(self._copy):
                    self._message = self._consumer.load(self._delivery, True)
                else:
                    self._message = copied(self._consumer.load(self._delivery))
            except BadItem:
                self._settled = "dead-lettered"
                raise
        return self._message

    def _describe(self) -> Contents | Message:
        if self._message is not None:
            return self._message
        if self._contents is None:
            try:
                self._contents = self._consumer.describe(self._delivery)
            except BadItem:
                self._settled = "dead-lettered"
                raise
        return self._contents

    def _settle(self, verdict: Verdict, settled: str) -> None:
        self._check()
        try:
            self._turn.pop()
        except IndexError:
            raise self._overtaken() from None
        try:
            self._consumer.settle((self._delivery,), verdict)
            self._settled = settled
        except LeaseExpired:
            self._settled = _TAKEN_AWAY
            raise
        except BaseException:
            self._turn.append(None)
            raise

    def _extend(self, seconds: float) -> None:
        self._check()
        try:
            self._consumer.settle((self._delivery,), Extend(seconds))
        except LeaseExpired:
            if not self._turn:
                raise self._overtaken() from None
            self._settled = _TAKEN_AWAY
            raise

    def _check(self) -> None:
        if self._settled:
            raise AlreadySettled(f"item {self.seq} was {self._settled} before")

    def _overtaken(self) -> AlreadySettled:
        return AlreadySettled(f"item {self.seq} is being settled by another thread")

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(seq={self.seq}, attempt={self.attempt}, {self._settled or 'in flight'})"
        )


class Item(Received):
    """An item in flight at a reader.

    As a context manager it is acknowledged at the end of the block, or requeued when the block raises; by hand,
    with ack, nack or reject.

    seq: sequence number. attempt: 1 at the first delivery. nbytes: bytes stored. Nothing of the arrays is
    read before `array` or `arrays` is asked for.
    """

    def ack(self) -> None:
        """Take the item off the spool for good. Raises LeaseExpired, AlreadySettled."""
        self._settle(_ACK, "acknowledged")

    def nack(self, delay: float = 0.0, reason: str = "requeued") -> None:
        """Requeue the item, to be redelivered after `delay` seconds, before all that was never delivered.

        After `max_attempts` deliveries it becomes a dead letter instead. Raises LeaseExpired, AlreadySettled.
        """
        self._settle(Nack(duration("delay", delay), checked_reason(reason)), "requeued")

    def reject(self, reason: str) -> None:
        """Make the item a dead letter with this reason. Raises LeaseExpired, AlreadySettled."""
        self._settle(Reject(checked_reason(reason)), "rejected")

    def extend(self, seconds: float) -> None:
        """Let the lease end so many seconds from now. Raises LeaseExpired, AlreadySettled."""
        self._extend(duration("seconds", seconds, positive=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._settled:
            return
        if error is None:
            with suppress(AlreadySettled):  # another thread was first
                self.ack()
            return
        try:
            self.nack(reason=reason_of(error))
        except SpoolError as problem:
            _log.warning("%s", problem)  # what the block raised goes on to the caller


class Loan(_Here):
    """An array in the very memory that readers will see, not yet an item.

    As a context manager it gives the array, and is put at the end of the block unless that was done by hand, or
    discarded when the block raises; by hand, with commit or discard. One that nobody holds any more and with which
    neither was done is discarded by the next loan of its writer, with a ResourceWarning.
    """

    def __init__(self, lent: Lent) -> None:
        self._lent = [lent]  # who takes it commits or discards it
        self._is_unwanted = False

    @property
    def array(self) -> Array:
        """The array, writable; what it holds at first is undefined. Raises AlreadySettled after its end as a loan."""
        try:
            return self._lent[0].array
        except IndexError:
            raise self._gone() from None

    def commit(self, block: bool = True, timeout: float | None = None) -> int:
        """Put the array, which is read-only from now on; returns its sequence number.

        block, timeout: wait for room, as `put` does. Raises what `put` raises, and then it stays a loan, unless `seqs`
        of the error says that it was put; AlreadySettled after a commit or discard, and while another thread commits.
        """
        try:
            lent = self._lent.pop()
        except IndexError:
            raise self._gone() from None
        try:
            return lent.commit(deadline_of(block, timeout))
        except BaseException as error:
            if not (isinstance(error, SpoolError) and error.seqs):
                self._lent.append(lent)
                if self._is_unwanted:
                    self.discard()
            raise

    def discard(self) -> None:
        """Put nothing. Harmless when repeated, and after the commit; while another thread commits, it is for the case
        that this fails."""
        self._is_unwanted = True
        try:
            lent = self._lent.pop()
        except IndexError:
            return
        try:
            lent.discard()
        except BaseException:
            self._lent.append(lent)
            raise

    def _gone(self) -> AlreadySettled:
        return AlreadySettled("this loan was committed or discarded before, or another thread commits it")

    def __enter__(self) -> Array:
        return self.array

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self._lent:
                self.commit()
        finally:
            self.discard()


def taken_item(consumer: Consumer, message: Message) -> Item:
    """The item that `Consumer.take` took off the spool: one that is settled."""
    item = Item(consumer, Delivery(message.seq, message.attempt, message.put_time, message.nbytes, None))
    item._message, item._settled = message, "acknowledged"
    return item


def checked_reason(reason: str) -> str:
    if not isinstance(reason, str):
        raise TypeError(f"reason must be a string, not {reason!r}")
    return reason


def reason_of(error: BaseException) -> str:
    if isinstance(error, GeneratorExit):
        return "the loop over the reader's items ended in it"
    return f"{type(error).__name__}: {error}"
