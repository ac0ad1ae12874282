"""The index: a file of 64-bit words mapped by every party, and how it is changed without ever being torn.

A change is a set of stores, and at most one system call on a file that goes with it. It is written to a
journal in the header first, then MARK names its kind, then the file is moved, then the stores are made, then
MARK is cleared. A process can die between any two of these steps; the next holder of the lock sees MARK and
asks
the directory whether the file was moved: if so it makes the stores, else it forgets them.

The index holds no truth that the directories do not: it is never synced, and one that is lost, torn or of an
earlier boot is built again from a listing of `items/` (`rebuild.py`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import stat
import struct
import weakref
from collections.abc import Callable
from pathlib import Path

from . import words as W
from .errors import StorageError, UnknownVersion, UnsafeSpool
from .layout import Layout, item_name
from .marker import read_shutdown
from .ownfile import make_own, open_own

NAME = "index"
FIRST_RECORDS = 240
_GUARD = (W.MARK + 1) * W.WORD
_FLAGS = slice(W.ITEM_FLAGS * W.WORD, (W.SPACE_FLAGS + 8) * W.WORD)
_IMAGE = slice(W.FLOW_IMAGE, W.JOURNAL)
_IMAGE_AT = W.FLOW_IMAGE * W.WORD
_NO_FLAGS = bytes(16 * W.WORD)
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@functools.cache
def _row(count: int) -> struct.Struct:
    """So many words in a row."""
    return struct.Struct(f"={count}Q")


class Torn(Exception):
    """The index is missing, damaged or of another boot: it must be built again."""


@functools.cache
def boot_words() -> tuple[int, int]:
    """The identity of the running boot, as two words."""
    number = int(BOOT_ID.read_text().strip().replace("-", ""), 16)
    return number >> 64, number & (2**64 - 1)


class Index:
    """One mapping of the index file. All but reading single words needs the index lock."""

    _known = False  # seen to belong to this spool
    _guard = b""  # the first words as they are in a whole index with no change under way

    def __init__(self, layout: Layout) -> None:
        """Map the index of `layout`. Raises Torn, UnknownVersion, UnsafeSpool."""
        self._layout = layout
        try:
            self.fd = os.open(
                NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=layout.root
            )
        except FileNotFoundError:
            raise Torn("the index is missing") from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise UnsafeSpool(errno.EPERM, "index is not a regular file", str(layout.path)) from None
            raise
        self._finalizer = weakref.finalize(self, os.close, self.fd)
        try:
            self._map()
        except BaseException:
            self.close()
            raise

    def _map(self) -> None:
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise UnsafeSpool(errno.EPERM, "index is not a file of its own", str(self._layout.path))
        if status.st_size < W.HEADER * W.WORD:
            raise Torn("the index is too short")
        self.size = status.st_size // W.WORD * W.WORD
        self.map = mmap.mmap(self.fd, self.size)
        words = memoryview(self.map).cast("Q")
        if words[W.MAGIC] != W.MAGIC_VALUE:
            raise Torn("the index does not begin with its magic number")
        if words[W.VERSION] != W.VERSION_VALUE:
            raise UnknownVersion(
                errno.EINVAL,
                f"the index has version {words[W.VERSION]}, this release knows version {W.VERSION_VALUE}",
                str(self._layout.path),
            )
        if (words[W.BOOT], words[W.BOOT + 1]) != boot_words():
            raise Torn("the index is of an earlier boot")
        self.words = words

    def whole(self) -> bool:
        """Whether the mapped file can be looked at without the lock: false when it was truncated or overwritten."""
        try:
            return self.map.size() >= self.size and self.words[W.MAGIC] == W.MAGIC_VALUE
        except OSError:
            return False

    def check(self) -> None:
        """Make sure that the mapped file is still the spool's index, whole; the caller holds the lock.

        A change that its maker did not finish is finished or undone. Raises Torn.
        """
        status = os.fstat(self.fd)
        if status.st_nlink == 1 and status.st_size >= self.size and self.map[:_GUARD] == self._guard:
            return
        self._check(status)

    def is_sound(self, token: int) -> bool:
        """As `check` for the party `token`, but false where that would have to do more than look."""
        status = os.fstat(self.fd)
        if status[3] != 1 or status[6] < self.size or self.map[:_GUARD] != self._guard:
            return False
        self.words[W.HOLDER] = token
        return True

    def _check(self, status: os.stat_result) -> None:
        if status.st_nlink != 1 or status.st_size < self.size:
            raise Torn("the index was deleted or truncated")
        words = self.words
        if words[W.MAGIC] != W.MAGIC_VALUE or words[W.VERSION] != W.VERSION_VALUE:
            raise Torn("the index was overwritten")
        if words[W.CAPACITY] * W.WORD > self.size:
            if words[W.CAPACITY] * W.WORD > status.st_size:
                raise Torn("the index is shorter than it says")
            self._map()
        if words[W.MARK]:
            self.recover()
        if not self._known:
            if exists(self._layout.items, self.words[W.NEXT_SEQ]):
                raise Torn("the next item is there already: the index is another spool's")
            self._known = True
        self._guard = self.map[:_GUARD]

    def is_awaited(self) -> bool:
        """Whether anybody waits at a bell."""
        return self.map[_FLAGS] != _NO_FLAGS

    def change(
        self, kind: int, subject: int, stores: dict[int, int], move: Callable[[], None] | None = None
    ) -> None:
        """Make one change; the caller holds the lock.

        kind: how a successor tells whether it happened (`words`). subject: number of the file moved.
        stores: values by word position. move: the one system call that goes with it.
        Raises what `move` raises, having made no store, and Torn, having moved nothing.
        """
        words = self.words
        count = len(stores)
        if max(stores) >= len(words):
            raise Torn("the index links to no record")
        try:
            _row(2 * count).pack_into(self.map, W.JOURNAL * W.WORD, *stores, *stores.values())
        except struct.error:  # only sums of damaged words
            raise Torn("a number of the index is beyond 64 bits") from None
        words[W.STORES] = count
        words[W.SUBJECT] = subject
        words[W.MARK] = kind
        if move is not None:
            try:
                move()
            except OSError:
                self.recover()
                raise
        any(map(words.__setitem__, stores, stores.values()))  # a loop in C: each store is None
        words[W.MARK] = W.CLEAN

    def flow(
        self,
        kind: int,
        subject: int,
        flow: tuple[int, ...],
        positions: tuple[int, ...],
        values: tuple[int, ...],
        move: tuple[str, int, str, int] | None,
    ) -> None:
        """As `change`, written for speed: all words of FLOW, a few others, and a rename.

        flow: the words of FLOW. positions, values: the other stores. move: the name and the directory before and after.
        """
        words = self.words
        if max(positions) >= len(words):
            raise Torn("the index links to no record")
        try:
            _row(len(flow) + 2 * len(values)).pack_into(self.map, _IMAGE_AT, *flow, *positions, *values)
        except struct.error:  # only sums of damaged words
            raise Torn("a number of the index is beyond 64 bits") from None
        words[W.STORES] = len(values)
        words[W.SUBJECT] = subject
        words[W.MARK] = kind | W.FLOWING
        if move is not None:
            source, source_directory, target, target_directory = move
            try:
                os.rename(source, target, src_dir_fd=source_directory, dst_dir_fd=target_directory)
            except OSError:
                self.recover()
                raise
        words[W.FLOW_WORDS] = words[_IMAGE]
        any(map(words.__setitem__, positions, values))
        words[W.MARK] = W.CLEAN

    def recover(self) -> None:
        """Finish or undo the change whose maker died in it, from what the directory says."""
        words = self.words
        mark, subject = words[W.MARK], words[W.SUBJECT]
        kind = mark & ~W.FLOWING
        if words[W.STORES] > W.JOURNAL_ROOM or kind > W.FOLLOW:
            raise Torn("the journal is damaged")
        if kind == W.FOLLOW:
            with contextlib.suppress(UnsafeSpool):  # something planted in its place says nothing
                words[W.SHUTDOWN] = read_shutdown(self._layout)
        else:
            stores = journal(words)
            if any(position >= words[W.CAPACITY] for position in stores):
                raise Torn("the journal is damaged")
            if self._happened(kind, subject):
                for position, value in stores.items():
                    words[position] = value
        words[W.MARK] = W.CLEAN

    def _happened(self, kind: int, subject: int) -> bool:
        if kind == W.MEMORY:
            return True
        if kind == W.ARRIVE:
            return exists(self._layout.items, subject)
        if kind == W.LEAVE:
            return not exists(self._layout.items, subject)
        if kind == W.DONATE:
            return exists(self._layout.free, subject)
        unlink_missing_ok(self._layout.free, item_name(subject))
        return True

    def new_record(self) -> int:
        """Position of a record that stands for nothing, growing the file where none is left.

        The caller's change takes it, by the stores of `taken`. Raises StorageError when the file system is
        full.
        """
        words = self.words
        if words[W.UNUSED]:
            return self.record(words[W.UNUSED], W.NOTHING)
        edge = words[W.EDGE]
        if edge + W.RECORD > words[W.CAPACITY]:
            self._grow()
            words = self.words
        return self.known(edge)

    def taken(self, record: int) -> dict[int, int]:
        """The stores that take a record given by `new_record`."""
        words = self.words
        if words[W.UNUSED] == record:
            return {W.UNUSED: words[record + W.NEXT]}
        return {W.EDGE: record + W.RECORD}

    def _grow(self) -> None:
        """Double the file. A crash leaves a longer file and an unchanged capacity."""
        records = (self.words[W.CAPACITY] - W.HEADER) // W.RECORD * 2
        capacity = W.HEADER + records * W.RECORD
        try:
            os.posix_fallocate(self.fd, 0, capacity * W.WORD)
        except OSError as error:
            raise StorageError(error.errno, "the index cannot grow", str(self._layout.path / NAME)) from error
        self._map()
        self.words[W.CAPACITY] = capacity

    def known(self, record: int) -> int:
        """`record` if it can be the position of one. Raises Torn."""
        if not W.HEADER <= record < self.words[W.CAPACITY] or (record - W.HEADER) % W.RECORD:
            raise Torn("the index links to no record")
        return record

    def record(self, record: int, state: int) -> int:
        """`record` if it stands for a file in `state`. Raises Torn."""
        if self.words[self.known(record) + W.STATE] != state:
            raise Torn("a list of the index holds a record of another state")
        return record

    def close(self) -> None:
        """Close the descriptor; the mapping goes with the last that looks at it. Harmless when repeated."""
        self._finalizer()


def journal(words: memoryview[int]) -> dict[int, int]:
    """The stores of the change under way, by position."""
    count = min(words[W.STORES], W.JOURNAL_ROOM)
    positions = words[W.JOURNAL : W.JOURNAL + count].tolist()
    values = words[W.JOURNAL + count : W.JOURNAL + 2 * count].tolist()
    if words[W.MARK] & W.FLOWING:
        positions += range(W.FLOW_WORDS.start, W.FLOW_WORDS.stop)
        values += words[_IMAGE].tolist()
    return dict(zip(positions, values, strict=True))


def holder(layout: Layout) -> int:
    """The token of the last to take the lock, 0 where the index does not tell. Needs no mapping and no lock."""
    try:
        fd = open_own(layout.root, NAME, os.O_RDONLY)
    except OSError:
        return 0
    try:
        return int.from_bytes(os.pread(fd, W.WORD, W.HOLDER * W.WORD), "little")
    finally:
        os.close(fd)


def exists(directory: int, number: int) -> bool:
    """Whether the directory holds the file of that number."""
    try:
        os.stat(item_name(number), dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def unlink_missing_ok(directory: int, name: str) -> None:
    """Remove a name that a predecessor may have removed already. A directory is none of ours and stays."""
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        os.unlink(name, dir_fd=directory)


def create(layout: Layout, records: int) -> Index:
    """Make a new, empty index with room for `records`, not yet in place: `install` puts it there.

    Every block is allocated, so that no store can meet a full file system.
    """
    fd = make_own(layout.root, NAME + ".new", layout.file_mode)
    index = Index.__new__(Index)
    index._layout = layout
    index.fd = fd
    index._finalizer = weakref.finalize(index, os.close, fd)
    try:
        capacity = W.HEADER + max(records, FIRST_RECORDS) * W.RECORD
        index.size = capacity * W.WORD
        os.posix_fallocate(fd, 0, index.size)
        index.map = mmap.mmap(fd, index.size)
        index.words = memoryview(index.map).cast("Q")
    except BaseException:
        index.close()
        unlink_missing_ok(layout.root, NAME + ".new")
        raise
    words = index.words
    words[W.VERSION] = W.VERSION_VALUE
    words[W.BOOT], words[W.BOOT + 1] = boot_words()
    words[W.CAPACITY] = capacity
    words[W.EDGE] = W.HEADER
    words[W.NEXT_SEQ] = words[W.FIRST_SEQ] = 1
    words[W.NEXT_SEQ_CHECK] = 1 ^ 0xFFFF_FFFF_FFFF_FFFF
    for flag in range(8):
        words[W.ITEM_FLAGS + flag] = words[W.SPACE_FLAGS + flag] = 1
    return index


def install(layout: Layout, index: Index) -> None:
    """Put a new index in the place of the old: the magic number, then the rename that makes it the spool's."""
    index.words[W.MAGIC] = W.MAGIC_VALUE
    os.rename(NAME + ".new", NAME, src_dir_fd=layout.root, dst_dir_fd=layout.root)
