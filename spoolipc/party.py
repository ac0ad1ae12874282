"""One party: a writer's or reader's open spool, and the locked step in which everything happens.

`run` takes the lock, makes sure the index is the spool's and whole, does one piece of work, lets go, and only
then rings the bells that the work asked for. A forked child inherits nothing: it closes what it got and opens
the spool again as a party of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import weakref
from collections.abc import Callable
from typing import Concatenate, Literal, ParamSpec, TypeVar

from . import alive
from . import words as W
from .bell import Bells
from .errors import SpoolClosed, SpoolError, SpoolGone, StorageError, storage_error
from .index import Index, Torn, holder
from .layout import Layout, Limits, agree, open_layout
from .lock import IndexLock, open_lock
from .nofork import no_fork
from .pool import worth_waking
from .rebuild import rebuild, set_limits

P = ParamSpec("P")
T = TypeVar("T")
Kind = Literal["items", "space"]


class Party:
    """An open spool. Threads may share one.

    path: the spool's directory. asked: limits, None for what is there.
    create: make the spool where there is none.
    """

    layout: Layout
    index: Index
    bells: Bells

    def __init__(self, path: str | os.PathLike[str], asked: Limits, *, create: bool = True) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.closed = False
        self._forked = False
        self._opening = False
        self._in_child = threading.RLock()
        self._using = threading.Lock()
        self._users = 0
        self._held: list[int] = []
        self._index: Index | None = None
        self.on_adopt: Callable[[], None] = lambda: None
        _parties.add(self)  # now, so that a fork meanwhile finds the descriptors
        self._open(asked, create)

    def _open(self, asked: Limits, create: bool) -> None:
        try:
            self._enter(asked, create)
        except SpoolError:
            raise
        except OSError as error:
            raise storage_error(error, self.path) from error

    def _enter(self, asked: Limits, create: bool) -> None:
        self.layout = open_layout(self.path, asked, create=create)
        self.token = alive.new_token()
        self._held = self.layout.descriptors()
        self._finalizer = weakref.finalize(
            self, _abandon, os.getpid(), self.layout.alive, self.token, self._held
        )
        self.lock = IndexLock(open_lock(self.layout.root, self.layout.file_mode), self._holder)
        self._held.append(self.lock.fd)
        self._index = None
        self._news: dict[Kind, int] = {}
        self._alive = -1
        self.bells = Bells(os.path.join(self.path, "bell"), self.token, _flags_of(weakref.ref(self)))
        self.run(Party._join, asked)

    def _join(self, asked: Limits) -> None:
        set_limits(self.index, agree(self.layout, asked))
        with no_fork:  # a child that has the locked file unawares would hide our death
            self._alive = alive.announce(self.layout.alive, self.token, self.layout.file_mode)
            self._held.append(self._alive)

    def _holder(self) -> str:
        token = holder(self.layout)
        if not token:
            return "an unknown process"
        return f"process {alive.process_of(self.layout.alive, token)} (alive/{alive.token_name(token)})"

    def run(self, work: Callable[Concatenate[Party, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do `work(self, ...)` under the lock, with an index that is whole.

        It is begun again when it finds the index torn, so it must not do one thing twice.
        Raises LockTimeout, SpoolGone, SpoolClosed, StorageError, and what `work` raises.
        """
        if self.closed or self._forked:
            self.ready()
        lock = self.lock
        with lock.mutex:
            if self.closed:
                raise SpoolClosed(_CLOSED)
            try:
                try:
                    lock.take()
                    index = self._index
                    if index is not None:
                        try:
                            index.check()
                            index.words[W.HOLDER] = self.token
                            return work(self, *args, **kwargs)
                        except Torn as torn:
                            self._repair(str(torn))
                    return self._steadily(work, *args, **kwargs)
                finally:
                    lock.drop()
                    if self._news:
                        self._ring()
            except SpoolError:
                raise
            except OSError as error:
                raise self._explained(error) from error
            except BaseException:
                lock.drop()  # a signal may have come before the other
                raise

    def try_run(
        self, index: Index, work: Callable[Concatenate[Party, P], None], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """`run` for the most frequent work: where `index` cannot be used as it is, nothing is done. It rings no bell.

        Work that finds the index torn must have changed nothing since its last change. Raises LockTimeout,
        StorageError, and what `work` raises.
        """
        lock = self.lock
        with lock.mutex:
            try:
                if not self.closed and self._index is index:
                    try:
                        lock.take()
                        if index.is_sound(self.token):
                            work(self, *args, **kwargs)
                    finally:
                        lock.drop()
            except Torn:
                return  # the next `run` repairs it
            except SpoolError:
                raise
            except OSError as error:
                raise self._explained(error) from error
            except BaseException:
                lock.drop()  # a signal may have come before the other
                raise

    def _ring(self) -> None:
        news, self._news = self._news, {}
        if self._index is None or self._index.is_awaited():
            for kind, count in news.items():
                self.ring(kind, count)

    def ring(self, kind: Kind, count: int) -> None:
        """Wake somebody for each of `count` items or places, after the locked step that made them."""
        if kind == "items" or self._index is None or worth_waking(self._index.words):
            self.bells.ring(kind, count)

    def _steadily(self, work: Callable[Concatenate[Party, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do the work with an index that was lost or damaged just now."""
        damage = ""
        for _ in range(2):
            try:
                if self._index is None:
                    self._adopt(Index(self.layout))
                index = self.index
                index.check()
                index.words[W.HOLDER] = self.token
                return work(self, *args, **kwargs)
            except Torn as torn:
                damage = str(torn)
                self._repair(damage)
        raise StorageError(
            errno.EIO, f"the index is damaged again as soon as it is built ({damage})", self.path
        )

    def _repair(self, why: str) -> None:
        """Adopt the index that somebody else has built since, or build it."""
        torn, self._index = self._index, None
        try:
            index = Index(self.layout)
            if torn is not None and os.path.samestat(os.fstat(torn.fd), os.fstat(index.fd)):
                raise Torn(why)
            index.check()
        except Torn:
            index = rebuild(self.layout, why)
        finally:
            if torn is not None:
                torn.close()
        self._adopt(index)

    def _adopt(self, index: Index) -> None:
        self._index = self.index = index
        self.on_adopt()

    def _explained(self, error: OSError) -> OSError:
        """The error to raise for one of a system call: it names the path, and a deleted spool is called so."""
        try:
            self.layout.check_present()
        except SpoolGone as gone:
            return gone
        except OSError:
            pass  # the error at hand says more
        return storage_error(error, self.path)

    def look(self) -> memoryview[int]:
        """The index's words to be looked at without the lock: what they say is a hint."""
        self.ready()
        if not self.index.whole():
            self.run(_nothing)
        return self.index.words

    def qsize(self) -> int:
        """How many items wait, delayed ones included."""
        words = self.look()
        return words[W.READY_COUNT] + words[W.RETURNED_COUNT] + words[W.DELAYED_COUNT]

    def news(self, kind: Kind, count: int = 1) -> None:
        """Say, in the locked step, that so many of those who wait may look again."""
        self._news[kind] = self._news.get(kind, 0) + count

    def ready(self) -> None:
        """Make this usable in a forked child. Raises SpoolClosed."""
        if self.closed:
            raise SpoolClosed(_CLOSED)
        if self._forked:
            with self._in_child:
                if self._forked and not self._opening:
                    self._opening = True
                    try:
                        self._open(Limits(), create=False)
                        self._forked = False
                    finally:
                        self._opening = False

    def __enter__(self) -> None:
        """Use the descriptors: they stay open until the block ends, whoever closes this meanwhile.

        Raises SpoolClosed.
        """
        self.ready()
        with self._using:
            if self.closed:
                raise SpoolClosed(_CLOSED)
            self._users += 1

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raises StorageError or SpoolGone for an error of a system call in the block."""
        with self._using:
            self._users -= 1
            last = self.closed and not self._users
        if last:
            self._finalizer()
        if isinstance(error, OSError) and not isinstance(error, SpoolError):
            raise self._explained(error) from error

    def close(self, work: Callable[[Party], None]) -> None:
        """Do the last `work` under the lock and leave; harmless when repeated.

        A spool that was deleted meanwhile is simply left.
        """
        if self.closed:
            return
        if self._forked:
            self.closed = True
            return
        try:
            with contextlib.suppress(SpoolGone, SpoolClosed):
                self.run(work)
        finally:
            with self.lock.mutex, self._using:
                self.closed = True
                last = not self._users
            self.bells.close()
            if self._index is not None:
                self._index.close()
            if last:
                self._finalizer()
            _parties.discard(self)

    def forked(self) -> None:
        """In a forked child: close what was inherited, so that the parent's death is not hidden by it."""
        held, self._held = self._held, []
        for fd in held:
            with contextlib.suppress(OSError):
                os.close(fd)
        if self._index is not None:
            self._index.close()
            self._index = None
        self._in_child = threading.RLock()
        self._opening = False
        self._using = threading.Lock()
        self._users = 0
        self._forked = True
        if "bells" in vars(self):  # else the parent was still opening it
            self._finalizer.detach()
            self.bells.reset_after_fork()
            self.on_adopt()


def _flags_of(party: weakref.ref[Party]) -> Callable[[Kind], memoryview[int]]:
    """Where a party's bells find the flag words. It does not keep the party alive: the observer holds it."""

    def flags(kind: Kind) -> memoryview[int]:
        there = party()
        if there is None:
            raise SpoolClosed("the party that waited here is gone")
        if not there.index.whole():  # a word of a truncated file is SIGBUS; whoever waits looks again anyhow
            return memoryview(bytearray(8 * W.WORD)).cast("Q")
        start = W.ITEM_FLAGS if kind == "items" else W.SPACE_FLAGS
        return there.index.words[start : start + 8]

    return flags


_CLOSED = "this was closed; open a new one"


def _nothing(party: Party) -> None:
    """A step that only makes sure of the index."""


def _abandon(pid: int, alive_directory: int, token: int, held: list[int]) -> None:
    """End a party by its descriptors alone; what it still had is put back by whoever finds it dead."""
    if os.getpid() != pid:
        return
    with contextlib.suppress(OSError):
        os.unlink(alive.token_name(token), dir_fd=alive_directory)
    while held:  # a fork meanwhile closes what is left
        with contextlib.suppress(OSError):
            os.close(held.pop())


_parties: weakref.WeakSet[Party] = weakref.WeakSet()


def _forget_inherited() -> None:
    for party in list(_parties):
        party.forked()


os.register_at_fork(after_in_child=_forget_inherited)
