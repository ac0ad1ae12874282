"""`gc`: what crashed sessions left in a spool, all of it, or with `dry_run` only counted.

Each kind of leftover is judged by something final: a session whose lock can be taken has crashed for ever, a number
that left the table never comes back. So names are listed a batch at a time, judged in a locked step of about a
millisecond, and removed without the lock. Two at once find some of it gone already; one that is killed leaves the rest
to the next.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Final, TypeVar, TypeVarTuple

import numpy as np

from ..message import GcReport, Progress
from . import fs, liveness, pool, sources
from . import table as W
from .housekeeping import discard_if_shut_down, put_right
from .journal import Journal
from .layout import FILES, PARTS, item_name, item_number, temporary_owner
from .quarantine import aside_number, history_number, is_known
from .session import Session
from .table import Rows, owned, owners, rows
from .visitor import AnySpool, Visitor, administration

_log = logging.getLogger("spoolipc")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_STEP: Final = 0.002  # seconds after which a locked step of gc ends
_FREE_BATCH: Final = 16384


def gc(path: str | os.PathLike[str], dry_run: bool = False, progress: Progress | None = None) -> GcReport:
    """Requeue and remove what crashed sessions left in the spool at `path`, or with `dry_run` only count it."""
    with fs.as_owner(path), Visitor(path) as visitor:
        visitor.look()
        damaged = visitor.damage != ""
        if dry_run:
            return _Sweep(visitor, progress).run(damaged)
    with administration(path) as session:
        return _Sweep(session, progress).run(damaged)


def is_ours(part: str, name: str) -> bool:
    """Whether a name in a part of the spool, "." for its top, is one of its own."""
    if part == ".":
        return name in PARTS or name in FILES or aside_number(name) is not None
    if part == "tmp":
        return temporary_owner(name) != 0
    if part == "alive":
        return liveness.token_of(name) != 0
    number = item_number(name)
    if number is None:
        return part == "failed" and history_number(name) is not None
    return part == "free" or number < W.LAST_SEQ


class _Sweep:
    """One pass over a spool: a session, or for a dry run a visitor, which only looks."""

    def __init__(self, spool: AnySpool, progress: Progress | None) -> None:
        self.spool = spool
        self.session = spool if isinstance(spool, Session) else None
        self.progress = progress
        self.counts: Counter[str] = Counter()
        self.not_removed: list[str] = []
        self._seen = 0
        self._living: set[int] = set()

    def run(self, damaged: bool) -> GcReport:
        """Everything, in the order that lets one kind of leftover become another before that is looked for."""
        self._claims()
        while self._step(self._discard):
            pass
        self._step(self._half_written)
        unsettled = self._temporary()
        for names in self._names("free", _FREE_BATCH):
            for number in self._orphans(np.array([*map(item_number, names)], np.uint64)).tolist():
                self._remove("free", item_name(number), "orphaned_files")
        for names in self._names("failed"):
            self._step(self._histories, names)
        for names in self._names("alive"):
            for token in self._crashed(set(map(liveness.token_of, names))) - unsettled:
                self._remove("alive", liveness.token_name(token), "crashed_sessions")
        while self._step(self._evict_some):  # who crashed last has left what nobody writes again
            pass
        for part in (".", "items"):
            deque(self._names(part), 0)  # for the foreign files
        left = tuple(self.not_removed)
        return GcReport(
            self.spool.path, self.session is None, index_rebuilt=damaged, not_removed=left, **self.counts
        )

    def _step(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """Do `work`, which wakes nobody, under the lock."""
        if isinstance(self.spool, Visitor):
            return self.spool.step(work, *args)
        return self.spool.step(lambda: (work(*args), 0, 0))

    def _names(self, part: str, most: int = 256) -> Iterator[list[str]]:
        """The names in a part that are the spool's own, some at a time; the others are counted."""
        for names in fs.batches(self.spool.directories.places[part], most):
            ours = [name for name in names if is_ours(part, name)]
            yield ours
            self.counts["foreign_files"] += len(names) - len(ours)
            self._looked_at(len(names))

    def _looked_at(self, count: int) -> None:
        self._seen += count
        if self.progress is not None:
            self.progress(self._seen, None)

    def _remove(self, part: str, name: str, kind: str) -> None:
        """Remove one file and count it; what is no regular file was planted and stays."""
        directory = self.spool.directories.places[part]
        try:
            status = fs.stat_at(name, dir_fd=directory)
            if not stat.S_ISREG(status.st_mode):
                self.counts["foreign_files"] += 1
                return
            if self.session is not None:
                fs.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            return  # another gc was first
        except OSError as error:
            self.not_removed.append(f"{os.path.normpath(os.path.join(part, name))}: {error.strerror}")
            return
        self.counts[kind] += 1
        if status.st_nlink == 1:
            self.counts["bytes_freed"] += status.st_blocks * 512

    def _half_written(self) -> None:
        """A step, as only the holder of the lock may be making these files."""
        for name in ("index.new", "spool.json.new", sources.NEW):
            self._remove(".", name, "half_written")

    def _crashed(self, tokens: set[int]) -> set[int]:
        """Which of `tokens` are of sessions that have crashed, and not since one was found alive: its file would be
        removed, and what it had would not have been."""
        asked = tokens - self._living
        crashed = self._step(liveness.crashed_among, self.spool.directories.alive, asked)
        self._living |= asked - crashed
        return crashed

    def _claims(self) -> None:
        journal, abandoned = self._step(self._abandoned)
        for owner in {owner for _, owner in abandoned}:
            name = liveness.token_name(owner)
            if self.session is not None and not fs.exists(self.session.directories.alive, name):
                what = "%s: alive/%s is missing; what that session had is taken back"
                _log.warning(what, self.spool.path, name)
        while abandoned and journal is not None:
            if self.session is None:
                self._count(journal, abandoned.pop()[0])
            else:
                self.session.step(self._settle, self.session, journal, abandoned)
                self._looked_at(0)

    def _abandoned(self) -> tuple[Journal | None, list[tuple[int, int]]]:
        """In which table, and where in it, is what crashed sessions had; and whose it was. A step."""
        journal: Journal | None = self.spool.journal
        if journal is None:
            return None, []
        words = journal.words
        tokens = owners(words)
        crashed = liveness.crashed_among(self.spool.directories.alive, tokens)
        self._living = tokens - crashed
        return journal, [(record, words[record + W.OWNER]) for record in owned(words, crashed)]

    def _count(self, journal: Journal, record: int) -> None:
        words = journal.words
        most = words[W.MAX_ATTEMPTS]
        if words[record + W.STATE] == W.IN_FLIGHT:
            last = most and words[record + W.ATTEMPT] >= most
            self.counts["dead_lettered_items" if last else "requeued_items"] += 1
        else:
            self.counts["abandoned_files"] += 1
            self.counts["bytes_freed"] += words[record + W.BYTES]

    def _settle(
        self, session: Session, journal: Journal, abandoned: list[tuple[int, int]]
    ) -> tuple[None, int, int]:
        """Put some of the records right, taking them off the list. A step."""
        items = space = 0
        until = time.monotonic() + _STEP
        while abandoned and time.monotonic() < until:
            record, owner = abandoned[0]
            if session.journal is not journal:
                abandoned.clear()  # built again meanwhile: what had crashed owns nothing any more
                break
            if journal.words[record + W.OWNER] == owner:
                self._count(journal, record)
                more, room = put_right(session, record, "its reader crashed")
                items, space = items + more, space + room
            del abandoned[0]
        return None, items, space

    def _temporary(self) -> set[int]:
        """Remove what crashed sessions staged, when it is noted that none of it that was forwarded from elsewhere came;
        those of whom that cannot be noted, and whose files stay for who comes next."""
        session, unsettled = self.session, set[int]()
        for names in self._names("tmp"):
            crashed = self._crashed(set(map(temporary_owner, names)))
            if crashed and session is not None and not session.step(sources.settle, session, crashed):
                unsettled |= crashed
            for name in names:
                if temporary_owner(name) in crashed - unsettled:
                    self._remove("tmp", name, "temporary_files")
        if unsettled:
            self.not_removed.append(f"tmp: {sources.NAME} cannot be read or written")
        return unsettled

    def _discard(self) -> int:
        """Discard some of what is left in a spool that was shut down at once; how many. A step."""
        journal, session = self.spool.journal, self.session
        if journal is None or journal.words[W.SHUTDOWN] != W.DISCARDED:
            return 0
        words, more, left = journal.words, 0, 0
        count, size = pool.waiting(words) + self.counts["requeued_items"], words[W.ITEM_BYTES]
        if session is not None:
            count = more = discard_if_shut_down(session)[0]
            left = words[W.ITEM_BYTES]
        self.counts["discarded_items"] += count
        self.counts["bytes_freed"] += size - left
        return more

    def _orphans(self, listed: Rows) -> Rows:
        """Which files of `free/`, listed before, no record stands for.

        A file enters `free/` in the locked step that has or makes its record, and is renamed or unlinked before that
        record is forgotten: so in a table seen after the listing, a file that is still there and in use has its record.
        The records are read without the lock; a step before and after makes sure that it is the spool's index, with no
        transition unfinished.
        """
        while True:
            self._step(lambda: None)
            journal: Journal | None = self.spool.journal
            if journal is None:
                return listed  # a rebuild removes every file of free/
            records = rows(journal.words)
            orphans: Rows = np.setdiff1d(listed, records[records[:, W.STATE] != W.NOTHING, W.FILE])
            if self.session is None or not orphans.size:
                return orphans
            self._step(lambda: None)
            if self.spool.journal is journal:
                return orphans

    def _histories(self, names: list[str]) -> None:
        """A step."""
        for name in names:
            number = history_number(name)
            if number is not None and not is_known(self.spool.directories, number):
                self._remove("failed", name, "orphaned_histories")

    def _evict_some(self) -> bool:
        """Evict some of what nobody writes again; whether to go on. A step."""
        journal, session = self.spool.journal, self.session
        if journal is None or (session is None and self._living):
            return False
        words, more = journal.words, False
        count, size = words[W.POOL_COUNT], words[W.POOL_BYTES]
        if session is not None:
            more, _, _ = session.evict_if_alone()
            count, size = count - words[W.POOL_COUNT], size - words[W.POOL_BYTES]
        self.counts["pooled_files"] += count
        self.counts["bytes_freed"] += size
        return more
