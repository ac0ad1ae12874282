"""What both sides of an open spool have in common: how it is opened, renewed, waited in and closed."""

from __future__ import annotations

import asyncio
import math
import os
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from shlex import quote
from typing import Any, Final, TypeVar

import nats.errors

from .. import errors
from ..engine import ProducerOptions
from ..message import NOW, Deadline, Limits, completed, differing
from .access import Address
from .link import Link, within
from .spool import ACK_WAIT, PRESENCE, Control, Spool

T = TypeVar("T")
_RENEW: Final = 2.0
"""Seconds between two words of a session that it lives."""
_OPENING: Final = 10.0
LOOK: Final = 1.0
"""Seconds for which a session that waits does not look."""


class Watch:
    """One wait of an event loop. look: raises Empty or Full when another try would; in how many seconds it may help."""

    def __init__(
        self, session: Session, look: Callable[[], Awaitable[float]], news: Callable[[], None]
    ) -> None:
        self._session, self._look, self._news = session, look, news
        self._due = math.inf
        session.spool.news.watches.append(news)

    def fileno(self) -> int:
        return -1

    def arm(self) -> float:
        """Only another try shows what a server redelivers of crashed sessions, so each second it is time for one."""
        seconds = 0.0
        if time.monotonic() < self._due:
            try:
                seconds = self._session.do(within(NOW, self._looked))
            except (errors.SpoolClosed, errors.UnsupportedOperation):
                raise
            except (errors.Full, errors.ServerUnreachable):
                seconds = LOOK
            except errors.SpoolError:
                pass  # another try meets it as well
        self._due = min(self._due, time.monotonic() + LOOK) if seconds else math.inf
        return seconds

    async def _looked(self) -> float:
        await self._session.spool.news.listen()
        return await self._look()

    def drain(self) -> None:
        """There is no descriptor."""

    def close(self) -> None:
        with suppress(ValueError):
            self._session.spool.news.watches.remove(self._news)


class Session:
    """One side of an open spool. role: "writer" or "reader"."""

    role: str
    is_remote = True
    _closed = True  # until there is something to close

    def __init__(self, where: Address, limits: Limits, create: bool, options: ProducerOptions | None) -> None:
        self.path, self._process = where.path, os.getpid()
        if limits.mode is not None:
            what = "mode is of a directory; on servers their accounts say who may use a spool"
            raise ValueError(f"{self.path}: {what}")
        self.link = Link(where)
        self.spool = Spool(self.link, where.name, where.replicas, where.storage)
        self._token = os.urandom(8).hex()
        self._renewing: asyncio.Task[None] | None = None
        self._closed = False
        try:
            self.link.loop.run(within(time.monotonic() + _OPENING, self._open, limits, create, options))
        except BaseException:
            self.close()
            raise

    async def _open(self, limits: Limits, create: bool, options: ProducerOptions | None) -> None:
        await self.link.open()
        await self.spool.open(create)
        if options and options.fresh:
            count = (await self.spool.counts()).in_flight
            if (has_writer := "writer" in await self.spool.sessions()) or count:
                why = "it has another writer" if has_writer else f"items in flight at readers: {count}"
                raise errors.SpoolInUse(0, f"{self.path}: is in use: {why}")
            await self.spool.change(lambda now: replace(now, asked=completed(limits, now.asked)))
            await self.spool.purge()
        reopen = bool(options and (options.reopen or options.fresh))

        def agree(now: Control) -> Control:
            for name, (there, value) in differing(now.asked, limits).items():
                remedy = f"change it (spoolipc set {quote(self.path)} {name}={value})"
                what = f"has {name}={there}, not {value}; leave {name} out to take what is there, or {remedy}"
                raise errors.LimitMismatch(f"{self.path}: {what}")
            writers = now.writers + (self.role == "writer")
            asked, state = completed(limits, now.asked), "open" if reopen else now.state
            return replace(now, state=state, writers=writers, asked=asked)

        await self._renew()
        await self.spool.change(agree)
        self._renewing = asyncio.get_running_loop().create_task(_renew_always(weakref.ref(self)))
        await self.begin()

    async def begin(self) -> None:
        """What a side does first."""

    async def _renew(self) -> None:
        headers = {"Nats-TTL": f"{PRESENCE}s"}
        await self.spool.note(f"session.{self.role}.{self._token}", b"", headers=headers)

    async def renewed(self) -> None:
        """What a side has to say from time to time."""

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns. Raises SpoolClosed, UnsupportedOperation after a fork."""
        try:
            self.check()
        except BaseException:
            work.close()
            raise
        try:
            return self.link.loop.run(work)
        except (errors.ServerUnreachable, nats.errors.Error) as error:
            self.check()  # closed meanwhile
            if isinstance(error, errors.ServerUnreachable):
                raise
            raise errors.ServerUnreachable(f"{self.path}: {error}") from None

    def briefly(self, step: Callable[[], T]) -> T:
        return step()

    def check(self) -> None:
        """Raise SpoolClosed, UnsupportedOperation after a fork."""
        if self._closed:
            raise errors.SpoolClosed(f"{self.path}: this {self.role} was closed; open a new one")
        if os.getpid() != self._process:
            what = f"this {self.role} was opened by process {self._process}; open one in this process"
            raise errors.UnsupportedOperation(f"{self.path}: {what}")

    async def wait(self, news: asyncio.Event, until: Deadline) -> float:
        """Wait for news, a second at most; returns for how long to go on waiting, 0 when the deadline is past."""
        left = math.inf if until is None else until - time.monotonic()
        if left > 0 and not await self.spool.news.listen():
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, LOOK)):
                    await news.wait()
        self.check()
        return max(0.0, left)

    @property
    def maxsize(self) -> int:
        async def read() -> int:
            self.spool.control = None
            return (await self.spool.agreed()).limits.maxsize or 0

        return self.do(within(NOW, read))

    def identity(self) -> str:
        """The name of the spool on its servers, and when it was made there, to the nanosecond."""
        stream = f"STREAM.INFO.{self.spool.items}"
        return f"{self.spool.items} {self.do(self.link.api(stream))['created']}"

    def qsize(self) -> int:
        return self.do(within(NOW, self._qsize))

    async def _qsize(self) -> int:
        return (await self.spool.counts()).waiting

    def close(self) -> None:
        self._end(wait=not self.link.loop.is_this_thread())  # which may have collected what nobody closed

    def __del__(self) -> None:
        self._end(wait=False)

    def _end(self, wait: bool) -> None:
        closed, self._closed = self._closed, True
        if not closed and os.getpid() == self._process:
            # What it has in flight is redelivered after that in any case.
            end = partial(within, time.monotonic() + ACK_WAIT, self._close)
            if wait:
                self.link.loop.run(end())
            else:
                self.link.loop.beside(end)

    async def _close(self) -> None:
        if self._renewing is not None:  # it was opened
            await self.link.loop.settled()
            self._renewing.cancel()
        with suppress(errors.SpoolError, nats.errors.Error):
            if self.link.client.is_connected:
                await self.leave()
                await self.spool.forget(self.spool.notes, "session", self.role, self._token)
                await self.spool.news.tell()
                await self.link.arrived()
        await self.link.close()

    async def leave(self) -> None:
        """What a side does before it is gone."""


async def _renew_always(there: weakref.ref[Session]) -> None:
    """Let a session say that it lives, for as long as somebody holds it."""
    while True:
        await asyncio.sleep(_RENEW)
        if (session := there()) is None:
            return
        with suppress(errors.SpoolError, nats.errors.Error):
            await session.renewed()
            await session._renew()
        del session
