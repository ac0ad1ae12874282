"""Writing an item's file for the first time, in `tmp/`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from . import npy
from .engine import Array
from .errors import Full, StorageError
from .index import unlink_missing_ok
from .maps import is_shortage
from .party import Party

SMALL = 16384
"""Bytes up to which one `write` beats `np.save`."""


def write_new(
    party: Party, name: str, arrays: Sequence[Array], image: npy.Image, tail: bytes, *, sync: bool
) -> None:
    """Write the file `name` in `tmp/`: the blocks of `image`, then `tail`; with `sync`, to the device.

    Raises Full when the file system or a quota is full, StorageError for any other failure; the file is
    then removed.
    """
    layout = party.layout
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, layout.file_mode, dir_fd=layout.tmp)
        try:
            if layout.file_mode != 0o600:
                os.fchmod(fd, layout.file_mode)
            if image.end + len(tail) <= SMALL:
                _write_all(fd, npy.to_bytes(image, arrays) + tail)
            else:
                _save(fd, arrays, image, tail)
            if sync:
                os.fsync(fd)
        except BaseException:
            unlink_missing_ok(layout.tmp, name)
            raise
        finally:
            os.close(fd)
    except OSError as error:
        size = image.end + len(tail)
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
