"""AsyncSpoolWriter and AsyncSpoolReader: the faces of a spool for asyncio.

    async with AsyncSpoolReader("/dev/shm/frames") as reader:
        async for frame in reader:
            await show(frame)

A call is the step that the blocking faces take without `block`, tried again when there is news. It is done on the event
loop, and waits about a millisecond for other processes; where that is not enough, or more than 256 KB are to be
copied, it is done in a thread of the loop's executor, and so is every step of a spool on servers. A call that waits has
no thread: an engine's `Watch` wakes the loop.

Cancelled, a call ends when what it does in a thread has ended, so nothing of it goes on. What it had got is then put
back where it was, as if never delivered; what it received is requeued; what it was putting may be put: then it is there
as a whole.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import partial, wraps
from threading import get_ident
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeAlias, TypeVar

from . import errors
from .engine import Watch, Watchable
from .errors import AlreadySettled, BadItem, Empty, Full, LockTimeout, ShutDown, SpoolError
from .item import Item, Received, reason_of, taken_item
from .message import (
    NOW,
    Array,
    Arrays,
    Copy,
    Deadline,
    Delivery,
    Json,
    Message,
    Nack,
    Peeked,
    Puttable,
    deadline_of,
    on_write,
    whole,
)
from .queue import Face, SpoolReader, SpoolWriter, arrays_of, message_of, messages_of

__all__ = ["AsyncItem", "AsyncSpoolReader", "AsyncSpoolWriter"]
P = ParamSpec("P")
T = TypeVar("T")
Puttables: TypeAlias = "Puttable | Mapping[str, Puttable]"
Seconds: TypeAlias = float | None
_log = logging.getLogger("spoolipc")
LARGE: Final = 1 << 18
"""Bytes above which a copy is made in a thread: 256 KB are copied in some 50 us."""
MANY: Final = 16
"""Items above which a step is done in a thread: one takes some 20 us."""
TURN: Final = 1e-3
"""Seconds for which calls that need not wait may keep the loop to themselves."""
_readers: Final = Counter[tuple[asyncio.AbstractEventLoop, int]]()
"""How many calls of a loop wait for a descriptor to be readable, which it watches for all of them."""


class _AsyncFace(Face):
    """What both sides share: the blocking face, of which only what does not wait is used."""

    def __init__(self, face: SpoolReader | SpoolWriter) -> None:
        session = face._session
        if not isinstance(session, Watchable):
            face.close()
            raise errors.UnsupportedOperation(
                f"{face.path}: no event loop can wait for it; use the blocking faces"
            )
        self._face, self._session, self._watchable = face, face._session, session
        self._busy = set[asyncio.Future[None]]()  # one for each call that has something in a thread
        self._turn_began: float | None = None
        with suppress(SpoolError), closing(session.watch(lambda: None)) as watch:
            watch.arm()  # now, as the first in a process imports what it needs: 50 ms

    async def close(self) -> None:
        """Leave the spool, when what calls have in threads has ended; calls that wait raise SpoolClosed. Arrays that
        it gave out stay valid. Harmless when repeated."""
        loop = asyncio.get_running_loop()
        while busy := [each for each in self._busy if each.get_loop() is loop]:
            await asyncio.wait(busy)
        await self._in_thread(self._face.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _until(
        self,
        until: Deadline,
        step: Callable[[], T],
        undo: Callable[[], object] | None = None,
        *,
        slow: bool = False,
        lacking: Callable[[], Message | int | None] = lambda: None,
    ) -> T:
        """What `step` returns, tried until it finds an item, or room, and a server; for `undo`, `slow` see `_step`."""
        loop = asyncio.get_running_loop()
        await self._give_others_a_turn(loop)
        try:
            try:
                return await self._step(step, undo, slow)
            except (Empty, Full, errors.ServerUnreachable):
                if until == NOW:
                    raise
            while True:
                woken = asyncio.Event()
                with closing(self._watchable.watch(partial(_tell, loop, woken), lacking())) as watch:
                    in_time = await self._news(loop, watch, woken, until)
                    try:
                        return await self._step(step, undo, slow)
                    except (Empty, Full, errors.ServerUnreachable):
                        if not in_time:
                            raise
        except (Empty, Full, ShutDown) as error:
            raise error.with_traceback(None) from None

    async def _news(
        self, loop: asyncio.AbstractEventLoop, watch: Watch, woken: asyncio.Event, until: Deadline
    ) -> bool:
        """Wait until another try may help; false when the deadline is past."""
        while True:
            woken.clear()
            seconds = await self._step(watch.arm)
            if seconds <= 0:
                return True
            if until is not None:
                seconds = min(seconds, until - time.monotonic())
                if seconds <= 0:
                    return False
            with _drained(loop, watch), suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await woken.wait()

    async def _give_others_a_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Calls that find what they need do not wait; a thousand of them would let nobody else run."""
        if self._turn_began is None:
            self._turn_began = loop.time()
            loop.call_soon(self._end_turn)
        elif loop.time() - self._turn_began > TURN:
            self._end_turn()
            await asyncio.sleep(0)

    def _end_turn(self) -> None:
        self._turn_began = None

    async def _step(
        self, step: Callable[[], T], undo: Callable[[], object] | None = None, slow: bool = False
    ) -> T:
        """What `step` returns, done on the loop, or in a thread where it is `slow` or others have the lock."""
        if not slow and not self._watchable.is_remote:
            with suppress(LockTimeout):
                return self._watchable.briefly(step)
        return await self._in_thread(step, undo)

    async def _in_thread(self, step: Callable[[], T], undo: Callable[[], object] | None = None) -> T:
        """What `step` returns, done in a thread. When this is cancelled meanwhile, what was done is undone before the
        cancellation goes on; when the loop ends without that, by the thread."""
        turn = [None]  # who comes first takes it: the thread at its end, or the caller who leaves
        is_left = False

        def run() -> T:
            try:
                return step()
            finally:
                if not _take(turn) and undo:
                    undo()

        loop = asyncio.get_running_loop()
        busy, cancelled = loop.create_future(), None
        self._busy.add(busy)
        try:
            future = loop.run_in_executor(None, run)
            while not future.done():
                try:
                    await asyncio.wait((future,))
                except asyncio.CancelledError as error:
                    cancelled, is_left = error, is_left or _take(turn)
            if cancelled is None:
                return future.result()
            future.exception()  # is told to nobody
            if not is_left and undo:
                await self._in_thread(undo)
            raise cancelled
        except GeneratorExit:  # nobody runs the loop any more
            if not is_left and not _take(turn) and undo:
                undo()
            raise
        finally:
            self._busy.discard(busy)
            if not loop.is_closed():
                busy.set_result(None)


def _take(turn: list[None]) -> bool:
    """Whether this caller, of several, is the first."""
    try:
        turn.pop()
    except IndexError:
        return False
    return True


def _tell(loop: asyncio.AbstractEventLoop, woken: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(woken.set)


@contextmanager
def _drained(loop: asyncio.AbstractEventLoop, watch: Watch) -> Iterator[None]:
    """In the block, the loop drains the watch's descriptor when that is readable."""
    key = loop, watch.fileno()
    if key[1] < 0:
        yield
        return
    if not _readers[key]:
        loop.add_reader(key[1], watch.drain)
    _readers[key] += 1
    try:
        yield
    finally:
        _readers[key] -= 1
        if not _readers[key]:
            del _readers[key]
            loop.remove_reader(key[1])


class AsyncSpoolWriter(_AsyncFace):
    """Puts arrays into a spool, as `SpoolWriter` does, from an event loop.

    path, options: those of `SpoolWriter`. To open a spool is done at once: some milliseconds, the first 100.

    Several tasks may share one, and loops in several threads. Of a cancelled `put` or `put_many`, items may be there.
    """

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        self._writer = SpoolWriter(path, **options)
        super().__init__(self._writer)

    async def put(
        self, array: Puttables, block: bool = True, timeout: Seconds = None, *, meta: Json = None
    ) -> int:
        """Put an array, or several named arrays as one item; returns its sequence number.

        Parameters and errors are those of `SpoolWriter.put`. The array must stay as it is until this returns or
        raises, also when it is cancelled: the item is then not there, or is whole.
        """
        return (await self._put([message_of(array, meta)], deadline_of(block, timeout)))[0]

    async def put_many(
        self,
        arrays: Iterable[Puttables],
        block: bool = True,
        timeout: Seconds = None,
        *,
        metas: Iterable[Json] | None = None,
    ) -> list[int]:
        """Put several arrays; returns their sequence numbers. Parameters and errors are those of
        `SpoolWriter.put_many`."""
        return await self._put(messages_of(arrays, metas), deadline_of(block, timeout))

    async def _put(self, messages: list[Message], until: Deadline) -> list[int]:
        producer, seqs = self._writer._producer, list[int]()
        durable = self._writer._options.durability == "fsync"
        size = sum(array.nbytes for message in messages for array in message.arrays)
        if self._watchable.is_remote:  # which knows by its id what an earlier try has put
            messages = [each._replace(id=each.id or os.urandom(16).hex()) for each in messages]

        def step() -> None:
            try:
                seqs.extend(producer.put(messages[len(seqs) :], NOW))
            except SpoolError as error:
                seqs.extend(error.seqs)
                raise

        slow = durable or size > LARGE or len(messages) > MANY
        try:
            await self._until(until, step, slow=slow, lacking=lambda: messages[len(seqs)])
        except SpoolError as error:
            error.seqs = tuple(seqs)
            raise
        return seqs

    async def wait(self, timeout: Seconds = None) -> bool:
        """Wait until an item would find room, for ever or for `timeout` seconds; false when there is none in time."""

        def step() -> bool:
            if self._writer.full():
                raise Full
            return True

        with suppress(Full):
            return await self._until(deadline_of(True, timeout), step)
        return False

    async def join(self, timeout: Seconds = None) -> bool:
        """Wait until all is done that was put before this call, as `SpoolWriter.join` does."""
        producer, last = self._writer._producer, 0

        def step() -> bool:
            nonlocal last
            last = producer.join(NOW, last)
            if last:
                raise Full
            return True

        with suppress(Full):
            return await self._until(deadline_of(True, timeout), step, lacking=lambda: last)
        return False

    def full(self) -> bool:
        """Whether `maxsize` items wait, or a put has been waiting for what the file system lacks."""
        return self._writer.full()

    async def shutdown(self, immediate: bool = False) -> None:
        """End the spool for every process, as `SpoolWriter.shutdown` does."""
        await self._step(partial(self._writer.shutdown, immediate), slow=immediate)


class AsyncSpoolReader(_AsyncFace):
    """Gets arrays from a spool, as `SpoolReader` does, in an event loop.

    path, options: those of `SpoolReader`. To open a spool is done at once: some milliseconds, the first 100.

    Several tasks may share one, and loops in several threads. `async for` gets item after item until the spool has
    ended. What a cancelled call had got waits again in its place; what it had received is requeued.
    """

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        self._reader = SpoolReader(path, **options)
        super().__init__(self._reader)

    async def get(
        self, block: bool = True, timeout: Seconds = None, *, copy: Copy = False, out: Array | None = None
    ) -> Arrays:
        """Take the next item off the spool: its array, or a dict of its named arrays. Parameters and errors are those
        of `SpoolReader.get`."""
        until = deadline_of(block, timeout)
        if out is None:
            return (await self._take(1, until, copy, arrays_of))[0]
        return (await self._take(1, until, False, self._reader._filling(out, copy), filled=True))[0]

    async def get_many(
        self, limit: int, block: bool = True, timeout: Seconds = None, *, copy: Copy = False
    ) -> list[Arrays]:
        """Take what waits, up to `limit` items; waits only for the first. Parameters and errors are those of
        `SpoolReader.get_many`."""
        return await self._take(whole("limit", limit, 1), deadline_of(block, timeout), copy, arrays_of)

    async def take(self, block: bool = True, timeout: Seconds = None, *, copy: Copy = False) -> Item:
        """Take the next item off the spool, with all that is known of it, as `SpoolReader.take` does."""
        make = partial(taken_item, self._reader._consumer)
        return (await self._take(1, deadline_of(block, timeout), copy, make))[0]

    async def _take(
        self, limit: int, until: Deadline, copy: Copy, make: Callable[[Message], T], filled: bool = False
    ) -> list[T]:
        reader, consumer, here = self._reader, self._reader._consumer, get_ident()
        writable, taken = on_write(copy), list[list[Message]]()
        copied = filled or (bool(copy) and not writable)

        def step() -> None:
            # Of a single item, what is small is given before anybody can cancel.
            kept = get_ident() != here or (copied and limit > 1)
            taken.append(consumer.take(limit, NOW, writable, kept))

        def undo() -> None:
            for each in taken:
                reader._put_back(each)

        slow = reader._options.verify or writable or (limit > MANY and reader.qsize() > MANY)
        await self._until(until, step, undo, slow=slow)
        given = partial(reader._given, taken[0], copy, make)
        size = sum(array.nbytes for message in taken[0] for array in message.arrays)
        if size > LARGE and copied:
            return await self._in_thread(given, undo)
        return given()

    def __aiter__(self) -> AsyncIterator[Arrays]:
        """Get item after item, until the spool was shut down and is empty."""
        return self.arrays()

    async def arrays(self, *, copy: Copy = False) -> AsyncIterator[Arrays]:
        """Get item after item, as iteration does; `copy` is that of `get`."""
        while True:
            try:
                array = await self.get(copy=copy)
            except ShutDown:
                return
            yield array
            del array  # not held while waiting for the next

    def receive(self, block: bool = True, timeout: Seconds = None, *, copy: Copy = False) -> _Receiving:
        """Take the next item in flight, to be settled when the work on it is done.

            async with reader.receive() as item:
                await work(item.array)

        acknowledges it at the end, and requeues it when `work` raises or is cancelled. `await reader.receive()` gives
        the `AsyncItem` to be settled by hand. Parameters and errors are those of `SpoolReader.receive`; an item over
        256 KB that is to be copied or verified, and one of a server, is read at once, and a damaged one is passed over.
        """
        on_write(copy)  # or it is a ValueError, before anything is received
        return _Receiving(self._receive(deadline_of(block, timeout), copy))

    async def _receive(self, until: Deadline, copy: Copy) -> AsyncItem:
        reader, consumer, claimed = self._reader, self._reader._consumer, list[Delivery]()

        def step() -> None:
            claimed[:] = consumer.claim(1, reader._lease, NOW)

        def undo() -> None:
            if claimed:
                consumer.settle(claimed, Nack(0.0, "receive was cancelled"))

        while True:
            await self._until(until, step, undo)
            item = AsyncItem(self, claimed[0], copy)
            must_read = reader._options.verify or (copy and not on_write(copy))
            if not self._watchable.is_remote and (item.nbytes <= LARGE or not must_read):
                return item
            try:
                await self._in_thread(item._load, undo)
            except BadItem:
                continue
            except errors.LeaseExpired:  # as settling it will tell
                pass
            return item

    async def items(self, *, copy: Copy = False) -> AsyncIterator[AsyncItem]:
        """Receive item after item, as `SpoolReader.items` does; one whose loop body breaks is requeued soon after."""
        while True:
            try:
                item = await self.receive(copy=copy)
            except ShutDown:
                return
            async with item:
                yield item
            del item  # nor its array

    async def peek(self, block: bool = True, timeout: Seconds = None) -> Peeked:
        """Look at the next item and leave it where it is, as `SpoolReader.peek` does."""
        return await self._until(deadline_of(block, timeout), partial(self._reader._consumer.peek, NOW))

    async def wait(self, timeout: Seconds = None) -> bool:
        """Wait until an item waits or none can come any more, for ever or for `timeout` seconds; false when neither is
        so in time. Another reader may take it at any moment."""
        with suppress(ShutDown):
            try:
                await self.peek(timeout=timeout)
            except Empty:
                return False
        return True


def _awaited(
    method: Callable[Concatenate[Any, P], None],
) -> Callable[Concatenate[AsyncItem, P], Coroutine[Any, Any, None]]:
    """A method of an `Item` as one of an `AsyncItem`."""

    @wraps(method)
    async def call(item: AsyncItem, /, *args: P.args, **kwargs: P.kwargs) -> None:
        await item._face._step(partial(method, item, *args, **kwargs))

    return call


class AsyncItem(Received):
    """An item in flight at an `AsyncSpoolReader`: an `Item` whose verbs are awaited, and `async with` likewise."""

    ack = _awaited(Item.ack)
    nack = _awaited(Item.nack)
    reject = _awaited(Item.reject)
    extend = _awaited(Item.extend)

    def __init__(self, face: AsyncSpoolReader, delivery: Delivery, copy: Copy) -> None:
        super().__init__(face._reader._consumer, delivery, copy)
        self._face = face

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.settled:
            return
        if error is None:
            with suppress(AlreadySettled):  # another task was first
                await self.ack()
            return
        try:
            await self.nack(reason=reason_of(error))
        except SpoolError as problem:
            _log.warning("%s", problem)  # what the block raised goes on to the caller


class _Receiving:
    """What `receive` returns: to be awaited, or entered with `async with`."""

    def __init__(self, begun: Coroutine[Any, Any, AsyncItem]) -> None:
        self._begun = begun

    def __await__(self) -> Generator[Any, Any, AsyncItem]:
        return self._begun.__await__()

    async def __aenter__(self) -> AsyncItem:
        self._item = await self._begun
        return self._item

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        await self._item.__aexit__(kind, error, trace)
