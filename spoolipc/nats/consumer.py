"""take, claim, load, settle, peek: items pulled from the consumer `readers`, and what becomes of them.

While a session lives it says of each item in flight that it is, before the server's `ACK_WAIT` ends; of one with a
lease it says nothing, but lets the server wait as long as that. So what a crashed session had is redelivered within
seconds, and what a hung one had when its lease ends. What failed is told in a note before the server is told: a crash
between the two leaves an item that is redelivered, and at whose next delivery the note is put right.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import platform
import time
import warnings
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from nats.aio.msg import Msg

from .. import errors
from .. import message as values
from ..engine import ConsumerOptions
from ..message import NOW, Deadline, Delivery, Message
from .access import Address
from .link import header, within
from .session import LOOK, Session, Watch
from .spool import Failed, msg_id, size_of

T = TypeVar("T")
_log = logging.getLogger("spoolipc")
_NS: Final = 10**9


@dataclass(slots=True, eq=False)
class _Held:
    """An item in flight here. delivered: how often it was; attempt: how many of these count. due: monotonic seconds
    when its lease ends, nan while a failure of it is noted. given: tells when nobody can settle it. taken: it is only
    put back or acknowledged. done: it is acknowledged, but the server may not have heard of it."""

    msg: Msg
    seq: int
    delivered: int
    attempt: int
    due: float = math.inf
    given: weakref.ref[_Handle] | None = None
    done: bool = False
    taken: bool = False


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class _Handle:
    """What who can settle the item holds."""

    held: _Held


class _Taken(list[Message]):
    """What a take has taken. held: the items that can still be put back, acknowledged when nobody has this any more."""

    def __init__(self, consumer: NatsConsumer) -> None:
        self.consumer = consumer
        self.held: list[_Held] = []

    def __del__(self) -> None:
        if self.held:
            self.consumer.link.loop.beside(self.consumer.acknowledge, self.held)


class NatsConsumer(Session):
    """A reader's side. count: told how many items are to be acknowledged that were taken."""

    role = "reader"
    count: Callable[[int], Awaitable[object]] | None = None

    def __init__(self, where: Address, options: ConsumerOptions) -> None:
        self.held: dict[int, _Held] = {}
        self._dropped: deque[_Held] = deque()
        self._verify, self._values = options.verify, options.values
        self._began, self._until_writers = math.inf, options.end == "writers"
        super().__init__(where, options.limits, options.create, None)

    async def begin(self) -> None:
        """See whether there is something whose end this reader waits for."""
        if not self._until_writers:
            return
        counts, sessions = await self.spool.counts(), await self.spool.sessions()
        there = counts.waiting or counts.in_flight or "writer" in sessions
        self._began = -1 if there else await self._news()

    async def _news(self) -> int:
        """A number that grows with each writer that comes and each item that is put."""
        state = (await self.link.api(f"STREAM.INFO.{self.spool.items}"))["state"]
        self.spool.control = None
        return int(state["last_seq"]) + (await self.spool.agreed()).writers

    # What the faces call

    def take(self, limit: int, until: Deadline, writable: bool = False, kept: bool = False) -> list[Message]:
        taken = _Taken(self)
        try:
            self.do(self._take(taken, limit, until, writable))
        except BaseException:  # it may be interrupted when all is done
            back, taken.held = taken.held, []
            self.link.loop.beside(self._put_back, back)
            raise
        return taken

    def put_back(self, taken: list[Message], start: int = 0) -> None:
        assert isinstance(taken, _Taken)
        back, taken.held = taken.held[start:], taken.held[:start]
        with suppress(errors.SpoolError):
            self.do(self._put_back(back))

    def watch(self, news: Callable[[], None], lacking: Message | int | None = None) -> Watch:
        return Watch(self, self._look, news)

    def claim(self, limit: int, lease: float | None, until: Deadline) -> list[Delivery]:
        return self.do(self._claim(limit, lease, until))

    def load(self, delivery: Delivery, writable: bool = False) -> Message:
        return self.do(self._load(delivery, writable))

    def describe(self, delivery: Delivery) -> values.Contents:
        return self.do(self._describe(delivery))

    def settle(self, deliveries: Sequence[Delivery], verdict: values.Verdict) -> None:
        self.do(self._settle(deliveries, verdict))

    def peek(self, until: Deadline) -> values.Peeked:
        return self.do(within(until, self._peek, until))

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns, when what was dropped is requeued."""
        dropped = []
        while self._dropped:
            dropped.append(self._dropped.popleft())
        if dropped and not self._closed:
            for held in super().do(self._drop(dropped)):
                what = f"item {held.seq} of {self.path} was dropped unsettled; it is redelivered"
                warnings.warn(f"{what}. Use: with reader.receive()", ResourceWarning, stacklevel=4)
        return super().do(work)

    def _delivery(self, held: _Held) -> Delivery:
        handle, dropped = _Handle(held), self._dropped
        # At any moment, in any thread: it only takes note.
        held.given = weakref.ref(handle, lambda _: dropped.append(held))
        return Delivery(held.seq, held.attempt, 0, size_of(held.msg), handle)

    async def _drop(self, dropped: list[_Held]) -> list[_Held]:
        here = [held for held in dropped if self.held.get(held.seq) is held]
        for held in here:
            await self._once(held, partial(self._fail, held, "it was dropped unsettled"))
        return here

    # Pulling

    async def _next(self, limit: int, until: Deadline) -> list[_Held]:
        """Up to `limit` items in flight here from now on. Raises Empty, ShutDown."""
        began, seconds = time.monotonic(), 0.0
        while True:
            self.check()
            await self._expire()
            state = await self._state()
            if until != NOW and state == "open" and self._began == math.inf:
                seconds = LOOK if until is None else max(0.0, min(until - time.monotonic(), LOOK))
            messages = await self.spool.pull(limit, seconds)
            if not seconds and len(messages) < limit:
                late = min(limit - len(messages), (await self.spool.fresh())[0])
                messages += await self.spool.pull(late, 0.1) if late > 0 else []
            if found := await self._accepted(messages):
                return found
            if not self.link.client.is_connected:
                self.link.check(began, "the connection was lost")
                await asyncio.sleep(0.05)
            await self._check_end()
            left = math.inf if until is None else until - time.monotonic()
            if until == NOW or left <= 0:
                raise errors.Empty(f"{self.path}: no item waits")
            seconds = min(left, LOOK)

    async def _state(self) -> values.State:
        """What is agreed on. Raises ShutDown where nothing is delivered any more."""
        state = (await self.spool.agreed()).state
        if state == "discarded":
            raise self._ended("was shut down and has no more items")
        return state

    async def _check_end(self) -> None:
        """Raise ShutDown when no item can come any more."""
        ending = await self._state() == "draining"
        if not ending and self._began == math.inf:
            return
        writers = not ending and "writer" in await self.spool.sessions()
        news = 0 if ending else await self._news()
        fresh, info = await self.spool.fresh()
        if fresh or info["num_ack_pending"] > len(self.held):
            return
        if ending:
            raise self._ended("was shut down and has no more items")
        if news > self._began and not writers:
            raise self._ended("has ended: no item is left, and no writer")

    def _ended(self, what: str) -> errors.ShutDown:
        return errors.ShutDown(f"{self.path}: {what}; a writer begins again with fresh=True")

    async def _look(self) -> float:
        """In how many seconds an item may be there."""
        counts = await self.spool.counts()
        if counts.waiting > counts.delayed:
            return 0.0
        await self._check_end()
        return max(0.0, min([LOOK, *(note.due - time.time() for note in counts.requeued.values())]))

    async def _accepted(self, messages: list[Msg]) -> list[_Held]:
        """The items that were delivered, but for those that are dead letters now."""
        found: list[_Held] = []
        try:
            for msg in messages:
                if held := await self._accept(msg):
                    found.append(held)
        except BaseException:
            self.link.loop.beside(self._put_back, found)
            raise
        return found

    async def _accept(self, msg: Msg) -> _Held | None:
        """The item that was delivered; None where it is a dead letter now, as it was delivered too often."""
        seq, delivered = msg.metadata.sequence.stream, msg.metadata.num_delivered
        held = _Held(msg, seq, delivered, delivered)
        if seq in self.held and self.held[seq].done:
            held.done, self.held[seq] = True, held
            await self._forget([held])
            return None
        if delivered > 1:
            note = await self._note(held)
            if note.state == "dead":  # its reader died amid making it one
                held.attempt = note.attempt
                await self._bury(held, note, note.why)
                return None
            most = (await self.spool.agreed()).limits.max_attempts
            if most and held.attempt > most:
                held.attempt -= 1
                await self._bury(held, note, note.why)
                return None
            note.attempt, note.state = held.attempt, "held"
            await self.spool.write_failed(held.seq, note)
        self.held[held.seq] = held
        return held

    async def _note(self, held: _Held) -> Failed:
        """What is known of the failures of an item: one for each attempt before this one."""
        note = (await self.spool.failed(held.seq)).get(held.seq) or Failed()
        if note.state != "dead":
            held.attempt = max(1, held.delivered - note.undone)
            while len(note.history) < held.attempt - 1:
                note.attempt = len(note.history) + 1
                note.failed("", "its reader is gone, or its lease ended")
        return note

    # Taking, loading

    async def _take(self, taken: _Taken, limit: int, until: Deadline, writable: bool) -> None:
        while not taken:
            found = await within(until, self._next, limit, until)
            try:
                for held in found:
                    with suppress(errors.BadItem, errors.UnknownVersion):
                        taken.append(await self._read(held, writable))
                        taken.held.append(held)
                        held.taken = True
            except BaseException as error:
                back = found[found.index(held) :] if isinstance(error, errors.UnsupportedItem) else found
                self.link.loop.beside(self._put_back, back)
                if back is found or not taken:
                    raise

    async def acknowledge(self, taken: list[_Held]) -> None:
        """Take items off the spool that were taken; `renewed` tells the server again what it does not answer."""
        first = sum(not held.done for held in taken)
        for held in taken:
            held.done = True
        if first and self.count is not None:
            await self.count(first)
        await self._forget(taken)
        await self.spool.news.tell()

    async def _put_back(self, several: list[_Held]) -> None:
        """Let items wait again in their place, as if never delivered: before those that were requeued earlier."""
        now = time.time()
        several = [held for held in several if self.held.get(held.seq) is held]
        for held in several:  # at once: nobody else is to settle them
            del self.held[held.seq]
        ahead = sum(
            note.state == "waits" and note.due <= now for note in (await self.spool.failed()).values()
        )
        others = await self._accepted(await self.spool.pull(ahead)) if ahead and several else []
        control = await self.spool.agreed()
        for held in (*several, *others):
            if control.state == "discarded":
                await self._forget([held])
                continue
            note = await self._note(held)
            note.attempt, note.state, note.due = held.attempt - 1, "waits", now
            note.undone += 1
            await self.spool.write_failed(held.seq, note)
            await self.link.call(held.msg.reply, b"-NAK")
            self._let_go(held)
        await self.spool.news.tell()

    async def _claim(self, limit: int, lease: float | None, until: Deadline) -> list[Delivery]:
        found = await within(until, self._next, limit, until)
        given = [self._delivery(held) for held in found]  # who does not get them drops them
        if lease is not None:
            for held in found:
                await self._lease(held, lease)
        await self.spool.news.tell()
        return given

    async def _lease(self, held: _Held, seconds: float) -> None:
        """Let the server redeliver it then, and not before."""
        held.due = time.monotonic() + seconds
        delay = json.dumps({"delay": max(1, int(seconds * _NS))})
        await self.link.call(held.msg.reply, f"-NAK {delay}".encode())

    async def _read(self, held: _Held, writable: bool) -> Message:
        """The message of an item in flight. Raises BadItem, having dead-lettered it."""
        async with self._buried(held):
            known = held.seq, held.attempt
            message = await self.spool.message(held.msg, known, writable, self._verify)
        if message.names == () and not self._values:
            what = "is a value that a Queue put; get it from a Queue of the same path"
            raise errors.UnsupportedItem(f"{self.path}: item {held.seq} {what}")
        return message

    @asynccontextmanager
    async def _buried(self, held: _Held) -> AsyncIterator[None]:
        """An item is a dead letter that turns out to be damaged."""
        try:
            yield
        except (errors.BadItem, errors.UnknownVersion) as error:
            await self._bury(held, await self._note(held), str(error))
            raise

    async def _load(self, delivery: Delivery, writable: bool) -> Message:
        return await self._read(await self._in_flight(delivery), writable)

    async def _describe(self, delivery: Delivery) -> values.Contents:
        held = await self._in_flight(delivery)
        async with self._buried(held):
            tail = self.spool.contents(held.msg)
        return values.Contents(tail.names, tail.meta, tail.put_time, tail.id)

    async def _in_flight(self, delivery: Delivery) -> _Held:
        await self._expire()
        held = self.held.get(delivery.seq)
        if held is None or held is not delivery.handle.held or math.isnan(held.due):
            what = f"item {delivery.seq} is in flight here no more: its lease ended, or it was settled"
            raise errors.LeaseExpired(f"{self.path}: {what}")
        return held

    # Settling

    async def _settle(self, deliveries: Sequence[Delivery], verdict: values.Verdict) -> None:
        done: list[_Held] = []
        try:
            for delivery in deliveries:
                held = await self._in_flight(delivery)
                match verdict:
                    case values.Ack():
                        done.append(held)
                    case values.Nack(delay, reason):
                        await self._once(held, partial(self._fail, held, reason, delay))
                    case values.Reject(reason):
                        await self._once(held, partial(self._reject, held, reason))
                    case values.Extend(lease):
                        await self._lease(held, lease)
        finally:
            if done:
                await self._forget(done)
            await self.spool.news.tell()

    async def _forget(self, several: list[_Held]) -> None:
        """Take items off the spool."""
        await self.spool.acknowledge([held.msg for held in several])
        for held in several:
            self._let_go(held)

    def _let_go(self, held: _Held) -> None:
        """It is not in flight here any more; another delivery of the same item may be."""
        if self.held.get(held.seq) is held:
            del self.held[held.seq]

    async def _fail(self, held: _Held, why: str, delay: float = 0.0, expired: bool = False) -> None:
        """Requeue an item in flight, or make it a dead letter: when its attempts are used up. expired: the server
        redelivers it already."""
        control = await self.spool.agreed()
        most, note = control.limits.max_attempts, await self._note(held)
        if most and held.attempt >= most:
            await self._bury(held, note, f"{why}; that was attempt {held.attempt} of {most}")
        elif control.state == "discarded":
            await self._forget([held])
        elif note.attempt > held.attempt:  # it is in flight elsewhere
            self._let_go(held)
        else:
            note.attempt, note.state, note.due = held.attempt, "waits", time.time() + delay
            note.failed(_who(), why)
            await self.spool.write_failed(held.seq, note)
            if not expired:
                ask = f" {json.dumps({'delay': int(delay * _NS)})}" if delay else ""
                await self.link.call(held.msg.reply, f"-NAK{ask}".encode())
            self._let_go(held)

    async def _once(self, held: _Held, change: Callable[[], Awaitable[None]]) -> None:
        """Make a change of an item in flight, unless another is under way or done; meanwhile it neither ends by its
        lease nor is kept alive."""
        if math.isnan(held.due) or self.held.get(held.seq) is not held:
            return
        due, held.due = held.due, math.nan
        try:
            await change()
        except BaseException:
            held.due = due
            raise

    async def _reject(self, held: _Held, why: str) -> None:
        await self._bury(held, await self._note(held), why)

    async def _bury(self, held: _Held, note: Failed, why: str) -> None:
        """Make an item a dead letter: its failures, then its message, then the server is told."""
        if len(note.history) < held.attempt:
            note.attempt = held.attempt
            note.failed(_who(), why)
        note.state = "dead"
        await self.spool.write_failed(held.seq, note)
        size = header(held.msg, "Spool-Size")
        subject = f"dead.{held.seq}.{msg_id(held.msg)}.{size_of(held.msg) - len(held.msg.data)}"
        await self.spool.note(subject, held.msg.data, headers={"Spool-Size": size} if size else None)
        _log.error("%s: item %d is now a dead letter: %s", self.path, held.seq, why)
        await self.link.call(held.msg.reply, b"+ACK")
        self._let_go(held)

    async def _expire(self) -> None:
        """Let the leases end that have."""
        now = time.monotonic()
        ended = [held for held in self.held.values() if held.due <= now]
        for held in ended:
            if held.due <= now:  # still
                await self._once(held, partial(self._fail, held, "its lease ended", expired=True))
        if ended:
            await self.spool.news.tell()

    async def renewed(self) -> None:
        self.spool.memory.trim()
        await self._expire()
        for held in [held for held in self.held.values() if held.due == math.inf]:
            await (self._forget([held]) if held.done else self.link.send(held.msg.reply, b"+WPI"))

    async def leave(self) -> None:
        for held in sorted(self.held.values(), key=lambda held: held.seq):
            await (self.acknowledge([held]) if held.taken else self._fail(held, "its reader left"))

    # Looking

    async def _peek(self, until: Deadline) -> values.Peeked:
        while True:
            await self._expire()
            news = self.spool.news.event
            await self._state()
            start, attempt = (await self.spool.counts()).first
            for msg in await self.spool.first(start):
                seq = int(header(msg, "Nats-Sequence"))
                try:
                    tail = self.spool.contents(msg)
                except (errors.BadItem, errors.UnknownVersion):
                    await self._pass_over(seq)
                    break
                return values.Peeked(seq, attempt, tail.put_time / 1e9, size_of(msg), tail.names, tail.meta)
            else:
                await self._check_end()
                if until == NOW or not await self.wait(news, until):
                    raise errors.Empty(f"{self.path}: no item waits")

    def name(self) -> str:
        return self.identity()

    def unclaim(self, deliveries: Sequence[Delivery]) -> None:
        self.do(within(NOW, self._put_back, [delivery.handle.held for delivery in deliveries]))

    def browse(self, after: int) -> Iterator[Message]:
        while some := self.do(self.spool.first(after + 1, count=16)):
            for msg in some:
                after = int(header(msg, "Nats-Sequence"))
                with suppress(errors.BadItem, errors.UnknownVersion):
                    yield self.do(self.spool.message(msg, (after, 0)))

    async def _pass_over(self, seq: int) -> None:
        """Dead-letter the damaged item that is next."""
        for held in await self._next(1, NOW):
            if held.seq != seq:  # another reader was before
                await self._put_back([held])
                continue
            with suppress(errors.BadItem, errors.UnknownVersion):
                await self._read(held, False)


def _who() -> str:
    return f"process {os.getpid()} on {platform.node()}"
