"""A connection to the servers: requests that outlive a reconnect, and the one thread of them all.

Everything a session does is a coroutine on the loop of one thread of the process; `Link.run` is where a caller blocks.
A request is sent again until it is answered, so that only requests which may be repeated go this way: a put bears the
item's id, by which the server knows it, an acknowledgement may come twice, and so may every question.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import json
import logging
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Final, NamedTuple, TypeVar, TypeVarTuple, cast

import nats.errors
from nats.aio.msg import Msg

from ..errors import AccessDenied, ServerUnreachable, SpoolError, StorageError, UnsupportedOperation
from ..message import Deadline
from .access import Address, Guarded, options, refusal

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_log = logging.getLogger("spoolipc")
PATIENCE: Final = 30.0
"""Seconds for which a call without a deadline asks again: servers choose a new leader meanwhile."""
TRY: Final = 2.0
"""Seconds that an answer may take before it is asked for again."""
_AHEAD: Final = 16 << 20
"""Bytes that are sent ahead of the answers."""
_CONNECTING: Final = 5.0
"""Seconds after which servers that cannot be reached are said not to be there."""
_READ: Final = 1 << 18
"""Bytes that are read from a connection at once."""
_PING: Final = 2
"""Seconds between two questions to the server whether it is there; the third without a word ends the connection."""
_MOVE: Final = 10.0
"""Seconds without an answer after which another server is asked: this one may have lost the others."""
_TELL: Final = 5.0
"""Seconds without an answer after which the log says so."""
_NO_LEADER: Final = 10008
"""What a server says that does not know, for some seconds, who leads."""
_NO_SUCH, _NOT_REMOVED = 10043, 10057
_REMEDY: Final = "; replicas in the URL needs as many servers: leave it out, or let more join"
_REMEDIES: Final = dict.fromkeys((10005, 10074), _REMEDY)
_limit: Final = ContextVar[float | None]("_limit", default=None)
_NO_JETSTREAM: Final = "no JetStream answers"
OLDEST: Final = (2, 12)
"""The first server that stores several messages as one, or none of them."""


class Replies(asyncio.Queue[Msg | None]):
    """What comes. moved: called whenever something does."""

    moved: Callable[[], None] = staticmethod(lambda: None)

    def _put(self, item: Msg | None) -> None:
        self.moved()
        super()._put(item)


class Request(NamedTuple):
    """What is sent to be answered."""

    subject: str
    payload: Any = b""
    headers: dict[str, str] | None = None


async def within(until: Deadline, work: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    """What `work` returns, whose requests are sent again until the deadline, or a moment longer."""
    token = _limit.set(math.inf if until is None else max(until, time.monotonic() + TRY))
    try:
        return await work(*args)
    finally:
        _limit.reset(token)


# With TLS it says of each connection that ends what the client cannot help.
logging.getLogger("asyncio").addFilter(lambda record: "eof_received" not in str(record.msg))


class Loop:
    """The event loop of this process's clients, in a thread of its own."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._beside = dict[asyncio.Task[None], None]()
        self._thread = threading.Thread(target=self._loop.run_forever, name="spoolipc-nats", daemon=True)
        self._thread.start()
        atexit.register(self.end)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns; it is cancelled when this thread is interrupted."""
        future = asyncio.run_coroutine_threadsafe(_ended(work), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            del future  # it holds the error, which holds this frame

    async def settled(self) -> None:
        """Wait for what was begun beside before this, a moment at most: who counts is to count what it did."""
        task = asyncio.current_task()
        if earlier := [*itertools.takewhile(lambda each: each is not task, self._beside)]:
            await asyncio.wait(earlier, timeout=TRY / 2)

    def is_this_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def beside(self, work: Callable[[*Ts], Coroutine[Any, Any, None]], *args: *Ts) -> None:
        """Begin `work`, whose errors are nobody's. At any moment, in any thread: a finalizer may call it."""
        if os.getpid() == self.process:
            self._loop.call_soon_threadsafe(self._begin, work, args)

    def _begin(self, work: Callable[..., Coroutine[Any, Any, None]], args: tuple[Any, ...]) -> None:
        async def run() -> None:
            with suppress(SpoolError, nats.errors.Error):
                await work(*args)

        task = self._loop.create_task(run())
        self._beside[task] = None
        task.add_done_callback(self._beside.pop)

    def end(self) -> None:
        """Let what was begun beside end, before the process does."""
        if os.getpid() == self.process and self._beside:
            self.run(self.settled())


_starting = threading.Lock()
_loop: Loop | None = None


def loop() -> Loop:
    """The loop of this process, which a forked child has not inherited."""
    global _loop
    with _starting:
        if _loop is None or _loop.process != os.getpid():
            _loop = Loop()
        return _loop


def _renew() -> None:
    global _starting
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_renew)


class Link:
    """One client's connection. late: called with a message that was delivered when nobody wanted it any more. lost:
    called after each loss of the connection."""

    def __init__(self, where: Address) -> None:
        self.path = where.path
        self.loop = loop()
        self.client = Guarded()
        self.late: Callable[[Msg], Coroutine[Any, Any, None]]
        self.lost: Callable[[], None] = lambda: None
        self._where, self._closed, self._told = where, False, False
        self._moved = -math.inf
        self._moving: asyncio.Task[None] | None = None
        self.denied = ""
        self._waiting: dict[str, Replies] = {}
        self._numbers = itertools.count()
        self._inbox = ""
        self._wanted: dict[str, int] = {}

    @property
    def max_payload(self) -> int:
        """Bytes of one message, of headers and data together."""
        return int(self.client.max_payload)

    @property
    def is_cluster(self) -> bool:
        """Whether the server has others beside it."""
        return "cluster" in self.client._server_info

    async def open(self) -> None:
        """Connect. Raises ServerUnreachable, also where there is no JetStream, AccessDenied, UnsupportedOperation for
        a server too old."""
        quiet = _Quiet(self, self._where)
        try:
            async with asyncio.timeout(_CONNECTING):
                await self.client.connect(
                    **options(self._where),
                    name="spoolipc",
                    max_reconnect_attempts=-1,
                    reconnect_to_server_handler=quiet.next_server,
                    connect_timeout=2,
                    ping_interval=_PING,
                    max_outstanding_pings=2,
                    error_cb=quiet.error,
                    disconnected_cb=quiet.disconnected,
                    closed_cb=quiet.disconnected,
                )
        except UnsupportedOperation:
            raise
        except Exception as error:
            await self.close()
            why = quiet.last if isinstance(error, TimeoutError) and quiet.last else error
            unreachable = ServerUnreachable(f"{self.path}: cannot connect: {_said(why)}")
            raise refusal(self._where, why) or unreachable from None
        quiet.is_opening = False
        version = self.client.connected_server_version
        if (version.major, version.minor) < OLDEST:
            await self.close()
            what = f"the server is version {version.major}.{version.minor}; 2.12 or later is needed"
            raise UnsupportedOperation(f"{self.path}: {what}")
        transport, url = cast(Any, self.client._transport), cast(Any, self.client.connected_url)
        # It would wait for a server that takes no more bytes to take what is left, for as long as TCP does.
        transport.close = lambda: transport._io_writer.transport.abort()

        def read(_: int) -> Awaitable[bytes]:
            """More than the client asks for: large items come in half the time."""
            reader: Any = transport._io_reader  # another after each reconnect
            reader._limit = _READ
            return cast(Awaitable[bytes], reader.read(_READ))

        transport.read = read
        quiet.hang_up, quiet.chosen = transport.close, str(url.netloc)
        self._inbox = self.client.new_inbox()
        await self.client.subscribe(
            f"{self._inbox}.>", cb=self._hear, pending_msgs_limit=-1, pending_bytes_limit=-1
        )
        if not self.client._server_info.get("jetstream"):  # but another server of its cluster may have it
            notes = f"$JS.API.STREAM.INFO.spoolipc-{self._where.name}-notes"
            if await self.answers([Request(notes)]) == [_NO_JETSTREAM]:
                await self.close()
                what = f"{_NO_JETSTREAM}; start the server with it: nats-server -js"
                raise ServerUnreachable(f"{self.path}: {what}")

    async def close(self) -> None:
        self._closed = True
        heard: list[Any] = [each._wait_for_msgs_task for each in self.client._subs.values()]
        # The client waits for ever for a connection to close on which TLS failed.
        with suppress(Exception):
            async with asyncio.timeout(TRY if self.client.is_connected else 0.1):
                await self.client.close()
        for task in heard:  # which it leaves where the connection is lost
            task.cancel()
        await asyncio.gather(*heard, return_exceptions=True)  # else they may end as the process does
        self.interrupt()

    def interrupt(self) -> None:
        """Tell all who wait for a reply that none will come."""
        for replies in self._waiting.values():
            replies.put_nowait(None)
        self.lost()

    def expect(self) -> tuple[str, Replies]:
        """A subject to be answered at, and what comes there."""
        number, queue = str(next(self._numbers)), Replies()
        self._waiting[number] = queue
        return f"{self._inbox}.{number}", queue

    @contextmanager
    def replies(self, items: int = 0) -> Iterator[tuple[str, Replies]]:
        """The same, for as long as it is waited for; None comes when the connection is lost. items: how many may come
        that a stream delivers, which keep their subject."""
        inbox, queue = self.expect()
        number = inbox.rpartition(".")[2]
        if items:
            self._wanted[number] = items
        try:
            yield inbox, queue
        finally:
            del self._waiting[number]
            if self._wanted.pop(number, 0):
                while not queue.empty():
                    self._hand_back(queue.get_nowait())

    def _hand_back(self, msg: Msg | None) -> None:
        if msg is not None:
            self.loop.beside(self.late, msg)

    async def send(
        self, subject: str, payload: Any = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Publish. Raises nats.errors.Error where the connection does not take it for some seconds."""
        try:
            async with asyncio.timeout(TRY):
                await self.client.publish(subject, payload, reply, headers)
        except TimeoutError:
            raise nats.errors.TimeoutError from None

    async def arrived(self) -> None:
        """Wait until the server has read all that was sent. Raises ServerUnreachable as `call` does."""
        await self.call("")

    async def _hear(self, msg: Msg) -> None:
        self.client._pings_outstanding = 0  # it is there, though its answer stands behind other bytes
        inbox, _, number = msg.subject.partition(f"{self._inbox}.")
        if not inbox:
            replies = self._waiting.get(number.partition(".")[0])
        elif (wanted := next((each for each, items in self._wanted.items() if items), None)) is not None:
            self._wanted[wanted] -= 1
            replies = self._waiting[wanted]
        else:
            return self._hand_back(msg)
        if replies is not None:
            replies.put_nowait(msg)

    async def answers(self, requests: Iterable[Request]) -> list[Msg | str]:
        """What is answered to these, in their order. Each is sent when what is not answered yet is `_AHEAD` bytes with
        it, at most. Where nothing comes or goes for some seconds, the last says why; what comes after that is not
        heard. A request of no subject comes back by itself."""
        found, came, sizes, ahead = list[Msg | str](), dict[str, Msg](), list[int](), 0
        now = asyncio.get_running_loop().time
        try:
            with self.replies() as (inbox, queue):
                async with asyncio.timeout(TRY) as limit:

                    def moved() -> None:
                        is_worth_it = now() + TRY > (limit.when() or 0.0) + TRY / 8
                        if is_worth_it and not limit.expired():
                            limit.reschedule(now() + TRY)

                    queue.moved = moved

                    async def hear() -> None:
                        nonlocal ahead
                        if (reply := await queue.get()) is None:
                            raise TimeoutError
                        if status(reply) == 503:
                            raise nats.errors.Error(_NO_JETSTREAM)
                        came[reply.subject] = reply
                        while (answer := came.pop(f"{inbox}.{len(found)}", None)) is not None:
                            ahead -= sizes[len(found)]
                            found.append(answer)

                    for number, (subject, payload, headers) in enumerate(requests):
                        while ahead and ahead + len(payload) > _AHEAD:
                            await hear()
                        answer_at = f"{inbox}.{number}"
                        await self.client.publish(subject or answer_at, payload, answer_at, headers)
                        if len(payload) > 1 << 16:
                            await asyncio.sleep(0)  # it is sent before the next is copied, to the same memory
                        sizes.append(len(payload))
                        ahead += len(payload)
                        moved()
                        if cast(Any, asyncio.current_task()).cancelling():
                            raise asyncio.CancelledError  # the client goes on where it is cancelled amid sending
                    while len(found) < len(sizes):
                        await hear()
        except TimeoutError:
            found.append(self._silence())
        except nats.errors.Error as error:
            found.append(_said(error))
        else:
            if self._told:
                self._told = False
                _log.warning("%s: the server answers again", self.path)
        return found

    def _silence(self) -> str:
        """Why there is no answer."""
        return "it says nothing" if self.client.is_connected else "the connection is lost"

    async def call_all(self, requests: Sequence[Request]) -> list[Msg]:
        """What is answered to these, each sent again until it is. Raises ServerUnreachable when nothing is for some
        seconds."""
        found, began, pause, left = list[Any](), time.monotonic(), 0.05, cast("float | None", None)
        while len(found) < len(requests):
            try:
                async with asyncio.timeout(left):  # after one whole try
                    found += await self.answers(requests[len(found) :])
            except TimeoutError:
                found.append(self._silence())
            if isinstance(found[-1], str):
                self.check(began, found.pop())
                await asyncio.sleep(pause)
                pause, left = min(2 * pause, 1.0), _limit.get()
                left = left and max(0.1, left - time.monotonic())
        return found

    async def call(self, *request: Any) -> Msg:
        return (await self.call_all([Request(*request)]))[0]

    def check(self, began: float, why: str) -> None:
        """Raise ServerUnreachable where nobody waits any longer for what was begun then."""
        if self.denied:
            raise AccessDenied(0, f"{self.path}: the servers do not allow it to this user: {self.denied}")
        limit, now = _limit.get(), time.monotonic()
        if self._closed or now >= (began + PATIENCE if limit is None else limit):
            raise ServerUnreachable(f"{self.path}: no answer from the server: {why}")
        if now > began + _TELL and not self._told:
            self._told = True
            _log.warning("%s: no answer from the server: %s; it is waited for", self.path, why)
        if now > max(began, self._moved) + _MOVE and len(self.client.servers) > 1:
            self._moved = now
            self._moving = asyncio.create_task(self.client.force_reconnect())

    async def api(self, what: str, body: Any = None, missing: bool = False) -> dict[str, Any]:
        """What the server says to a request of JetStream. missing: return {} for what does not exist.

        Raises StorageError with the server's words for what it refuses.
        """
        text, began = b"" if body is None else json.dumps(body).encode(), time.monotonic()
        while True:
            found: dict[str, Any] = json.loads((await self.call(f"$JS.API.{what}", text)).data)
            error = found.get("error")
            if not error:
                return found
            if error.get("err_code") == _NO_LEADER:
                self.check(began, error["description"])
                await asyncio.sleep(0.1)
            elif missing and (error.get("code") == 404 or _is_gone(error)):
                return {}
            else:
                why = f"{error.get('description')}{_REMEDIES.get(error.get('err_code'), '')}"
                raise StorageError(0, f"{self.path}: the server refuses {what}: {why}")

    async def read(self, stream: str, subject: str, start: int = 1, batch: int = 256) -> AsyncIterator[Msg]:
        """The messages of a stream on a subject, from the one numbered `start` on."""
        began = time.monotonic()
        while True:
            left = 1
            with self.replies() as (inbox, queue):
                asked = {"seq": start, "next_by_subj": subject, "batch": batch}
                api = f"$JS.API.DIRECT.GET.{stream}"
                with suppress(nats.errors.Error):
                    await self.send(api, json.dumps(asked).encode(), inbox)
                while True:
                    try:
                        async with asyncio.timeout(TRY):
                            reply = await queue.get()
                    except TimeoutError:
                        reply = None
                    if reply is None or (code := status(reply)) not in (0, 204, 404):
                        self.check(began, self._silence())
                        break
                    if code:
                        left = int(header(reply, "Nats-Num-Pending", "0")) if code == 204 else 0
                        break
                    began, start = time.monotonic(), int(header(reply, "Nats-Sequence", "0")) + 1
                    yield reply
            if not left:
                return
            if reply is None:
                await asyncio.sleep(0.1)


class _Quiet:
    """What the client says of its connection: kept, not printed. last: the last error. is_opening: what stays
    however often it is tried ends the first try."""

    def __init__(self, link: Link, where: Address) -> None:
        self._link, self._where = link, where
        self._tries = 0
        self.is_opening = True
        self.last: Exception | None = None
        self.hang_up: Callable[[], None] = lambda: None
        self.chosen = self._left = ""

    async def error(self, error: Exception) -> None:
        if self.last is None or not isinstance(error, OSError):  # a server says more than that it hung up
            self.last = error
        _log.debug("%s: %s", self._link.path, _said(error))
        denied = refusal(self._where, error)
        if denied is not None and self.is_opening:
            raise denied
        if "permissions violation" in str(error).lower():
            self._link.denied = _said(error)

    async def disconnected(self) -> None:
        self._tries, self._left = 0, self.chosen
        self._link.interrupt()

    def next_server(self, servers: list[Any], info: dict[str, Any]) -> tuple[Any, float]:
        """Each in turn, the one that was left last, and after all of them a longer pause, of 5 seconds at most."""
        self.hang_up()  # on one that was tried and said nothing
        turn, self._tries = self._tries, self._tries + 1
        chosen = sorted(servers, key=lambda each: each.uri.netloc == self._left)[turn % len(servers)]
        self.chosen = chosen.uri.netloc
        return chosen, min(5.0, 0.05 * 2 ** min(turn // len(servers), 10)) if turn else 0.0


async def _ended(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. Of one that was cancelled no frame is kept: one has the task, which would keep them all."""
    with suppress(asyncio.CancelledError):
        return await work
    raise asyncio.CancelledError


def header(msg: Msg, name: str, default: str = "") -> str:
    """A header of a message."""
    return str((msg.headers or {}).get(name, default))


def _is_gone(error: dict[str, Any]) -> bool:
    """Whether a message is not there that was to be removed, as where an earlier request was not answered."""
    code = error.get("err_code")
    return code == _NO_SUCH or (code == _NOT_REMOVED and error.get("description") == "no message found")


def status(msg: Msg) -> int:
    """The status that a message is, 0 for one that is none."""
    word = header(msg, "Status")
    return int(word) if word.isdigit() else 0


def _said(error: BaseException) -> str:
    return str(error).removeprefix("nats: ").strip("'\"") or type(error).__name__
