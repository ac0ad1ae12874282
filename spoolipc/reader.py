"""SpoolReader: the face that gets arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from .delivery import Item
from .engine import Array, Arrays, Payload
from .errors import BadItem, Empty, LeaseExpired, ShutDown
from .layout import Limits
from .source import DirectorySource
from .writer import deadline_of

T = TypeVar("T")


class SpoolReader:
    """Gets arrays from a spool, each item by one reader, in the order in which they were put.

    path: the spool's directory, made (with mode 0700) by whoever comes first.
    maxsize, max_bytes, recycle_bytes, max_attempts, mode: limits, as SpoolWriter takes them.
    lease: seconds after which a received item that is not settled goes to another reader; None, only when
    this reader ends. `get` needs none.
    verify: compare every item that was put with a checksum with it; one that differs goes to `failed/`.

    Threads may share a reader; it can be pickled (another process opens the same path) and used after a fork.
    Raises LimitMismatch when the spool has other limits than those given, NotASpool, UnsafeSpool,
    NetworkFileSystem, UnknownVersion.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        maxsize: int | None = None,
        max_bytes: int | None = None,
        recycle_bytes: int | None = None,
        max_attempts: int | None = None,
        mode: int | None = None,
        lease: float | None = None,
        verify: bool = False,
    ) -> None:
        if lease is not None and not lease > 0:
            raise ValueError(f"lease must be a positive number of seconds, not {lease!r}")
        asked = Limits(maxsize, max_bytes, recycle_bytes, max_attempts, mode)
        self._verify = verify
        self._source = DirectorySource(path, asked, verify=verify)
        self._lease = lease

    @property
    def path(self) -> str:
        """The spool's directory, absolute."""
        return self._source.path

    @property
    def maxsize(self) -> int:
        """Most items waiting, 0 for no limit."""
        return self._source.maxsize

    def get(self, block: bool = True, timeout: float | None = None, *, copy: bool = False) -> Arrays:
        """Take the next item off the spool: its array, or a dict of its named arrays.

        block, timeout: wait for an item, for ever or for `timeout` seconds; without `block` not at all.
        copy: return arrays of your own, writable. Otherwise they are read-only, and over 16 KB they are views
        of the item's file, which stays as it is for as long as any view of it is left.

        Raises Empty when no item comes in time, ShutDown when the spool was shut down and is empty.
        A damaged item is moved to `failed/` and the next one returned.
        """
        return self._await(lambda last: self._take(1, copy, last), deadline_of(block, timeout))[0]

    def get_many(
        self, limit: int, block: bool = True, timeout: float | None = None, *, copy: bool = False
    ) -> list[Arrays]:
        """Take what waits, up to `limit` items, in one step; waits only for the first.

        Parameters and errors are those of `get`.
        """
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit!r}")
        return self._await(lambda last: self._take(limit, copy, last), deadline_of(block, timeout))

    def _take(self, limit: int, copy: bool, last: bool) -> list[Arrays]:
        """What waits, up to `limit` items. Raises Empty, ShutDown when there is nothing."""
        return [_arrays(payload, copy) for payload in self._source.get(limit, sure=last)]

    def _await(self, step: Callable[[bool], list[T]], deadline: float | None) -> list[T]:
        """The result of `step`, tried again whenever there may be an item; told when it is tried for the last time."""
        while True:
            try:
                return step(deadline == 0.0)
            except Empty:
                if deadline == 0.0:
                    raise
            if not self._source.wait_items(deadline):
                deadline = 0.0

    def get_nowait(self, *, copy: bool = False) -> Arrays:
        """Get without waiting: `get(block=False)`."""
        return self.get(block=False, copy=copy)

    def __iter__(self) -> Iterator[Arrays]:
        """Get item after item, until the spool was shut down and is empty."""
        while True:
            try:
                array = self.get()
            except ShutDown:
                return
            yield array
            del array  # not held while waiting for the next

    def receive(self, block: bool = True, timeout: float | None = None) -> Item:
        """Take the next item in hand, to be settled when the work on it is done.

            with reader.receive() as item:
                work(item.array)

        acknowledges it at the end, and gives it back when `work` raises, when this process dies, or when the
        lease ends. An item given back is delivered before all that was never delivered; after `max_attempts`
        it is a dead letter.

        Raises Empty when no item comes in time, ShutDown when the spool was shut down, nothing waits and
        nobody else has an item in hand.
        """
        (delivery,) = self._await(
            lambda last: self._source.claim(1, self._lease, sure=last), deadline_of(block, timeout)
        )
        return Item(self._source, delivery)

    def items(self) -> Iterator[Item]:
        """Receive item after item, until the spool was shut down and has ended.

        Each is acknowledged when the next is asked for, unless it was settled by hand; one whose loop body
        raises or breaks is given back.
        """
        while True:
            try:
                item = self.receive()
            except ShutDown:
                return
            with item:
                yield item

    def peek(self, block: bool = True, timeout: float | None = None) -> Peeked:
        """Look at the next item and leave it where it is: its number, times and metadata, not its arrays.

        Another reader may take it at any moment. Raises Empty, ShutDown, as `receive` does. A damaged item is
        moved to `failed/` and the next one looked at.
        """

        def look(_: bool) -> list[Peeked]:
            while True:
                delivery = self._source.peek()
                try:
                    names, meta, put_time = self._source.contents(delivery)
                except (BadItem, LeaseExpired):
                    continue  # damaged, or taken by somebody else meanwhile
                return [Peeked(delivery.seq, delivery.attempt, put_time / 1e9, delivery.size, names, meta)]

        return self._await(look, deadline_of(block, timeout))[0]

    def qsize(self) -> int:
        """How many items wait; another process may change that at any moment."""
        return self._source.qsize()

    def empty(self) -> bool:
        """Whether no item waits."""
        return not self._source.qsize()

    def close(self) -> None:
        """Leave the spool; arrays it returned stay valid. Harmless when repeated."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SpoolReader({self.path!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self._lease, self._verify)


@dataclass(frozen=True, slots=True)
class Peeked:
    """The next item as it waits. attempt: deliveries so far. put_time: wall clock in seconds. nbytes: bytes
    stored. names: of its arrays, None for a single unnamed one."""

    seq: int
    attempt: int
    put_time: float
    nbytes: int
    names: tuple[str, ...] | None
    meta: Any


def _reopened(path: str, lease: float | None, verify: bool) -> SpoolReader:
    return SpoolReader(path, lease=lease, verify=verify)


def _arrays(payload: Payload, copy: bool) -> Arrays:
    arrays = tuple(map(_own, payload.arrays)) if copy else payload.arrays
    if payload.names is None:
        return arrays[0]
    return dict(zip(payload.names, arrays, strict=True))


def _own(array: Array) -> Array:
    return array.copy(order="K")
