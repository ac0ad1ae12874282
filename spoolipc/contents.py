"""What an item says of itself, read from its footer without a map of its arrays."""

from __future__ import annotations

import errno
import mmap
import os

from . import footer, npy
from .engine import Contents
from .errors import BadItem
from .maps import OPEN_FILE, check_regular


class _Window:
    """A file's bytes by slices, each read with one `pread`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __getitem__(self, where: slice) -> bytes:
        return os.pread(self._fd, where.stop - where.start, where.start)


def read_contents(directory: int, name: str, end: int) -> Contents:
    """The names and metadata of the item file `name`.

    end: where its footer begins, in bytes; 0 when not known, and then the headers before it are read as well.
    Raises BadItem, FileNotFoundError, OSError.
    """
    try:
        fd = os.open(name, os.O_RDONLY | OPEN_FILE, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise BadItem("not a regular file") from None
        raise
    try:
        status = os.fstat(fd)
        check_regular(status)
        if end:
            tail = footer.read(_Window(fd), end, status.st_size)
        elif status.st_size:
            with mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ) as buffer:
                _, tail = npy.parse(buffer, status.st_size)
        else:
            _, tail = npy.parse(b"", 0)
        return Contents(tail.names, tail.meta, tail.put_time)
    finally:
        os.close(fd)
