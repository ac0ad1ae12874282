"""SpoolWriter and SpoolReader: the two faces of a spool. They check arguments and make one engine call each."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import numpy as np
from numpy import ndarray
from numpy.typing import DTypeLike

from .connect import connect
from .engine import (
    Consumer,
    ConsumerOptions,
    Durability,
    End,
    Lender,
    Preallocator,
    Producer,
    ProducerOptions,
    Restorer,
    Session,
)
from .errors import ShutDown, UnsupportedArray, UnsupportedOperation
from .format.item import copied, copied_into, plain
from .item import Item, Loan, taken_item
from .message import (
    Array,
    Arrays,
    ArraySpec,
    Copy,
    Json,
    Limits,
    Message,
    Peeked,
    Puttable,
    deadline_of,
    duration,
    flag,
    joined,
    on_write,
    one_of,
    whole,
)

T = TypeVar("T")
_new = tuple.__new__  # a Message made without a call of Python code: `put` is a few microseconds


class Face:
    """What all faces share."""

    _session: Session

    @property
    def path(self) -> str:
        """The spool's directory, absolute, or its URL."""
        return self._session.path

    @property
    def maxsize(self) -> int:
        """Most items waiting, 0 for no limit."""
        return self._session.maxsize

    def qsize(self) -> int:
        """How many items wait; another process may change that at any moment."""
        return self._session.qsize()

    def empty(self) -> bool:
        """Whether no item waits."""
        return not self._session.qsize()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"


class _BlockingFace(Face):
    """What both sides share where their calls block."""

    _crosses_processes: bool

    def close(self) -> None:
        """Leave the spool; arrays that it gave out stay valid. Harmless when repeated."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pickled(self, opened: ProducerOptions | ConsumerOptions, **more: Any) -> tuple[Any, ...]:
        """What `__reduce__` returns: the same path opened in the same way; its limits are there already."""
        if not self._crosses_processes:
            raise UnsupportedOperation(f"{self!r} cannot be pickled: no other process can open {self.path}")
        face: Any = type(self)
        return partial(face, self.path, mode=opened.limits.mode, create=opened.create, **more), ()


class SpoolWriter(_BlockingFace):
    """Puts arrays into a spool, which any number of other processes may write and read.

    path: the spool's directory, made (with mode 0700) by whoever comes first; or a URL: `memory://NAME` is a spool
    of this process alone, `nats://HOST:PORT/NAME` one on servers, for several machines.
    limits: the spool's limits; each may as well be given by its name beside it.
    maxsize: most items waiting, 0 for no limit; None takes what the spool has, or 0 for a new one.
    max_bytes: most bytes of items waiting or in flight, each counted as its whole file, in pages of 4 KB; likewise.
    recycle_bytes: most bytes of consumed files kept to be written again, 0 for none; likewise, or 1 GiB for a new one.
    max_attempts: deliveries after which an item that fails again is a dead letter, 0 for no limit; likewise, or 5.
    mode: 0o700, or 0o770 to share the spool with the group of its directory; likewise, or 0o700.
    durability: "none", what was put survives the crash of any process; "fsync", also the loss of power.
    reopen: take puts again if the spool was shut down.
    create: False, raise NotASpool where there is no spool, rather than make one.
    fresh: begin with an empty spool, as if it were new: what waits is removed, it takes puts again, and limits given
    here are in force, whatever they were. Readers that wait stay; dead letters too.
    checksum: store a CRC-32 with every item, for `SpoolReader(verify=True)` and `spoolipc fsck`; it costs about three
    times what writing a large array does.
    preallocate: (count, nbytes) fills the pool of files that are written again up to `count` arrays of
    `nbytes` bytes, so that the first puts are as fast as the later ones: those of all writers but with
    durability="fsync", which write no file again. They take half of what the file system has free at most, and go when
    the last session leaves.

    Threads may share a writer; it can be pickled (another process opens the same path) and used after a fork,
    unless its spool is in memory.
    Raises LimitMismatch when the spool has other limits than those given, SpoolInUse when it is to be fresh and another
    writer has it open or a reader has items in flight, NotASpool, UnsafeSpool, NetworkFileSystem, UnknownVersion.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        limits: Limits | None = None,
        maxsize: int | None = None,
        max_bytes: int | None = None,
        recycle_bytes: int | None = None,
        max_attempts: int | None = None,
        mode: int | None = None,
        durability: Durability = "none",
        reopen: bool = False,
        fresh: bool = False,
        create: bool = True,
        preallocate: tuple[int, int] | None = None,
        checksum: bool = False,
    ) -> None:
        one_of("durability", durability, "none", "fsync")
        asked = joined(limits, Limits(maxsize, max_bytes, recycle_bytes, max_attempts, mode))
        flags = flag("reopen", reopen), flag("checksum", checksum), flag("fresh", fresh)
        options = ProducerOptions(asked, durability, *flags, flag("create", create))
        ahead = None if preallocate is None else _count_and_nbytes(preallocate)
        engine = connect(path)
        self._crosses_processes = engine.crosses_processes
        self._options = options
        self._producer: Producer = engine.producer(options)
        self._session = self._producer
        if ahead is not None:
            try:
                if not isinstance(self._producer, Preallocator):
                    what = "nothing can be made ahead here; leave preallocate out, or use a directory"
                    raise UnsupportedOperation(f"{self.path}: {what}")
                self._producer.preallocate(*ahead)
            except BaseException:
                self.close()
                raise

    def put(
        self,
        array: Puttable | Mapping[str, Puttable],
        block: bool = True,
        timeout: float | None = None,
        *,
        meta: Json = None,
    ) -> int:
        """Put an array, or several named arrays as one item; returns its sequence number.

        array: any dtype that np.save can store without pickle, or what lends its memory by `__dlpack__` (a tensor) or
        as a buffer (`memoryview`, `array.array`); it is read before put returns, never kept.
        block, timeout: wait for room, for ever or for `timeout` seconds; without `block` not at all. To store the item
        may take longer.
        meta: any JSON value, delivered with the item; up to 100 levels, no NaN or infinity. A tuple becomes a list.

        An item has up to 1,024 arrays, and 1 MiB of names and meta; on servers `max_payload` less 4 KiB of these.
        Raises Full when there is no room in time, ShutDown when the spool was shut down, TooLarge when the
        array could never fit, UnsupportedArray (a TypeError) for object arrays and what only converts to an array,
        StorageError.
        """
        until = None if block is True and timeout is None else deadline_of(block, timeout)
        if type(array) is not ndarray:
            return self._producer.put((message_of(array, meta),), until)[0]
        return self._producer.put((_new(Message, ((array,), None, meta, 0, "", 0, 0, 0)),), until)[0]

    def put_many(
        self,
        arrays: Iterable[Puttable | Mapping[str, Puttable]],
        block: bool = True,
        timeout: float | None = None,
        *,
        metas: Iterable[Json] | None = None,
    ) -> list[int]:
        """Put several arrays, up to 64 in one step; returns their sequence numbers in order.

        metas: one for each array. Other parameters and errors are those of `put`; `timeout` is for all of
        them together. Each item is put whole or not at all, and an error tells in its `seqs` which were before it:
        that an array is TooLarge is found when its turn comes.
        """
        until = deadline_of(block, timeout)
        return self._producer.put(messages_of(arrays, metas), until)

    def put_nowait(self, array: Puttable | Mapping[str, Puttable], *, meta: Json = None) -> int:
        """Put without waiting: `put(array, block=False)`."""
        return self.put(array, block=False, meta=meta)

    def loan(
        self,
        shape: int | tuple[int, ...],
        dtype: DTypeLike = float,
        *,
        order: Literal["C", "F"] = "C",
        block: bool = True,
        timeout: float | None = None,
        meta: Json = None,
    ) -> Loan:
        """Compute an array in the very memory that readers will see, and put it without a copy.

            with writer.loan((1080, 1920, 3), np.uint8) as frame:
                camera.read_into(frame)

        shape, dtype, order: as for np.empty; what the array holds at first is undefined.
        block, timeout, meta: as for `put`: room is waited for here, when the array is lent, and where there is none any
        more at the end of the block, for ever, before the item is put. When the block raises, nothing is put.

        Of several loans the one committed first arrives first; of blocks within one another that is the inner one. To
        choose the order, commit by hand:

            left, right = writer.loan(shape), writer.loan(shape)
            stereo.read_into(left.array, right.array)
            left.commit()
            right.commit()

        The array is writable until the commit and read-only after it; views made of it before must not be written any
        more. Raises what `put` raises; UnsupportedOperation when the engine cannot lend.
        """
        producer = self._producer
        if not isinstance(producer, Lender):
            raise UnsupportedOperation(f"{self.path}: cannot lend arrays; compute the array and put it")
        return Loan(producer.loan(_spec(shape, dtype, order), meta, deadline_of(block, timeout)))

    def full(self) -> bool:
        """Whether `maxsize` items wait, or a put has been waiting for what the file system lacks."""
        return self._producer.full()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until all is done that was put into the spool before this call, by whomever: each of these items is off
        the spool (acknowledged, got, removed) or a dead letter.

        timeout: seconds to wait at most. Returns whether all is done. An item that nobody receives is never done.
        """
        return not self._producer.join(deadline_of(True, timeout))

    def shutdown(self, immediate: bool = False) -> None:
        """End the spool for every process: puts raise ShutDown from now on, and gets do when it is empty.

        immediate: gets raise at once, and what waits is removed.
        """
        self._producer.shutdown(flag("immediate", immediate))

    def __reduce__(self) -> tuple[Any, ...]:
        options = self._options
        return self._pickled(options, durability=options.durability, checksum=options.checksum)


class SpoolReader(_BlockingFace):
    """Gets arrays from a spool, each item by one reader, in the order in which they were put.

    path: the spool's directory, made (with mode 0700) by whoever comes first; or a URL, as SpoolWriter takes it.
    limits, maxsize, max_bytes, recycle_bytes, max_attempts, mode: limits, as SpoolWriter takes them.
    lease: seconds after which a received item that is not settled goes to another reader; None, only when
    this reader ends. `get` needs none.
    verify: compare every item that was put with a checksum with it; one that differs is a dead letter.
    create: False, raise NotASpool where there is no spool, rather than make one.
    end: when loops over this reader end and `get` raises ShutDown. "shutdown": after `SpoolWriter.shutdown`. "writers":
    also when no item waits or is delayed, no other reader has one in flight, and no writer has the spool open; not
    before there was a writer, or an item, since this reader was opened. A writer that is forked counts from the fork,
    also one that the child never uses; one that is pickled from when it is opened: keep another open until then.

    Threads may share a reader; it can be pickled (another process opens the same path) and used after a fork,
    unless its spool is in memory.
    Raises LimitMismatch when the spool has other limits than those given, NotASpool, UnsafeSpool,
    NetworkFileSystem, UnknownVersion.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        limits: Limits | None = None,
        maxsize: int | None = None,
        max_bytes: int | None = None,
        recycle_bytes: int | None = None,
        max_attempts: int | None = None,
        mode: int | None = None,
        lease: float | None = None,
        verify: bool = False,
        create: bool = True,
        end: End = "shutdown",
    ) -> None:
        asked = joined(limits, Limits(maxsize, max_bytes, recycle_bytes, max_attempts, mode))
        one_of("end", end, "shutdown", "writers")
        options = ConsumerOptions(asked, flag("verify", verify), flag("create", create), end)
        self._lease = None if lease is None else duration("lease", lease, positive=True)
        engine = connect(path)
        self._crosses_processes = engine.crosses_processes
        self._options = options
        self._consumer: Consumer = engine.consumer(options)
        self._session = self._consumer

    def get(
        self,
        block: bool = True,
        timeout: float | None = None,
        *,
        copy: Copy = False,
        out: Array | None = None,
    ) -> Arrays:
        """Take the next item off the spool: its array, or a dict of its named arrays.

        block, timeout: wait for an item, for ever or for `timeout` seconds; without `block` not at all.
        copy: False, the arrays are read-only, and over 16 KB they are views of the item's file, which stays as it is
        for as long as any view of it is left; "on-write", they are writable, and a page is copied when it is first
        written, which nobody else sees; True, they are writable and your own, and the file is not needed any more.
        out: an array of your own, which is filled and returned; ValueError for an item of another dtype or shape, or
        of named arrays, which then stays the next one.

        Raises Empty when no item comes in time, ShutDown when the spool was shut down and is empty.
        A damaged item becomes a dead letter and the next one is returned.
        """
        until = None if block is True and timeout is None else deadline_of(block, timeout)
        if out is not None:
            filling = self._filling(out, copy)  # which refuses what is wrong before anything is taken
            return self._given(self._consumer.take(1, until), False, filling)[0]
        if copy is not False:
            return self._given(self._consumer.take(1, until, on_write(copy)), copy, arrays_of)[0]
        taken = self._consumer.take(1, until)
        message = taken[0]
        if message.names is None:
            return message.arrays[0]
        return self._given(taken, False, arrays_of)[0]

    def _given(self, taken: list[Message], copy: Copy, make: Callable[[Message], T]) -> list[T]:
        """What the caller gets of what was taken. What he does not get waits again: all of it after an interrupt, what
        is left where an array cannot be copied for want of memory."""
        given: list[T] = []
        try:
            for message in taken:
                given.append(make(copied(message) if copy and not on_write(copy) else message))
        except BaseException as error:
            kept = len(given) if isinstance(error, MemoryError) else 0
            self._put_back(taken, kept)
            if not kept:
                raise
        return given

    def _put_back(self, taken: list[Message], start: int = 0) -> None:
        if isinstance(self._consumer, Restorer):
            self._consumer.put_back(taken, start)

    def take(self, block: bool = True, timeout: float | None = None, *, copy: Copy = False) -> Item:
        """Take the next item off the spool, as `get` does, with all that is known of it.

        The `Item` has its array or arrays, meta, seq and put_time, and is settled already. Parameters and errors are
        those of `get`.
        """
        found = self._consumer.take(1, deadline_of(block, timeout), on_write(copy))
        return self._given(found, copy, partial(taken_item, self._consumer))[0]

    def _filling(self, out: Array, copy: Copy) -> Callable[[Message], Arrays]:
        """What fills `out` with a message's array. Raises ValueError where that is no array to be filled."""
        if not isinstance(out, np.ndarray) or not out.flags.writeable or out.dtype.hasobject:
            raise ValueError(
                f"out must be a writable array of numbers, as np.empty(shape, dtype) gives, not {out!r}"
            )
        if on_write(copy) or copy:
            raise ValueError("out is an array of your own already; leave copy away")
        if not isinstance(self._consumer, Restorer):
            raise UnsupportedOperation(
                f"{self.path}: cannot put an item back that does not fit into out; get a copy"
            )
        return lambda message: copied_into(message, out)

    def get_many(
        self, limit: int, block: bool = True, timeout: float | None = None, *, copy: Copy = False
    ) -> list[Arrays]:
        """Take what waits, up to `limit` items; waits only for the first. After each 64 others have a turn.

        Other parameters and errors are those of `get`.
        """
        limit, until = whole("limit", limit, 1), deadline_of(block, timeout)
        found, given = list[list[Message]](), list[Arrays]()
        try:  # what is taken is stored by a call in C, before an interrupt can come between the two
            found.extend(map(self._consumer.take, (limit,), (until,), (on_write(copy),)))
            given.extend(self._given(found[0], copy, arrays_of))
        except BaseException:
            for taken in found:
                self._put_back(taken)
            raise
        return given

    def get_nowait(self, *, copy: Copy = False) -> Arrays:
        """Get without waiting: `get(block=False)`."""
        return self.get(block=False, copy=copy)

    def __iter__(self) -> Iterator[Arrays]:
        """Get item after item, until the spool was shut down and is empty."""
        return self.arrays()

    def arrays(self, *, copy: Copy = False) -> Iterator[Arrays]:
        """Get item after item, as iteration does; `copy` is that of `get`."""
        while True:
            try:
                array = self.get(copy=copy)
            except ShutDown:
                return
            yield array
            del array  # not held while waiting for the next

    def receive(self, block: bool = True, timeout: float | None = None, *, copy: Copy = False) -> Item:
        """Take the next item in flight, to be settled when the work on it is done.

            with reader.receive() as item:
                work(item.array)

        acknowledges it at the end, and requeues it when `work` raises, when this process dies, or when the
        lease ends. An item requeued is delivered before all that was never delivered; after `max_attempts`
        it is a dead letter. `copy` is that of `get`, for the item's arrays.

        Raises Empty when no item comes in time, ShutDown when the spool was shut down, nothing waits and
        nobody else has an item in flight.
        """
        until = None if block is True and timeout is None else deadline_of(block, timeout)
        if copy is not False:
            on_write(copy)  # or it is a ValueError, before anything is received
        return Item(self._consumer, self._consumer.claim(1, self._lease, until)[0], copy)

    def items(self, *, copy: Copy = False) -> Iterator[Item]:
        """Receive item after item, until the spool was shut down and has ended; `copy` is that of `get`.

        Each is acknowledged when the next is asked for, unless it was settled by hand; one whose loop body
        raises or breaks is requeued.
        """
        while True:
            try:
                item = self.receive(copy=copy)
            except ShutDown:
                return
            with item:
                yield item
            del item  # nor its array

    def peek(self, block: bool = True, timeout: float | None = None) -> Peeked:
        """Look at the next item and leave it where it is: its number, times and metadata, not its arrays.

        Another reader may take it at any moment. Raises Empty, ShutDown, as `receive` does. A damaged item
        becomes a dead letter and the next one is looked at.
        """
        return self._consumer.peek(deadline_of(block, timeout))

    def __reduce__(self) -> tuple[Any, ...]:
        options = self._options
        return self._pickled(options, lease=self._lease, verify=options.verify, end=options.end)


def _count_and_nbytes(preallocate: tuple[int, int]) -> tuple[int, int]:
    try:
        count, nbytes = preallocate
    except (TypeError, ValueError):
        what = "(count, nbytes), as (8, 6_220_800) for 8 arrays of so many bytes"
        raise ValueError(f"preallocate must be {what}, not {preallocate!r}") from None
    return whole("the count of preallocate", count), whole("nbytes of preallocate", nbytes)


def _spec(shape: int | tuple[int, ...], dtype: DTypeLike, order: Literal["C", "F"]) -> ArraySpec:
    """What np.empty would make of these."""
    unit = np.empty((), dtype)  # gives "S" a length and a subarray its dimensions
    sizes = tuple(map(operator.index, shape)) if np.iterable(shape) else (operator.index(shape),)
    return ArraySpec(sizes + unit.shape, unit.dtype, order)


def messages_of(
    arrays: Iterable[Puttable | Mapping[str, Puttable]], metas: Iterable[Json] | None
) -> list[Message]:
    """The messages of what `put_many` is given."""
    several = list(arrays)
    given = [None] * len(several) if metas is None else list(metas)
    if len(given) != len(several):
        raise ValueError(f"{len(several)} arrays but {len(given)} metas; give one for each")
    return [message_of(array, meta) for array, meta in zip(several, given, strict=True)]


def message_of(array: Puttable | Mapping[str, Puttable], meta: Json) -> Message:
    if not isinstance(array, Mapping):
        return Message((plain(array),), None, meta)
    if not array:
        raise ValueError("an item needs at least one array; the mapping given is empty")
    for name in array:
        if not isinstance(name, str):
            raise UnsupportedArray(f"the names of an item's arrays must be strings, not {name!r}")
    return Message(tuple(map(plain, array.values())), tuple(array), meta)


def arrays_of(message: Message) -> Arrays:
    """What `get` returns of a message."""
    names, arrays = message.names, message.arrays
    return arrays[0] if names is None else dict(zip(names, arrays, strict=True))
