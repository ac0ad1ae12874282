"""The putting side: room, the file, and the commit that makes it an item.

A put goes: is there room (a look without the lock); stage a file; commit. The file is one that was consumed before,
written through a mapping kept from last time, or a new one in `tmp/`. The commit is one transition: a rename into
`items/` and the stores that go with it. A crash before the rename leaves a file that only housekeeping and `gc` see; a
crash after it leaves an item.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from ..engine import ProducerOptions, retry
from ..errors import AlreadySettled, Full, SpoolClosed, SpoolError, StorageError, TooLarge, shut_down
from ..format import footer
from ..format.item import ALIGN, Layout, layout_of, layout_of_spec, view
from ..message import NOW, Array, ArraySpec, Deadline, Json, Limits, Message
from . import fs, housekeeping, pool, reset, transitions
from . import table as W
from .itemfile import ItemFile
from .lock import put_off
from .pool import LARGE, find_pooled, has_room, places, why_full
from .recycling import ENOUGH_LARGE, MOST_RESERVED, NO_FILE, SECOND, Lent, Pin, Recycler, keeper, rounded
from .session import Look, Session, Side, operation
from .staging import Staged, Staging
from .table import Words, bucket, owned
from .watch import SessionWatch

Commit: TypeAlias = Callable[[list[Staged], list[int]], tuple[bool, int, int]]
RETRY_AFTER: Final = 1.0
"""Seconds after which a write that the file system refused is tried again."""


class DirectoryProducer(Side):
    """A writer's session in a spool directory. Keeps `spoolipc.engine.Producer`, `Lender`, `Preallocator` and
    `Watchable`.

    durability: "none" survives the crash of any process, "fsync" also the loss of power: then no consumed file is
    written again, as after the loss of power an older name could show the new bytes.
    """

    def __init__(
        self, path: str | os.PathLike[str], options: ProducerOptions, session: Session | None = None
    ) -> None:
        asked = Limits(mode=options.limits.mode) if options.fresh else options.limits
        self.session = session or Session(path, asked, "writer", create=options.create)
        self._durable = options.durability == "fsync"
        self._recycler = Recycler(self.session, writable=True)
        self._staging = Staging(
            self.session, self._recycler, durable=self._durable, checksum=options.checksum
        )
        self.lent: dict[bytes, _Held] = {}  # loans that are neither committed nor discarded, by the item's id
        self._dropped = deque[_Held]()
        self._places = 0  # for how many more items there was room when the last was put
        try:
            with self.session.explaining():
                self.session.step(housekeeping.round_of, self.session)
                if self._durable:
                    fs.sync_way(self.session.directories.root, Path(self.path))  # who made it may not have
                if options.fresh:
                    reset.begin_anew(self.session, options.limits)
                if options.reopen or options.fresh:
                    while self.session.step(self._set_state, W.OPEN):
                        pass  # whoever shut down ended before all was removed
        except BaseException:
            self.close()
            raise

    @operation
    def full(self) -> bool:
        """Whether a put would have to wait for the spool's own limits, or one waits for what the file system lacks."""
        words = self.session.look(current=True)
        return not has_room(words, 0) or pool.wanted(words) > 0

    # Putting

    @operation
    def put(self, messages: Sequence[Message], until: Deadline) -> list[int]:
        """Put messages in order, each whole and at once; returns their sequence numbers."""
        seqs: list[int] = []
        staged: list[Staged] = []
        try:
            try:
                if messages:
                    self._put_some(messages, staged, seqs)
            except Full:
                if until == NOW:
                    self._refuse_impossible(need_of(messages[len(seqs)]))
                    raise
            while len(seqs) < len(messages):
                retry(
                    lambda: self._put_some(messages, staged, seqs),
                    lambda until: self._wait_for_room(need_of(messages[len(seqs)]), until),
                    until,
                )
        except BaseException as error:
            self._recycler.has_strays |= isinstance(error, OSError) or not isinstance(error, SpoolError)
            if isinstance(error, (SpoolError, OSError)):
                error.seqs = tuple(seqs)  # type: ignore[union-attr]
            raise
        finally:
            for left in staged:
                self._staging.unstage(left)
        return seqs

    def _put_some(
        self, messages: Sequence[Message], staged: list[Staged], seqs: list[int], commit: Commit | None = None
    ) -> None:
        """Put as many of the messages not yet in `seqs` as there is room for, at most 64; `staged` are the next of
        them already. Raises Full when there is room for none, ShutDown, TooLarge, UnsupportedArray."""
        start = len(seqs)
        if not 0 <= time.monotonic_ns() - keeper.now < SECOND:
            self._recycler.mappings.sweep(self.session.look())
        if not staged:
            if self._recycler.has_strays:
                self.session.step(self._recycler.release_strays)
            if self._places <= 0:
                self._look_for_room(need_of(messages[start]))
            batch = messages
            if len(messages) > 1:
                batch = messages[start : start + min(MOST_RESERVED, self._places)]
                if len(batch) > 1 and self._staging.recycles:
                    needs = [need_of(message) for message in batch]
                    self._recycler.stock_up([(need, self._staging.most(need)) for need in needs])
            try:
                for message in batch:
                    staged.append(self._staging.stage(message))
            except Full:
                if not staged:
                    raise  # else what is staged goes first: nobody could make room by taking it otherwise
        lost: Staged | None = None
        while self.session.step(commit or self._commit_all, staged, seqs):
            if staged[0] is lost or self.session.leaving:
                raise self._staging.lost()
            lost = staged[0]
            self._staging.write_new(lost)  # its file was lost with the table, or removed by hand
        if self._durable and len(seqs) > start:
            self._make_durable(seqs[start:])
        if len(seqs) == start:
            raise Full(f"{self.path}: {why_full(self.session.look(), staged[0].size)}")

    def _look_for_room(self, need: int) -> None:
        """Learn how many items of `need` bytes there is room for. Raises Full, ShutDown, TooLarge."""
        need = rounded(need)
        words = self.session.look()
        limit = words[W.MAX_BYTES]
        self._staging.limits_bytes = limit > 0
        if words[W.SHUTDOWN]:
            raise shut_down(self.path)
        self._places = places(words, need)
        if not self._recycler.reserved or (limit and need > limit):
            self._refuse_impossible(need)
        if self._places <= 0:
            raise Full(f"{self.path}: {why_full(words, need)}")

    def _refuse_impossible(self, need: int) -> None:
        """Raise TooLarge where an item of `need` bytes can never be."""
        need, limit = rounded(need), self.session.look()[W.MAX_BYTES]
        status = fs.statvfs(self.session.directories.root)
        total = status.f_blocks * status.f_frsize
        if (limit and need > limit) or 0 < total < need:
            raise TooLarge(
                f"{self.path}: an item of {need} bytes can never fit: max_bytes is {limit or 'not set'} and the file"
                f" system has {total} bytes ({status.f_bavail * status.f_frsize} free)"
            )

    def _wait_for_room(self, need: int, until: Deadline) -> bool:
        """Wait until there may be room for an item of `need` bytes; false when the deadline is past."""
        return self.session.wait("space", until, *self._room_for(need))

    def _room_for(self, need: int) -> tuple[Look, Callable[[], None]]:
        """How to wait for room for `need` bytes: where the file system refused what it seemed to have (a quota does
        that), for any change of it; or for a second, as sessions of this process give way to a try. Raises TooLarge."""
        need = rounded(need)
        self._refuse_impossible(need)
        before, self._staging.no_space = self._staging.no_space, None
        self._places = 0
        retry_at = time.monotonic() + RETRY_AFTER

        def look(words: Words) -> bool:
            if words[W.SHUTDOWN] or ((before or has_room(words, need)) and time.monotonic() >= retry_at):
                return True
            if before is not None:
                return before != self._staging.space(words)
            return has_room(words, need) and (bool(words[W.POOL_COUNT]) or not self._recycler.lacking(need))

        def each_second() -> None:
            housekeeping.round_if_due(self.session)
            self._staging.say_what_for(need, before is not None)
            if keeper.is_due():
                self._recycler.mappings.sweep(self.session.look())

        return look, each_second

    # Committing

    def _commit_all(self, staged: list[Staged], seqs: list[int]) -> tuple[bool, int, int]:
        """Make items of what is staged, from the first on as far as there is room, moving it from `staged` to `seqs`;
        true when the next one's file is not there any more. A step."""
        recycler, journal, put = self._recycler, self.session.journal, 0
        words = journal.words
        if words[W.SHUTDOWN]:
            raise shut_down(self.path)
        if recycler.pins.pending:
            recycler.reclaim()
        if words[W.HOUSEKEPT] != self.session.looked_at:
            self.session.see_itself()
        while staged:
            left = places(words, staged[0].size)
            self._places = left - 1
            if left <= 0:
                break
            try:
                seq = self._commit(staged[0])
            except OSError as error:
                is_shortage = fs.is_shortage(error)
                if is_shortage and recycler.make_room(1)[0]:
                    continue
                if put:
                    break  # those are put; what stands in the way of the next is told when it is tried again
                if is_shortage:
                    self._staging.no_space = self._staging.space(words)
                    raise Full(f"{self.path}: its file system is full ({error.strerror})") from error
                raise
            if not seq:
                return True, put, 0
            words = journal.words
            seqs.append(seq)
            del staged[0]
            put += 1
        return False, put, 0

    def _commit(self, staged: Staged) -> int:
        """Make one item, for which there is room; its sequence number, 0 when its file is not there any more.

        A crash before the rename leaves a reserved or a temporary file, after it an item.
        """
        session, recycler, journal = self.session, self._recycler, self.session.journal
        file, size, token = staged.file, staged.size, session.token
        if file is None:
            record = journal.unused_record()
            pool.share(journal.words, fs.room(session.directories.root))
        else:
            record = file.record
            if not recycler.is_ours(file):
                return 0
        words = journal.words
        successor = link = 0
        if file is None:
            change = transitions.put_new(words, record, size, "tmp", staged.name)
        else:
            need, mapped = staged.need, recycler.mappings.kept
            if len(recycler.reserved) < (MOST_RESERVED if need < LARGE else ENOUGH_LARGE):
                only_mapped = need >= LARGE and len(mapped) >= ENOUGH_LARGE
                successor, link = find_pooled(words, need, size, mapped, only_mapped)
            change = transitions.put(words, record, size, file.name, token, successor, link)
        at, seq, loan = (record + W.ITEM_AT) * W.WORD, change[1], token if staged.loan else 0
        end, flags = staged.layout.end, staged.flags
        W.ITEM.pack_into(journal.map, at, seq, staged.put_time, 0, flags, end, 0, 0, 0, loan)
        try:
            journal.commit(change)
        except FileNotFoundError as error:
            if isinstance(error, SpoolError):
                raise
            if file is not None:
                journal.commit(transitions.drop(words, record))
            return 0
        if successor:
            recycler.reserved.append(recycler.reserved_at(successor))
        elif file is not None and not words[bucket(staged.need)]:
            recycler.fell_short(staged.need)
        if loan:
            self._remember_loan(staged, record, seq)
        return seq

    def _remember_loan(self, staged: Staged, record: int, seq: int) -> None:
        """Whoever filled a lent array may still show the item's file; a new file is mapped already. A step."""
        journal, pin = self.session.journal, staged.pin
        assert pin is not None
        if pin.table is not journal.identity:
            pin = Pin(journal.identity, record, seq)
            self._recycler.pins.add(pin, staged.pages.base)
        pin.record, pin.number = record, seq
        if staged.file is not None:
            self._recycler.lent.discard(staged.file.number)
        if staged.status is not None and staged.buffer is not None:
            self._recycler.mappings.keep(staged.buffer, staged.status, seq, record)

    def _make_durable(self, seqs: list[int]) -> None:
        try:
            fs.sync(self.session.directories.items)
        except OSError as error:
            what = f"items {seqs[0]} to {seqs[-1]} are in the spool, but not known to be durable"
            failure = StorageError(error.errno, f"{what}: {error.strerror}", self.path)
            failure.seqs = tuple(seqs)
            raise failure from error

    @operation
    def watch(self, news: Callable[[], None], lacking: Message | int | None = None) -> SessionWatch:
        """A wait of an event loop for room for a message, or until none of the items up to a number is left."""
        if isinstance(lacking, int):
            return SessionWatch(self.session, "end", news, *housekeeping.end_of(self.session, lacking + 1))
        need = need_of(lacking) if lacking else 0
        return SessionWatch(self.session, "space", news, *self._room_for(need))

    # Loans

    @operation
    def loan(self, spec: ArraySpec, meta: Json, until: Deadline) -> DirectoryLoan:
        """Lend an array over the next file itself, its contents undefined. Raises what `put` raises."""
        self._discard_dropped()
        message, layout = Message((), None, meta), layout_of_spec(spec)
        need = layout.end + footer.SIZE + footer.json_size(None, meta)
        return retry(lambda: self._lend(message, layout, need), partial(self._wait_for_room, need), until)

    def _lend(self, message: Message, layout: Layout, need: int) -> DirectoryLoan:
        """Raises Full, ShutDown, TooLarge."""
        self._look_for_room(need)
        if self._recycler.has_strays:
            self.session.step(self._recycler.release_strays)
        staged = Staged(message, layout, self._staging.new_id(), self._staging.flags)
        staged.loan = True
        buffer = None if self._durable else self._staging.map_reserved(staged)
        if buffer is None:
            self._refuse_impossible(need)
            staged.size = rounded(need)
            staged.name, buffer, staged.status = self._staging.make_mapped(staged.size)
        staged.buffer = buffer
        staged.pages = np.asarray(Lent(buffer))
        staged.arrays = (view(staged.pages, layout.blocks[0], writeable=True),)
        staged.pin = Pin(self.session.journal.identity, 0, NO_FILE)
        self._recycler.pins.add(staged.pin, staged.pages.base)
        loan = DirectoryLoan(self, staged)
        held = self.lent[staged.id] = _Held(loan, self._dropped.append)
        held.staged = staged
        if staged.file is not None:
            self._recycler.lent.add(staged.file.number)
        return loan

    def _discard_dropped(self) -> None:
        """Discard loans that nobody has any more though they were neither committed nor discarded."""
        while self._dropped:
            staged = self._dropped.popleft().staged
            if self.lent.pop(staged.id, None) is not None:
                self._staging.unstage(staged)
                what = f"a loan of {self.path} was dropped, neither committed nor discarded. Use: with writer.loan(...)"
                warnings.warn(what, ResourceWarning, stacklevel=1)

    @operation
    def commit_loan(self, staged: Staged, until: Deadline) -> int:
        """Make an item of a lent array, whose contents are final. Raises Full, ShutDown; it then stays a loan."""
        buffer, layout = staged.buffer, staged.layout
        assert buffer is not None
        (header,), (block,) = layout.headers, layout.blocks
        staged.put_time = time.time_ns()
        staged.tail = footer.pack(layout.end, staged.put_time, staged.id, None, staged.meta)
        buffer[block.offset - len(header) : block.offset] = header
        if self._staging.checksum:
            staged.tail = self._staging.sealed(staged, buffer)
        buffer[layout.end : staged.need] = staged.tail
        if self._durable:
            with ItemFile(self.session.directories.tmp, staged.name, writable=True) as file:
                fs.sync(file.fd)
        seqs: list[int] = []
        rest = [staged]
        retry(lambda: self._put_some((), rest, seqs), partial(self._wait_for_room, staged.need), until)
        return seqs[0]

    @operation
    def discard_loan(self, staged: Staged) -> None:
        """Put nothing."""
        if not put_off(self.discard_loan, staged):
            self._staging.unstage(staged)

    @operation
    def preallocate(self, count: int, nbytes: int) -> None:
        """Fill the pool up to `count` files that each hold an array of `nbytes` bytes, their pages entered.

        Raises Full when the file system has too little free, ValueError when the pool may not hold so much.
        """
        if count < 0 or nbytes < 0:
            raise ValueError(f"preallocate takes a count and a number of bytes, not ({count!r}, {nbytes!r})")
        size = rounded(ALIGN * 4 + nbytes + footer.SIZE)
        limit = self.session.look()[W.RECYCLE_BYTES]
        if count * size > limit:
            raise ValueError(
                f"preallocate asks for {count} files of {size} bytes, but the spool keeps at most"
                f" recycle_bytes={limit}; give a new spool a larger recycle_bytes"
            )
        while self.session.look()[W.POOL_BYTES] < count * size:
            name, buffer, status = self._staging.make_mapped(size)
            try:
                number, record = self.session.step(self._donate, name, size)
            except BaseException:
                fs.unlink_missing_ok(self.session.directories.tmp, name)
                raise
            self._recycler.mappings.keep(buffer, status, number, record)

    def _donate(self, name: str, size: int) -> tuple[tuple[int, int], int, int]:
        """The file goes to `free/` under a number of its own, and into the pool. Raises Full. A step."""
        journal, directories = self.session.journal, self.session.directories
        pool.share(journal.words, fs.room(directories.root))
        if not pool.may_pool(journal.words, size):
            raise Full(f"{self.path}: its pool may take half of what the file system has free, and has it")
        number = W.FIRST_DONATED + secrets.randbits(62)
        record = journal.unused_record()
        journal.commit(transitions.donate(journal.words, record, number, size, name))
        return (number, record), 0, 0

    # The end

    @operation
    def join(self, until: Deadline, last: int = 0) -> int:
        """Wait until no item up to the number `last` is left, 0 for the last of now; that number where some are."""
        last = last or self.session.look(current=True)[W.NEXT_SEQ] - 1
        return 0 if housekeeping.join(self.session, last + 1, until) else last

    @operation
    def shutdown(self, immediate: bool) -> None:
        """End the spool for all: no more puts; with `immediate` no more gets either, and what waits is removed."""
        if put_off(self.shutdown, immediate):
            return
        while self.session.step(self._set_state, W.DISCARDED if immediate else W.DRAINING):
            pass
        self.session.doorbell.ring_all()
        while immediate and self.session.step(housekeeping.discard_if_shut_down, self.session):
            pass

    def _set_state(self, state: int) -> tuple[int, int, int]:
        """DISCARDED is taken back by OPEN alone, when nothing is left of it; how much was removed. A step."""
        session = self.session
        now = session.journal.words[W.SHUTDOWN]
        if now == state or (now == W.DISCARDED and state == W.DRAINING):
            return 0, 0, 0
        if now == W.DISCARDED and (removed := housekeeping.discard_if_shut_down(session))[0]:
            return removed
        session.journal.commit(transitions.set_shutdown(state))
        return 0, 0, 0

    def close(self) -> None:
        """Leave; reserved files go back to the pool, and files that a lent array may still show lose their names."""
        self.session.close(self.leave)
        self.lent.clear()

    def leave(self) -> tuple[bool, int, int]:
        """Give up some of what this session has; whether more is left. A step."""
        journal, token = self.session.journal, self.session.token
        self._recycler.release_all()
        more = housekeeping.end_loans(self.session, (token,))
        # What is still reserved, or in tmp/, is being written, lent, or left of a put that was interrupted.
        ours = owned(journal.words, (token,))
        for record in ours[:MOST_RESERVED]:
            journal.commit(transitions.drop(journal.words, record))
        return self._staging.clear() or more or len(ours) > MOST_RESERVED, 0, 0


class _Held(weakref.ref["DirectoryLoan"]):
    """Tells that nobody has a loan any more."""

    __slots__ = ("staged",)
    staged: Staged


class DirectoryLoan:
    """An array over a file that is not yet an item. Keeps `spoolipc.engine.Loan`."""

    def __init__(self, producer: DirectoryProducer, staged: Staged) -> None:
        self._producer = producer
        self._staged: Staged | None = staged
        self.array: Array = staged.arrays[0]

    def commit(self, until: Deadline) -> int:
        """Put it; returns its sequence number. The array is read-only from now on. Raises Full, ShutDown."""
        staged = self._staged
        if staged is None:
            raise AlreadySettled("this loan was committed or discarded before")
        self.array.flags.writeable = False
        try:
            seq = self._producer.commit_loan(staged, until)
        except SpoolError as error:
            if error.seqs:  # it was put, though it may not be durable
                staged.pages.flags.writeable = False
                self._forget(staged)
            elif not isinstance(error, StorageError):  # after which it may be there all the same
                self.array.flags.writeable = True
            raise
        staged.pages.flags.writeable = False  # and with it, for good, the array
        self._forget(staged)
        return seq

    def discard(self) -> None:
        """Put nothing. Harmless when repeated, and after the commit."""
        staged = self._staged
        if staged is not None:
            with contextlib.suppress(SpoolClosed):  # what a close leaves is a session's that is gone
                self._producer.discard_loan(staged)
            self._forget(staged)

    def _forget(self, staged: Staged) -> None:
        self._staged = None
        self._producer.lent.pop(staged.id, None)
        del self.array  # the producer writes the file again when nobody has it any more


def need_of(message: Message) -> int:
    """Bytes that a message takes."""
    return layout_of(message.arrays).end + footer.SIZE + footer.json_size(message.names, message.meta)
