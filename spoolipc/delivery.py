"""Item: what a reader has received and not yet settled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from .engine import Array, Contents, Delivery, Payload, Source
from .errors import AlreadySettled, BadItem, LeaseExpired, SpoolError

_log = logging.getLogger("spoolipc")


class Item:
    """An item in a reader's hands.

    As a context manager it is acknowledged at the end of the block, or given back when the block raises; by hand,
    with ack, nack or reject.

    seq: sequence number. attempt: 1 at the first delivery. nbytes: bytes stored. Nothing of the arrays is
    read before `array` or `arrays` is asked for.
    """

    def __init__(self, source: Source, delivery: Delivery) -> None:
        self._source = source
        self._delivery = delivery
        self._contents: Contents | None = None
        self._payload: Payload | None = None
        self._settled = ""
        self.seq = delivery.seq
        self.attempt = delivery.attempt
        self.nbytes = delivery.size

    @property
    def settled(self) -> bool:
        """Whether the item was acknowledged, given back or rejected."""
        return bool(self._settled)

    @property
    def meta(self) -> Any:
        """What the writer gave as metadata, None if nothing; read without touching the arrays.

        Raises BadItem when the file is damaged: the item is then in `failed/`. LeaseExpired.
        """
        if self._payload is not None:
            return self._payload.meta
        return self._said().meta

    @property
    def put_time(self) -> float:
        """When the item was put, wall clock in seconds.

        Raises what `meta` raises: after the loss of the index only the file knows it.
        """
        return (self._delivery.put_time or self._said().put_time) / 1e9

    def _said(self) -> Contents:
        if self._contents is None:
            try:
                self._contents = self._source.contents(self._delivery)
            except BadItem:
                self._settled = "given up"
                raise
        return self._contents

    @property
    def array(self) -> Array:
        """The item's array, read-only: a view of the file's pages when it is over 16 KB.

        It stays as it is for as long as any view of it is left, whatever becomes of the item. Raises BadItem
        when the file is damaged (the item is then in `failed/`), LeaseExpired, TypeError when the item has
        named arrays.
        """
        payload = self._load()
        if payload.names is not None:
            raise TypeError(f"item {self.seq} has named arrays ({', '.join(payload.names)}); use item.arrays")
        return payload.arrays[0]

    @property
    def arrays(self) -> Mapping[str, Array]:
        """The item's named arrays, each a read-only view of the same file. An unnamed array is named ""."""
        payload = self._load()
        return dict(zip(payload.names or ("",), payload.arrays, strict=True))

    def _load(self) -> Payload:
        if self._payload is None:
            try:
                self._payload = self._source.load(self._delivery)
            except BadItem:
                self._settled = "given up"
                raise
        return self._payload

    def ack(self) -> None:
        """Take the item off the spool for good. Raises LeaseExpired, AlreadySettled."""
        self._settle("acknowledged", lambda: self._source.ack([self._delivery]))

    def nack(self, delay: float = 0.0, reason: str = "given back") -> None:
        """Give the item back, to be delivered again after `delay` seconds, before all that was never delivered.

        After `max_attempts` deliveries it becomes a dead letter instead. Raises LeaseExpired, AlreadySettled.
        """
        if not delay >= 0:
            raise ValueError(f"delay must be a non-negative number of seconds, not {delay!r}")
        self._settle("given back", lambda: self._source.nack(self._delivery, delay, reason))

    def reject(self, reason: str) -> None:
        """Give the item up: it becomes a dead letter in `failed/` with this reason.

        Raises LeaseExpired, AlreadySettled.
        """
        self._settle("rejected", lambda: self._source.reject(self._delivery, reason))

    def extend(self, seconds: float) -> None:
        """Keep the item in hand for so many seconds from now. Raises LeaseExpired, AlreadySettled."""
        if not seconds > 0:
            raise ValueError(f"a lease must be a positive number of seconds, not {seconds!r}")
        self._settle("", lambda: self._source.extend(self._delivery, seconds))

    def _settle(self, how: str, step: Callable[[], None]) -> None:
        if self._settled:
            raise AlreadySettled(f"item {self.seq} was {self._settled} before")
        try:
            step()
        except LeaseExpired:
            self._settled = "taken away when its lease ended"
            raise
        self._settled = how

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._settled:
            return
        if error is None:
            self.ack()
            return
        try:
            self.nack(reason=_said_by(error))
        except SpoolError as problem:
            _log.warning("%s", problem)  # what the block raised goes on to the caller

    def __repr__(self) -> str:
        return f"Item(seq={self.seq}, attempt={self.attempt}, {self._settled or 'in hand'})"


def _said_by(error: BaseException) -> str:
    if isinstance(error, GeneratorExit):
        return "the loop over the reader's items ended in it"
    return f"{type(error).__name__}: {error}"
