"""put: a message, or an atomic batch of messages, on the stream of items.

An item that is one message is stored by it. One that is larger than the server's `max_payload` is the messages of its
pieces and one of its own, and so are several items put at once: one atomic batch, of which the server keeps all or
nothing. It writes a batch twice, first aside and then to the stream, which takes 54 MB from 100 to 240 ms; so what is
more than `_BATCH_BYTES` goes piece by piece, and the item's own message, which comes last, makes it one. A writer that
dies before leaves pieces that the next one to open the spool removes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final, NamedTuple

import nats.errors
from nats.aio.msg import Msg

from .. import errors
from ..engine import Known, ProducerOptions
from ..format import footer as footers
from ..format import item as items
from ..message import NOW, Deadline, Message
from .access import Address
from .link import TRY, header, within
from .session import LOOK, Session, Watch
from .spool import MARGIN, ORPHANED, Control

_TOGETHER: Final = 64
_MAX_BATCH: Final = 1000
_BATCH_BYTES: Final = 16 << 20
_AT_ONCE: Final = 16
_OVERHEAD: Final = 256
_FORWARDED: Final = 256
_AHEAD: Final = 65536
"""Bytes of a forwarded item from which on it goes piece by piece, as what is in a batch is written twice."""
_SLOW: Final = 20.0
"""Seconds in which what is on its way at once arrives over a slow line."""
_EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
_ANOTHER, _DUPLICATE, _IN_PROCESS = 10071, 10201, 10158


class _Sent(NamedTuple):
    """A message to be sent."""

    subject: str
    payload: Any
    headers: dict[str, str]


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
        super().__init__(where, options.limits, options.create, options)

    async def begin(self) -> None:
        await self.spool.remove_orphans()

    def put(self, messages: Sequence[Message], until: Deadline) -> list[int]:
        packed = [self._packed(message) for message in messages]
        seqs: list[int] = []
        try:
            self.do(within(until, self._put, packed, until, seqs))
        except errors.SpoolError as error:
            error.seqs = tuple(seqs)
            raise
        return seqs

    def _packed(self, message: Message) -> _Packed:
        layout, checksum = items.layout_of(message.arrays), None
        if self._checksum:
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
        while len(seqs) < len(waiting):
            news = self.spool.news
            try:
                room = await self._room(waiting[len(seqs)].size)
                seqs += await self._store(waiting[len(seqs) : len(seqs) + room], until)
                await self.spool.tell()
            except errors.Full:
                if until == NOW or not await self.wait(news, until):
                    raise

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
        return self.do(within(until, self._put_forwarded, source, packed, until, done))

    async def _put_forwarded(
        self, source: str, packed: list[_Packed], until: Deadline, done: Collection[str]
    ) -> int:
        """One batch of items and of the record that they came, which nobody else has written meanwhile."""
        subject, began, again = self.spool.subject("source", _key(source)), time.monotonic(), False
        while True:
            ours = self._records.pop(source) if source in self._records else None
            before, known = ours or await self._forwarded(source)
            if packed[0].id in known.put:  # an earlier try was not answered
                return sum(each.id in known.put for each in packed)
            news = self.spool.news
            try:
                group = packed[: await self._room(packed[0].size, _FORWARDED)]
            except errors.Full:
                if until == NOW or not await self.wait(news, until):
                    raise
                continue
            for each in group if again else ():  # all of them, lest each try leaves to the next what stops it
                if each.size > _AHEAD:
                    await self._forget_pieces(each)
            sent, reply, last = await self._send_pieces(group, _AHEAD)
            if reply is None:
                group = group[:sent]
                then = known.after(done, {each.id: each.message.seq for each in group})
                record = _Sent(subject, json.dumps(then).encode(), {_EXPECTED: str(before)})
                # The server reads a piece of each item that it looks after, which takes as long as storing it. What was
                # never sent before has no other pieces, and the first is the first to lose those it has.
                first = next(iter(last), "")
                sure = {each.id for each in group if each.message.attempt == 1 and each.id != first}
                own = [
                    self._own(each, _AHEAD, self._after(each.id, last, () if again else sure))
                    for each in group
                ]
                reply = await self._commit([*own, record], last)
            if again := isinstance(reply, str):
                await self._again(began, reply)
                continue
            if error := reply.get("error"):
                if error["err_code"] == _ANOTHER:
                    raise errors.SpoolInUse(
                        0, f"{self.path}: another process forwards from the same spool to it"
                    )
                raise await self._refused(group, error)
            self._records[source] = int(reply["seq"]), then
            if before:
                asked = {"seq": before, "no_erase": True}
                await self.link.api(f"STREAM.MSG.DELETE.{self.spool.items}", asked, missing=True)
            return len(group)

    async def _room(self, size: int, room: int = _TOGETHER) -> int:
        """How many items may be put now, `room` at most, the first of so many bytes. Raises ShutDown, TooLarge,
        Full."""
        control = await self._open_control()
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

    async def _open_control(self) -> Control:
        control = await self.spool.agreed()
        if control.state != "open":
            raise errors.ShutDown(
                f"{self.path}: was shut down; SpoolWriter(path, reopen=True) opens it again"
            )
        return control

    def _pieces(self, packed: _Packed, most: int) -> Iterator[_Sent]:
        """The messages that come before an item's own: none where that can have up to `most` bytes."""
        if packed.size > most:
            subject, at, headers = self.spool.subject("chunk", packed.id), 0, {_EXPECTED: "0"}
            for piece in _pieces(items.parts(packed.layout, packed.message.arrays), self._most):
                yield _Sent(subject, piece, headers | {"Spool-At": str(at)})
                at, headers = at + len(piece), {}

    def _own(self, packed: _Packed, most: int, headers: dict[str, str]) -> _Sent:
        """The message that makes an item one: of what has up to `most` bytes, all of it."""
        subject, parts = (
            self.spool.subject("item", packed.id),
            items.parts(packed.layout, packed.message.arrays),
        )
        if packed.size <= most:
            return _Sent(subject, b"".join((*parts, packed.footer)), headers)
        return _Sent(subject, packed.footer, headers | {"Spool-Size": str(packed.size)})

    def _count(self, packed: _Packed) -> int:
        return 1 if packed.size <= self._most else 1 - -packed.layout.end // self._most

    async def _store(self, several: list[_Packed], until: Deadline) -> list[int]:
        """Store the first of these items, as many as one batch can have; returns their numbers."""
        group = [several[0]]
        while len(group) < len(several) and self._is_batch(several[: len(group) + 1]):
            group = several[: len(group) + 1]
        counts = [self._count(each) for each in group]
        began, whole = time.monotonic(), sum(counts) == 1 or self._is_batch(group)
        while True:
            if whole:
                reply = await self._batch([sent for each in group for sent in self._messages(each)])
            else:
                reply = await self._piece_by_piece(group[0])
            if isinstance(reply, str):
                await self._again(began, reply)
                continue
            error = reply.get("error")
            if error is None:
                return [int(reply["seq"]) - sum(counts[index + 1 :]) for index in range(len(counts))]
            if error["err_code"] == _IN_PROCESS:  # what was sent first is with the other servers still
                await self._again(began, error["description"])
            elif len(group) > 1:  # the batch may be what is refused: each by itself
                group, counts = group[:1], counts[:1]
            elif error["err_code"] == _DUPLICATE:
                return [await self._known(group[0])]
            elif whole and counts[0] > 1:
                whole = False
            else:
                raise await self._refused(group, error)

    def _messages(self, packed: _Packed) -> list[_Sent]:
        """The messages of an item, its own last."""
        own = self._own(packed, self._most, {"Nats-Msg-Id": packed.id})
        return [*self._pieces(packed, self._most), own]

    async def _again(self, began: float, why: str) -> None:
        """Before what was begun then is sent once more. Raises ServerUnreachable, ShutDown."""
        self.spool.control = None
        await self._open_control()
        self.link.check(began, why)
        await asyncio.sleep(0.1)

    async def _refused(self, group: list[_Packed], error: dict[str, Any]) -> errors.StorageError:
        """An error that says so, when nothing of these items is left."""
        for each in group:
            if each.size > _AHEAD:
                await self.spool.forget(self.spool.items, "chunk", each.id)
        return errors.StorageError(0, f"{self.path}: the server refuses the item: {error['description']}")

    def _is_batch(self, group: list[_Packed]) -> bool:
        """Whether one batch can have them."""
        return sum(map(self._count, group)) <= _MAX_BATCH and sum(each.size for each in group) <= _BATCH_BYTES

    async def _batch(self, messages: list[_Sent]) -> dict[str, Any] | str:
        """Send a message, or an atomic batch of them; returns what is said of the last."""
        batch, total = os.urandom(8).hex(), len(messages)
        for index, sent in enumerate(messages, 1):
            headers = dict(sent.headers)
            if total > 1:
                headers |= {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(index)}
            if index < total:
                try:
                    await self.link.send(sent.subject, sent.payload, headers=headers)
                except nats.errors.Error as error:
                    return str(error)
        if total > 1:
            headers["Nats-Batch-Commit"] = "1"
        if sum(len(sent.payload) for sent in messages) > self._most:  # it would wait for all of them
            await self.link.arrived()
        return _answer(await self.link.ask(sent.subject, sent.payload, headers))

    async def _piece_by_piece(self, packed: _Packed) -> dict[str, Any] | str:
        """Send the pieces, and the item's own message when all are stored."""
        if await self._known(packed):  # an earlier try was not answered
            return {"error": {"err_code": _DUPLICATE}}
        _, reply, last = await self._send_pieces([packed], self._most)
        headers = {"Nats-Msg-Id": packed.id} | self._after(packed.id, last)
        return reply or await self._commit([self._own(packed, self._most, headers)], last)

    def _after(self, number: str, last: dict[str, int], sure: Collection[str] = ()) -> dict[str, str]:
        """Headers of an item's own message, which is refused where another piece of it was the last; of those in `sure`
        that need not be looked after."""
        if number not in last or number in sure:
            return {}
        return {_EXPECTED: str(last[number]), f"{_EXPECTED}-Subject": self.spool.subject("chunk", number)}

    async def _commit(self, messages: list[_Sent], last: dict[str, int]) -> dict[str, Any] | str:
        """Send what makes items of pieces. Those may have been removed since, where this process was stopped for long,
        and where a network was cut others may come late: then all is sent again."""
        reply = await self._batch(messages)
        if not isinstance(reply, str) and reply.get("error", {}).get("err_code") == _ANOTHER:
            for number, seq in last.items():
                if (await self.spool.last(self.spool.items, "chunk", number))[0] != seq:
                    return "other pieces are there than were sent"
        return reply

    async def _send_pieces(
        self, group: list[_Packed], most: int
    ) -> tuple[int, dict[str, Any] | str | None, dict[str, int]]:
        """Send the pieces of these items, `_AT_ONCE` at a time, but no more items when that takes long: of how many,
        why it failed, None where all that were sent are stored, and the number of each item's last piece."""
        began, count, last = time.monotonic(), 0, dict[str, int]()
        sending: deque[tuple[_Packed, asyncio.Task[Msg | str]]] = deque()

        async def stored() -> dict[str, Any] | str | None:
            packed, task = sending.popleft()
            try:
                async with asyncio.timeout(TRY):  # from when the one before was
                    said = _answer(await task)
            except TimeoutError:
                return "a piece is not answered"
            if isinstance(said, str):
                return said
            if "error" not in said:
                last[packed.id] = int(said["seq"])
                return None
            if said["error"]["err_code"] != _ANOTHER:
                return said
            if sending:  # of this try too, lest it stops the next one
                await asyncio.wait([task for _, task in sending], timeout=TRY)
            await self._forget_pieces(packed)
            return "there were pieces of an earlier try"

        try:
            for packed in group:
                if time.monotonic() - began > ORPHANED / 3:
                    break
                for piece in self._pieces(packed, most):
                    sending.append((packed, asyncio.create_task(self.link.ask(*piece, seconds=_SLOW))))
                    await asyncio.sleep(0)  # they go in order
                    if len(sending) == _AT_ONCE and (failed := await stored()):
                        return count, failed, last
                count += 1
            while sending:
                if failed := await stored():
                    return count, failed, last
            return count, None, last
        finally:
            for _, task in sending:
                task.cancel()

    async def _forget_pieces(self, packed: _Packed) -> None:
        """Remove the pieces of an earlier try: up to the last one, as this may be done twice, late, where a network was
        cut, and those sent next are above it."""
        subject = self.spool.subject("chunk", packed.id)
        if earlier := (await self.spool.last(self.spool.items, "chunk", packed.id))[0]:
            await self.link.api(f"STREAM.PURGE.{self.spool.items}", {"filter": subject, "seq": earlier + 1})

    async def _known(self, packed: _Packed) -> int:
        """The number of an item that is stored already; 0 when it was taken since."""
        async for found in self.link.read(self.spool.items, self.spool.subject("item", packed.id), batch=1):
            return int(header(found, "Nats-Sequence"))
        return 0

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
            news = self.spool.news
            async for found in self.link.read(self.spool.items, self.spool.subject("item", "*"), batch=1):
                if int(header(found, "Nats-Sequence")) > last:
                    return 0
                break
            else:
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


def _answer(reply: Msg | str) -> dict[str, Any] | str:
    """What the server says of a message that is put, or why it says nothing."""
    if isinstance(reply, str):
        return reply
    found: dict[str, Any] = json.loads(reply.data)
    return found
