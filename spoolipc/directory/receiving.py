"""What every step of a reader stands on: items opened, taken off the spool, waited for.

Items are opened before the lock is taken, as they most likely will be ours; under the lock it is only seen whether they
are still the next. A file does not change while its item waits, and no sequence number is given twice, so what was
opened ahead is the item, or is thrown away.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from numpy import frombuffer, uint8

from ..engine import ConsumerOptions
from ..errors import BadItem, Empty, ShutDown, UnsupportedItem, nothing_left
from ..format.footer import Buffer
from ..format.item import message, parse, verify
from ..message import Deadline, Message
from . import fs, housekeeping, liveness, transitions
from . import table as W
from .itemfile import ItemFile, check_regular, unreadable
from .journal import Journal
from .pool import evict_one, may_pool, waiting
from .quarantine import forget_history
from .recycling import SECOND, SMALL, Pin, Recycler, keeper
from .session import Look, Session, Side, operation
from .table import Words, active, bucket, owned
from .transitions import consume
from .watch import SessionWatch

_log = logging.getLogger("spoolipc")
PATIENCE = 3.0
"""Seconds after which a wait on a path where nothing ever was is told."""
AT_ONCE: Final = 64
"""Items taken in one step, opened before it without the lock: it holds up others for about a millisecond."""


Opened: TypeAlias = tuple[Message, object, bool]
"""An item's file, read: its message; shown, what the arrays keep alive that are views of the file's pages, None
where they are arrays of their own; single, whether the file has no other name, so that it may be written again."""


_SAID: Final = W.together(W.STATE, W.PUT_TIME, W.ATTEMPT, W.FILE)
_KEPT: Final = W.together(W.NEXT_DUE, W.HOUSEKEPT)
_TAKEN: Final = W.together(W.STATE, W.SEQ, W.ATTEMPT, W.FLAGS, W.LOAN, W.FILE, W.BYTES)


class Taken(list[Message]):
    """What a take has taken, known to it at once, wherever an interrupt comes. places: the record and number of each
    item, to put it back, which is possible for as long as this lives. kept: whoever puts meanwhile; else what is small
    may be written again."""

    places: list[tuple[int, int]]
    kept: bool


class Receiver(Side):
    """A reader's session in a spool directory, and the parts of its operations."""

    def __init__(
        self, path: str | os.PathLike[str], options: ConsumerOptions, session: Session | None = None
    ) -> None:
        self.session = session or Session(path, options.limits, "reader", create=options.create)
        self.verify, self.values = options.verify, options.values
        self._own = 0  # items in flight here, as they were last counted, and SHUTDOWN then
        self._state = W.OPEN
        # Of a reader that ends with its writers: whether they have left, as was last found, WRITERS and HOUSEKEPT then;
        # where it began, in numbers of items and in time.
        self._ends, self._left, self._seen = options.end == "writers", False, (0, 0)
        self._first = self._since = 0
        self.recycler = Recycler(self.session, writable=False)
        self._places: list[int] = []
        self._opened, self._told = time.monotonic(), False
        self._table: object = self.session.journal.identity
        # Of claims that outlived the table they were made in: its identity, by sequence number.
        self.kept: dict[int, object] = {}
        self.given: dict[int, object] = {}
        self.session.on_adopt.append(weakref.WeakMethod(self.adopt))
        try:
            with self.session.explaining():
                self.session.step(self._enter)
        except BaseException:
            self.close()
            raise

    def adopt(self, journal: Journal | None) -> None:
        """Another table, or none in a forked child: of our claims, those in flight in it outlive the one before."""
        before, kept = self._table, self.kept
        self.kept = {}
        self._places = []
        if journal is None:
            self.given = {}  # in flight at the parent, or requeued
        else:
            self._take_place()
            words, token, self._table = journal.words, self.session.token, journal.identity
            for record in active(words):
                if words[record + W.STATE] == W.IN_FLIGHT and words[record + W.OWNER] == token:
                    seq = words[record + W.SEQ]
                    self.kept[seq] = kept.get(seq, before)

    def _enter(self) -> tuple[None, int, int]:
        """The first step."""
        self._take_place()
        words = self.session.journal.words
        if self._ends and not (waiting(words) or words[W.IN_FLIGHT_COUNT] or self._has_writer()[0]):
            self._first, self._since = words[W.NEXT_SEQ], fs.monotonic_ns()
        return housekeeping.round_of(self.session)

    def _take_place(self) -> None:
        """Where this session says that it looks at items without the lock. A step."""
        place, _, _ = self.session.place_of(W.FOR_ITEMS)
        self._places = [W.LOOKS + place] if place >= 0 else []

    def nothing(self, ended: bool) -> Empty | ShutDown:
        """The error for a step that found no item. ended: nothing can come any more."""
        if ended:
            return nothing_left(self.path, writers_left=self._left)
        return Empty(f"{self.path}: no item waits")

    def look_ahead(self, words: Words, limit: int, writable: bool) -> list[Opened]:
        """Open up to `limit` items that seem to be the next, without the lock; the first comes last. One thread of a
        session does it at a time; the others open theirs under the lock."""
        found: list[Opened] = []
        if not 0 <= time.monotonic_ns() - keeper.now < SECOND:
            self.recycler.mappings.sweep(words)
        record = words[W.REDELIVERY_HEAD] or words[W.READY_HEAD]
        top = len(words) - W.RECORD  # of what is mapped: the file may have grown
        places = self._places
        try:
            place = places.pop()
        except IndexError:
            return found  # another thread looks, or there is no place to say that we do
        try:
            words[place] = 1  # nobody empties a file under our eyes: `pool.evict_one`
            while W.HEADER <= record <= top:
                try:
                    found.append(self.open(words, record, words[record + W.SEQ], writable))
                except (BadItem, UnsupportedItem, OSError):
                    break  # gone meanwhile, damaged, or a value: the locked step will see which
                if len(found) == limit or len(found) == AT_ONCE:
                    break
                record = words[record + W.NEXT]
        finally:
            words[place] = 0
            places.append(place)
        found.reverse()
        return found

    def open(self, words: Words, record: int, seq: int, writable: bool = False) -> Opened:
        """Map or read an item's file; writable: so that the arrays may be written, which nobody else sees. Raises
        BadItem, UnknownVersion, OSError."""
        name, items = str(seq).zfill(20) + ".npy", self.session.directories.items
        mappings = self.recycler.mappings
        try:
            status = fs.stat_at(name, dir_fd=items)
        except FileNotFoundError:
            raise BadItem("its file is missing") from None
        except OSError as error:
            raise unreadable(error) from None
        size = status[6]
        state, put_time, attempt, number = _SAID(words, record * W.WORD)
        kept = mappings.kept.get(number)
        if kept is not None and kept.identity == status[1:3] and kept.size == size and not writable:
            buffer: Buffer = kept.buffer
            kept.used = keeper.now
        else:
            check_regular(status)
            if not size:
                raise BadItem("the file is empty")
            if writable:
                with ItemFile(items, name) as file:
                    buffer = file.map(private=True)
            elif size <= SMALL and not mappings.wants(number):
                with ItemFile(items, name) as file:
                    buffer = file.read(size)
            else:
                buffer = mappings.of(items, name, status, number, record)
        blocks, tail = parse(buffer, size)
        if kept is not None and tail[0] != put_time and buffer is kept.buffer:
            # Device, inode and size prove nothing on an overlay: whoever mapped a file before it was copied up goes on
            # to see the old one. Its footer tells.
            mappings.forget(number)
            buffer = mappings.of(items, name, status, number, record)
            blocks, tail = parse(buffer, size)
        if self.verify:
            verify(buffer, tail)
        if tail[3] == () and not self.values:
            what = "is a value that a Queue put; get it from a Queue of the same path"
            raise UnsupportedItem(f"{self.path}: item {seq} {what}")
        known, single = (seq, attempt + (state == W.WAITING), size), status[3] == 1
        if tail[1] <= SMALL:
            copied = type(buffer) is not bytes
            return message(buffer, blocks, tail, known, copy=copied, writeable=writable), None, single
        # All arrays, their views and bases lead to this one's base, a memoryview that nobody else has.
        pages: Any = frombuffer(buffer, uint8)
        return message(pages, blocks, tail, known, copy=False, writeable=writable), pages.base, single

    def begin(self, leave: int = 0) -> tuple[int, int]:
        """What every step of a reader does first: keep house when it is due, let go of files that no array shows any
        more, all but `leave`."""
        session, recycler = self.session, self.recycler
        words = session.journal.words
        items = space = 0
        due, housekept = _KEPT(words)
        if housekeeping.is_due(housekept, due):
            _, items, space = housekeeping.round_of(session)
            housekept = session.journal.words[W.HOUSEKEPT]
        if len(recycler.pins.pending) > leave:
            recycler.reclaim(leave)
        if housekept != session.looked_at:
            session.see_itself()
        return items, space

    def has_ended(self) -> bool:
        """Whether nothing can come any more: nothing waits, and no other reader may requeue anything. A step."""
        words = self.session.journal.words
        self._state = words[W.SHUTDOWN]
        if self._ends:
            self._look_for_writers(words)
        if not self._state and not self._left:
            return False
        token = self.session.token
        self._own = sum(
            words[record + W.STATE] == W.IN_FLIGHT and words[record + W.OWNER] == token
            for record in active(words)
        )
        is_over = self._is_over(words)
        if self._ends and not is_over:
            housekeeping.await_end(words, W.LAST_SEQ)
        return is_over

    def _look_for_writers(self, words: Words) -> None:
        """Learn whether the writers have left that there were since this reader was opened, or whose items. A step."""
        self._seen = words[W.WRITERS], words[W.HOUSEKEPT]
        has_begun = words[W.NEXT_SEQ] > self._first or words[W.WRITERS] >= self._since
        self._left = has_begun and not self._has_writer()[0]

    def _is_over(self, words: Words) -> bool:
        """Whether nothing can come any more where nothing waits; without the lock, a hint."""
        state = words[W.SHUTDOWN]
        if state == W.DISCARDED:
            return True
        ending = state == W.DRAINING or self._left
        return ending and words[W.IN_FLIGHT_COUNT] <= self._own and not words[W.DELAYED_COUNT]

    def consume(self, record: int, single: bool, pin: Pin | None, undo: object) -> None:
        """The item at `record` leaves the spool for good. A step.

        pin: of the arrays over its file. undo: lives as long as the item may be put back, None where it may not: until
        then, a file that is not to be written again is pinned.
        """
        journal, recycler = self.session.journal, self.recycler
        words = journal.words
        state, seq, attempt, flags, loan, number, size = _TAKEN(words, record * W.WORD)
        waits = state == W.WAITING
        before = 0 if waits else 1
        # Whoever had the item in flight before may still show its file.
        keep = single and attempt == before and not flags & W.NEVER_AGAIN and words[W.RECYCLE_BYTES] > 0
        surplus = keep and pin is None and not may_pool(words, size)
        if surplus and (undo is not None or loan):
            surplus = keep = False
        if not keep:
            recycler.mappings.forget(number)
            if undo is not None:
                if pin is None:
                    pin = Pin(journal.identity, record, seq)
                    recycler.pins.add(pin, undo)
                pin.forks, keep = -1, True  # is not written again
        released = 0
        if waits and keep and pin is not None:
            released = recycler.to_release()
        elif waits and recycler.pins.pending:
            recycler.reclaim(len(recycler.pins.pending) - 1)
        owner = loan if pin is None else self.session.token
        try:
            journal.commit(consume(words, record, owner, keep, released))
        except OSError as error:
            if not keep or not fs.is_of_file(error) or isinstance(error, FileNotFoundError):
                raise
            # free/ takes no file, as on a full file system, which has no block for another name: items are taken all
            # the same.
            surplus = keep = False
            released = 0
            journal.commit(consume(words, record, 0, False))
        if surplus:  # who wrote it, or had it before, may have it mapped: only an evicted file is emptied
            evict_one(self.session.directories, journal, record, bucket(size))
        if released:
            recycler.pins.pending.popleft()
        if attempt > before:
            forget_history(self.session.directories, seq)

    def _has_writer(self) -> tuple[bool, int, int]:
        return liveness.has_writer(self.session.directories.root), 0, 0

    @operation
    def wait_for_item(self, until: Deadline) -> bool:
        """Wait until there may be an item, or the end; false when the deadline is past."""
        while self.recycler.pins.pending:
            self.session.step(self._reclaim)
        return self.session.wait("items", until, self._item_or_end(), self._each_second)

    def _item_or_end(self) -> Look:
        """Whether there may be an item, or the end."""

        def look(words: Words) -> bool:
            if words[W.REDELIVERY_HEAD] or words[W.READY_HEAD] or words[W.SHUTDOWN] != self._state:
                return True
            return self._is_over(words) or (self._ends and words[W.WRITERS] != self._seen[0])

        return look

    def _each_second(self) -> None:
        if self.session.dropped:
            self.give_back()
        housekeeping.round_if_due(self.session)
        if self._ends and self.session.look()[W.HOUSEKEPT] != self._seen[1]:
            self.session.step(self._see_end)
        if not self._told and time.monotonic() - self._opened >= PATIENCE:
            self._told = True
            if self.session.look()[W.NEXT_SEQ] == 1 and not self.session.step(self._has_writer):
                what = "%s: a get waits, but nothing was ever put here and no writer has it open; is the path right?"
                _log.warning(what, self.path)
        if self.recycler.pins.pending:
            self.session.step(self._reclaim)
        if keeper.is_due():
            self.recycler.mappings.sweep(self.session.look())

    def _see_end(self) -> tuple[None, int, int]:
        self.has_ended()
        return None, 0, 0

    def _reclaim(self) -> tuple[None, int, int]:
        self.recycler.reclaim()
        return None, 0, 0

    @operation
    def watch(self, news: Callable[[], None], lacking: Message | int | None = None) -> SessionWatch:
        """A wait of an event loop for items."""
        return SessionWatch(self.session, "items", news, self._item_or_end(), self._each_second)

    def close(self) -> None:
        """Leave: what is in flight is requeued; files that arrays still show lose their names."""
        self.session.close(self.leave)

    def leave(self) -> tuple[bool, int, int]:
        """Give up some of what this session has; whether more is left. A step."""
        session, items, space = self.session, 0, 0
        self.recycler.reclaim()
        if self.recycler.pins.pending:
            return True, 0, 0
        ours = owned(session.journal.words, (session.token,))
        for record in ours[:AT_ONCE]:
            if session.journal.words[record + W.STATE] == W.IN_FLIGHT:
                _, more, room = housekeeping.redeliver(session, record, "its reader left", 0)
                items, space = items + more, space + room
            else:
                session.journal.commit(transitions.drop(session.journal.words, record))
        return len(ours) > AT_ONCE, items, space
