"""The index: the mapped table, and how one transition is made without ever tearing it.

    1. the transition's stores go into the journal, in the header
    2. MARK names its kind, SUBJECT its file
    3. the file is renamed or unlinked
    4. the stores are made
    5. MARK is cleared

A process can end, or be interrupted, between any two of these. The next holder of the lock sees MARK and asks the
directory whether step 3 happened: if so it makes the stores (again), else it forgets them. The index holds no truth
that the directories do not: it is never synced, and one that is lost, damaged or of an earlier boot is built again
from a listing of `items/` (`rebuild.py`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import struct
import weakref
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Final

from ..errors import SpoolError, StorageError, UnknownVersion, UnsafeSpool
from ..message import Limits
from . import fs
from . import table as W
from .layout import Directories, agree, item_name, read_shutdown, write_shutdown
from .liveness import is_alone, process_of, token_name
from .table import IndexDamaged, Words, known, record_in, violations
from .transitions import (
    ARRIVE,
    CLEAN,
    DONATE,
    FOLLOW,
    LEAVE,
    UNLINK,
    Stores,
    Transition,
    limit_stores,
    make,
    store,
)

NAME: Final = "index"
NEW: Final = "index.new"
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
FIRST_RECORDS: Final = 240
_JOURNAL_AT: Final = W.SUBJECT * W.WORD  # then STORES, then the stores
VERIFY: Final = os.environ.get("SPOOLIPC_VERIFY") == "1"
"""Check the whole table after every commit: for tests."""
_ROWS: Final = tuple(struct.Struct(f"={count + 2}Q") for count in range(2 * W.JOURNAL_ROOM + 1))
"""SUBJECT, STORES, and so many words of stores."""
_MOST_VERIFIED: Final = 512  # records, so that a long backlog is not checked in quadratic time


@functools.cache
def boot_words() -> tuple[int, int]:
    """The identity of the running boot, as two words; zeros where it is not told. A container may have its own."""
    try:
        number = int(fs.read_text(BOOT_ID).strip().replace("-", ""), 16)
    except (OSError, ValueError):
        return 0, 0
    return number >> 64, number & W.ALL_BITS


def is_of_this_boot(directories: Directories, words: Words) -> bool:
    """Whether a table is of the running boot; the caller holds the lock.

    One of another boot id is, where anybody has the spool open: in a container with a boot id of its own, or none. Who
    opens a spool sees to its index before it can be seen to live.
    """
    boot = words[W.BOOT], words[W.BOOT + 1]
    return (any(boot) and boot == boot_words()) or not is_alone(directories.alive, 0)


class Journal:
    """One mapping of the index file. All but reading single words needs the index lock.

    identity: stands for this mapping where something must not keep it alive. close: closes its descriptor, when nobody
    looks any more; the mapping goes with the last array of words.
    """

    def __init__(self, directories: Directories, name: str = NAME, *, writable: bool = True) -> None:
        """Map the index. Raises IndexDamaged, UnknownVersion, UnsafeSpool."""
        self._writable = writable
        self._directories = directories
        self._known = False  # seen to belong to this spool
        self._guard = b""  # the first words as they are in a whole index with no transition under way
        self.identity = object()
        try:
            self._fd = fs.open_own(
                directories.root, name, os.O_RDWR if writable else os.O_RDONLY, linked=True
            )
        except FileNotFoundError:
            raise IndexDamaged("the index is missing") from None
        end = weakref.finalize(self, fs.close, self._fd)
        end.atexit = False  # threads may be within a step
        self.close: Callable[[], object] = end
        try:
            self._map(name)
        except BaseException:
            self.close()
            raise

    def _map(self, name: str) -> None:
        status = fs.fstat(self._fd)
        if status.st_size < W.HEADER * W.WORD:
            raise IndexDamaged("the index is too short")
        self.size = status.st_size // W.WORD * W.WORD
        self._inode = status.st_ino
        self.map = fs.map_file(self._fd, self.size, writable=self._writable)
        self.words: Words = memoryview(self.map).cast("Q")
        if name == NEW:
            return
        words = self.words
        if words[W.MAGIC] != W.MAGIC_VALUE:
            raise IndexDamaged("the index does not begin with its magic number")
        if words[W.VERSION] != W.VERSION_VALUE:
            what = f"the index has version {words[W.VERSION]}, this release knows version {W.VERSION_VALUE}"
            raise UnknownVersion(errno.EINVAL, what, str(self._directories.path))

    def check_boot(self) -> None:
        """Raise IndexDamaged for an index of an earlier boot; the caller holds the lock."""
        if not is_of_this_boot(self._directories, self.words):
            raise IndexDamaged("the index is of an earlier boot")

    def is_whole(self) -> bool:
        """Whether the mapping can be looked at without the lock: false when its file was truncated or overwritten."""
        try:
            return fs.seek(self._fd, 0, os.SEEK_END) >= self.size and self.words[W.MAGIC] == W.MAGIC_VALUE
        except OSError:
            return False

    def is_current(self) -> bool:
        """Whether it is whole, and no other index was put in its place; dearer than `is_whole`."""
        try:
            status = fs.fstat(self._fd)
        except OSError:
            return False
        return status[3] == 1 and status[6] >= self.size and self.words[W.MAGIC] == W.MAGIC_VALUE

    def holds_what_it_says(self) -> bool:
        """Whether the file is as long as its capacity says."""
        return self.words[W.CAPACITY] * W.WORD <= self.size

    def is_same_file(self, other: Journal) -> bool:
        """Whether two mappings are of one file."""
        return self._inode == other._inode

    def check(self, token: int) -> None:
        """Begin a step of the session `token`: make sure that the mapping is still the spool's index, whole.

        A transition that its maker did not finish is finished or forgotten. The caller holds the lock.
        Raises IndexDamaged.
        """
        status = fs.fstat(self._fd)
        if status[3] != 1 or status[6] < self.size:
            raise IndexDamaged("the index was deleted, linked or truncated")
        if self.map[: W.GUARD] != self._guard:
            self._check(status[6])
        self.words[W.HOLDER] = token

    def _check(self, size: int) -> None:
        words = self.words
        if words[W.MAGIC] != W.MAGIC_VALUE or words[W.VERSION] != W.VERSION_VALUE:
            raise IndexDamaged("the index was overwritten")
        if not self._known:
            self.check_boot()
        if words[W.CAPACITY] * W.WORD > self.size:
            if words[W.CAPACITY] * W.WORD > size:
                raise IndexDamaged("the index is shorter than it says")
            self._map(NAME)
        if self.words[W.MARK]:
            self.recover()
        if not self._known:
            if fs.exists(self._directories.items, item_name(self.words[W.NEXT_SEQ])):
                raise IndexDamaged("the next item is there already: the index is another spool's")
            self._known = True
        self._guard = self.map[: W.GUARD]

    def commit(self, transition: Transition) -> None:
        """Make one transition; the caller holds the lock.

        Raises what the move raises, having made no store, and IndexDamaged, having moved nothing.
        """
        kind, subject, stores, move = transition
        words = self.words
        count, positions = len(stores), stores[::2]
        if max(positions) >= len(words):
            raise IndexDamaged("the index links to no record")
        try:
            _ROWS[count].pack_into(self.map, _JOURNAL_AT, subject, count >> 1, *stores)
        except struct.error:  # a sum of damaged words
            raise IndexDamaged("a number of the index is beyond 64 bits") from None
        words[W.MARK] = kind
        # A crash until here leaves stores that recovery forgets, as the file is where it was.
        if move is not None:
            source, name, target, new_name = move
            parts = self._directories.places
            try:
                if target:
                    fs.rename(name, new_name, src_dir_fd=parts[source], dst_dir_fd=parts[target])
                elif kind == UNLINK:
                    self._directories.remove(source, name)
                else:
                    fs.unlink_missing_ok(parts[source], name)
            except OSError as error:
                self.recover()
                if isinstance(error, FileNotFoundError):
                    self._directories.check()
                raise
        elif kind == FOLLOW:
            write_shutdown(self._directories.root, subject, self._directories.file_mode)
        # A crash from here on leaves stores that recovery makes again.
        any(map(store, repeat(words), positions, stores[1::2]))  # as `make`, without its call
        words[W.MARK] = CLEAN
        if VERIFY:
            self._verify(transition)

    def _verify(self, transition: Transition) -> None:
        if self.words[W.EDGE] > W.HEADER + _MOST_VERIFIED * W.RECORD:
            return
        found = violations(self.words)
        if found:
            raise AssertionError(f"{transition} left the table with {found}")

    def recover(self) -> None:
        """Finish or forget the transition whose maker ended in it, from what the directory says."""
        words = self.words
        kind, subject = words[W.MARK], words[W.SUBJECT]
        if words[W.STORES] > W.JOURNAL_ROOM or kind > FOLLOW:
            raise IndexDamaged("the journal is damaged")
        if kind == FOLLOW:
            follow(words, self._directories)
        elif kind != CLEAN:
            stores = journalled(words)
            if max(stores[::2], default=0) >= words[W.CAPACITY]:
                raise IndexDamaged("the journal is damaged")
            if happened(self._directories, kind, subject, finish=True):
                make(words, stores)
        words[W.MARK] = CLEAN

    def unused_record(self) -> int:
        """Position of a record that stands for nothing, growing the file where none is left.

        The transition takes it. Raises StorageError when the file system is full.
        """
        words = self.words
        if words[W.UNUSED]:
            return record_in(words, words[W.UNUSED], W.NOTHING)
        if words[W.EDGE] + W.RECORD > words[W.CAPACITY]:
            self._grow()
        return known(self.words, self.words[W.EDGE])

    def _grow(self) -> None:
        """Double the file. A crash leaves a longer file and an unchanged capacity."""
        records = (self.words[W.CAPACITY] - W.HEADER) // W.RECORD * 2
        capacity = W.HEADER + records * W.RECORD
        try:
            fs.allocate(self._fd, 0, capacity * W.WORD)
        except OSError as error:
            where = str(self._directories.path / NAME)
            raise StorageError(
                error.errno, f"the index cannot grow: {fs.with_remedy(error)}", where
            ) from error
        self._map(NAME)
        self.words[W.CAPACITY] = capacity
        self._guard = b""


def follow(words: Words, directories: Directories) -> None:
    """Let the table say what the shutdown marker and spool.json do; something planted in their places says nothing."""
    with contextlib.suppress(UnsafeSpool):
        words[W.SHUTDOWN] = read_shutdown(directories.root)
    with contextlib.suppress(SpoolError):
        set_limits(words, agree(directories, Limits()))


def set_limits(words: Words, limits: Limits) -> None:
    """Tell the table the limits in force; the caller holds the lock."""
    make(words, limit_stores(limits))


def journalled(words: Words) -> Stores:
    """The stores of the transition under way."""
    return words[W.JOURNAL : W.JOURNAL + 2 * min(words[W.STORES], W.JOURNAL_ROOM)].tolist()


def happened(directories: Directories, kind: int, subject: int, *, finish: bool) -> bool:
    """Whether a transition under way took place. finish: remove what one of UNLINK was about to."""
    name = item_name(subject)
    if kind == ARRIVE:
        return fs.exists(directories.items, name)
    if kind == LEAVE:
        return not fs.exists(directories.items, name)
    if kind == DONATE:
        return fs.exists(directories.free, name)
    if finish and kind == UNLINK:
        directories.remove("free", name)
    return True


def holder(directories: Directories) -> str:
    """The last to take the lock, for messages. Needs no mapping and no lock."""
    try:
        with fs.Closing(fs.open_own(directories.root, NAME, os.O_RDONLY)) as fd:
            token = int.from_bytes(fs.pread(fd, W.WORD, W.HOLDER * W.WORD), "little")
    except OSError:
        return "an unknown process"
    return f"process {process_of(directories.alive, token)} (alive/{token_name(token)})"


def create(directories: Directories, records: int) -> Journal:
    """Make a new, empty index with room for `records`, not yet in place: `install` puts it there.

    Every block is allocated, so that no store can meet a full file system.
    """
    capacity = W.HEADER + max(records, FIRST_RECORDS) * W.RECORD
    with fs.Closing(fs.make_own(directories.root, NEW, directories.file_mode)) as fd:
        try:
            fs.allocate(fd, 0, capacity * W.WORD)
        except BaseException:
            fs.unlink_missing_ok(directories.root, NEW)
            raise
    journal = Journal(directories, NEW)
    journal._known = True
    words = journal.words
    words[W.VERSION] = W.VERSION_VALUE
    words[W.BOOT], words[W.BOOT + 1] = boot_words()
    words[W.CAPACITY] = capacity
    words[W.EDGE] = W.HEADER
    words[W.NEXT_SEQ] = words[W.FIRST_SEQ] = 1
    words[W.NEXT_SEQ_CHECK] = 1 ^ W.ALL_BITS
    return journal


def install(directories: Directories, journal: Journal) -> None:
    """Put a new index in the place of the old: the magic number, then the rename that makes it the spool's."""
    _retire(directories)
    journal.words[W.MAGIC] = W.MAGIC_VALUE
    fs.rename(NEW, NAME, src_dir_fd=directories.root, dst_dir_fd=directories.root)


def _retire(directories: Directories) -> None:
    """Take the magic number from an old index that a backup by hard links has too: who maps it would not see by its
    count of links that it is the spool's no more."""
    with (
        contextlib.suppress(OSError),  # missing, or something planted, which nobody maps
        fs.Closing(fs.open_own(directories.root, NAME, os.O_RDWR, linked=True)) as fd,
    ):
        at = W.MAGIC * W.WORD
        magic = int.from_bytes(fs.pread(fd, W.WORD, at), "little")
        if fs.fstat(fd).st_nlink > 1 and magic == W.MAGIC_VALUE:
            fs.pwrite(fd, bytes(W.WORD), at)
