"""The putting side of the directory engine: room, the file, and the commit that makes it an item.

A put goes: is there room (a look without the lock); write the file; commit. The file is one that was consumed
before, written through a mapping kept from last time, or a new one in `tmp/`. The commit is one change: a
rename into `items/` and the stores that go with it. A crash before the rename leaves a file that nobody but
the tending and `gc` see; a crash after it leaves an item.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from . import footer, npy, shutdown, spares, steadyput
from . import words as W
from .alive import token_name
from .checksum import checksum_of
from .committing import commit_all, shut_down
from .engine import Array, Payload
from .errors import Full, SpoolClosed, StorageError
from .holds import NO_FILE, Hold
from .index import unlink_missing_ok
from .layout import Limits
from .loans import abandon_loans
from .maps import is_shortage
from .newfile import SMALL, map_new, sync_new, write_new
from .party import Party
from .room import fits, make_room, refuse_impossible, room, rounded
from .spares import Spare
from .stock import FileDraft, Plan, Stock, need_of
from .waiting import wait

T = TypeVar("T")
Durability = Literal["none", "fsync"]
RETRY_AFTER = 1.0
"""Seconds after which a write that the file system refused is tried again."""


class DirectorySink(Stock):
    """A writer's party in a spool directory.

    asked: limits, None for what is there. durability: "none" survives the crash of any process, "fsync" also
    the loss of power. checksum: store one with every item.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        asked: Limits,
        durability: Durability,
        *,
        reopen: bool = False,
        checksum: bool = False,
    ) -> None:
        super().__init__(path, asked, durable=durability == "fsync")
        if self.durable:
            self._sync_spool()
        self.checksum = checksum
        self._numbers = itertools.count()
        self._no_space: tuple[int, int] | None = None
        if reopen:
            self.party.run(shutdown.set_state, W.OPEN)

    def _sync_spool(self) -> None:
        """Whoever made the spool may not have synced the directories that lead to it."""
        try:
            with self.party:
                self.party.layout.sync()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> str:
        """The spool's directory, absolute."""
        return self.party.path

    @property
    def maxsize(self) -> int:
        """Most items waiting, 0 for no limit."""
        return self.party.look()[W.MAXSIZE]

    def admit(self, payload: Payload) -> bool:
        """Whether there is room for a payload now. Raises ShutDown, TooLarge, UnsupportedArray."""
        party = self.party
        words = party.look()
        if words[W.SHUTDOWN]:
            raise shut_down(party)
        limit = words[W.MAX_BYTES]
        if self.spares and not limit:
            return room(words, 0)
        need = need_of(payload)
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
        need = need_of(payload)
        before, self._no_space = self._no_space, None

        def look(words: memoryview[int]) -> bool:
            if words[W.SHUTDOWN]:
                return True
            if before is not None:
                return before != self._space(words)
            return room(words, need) and (fits(party, need) or bool(words[W.POOL_COUNT]))

        if before is None:
            return wait(party, "space", look, deadline, self.maps)
        soon = time.monotonic() + RETRY_AFTER
        return wait(party, "space", look, soon if deadline is None else min(soon, deadline), self.maps) or (
            deadline is None or time.monotonic() < deadline
        )

    def _space(self, words: memoryview[int]) -> tuple[int, int]:
        with self.party:
            return words[W.GOTS], os.fstatvfs(self.party.layout.root).f_bavail

    def prepare(self, payload: Payload) -> FileDraft:
        """Write a payload to a file that nobody sees yet. Raises Full when the file system is full."""
        image = npy.image_of(payload.arrays)
        put_time = time.time_ns()
        tail = _tail(payload, image, put_time)
        draft = FileDraft(payload, image, tail, put_time, image.end + len(tail))
        with self.party:
            if not self.durable:
                spare = self.take_spare(draft.need)
                while spare is not None:
                    if self._fill_spare(spare, draft):
                        return draft
                    spare = self.take_spare(draft.need)
            self._write_new(draft)
        return draft

    def _fill_spare(self, spare: Spare, draft: FileDraft) -> bool:
        """Write into a consumed file; False when it is not fit for it any more and was dropped."""
        if spare.size <= SMALL and not self.maps.wanted(spare.birth):
            data = npy.to_bytes(draft.image, draft.payload.arrays)
            if self.checksum:
                draft.tail = self._tail_of(draft, data)
            if not self.write_spare(spare, data + draft.tail):
                return False
            draft.spare, draft.size = spare, spare.size
            return True
        buffer = self.map_spare(spare)
        if buffer is None:
            return False
        npy.store(buffer, draft.image, draft.payload.arrays)
        self._seal(buffer, draft)
        draft.spare, draft.size = spare, spare.size
        if not self.checksum:
            self.plan = self._plan_of(draft)
        return True

    def _plan_of(self, draft: FileDraft) -> Plan | None:
        """What the next put may repeat: a single plain array without metadata."""
        payload = draft.payload
        (array, *more), block = payload.arrays, draft.image.blocks[0]
        plain = payload.names is None and payload.meta is None and array.dtype.names is None
        if more or not plain or block.fortran or not array.nbytes:
            return None
        (header,), need, end = draft.image.headers, draft.need, draft.image.end
        most, pool = self.most(need), W.bucket(need)
        return Plan(array.dtype, array.shape, header, block.offset, end, need, most, pool)

    def put_again(self, arrays: Sequence[Array]) -> list[int]:
        """Put arrays like the last one, from the first on, as long as nothing stands in the way."""
        return steadyput.put_again(self, arrays)

    def _seal(self, buffer: mmap.mmap, draft: FileDraft) -> None:
        """Write the footer of a mapped file whose blocks are there."""
        if self.checksum:
            draft.tail = self._tail_of(draft, buffer)
        buffer[draft.image.end : draft.need] = draft.tail

    def _tail_of(self, draft: FileDraft, buffer: mmap.mmap | bytes) -> bytes:
        """The footer with the checksum of the blocks in `buffer`; it is as long as without."""
        return _tail(draft.payload, draft.image, draft.put_time, checksum_of(buffer, draft.image.end))

    def lend(self, template: Array, meta: Any) -> tuple[FileDraft, Array]:
        """A draft like `template` and the array over its file, to be filled in place. Raises Full.

        What the array holds at first is undefined. `finish` must come before the commit.
        """
        image = npy.image_of((template,))
        need = image.end + len(footer.pack(image.end, 0, meta=meta))
        draft = FileDraft(Payload((), None, meta), image, b"", 0, need, lent=True)
        buffer = None
        with self.party:
            spare = None if self.durable else self.take_spare(need)
            while spare is not None and buffer is None:
                buffer = self.map_spare(spare)
                if buffer is None:
                    spare = self.take_spare(need)
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
        draft.tail = _tail(draft.payload, image, draft.put_time)
        (header,), (block,) = image.headers, image.blocks
        buffer[block.offset - len(header) : block.offset] = header
        self._seal(buffer, draft)
        if self.durable:
            sync_new(self.party, draft.name)

    def _write_new(self, draft: FileDraft) -> None:
        """Write the draft to a new file in `tmp/`. A crash leaves it there under a dead token."""
        draft.spare = None
        draft.lent = False
        draft.name, draft.size = self._new_name(), rounded(draft.need)
        tail = draft.tail + bytes(draft.size - draft.need)
        seal = (lambda written: self._tail_of(draft, written)) if self.checksum else None

        def write() -> None:
            arrays, sync = draft.payload.arrays, self.durable
            write_new(self.party, draft.name, arrays, draft.image, tail, seal=seal, sync=sync)

        self._storing(write, draft.size)

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
            while self._commit_some(drafts, seqs):
                # A file was lost with the index, or removed by hand: write it once more.
                try:
                    self._write_new(drafts[len(seqs)])
                except Full:
                    if seqs:
                        break  # what is committed must be known to be
                    raise
            if self.durable and seqs:
                self._make_durable(seqs)
        return seqs

    def _make_durable(self, seqs: list[int]) -> None:
        try:
            os.fsync(self.party.layout.items)
        except OSError as error:
            what = f"items {seqs[0]} to {seqs[-1]} are in the spool, but not known to be durable"
            raise StorageError(error.errno, f"{what}: {error.strerror}", self.party.path) from error

    def _commit_some(self, drafts: Sequence[FileDraft], seqs: list[int]) -> bool:
        try:
            return self.party.run(commit_all, self, drafts, seqs)
        except StorageError as error:
            if not is_shortage(error):
                raise
            self._no_space = self._space(self.party.look())
            raise Full(f"the file system of {self.party.path} is full: {error.strerror}") from error

    def discard(self, draft: FileDraft) -> None:
        """Remove a draft. One left by a close meanwhile is a dead party's: the next tending removes it."""
        with contextlib.suppress(SpoolClosed), self.party:
            if draft.spare is not None and draft.lent:
                self.drop(draft.spare)  # whoever filled it may still write to it
            elif draft.spare is not None:
                self.put_aside(draft.spare)
            elif draft.name:
                unlink_missing_ok(self.party.layout.tmp, draft.name)

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
        spares.give_back(party, self.spares)
        abandon_loans(party)


def _tail(payload: Payload, image: npy.Image, put_time: int, checksum: int | None = None) -> bytes:
    return footer.pack(image.end, put_time, names=payload.names, meta=payload.meta, checksum=checksum)
