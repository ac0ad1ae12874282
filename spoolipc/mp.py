"""Queue and JoinableQueue: the queues of `multiprocessing`, over a spool.

A queue is handed to another process as those are: it is inherited by a fork, or pickled into what a process is started
with, and then it names its path. Its spool is a temporary one (`directory/temporary.py`) unless it was given a path.
Items that are not one array are packed (`format/values.py`) or, where that was asked for, pickled, their large buffers
beside the pickle as arrays of the item.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing import context, reduction, util
from types import GenericAlias
from typing import Any, Final

import numpy as np

from .connect import connect, shown
from .directory import temporary
from .engine import Pair, Pairing, Restorer, Source
from .errors import BadItem, Empty, ShutDown, SpoolClosed, UnsupportedItem, UnsupportedOperation
from .format.values import Values
from .message import NOW, Array, Deadline, Delivery, Limits, Message, Reject, deadline_of, flag, whole

_log = logging.getLogger("spoolipc")
_PICKLE: Final = 0x80
"""The first byte of a pickle, and of no JSON."""
_LONG: Final = 1024  # bytes from which a buffer of a pickle is an array beside it
_MANY: Final = 1000  # arrays from which on buffers stay in the pickle, as an item has 1024 at most
_TRIES: Final = 8  # of those that wait to be delivered again, to find one
_LAST: Final = -100
"""When a queue is left at the end of its process: after those it started, which may still have to open it."""


class _Use:
    """An open queue as it is left: by `close`, by collection, at the end of the process. fd: of a temporary spool."""

    def __init__(self, path: str, fd: int | None, limits: Limits) -> None:
        self.path = path
        self.fd = fd
        try:
            engine = connect(path)
            if not isinstance(engine, Pairing):
                what = "a Queue passes between processes; give the path of a directory, or none"
                raise UnsupportedOperation(f"{path}: {what}")
            self.pair: Pair = engine.pair(limits)
        except BaseException:
            self._let_go()
            raise

    def leave(self) -> None:
        """Use the spool no more. Harmless when repeated."""
        try:
            self.pair.close()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        fd, self.fd = self.fd, None
        if fd is not None:
            temporary.leave(self.path, fd)


class Queue:
    """A queue between processes with the interface of `multiprocessing.Queue`; large arrays pass at memory speed.

    maxsize: most items waiting, 0 for no limit.
    path: the directory of the spool, made where there is none, and left there. None makes a temporary one: on
    `/dev/shm` where 512 MiB are free, else in the directory for temporary files. It is removed with the last process
    that uses it, or, where that was killed, by the next queue that is made or `spoolipc gc --temporary`.
    types: dataclasses, named tuples and exceptions that items are made of, beside Python's own types.
    allow_pickle: take any item that pickle takes. Whoever can write to the spool can then run code in the processes
    that get from it, so it must be a private directory of this machine. Where you would not unpickle a file that such a
    process wrote, leave it out.
    writable: arrays come out writable, as private pages that are copied where they are written; else they are
    read-only views.
    mode: 0o770 to share the spool with the group of its directory.
    ctx: taken and not needed: a queue goes to processes of every start method.

    Items are arrays, None, bool, int, float, complex, str, bytes, datetime, date, timedelta, NumPy scalars, exceptions,
    and lists, tuples, sets, dicts and `types` of these; they come out with the types they had. Threads may share it.
    Raises LimitMismatch when the path has another maxsize, StorageError, ValueError, TypeError; see also SpoolWriter.
    """

    __class_getitem__: Any = classmethod(GenericAlias)  # Queue[int] in annotations

    def __init__(
        self,
        maxsize: int = 0,
        *,
        path: str | os.PathLike[str] | None = None,
        types: Iterable[type] = (),
        allow_pickle: bool = False,
        writable: bool = False,
        mode: int | None = None,
        ctx: object = None,
    ) -> None:
        most = whole("maxsize", max(0, maxsize) if isinstance(maxsize, int) else maxsize)
        self._set(Values(types), flag("allow_pickle", allow_pickle), flag("writable", writable))
        if self._pickles:
            if mode not in (None, 0o700):
                raise ValueError(
                    "allow_pickle needs a private directory: others could run code here; leave mode out"
                )
            if path is not None and "://" in os.fsdecode(path):
                raise ValueError(f"allow_pickle needs a directory of this machine, not {shown(path)}")
            mode = 0o700
        limits = Limits(maxsize=most if path is None else most or None, mode=mode)
        if path is not None:
            self._open(os.fsdecode(path), None, limits)
            return
        if removed := temporary.remove_temporary():
            _log.info("removed temporary spools that nobody uses any more: %s", ", ".join(removed))
        made, fd = temporary.make()
        self._open(made, fd, limits)
        _log.info("made a temporary spool: %s", self.path)

    def _set(self, values: Values, pickles: bool, writable: bool) -> None:
        self._values, self._pickles, self._writable = values, pickles, writable
        self._is_closed = False

    def _open(self, path: str, fd: int | None, limits: Limits) -> None:
        self._use = _Use(path, fd, limits)
        self._pair, self._mode = self._use.pair, limits.mode
        self.path = self._pair.producer.path
        self.maxsize = self._pair.producer.maxsize
        self._after_fork()
        util.register_after_fork(self, type(self)._after_fork)

    def _after_fork(self) -> None:
        """A process that `multiprocessing` forked leaves as one that it started does."""
        if not self._is_closed:
            self._end = util.Finalize(self, self._use.leave, exitpriority=_LAST)

    # Putting and getting

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put an item, which is in the queue when this returns: what is done to `obj` afterwards does not change it.

        block, timeout: wait for room, for ever or for `timeout` seconds; without `block` not at all.
        Raises Full, ShutDown; UnsupportedItem (a TypeError) for a part that cannot travel, saying which at which place;
        TooLarge; SpoolClosed (a ValueError) when this queue is closed.
        """
        pair = self._opened()
        if type(obj) is np.ndarray and not obj.dtype.hasobject:
            message = Message((obj,))
        else:
            message = Message(_pickled(obj) if self._pickles else self._values.pack(obj), ())
        pair.producer.put((message,), _until(block, timeout))

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the next item. block, timeout: wait for one, as `put` does for room.

        Raises Empty, ShutDown, SpoolClosed. An item that is damaged is a dead letter, and the next one is taken. One
        that is not, and yet cannot be made again here, is a dead letter too, and this raises why: UnsupportedItem for
        a class that was not named in `types`, or whatever unpickling it raised.
        """
        pair, until = self._opened(), _until(block, timeout)
        while True:
            taken = pair.consumer.take(1, until, self._writable)
            message = taken[0]
            if message.names is None:
                return message.arrays[0]
            try:
                return self._value(message)
            except BadItem as error:
                _set_aside(pair, taken, f"damaged: {error}")
            except Exception as error:
                _set_aside(pair, taken, f"{type(error).__name__}: {error}")
                raise
            except BaseException:
                _put_back(pair, taken)
                raise

    def _value(self, message: Message) -> Any:
        if message.names:  # of a SpoolWriter
            return dict(zip(message.names, message.arrays, strict=True))
        frame, *arrays = message.arrays
        if frame.dtype != np.uint8 or frame.ndim != 1 or not frame.size or frame[0] != _PICKLE:
            return self._values.unpack(message.arrays)
        if not self._pickles:
            raise UnsupportedItem(
                "the item was pickled; Queue(allow_pickle=True) takes such where you trust its writer"
            )
        return pickle.loads(frame.data, buffers=arrays)

    def put_nowait(self, obj: Any) -> None:
        """Put without waiting: `put(obj, block=False)`."""
        self.put(obj, False)

    def get_nowait(self) -> Any:
        """Get without waiting: `get(block=False)`."""
        return self.get(False)

    def qsize(self) -> int:
        """How many items wait; another process may change that at any moment."""
        return self._opened().consumer.qsize()

    def empty(self) -> bool:
        """Whether no item waits."""
        return not self.qsize()

    def full(self) -> bool:
        """Whether a put would have to wait."""
        return self._opened().producer.full()

    # Its end

    def shutdown(self, immediate: bool = False) -> None:
        """End the queue for every process: puts raise ShutDown from now on, and gets do when it is empty.

        immediate: gets raise at once, and what waits is removed.
        """
        self._opened().producer.shutdown(flag("immediate", immediate))

    def close(self) -> None:
        """Let this process put and get no more; what it put stays for others. Harmless when repeated.

        The last process that uses a temporary spool removes it, with what is in it.
        """
        self._is_closed = True
        self._end.cancel()
        self._use.leave()

    def join_thread(self) -> None:
        """Nothing is left to wait for: `put` returns when the item is there."""

    def cancel_join_thread(self) -> None:
        """Nothing to do, as `join_thread` does nothing."""

    def _opened(self) -> Pair:
        if self._is_closed:
            raise SpoolClosed(f"{self!r} is closed in this process")
        return self._pair

    def __reduce__(self) -> tuple[Any, ...]:
        """The same queue in another process: its path, and where a process is being started the very descriptor."""
        self._opened()
        fd = self._use.fd
        handle = None if fd is None or context.get_spawning_popen() is None else reduction.DupFd(fd)
        options = self._values.types, self._pickles, self._writable, self._mode
        return _received, (type(self), self.path, handle, fd is not None, *options)

    def __repr__(self) -> str:
        kind = "temporary, " if self._use.fd is not None or self._is_closed else ""
        return f"<spoolipc.{type(self).__name__} {self.path!r} ({kind}maxsize={self.maxsize})>"


class JoinableQueue(Queue):
    """A Queue that counts the items of which `task_done` was not called yet, as `multiprocessing.JoinableQueue` does.

    The count is the spool's: any process may call `task_done` and `join`. It begins at the items waiting when no other
    process has the spool open.
    """

    def task_done(self) -> None:
        """Say that the work on one item is done. Raises ValueError when that was said of every item that was put."""
        if not self._opened().task_done():
            raise ValueError("task_done() called too many times")

    def join(self) -> None:
        """Wait until `task_done` was called for every item that was put."""
        self._opened().join(None)


def _received(
    cls: type[Queue],
    path: str,
    handle: Any,
    is_temporary: bool,
    types: Iterable[type],
    pickles: bool,
    writable: bool,
    mode: int | None,
) -> Queue:
    """The queue that another process sent."""
    queue = cls.__new__(cls)
    queue._set(Values(types), pickles, writable)
    fd = temporary.inherit(handle.detach()) if handle else temporary.use(path) if is_temporary else None
    queue._open(path, fd, Limits(mode=mode))
    return queue


def _until(block: Any, timeout: Any) -> Deadline:
    """The deadline, of whatever `multiprocessing.Queue` takes: any truth value, and a time that is past."""
    if not block:
        return NOW
    if timeout is None:
        return None
    return NOW if isinstance(timeout, (int, float)) and timeout <= 0 else deadline_of(True, timeout)


def _pickled(obj: Any) -> tuple[Array, ...]:
    """The pickle of an object, and its large buffers, the object's own."""
    arrays: list[Array] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        """Whether it stays in the pickle."""
        try:
            raw = buffer.raw()
        except BufferError:  # it is in pieces
            return True
        if raw.nbytes < _LONG or len(arrays) >= _MANY:
            return True
        arrays.append(np.frombuffer(raw, np.uint8))
        return False

    frame = pickle.dumps(obj, 5, buffer_callback=keep)
    return np.frombuffer(frame, np.uint8), *arrays


def _put_back(pair: Pair, taken: list[Message]) -> None:
    if isinstance(pair.consumer, Restorer):
        pair.consumer.put_back(taken)


def _set_aside(pair: Pair, taken: list[Message], reason: str) -> None:
    """Make a dead letter of what was taken and cannot be made again: it waits once more, and is received to say so."""
    consumer, seq = pair.consumer, taken[0].seq
    others: list[Delivery] = []
    _put_back(pair, taken)
    try:
        with suppress(Empty, ShutDown):  # another process takes it, and does the same
            while len(others) < _TRIES:
                (delivery,) = consumer.claim(1, None, NOW)
                if delivery.seq == seq:
                    consumer.settle((delivery,), Reject(reason))
                    _log.warning("%s: item %d is a dead letter: %s", consumer.path, seq, reason)
                    return
                others.append(delivery)
    finally:
        if others and isinstance(consumer, Source):
            consumer.unclaim(others)
