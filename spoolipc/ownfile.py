"""Opening the small files of the spool's own: its lock, its limits, its index, its histories.

What stands at their names is not trusted. No link is followed, no device or FIFO opened for good, no file
that has another name written to; and a file made here has exactly the permissions asked for, whatever the
umask.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from .errors import UnsafeSpool

_CAREFULLY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_FILE = (errno.ELOOP, errno.ENXIO, errno.EISDIR)


def open_own(directory: int, name: str, flags: int, mode: int = 0o600) -> int:
    """Open a file of the spool's own; with O_CREAT in `flags`, make it where there is none.

    mode: permission bits of the file. Raises UnsafeSpool for anything but a regular file with no other name,
    FileNotFoundError, OSError.
    """
    try:
        fd = os.open(name, flags | _CAREFULLY, mode, dir_fd=directory)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise _planted(directory, name) from None
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise _planted(directory, name)
        if flags & os.O_CREAT and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != mode:
            os.fchmod(fd, mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_own(directory: int, name: str, mode: int = 0o600) -> int:
    """Make a file of the spool's own anew, in the place of one that a crash left. Open for reading and writing."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
    return open_own(directory, name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)


def _planted(directory: int, name: str) -> UnsafeSpool:
    try:
        place = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name)
    except OSError:
        place = name
    return UnsafeSpool(errno.EPERM, "is not a file of its own; this spool was tampered with", place)
