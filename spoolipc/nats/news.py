"""Who waits, and how it hears of what others do: messages that say only that there is something to look at.

Everybody hears of `control`, which says that what is agreed on is another, or that somebody has begun to wait. The
other news are told only while somebody waits, as each costs as much as a put: a server answers what nobody hears.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import nats.errors
from nats.aio.msg import Msg

from .link import Link


class News:
    """The news of a spool. event: set by the next. watches: told of them as well. changed: called where what is agreed
    on may be another."""

    def __init__(self, link: Link, subject: str, changed: Callable[[], None]) -> None:
        self.event = asyncio.Event()
        self.watches: list[Callable[[], None]] = []
        self._link, self._subject, self._changed = link, subject, changed
        self._listens, self._is_heard, self._turns = False, True, 0
        link.lost = self._turn

    async def open(self) -> None:
        self._unheard_at, self._unheard = self._link.expect()

        async def hear(_: Msg) -> None:
            self._turn()

        await self._link.client.subscribe(f"{self._subject}.control", cb=hear)
        await self._link.arrived()

    async def listen(self) -> bool:
        """Hear of all news from now on; whether that is new, so that what was before is still to be looked at."""
        if is_new := not self._listens:
            self._listens = True

            async def hear(_: Msg) -> None:
                self._wake()

            await self._link.client.subscribe(self._subject, cb=hear)
            await self.tell("control")
            await self._link.arrived()
        return is_new

    async def tell(self, what: str = "") -> None:
        """Wake all who wait; of "control", let all look at it again. Who does not hear it looks a second later."""
        while not self._unheard.empty():
            msg = self._unheard.get_nowait()
            self._is_heard &= msg is None or not msg.subject.endswith(f".{self._turns}")
        if self._is_heard or what:
            subject = f"{self._subject}.{what}" if what else self._subject
            with suppress(nats.errors.Error):
                await self._link.send(subject, b"", f"{self._unheard_at}.{self._turns}")

    def _turn(self) -> None:
        """Somebody may wait now who did not; that nobody heard what was told before means nothing."""
        self._is_heard = True
        self._turns += 1
        self._changed()
        self._wake()

    def _wake(self) -> None:
        self.event.set()
        self.event = asyncio.Event()
        for tell in list(self.watches):
            tell()
