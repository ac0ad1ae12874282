"""A spool from outside: looked at, or looked after.

A `Visitor` only looks, for `stat`, `fsck` and the dry run of `gc`: nothing is announced, written or built again. It
takes the index lock for as long as one look, and sees a damaged index as such where a session would build it again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self, TypeVar, TypeVarTuple

from ..errors import LockTimeout, ReentrantCall
from ..message import Limits
from . import fs
from . import table as W
from .journal import Journal, follow, happened, holder, journalled
from .layout import open_directories
from .lock import TIMEOUT, IndexLock
from .session import Session
from .table import IndexDamaged, Words
from .transitions import CLEAN, FOLLOW

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Visitor:
    """A look at the spool at `path` from outside; a context manager.

    journal: its index as of the last look, None when that is missing or damaged; `damage` says why. patience: seconds
    to wait for the index lock. Raises NotASpool, UnsafeSpool, NetworkFileSystem, UnknownVersion.
    """

    def __init__(self, path: str | os.PathLike[str], *, patience: float = TIMEOUT) -> None:
        self.path = os.path.abspath(os.fsdecode(path))
        self.directories = open_directories(self.path, Limits(), create=False, as_found=True, restore=False)
        self.journal: Journal | None = None
        self.damage = ""
        self._patience = patience
        self._lock = IndexLock(self.directories.items, self.path, lambda: "another process")

    def step(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """Do `work`, which only looks, under the index lock. Raises LockTimeout, naming the holder."""
        with self._lock.held(self._patience):
            self._refresh(locked=True)
            return work(*args)

    def look(self) -> str:
        """Look at the index, without the lock if need be; returns who held it too long, "" as a rule."""
        try:
            self.step(lambda: None)
        except (LockTimeout, ReentrantCall):
            self._refresh(locked=False)
            return self.holder()
        return ""

    def holder(self) -> str:
        """Who took the index lock last, for messages."""
        return holder(self.directories)

    def _refresh(self, *, locked: bool) -> None:
        self.journal, self.damage = None, ""
        try:
            self.journal = Journal(self.directories, writable=False)
            if not self.journal.holds_what_it_says():
                raise IndexDamaged("the index is shorter than it says")
            if locked:
                self.journal.check_boot()
        except IndexDamaged as damage:
            self.journal, self.damage = None, str(damage)

    def snapshot(self) -> Words | None:
        """A copy of the words, up to the last record used or about to be, as they will be when a transition that its
        maker did not finish is finished or forgotten; None without an index. Belongs into a step."""
        if self.journal is None:
            return None
        words = self.journal.words
        end = min(max(words[W.EDGE], W.HEADER) + W.RECORD, len(words))
        copy: Words = memoryview(bytearray(words[:end])).cast("Q")
        kind = copy[W.MARK]
        if kind == FOLLOW:
            follow(copy, self.directories)
        elif kind != CLEAN and happened(self.directories, kind, copy[W.SUBJECT], finish=False):
            stores = journalled(copy)
            for position, value in zip(stores[::2], stores[1::2], strict=True):
                if position < end:
                    copy[position] = value
        return copy

    def close(self) -> None:
        """Close every descriptor; harmless when repeated."""
        self.journal = None
        self.directories.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises SpoolGone or StorageError for an error of a system call in the block."""
        try:
            if isinstance(error, OSError) and fs.is_of_file(error):
                raise self.directories.explained(error) from error
        finally:
            self.close()


@contextlib.contextmanager
def administration(path: str | os.PathLike[str]) -> Iterator[Session]:
    """A session of the spool at `path` for one call that looks after it; root acts as the spool's owner meanwhile.

    Raises NotASpool, UnsafeSpool, UnknownVersion, LockTimeout, SpoolGone, StorageError.
    """
    with fs.as_owner(path):
        session = Session(path, Limits(), "admin", create=False)
        try:
            with session.explaining():
                yield session
        finally:
            session.close(lambda: (None, 0, 0))


AnySpool = Session | Visitor
