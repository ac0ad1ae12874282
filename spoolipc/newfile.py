"""Writing an item's file for the first time, in `tmp/`."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from . import footer, npy
from .engine import Array
from .errors import Full, StorageError
from .index import unlink_missing_ok
from .maps import is_shortage, map_to_write
from .party import Party

T = TypeVar("T")
SMALL = 16384
"""Bytes up to which one `write` beats `np.save`."""


def write_new(
    party: Party,
    name: str,
    arrays: Sequence[Array],
    image: npy.Image,
    tail: bytes,
    *,
    seal: Callable[[mmap.mmap], bytes] | None,
    sync: bool,
) -> None:
    """Write the file `name` in `tmp/`: the blocks of `image`, then `tail`; with `sync`, to the device.

    seal: gives the final footer from the blocks as they were written; it replaces the one in `tail`.

    Raises Full when the file system or a quota is full, StorageError for any other failure; the file is
    then removed.
    """

    def fill(fd: int) -> None:
        if image.end + len(tail) <= SMALL:
            _write_all(fd, npy.to_bytes(image, arrays) + tail)
        else:
            _save(fd, arrays, image, tail)
        if seal is not None:
            with mmap.mmap(fd, image.end, access=mmap.ACCESS_READ) as written:
                os.pwrite(fd, seal(written)[: footer.SIZE], image.end)
        if sync:
            os.fsync(fd)

    _make(party, name, image.end + len(tail), fill)


def map_new(party: Party, name: str, size: int) -> tuple[mmap.mmap, os.stat_result]:
    """Make the file `name` of `size` bytes in `tmp/` and map it for writing. Errors as for `write_new`.

    Its blocks are allocated first: a store to a hole of a full file system would kill the process.
    """

    def fill(fd: int) -> tuple[mmap.mmap, os.stat_result]:
        os.posix_fallocate(fd, 0, size)
        return map_to_write(fd, size), os.fstat(fd)

    return _make(party, name, size, fill)


def sync_new(party: Party, name: str) -> None:
    """Write what is in the file `name` of `tmp/` to the device."""
    fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=party.layout.tmp)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make(party: Party, name: str, size: int, fill: Callable[[int], T]) -> T:
    layout = party.layout
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, layout.file_mode, dir_fd=layout.tmp)
        try:
            if layout.file_mode != 0o600:
                os.fchmod(fd, layout.file_mode)
            return fill(fd)
        except BaseException:
            unlink_missing_ok(layout.tmp, name)
            raise
        finally:
            os.close(fd)
    except OSError as error:
        if is_shortage(error):
            raise Full(f"the file system of {party.path} is full: {size} bytes do not fit now") from error
        layout.check_present()
        where = str(layout.path / "tmp" / name)
        raise StorageError(error.errno, error.strerror or str(error), where) from error


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _save(fd: int, arrays: Sequence[Array], image: npy.Image, tail: bytes) -> None:
    with open(fd, "wb", closefd=False) as file:
        npy.write_first(file, arrays, image)
        file.write(tail)
