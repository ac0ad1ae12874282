"""An item's file as it is read: opened in one way, whoever asks.

What stands at an item's name is not trusted: no link is followed, only a regular file is read, and nothing beyond the
size it had when it was opened.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from types import TracebackType
from typing import Final, Self

from ..errors import BadItem
from ..format import footer
from ..format.footer import Footer
from ..format.header import Block
from ..format.item import parse, verify
from ..message import Contents
from . import fs

_LOST: Final = (errno.EIO, errno.ENODATA, errno.EUCLEAN, errno.EBADMSG)
"""Of a file that the device has lost, or the file system finds damaged."""


def check_regular(status: os.stat_result) -> None:
    """Raise BadItem unless `status` is that of a regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise BadItem(f"not a regular file ({stat.filemode(status.st_mode)})")


def unreadable(error: OSError) -> BadItem | OSError:
    """The error to raise for one of reading an item: a BadItem, unless it may be of something else than its file."""
    return BadItem(f"cannot be read: {error.strerror}") if error.errno in _LOST else error


def check_readable(status: os.stat_result) -> None:
    """Raise BadItem for a file that is closed to this user by its owner or mode."""
    if status.st_uid != fs.user() or not status.st_mode & stat.S_IRUSR:
        mode = stat.S_IMODE(status.st_mode)
        raise BadItem(f"closed to user {fs.user()}: it belongs to user {status.st_uid} and has mode {mode:o}")


class ItemFile:
    """One open item file; a context manager. status: as it was when opened.

    Raises BadItem for what is no regular file, FileNotFoundError, OSError.
    """

    def __init__(self, directory: int, name: str, *, writable: bool = False) -> None:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | fs.CAREFUL
        try:
            self.fd = fs.open_at(name, flags, dir_fd=directory)
        except OSError as error:
            if error.errno in fs.NO_FILE:
                raise BadItem("not a regular file") from None
            if error.errno == errno.EACCES:
                check_readable(fs.stat_at(name, dir_fd=directory))
            if writable:
                raise
            raise unreadable(error) from None
        try:
            self.status = fs.fstat(self.fd)
            check_regular(self.status)
        except BaseException:
            fs.close(self.fd)
            raise
        self.size = self.status.st_size

    def is_the_one(self, status: os.stat_result) -> bool:
        """Whether this is the very file of `status`, of the same size."""
        return self.status[1:3] == status[1:3] and self.size == status.st_size

    def map(self, *, writable: bool = False, private: bool = False) -> mmap.mmap:
        """A mapping of the whole file, which outlives this. private: writes to it are nobody else's.

        One to be written has its pages entered into the page table in one call: one write fault for each would make
        the first copy into 54 MB take 19 ms instead of 8 (tmpfs, Linux 6.18).
        """
        if private:
            return fs.map_file(self.fd, self.size, private=True)
        return fs.map_file(self.fd, self.size, writable=writable, populate=writable)

    def read(self, size: int) -> bytes:
        """The first `size` bytes. Raises BadItem when there are fewer."""
        try:
            data = fs.read(self.fd, size)
        except OSError as error:
            raise unreadable(error) from None
        if len(data) != size:
            raise BadItem(f"only {len(data)} of {size} bytes could be read")
        return data

    def write(self, data: bytes) -> None:
        """Write the first bytes in place. Raises OSError unless all could be written."""
        if fs.pwrite(self.fd, data, 0) != len(data):
            raise OSError(errno.EIO, "only a part could be written")

    def parse(self, *, whole: bool = False) -> tuple[tuple[Block, ...], Footer]:
        """The blocks and the footer; with `whole`, the bytes compared with the checksum if there is one.

        Raises BadItem, UnknownVersion.
        """
        if not self.size:
            raise BadItem("the file is empty")
        with self.map() as buffer:
            blocks, tail = parse(buffer, self.size)
            if whole:
                verify(buffer, tail)
        return blocks, tail

    def contents(self, data_end: int) -> Contents:
        """What the footer says, read without the arrays.

        data_end: where it begins, in bytes; 0 when not known, and then the headers before it are read as well. Raises
        BadItem, UnknownVersion.
        """
        tail = footer.read(self, data_end, self.size) if data_end else self.parse()[1]
        return Contents(tail.names, tail.meta, tail.put_time, tail.id)

    def __getitem__(self, where: slice) -> bytes:
        """The bytes of a slice, read with one call."""
        try:
            return fs.pread(self.fd, where.stop - where.start, where.start)
        except OSError as error:
            raise unreadable(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fs.close(self.fd)
