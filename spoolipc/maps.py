"""Kept mappings: a file that comes back is already mapped, its pages already faulted in.

A mapping is kept under its file's birth number, which no other file ever has, and used again only when the
file at hand is the same one (device and inode) and not shorter. Bounded in number, as each mapping holds a
descriptor, and in bytes.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from dataclasses import dataclass

from . import words as W
from .errors import BadItem

_MOST = 128
_MOST_SEEN = 1024
MOST_MAPPED = 1 << 33
"""Bytes of mappings that a party keeps at most."""
OPEN_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapped file: `buffer` is its bytes. identity: its inode and device."""

    buffer: mmap.mmap
    identity: tuple[int, int]
    size: int
    record: int


class Maps:
    """The kept mappings of one party, all writable or all read-only."""

    def __init__(self, *, writable: bool, most_bytes: int) -> None:
        self._flags = (os.O_RDWR if writable else os.O_RDONLY) | OPEN_FILE
        self._writable = writable
        self._most_bytes = most_bytes
        self._kept: dict[int, Mapping] = {}
        self._bytes = 0
        self.swept = 0
        self._seen: set[int] = set()
        self._mutex = threading.Lock()

    def wanted(self, birth: int) -> bool:
        """Whether a small file is better mapped than read or written: when it is mapped, or comes back while there
        is room. One that is seen once, as in a long backlog, is not worth a map."""
        if birth in self._kept:
            return True
        if birth in self._seen:
            return len(self._kept) < _MOST
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        self._seen.add(birth)
        return False

    def of(self, directory: int, name: str, status: os.stat_result, birth: int, record: int) -> mmap.mmap:
        """The mapping of the file that `status` was just read from.

        Raises BadItem when another file stands at the name now, OSError when it cannot be opened.
        """
        kept = self._kept.get(birth)
        if kept is not None:
            if kept.identity == status[1:3] and kept.size == status.st_size:
                return kept.buffer
            self.forget(birth)
        fd = os.open(name, self._flags, dir_fd=directory)
        try:
            now = os.fstat(fd)
            if (now.st_ino, now.st_dev, now.st_size) != (status.st_ino, status.st_dev, status.st_size):
                raise BadItem("the file was replaced while it was opened")
            size = status.st_size
            buffer = (
                map_to_write(fd, size) if self._writable else mmap.mmap(fd, size, access=mmap.ACCESS_READ)
            )
        finally:
            os.close(fd)
        self.keep(buffer, status, birth, record)
        return buffer

    def keep(self, buffer: mmap.mmap, status: os.stat_result, birth: int, record: int) -> None:
        """Keep the mapping of a file for the next time it is seen."""
        if status.st_size > self._most_bytes:
            return
        mapping = Mapping(buffer, (status.st_ino, status.st_dev), status.st_size, record)
        with self._mutex:
            self._kept[birth] = mapping
            self._bytes += mapping.size
            while len(self._kept) > _MOST or self._bytes > self._most_bytes:
                oldest = next(iter(self._kept))
                self._bytes -= self._kept.pop(oldest).size

    def kept(self, birth: int) -> Mapping | None:
        """The mapping of a file, if it is kept."""
        return self._kept.get(birth)

    def forget(self, birth: int) -> None:
        """Let go of a mapping; views of it keep their pages."""
        with self._mutex:
            gone = self._kept.pop(birth, None)
            if gone is not None:
                self._bytes -= gone.size

    def are_due(self, words: memoryview[int]) -> bool:
        """Whether `sweep` has something to look at."""
        return bool(self._kept) and words[W.TENDED] != self.swept

    def sweep(self, words: memoryview[int]) -> None:
        """Let go of the mappings of files that are no more, once after each tending; the caller holds the index lock.

        A file that was unlinked would otherwise keep its memory for as long as it is mapped here.
        """
        if words[W.TENDED] == self.swept:
            return
        self.swept = words[W.TENDED]
        for birth, mapping in list(self._kept.items()):
            if words[mapping.record + W.BIRTH] != birth:
                self.forget(birth)

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, birth: object) -> bool:
        return birth in self._kept


def map_to_write(fd: int, size: int) -> mmap.mmap:
    """Map a file whose blocks are all there, to be written whole.

    Its pages are entered into the page table in one call. One write fault for each would make the first copy
    into 54 MB take 19 ms instead of 8 (tmpfs, Linux 6.18).
    """
    return mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def read_small(directory: int, name: str, size: int) -> bytes:
    """The `size` bytes of a small file. Raises BadItem when it has fewer now, OSError."""
    fd = os.open(name, os.O_RDONLY | OPEN_FILE, dir_fd=directory)
    try:
        data = os.read(fd, size)
    finally:
        os.close(fd)
    if len(data) != size:
        raise BadItem(f"only {len(data)} of {size} bytes could be read")
    return data


def write_small(directory: int, name: str, data: bytes) -> int:
    """Write a small file's first bytes in place; returns how many. Raises OSError."""
    fd = os.open(name, os.O_WRONLY | OPEN_FILE, dir_fd=directory)
    try:
        done = os.pwrite(fd, data, 0)
    finally:
        os.close(fd)
    if done != len(data):
        raise OSError(errno.EIO, f"only {done} of {len(data)} bytes could be written", name)
    return done


def check_regular(status: os.stat_result) -> None:
    """Raise BadItem unless `status` is that of a regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise BadItem(f"not a regular file ({stat.filemode(status.st_mode)})")


def is_shortage(error: OSError) -> bool:
    """Whether an error says that the file system or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
