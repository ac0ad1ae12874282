"""The putting side of the directory engine: room, the file, and the commit that makes it an item.

A put goes: is there room (a look without the lock); write the file; commit. The file is one that was consumed
before, written through a mapping kept from last time, or a new one in `tmp/`. The commit is one change: a
rename into `items/` and the stores that go with it. A crash before the rename leaves a file that nobody but
the tending and `gc` see; a crash after it leaves an item.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from . import changes, footer, npy, shutdown, spares
from . import words as W
from .alive import token_name
from .engine import Array, Payload
from .errors import BadItem, Full, ShutDown, SpoolClosed, StorageError
from .holds import NO_FILE, Hold, Holds
from .index import unlink_missing_ok
from .layout import Limits, item_name
from .loans import abandon_loans, settle_loans
from .maps import MOST_MAPPED, Maps, check_regular
from .newfile import map_new, sync_new, write_new
from .party import Party
from .preallocate import preallocate
from .room import PAGE, fits, make_room, refuse_impossible, room, rounded
from .spares import Spare
from .tend import drop_file, tend
from .waiting import wait

T = TypeVar("T")
Durability = Literal["none", "fsync"]
MOST_SPARES = 64
RETRY_AFTER = 1.0
"""Seconds after which a write that the file system refused is tried again."""


@dataclass(slots=True)
class FileDraft:
    """A payload in a file not yet in `items/`: a spare, or the file `name` in `tmp/`.

    need: bytes written. size: bytes of the file. put_time: wall clock, ns. lent: the payload's array is the
    file's own memory. hold: who looks at that.
    """

    payload: Payload
    image: npy.Image
    tail: bytes
    put_time: int
    need: int
    buffer: mmap.mmap | None = None
    status: os.stat_result | None = None
    spare: Spare | None = None
    name: str = ""
    size: int = 0
    lent: bool = False
    hold: Hold | None = None


class DirectorySink:
    """A writer's party in a spool directory.

    asked: limits, None for what is there. durability: "none" survives the crash of any process, "fsync" also
    the loss of power.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        asked: Limits,
        durability: Durability,
        *,
        reopen: bool,
    ) -> None:
        self.party = Party(path, asked)
        self.durable = durability == "fsync"
        self._numbers = itertools.count()
        self._no_space: tuple[int, int] | None = None
        self._forget()
        self.party.on_adopt = self._forget
        self.party.run(tend, force=True)
        if reopen:
            self.party.run(shutdown.set_state, W.OPEN)

    def _forget(self) -> None:
        """Start afresh: the index is another, or this is a forked child, where a thread may have held the mutex."""
        self._mutex = threading.Lock()
        self.spares: list[Spare] = []
        self.holds = Holds()
        self.maps = Maps(writable=True, most_bytes=MOST_MAPPED)
        self._pool_was_empty = False

    def admit(self, payload: Payload) -> bool:
        """Whether there is room for a payload now. Raises ShutDown, TooLarge, UnsupportedArray."""
        party = self.party
        words = party.look()
        if words[W.SHUTDOWN]:
            raise _shut_down(party)
        limit = words[W.MAX_BYTES]
        if self.spares and not limit:
            return room(words, 0)
        need = _need(payload)
        if (limit and need > limit) or not fits(party, need):
            refuse_impossible(party, need)
            return party.run(make_room, need)
        return room(words, need)

    def wait_space(self, payload: Payload, deadline: float | None) -> bool:
        """Wait until there may be room for a payload; False when the deadline (monotonic seconds) is past.

        When the file system refused to store it although it seemed to have room (a quota does that), any
        change of its free space or any item taken is reason to try again, and so is a second gone by.
        """
        party = self.party
        need = _need(payload)
        before, self._no_space = self._no_space, None

        def look(words: memoryview[int]) -> bool:
            if words[W.SHUTDOWN]:
                return True
            if before is not None:
                return before != self._space(words)
            return room(words, need) and (fits(party, need) or bool(words[W.POOL_COUNT]))

        if before is None:
            return wait(party, "space", look, deadline)
        soon = time.monotonic() + RETRY_AFTER
        return wait(party, "space", look, soon if deadline is None else min(soon, deadline)) or (
            deadline is None or time.monotonic() < deadline
        )

    def _space(self, words: memoryview[int]) -> tuple[int, int]:
        with self.party:
            return words[W.GOTS], os.fstatvfs(self.party.layout.root).f_bavail

    def prepare(self, payload: Payload) -> FileDraft:
        """Write a payload to a file that nobody sees yet. Raises Full when the file system is full."""
        image = npy.image_of(payload.arrays)
        put_time = time.time_ns()
        tail = footer.pack(image.end, put_time, names=payload.names, meta=payload.meta)
        draft = FileDraft(payload, image, tail, put_time, image.end + len(tail))
        with self.party:
            if not self.durable:
                spare = self._take_spare(draft.need)
                while spare is not None:
                    if self._fill_spare(spare, draft):
                        return draft
                    spare = self._take_spare(draft.need)
            self._write_new(draft)
        return draft

    def _take_spare(self, need: int) -> Spare | None:
        """A consumed file of the right size that is ours to write."""
        with self._mutex:
            for position, spare in enumerate(self.spares):
                if need <= spare.size <= self._most(need):
                    return self.spares.pop(position)
            useless, self.spares = self.spares, []
        if self._pool_was_empty and not useless:
            # One file more in circulation, so that the next commit finds one to reserve in the same step.
            self._pool_was_empty = False
            return None
        if not useless and not self.party.look()[W.POOL_COUNT]:
            return None
        return self.party.run(spares.swap, useless, need, self._most(need), self.maps)

    def _most(self, need: int) -> int:
        """Size up to which a consumed file may be used for `need` bytes: exact where bytes are limited."""
        return rounded(need) if self.party.index.words[W.MAX_BYTES] else max(PAGE, 2 * need)

    def _fill_spare(self, spare: Spare, draft: FileDraft) -> bool:
        """Write into a consumed file; False when it is not fit for it any more and was dropped."""
        buffer = self._map_spare(spare)
        if buffer is None:
            return False
        npy.store(buffer, draft.image, draft.payload.arrays)
        buffer[draft.image.end : draft.need] = draft.tail
        draft.spare, draft.size = spare, spare.size
        return True

    def _map_spare(self, spare: Spare) -> mmap.mmap | None:
        """The bytes of a consumed file; None when it is not fit to be written any more and was dropped."""
        layout, name = self.party.layout, item_name(spare.number)
        try:
            status = os.stat(name, dir_fd=layout.free, follow_symlinks=False)
            check_regular(status)
            if status.st_nlink != 1 or status.st_size != spare.size:
                raise BadItem("the file is linked elsewhere or has changed its size")
            return self.maps.of(layout.free, name, status, spare.birth, spare.record)
        except BadItem:
            self._drop(spare)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                self._give_back(spare)
                raise StorageError(error.errno, error.strerror, str(layout.path / "free" / name)) from error
            self._drop(spare)
        return None

    def _drop(self, spare: Spare) -> None:
        self.maps.forget(spare.birth)
        self.party.run(spares.drop, spare)

    def stock(self, payloads: Sequence[Payload]) -> None:
        """Reserve consumed files for several payloads in one step."""
        if self.durable or not self.party.look()[W.POOL_COUNT]:
            return
        needs = [_need(payload) for payload in payloads[:MOST_SPARES]]
        wanted = [(need, self._most(need)) for need in needs]
        with self._mutex:
            if spares.suffice(self.spares, wanted):
                return
            useless, self.spares = self.spares, []
        with self.party:
            found = self.party.run(spares.restock, useless, wanted, self.maps)
        with self._mutex:
            self.spares += found

    def preallocate(self, count: int, nbytes: int) -> None:
        """Fill the pool ahead with files for `count` arrays of `nbytes` bytes. Raises Full, ValueError."""
        with self.party:
            preallocate(self.party, self.maps, count, nbytes, f"{token_name(self.party.token)}-0")

    def lend(self, template: Array, meta: Any) -> tuple[FileDraft, Array]:
        """A draft like `template` and the array over its file, to be filled in place. Raises Full.

        What the array holds at first is undefined. `finish` must come before the commit.
        """
        image = npy.image_of((template,))
        need = image.end + len(footer.pack(image.end, 0, meta=meta))
        draft = FileDraft(Payload((), None, meta), image, b"", 0, need, lent=True)
        buffer = None
        with self.party:
            spare = None if self.durable else self._take_spare(need)
            while spare is not None and buffer is None:
                buffer = self._map_spare(spare)
                if buffer is None:
                    spare = self._take_spare(need)
            if spare is not None:
                draft.spare, draft.size = spare, spare.size
            if buffer is None:
                draft.name, draft.size = self._new_name(), rounded(need)
                made = self._storing(lambda: map_new(self.party, draft.name, draft.size), draft.size)
                buffer, draft.status = made
        array = npy.view(buffer, image.blocks[0], writeable=True)
        draft.payload.arrays = (array,)
        draft.buffer = buffer
        draft.hold = Hold(self.party.index, 0, NO_FILE)
        self.holds.add(draft.hold, draft.payload.arrays)  # now, so that a fork meanwhile is known
        return draft, array

    def finish(self, draft: FileDraft) -> None:
        """Write header and footer around a lent array, whose contents are final now."""
        buffer, image = draft.buffer, draft.image
        assert buffer is not None
        draft.put_time = time.time_ns()
        draft.tail = footer.pack(image.end, draft.put_time, meta=draft.payload.meta)
        (header,), (block,) = image.headers, image.blocks
        buffer[block.offset - len(header) : block.offset] = header
        buffer[image.end : draft.need] = draft.tail
        if self.durable:
            sync_new(self.party, draft.name)

    def _write_new(self, draft: FileDraft) -> None:
        """Write the draft to a new file in `tmp/`. A crash leaves it there under a dead token."""
        draft.spare = None
        draft.lent = False
        draft.name, draft.size = self._new_name(), rounded(draft.need)
        tail = draft.tail + bytes(draft.size - draft.need)
        arrays, image, sync = draft.payload.arrays, draft.image, self.durable
        self._storing(lambda: write_new(self.party, draft.name, arrays, image, tail, sync=sync), draft.size)

    def _new_name(self) -> str:
        return f"{token_name(self.party.token)}-{next(self._numbers)}.npy"

    def _storing(self, write: Callable[[], T], size: int) -> T:
        """The result of `write`; when the file system is full, the pool gives way and the state is remembered."""
        try:
            return write()
        except Full:
            self.party.run(make_room, size)
            self._no_space = self._space(self.party.look())
            raise

    def commit(self, drafts: Sequence[FileDraft]) -> list[int]:
        """Make drafts items, from the first on as far as there is room; returns their sequence numbers.

        Raises Full and ShutDown when not even the first could be committed; the drafts stay.
        """
        party = self.party
        seqs: list[int] = []
        with party:
            while party.run(_commit_all, self, drafts, seqs):
                # A file was lost with the index, or removed by hand: write it once more.
                self._write_new(drafts[len(seqs)])
            if self.durable:
                os.fsync(party.layout.items)
        return seqs

    def keep(self, spare: Spare) -> None:
        """Keep a consumed file for the next put."""
        with self._mutex:
            self.spares.append(spare)

    def discard(self, draft: FileDraft) -> None:
        """Remove a draft. One left by a close meanwhile is a dead party's: the next tending removes it."""
        with contextlib.suppress(SpoolClosed), self.party:
            if draft.spare is not None and draft.lent:
                self._drop(draft.spare)  # whoever filled it may still write to it
            elif draft.spare is not None:
                self._give_back(draft.spare)
            elif draft.name:
                unlink_missing_ok(self.party.layout.tmp, draft.name)

    def _give_back(self, spare: Spare) -> None:
        """Keep a spare after all, unless an interrupted commit has made it an item."""
        if self.party.run(spares.is_ours, spare):
            self.keep(spare)

    def shutdown(self, immediate: bool) -> None:
        """End the spool for all: no more puts; with `immediate` no more gets either."""
        shutdown.shut_down(self.party, immediate)

    def qsize(self) -> int:
        """How many items wait."""
        return self.party.qsize()

    def full(self) -> bool:
        """Whether a put would have to wait for `maxsize`."""
        words = self.party.look()
        return not room(words, 0)

    def close(self) -> None:
        """Leave; consumed files in hand go back to the pool."""
        self.party.close(self._leave)
        self._forget()

    def _leave(self, party: Party) -> None:
        with self._mutex:
            ours, self.spares = self.spares, []
        spares.give_back(party, ours)
        abandon_loans(party)


def _need(payload: Payload) -> int:
    end = npy.image_of(payload.arrays).end
    if payload.names is None and payload.meta is None:
        return rounded(end + footer.SIZE)
    return rounded(end + len(footer.pack(end, 0, names=payload.names, meta=payload.meta)))


def _shut_down(party: Party) -> ShutDown:
    return ShutDown(f"the spool {party.path} was shut down; SpoolWriter(path, reopen=True) opens it again")


def _commit_all(party: Party, sink: DirectorySink, drafts: Sequence[FileDraft], seqs: list[int]) -> bool:
    """The locked step of a put: True when the next draft's file is not there any more."""
    if sink.holds.pending:
        settle_loans(party, sink.holds)
    sink.maps.sweep(party.index.words)
    while len(seqs) < len(drafts):
        try:
            seq = _commit(party, sink, drafts[len(seqs)])
        except (Full, ShutDown):
            if seqs:
                return False
            raise
        if seq is None:
            return True
        seqs.append(seq)
    return False


def _commit(party: Party, sink: DirectorySink, draft: FileDraft) -> int | None:
    """Commit one draft, in the locked step: None when its file is not there any more."""
    index = party.index
    words = index.words
    if words[W.SHUTDOWN]:
        raise _shut_down(party)
    if not room(words, rounded(draft.need)):
        raise Full(f"the spool {party.path} is full")
    layout = party.layout
    seq = words[W.NEXT_SEQ]
    flags = W.DURABLE if sink.durable else 0
    spare = draft.spare
    loan = party.token if draft.lent else 0
    successor = link = 0
    if spare is not None:
        if not spares.is_ours(party, spare):
            return None
        if len(sink.spares) < MOST_SPARES:
            need, most = draft.need, draft.size
            successor, link = changes.find_pooled(
                index, need, most, sink.maps, only_mapped=need >= changes.LARGE
            )
        record = spare.record
        changes.describe(words, record, seq, draft.put_time, flags, loan, draft.image.end)
        stores = changes.put(index, record, seq, successor, link)
        source, directory = item_name(spare.number), layout.free
    else:
        record = index.new_record()
        changes.describe(index.words, record, seq, draft.put_time, flags, loan, draft.image.end)
        stores = changes.put_new(index, record, seq, draft.size)
        source, directory = draft.name, layout.tmp
    try:
        index.change(W.ARRIVE, seq, stores, _rename(source, directory, item_name(seq), layout.items))
    except FileNotFoundError:
        layout.check_present()
        if spare is not None:
            drop_file(party, spare.record)
        return None
    party.news("items")
    if loan:
        if draft.status is not None and draft.buffer is not None:
            sink.maps.keep(draft.buffer, draft.status, seq, record)
        hold = draft.hold
        assert hold is not None
        if hold.index is not index:
            hold = Hold(index, record, seq, alone=hold.alone)
            sink.holds.add(hold, draft.payload.arrays)
        hold.record, hold.number = record, seq
    if successor:
        sink.keep(spares.spare_of(index, successor))
    elif spare is not None and draft.need < changes.LARGE:
        sink._pool_was_empty = True
    return seq


def _rename(source: str, directory: int, target: str, items: int) -> Callable[[], None]:
    return lambda: os.rename(source, target, src_dir_fd=directory, dst_dir_fd=items)
