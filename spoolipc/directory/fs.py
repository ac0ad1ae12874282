"""The one door to the system: every system call of the engine is made through the names of this module.

The names in `CALLS` are the calls themselves; the functions below them are made of these. A test of the syntax trees
allows no other module of the package to make one, so whoever exchanges a name here (`tests/support/faults.py`: kill
before or after call N, fail it, interrupt it, let another session act, forget what was not synced) reaches all of
them. Descriptors are opened relative to the spool's directories, never follow a link and are never inherited.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import resource
import select
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from filelock import lock_descriptor, unlock_descriptor

from ..errors import SpoolError, StorageError, UnsafeSpool
from ..format.item import Layout, parts, savable
from ..message import Array
from .table import IndexDamaged

CALLS: Final = tuple(
    "open_at close stat_at fstat statvfs rename unlink mkdir rmdir replace chmod fchmod fchown read pread write pwrite"
    " truncate allocate sync list_names scan map_file seek save lock lock_shared unlock make_parents nearest"
    " nearest_with read_text poll sleep yield_core not_inherited watch_open watch_add".split()
)
"""The names that are system calls (`save` is one `np.save` and the writes that go with it)."""

CAREFUL: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Flags of every open: no link is followed, no FIFO waited for, nothing inherited."""
DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILES_LEFT: Final = 16
_MANY: Final = 1 << 62  # bytes or files, where a file system has no number of them
_AT_ONCE: Final = 1 << 20  # bytes of a read, which takes the memory for all that it is asked for
NO_FILE: Final = (errno.ELOOP, errno.ENXIO, errno.EISDIR)
_STATM: Final = Path("/proc/self/statm")
_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_TIMENS_OFFSETS: Final = Path("/proc/self/timens_offsets")
_libc: Final = ctypes.CDLL(None)

# The calls. Bare names where nothing is to be added: a function around each would cost a tenth of a put.
open_at = os.open
close = os.close
stat_at = os.lstat
fstat = os.fstat
statvfs = os.fstatvfs
rename = os.rename
unlink = os.unlink
mkdir = os.mkdir
chmod = os.chmod
rmdir = os.rmdir
fchmod = os.fchmod
fchown = os.fchown
read = os.read
pread = os.pread
write = os.write
pwrite = os.pwrite
truncate = os.ftruncate
allocate = os.posix_fallocate
sync = os.fsync
list_names = os.listdir
scan = os.scandir
seek = os.lseek  # to the end: the file's size, for a third of what fstat and its answer cost
lock = lock_descriptor  # `blocking=False`: false where somebody has it
unlock = unlock_descriptor
sleep = time.sleep
yield_core = os.sched_yield


give_way: Final[list[Callable[[], None]]] = []
"""Called when there is no room for a mapping, which is then tried once more: lets go of what is only kept for speed."""


def map_file(
    fd: int, size: int, *, writable: bool = False, populate: bool = False, private: bool = False
) -> mmap.mmap:
    """A mapping of the first `size` bytes of a file, which needs no descriptor from then on.

    populate: enter its pages into the page table at once. private: a page is copied when it is first written, and
    changes for nobody else. Raises OSError.
    """
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable or private else 0)
    flags = (mmap.MAP_PRIVATE if private else mmap.MAP_SHARED) | (mmap.MAP_POPULATE if populate else 0)
    try:
        return _map(fd, size, flags, prot)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        for let_go in give_way:
            let_go()
        return _map(fd, size, flags, prot)


if sys.version_info >= (3, 13):

    def _map(fd: int, size: int, flags: int, prot: int) -> mmap.mmap:
        return mmap.mmap(fd, size, flags, prot, trackfd=False)

else:
    # Before, a `mmap.mmap` of a file keeps a duplicate of its descriptor. One of no file does not: the file's pages are
    # mapped in the place of its own, and go with it as those would.
    _mmap = ctypes.CDLL(None, use_errno=True).mmap
    _mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    _mmap.restype = ctypes.c_void_p
    _MAP_FIXED: Final = 0x10
    _FAILED: Final = ctypes.c_void_p(-1).value

    def _map(fd: int, size: int, flags: int, prot: int) -> mmap.mmap:
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot)
        place = np.frombuffer(pages, np.uint8).ctypes.data
        if _mmap(place, size, prot, flags | _MAP_FIXED, fd, 0) == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return pages


def address_space_left() -> int | None:
    """Bytes that RLIMIT_AS leaves to this process; None where it sets no limit, 0 where it cannot be known."""
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return None
    try:
        return max(0, most - int(read_text(_STATM).split()[0]) * mmap.PAGESIZE)
    except OSError:
        return 0


def user() -> int:
    """The user that this thread opens, makes and removes files as."""
    return int(_libc.setfsuid(-1)) & 0xFFFFFFFF


@contextlib.contextmanager
def _acting(user: int, group: int) -> Iterator[None]:
    was = _libc.setfsuid(-1), _libc.setfsgid(group)
    _libc.setfsuid(user)
    try:
        yield
    finally:
        _libc.setfsuid(was[0])
        _libc.setfsgid(was[1])


@contextlib.contextmanager
def as_owner(path: str | os.PathLike[str]) -> Iterator[None]:
    """In the block, root acts as the owner of the spool at `path`, in this thread: what is made belongs to the owner,
    and the kernel lets nothing be touched that the owner may not touch. Nobody else becomes another."""
    try:
        status = stat_at(path)
    except OSError:  # whoever opens it says what is wrong
        status = None
    if status is None or user() or not status.st_uid:
        yield
        return
    with _acting(status.st_uid, status.st_gid):
        yield


def lock_shared(fd: int) -> bool:
    """Share the lock on a directory; false where somebody has it for himself."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    return False


def not_inherited(fd: int) -> int:
    """The descriptor, which a program started from here does not get."""
    os.set_inheritable(fd, False)
    return fd


def replace(new: int, old: int) -> None:
    """Let the number `old` mean what `new` means, which is closed."""
    os.dup2(new, old, inheritable=False)
    os.close(new)


def _clock() -> Callable[[], int]:
    """The monotonic clock that all processes of the machine share, in ns: a time namespace sets it off."""
    try:
        offsets = dict(line.split(None, 1) for line in read_text(_TIMENS_OFFSETS).splitlines())
        seconds, rest = map(int, offsets["monotonic"].split())
    except (OSError, ValueError, KeyError):
        return time.monotonic_ns
    offset = seconds * 10**9 + rest
    return (lambda: time.monotonic_ns() - offset) if offset else time.monotonic_ns


def make_parents(path: Path) -> None:
    """Make the directories that lead to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)


def read_text(path: Path) -> str:
    """A file of the kernel's (`/proc`), whole."""
    return path.read_text(errors="surrogateescape")


monotonic_ns: Final = _clock()


def nearest_with(path: Path, name: str) -> Path | None:
    """The nearest of `path` and its parents that holds `name`, None where none does that this user can look into."""
    return next((place for place in (path, *path.parents) if os.path.lexists(place / name)), None)


def nearest(path: Path) -> str:
    """The real path of `path`, or of its nearest parent that exists."""
    with _acting(os.geteuid(), os.getegid()):
        while not os.path.lexists(path) and path != path.parent:
            path = path.parent
        return os.path.realpath(path)


def file_system(path: Path) -> str:
    """The type of the file system that holds `path` (or will: its nearest existing parent), e.g. "tmpfs".

    Read from the kernel's mount table; "unknown" where that cannot be read.
    """
    real = nearest(path)
    try:
        return _kind_of(real, read_text(_MOUNTINFO))
    except OSError:
        return "unknown"


@lru_cache(64)
def _kind_of(real: str, table: str) -> str:
    """What `file_system` tells of a real path, by a mount table, which is rarely another than the last time."""
    best, kind = "", "unknown"
    for line in table.splitlines():
        left, _, right = line.partition(" - ")
        # Blanks and backslashes stand as octal numbers.
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), left.split()[4])
        if len(point) >= len(best) and f"{real}/".startswith(point.rstrip("/") + "/"):
            best, kind = point, right.split()[0]
    return kind


def open_place(path: Path) -> int:
    """A descriptor of the directory at `path`, no link at its end followed. Where root acts as a spool's owner, the way
    to it may be closed to that user."""
    with _acting(os.geteuid(), os.getegid()):
        return open_directory(path)


def poll(fd: int, seconds: float) -> bool:
    """Whether a descriptor is readable within so many seconds."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(max(0, int(seconds * 1000 + 0.999))))


def watch_open() -> int:
    """A descriptor of inotify, by watchdog's own calls: reading it needs none of watchdog's threads.

    Raises OSError where there is no inotify or its limits are used up.
    """
    try:
        from watchdog.observers.inotify_c import inotify_init
    except ImportError as error:
        raise OSError(errno.ENOSYS, f"watchdog has no inotify here ({error})") from error
    fd = inotify_init()
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)
    return fd


def watch_add(fd: int, path: str) -> int:
    """Let the descriptor of inotify tell of each write to the file `path`; returns the number its events bear."""
    from watchdog.observers.inotify_c import InotifyConstants, inotify_add_watch

    number = inotify_add_watch(fd, os.fsencode(path), InotifyConstants.IN_MODIFY)
    if number < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    return int(number)


def save(fd: int, arrays: Sequence[Array], layout: Layout, tail: bytes) -> None:
    """Write a new item file: its first array by `np.save`, then the other blocks, then `tail`. Raises OSError.

    fd: of an empty file.
    """
    with open(fd, "wb", closefd=False) as file:
        first = savable(layout, arrays)
        if first:
            _save_first(file, arrays[0], layout)
        for part in parts(layout, arrays, skip_first=first):
            _write_all(file, part)
        _write_all(file, tail)


def _save_first(file: BinaryIO, array: Array, layout: Layout) -> None:
    """`np.save`, and what it leaves out of a full disk's account.

    numpy writes data through a C stream. It reports a short write without an errno, and one in the last few KiB not at
    all, leaving the file's position after bytes that are not there. Writing the rest again either completes the file
    or raises what stood in the way.
    """
    block, header = layout.blocks[0], layout.headers[0]
    end = block.offset + block.nbytes
    failure: OSError | None = None
    try:
        np.save(file, array.view(block.dtype), allow_pickle=False)
        file.flush()
    except OSError as error:
        if error.errno is not None:
            raise
        failure = error
    written = os.fstat(file.fileno()).st_size
    if written < end:
        file.seek(written)
        _write_all(file, header[written:])
        flat = array if array.flags.c_contiguous else array.T
        _write_all(file, flat.reshape(-1).view(np.uint8).data[max(0, written - block.offset) :])
        file.flush()
    elif failure is not None:
        raise failure
    file.seek(end)


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


# What is made of the calls.


class Closing(int):
    """A descriptor, closed at the end of its `with` block. Not for a locked one: an interrupt may keep it open."""

    def __enter__(self) -> int:
        return self

    def __exit__(self, *error: object) -> None:
        close(self)


def open_own(directory: int, name: str, flags: int, mode: int = 0o600, *, linked: bool = False) -> int:
    """Open a file of the spool's own; with O_CREAT in `flags`, make it where there is none.

    mode: permission bits, whatever the umask. linked: it may have other names, as in a backup by hard links. Raises
    UnsafeSpool for anything but a regular file: what stands at the names of a spool is not trusted.
    """
    try:
        fd = open_at(name, flags | CAREFUL, mode, dir_fd=directory)
    except OSError as error:
        if error.errno in NO_FILE:
            raise _planted(directory, name) from None
        raise
    try:
        status = fstat(fd)
        if not stat.S_ISREG(status.st_mode) or (status.st_nlink > 1 and not linked):
            raise _planted(directory, name)
        if flags & os.O_CREAT and stat.S_IMODE(status.st_mode) != mode and status.st_uid == user():
            fchmod(fd, mode)
    except BaseException:
        close(fd)
        raise
    return fd


def make_own(directory: int, name: str, mode: int = 0o600) -> int:
    """Make a file of the spool's own anew, in the place of one that a crash left. Open for reading and writing."""
    unlink_missing_ok(directory, name)
    return open_own(directory, name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)


def read_own(directory: int, name: str, most: int) -> bytes:
    """Up to `most` bytes of a file of the spool's own. Raises UnsafeSpool, FileNotFoundError, OSError."""
    with Closing(open_own(directory, name, os.O_RDONLY, linked=True)) as fd:
        found: list[bytes] = []
        while most and (more := read(fd, min(most, _AT_ONCE))):
            found.append(more)
            most -= len(more)
        return b"".join(found)


def open_directory(name: str | Path, directory: int | None = None) -> int:
    """A descriptor of a directory, no link followed."""
    return open_at(name, DIRECTORY, dir_fd=directory)


def make_directory(name: str | Path, directory: int | None = None) -> None:
    """Make a directory for its owner alone, whatever the umask."""
    mkdir(name, 0o700, dir_fd=directory)
    if stat_at(name, dir_fd=directory).st_mode & 0o700 != 0o700:
        chmod(name, 0o700, dir_fd=directory)


def exists(directory: int, name: str) -> bool:
    """Whether the directory holds the name."""
    try:
        stat_at(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True


def unlink_missing_ok(directory: int, name: str) -> None:
    """Remove a name that a predecessor may have removed already. A directory is none of ours and stays."""
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        unlink(name, dir_fd=directory)


def batches(directory: int, size: int = 256) -> Iterator[list[str]]:
    """The names in a directory, by its descriptor, `size` at a time; others may list it meanwhile. Those that are
    removed then may come or not."""
    with Closing(open_directory(".", directory)) as fd, scan(fd) as entries:
        while names := [entry.name for entry in islice(entries, size)]:
            yield names


def room(directory: int) -> tuple[int, int]:
    """How many bytes, and how many new files, the file system takes now; but for a few files, without which no space
    would come back: a reader that starts makes one."""
    status = statvfs(directory)
    files = max(0, status.f_favail - min(_FILES_LEFT, status.f_files >> 4)) if status.f_files else _MANY
    return status.f_bavail * status.f_frsize if status.f_blocks else _MANY, files


def sync_way(directory: int, place: Path) -> None:
    """Write the names in the directory at `place`, and in those that lead to it, to the device. Raises StorageError."""
    try:
        sync(directory)
        while place != place.parent:
            place = place.parent
            try:
                fd = open_at(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except PermissionError:
                continue  # not of our making
            with Closing(fd):
                if fstat(fd).st_dev != fstat(directory).st_dev:
                    return
                sync(fd)
    except OSError as error:
        raise storage_error(error, str(place)) from error


def write_whole(fd: int, data: bytes) -> None:
    """Write all of it at the descriptor's position."""
    rest = memoryview(data)
    while rest:
        rest = rest[write(fd, rest) :]


def is_shortage(error: OSError) -> bool:
    """Whether an error says that the file system or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


_REMEDIES: Final = {
    errno.EMFILE: "; a session takes 8 descriptors: close some, or raise ulimit -n",
    errno.EFBIG: "; raise ulimit -f",
    errno.ENOMEM: "; hold fewer arrays, or raise ulimit -v (of arrays by the ten thousand, vm.max_map_count)",
}
"""What to do where a limit of the process is met."""


def is_own_limit(error: OSError) -> bool:
    """Whether an error is of a limit of this process, and says nothing of the file."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def is_of_file(error: OSError) -> bool:
    """Whether an error is one of a system call, which stands in the way of one file or place: none of our own, and none
    that a signal handler raised."""
    return error.errno is not None and not isinstance(error, SpoolError)


def is_ordinary(error: BaseException) -> bool:
    """Whether an error stands in the way of what was tried. Any other interrupts the call: a signal handler raised it,
    and may well have raised a TimeoutError of its own."""
    if isinstance(error, OSError) and not isinstance(error, SpoolError):
        return error.errno is not None
    return isinstance(error, (SpoolError, IndexDamaged, MemoryError))


def with_remedy(error: OSError) -> str:
    """What an error of a system call says, and what to do."""
    return (error.strerror or str(error)) + _REMEDIES.get(error.errno or 0, "")


def storage_error(error: OSError, path: str) -> StorageError:
    """The StorageError for one of a system call on something in the spool at `path`."""
    what = with_remedy(error)
    if error.filename is None:
        return StorageError(error.errno, what, path)
    named: Any = error.filename
    name = os.fsdecode(named) if isinstance(named, (str, bytes)) else str(named)
    if name.startswith(path):
        return StorageError(error.errno, what, name)
    return StorageError(error.errno, f"{what} ({name})", path)


def _planted(directory: int, name: str) -> UnsafeSpool:
    try:
        place = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name)
    except OSError:
        place = name
    return UnsafeSpool(errno.EPERM, "is not a file of its own; this spool was tampered with", place)
