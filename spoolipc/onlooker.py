"""A spool seen from outside: no party, nothing announced, nothing written, nothing repaired.

`stat`, `fsck` and the dry run of `gc` look through this. It takes the index lock for as long as one look, and
sees a damaged index as such where a party would build it again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

from . import alive
from . import words as W
from .errors import LockTimeout, SpoolError, storage_error
from .index import Index, Torn, exists, journal
from .layout import Limits, open_layout
from .lock import NAME as LOCK
from .lock import TIMEOUT, IndexLock
from .marker import read_shutdown
from .ownfile import open_own

P = ParamSpec("P")
T = TypeVar("T")


class Onlooker:
    """A look at the spool at `path`; a context manager.

    index: its index as of the last look, None when that is missing or damaged; `damage` says why. patience:
    seconds to wait for the index lock. Raises NotASpool, UnsafeSpool, NetworkFileSystem, UnknownVersion.
    """

    def __init__(self, path: str | os.PathLike[str], *, patience: float = TIMEOUT) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.layout = open_layout(self.path, Limits(), create=False)
        self.index: Index | None = None
        self.damage = ""
        self._patience = patience
        try:
            self._lock = _existing_lock(self.layout.root)
        except BaseException as error:
            self.layout.close()
            if isinstance(error, OSError) and not isinstance(error, SpoolError):
                raise storage_error(error, self.path) from error
            raise

    def run(self, work: Callable[Concatenate[Onlooker, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do `work(self, ...)`, which only looks, under the index lock. Raises LockTimeout, naming the
        holder."""
        lock = self._lock
        if lock is None:  # deleted: there is nothing to wait for
            self._refresh()
            return work(self, *args, **kwargs)
        with lock.mutex:
            try:
                lock.take(self._patience)
                self._refresh()
                return work(self, *args, **kwargs)
            finally:
                lock.drop()

    def look(self) -> str:
        """Look at the index without the lock if need be; returns who held it too long, "" as a rule."""
        try:
            self.run(_nothing)
        except LockTimeout:
            self._refresh()
            return self.holder()
        return ""

    def holder(self) -> str:
        """Who took the index lock last, for messages."""
        if self.index is None:
            return "an unknown process"
        return f"process {alive.process_of(self.layout.alive, self.index.words[W.HOLDER])}"

    def _refresh(self) -> None:
        self._forget()
        try:
            index = Index(self.layout)
        except Torn as torn:
            self.damage = str(torn)
            return
        if index.words[W.CAPACITY] * W.WORD > index.size:
            index.close()
            self.damage = "the index is shorter than it says"
            return
        self.index, self.damage = index, ""

    def snapshot(self) -> memoryview[int] | None:
        """A copy of the index's words, up to the last record ever used, as they will be when a change that
        its maker did not finish is finished or undone; None without an index. Belongs into a locked step."""
        if self.index is None:
            return None
        words = self.index.words
        end = min(max(words[W.EDGE], W.HEADER), len(words))
        copy = memoryview(bytearray(words[:end])).cast("Q")
        if copy[W.MARK] == W.FOLLOW:
            copy[W.SHUTDOWN] = read_shutdown(self.layout)
        elif copy[W.MARK] and self._happened(copy[W.MARK] & ~W.FLOWING, copy[W.SUBJECT]):
            for position, value in journal(copy).items():
                if position < end:
                    copy[position] = value
        return copy

    def _happened(self, kind: int, subject: int) -> bool:
        """As `Index.recover` decides it, without finishing anything."""
        if kind == W.ARRIVE:
            return exists(self.layout.items, subject)
        if kind == W.LEAVE:
            return not exists(self.layout.items, subject)
        if kind == W.DONATE:
            return exists(self.layout.free, subject)
        return True

    def _forget(self) -> None:
        if self.index is not None:
            self.index.close()
            self.index = None

    def close(self) -> None:
        """Close every descriptor; harmless when repeated."""
        self._forget()
        if self._lock is not None:
            self._lock.close()
        self.layout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises SpoolGone or StorageError for an error of a system call in the block."""
        try:
            if isinstance(error, OSError) and not isinstance(error, SpoolError):
                self.layout.check_present()
                raise storage_error(error, self.path) from error
        finally:
            self.close()


def _nothing(onlooker: Onlooker) -> None:
    """A step that only sees whether the lock is free."""


def _existing_lock(root: int) -> IndexLock | None:
    try:
        return IndexLock(open_own(root, LOCK, os.O_RDWR), lambda: "another process")
    except FileNotFoundError:
        return None
