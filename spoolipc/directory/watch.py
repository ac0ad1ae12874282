"""How an event loop waits for a session: without a thread, and with no descriptor but the process's one of inotify."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from ..errors import SpoolError
from .doorbell import LOOK_EVERY, POLL, Kind, ears
from .session import Look, Session, Side, operation


class SessionWatch(Side):
    """One wait. Keeps `spoolipc.engine.Watch`.

    news: called, in any thread, when it is time to arm again. look, each_second: as `Session.wait` takes them.
    """

    def __init__(
        self,
        session: Session,
        kind: Kind,
        news: Callable[[], None],
        look: Look,
        each_second: Callable[[], None],
    ) -> None:
        self.session = session
        self._kind: Kind = kind
        self._look, self._each_second, self._news = look, each_second, news
        self._pause = POLL[0]
        self._glance: Callable[[], bool] = lambda: False
        session.doorbell.enter(news)

    def fileno(self) -> int:
        """The descriptor of inotify, -1 where there is none."""
        return ears.fd

    @operation
    def arm(self) -> float:
        """Keep house, ask for the next news, and look: 0 when another try may help, else seconds until to arm again."""
        self._each_second()
        seconds, glance = self.session.next_look(self._look)
        self._glance = glance
        if glance():
            return 0.0
        doorbell = self.session.doorbell
        ears.listen(doorbell)
        if doorbell.arm(self._kind) and doorbell.number >= 0:
            nap = LOOK_EVERY[self._kind]
        else:
            nap, self._pause = self._pause, min(2 * self._pause, POLL[1])
        return 0.0 if glance() else min(seconds, nap)

    def drain(self) -> None:
        """Hear, for all sessions of the process, what made the descriptor readable."""
        ears.drain()

    def close(self) -> None:
        """Wait no more; harmless when repeated."""
        if self.session.is_open and not self.session.is_forked:
            with suppress(SpoolError):
                self._leave()

    @operation
    def _leave(self) -> None:
        self.session.doorbell.leave(self._kind, self._news, self._glance)
