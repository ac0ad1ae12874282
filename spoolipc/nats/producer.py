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
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final, NamedTuple

import nats.errors
from nats.aio.msg import Msg

from .. import errors
from ..engine import Known, ProducerOptions
from ..format import footer as footers
from ..format import item as items
from ..message import NOW, Deadline, Message
from .link import Address, header, within
from .session import LOOK, Session, Watch
from .spool import MARGIN, Control

_TOGETHER: Final = 64
_MAX_BATCH: Final = 1000
_BATCH_BYTES: Final = 16 << 20
_AT_ONCE: Final = 16
_OVERHEAD: Final = 256
_ANOTHER, _DUPLICATE = 10071, 10201


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
        super().__init__(where, options.limits, options.create, options)
        self.do(self.spool.remove_orphans())

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
        before, known = await self._forwarded(source)
        if packed[0].id in known.put:  # an earlier try was not answered
            return sum(each.id in known.put for each in packed)
        subject = self.spool.subject("source", _key(source))

        def record(group: list[_Packed]) -> _Sent:
            written = json.dumps(known.after(done, {each.id: each.message.seq for each in group})).encode()
            return _Sent(subject, written, {"Nats-Expected-Last-Subject-Sequence": str(before)})

        while True:
            news = self.spool.news
            try:
                room = await self._room(packed[0].size)
                put = len(await self._store(packed[:room], until, record))
                break
            except errors.Full:
                if until == NOW or not await self.wait(news, until):
                    raise
        if before:
            asked = {"seq": before, "no_erase": True}
            await self.link.api(f"STREAM.MSG.DELETE.{self.spool.items}", asked, missing=True)
        return put

    async def _room(self, size: int) -> int:
        """How many items may be put now, the first of so many bytes. Raises ShutDown, TooLarge, Full."""
        control = await self._open_control()
        room = _TOGETHER
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

    def _messages(self, packed: _Packed) -> Iterator[_Sent]:
        """The messages of an item, its own last."""
        message, layout, footer, number, size = packed
        subject, headers = self.spool.subject("item", number), {"Nats-Msg-Id": number}
        parts = items.parts(layout, message.arrays)
        if size <= self._most:
            yield _Sent(subject, b"".join((*parts, footer)), headers)
            return
        for piece in _pieces(parts, self._most):
            yield _Sent(self.spool.subject("chunk", number), piece, {})
        yield _Sent(subject, footer, headers | {"Spool-Size": str(size)})

    def _count(self, packed: _Packed) -> int:
        return 1 if packed.size <= self._most else 1 - -packed.layout.end // self._most

    async def _store(
        self, several: list[_Packed], until: Deadline, beside: Callable[[list[_Packed]], _Sent] | None = None
    ) -> list[int]:
        """Store the first of these items, as many as one batch can have; returns their numbers.

        beside: makes a message that is stored with them or not at all, after them.
        """
        group = [several[0]]
        while len(group) < len(several) and self._is_batch(several[: len(group) + 1]):
            group = several[: len(group) + 1]
        counts = [self._count(each) for each in group]
        began, whole = time.monotonic(), sum(counts) == 1 or self._is_batch(group)
        while True:
            last = [] if beside is None else [beside(group)]
            if whole:
                reply = await self._batch([sent for each in group for sent in self._messages(each)] + last)
            else:
                reply = await self._piece_by_piece(group[0], last)
            if isinstance(reply, str):
                self.spool.control = None
                await self._open_control()
                self.link.check(began, reply)
                await asyncio.sleep(0.1)
                continue
            error = reply.get("error")
            if error is None:
                seq = int(reply["seq"]) - len(last)
                return [seq - sum(counts[index + 1 :]) for index in range(len(counts))]
            if error["err_code"] == _ANOTHER:
                raise errors.SpoolInUse(0, f"{self.path}: another process forwards from the same spool to it")
            if len(group) > 1:  # the batch may be what is refused: each by itself
                group, counts = group[:1], counts[:1]
            elif error["err_code"] == _DUPLICATE:
                return [await self._known(group[0])]
            elif whole and counts[0] > 1:
                whole = False
            else:
                what = f"the server refuses the item: {error['description']}"
                raise errors.StorageError(0, f"{self.path}: {what}")

    def _is_batch(self, group: list[_Packed]) -> bool:
        """Whether one batch can have them, and a message beside."""
        return sum(map(self._count, group)) < _MAX_BATCH and sum(each.size for each in group) <= _BATCH_BYTES

    async def _batch(self, messages: list[_Sent]) -> dict[str, Any] | str:
        """Send a message, or an atomic batch of them; returns what is said of the last."""
        batch, total = os.urandom(8).hex(), len(messages)
        for index, sent in enumerate(messages, 1):
            headers = dict(sent.headers)
            if total > 1:
                headers |= {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(index)}
            if index < total:
                try:
                    await self.link.client.publish(sent.subject, sent.payload, headers=headers)
                except nats.errors.Error as error:
                    return str(error)
        if total > 1:
            headers["Nats-Batch-Commit"] = "1"
        return _answer(await self.link.ask(sent.subject, sent.payload, headers))

    async def _piece_by_piece(self, packed: _Packed, last: list[_Sent]) -> dict[str, Any] | str:
        """Send the pieces, `_AT_ONCE` at a time, and the item's own message when all are stored."""
        if await self._known(packed):  # an earlier try was not answered
            return {"error": {"err_code": _DUPLICATE}}
        await self.spool.forget(self.spool.items, "chunk", packed.id)  # of an earlier try
        *pieces, own = self._messages(packed)
        sending: list[asyncio.Task[Msg | str]] = []
        try:
            while pieces or sending:
                while pieces and len(sending) < _AT_ONCE:
                    sending.append(asyncio.create_task(self.link.ask(*pieces.pop(0))))
                    await asyncio.sleep(0)  # they go in order
                said = _answer(await sending.pop(0))
                if isinstance(said, str) or "error" in said:
                    return said
        finally:
            for task in sending:
                task.cancel()
        return await self._batch([own, *last])

    async def _known(self, packed: _Packed) -> int:
        """The number of an item that is stored already; 0 when it was taken since."""
        async for found in self.link.read(self.spool.items, self.spool.subject("item", packed.id), batch=1):
            return int(header(found, "Nats-Sequence"))
        return 0

    def full(self) -> bool:
        async def look() -> bool:
            counts, control = await self.spool.counts(), await self.spool.agreed()
            return counts.waiting >= (control.limits.maxsize or 2**63)

        return self.do(look())

    def join(self, until: Deadline, last: int = 0) -> int:
        return self.do(within(until, self._join, until, last))

    async def _join(self, until: Deadline, last: int) -> int:
        """The first item that is left says whether one of those is."""
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
