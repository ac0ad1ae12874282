"""put: messages on the stream of items, and what is put from other spools.

An item that fits into a message of the server's `max_payload` is one. What is larger goes ahead in pieces, which
nobody looks at, and the item's own message, which comes last, makes it one; a writer that dies before it leaves pieces
that the next one to open the spool removes. Several items are as many messages, each of which is stored only where the
one before was the last, or an atomic batch, of which the server keeps all or nothing: it writes a batch twice, first
aside and then to the stream, which takes two to four times as long.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, takewhile
from typing import Any, Final, NamedTuple, TypeVar

import nats.errors

from .. import errors
from ..engine import Known, ProducerOptions
from ..format import footer as footers
from ..format import item as items
from ..message import NOW, Deadline, Message
from .access import Address
from .link import Request, header, within
from .session import LOOK, Session, Watch
from .spool import MARGIN, ORPHANED, Control

T = TypeVar("T")
_Error = dict[str, Any]
_TOGETHER: Final = 64
_GROUP_BYTES: Final = 16 << 20
"""Most items, and bytes of more than one, that are put at once."""
_FORWARDED: Final = 256
_AHEAD: Final = 65536
"""Bytes of a forwarded item from which on it goes piece by piece, as what is in a batch is written twice."""
_OVERHEAD: Final = 256
_MOST_BYTES: Final = 1 << 38
"""Bytes of an item that no servers are asked to take, as they do not tell every client what they have."""
_EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
_LAST: Final = "Nats-Expected-Last-Msg-Id"
_UNANSWERED, _NOT_LAST, _ANOTHER, _IN_PROCESS, _INCOMPLETE = 0, 10070, 10071, 10158, 10176
_NO_SPACE: Final = (10002, 10023, 10028, 10047)
_PASSING: Final = (_UNANSWERED, _ANOTHER, _IN_PROCESS, _INCOMPLETE)
"""What may pass when it is tried again: the last, where a server begins again amid a batch."""


class _Packed(NamedTuple):
    """An item to be put. size: bytes of its file."""

    message: Message
    layout: items.Layout
    footer: bytes
    id: str
    size: int


class NatsProducer(Session):
    """A writer's side."""

    role = "writer"

    def __init__(self, where: Address, options: ProducerOptions) -> None:
        if options.durability != "none":
            what = "what survives the loss of power is for the server to say: replicas, and its sync_interval"
            raise ValueError(f"{where.path}: durability can only be 'none'; {what}")
        self._checksum = options.checksum
        self._records: dict[str, tuple[int, Known]] = {}  # those we wrote last, by source
        self._met = -math.inf  # when another was seen to put at the same time
        self._begun, self._given_up = set[str](), set[str]()  # ids of items of which pieces are there
        self._withdrawing = asyncio.Lock()
        super().__init__(where, options.limits, options.create, options)

    async def begin(self) -> None:
        await self.spool.remove_orphans()

    def put(self, messages: Sequence[Message], until: Deadline) -> list[int]:
        packed = [self._packed(message) for message in messages]
        seqs: list[int] = []
        try:
            self.do(within(until, self._put, packed, until, seqs))
        except BaseException as error:
            if isinstance(error, errors.SpoolError):
                error.seqs = tuple(seqs)
            self.link.loop.beside(self._give_up, [each.id for each in packed])
            raise
        return seqs

    def _packed(self, message: Message) -> _Packed:
        layout, checksum = items.layout_of(message.arrays), None
        if self._checksum and layout.end <= _MOST_BYTES:
            checksum = 0
            for part in items.parts(layout, message.arrays):
                checksum = zlib.crc32(part, checksum)
        number = message.id or os.urandom(16).hex()
        footer = footers.pack(
            layout.end, time.time_ns(), bytes.fromhex(number), message.names, message.meta, checksum
        )
        if len(footer) > self._most:
            raise errors.TooLarge(
                f"{self.path}: names and meta of {len(footer)} bytes; the server takes {self._most}"
            )
        return _Packed(message, layout, footer, number, layout.end + len(footer))

    @property
    def _most(self) -> int:
        """Bytes of data in a message."""
        return self.link.max_payload - MARGIN

    async def _put(self, waiting: list[_Packed], until: Deadline, seqs: list[int]) -> None:
        last: dict[str, int] = {}
        await self._withdraw()
        while len(seqs) < len(waiting):
            group = await self._roomy(waiting[len(seqs) :], until, _TOGETHER)
            total = accumulate(each.size for each in group)
            group = group[: max(1, sum(nbytes <= _GROUP_BYTES for nbytes in total))]
            seqs += await self._store(group, self._most, last, partial(self._commit, last), self._known)
            self._begun.difference_update(each.id for each in waiting[: len(seqs)])
            await self.spool.news.tell()

    # Giving up

    async def _give_up(self, ids: list[str]) -> None:
        """Remove the pieces of those that a put that has ended did not make items; what fails is tried again."""
        given_up = self._begun.intersection(ids)
        self._begun -= given_up
        self._given_up |= given_up
        await within(NOW, self._withdraw)

    async def _withdraw(self) -> None:
        async with self._withdrawing:
            for number in [*self._given_up]:
                # What makes it an item may be on its way still: after one more piece it is refused.
                stored, error = await self._sent([Request(self.spool.subject("chunk", number))])
                if error and error["err_code"] == _UNANSWERED:
                    return
                if stored and not await self._is_there(number):
                    asked = {"filter": self.spool.subject("chunk", number), "seq": stored[0]["seq"] + 1}
                    await self.link.api(f"STREAM.PURGE.{self.spool.items}", asked)
                    await self.spool.news.tell()
                if stored:
                    self._given_up.discard(number)

    async def _is_there(self, number: str) -> bool:
        """Whether there is an item of that id, or a dead letter, either of which may become the other meanwhile."""
        return bool(
            (await self.spool.last(self.spool.items, "item", number))[0]
            or await self.spool.subjects(self.spool.notes, "dead", "*", number, "*")
            or (await self.spool.last(self.spool.items, "item", number))[0]
        )

    async def leave(self) -> None:
        await self._withdraw()

    # Forwarding

    def forwarded(self, source: str) -> Known:
        self._records.clear()
        return self.do(self._forwarded(source))[1]

    async def _forwarded(self, source: str) -> tuple[int, Known]:
        """The number of the record of that source, and what it says."""
        seq, data = await self.spool.last(self.spool.items, "source", _key(source))
        return seq, Known(*json.loads(data)) if seq else Known()

    def put_forwarded(
        self, source: str, messages: Sequence[Message], until: Deadline, done: Collection[str] = ()
    ) -> int:
        packed = [self._packed(message) for message in messages]
        return len(self.do(within(until, self._put_forwarded, source, packed, until, done)))

    async def _put_forwarded(
        self, source: str, packed: list[_Packed], until: Deadline, done: Collection[str]
    ) -> list[str]:
        """One batch of items and of the record that they came, which nobody else has written meanwhile; their ids."""
        last: dict[str, int] = {}
        record = self._records.pop(source) if source in self._records else await self._forwarded(source)
        before, known = record
        if found := [each.id for each in packed if known.has(each.message)]:
            return found  # an earlier call was not answered

        async def commit(ready: list[_Packed]) -> tuple[list[str], _Error | None]:
            then = known.after(done, {each.id: each.message.seq for each in ready})
            # The server reads a piece of each item that it looks after, which takes as long as storing it. What was
            # never sent before has no other pieces, and the first is the first to lose those it has.
            own = [
                self._own(each, _AHEAD, last if each is ready[0] or each.message.attempt != 1 else {}, {})
                for each in ready
            ]
            subject, expected = self.spool.subject("source", _key(source)), {_EXPECTED: str(before)}
            seq, error = await self._batch([*own, Request(subject, json.dumps(then).encode(), expected)])
            if error:
                return [], error
            self._records[source] = seq, then
            return [each.id for each in ready], None

        async def there(number: str) -> list[str]:
            now, then = await self._forwarded(source)
            found = [each.id for each in packed if then.has(each.message)]
            if now != before and not found:
                what = "another process forwards from the same spool to it"
                raise errors.SpoolInUse(0, f"{self.path}: {what}")
            return found if number in found else []

        found = await self._store(await self._roomy(packed, until, _FORWARDED), _AHEAD, last, commit, there)
        if before:
            asked = {"seq": before, "no_erase": True}
            await self.link.api(f"STREAM.MSG.DELETE.{self.spool.items}", asked, missing=True)
        return found

    # Room

    async def _roomy(self, waiting: list[_Packed], until: Deadline, most: int) -> list[_Packed]:
        """The first of these that may be put now, as many as `most`: when there is room. Raises Full, TooLarge,
        ShutDown."""
        while True:
            news = self.spool.news.event
            try:
                return waiting[: await self._room(waiting[0].size, most)]
            except errors.Full:
                if until == NOW or not await self.wait(news, until):
                    raise

    async def _room(self, size: int, room: int = 1) -> int:
        """How many items may be put now, `room` at most, the first of so many bytes. Raises ShutDown, TooLarge,
        Full."""
        control = await self._open_control()
        if size > _GROUP_BYTES:
            await self._check_servers(size)
        if control.limits.maxsize:
            counts = await self.spool.counts()
            control = await self._open_control()  # news may have come meanwhile
            maxsize = control.limits.maxsize or 2**63
            room = min(room, maxsize - counts.waiting)
            if room <= 0:
                raise errors.Full(f"{self.path}: full: {counts.waiting} items wait, maxsize={maxsize}")
        if most := control.limits.max_bytes:
            size += _OVERHEAD * (2 + size // self._most)
            if size > most:
                raise errors.TooLarge(
                    f"{self.path}: an item of {size} bytes can never fit: max_bytes is {most}"
                )
            there = await self.spool.bytes()
            if there + size > most:
                raise errors.Full(f"{self.path}: full: {there} bytes taken, max_bytes={most}, {size} needed")
            room = 1
        return room

    async def _check_servers(self, size: int) -> None:
        """Raise TooLarge for more than the servers say that the account or the stream may have, or than is known to be
        too much for any."""
        asked = "INFO", f"STREAM.INFO.{self.spool.items}"
        account, stream = await asyncio.gather(*map(self.link.api, asked))
        config = stream["config"]
        tier = account.get("tiers", {}).get(f"R{config['num_replicas']}", account)
        kind = "max_storage" if config["storage"] == "file" else "max_memory"
        for what, most in (
            ("an item on servers", _MOST_BYTES),
            ("this account of the servers", tier.get("limits", {}).get(kind, 0)),
            ("the stream", config.get("max_bytes", 0)),
        ):
            if 0 < most < size:
                raise errors.TooLarge(
                    f"{self.path}: an item of {size} bytes can never fit: {what} may have {most}"
                )

    async def _open_control(self) -> Control:
        control = await self.spool.agreed()
        if control.state != "open":
            raise errors.ShutDown(
                f"{self.path}: was shut down; SpoolWriter(path, reopen=True) opens it again"
            )
        return control

    # Storing

    async def _store(
        self,
        group: list[_Packed],
        most: int,
        last: dict[str, int],
        commit: Callable[[list[_Packed]], Awaitable[tuple[list[T], _Error | None]]],
        known: Callable[[str], Awaitable[list[T]]],
    ) -> list[T]:
        """What `commit` returns for the first of these items, when their pieces are stored: of those that have more
        than `most` bytes. last: the number of each item's last piece, where all are. known: the same where an item of
        that id is there, as of an earlier try that was not answered."""
        began = time.monotonic()
        while True:
            ready, error = await self._send_pieces(group, most, last)
            if ready:
                done, error = await commit(ready)
                if done:
                    return done
            assert error
            if done := await known(group[0].id):
                return done
            if error["err_code"] not in _PASSING:
                for each in group:
                    if each.size > most:
                        await self.spool.forget(self.spool.items, "chunk", each.id)
                        self._begun.discard(each.id)
                number = errno.ENOSPC if error["err_code"] in _NO_SPACE else 0
                what = f"the server refuses the item: {error['description']}"
                raise errors.StorageError(number, f"{self.path}: {what}")
            if error["err_code"] == _ANOTHER:
                last.clear()  # they may have been removed since, where this process was stopped for long
            self.spool.control = None
            await self._open_control()
            self.link.check(began, error["description"])
            await asyncio.sleep(0.1)
            for each in group:  # all of them, lest each try leaves to the next what stops it
                if each.size > most and each.id not in last and not await known(each.id):
                    await self._forget_pieces(each)

    async def _send_pieces(
        self, group: list[_Packed], most: int, last: dict[str, int]
    ) -> tuple[list[_Packed], _Error | None]:
        """Send what is not stored yet, but of no more items when that takes long; the first that are whole then."""
        sending = [each for each in group if each.size > most and each.id not in last]
        began = time.monotonic()

        def pieces() -> Iterator[Request]:
            for each in sending:
                if time.monotonic() - began < ORPHANED / 3:
                    self._begun.add(each.id)
                    yield from self._pieces(each)

        said, error = await self._sent(pieces()) if sending else ([], None)
        for each in sending:
            count = -(-each.layout.end // self._most)
            if len(said) < count:
                break
            last[each.id], said = said[count - 1]["seq"], said[count:]
        return list(takewhile(lambda each: each.size <= most or each.id in last, group)), error

    def _pieces(self, packed: _Packed) -> Iterator[Request]:
        subject, at, headers = self.spool.subject("chunk", packed.id), 0, {_EXPECTED: "0"}
        for piece in _pieces(items.parts(packed.layout, packed.message.arrays), self._most):
            yield Request(subject, piece, headers | {"Spool-At": str(at)})
            at, headers = at + len(piece), {}

    async def _forget_pieces(self, packed: _Packed) -> None:
        """Remove the pieces of an earlier try: up to the last one, as this may be done twice, late, where a network was
        cut, and those sent next are above it."""
        subject = self.spool.subject("chunk", packed.id)
        if earlier := (await self.spool.last(self.spool.items, "chunk", packed.id))[0]:
            await self.link.api(f"STREAM.PURGE.{self.spool.items}", {"filter": subject, "seq": earlier + 1})

    def _own(self, packed: _Packed, most: int, last: dict[str, int], headers: dict[str, str]) -> Request:
        """The message that makes an item one: all of what has up to `most` bytes. It is refused where another piece of
        the item than that in `last` was the last."""
        subject = self.spool.subject("item", packed.id)
        if packed.size <= most:
            parts = items.parts(packed.layout, packed.message.arrays)
            return Request(subject, b"".join((*parts, packed.footer)), headers)
        headers["Spool-Size"] = str(packed.size)
        if packed.id in last:
            headers[_EXPECTED] = str(last[packed.id])
            headers[f"{_EXPECTED}-Subject"] = self.spool.subject("chunk", packed.id)
        return Request(subject, packed.footer, headers)

    async def _commit(self, last: dict[str, int], ready: list[_Packed]) -> tuple[list[int], _Error | None]:
        """Send what makes items of these; the numbers of the first that are stored, in order. One server stores each if
        it has the one before as the last one; where others put at the same time, or servers may choose another that
        leads, they go as one batch, which takes longer."""
        is_alone = time.monotonic() > self._met + LOOK and not self.link.is_cluster
        own, before = list[Request](), ""
        for each in ready:
            headers = {"Nats-Msg-Id": each.id} | ({_LAST: before} if before and is_alone else {})
            own.append(self._own(each, self._most, last, headers))
            before = each.id
        if len(own) == 1 or is_alone:
            said, error = await self._sent(own)
            if error and error["err_code"] == _NOT_LAST:
                self._met = time.monotonic()
            return [each["seq"] for each in said], error
        seq, error = await self._batch(own)
        if error and error["err_code"] not in _PASSING:  # the batch may be what is refused: each by itself
            return await self._commit(last, ready[:1])
        return [seq - number for number in reversed(range(len(own)))] if seq else [], error

    async def _batch(self, requests: list[Request]) -> tuple[int, _Error | None]:
        """Send what is stored as one or not at all; the number of the last."""
        batch, last = os.urandom(8).hex(), len(requests)
        for number, (subject, payload, given) in enumerate(requests, 1):
            headers = {**(given or {}), "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
            if number < last:
                try:
                    await self.link.send(subject, payload, headers=headers)
                except nats.errors.Error as why:
                    return 0, {"err_code": _UNANSWERED, "description": str(why)}
        if sum(len(each.payload) for each in requests) > self._most:  # it would wait for all of them
            await self.link.arrived()
        said, error = await self._sent([Request(subject, payload, headers | {"Nats-Batch-Commit": "1"})])
        return said[0]["seq"] if said else 0, error

    async def _sent(self, requests: Iterable[Request]) -> tuple[list[dict[str, Any]], _Error | None]:
        """What is said of the first of these messages, which are stored, and of the next, which is not."""
        stored = list[dict[str, Any]]()
        for reply in await self.link.answers(requests):
            if isinstance(reply, str):
                return stored, {"err_code": _UNANSWERED, "description": reply}
            said = json.loads(reply.data)
            if error := said.get("error"):
                return stored, error
            stored.append(said)
        return stored, None

    async def _known(self, number: str) -> list[int]:
        """The number of an item that is stored already, if it was not taken since."""
        return [int(header(msg, "Nats-Sequence")) for msg in await self.spool.first(number=number)]

    def full(self) -> bool:
        async def look() -> bool:
            counts, control = await self.spool.counts(), await self.spool.agreed()
            return counts.waiting >= (control.limits.maxsize or 2**63)

        return self.do(within(NOW, look))

    def join(self, until: Deadline, last: int = 0) -> int:
        return self.do(within(until, self._join, until, last))

    async def _join(self, until: Deadline, last: int) -> int:
        """The first item that is left says whether one of those is."""
        await self.link.loop.settled()
        last = last or int((await self.link.api(f"STREAM.INFO.{self.spool.items}"))["state"]["last_seq"])
        while True:
            news = self.spool.news.event
            if not [msg for msg in await self.spool.first() if int(header(msg, "Nats-Sequence")) <= last]:
                return 0
            if until == NOW or not await self.wait(news, until):
                return last

    def watch(self, news: Callable[[], None], lacking: Message | int | None = None) -> Watch:
        async def look() -> float:
            if isinstance(lacking, int):
                return LOOK if await self._join(NOW, lacking) else 0.0
            await self._room(size)
            return 0.0

        size = self._packed(lacking).size if isinstance(lacking, Message) else 0
        return Watch(self, look, news)

    def shutdown(self, immediate: bool) -> None:
        self.do(self.spool.shutdown(immediate))


def _key(source: str) -> str:
    """The name of a spool as a part of a subject."""
    return hashlib.sha256(source.encode()).hexdigest()[:32]


def _pieces(parts: Iterator[bytes | memoryview], size: int) -> Iterator[bytes | memoryview]:
    """The same bytes in pieces of one size, and a last one; what lies in one part is not copied."""
    held: list[bytes | memoryview] = []
    room = size
    for part in parts:
        view = memoryview(part)
        while len(view) >= room:
            held.append(view[:room])
            view, room = view[room:], size
            yield held[0] if len(held) == 1 else b"".join(held)
            held.clear()
        if view:
            held.append(view)
            room -= len(view)
    if held:
        yield b"".join(held)
