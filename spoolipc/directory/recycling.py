"""Files that go round: mappings kept, files reserved to be written again, and who still shows a file.

A consumed file is written again only when nobody can see it change: no array over it is left (every view of an array
keeps the array alive), and no fork happened while there was one, as the child has the views too. Otherwise it is
unlinked, and whoever mapped it keeps the pages.

A lent array's writer may still have it after the commit. Its file then bears the writer's token in LOAN; a reader that
is done with such a file does not pool it but passes it to that writer, who pools it when it can.
"""

from __future__ import annotations

import mmap
import os
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final

import numpy as np

from ..errors import BadItem, SpoolError
from . import fs, pool, transitions
from . import table as W
from .itemfile import ItemFile
from .layout import free_name
from .lock import forks
from .pool import find_pooled, may_pool
from .session import Session
from .table import Words, bucket, owned

PAGE: Final = 4096
SMALL: Final = 16384
"""Bytes up to which one read or write beats a map, and a copy beats pinning the file."""
MOST_RESERVED: Final = 64
"""Files that one writer has reserved at most."""
_MOST_KINDS: Final = 8  # reserved files kept for arrays of other sizes than the one being put
_MOST_MAPPED: Final = 1024  # mappings kept by a process
_MOST_MAPPED_BYTES: Final = 1 << 33
SECOND: Final = 1_000_000_000
"""In ns."""
_UNUSED: Final = 5 * SECOND  # after which a mapping goes
_MOST_SEEN: Final = 1024  # small files seen once and not worth a map yet
ENOUGH_LARGE: Final = 4
"""Large files: with so many mapped, one of them is most likely free when the next is reserved; and so many are reserved
ahead at most, as a writer that makes no call keeps them from all others."""
_CHEAP: Final = 4 << 20  # bytes up to which a new file costs less than a put that finds none reserved
NO_FILE: Final = 2**64 - 1
"""Stands for the number of a file that is not an item yet."""


def rounded(size: int) -> int:
    """The size of the file for `size` bytes: whole pages, so that a later item of nearly the size fits too."""
    return (size + PAGE - 1) & -PAGE


class Pin:
    """One file that arrays show. table, record, number: where it is known. left: an entry for each time it is shown.
    forks: how many had ended when the first may have shown it."""

    __slots__ = ("forks", "left", "number", "record", "table")

    def __init__(self, table: object, record: int, number: int) -> None:
        self.table = table
        self.record = record
        self.number = number
        self.left: list[None] = []
        self.forks = forks.ended


class _Watched(weakref.ref[Any]):
    __slots__ = ("pin",)
    pin: Pin


class Pins:
    """The files that a session's arrays show. pending: of what is gone, to be taken note of in the next step.

    An array goes at any moment, on any thread, even within a step: what happens then is one call in C, amid which comes
    no interrupt that would be lost.
    """

    def __init__(self) -> None:
        self.pending: deque[weakref.ref[Any] | Pin] = deque()
        self.watched: dict[int, _Watched] = {}

    def add(self, pin: Pin, shown: object) -> None:
        """Watch what all arrays over a file, their bases and their views keep alive."""
        watched = _Watched(shown, self.pending.append)
        watched.pin = pin
        pin.left.append(None)
        self.watched[id(watched)] = watched

    def forget(self, record: int, number: int) -> None:
        """An item was put back: what shows its file still has no part in what becomes of it. A step."""
        for watched in list(self.watched.values()):
            if (watched.pin.record, watched.pin.number) == (record, number):
                watched.pin.number = NO_FILE

    def first(self) -> Pin:
        """The pin of the first of what is pending, which does not show it any more. A step."""
        gone = self.pending[0]
        if isinstance(gone, Pin):
            return gone
        assert isinstance(gone, _Watched)
        if self.watched.pop(id(gone), None) is not None:
            gone.pin.left.pop()
        return gone.pin


class Lent:
    """Lends the pages of a mapping: an array over them that is made read-only stays so.

    numpy lets an array be made writable again whose last base is a writable buffer, as the mapping is and this is not.
    """

    __slots__ = ("__array_interface__", "__weakref__", "_pages")

    def __init__(self, pages: mmap.mmap) -> None:
        self._pages = pages
        place = np.frombuffer(pages, np.uint8).ctypes.data
        self.__array_interface__ = {
            "version": 3,
            "shape": (len(pages),),
            "typestr": "|u1",
            "data": (place, False),
        }


@dataclass(slots=True, eq=False)
class Mapping:
    """One mapped file. identity: its inode and device, in the order of `os.stat_result`. used: when, to about a second,
    in monotonic ns."""

    buffer: mmap.mmap
    identity: tuple[int, ...]
    size: int
    record: int
    used: int


class Mappings:
    """Mappings that a session keeps: a file that comes back is already mapped, its pages already entered.

    Kept under the file's number, which no other file ever has, and used again only when the file at hand is the
    same one (device, inode, size). Threads may share it, and what is kept may go at any moment: see `Keeper`.
    """

    def __init__(self, *, writable: bool) -> None:
        self._writable = writable
        self.kept: dict[int, Mapping] = {}
        self._seen: set[int] = set()
        keeper.members[id(self)] = self

    def wants(self, number: int) -> bool:
        """Whether a small file is better mapped than read or written: when it comes back while there is room. One that
        is seen once, as in a long backlog, is not worth a map."""
        if number in self._seen:
            return keeper.files > 0
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        self._seen.add(number)
        return False

    def of(self, directory: int, name: str, status: os.stat_result, number: int, record: int) -> mmap.mmap:
        """The mapping of the file that `status` was just read from.

        Raises BadItem when another file stands at the name now, OSError when it cannot be opened.
        """
        kept = self.kept.get(number)
        if kept is not None:
            if kept.identity == status[1:3] and kept.size == status[6]:
                kept.used = keeper.now
                return kept.buffer
            self.forget(number)
        with ItemFile(directory, name, writable=self._writable) as file:
            if not file.is_the_one(status):
                raise BadItem("the file was replaced while it was opened")
            buffer = file.map(writable=self._writable)
        self.keep(buffer, status, number, record)
        return buffer

    def keep(self, buffer: mmap.mmap, status: os.stat_result, number: int, record: int) -> None:
        """Keep the mapping of a file for the next time it is seen."""
        self.kept[number] = Mapping(buffer, status[1:3], status.st_size, record, time.monotonic_ns())
        keeper.note(status.st_size)

    def forget(self, number: int) -> None:
        """Let go of a mapping; views of it keep their pages."""
        self.kept.pop(number, None)

    def sweep(self, words: Words) -> None:
        """Let go of the mappings of files that are no more, whose memory they would hold, and of all in this process
        that were not used lately. For when `keeper` is due, and not in a step: to unmap takes its time."""
        for number, mapping in list(self.kept.items()):
            at = mapping.record + W.FILE
            if at >= len(words) or words[at] != number:
                self.forget(number)
        keeper.sweep()


class Keeper:
    """What the sessions of this process keep mapped, all together: it gives way to whatever else needs the room.

    It is bounded in number and in bytes, half of what RLIMIT_AS leaves at most; what was not used for some seconds goes
    at the next call of any session; where a mapping cannot be made, all goes. There is no lock, as a collection or a
    signal may lead here at any moment: what is counted may be a little off until it is counted again.

    now: when it was last swept, in monotonic ns; due again a second later. files: how many more may be kept.
    """

    def __init__(self) -> None:
        self.now = 0
        self.members: weakref.WeakValueDictionary[int, Mappings] = weakref.WeakValueDictionary()
        self.files, self._bytes = _MOST_MAPPED, 0
        fs.give_way.append(self.let_go)

    def is_due(self) -> bool:
        """Whether it was not swept within the second."""
        return not 0 <= time.monotonic_ns() - self.now < SECOND

    def _all(self) -> list[Mappings]:
        found = [member() for member in self.members.valuerefs()]
        return [member for member in found if member is not None]

    def note(self, size: int) -> None:
        """One more is kept."""
        self.files -= 1
        self._bytes -= size
        if self.files < 0 or self._bytes < 0:
            self._trim(0)

    def sweep(self) -> None:
        """Let go of what was not used for some seconds."""
        self.now = time.monotonic_ns()
        self._trim(self.now - _UNUSED)

    def _trim(self, since: int) -> None:
        """Let go of what was not used since then and, above the limits, of what was used longest ago, a quarter at
        once so that it is seldom counted."""
        kept = [
            (mapping.used, mapping.size, number, member)
            for member in self._all()
            for number, mapping in list(member.kept.items())
        ]
        kept.sort(key=itemgetter(0))
        files, total = len(kept), sum(size for _, size, _, _ in kept)
        left = fs.address_space_left()
        most = _MOST_MAPPED_BYTES if left is None else min(_MOST_MAPPED_BYTES, (left + total) // 2)
        over = files > _MOST_MAPPED or total > most
        for used, size, number, member in kept:
            over = over and (files * 4 > _MOST_MAPPED * 3 or total * 4 > most * 3)
            if used >= since and not over:
                break
            member.forget(number)
            files, total = files - 1, total - size
        self.files, self._bytes = _MOST_MAPPED - files, most - total

    def let_go(self) -> None:
        """Let go of everything."""
        for member in self._all():
            member.kept.clear()


keeper: Final = Keeper()


@dataclass(slots=True, eq=False)
class Reserved:
    """A consumed file that this writer may write. table: in which it is known."""

    table: object
    record: int
    name: str
    number: int
    size: int


_PINNED: Final = W.together(W.STATE, W.SEQ, W.FLAGS, W.LOAN, W.OWNER, W.BYTES)
_RESERVED: Final = W.together(W.STATE, W.OWNER, W.FILE)
_recyclers: Final[weakref.WeakValueDictionary[int, Recycler]] = weakref.WeakValueDictionary()


class Recycler:
    """What one session keeps of the files that go round. All methods are safe for threads; those said to be of a step
    belong into one."""

    def __init__(self, session: Session, *, writable: bool) -> None:
        self.session = session
        self._writable = writable
        self.forget()
        _recyclers[id(self)] = self
        session.on_adopt.append(weakref.WeakMethod(self.forget))

    def forget(self, _: object = None) -> None:
        """Start afresh: the table is another, or this is a forked child."""
        self.pins = Pins()
        self.mappings = Mappings(writable=self._writable)
        self.reserved: list[Reserved] = []
        self.lent: set[int] = set()  # numbers of reserved files that somebody fills
        self.has_strays = False  # whether more may be reserved here than is known
        self._short: dict[int, int] = {}

    # Of a step

    def to_release(self) -> int:
        """The record of the first file that no array shows any more, if all that is to be done is to pool it: the
        transition at hand does, and its maker takes the pin off those pending. Else 0, with the pending ones but for
        the last done. A step."""
        pending, journal, words = self.pins.pending, self.session.journal, self.session.journal.words
        if not pending:
            return 0
        pin = self.pins.first()
        if not pin.left and pin.forks == forks.begun and pin.table is journal.identity:
            state, seq, flags, loan, owner, size = _PINNED(words, pin.record * W.WORD)
            is_ours = seq == pin.number and state == W.PINNED and owner == self.session.token
            if is_ours and not loan and not flags & W.NEVER_AGAIN and may_pool(words, size):
                return pin.record
        self.reclaim(len(pending) - 1)
        return 0

    def reclaim(self, leave: int = 0) -> None:
        """Files that no array shows any more, some of them but for the last `leave`, go to the pool, to the writer that
        lent them, or away when the pool is full or a forked child may show them. A step."""
        pending, journal, token = self.pins.pending, self.session.journal, self.session.token
        for _ in range(min(len(pending) - leave, MOST_RESERVED)):
            pin = self.pins.first()
            words, record = journal.words, pin.record
            pending.popleft()
            if pin.left or pin.table is not journal.identity:
                continue
            state, seq, flags, loan, owner, size = _PINNED(words, record * W.WORD)
            if seq != pin.number:
                continue
            forked = pin.forks != forks.begun
            if loan == token:
                journal.commit(transitions.end_loan(words, record, shared=forked))
            elif state == W.PINNED and owner == token:
                has_room = may_pool(words, size)
                shared = forked or flags & W.NEVER_AGAIN
                if shared or (loan and not has_room):
                    journal.commit(transitions.drop(words, record))
                elif loan:
                    journal.commit(transitions.pass_to_lender(words, record))
                else:
                    journal.commit(transitions.release(words, record))
                    if not has_room:
                        pool.evict_one(self.session.directories, journal, record, bucket(size))

    def reserve(self, need: int, most: int) -> Reserved | None:
        """Reserve a pooled file of `need` to `most` bytes, if there is one. A step."""
        journal = self.session.journal
        record, link = find_pooled(journal.words, need, most, self.mappings.kept)
        if not record:
            return None
        journal.commit(transitions.reserve(journal.words, record, link, self.session.token))
        return self.reserved_at(record)

    def reserved_at(self, record: int) -> Reserved:
        """A reserved file as its writer knows it. A step."""
        journal = self.session.journal
        words = journal.words
        number = words[record + W.FILE]
        return Reserved(journal.identity, record, free_name(number), number, words[record + W.BYTES])

    def is_ours(self, file: Reserved) -> bool:
        """Whether a file is still this session's to write: not committed, not lost with the table. A step."""
        journal = self.session.journal
        if file.table is not journal.identity:
            return False
        ours = W.RESERVED, self.session.token, file.number
        return _RESERVED(journal.words, file.record * W.WORD) == ours

    def release_all(self) -> None:
        """Put all reserved files back into the pool. A step."""
        journal = self.session.journal
        while self.reserved:
            file = self.reserved.pop()
            if self.is_ours(file):
                journal.commit(transitions.release(journal.words, file.record))

    def release_strays(self) -> tuple[None, int, int]:
        """Find what a put that failed or was interrupted still has reserved. For an operation that has staged nothing
        yet; nothing is done while another thread is in one, which may have a file that it took off the list. A step."""
        journal, token = self.session.journal, self.session.token
        kept = {file.record for file in self.reserved}
        words = journal.words
        ours = [record for record in owned(words, {token}) if words[record + W.STATE] == W.RESERVED]
        if len(self.session.users) > 1:  # looked at last: who came later took what is on the list
            return None, 0, 0
        self.has_strays = False
        for record in ours:
            if record not in kept and words[record + W.FILE] not in self.lent:
                journal.commit(transitions.release(words, record))
        return None, 0, 0

    def make_room(self, need: int) -> tuple[bool, int, int]:
        """Evict pooled files of `need` bytes, one at least, those let go of here among them, and then what is reserved
        here; false when there is none. A step."""
        session = self.session
        self.reclaim()
        found = pool.evict(session.directories, session.journal, need)
        if not found and self.reserved:
            self.release_all()
            found = pool.evict(session.directories, session.journal, need)
        return bool(found), 0, 0

    # Without the lock

    def lacking(self, need: int) -> int:
        """Bytes that the file system lacks for a new file of `need`; one where it takes no file."""
        size, files = fs.room(self.session.directories.root)
        return max(need - size, not files)

    def fell_short(self, need: int) -> None:
        """A commit found no file to reserve for the next put: let there be one more, where that is cheap."""
        if need < _CHEAP:
            size = bucket(need)
            self._short[size] = min(self._short.get(size, 0) + 1, MOST_RESERVED if need <= SMALL else 1)

    def pick(self, need: int, most: int) -> Reserved | None:
        """A consumed file of the right size that is ours to write, None where a new one is to be made."""
        try:
            file = self.reserved.pop()
        except IndexError:
            pass
        else:
            if need <= file.size <= most:
                return file
            self.reserved.append(file)
            for file in self.reserved:
                if need <= file.size <= most and self._take(file):
                    return file
        kind = bucket(need)
        short = self._short.get(kind, 0)
        if short and not self.lacking(need):
            # One file more in circulation, so that the next commit finds one to reserve in the same step.
            self._short[kind] = short - 1
            return None
        if not self.session.look()[W.POOL_COUNT]:
            return None
        return self.session.step(self._reserve_one, need, most)

    def let_give_way(self, need: int) -> bool:
        """Make room, here or in another session of this process; false when there is none. For who would have to wait,
        perhaps in the very thread that would have made the other's next call."""
        root = fs.fstat(self.session.directories.root).st_dev
        if self.session.step(self.make_room, need):
            return True
        for ref in _recyclers.valuerefs():
            other = ref()
            if other is None or other is self or not other.session.is_open or other.session.is_forked:
                continue
            session = other.session
            with suppress(SpoolError, OSError), session.in_use():  # errors are no concern of who asks
                is_here = fs.fstat(session.directories.root).st_dev == root
                if is_here and session.lock.is_free() and session.step(other.make_room, need):
                    return True
        return False

    def _take(self, file: Reserved) -> bool:
        try:
            self.reserved.remove(file)
        except ValueError:  # another thread has it
            return False
        return True

    def _reserve_one(self, need: int, most: int) -> tuple[Reserved | None, int, int]:
        if len(self.reserved) >= _MOST_KINDS:  # of sizes that nobody puts any more
            self.release_all()
        return self.reserve(need, most), 0, 0

    def stock_up(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Reserve a file for each (need, most) in one step, if there are not enough yet."""
        first = wanted[0][0]
        fresh = self._short.get(bucket(first), 0) if first <= SMALL else 0
        wanted = wanted[fresh:MOST_RESERVED]
        sizes = [file.size for file in self.reserved]
        for need, most in wanted:
            fit = next((position for position, size in enumerate(sizes) if need <= size <= most), None)
            if fit is None:
                if self.session.look()[W.POOL_COUNT]:
                    self.session.step(self._restock, wanted)
                return
            del sizes[fit]

    def _restock(self, wanted: Sequence[tuple[int, int]]) -> tuple[None, int, int]:
        self.release_all()
        for need, most in wanted:
            file = self.reserve(need, most)
            if file is not None:
                self.reserved.append(file)
        return None, 0, 0

    def discard(self, file: Reserved) -> None:
        """Unlink a reserved file that is not fit to be written."""
        self.mappings.forget(file.number)
        self.session.step(self._discard, file)

    def _discard(self, file: Reserved) -> tuple[None, int, int]:
        journal = self.session.journal
        if self.is_ours(file):
            journal.commit(transitions.drop(journal.words, file.record))
        self.lent.discard(file.number)
        return None, 0, 0
