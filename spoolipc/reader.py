"""SpoolReader: the face that gets arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from . import words as W
from .engine import Array, Arrays, Payload, Source
from .errors import Empty, ShutDown
from .layout import Limits
from .source import DirectorySource
from .writer import deadline_of


class SpoolReader:
    """Gets arrays from a spool, each item by one reader, in the order in which they were put.

    path: the spool's directory, made (with mode 0700) by whoever comes first.
    maxsize, max_bytes: limits for a new spool, as SpoolWriter takes them.

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
    ) -> None:
        asked = Limits(maxsize, max_bytes, recycle_bytes, max_attempts, mode)
        self._directory = DirectorySource(path, asked)
        self._source: Source = self._directory

    @property
    def path(self) -> str:
        """The spool's directory, absolute."""
        return self._directory.party.path

    @property
    def maxsize(self) -> int:
        """Most items waiting, 0 for no limit."""
        return self._directory.party.look()[W.MAXSIZE]

    def get(self, block: bool = True, timeout: float | None = None, *, copy: bool = False) -> Arrays:
        """Take the next item off the spool: its array, or a dict of its named arrays.

        block, timeout: wait for an item, for ever or for `timeout` seconds; without `block` not at all.
        copy: return arrays of your own, writable. Otherwise they are read-only, and over 16 KB they are views
        of the item's file, which stays as it is for as long as any view of it is left.

        Raises Empty when no item comes in time, ShutDown when the spool was shut down and is empty.
        A damaged item is moved to `failed/` and the next one returned.
        """
        deadline = deadline_of(block, timeout)
        while True:
            try:
                (payload,) = self._source.get(1)
            except Empty:
                if deadline == 0.0 or not self._source.wait_items(deadline):
                    raise
            else:
                return _arrays(payload, copy)

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
        return SpoolReader, (self.path,)


def _arrays(payload: Payload, copy: bool) -> Arrays:
    arrays = tuple(map(_own, payload.arrays)) if copy else payload.arrays
    if payload.names is None:
        return arrays[0]
    return dict(zip(payload.names, arrays, strict=True))


def _own(array: Array) -> Array:
    return array.copy(order="K")
