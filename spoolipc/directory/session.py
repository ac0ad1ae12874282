"""An open spool: how it is entered and left, what a fork does to it, and the locked step in which everything happens.

`Session.step` takes the lock, makes sure that the index is the spool's and whole, does one piece of work, lets go, and
only then wakes whom the work says. A session is a member: it holds `alive/TOKEN`. A forked child inherits no more than
to count as a writer: it closes all else that it got, and opens the spool again as a session of its own.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from sys import is_finalizing
from threading import get_ident
from typing import Any, Concatenate, Final, ParamSpec, TypeAlias, TypeVar, TypeVarTuple, cast

from ..errors import Empty, Full, ShutDown, SpoolClosed, SpoolError, SpoolGone, StorageError
from ..message import Deadline, Limits
from . import fs, liveness
from . import table as W
from .doorbell import Doorbell, Kind, take_place
from .journal import Journal, holder, set_limits
from .layout import Directories, agree, open_directories
from .lock import IndexLock, briefly, catch_up, hurried, no_fork, put_off, reentered, steps
from .pool import MOST_EVICTED, evict, is_worth_waking, waiting, with_room
from .rebuild import rebuild
from .table import IndexDamaged, Token, Words

Look: TypeAlias = Callable[[Words], bool]
P = ParamSpec("P")
S = TypeVar("S", bound="Side")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_NONE: Final = cast(Journal, None)
"""In the place of a session's journal where it has none: outside the steps that see to it."""
EVERY: Final = 1.0
"""Seconds between two rounds of housekeeping."""
MEMBERS: Final = W.MOST_WAITERS
"""How many to wake so that all are."""


def operation(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """An operation of one side: the descriptors stay open until it ends, whoever closes the session meanwhile.

    Raises SpoolClosed, and for an error of a system call StorageError or SpoolGone, which name the path.
    """

    @functools.wraps(method)
    def run(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        session = self.session
        if session.is_forked or is_finalizing():
            session.ready()
        users = session.users
        users.append(None)
        try:
            if not session.is_open:
                raise SpoolClosed(session.end)
            if session.dropped and not put_off(self.give_back):
                self.give_back()
            return method(self, *args, **kwargs)
        except (Empty, Full, ShutDown) as error:
            raise error.with_traceback(None) from error.__cause__  # how it was found out is nobody's concern
        except SpoolError as error:
            if isinstance(error, OSError) and error.strerror and error.filename is None:
                error.filename = session.path
            raise
        except OSError as error:
            if not fs.is_ordinary(error):
                raise
            explained = session.directories.explained(error)
            explained.seqs = getattr(error, "seqs", ())
            raise explained from error
        finally:
            users.pop()
            if not session.is_open:
                session.let_go()

    return cast(Callable[Concatenate[S, P], T], run)


class Session:
    """An open spool. Threads may share one.

    path: the spool's directory. asked: limits, None for what is there. create: make the spool where there is none.
    is_open: one entry until it is closed, or collected without that. users: one entry for each operation under way.
    leaving: one for each close under way; what a put in another thread has staged is removed meanwhile.
    journal: the index, inside a step. looked_at: HOUSEKEPT when it last made sure that nothing of it is missing.
    dropped: what was given out, and is held by nobody any more, though not settled.
    """

    directories: Directories
    token: Token
    lock: IndexLock
    journal: Journal
    doorbell: Doorbell
    _held: list[int]
    _end: weakref.finalize[..., Any]

    def __init__(
        self, path: str | os.PathLike[str], asked: Limits, role: liveness.Role, *, create: bool = True
    ) -> None:
        self.path = os.path.abspath(os.fsdecode(path))
        self.is_open = [None]
        self.is_forked = self._is_opening = False
        self.looked_at = 0
        self.users: list[None] = []
        self.leaving: list[None] = []
        self._crashed = set[int]()  # others, of whom it is known
        self.dropped: deque[Any] = deque()
        self.on_adopt: list[Callable[[], Callable[[Journal | None], None] | None]] = []
        self.end = f"{self.path}: this {role} was closed; open a new one"
        self._role, self._mode = role, asked.mode
        self._in_child = threading.RLock()
        self._hold([])
        self.journal = _NONE
        self.doorbell = Doorbell(self)
        _sessions.add(self)  # now, so that a fork meanwhile finds the descriptors
        self._open(asked, create)

    # Entering

    def _open(self, asked: Limits, create: bool) -> None:
        inherited = self._held
        try:
            place = open_directories(self.path, asked, create=create, as_found=self._role == "admin")
            self.directories = place
            self.token = liveness.new_token()
            self.token_bytes = self.token.to_bytes(8, "big")
            self._hold(place.descriptors())
            self.lock = IndexLock(place.items, self.path, functools.partial(holder, place))
            self.step(self._join, asked)
            _abandon(inherited, [])
        except BaseException as error:
            if self._held is not inherited:
                self.let_go()  # not only when this is collected
                self._hold(inherited)
                self.is_open[:] = [None]  # a forked child may try again
            if isinstance(error, OSError) and fs.is_of_file(error):
                raise fs.storage_error(error, self.path) from error
            raise

    def _hold(self, held: list[int]) -> None:
        """Close these descriptors when this is let go of, or collected."""
        self._held = held
        self._end = weakref.finalize(self, _abandon, held, self.is_open)
        self._end.atexit = False

    def _join(self, asked: Limits) -> tuple[None, int, int]:
        place, journal = self.directories, self.journal

        def announce() -> None:
            set_limits(journal.words, agree(place, asked))
            root, mode = place.root, place.file_mode
            with no_fork:  # a child that has the locked file unawares would hide our death
                self._held.append(liveness.announce(root, place.alive, self.token, self._role, mode))
            if self._role == "writer":
                fs.lock_shared(place.tmp)
                journal.words[W.WRITERS] = fs.monotonic_ns()

        return with_room(place, journal, announce), 0, 0

    # The locked step

    def step(self, work: Callable[[*Ts], tuple[T, int, int]], *args: *Ts) -> T:
        """Do `work` under the lock, with an index that is whole; returns the first of what it returns.

        work: returns its result, and how many of those who wait for items and for space to wake. It is begun again
        when it finds the index damaged, so it must not do one thing twice.
        Raises LockTimeout, SpoolGone, SpoolClosed, StorageError, OSError, and what `work` raises.
        """
        lock, thread = self.lock, get_ident()
        if thread in steps:
            raise reentered(self.path)
        steps[thread] = []  # before the mutex is taken, and until after: a signal may come between any two
        try:
            if thread in hurried:
                lock.wait_for_threads()
            with lock.mutex:
                if not self.is_open:
                    raise SpoolClosed(self.end)
                try:
                    if not fs.lock(lock.fd, blocking=False):
                        lock.take()
                    journal = self.journal
                    if journal is _NONE:
                        done = self._with_new_index(work, *args)
                    else:
                        try:
                            journal.check(self.token)
                            done = work(*args)
                        except IndexDamaged as damage:
                            self._rebuild(str(damage))
                            done = self._with_new_index(work, *args)
                    try:
                        fs.unlock(lock.fd)
                    except OSError:
                        lock.release()
                except BaseException:
                    lock.release()
                    raise
        finally:
            later = steps.pop(thread, None)  # a child forked within has forgotten it
            if later:
                catch_up(later)
        result, items, space = done
        if items or space:
            journal = self.journal
            if journal is not _NONE and journal.map[W.SINCES_BYTES] != W.NOBODY:
                self.wake(items, space)
        return result

    def _with_new_index(self, work: Callable[[*Ts], tuple[T, int, int]], *args: *Ts) -> tuple[T, int, int]:
        """Do the work with an index that was lost or damaged just now."""
        found = ""
        for _ in range(2):
            try:
                if self.journal is _NONE:
                    self._adopt(Journal(self.directories))
                self.journal.check(self.token)
                return work(*args)
            except IndexDamaged as damage:
                found = str(damage)
                self._rebuild(found)
        what = f"the index is damaged again as soon as it is built ({found})"
        raise StorageError(errno.EIO, what, self.path)

    def _rebuild(self, why: str) -> None:
        """Adopt the index that somebody else has built since, or build it."""
        damaged, self.journal = self.journal, _NONE
        try:
            if self.directories.restore():
                self.lock.take()  # it went with the directory
            journal = Journal(self.directories)
            if damaged is not _NONE and damaged.is_same_file(journal):
                raise IndexDamaged(why)
            journal.check(self.token)
        except IndexDamaged:
            journal = rebuild(self.directories, why)
        self._adopt(journal)  # the damaged one is closed when no other thread looks at it any more

    def _adopt(self, journal: Journal) -> None:
        self.journal = journal
        self.doorbell.forget_place()
        self._tell_of(journal)

    def _tell_of(self, journal: Journal | None) -> None:
        """Its sides learn that the table is another, or that there is none any more."""
        for side in self.on_adopt:
            if adopt := side():
                adopt(journal)

    def wake(self, items: int, space: int) -> None:
        """Wake so many of those who wait, after the step that made the items or the room."""
        if items:
            self.doorbell.ring("items", items)
            if items >= MEMBERS:
                self.doorbell.ring("end", items)
        journal = self.journal
        if space and journal is not _NONE and is_worth_waking(journal.words):
            self.doorbell.ring("space", space)

    def see_itself(self) -> tuple[None, int, int]:
        """Make sure that the spool, its parts and our own file are there, once after each round of housekeeping; the
        file is made again. A step. Raises SpoolGone; IndexDamaged for a part that is not there."""
        place, own = self.directories, self._held[-1]
        place.check()
        if not fs.fstat(own).st_nlink:
            with no_fork, contextlib.suppress(OSError):  # what somebody put in its place stays
                fs.unlink_missing_ok(place.alive, liveness.token_name(self.token))
                made = liveness.announce(place.root, place.alive, self.token, self._role, place.file_mode)
                fs.replace(made, own)
            self.doorbell.renew_watch()
        if self._role == "writer":
            fs.lock_shared(place.tmp)  # of one that was made again
        self.looked_at = self.journal.words[W.HOUSEKEPT]
        return None, 0, 0

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """In the block, the descriptors stay open, as in an operation."""
        self.users.append(None)
        try:
            yield
        finally:
            self.users.pop()
            if not self.is_open:
                self.let_go()

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """In the block, an error of a system call is raised as one that names the path."""
        try:
            yield
        except OSError as error:
            if not fs.is_of_file(error):
                raise
            raise self.directories.explained(error) from error

    # Looking without the lock

    def look(self, *, current: bool = False) -> Words:
        """The table's words, to be looked at without the lock: what they say is a hint.

        current: not those of an index that another process has built again since, as the next step would find.
        """
        journal = self.journal
        if journal is _NONE or not (journal.is_current() if current else journal.is_whole()):
            self.step(_nothing)
            journal = self.journal
        return journal.words

    def peek_words(self) -> Words | None:
        """As `look`, but None where there is nothing whole to look at."""
        journal = self.journal
        return journal.words if self.is_open and journal is not _NONE and journal.is_whole() else None

    # Waiting

    def take_place(self, kind: int) -> int:
        """A place among those who wait, -1 where there is none."""
        return self.step(self.place_of, kind)

    def place_of(self, kind: int) -> tuple[int, int, int]:
        """As `take_place`, within a step."""
        return take_place(self.journal.words, self.token, kind, self.directories.alive), 0, 0

    def wait(self, kind: Kind, until: Deadline, look: Look, each_second: Callable[[], None]) -> bool:
        """Wait until `look(words)` is true, or the step that follows must see something else (True), or the deadline
        is past (False).

        look: sees the words without the lock: a hint. each_second: keeps house; called at once, and whenever a second
        went by or a lease or delay has ended.
        """
        while True:
            each_second()
            seconds, glance = self.next_look(look)
            if until is not None:
                seconds = min(seconds, until - time.monotonic())
            if self.doorbell.wait(kind, glance, seconds):
                return True
            if until is not None and time.monotonic() >= until:
                return False

    def next_look(self, look: Look) -> tuple[float, Callable[[], bool]]:
        """In how many seconds who waits is to keep house again; and a look that also ends the wait for what the step
        that follows must see: damage, or an earlier lease."""
        now, due = fs.monotonic_ns(), self.look()[W.NEXT_DUE]
        seconds = min(EVERY, max(0, due - now) / 1e9) if due else EVERY
        until_ns = now + int(seconds * 1e9)

        def glance() -> bool:
            words = self.peek_words()  # of a session that another thread closed: None
            return words is None or look(words) or 0 < words[W.NEXT_DUE] < until_ns

        return seconds, glance

    # Leaving, and forks

    def ready(self) -> None:
        """Make this usable in a forked child. Raises SpoolClosed, also when the interpreter ends: a thread that has
        stopped for good may be within a step."""
        if not self.is_open or is_finalizing():
            raise SpoolClosed(self.end)
        if self.is_forked:
            with self._in_child:
                if self.is_forked and not self._is_opening:
                    self._is_opening = True
                    try:
                        self._open(Limits(mode=self._mode), create=False)
                        self.is_forked = False
                    finally:
                        self._is_opening = False

    def close(self, last: Callable[[], tuple[bool | None, int, int]]) -> None:
        """Leave, when the step that this thread is in has ended; harmless when repeated.

        last: a step that gives up some of what the session has; whether more is left. A spool that was deleted
        meanwhile is simply left. When the interpreter ends, the session does as by a crash."""
        if self.is_forked or is_finalizing():
            self.is_open.clear()
            self._end()
            return
        if put_off(self.close, last):
            return
        self.leaving.append(None)
        try:
            with contextlib.suppress(SpoolGone, SpoolClosed), self.explaining():
                while self.step(last) or self.step(self.evict_if_alone):
                    pass
                self.step(self._leave, last)
        finally:
            with self.lock.mutex:
                self.is_open.clear()
            self.doorbell.close()
            self.leaving.pop()
            self.let_go()
            _sessions.discard(self)
            self._tell_of(None)

    def let_go(self) -> None:
        """Close every descriptor, when nobody is in an operation or a close any more."""
        if self.users or self.leaving:
            return  # whoever is does it
        if self.journal is not _NONE:
            self.journal.close()
        _abandon(self._held, self.is_open)

    def _leave(self, last: Callable[[], tuple[bool | None, int, int]]) -> tuple[None, int, int]:
        left, items, space = last()
        while left or self.evict_if_alone()[0]:  # two who leave at once take each other for company
            left, more, room = last()
            items, space = items + more, space + room
        if self._role == "writer":
            self.journal.words[W.WRITERS] = fs.monotonic_ns()
            if liveness.leave_writers(self.directories.root, self.directories.tmp):
                items = MEMBERS  # it may be the end for them
        fs.yield_core()  # the barrier between what was made visible and who waits, as leaving the step is one
        self.wake(items, space)
        self.is_open.clear()  # no other thread takes on more: without our file, nobody would find it
        fs.unlock(self.directories.root)  # now: other threads may be in calls for longer
        if not self.users:  # else another thread may look at an item, and is alive until it is done
            self.directories.retire(liveness.token_name(self.token))  # now: the next knows to be the last
        return None, 0, 0

    def evict_if_alone(self) -> tuple[bool, int, int]:
        """Evict some pooled files, where no other session is there that would write them; whether to go on. A step."""
        try:
            alone = liveness.seems_alone(self.directories.alive, self.token, self._crashed)
        except OSError:  # no descriptor is left, say: that keeps nobody from leaving
            alone = False
        evicted = evict(self.directories, self.journal, 0, MOST_EVICTED) if alone else 0
        return alone is None or evicted > 0, 0, 0

    def forked(self) -> None:
        """In a forked child: close what was inherited, so that the parent's death is not hidden by it."""
        kept = {self.directories.tmp} if self._role == "writer" and self.is_open and self._held else set()
        for fd in {*self._held} - kept:
            with contextlib.suppress(OSError):
                fs.close(fd)
        self._held[:] = kept  # it counts as a writer from now on
        if self.journal is not _NONE:
            self.journal.close()
            self.journal = _NONE
        self._in_child = threading.RLock()
        self._is_opening = False
        # What another thread of the parent does, nobody does here.
        self.users, self.leaving, self.dropped = [], [], deque()
        self.is_forked = True
        self.doorbell.reset()
        self._tell_of(None)


def _nothing() -> tuple[None, int, int]:
    """A step that only makes sure of the index."""
    return None, 0, 0


def _abandon(held: list[int], is_open: list[None]) -> None:
    """End a session by its descriptors alone: one that did not leave has crashed, as its file in `alive/` says.

    Runs before anything of the garbage that a session is found in, such as a generator that would close it. When the
    interpreter ends `_end` does nothing, and the kernel lets go of the lock when no thread works under it any more.
    """
    is_open.clear()
    while held:  # a fork meanwhile closes what is left
        with contextlib.suppress(OSError):
            fs.close(held.pop())


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


os.register_at_fork(after_in_child=lambda: deque(map(Session.forked, list(_sessions)), 0))


class Side:
    """What the two sides of the engine have in common."""

    session: Session
    is_remote = False
    briefly = staticmethod(briefly)

    def give_back(self) -> None:
        """Requeue what was dropped unsettled."""

    @property
    def path(self) -> str:
        """The spool's directory, absolute."""
        return self.session.path

    @operation
    def identity(self) -> object:
        """What tells the spool from all others, by whatever path."""
        return fs.fstat(self.session.directories.root)[1:3]  # inode and device

    @property
    @operation
    def maxsize(self) -> int:
        """Most items waiting, 0 for no limit."""
        return self.session.look(current=True)[W.MAXSIZE]

    @operation
    def qsize(self) -> int:
        """How many items wait, delayed ones included."""
        return waiting(self.session.look(current=True))
