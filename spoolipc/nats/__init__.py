"""The engine between machines: a spool on NATS servers with JetStream.

    nats://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/NAME[?replicas=3][&storage=memory]

What the streams hold is in `spool`; how an item is put in `producer`, how it is delivered and settled in `consumer`;
what both sides share in `session`; the connection, and the one thread of all clients of this process, in `link`.
How the servers are found, and who we are to them, is in `access`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any, Final, TypeVar

from .. import errors
from .. import message as values
from ..engine import ConsumerOptions, ProducerOptions
from ..message import NOW, Deadline, Limits
from .access import Address, address
from .consumer import NatsConsumer
from .link import Link, header, loop, within
from .producer import NatsProducer
from .spool import Failed, Spool, msg_id, number_of, size_of

T = TypeVar("T")
_ASKING: Final = 8.0
"""Seconds for which who looks after a spool asks servers that do not answer: they may be choosing which one leads."""
_NO_FILES: Final[dict[str, Any]] = {
    **dict.fromkeys(("free_files", "free_bytes", "pinned_files", "pinned_bytes", "wanted_bytes"), 0),
    **{"file_system": "jetstream", "waiting_mode": "server"},
    **{"index_damage": "", "stuck_on": "", "pinned_by": {}},
}


class NatsEngine:
    """The spool of a URL."""

    crosses_processes = True

    def __init__(self, url: str) -> None:
        self._where = address(url)

    def producer(self, options: ProducerOptions) -> NatsProducer:
        return NatsProducer(self._where, options)

    def consumer(self, options: ConsumerOptions) -> NatsConsumer:
        return NatsConsumer(self._where, options)

    def pair(self, limits: Limits) -> NatsPair:
        return NatsPair(self._where, limits)

    def admin(self) -> NatsAdmin:
        return NatsAdmin(self._where)


class NatsPair:
    """Both sides, each a session of its own, and the count of tasks in work: of items that were taken and are not said
    to be done. It is raised before an item is acknowledged that was taken, so that `join` never sees too little; what
    a crash leaves of it is forgotten when nobody has the spool open."""

    def __init__(self, where: Address, limits: Limits) -> None:
        self._where, self._limits = where, limits
        self._open(first=True)

    def _open(self, first: bool) -> None:
        self._process = os.getpid()
        self._producer = NatsProducer(self._where, ProducerOptions(self._limits))
        try:
            self._consumer = NatsConsumer(self._where, ConsumerOptions(values=True))
            self._consumer.count = self._count
            if first:
                self._consumer.do(self._begin())
        except BaseException:
            self._producer.close()
            raise

    async def _begin(self) -> None:
        spool = self._consumer.spool
        if len(await spool.sessions()) == 2:
            await spool.forget(spool.notes, "tasks")

    def _here(self) -> NatsPair:
        """The same; a forked child has sessions of its own."""
        if os.getpid() != self._process:
            self._open(first=False)
        return self

    @property
    def producer(self) -> NatsProducer:
        return self._here()._producer

    @property
    def consumer(self) -> NatsConsumer:
        return self._here()._consumer

    def task_done(self) -> bool:
        return self.consumer.do(self._count(-1))

    async def _count(self, by: int) -> bool:
        """Add to the count; false where that would make it less than no task."""
        spool = self._consumer.spool
        while True:
            if by < 0 and await self._unfinished() <= 0:
                return False
            revision, in_work = await self._in_work()
            if await spool.note("tasks", str(in_work + by).encode(), revision):
                await spool.news.tell()
                return True

    async def _in_work(self) -> tuple[int, int]:
        """The revision of the count, and the count."""
        spool = self._consumer.spool
        revision, data = await spool.last(spool.notes, "tasks")
        word = data.decode(errors="replace")
        return revision, -number_of(word[1:]) if word[:1] == "-" else max(0, number_of(word))

    async def _unfinished(self) -> int:
        """What is on the spool is counted first: what goes from there is in the count of tasks before."""
        counts = await self._consumer.spool.counts()
        return (await self._in_work())[1] + counts.waiting + counts.in_flight

    def join(self, until: Deadline) -> bool:
        return self.consumer.do(within(until, self._join, until))

    async def _join(self, until: Deadline) -> bool:
        spool = self._consumer.spool
        while True:
            news = spool.news.event
            if await self._unfinished() <= 0:
                return True
            if until == NOW or not await self._consumer.wait(news, until):
                return False

    def close(self) -> None:
        self._consumer.close()
        self._producer.close()


class NatsAdmin:
    """A spool looked after from outside: each call has a connection of its own."""

    def __init__(self, where: Address) -> None:
        self._where = where

    def _do(self, work: Callable[[Spool], Awaitable[T]]) -> T:
        async def run() -> T:
            link = Link(self._where)
            await link.open()
            try:
                await link.loop.settled()
                spool = Spool(link, where.name, where.replicas, where.storage)
                return await within(time.monotonic() + _ASKING, opened, spool)
            finally:
                await link.close()

        async def opened(spool: Spool) -> T:
            await spool.open(create=False)
            return await work(spool)

        where = self._where
        return loop().run(run())

    def stat(self) -> values.SpoolStat:
        return self._do(_stat)

    def purge(self) -> int:
        return self._do(lambda spool: spool.purge())

    def gc(self, dry_run: bool, progress: values.Progress | None) -> values.GcReport:
        async def collect(spool: Spool) -> values.GcReport:
            pieces, histories = await spool.remove_orphans(dry_run), await spool.remove_histories(dry_run)
            return values.GcReport(spool.path, dry_run, orphaned_pieces=pieces, orphaned_histories=histories)

        return self._do(collect)

    def set_limits(self, limits: Limits) -> Limits:
        async def change(spool: Spool) -> Limits:
            return (
                await spool.change(lambda now: replace(now, asked=values.completed(limits, now.asked)))
            ).limits

        return self._do(change)

    def remove(self) -> None:
        async def remove(spool: Spool) -> None:
            if count := len(await spool.sessions()):
                have = "1 session has" if count == 1 else f"{count} sessions have"
                raise errors.SpoolInUse(0, f"{spool.path}: is in use: {have} it open")
            await spool.remove()

        self._do(remove)

    def failed_list(self, seqs: Iterable[int] | None = None) -> list[values.DeadLetter]:
        async def look(spool: Spool) -> list[values.DeadLetter]:
            failed = await spool.failed()
            return [await _letter(spool, seq, msg, failed.get(seq)) for seq, msg in await _dead(spool, seqs)]

        return self._do(look)

    def failed_drop(self, seqs: Iterable[int] | None) -> list[int]:
        async def drop(spool: Spool) -> list[int]:
            dropped = await _dead(spool, seqs)
            for seq, msg in dropped:
                await _forget(spool, seq, msg, pieces=True)
            return [seq for seq, _ in dropped]

        return self._do(drop)

    def failed_retry(self, seqs: Iterable[int] | None) -> values.Retried:
        async def retry(spool: Spool) -> values.Retried:
            done: dict[int, int] = {}
            damaged: dict[int, str] = {}
            for seq, msg in await _dead(spool, seqs):
                try:
                    await spool.message(msg, (seq, 0))
                except (errors.BadItem, errors.UnknownVersion) as error:
                    damaged[seq] = str(error)
                    continue
                if (await spool.agreed()).state != "open":
                    raise errors.ShutDown(f"{spool.path}: was shut down")
                size = header(msg, "Spool-Size")
                given = {"Nats-Msg-Id": f"{msg_id(msg)} again {seq}"} | ({"Spool-Size": size} if size else {})
                done[seq] = await spool.note(f"item.{msg_id(msg)}", msg.data, headers=given)
                await _forget(spool, seq, msg, pieces=False)
            return values.Retried(done, damaged)

        return self._do(retry)


async def _stat(spool: Spool) -> values.SpoolStat:
    counts, sessions, control = await spool.counts(), await spool.sessions(), await spool.agreed()
    stream = await spool.link.api(f"STREAM.INFO.{spool.items}")
    oldest, delayed = None, counts.delayed
    for msg in await spool.first(counts.first[0]) if counts.waiting > delayed else ():
        oldest = max(0.0, time.time() - _when(spool, msg))
    return values.SpoolStat(
        path=spool.path,
        state=control.state,
        depth=counts.waiting - delayed,
        delayed=delayed,
        in_flight=counts.in_flight,
        bytes=await spool.bytes(),
        oldest_age=oldest,
        failed=len(await spool.dead()),
        puts=None,
        gets=None,
        live_sessions=len(sessions),
        limits=control.limits,
        in_memory=stream["config"]["storage"] == "memory",
        **_NO_FILES,
    )


def _when(spool: Spool, msg: Any) -> float:
    try:
        return spool.contents(msg).put_time / 1e9
    except (errors.BadItem, errors.UnknownVersion):
        return time.time()


async def _dead(spool: Spool, seqs: Iterable[int] | None) -> list[tuple[int, Any]]:
    """Dead letters in the order of their numbers; None for all. Raises NoSuchItem."""
    wanted = None if seqs is None else values.numbers_of(seqs)
    found = {}
    async for msg in spool.link.read(spool.notes, spool.subject("dead", "*", "*", "*")):
        found[number_of(header(msg, "Nats-Subject").split(".")[3])] = msg
    found.pop(-1, None)  # somebody else's
    for seq in wanted or ():
        if seq not in found:
            what = f"has no dead letter {seq}; spoolipc failed list tells those it has"
            raise errors.NoSuchItem(f"{spool.path}: {what}")
    return [(seq, found[seq]) for seq in (sorted(found) if wanted is None else wanted)]


async def _forget(spool: Spool, seq: int, msg: Any, pieces: bool) -> None:
    """Remove a dead letter, its failures last."""
    await spool.forget(spool.notes, "dead", seq, "*", "*")
    if pieces and header(msg, "Spool-Size"):
        await spool.forget(spool.items, "chunk", msg_id(msg))
    await spool.forget(spool.notes, "failed", seq)


async def _letter(spool: Spool, seq: int, msg: Any, note: Failed | None) -> values.DeadLetter:
    """What is told of a dead letter."""
    note = note or Failed()
    stored: tuple[values.StoredArray, ...] = ()
    meta, when, damage = None, None, ""
    try:
        arrays, names, meta, put_time, *_ = await spool.message(msg, (seq, note.attempt))
        each = zip(names or (None,) * len(arrays), arrays, strict=True)
        stored = tuple(values.StoredArray(name, str(a.dtype), a.shape, a.nbytes) for name, a in each)
        when = put_time / 1e9
    except (errors.BadItem, errors.UnknownVersion) as error:
        damage = str(error)
    told = note.why, note.attempt, note.failures()
    return values.DeadLetter(seq, "", size_of(msg), *told, stored, meta, when, damage)
