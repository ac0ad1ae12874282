"""A spool on a server: its streams, what is kept in them, and how a session is in it.

Two streams, of `spoolipc.NAME.` subjects:

    spoolipc-NAME-items   item.ID    an item: the bytes of its file; of a large one its footer, with its size as header
                          chunk.ID   what comes before that footer, in pieces of `max_payload`
                          source.KEY   JSON: ids and numbers of what was forwarded last from another spool
    spoolipc-NAME-notes   control    JSON: state, limits, writers that ever came; changed by compare-and-swap
                          tasks    how many items queues got more than they were told are done; likewise
                          session.ROLE.TOKEN   who has the spool open; forgotten when not renewed for some seconds
                          failed.SEQ   JSON: deliveries, failures, whether it waits again or is a dead letter
                          dead.SEQ.ID.BYTES   a dead letter: its message; bytes of its pieces, which stay

The consumer `readers` of the first delivers the items, and an item is removed when it has acknowledged it; `kept`
never asks for anything, so that the rest stays until it is removed by name. An item's number is that of its message.
A spool that was shut down has no subject for items, so a put fails there whatever its writer knows.
"""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64decode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, get_args

import nats.errors
import numpy as np
from nats.aio.msg import Msg

from .. import errors
from .. import message as values
from ..format import footer as footers
from ..format import item as items
from ..message import Limits, Message
from .link import TRY, Link, Request, header, status
from .memory import Memory
from .news import News

ACK_WAIT: Final = 5.0
"""Seconds after which the server redelivers what no session says to be in flight."""
PRESENCE: Final = 10
"""Seconds for which a session is taken to live without a word."""
ORPHANED: Final = 60.0
"""Seconds after which pieces of no item are removed."""
MARGIN: Final = 4096
"""Bytes of a message left for its headers."""
_NS: Final = 10**9


@lru_cache(16)
def _completed(asked: Limits) -> Limits:
    return values.completed(asked, values.DEFAULTS)


@dataclass(frozen=True, slots=True)
class Control:
    """What is agreed on. revision: of the note. writers: that ever came. asked: the limits that somebody gave."""

    revision: int = 0
    state: values.State = "open"
    writers: int = 0
    asked: Limits = field(default_factory=Limits)

    @classmethod
    def read(cls, revision: int, data: bytes) -> Control:
        """The note of these bytes, or one by which nothing was agreed on where somebody else wrote them."""
        try:
            said = json.loads(data)
            if said["state"] in get_args(values.State):
                return cls(revision, said["state"], int(said["writers"]), Limits(**said["asked"]))
        except (ValueError, TypeError, KeyError):
            pass
        return cls(revision)

    @property
    def limits(self) -> Limits:
        return _completed(self.asked)


@dataclass(slots=True)
class Failed:
    """The deliveries of an item that failed. attempt: the last one known. state: "held" while that one is in flight,
    "waits" until `due` (wall clock) or "dead". undone: deliveries that do not count as attempts."""

    attempt: int = 0
    state: str = "held"
    due: float = 0.0
    history: list[list[Any]] = field(default_factory=list)
    undone: int = 0

    @classmethod
    def read(cls, data: bytes) -> Failed:
        """The note of these bytes, or one that knows of nothing where somebody else wrote them."""
        try:
            said = json.loads(data)
            known = [[int(a), float(when), str(who), str(why)] for a, when, who, why in said["history"]]
            return cls(
                int(said["attempt"]), str(said["state"]), float(said["due"]), known, int(said["undone"])
            )
        except (ValueError, TypeError, KeyError):
            return cls()

    def failed(self, who: str, why: str) -> None:
        self.history.append([self.attempt, time.time(), who, why[:1000]])

    @property
    def why(self) -> str:
        return str(self.history[-1][3]) if self.history else ""

    def failures(self) -> tuple[values.Failure, ...]:
        return tuple(values.Failure(*each) for each in self.history)


@dataclass(frozen=True, slots=True)
class Counts:
    """Items by where they are. fresh: never delivered. others: in flight or delayed. delivered: up to which number."""

    fresh: int
    pending: int
    delivered: int
    failed: dict[int, Failed]

    @property
    def requeued(self) -> dict[int, Failed]:
        return {seq: note for seq, note in self.failed.items() if note.state == "waits"}

    @property
    def first(self) -> tuple[int, int]:
        """From which number on the item lies that is delivered next, and how many attempts it had."""
        now = time.time()
        due = sorted((note.due, seq, note.attempt) for seq, note in self.requeued.items() if note.due <= now)
        return due[0][1:] if due else (self.delivered + 1, 0)

    @property
    def delayed(self) -> int:
        return sum(note.due > time.time() for note in self.requeued.values())

    @property
    def waiting(self) -> int:
        return self.fresh + len(self.requeued)

    @property
    def in_flight(self) -> int:
        return max(0, self.pending - len(self.requeued))


class Spool:
    """The streams of one spool through one connection."""

    def __init__(self, link: Link, name: str, replicas: int, storage: str) -> None:
        self.link, self.path, self.name = link, link.path, name
        self.items, self.notes = f"spoolipc-{name}-items", f"spoolipc-{name}-notes"
        self.control: Control | None = None  # None when another session may have changed it
        self._kept = {"num_replicas": replicas, "storage": storage, "allow_direct": True}
        self.news, self.memory = News(link, self.subject("news"), self._forget_control), Memory()
        link.late = self.refuse

    def subject(self, *parts: object) -> str:
        return ".".join(map(str, ("spoolipc", self.name, *parts)))

    # Its streams

    async def open(self, create: bool) -> None:
        """Make what is missing, or raise NotASpool, and listen to others."""
        found = await self.link.api(f"STREAM.INFO.{self.notes}", missing=True)
        if not found and not create:
            what = "there is no spool here; SpoolWriter(path) makes one"
            raise errors.NotASpool(0, f"{self.path}: {what}")
        if not found:
            await self._make()
        await self.news.open()

    async def _make(self) -> None:
        """The stream of notes last: it says that all is there. Another session may do the same at once."""
        stream = self._kept | {"name": self.items, "retention": "interest", "allow_atomic": True}
        await self.link.api(f"STREAM.CREATE.{self.items}", stream | {"subjects": self._subjects("item")})
        for consumer, kinds in (("readers", ["item"]), ("kept", ["chunk", "source"])):
            asked: dict[str, Any] = {
                "durable_name": consumer,
                "filter_subjects": [self.subject(kind, "*") for kind in kinds],
            }
            asked |= {"ack_policy": "explicit", "ack_wait": int(ACK_WAIT * _NS), "max_ack_pending": -1}
            body = {"stream_name": self.items, "config": asked}
            await self.link.api(f"CONSUMER.CREATE.{self.items}.{consumer}", body)
        kinds = ["control", "tasks", "session.*.*", "failed.*", "dead.*.*.*"]
        stream = self._kept | {"name": self.notes, "max_msgs_per_subject": 1, "allow_msg_ttl": True}
        stream |= {"subjects": [self.subject(kind) for kind in kinds]}
        await self.link.api(f"STREAM.CREATE.{self.notes}", stream)

    def _subjects(self, items: str) -> list[str]:
        return [self.subject(each, "*") for each in (items, "chunk", "source")]

    async def seal(self, control: Control) -> None:
        """Let the stream of items take puts, or not."""
        config = (await self.link.api(f"STREAM.INFO.{self.items}"))["config"]
        taking = "item" if control.state == "open" else "closed"
        subjects = self._subjects(taking)
        if sorted(config["subjects"]) != sorted(subjects):
            await self.link.api(f"STREAM.UPDATE.{self.items}", config | {"subjects": subjects})

    async def remove(self) -> None:
        for stream in (self.items, self.notes):
            await self.link.api(f"STREAM.DELETE.{stream}", missing=True)

    # What is agreed on

    def _forget_control(self) -> None:
        self.control = None

    async def agreed(self) -> Control:
        """The control note, as of the last news of it."""
        agreed = self.control
        if agreed is None:
            agreed = self.control = Control.read(*await self.last(self.notes, "control"))
        return agreed

    async def last(self, stream: str, *subject: object) -> tuple[int, bytes]:
        """The number and the data of the last message on a subject; 0 for none."""
        found = await self.stored(stream, last_by_subj=self.subject(*subject))
        return found.get("seq", 0), b64decode(found.get("data", ""))

    async def stored(self, stream: str, **asked: object) -> dict[str, Any]:
        """A message as the stream's leader has it; {} for none."""
        found = await self.link.api(f"STREAM.MSG.GET.{stream}", asked, missing=True)
        return dict(found.get("message", {}))

    async def change(self, step: Callable[[Control], Control]) -> Control:
        """Let `step`, which may raise, decide anew what is agreed on; all are told."""
        while True:
            now = Control.read(*await self.last(self.notes, "control"))
            then = step(now)
            text = json.dumps(asdict(then))
            if revision := await self.note("control", text.encode(), now.revision):
                break
        agreed = self.control = replace(then, revision=revision)
        await self.seal(agreed)
        await self.news.tell("control")
        await self.link.arrived()
        return agreed

    # Notes

    async def note(
        self, subject: str, data: bytes, revision: int | None = None, headers: dict[str, str] | None = None
    ) -> int:
        """Write a note; returns its revision, 0 where the note had another one than it should."""
        given = dict(headers or {})
        if revision is not None:
            given["Nats-Expected-Last-Subject-Sequence"] = str(revision)
        reply = json.loads((await self.link.call(self.subject(subject), data, given or None)).data)
        if error := reply.get("error"):
            if error["err_code"] == 10071:
                return 0
            raise errors.StorageError(0, f"{self.path}: the server refuses a note: {error['description']}")
        return int(reply["seq"])

    async def failed(self, seq: int | str = "*") -> dict[int, Failed]:
        """The failures of an item, or of all."""
        found = {}
        async for note in self.link.read(self.notes, self.subject("failed", seq)):
            found[number_of(header(note, "Nats-Subject").rpartition(".")[2])] = Failed.read(note.data)
        return {seq: note for seq, note in found.items() if seq >= 0}

    async def write_failed(self, seq: int, note: Failed) -> None:
        await self.note(f"failed.{seq}", json.dumps(asdict(note)).encode())

    async def forget(self, stream: str, *subject: object) -> int:
        """Remove the messages on a subject; how many."""
        found = await self.link.api(f"STREAM.PURGE.{stream}", {"filter": self.subject(*subject)})
        return int(found["purged"])

    async def subjects(self, stream: str, *subject: object) -> dict[str, int]:
        """How many messages there are on each subject of a kind."""
        found: dict[str, int] = {}
        while True:
            asked = {"subjects_filter": self.subject(*subject), "offset": len(found)}
            info = await self.link.api(f"STREAM.INFO.{stream}", asked)
            found |= (told := info["state"].get("subjects") or {})
            if not told or len(found) >= info.get("total", 0):
                return found

    async def dead(self) -> dict[int, tuple[str, int]]:
        """The dead letters: their ids, and the bytes of their pieces."""
        found = (each.split(".")[3:] for each in await self.subjects(self.notes, "dead", "*", "*", "*"))
        known = {number_of(seq): (number, number_of(size)) for seq, number, size in found}
        return {seq: letter for seq, letter in known.items() if seq >= 0 and letter[1] >= 0}

    async def bytes(self) -> int:
        """Bytes of what waits or is in flight, as they are stored."""
        await self.link.loop.settled()
        found, dead = await asyncio.gather(self.link.api(f"STREAM.INFO.{self.items}"), self.dead())
        taken: int = found["state"]["bytes"] - sum(size for _, size in dead.values())
        return max(0, taken)

    async def sessions(self) -> list[str]:
        """The roles of those who have the spool open."""
        return [each.split(".")[3] for each in await self.subjects(self.notes, "session", "*", "*")]

    async def counts(self) -> Counts:
        """How many items are where."""
        await self.link.loop.settled()
        (fresh, found), failed = await asyncio.gather(self.fresh(), self.failed())
        return Counts(fresh, found["num_ack_pending"], found["delivered"]["stream_seq"], failed)

    async def fresh(self) -> tuple[int, dict[str, Any]]:
        """How many items were never delivered, and what the server says of delivery. The consumer hears of a put a
        moment after its writer; the stream's last number says whether it has."""
        asked = f"CONSUMER.INFO.{self.items}.readers", f"STREAM.INFO.{self.items}"
        consumer, stream = await asyncio.gather(*map(self.link.api, asked))
        delivered, pending = int(consumer["delivered"]["stream_seq"]), int(consumer["num_pending"])
        if int(stream["state"]["last_seq"]) == delivered + pending:
            return pending, consumer
        first = await self.first(delivered + 1)
        return sum(1 + int(header(msg, "Nats-Num-Pending", "0")) for msg in first), consumer

    async def first(self, start: int = 1, number: str = "*", count: int = 1) -> list[Msg]:
        """The first items from the one numbered `start` on, of all or of those of one id."""
        found = list[Msg]()
        async for msg in self.link.read(self.items, self.subject("item", number), start, count):
            found.append(msg)
            if len(found) == count:
                break
        return found

    # Its end, and a new beginning

    async def shutdown(self, immediate: bool) -> None:
        """Take no more puts; with `immediate` nothing is delivered either."""

        def step(now: Control) -> Control:
            draining: values.State = now.state if now.state == "discarded" else "draining"
            return replace(now, state="discarded" if immediate else draining)

        await self.change(step)
        if immediate:
            await self.purge()

    async def purge(self) -> int:
        """Remove what waits, by taking it; how many items."""
        removed = 0
        for seq in (await self.counts()).requeued:
            if subject := (await self.stored(self.items, seq=seq)).get("subject"):
                # Not by its subject: that would let the server forget what is in flight as well.
                asked = {"seq": seq, "no_erase": True}
                removed += bool(await self.link.api(f"STREAM.MSG.DELETE.{self.items}", asked, missing=True))
                await self.forget(self.items, "chunk", subject.rpartition(".")[2])
            await self.forget(self.notes, "failed", seq)
        while found := await self.pull(100):
            removed += len(found)
            await self.acknowledge(found)
        await self.news.tell()
        return removed

    async def acknowledge(self, messages: list[Msg]) -> None:
        """Take items off the spool, their pieces and what is known of their failures after them."""
        await self.link.call_all([Request(msg.reply, b"+ACK") for msg in messages])
        for msg in messages:
            if header(msg, "Spool-Size"):
                await self.forget(self.items, "chunk", msg_id(msg))
            if msg.metadata.num_delivered > 1:
                await self.forget(self.notes, "failed", msg.metadata.sequence.stream)

    async def remove_orphans(self, dry_run: bool = False) -> int:
        """Remove the pieces that a writer left which died before its item was one, or a reader amid removing it; how
        many."""
        pieces, removed = await self.subjects(self.items, "chunk", "*"), 0
        if not pieces:
            return 0
        kept = {each.rpartition(".")[2] for each in await self.subjects(self.items, "item", "*")}
        kept |= {number for number, _ in (await self.dead()).values()}  # after the items, which become such
        old = list[tuple[int, str, int]]()
        for subject, count in pieces.items():
            number = subject.rpartition(".")[2]
            if number in kept or not (found := await self.stored(self.items, last_by_subj=subject)):
                continue
            # RFC 3339, in nanoseconds, which Python does not read.
            put = datetime.fromisoformat(f"{found['time'][:19]}+00:00")
            if time.time() - put.timestamp() > ORPHANED:
                old.append((found["seq"], number, count))
        for _, number, count in sorted(old):  # in order, so that who sent several finds the first missing
            # Asked for by name as well: what is told in parts may pass over some, and a dead letter be an item again.
            if not (await self.last(self.items, "item", number))[0]:
                removed += count if dry_run else await self.forget(self.items, "chunk", number)
        return removed

    async def remove_histories(self, dry_run: bool = False) -> int:
        """Remove what is known of the failures of items that are no more; how many."""
        dead, removed = await self.dead(), 0
        for seq in await self.failed():
            if seq not in dead and not await self.stored(self.items, seq=seq):
                removed += 1 if dry_run else await self.forget(self.notes, "failed", seq)
        return removed

    # Items

    async def pull(self, limit: int, seconds: float = 0.0) -> list[Msg]:
        """Up to `limit` items that wait, or the first that come within so many seconds: in flight from now on."""
        asked = {"batch": limit, "no_wait": True} | ({"expires": int(seconds * _NS)} if seconds else {})
        found, began = list[Msg](), time.monotonic()
        try:
            with self.link.replies(limit) as (inbox, queue):
                async with asyncio.timeout(TRY + seconds):
                    subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.items}.readers"
                    await self.link.client.publish(subject, json.dumps(asked).encode(), inbox)
                    while len(found) < limit and (msg := await queue.get()) and not status(msg):
                        found.append(msg)
        except (TimeoutError, nats.errors.Error):
            if not found:
                self.link.check(began, "it says nothing")
        except BaseException:
            for msg in found:
                await self.refuse(msg)
            raise
        return found

    async def refuse(self, msg: Msg) -> None:
        """Give back what came when nobody waited any longer."""
        if msg.reply.startswith("$JS.ACK."):
            with suppress(nats.errors.Error):
                await self.link.send(msg.reply, b"-NAK")

    async def whole(self, msg: Msg, seq: int) -> Any:
        """The bytes of an item's file, of the message itself or of the pieces as well. seq: the item's number. Raises
        BadItem."""
        if not header(msg, "Spool-Size"):
            return msg.data
        end = number_of(header(msg, "Spool-Size")) - len(msg.data)
        subject, began = self.subject("chunk", msg_id(msg)), time.monotonic()
        while True:
            buffer, count, places = None, 0, dict[int, int]()
            async for piece in self.link.read(self.items, subject):
                if buffer is None:
                    seen = int(header(piece, "Nats-Num-Pending", "0")) + 1
                    if not 0 < end <= self.link.max_payload * seen:
                        count = seen
                        break
                    buffer = self.memory.buffer(end + len(msg.data))
                count += 1
                at = number_of(header(piece, "Spool-At"))
                if at < 0 or at in places or at + len(piece.data) > end:
                    continue  # it was sent twice, or is nobody's
                places[at] = at + len(piece.data)
                buffer[at : places[at]] = np.frombuffer(piece.data, np.uint8)
            if buffer is not None and _is_whole(places, end):
                break
            # What lacks the item itself, a follower or a leader that was cut off, says nothing of its pieces.
            state = (await self.link.api(f"STREAM.INFO.{self.items}", {"subjects_filter": subject}))["state"]
            if state["last_seq"] >= seq and count >= (state.get("subjects") or {}).get(subject, 0):
                there = sum(places.values()) - sum(places)
                raise errors.BadItem(f"its pieces have {there} bytes of the {end} that it claims")
            self.link.check(began, "the servers do not have all of an item yet")
            await asyncio.sleep(0.05)
        buffer[end:] = np.frombuffer(msg.data, np.uint8)
        return buffer

    def contents(self, msg: Msg) -> footers.Footer:
        """What an item says of itself, without its pieces. Raises BadItem, UnknownVersion."""
        if not header(msg, "Spool-Size"):
            return items.parse(msg.data, len(msg.data))[1]
        size = number_of(header(msg, "Spool-Size"))
        if size < 0:
            raise errors.BadItem("claims no number of bytes")
        end = size - len(msg.data)
        return footers.read(_Tail(msg.data, end), end, size)

    async def message(
        self, msg: Msg, known: tuple[int, int], writable: bool = False, verify: bool = False
    ) -> Message:
        """The message of an item. Raises BadItem, UnknownVersion."""
        whole = await self.whole(msg, known[0])
        buffer = whole if isinstance(whole, bytes) else memoryview(whole)
        blocks, tail = items.parse(buffer, len(buffer))
        if verify:
            items.verify(buffer, tail)
        copy = writable and buffer is whole
        return items.message(whole, blocks, tail, (*known, len(buffer)), copy=copy, writeable=writable)


class _Tail:
    """The end of a file, by the places of the whole."""

    def __init__(self, data: bytes, begin: int) -> None:
        self._data, self._begin = data, begin

    def __getitem__(self, where: slice) -> bytes:
        return self._data[where.start - self._begin : where.stop - self._begin]


def _is_whole(places: dict[int, int], end: int) -> bool:
    """Whether pieces lie one after the other, from 0 to `end`."""
    return [0, *sorted(places.values())] == [*sorted(places), end]


def msg_id(msg: Msg) -> str:
    """The id of an item that was delivered or read."""
    subject = msg.subject if msg.subject.startswith("spoolipc.") else header(msg, "Nats-Subject")
    _, _, kind, *rest = subject.split(".")
    return rest[1 if kind == "dead" else 0]


def size_of(msg: Msg) -> int:
    """Bytes of an item's file, as it claims."""
    size = number_of(header(msg, "Spool-Size"))
    return size if size >= 0 else len(msg.data)


def number_of(word: str) -> int:
    """The number that a word is, -1 for what is none."""
    return int(word) if word.isascii() and word.isdigit() and len(word) < 19 else -1
