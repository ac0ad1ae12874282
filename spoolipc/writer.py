"""SpoolWriter: the face that puts arrays."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import DTypeLike

from . import npy
from .engine import Array, Payload
from .errors import Full, ShutDown, UnsupportedArray
from .layout import Limits
from .sink import DirectorySink, Durability
from .stock import MOST_SPARES

AT_ONCE = MOST_SPARES


class SpoolWriter:
    """Puts arrays into a spool, which any number of other processes may write and read.

    path: the spool's directory, made (with mode 0700) by whoever comes first.
    maxsize: most items waiting, 0 for no limit; None takes what the spool has, or 0 for a new one.
    max_bytes: most bytes of items waiting or in flight; likewise.
    durability: "none", what was put survives the crash of any process; "fsync", also the loss of power.
    reopen: take puts again if the spool was shut down.
    checksum: store a CRC-32 with every item, for `SpoolReader(verify=True)` and `spoolipc fsck`; it costs about three
    times what writing a large array does.
    preallocate: (count, nbytes) fills the pool of files that are written again up to `count` arrays of
    `nbytes` bytes, so that the first puts are as fast as the later ones.

    Threads may share a writer; it can be pickled (another process opens the same path) and used after a fork.
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
        durability: Durability = "none",
        reopen: bool = False,
        preallocate: tuple[int, int] | None = None,
        checksum: bool = False,
    ) -> None:
        if durability not in ("none", "fsync"):
            raise ValueError(f'durability must be "none" or "fsync", not {durability!r}')
        asked = Limits(maxsize, max_bytes, recycle_bytes, max_attempts, mode)
        self._durability: Durability = durability
        self._checksum = checksum
        self._sink = DirectorySink(path, asked, durability, reopen=reopen, checksum=checksum)
        if preallocate is not None:
            try:
                self._sink.preallocate(*preallocate)
            except BaseException:
                self.close()
                raise

    @property
    def path(self) -> str:
        """The spool's directory, absolute."""
        return self._sink.path

    @property
    def maxsize(self) -> int:
        """Most items waiting, 0 for no limit."""
        return self._sink.maxsize

    def put(
        self,
        array: Array | Mapping[str, Array],
        block: bool = True,
        timeout: float | None = None,
        *,
        meta: Any = None,
    ) -> int:
        """Put an array, or several named arrays as one item; returns its sequence number.

        array: any dtype that np.save can store without pickle; it is read before put returns, never kept.
        block, timeout: wait for room, for ever or for `timeout` seconds; without `block` not at all.
        meta: any JSON value, delivered with the item.

        Raises Full when there is no room in time, ShutDown when the spool was shut down, TooLarge when the
        array could never fit, UnsupportedArray (a TypeError) for object arrays and what is not an array,
        StorageError.
        """
        deadline = deadline_of(block, timeout)
        if meta is not None or type(array) is not np.ndarray:
            return self._put([_payload(array, meta)], deadline)[0]
        while True:
            seqs = self._sink.put_again((array,))
            if seqs:
                return seqs[0]
            payload = _payload(array, None)
            if self._sink.admit(payload):
                return self._put([payload], deadline)[0]
            self._wait(payload, deadline)

    def put_many(
        self,
        arrays: Iterable[Array | Mapping[str, Array]],
        block: bool = True,
        timeout: float | None = None,
        *,
        metas: Iterable[Any] | None = None,
    ) -> list[int]:
        """Put several arrays, up to 64 in one step; returns their sequence numbers in order.

        metas: one for each array. Other parameters and errors are those of `put`; `timeout` is for all of
        them together. Each item is put whole or not at all, and Full and ShutDown tell in their `seqs` which
        were.
        """
        deadline = deadline_of(block, timeout)
        several = list(arrays)
        given = [None] * len(several) if metas is None else list(metas)
        if len(given) != len(several):
            raise ValueError(f"{len(several)} arrays but {len(given)} metas; give one for each")
        payloads = [_payload(array, meta) for array, meta in zip(several, given, strict=True)]
        seqs: list[int] = []
        plain = metas is None and all(type(array) is np.ndarray for array in several)
        try:
            batch = payloads[:AT_ONCE]
            while batch:
                self._sink.stock(batch)
                again = self._sink.put_again([payload.arrays[0] for payload in batch]) if plain else []
                seqs += again
                self._put(batch[len(again) : len(again) + 1] if again else batch, deadline, seqs)
                batch = payloads[len(seqs) : len(seqs) + AT_ONCE]
        except (Full, ShutDown) as error:
            error.seqs = tuple(seqs)
            raise
        return seqs

    def _put(
        self, payloads: list[Payload], deadline: float | None, seqs: list[int] | None = None
    ) -> list[int]:
        """Prepare and commit, waiting for room wherever it is lacking."""
        sink = self._sink
        seqs = [] if seqs is None else seqs
        drafts: list[Any] = []
        try:
            for payload in payloads:
                while not sink.admit(payload):
                    self._give_way(drafts, seqs, payload, deadline)
                drafts.append(self._prepared(payload, drafts, seqs, deadline))
            while drafts:
                self._commit_some(drafts, seqs, deadline)
        finally:
            for draft in drafts:
                sink.discard(draft)
        return seqs

    def _prepared(self, payload: Payload, drafts: list[Any], seqs: list[int], deadline: float | None) -> Any:
        while True:
            try:
                return self._sink.prepare(payload)
            except Full:
                self._give_way(drafts, seqs, payload, deadline)

    def _give_way(self, drafts: list[Any], seqs: list[int], payload: Payload, deadline: float | None) -> None:
        """Wait for room, having committed what is ready: nobody could make room by taking that otherwise."""
        if drafts:
            self._commit_some(drafts, seqs, deadline)
        else:
            self._wait(payload, deadline)

    def _commit_some(self, drafts: list[Any], seqs: list[int], deadline: float | None) -> None:
        try:
            done = self._sink.commit(drafts)
        except Full:
            self._wait(drafts[0].payload, deadline)
        else:
            seqs += done
            del drafts[: len(done)]

    def _wait(self, payload: Payload, deadline: float | None) -> None:
        late = deadline is not None and time.monotonic() >= deadline
        if late or not self._sink.wait_space(payload, deadline):
            raise Full(f"the spool {self.path} had no room in time")

    @contextmanager
    def loan(
        self,
        shape: int | tuple[int, ...],
        dtype: DTypeLike = float,
        *,
        order: Literal["C", "F"] = "C",
        block: bool = True,
        timeout: float | None = None,
        meta: Any = None,
    ) -> Iterator[Array]:
        """Compute an array in the very memory that readers will see, and put it without a copy.

            with writer.loan((1080, 1920, 3), np.uint8) as frame:
                camera.read_into(frame)

        shape, dtype, order: as for np.empty; what the array holds at first is undefined.
        block, timeout, meta: as for `put`, when the block begins; at its end the item is put, waiting for
        room for ever. When the block raises, nothing is put.

        The array is writable within the block and read-only after it; views made of it within the block must
        not be written any more. Raises what `put` raises.
        """
        template: Array = np.empty(shape, dtype, order)
        payload = _payload(template, meta)
        deadline = deadline_of(block, timeout)
        while not self._sink.admit(payload):
            self._wait(payload, deadline)
        while True:
            try:
                draft, array = self._sink.lend(template, meta)
                break
            except Full:
                self._wait(payload, deadline)
        del template, payload
        drafts = [draft]
        try:
            yield array
            array.flags.writeable = False
            del array
            self._sink.finish(draft)
            while drafts:
                self._commit_some(drafts, [], None)
        finally:
            for left in drafts:
                self._sink.discard(left)

    def put_nowait(self, array: Array | Mapping[str, Array], *, meta: Any = None) -> int:
        """Put without waiting: `put(array, block=False)`."""
        return self.put(array, block=False, meta=meta)

    def qsize(self) -> int:
        """How many items wait; another process may change that at any moment."""
        return self._sink.qsize()

    def empty(self) -> bool:
        """Whether no item waits."""
        return not self._sink.qsize()

    def full(self) -> bool:
        """Whether `maxsize` items wait."""
        return self._sink.full()

    def shutdown(self, immediate: bool = False) -> None:
        """End the spool for every process: puts raise ShutDown from now on, and gets do when it is empty.

        immediate: gets raise at once, and what waits is removed.
        """
        self._sink.shutdown(immediate)

    def close(self) -> None:
        """Leave the spool; harmless when repeated."""
        self._sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SpoolWriter({self.path!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self._durability, self._checksum)


def _reopened(path: str, durability: Durability, checksum: bool) -> SpoolWriter:
    return SpoolWriter(path, durability=durability, checksum=checksum)


def deadline_of(block: bool, timeout: float | None) -> float | None:
    """The monotonic time in seconds until which to wait: None for ever, the past for not at all.

    Raises ValueError for a negative timeout.
    """
    if not block:
        return 0.0
    if timeout is None:
        return None
    if not timeout >= 0:
        raise ValueError(f"timeout must be a non-negative number of seconds, not {timeout!r}")
    return time.monotonic() + timeout


def _payload(array: Array | Mapping[str, Array], meta: Any) -> Payload:
    if not isinstance(array, Mapping):
        return Payload((npy.plain(array),), None, meta)
    if not array:
        raise ValueError("an item needs at least one array; the mapping given is empty")
    for name in array:
        if not isinstance(name, str):
            raise UnsupportedArray(f"the names of an item's arrays must be strings, not {name!r}")
    return Payload(tuple(map(npy.plain, array.values())), tuple(array), meta)
