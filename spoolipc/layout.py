"""The spool's directory: its names, how it is made, and what is checked before it is trusted.

    SPOOL/
      spool.json     format version and the limits fixed at creation; its presence makes the directory a spool
      index          state of every item (`index.py`)
      index.lock     the lock around every change of the index (`lock.py`)
      bell/          doorbells of those who wait (`bell.py`)
      tmp/           files being written, named TOKEN-N.npy by the party that writes them
      items/         one SEQ.npy per item, from commit to acknowledgement
      free/          consumed files, in a reader's hands or waiting to be written again
      failed/        quarantined items, each with its reason in SEQ.json
      alive/         one locked file per party that has the spool open (`alive.py`)

Everything is opened relative to the spool's descriptor and without following links, so nothing planted at
a name can lead out of the directory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import bell, mounts
from .errors import (
    LimitMismatch,
    NotASpool,
    SpoolError,
    SpoolGone,
    UnknownVersion,
    UnsafeSpool,
    storage_error,
)
from .lock import exclusively
from .ownfile import make_own

FORMAT = 1
PARTS = ("items", "free", "tmp", "failed", "alive", "bell")
FILES = ("spool.json", "spool.json.new", "index", "index.new", "index.lock", "shutdown")
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NUMBERS = 2**64
"""Numbers of files are below this, as the index holds them in 64 bits."""
_ITEM = re.compile(r"(\d{20})\.npy")


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a spool. None where nobody has asked for one yet; the first who does decides it.

    maxsize: items waiting, 0 for no limit. max_bytes: bytes of items waiting or in flight, 0 for no limit.
    recycle_bytes: bytes of consumed files kept to be written again, 0 to keep none; more are kept for some
    seconds where more were waiting. max_attempts: deliveries before an item is a dead letter, 0 for no limit.
    mode: permission bits of the directories; files have the same without execution.
    """

    maxsize: int | None = None
    max_bytes: int | None = None
    recycle_bytes: int | None = None
    max_attempts: int | None = None
    mode: int | None = None


DEFAULTS = Limits(maxsize=0, max_bytes=0, recycle_bytes=1 << 30, max_attempts=5, mode=0o700)


def item_name(number: int) -> str:
    """The file name of an item (or of a consumed file) by its number."""
    return f"{number:020d}.npy"


def item_number(name: str) -> int | None:
    """The number in an item's file name, or None for any other name."""
    match = _ITEM.fullmatch(name)
    number = int(match[1]) if match else NUMBERS
    return number if number < NUMBERS else None


class Layout:
    """Open descriptors of one spool's directories, `root` among them; close() lets them go."""

    def __init__(self, path: Path, root: int, mode: int) -> None:
        self.path = path
        self.mode = mode
        self.root = root
        self.file_mode = mode & 0o666
        self.parts: dict[str, int] = {}
        try:
            for name in PARTS:
                self.parts[name] = _open_part(path, root, name, mode)
        except BaseException:
            for fd in self.parts.values():
                os.close(fd)
            raise
        self.items = self.parts["items"]
        self.free = self.parts["free"]
        self.tmp = self.parts["tmp"]
        self.failed = self.parts["failed"]
        self.alive = self.parts["alive"]

    def descriptors(self) -> list[int]:
        """All descriptors held, for closing them in a forked child or at the end."""
        return [self.root, *self.parts.values()]

    def close(self) -> None:
        """Close every descriptor; harmless when repeated."""
        for fd in self.descriptors():
            if fd >= 0:
                os.close(fd)
        self.root = -1
        self.parts = dict.fromkeys(self.parts, -1)

    def sync(self) -> None:
        """Write the names of the spool's directories, and of those that lead to it, to the device.

        Raises StorageError.
        """
        place = self.path
        try:
            os.fsync(self.root)
            while place != place.parent:
                place = place.parent
                try:
                    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except PermissionError:
                    continue  # not of our making
                try:
                    if os.fstat(fd).st_dev != os.fstat(self.root).st_dev:
                        return
                    os.fsync(fd)
                finally:
                    os.close(fd)
        except OSError as error:
            raise storage_error(error, str(place)) from error

    def check_present(self) -> None:
        """Raise SpoolGone when the directory was deleted or replaced under its users."""
        try:
            os.stat("spool.json", dir_fd=self.root, follow_symlinks=False)
        except FileNotFoundError:
            raise SpoolGone(
                errno.ENOENT,
                "the spool was deleted while in use; close this and open a new one",
                str(self.path),
            ) from None


def open_layout(path: str | os.PathLike[str], asked: Limits, *, create: bool = True) -> Layout:
    """Open the spool at `path`, making it first where it does not exist and `create` is true.

    Raises LimitMismatch, NotASpool, UnsafeSpool, NetworkFileSystem, UnknownVersion, StorageError.
    """
    place = Path(os.path.abspath(os.fspath(path)))
    _check_asked(asked)
    mounts.refuse_network(place)
    try:
        return _opened(place, asked, create)
    except SpoolError:
        raise
    except OSError as error:
        raise storage_error(error, str(place)) from error


def _opened(place: Path, asked: Limits, create: bool) -> Layout:
    if create:
        _make_root(place, asked.mode or 0o700)
    root = _open_root(place)
    try:
        found = _read_limits(place, root)
        if found is None:
            if not create:
                raise NotASpool(errno.EINVAL, "is not a spool: it has no spool.json", str(place))
            found = _make_spool(place, root, asked)
        _compare(place, found, asked)
        mode = found.mode or 0o700
        _check_private(place, os.fstat(root), mode)
        return Layout(place, root, mode)
    except BaseException:
        os.close(root)
        raise


def agree(layout: Layout, asked: Limits) -> Limits:
    """Decide the limits that nobody had asked for before; the caller holds the index lock.

    Returns the limits in force, the undecided ones as their defaults. Raises LimitMismatch.
    """
    found = _read_limits(layout.path, layout.root)
    if found is None:
        layout.check_present()
        raise NotASpool(errno.ENOENT, "has lost its spool.json", str(layout.path))
    _compare(layout.path, found, asked)
    decided = _merged(found, asked)
    if decided != found:
        _write_limits(layout.root, decided)
    return _merged(decided, DEFAULTS)


def _merged(first: Limits, second: Limits) -> Limits:
    """The limits of `first`, and those of `second` where the first has none."""
    return replace(
        first, **{name: value for name, value in asdict(second).items() if getattr(first, name) is None}
    )


def _check_asked(asked: Limits) -> None:
    for name, value in asdict(asked).items():
        if value is not None:
            _whole(name, value)
    if asked.mode is not None and (asked.mode & 0o700 != 0o700 or asked.mode & ~0o770):
        raise ValueError(f"mode must be 0o700, or 0o770 to share the spool with a group, not {asked.mode:#o}")


def _make_root(place: Path, mode: int) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        os.mkdir(place, 0o700)
    except FileExistsError:
        return
    except NotADirectoryError as error:
        raise NotASpool(errno.ENOTDIR, "a part of the path is not a directory", str(place)) from error
    if mode != 0o700:
        os.chmod(place, mode)


def _open_root(place: Path) -> int:
    try:
        return os.open(place, OPEN_DIRECTORY)
    except FileNotFoundError:
        raise NotASpool(errno.ENOENT, "there is no spool here", str(place)) from None
    except NotADirectoryError:
        what = "is a symbolic link; give the directory itself" if place.is_symlink() else "is not a directory"
        raise NotASpool(errno.ENOTDIR, what, str(place)) from None


def _read_limits(place: Path, root: int) -> Limits | None:
    try:
        fd = os.open("spool.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=root)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeSpool(errno.EPERM, "spool.json is a symbolic link", str(place)) from None
        raise
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UnsafeSpool(errno.EPERM, "spool.json is not a regular file", str(place))
        text = file.read(65536)
    try:
        said = json.loads(text)
        version = said["format"]
        if not isinstance(version, int):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NotASpool(
            errno.EINVAL, "spool.json is damaged; restore it or move the directory away", str(place)
        ) from None
    if version != FORMAT:
        raise UnknownVersion(
            errno.EINVAL, f"the spool has format {version}, this release knows format {FORMAT}", str(place)
        )
    try:
        return Limits(**{n: None if said[n] is None else _whole(n, said[n]) for n in asdict(DEFAULTS)})
    except (KeyError, TypeError, ValueError):
        raise NotASpool(errno.EINVAL, "spool.json lacks a limit or has a bad one", str(place)) from None


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number of zero or more, not {value!r}")
    return value


def _make_spool(place: Path, root: int, asked: Limits) -> Limits:
    """Fill an empty directory. spool.json comes last and by rename: a crash before it leaves a directory
    holding none but our own names, which the next caller fills again."""
    strangers = sorted(set(os.listdir(root)) - set(PARTS) - set(FILES))
    if strangers:
        what = f"is not empty (it holds {strangers[0]!r}) and not a spool; give a new path"
        raise NotASpool(errno.ENOTEMPTY, what, str(place))
    limits = replace(asked, mode=asked.mode or 0o700)
    mode = limits.mode or 0o700
    status = os.fstat(root)
    if status.st_uid != os.geteuid():
        raise UnsafeSpool(errno.EPERM, "belongs to another user", str(place))
    if stat.S_IMODE(status.st_mode) & 0o777 != mode:
        os.chmod(root, mode)
    with exclusively(root, mode & 0o666):
        found = _read_limits(place, root)
        if found is not None:
            return found
        for name in PARTS:
            _make_directory(root, name, mode)
        fd = _open_part(place, root, "bell", mode)
        try:
            bell.make(fd, mode)
        finally:
            os.close(fd)
        os.fsync(root)  # no spool.json without its directories, whatever a loss of power leaves
        _write_limits(root, limits)
    return limits


def _write_limits(root: int, limits: Limits) -> None:
    """Put a new spool.json in place, whole and synced; the caller holds the index lock."""
    mode = (limits.mode or 0o700) & 0o666
    with open(make_own(root, "spool.json.new", mode), "w", encoding="ascii") as file:
        json.dump({"format": FORMAT, **asdict(limits)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename("spool.json.new", "spool.json", src_dir_fd=root, dst_dir_fd=root)
    os.fsync(root)


def _make_directory(root: int, name: str, mode: int) -> None:
    """Make a part of a spool that has no spool.json yet. One that is there was left by a crash, perhaps of
    somebody who wanted another mode."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=root)
    try:
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=root)
    except NotADirectoryError:
        return  # refused when the spool is opened
    try:
        status = os.fstat(fd)
        if stat.S_IMODE(status.st_mode) & 0o777 != mode and status.st_uid == os.geteuid():
            os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _open_part(place: Path, root: int, name: str, mode: int) -> int:
    try:
        fd = os.open(name, OPEN_DIRECTORY, dir_fd=root)
    except (NotADirectoryError, FileNotFoundError):
        raise UnsafeSpool(
            errno.EPERM,
            f"{name}/ is missing or not a directory of its own; this spool was tampered with",
            str(place),
        ) from None
    try:
        _check_private(place / name, os.fstat(fd), mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_private(place: Path, status: os.stat_result, mode: int) -> None:
    shared = bool(mode & 0o070)
    if status.st_uid not in (os.geteuid(), 0) and not shared:
        raise UnsafeSpool(errno.EPERM, "belongs to another user; use a path of your own", str(place))
    if stat.S_IMODE(status.st_mode) & 0o777 & ~mode:
        raise UnsafeSpool(
            errno.EPERM,
            f"is open to others (mode {stat.S_IMODE(status.st_mode):o}); run: chmod {mode:o} {place}",
            str(place),
        )


def _compare(place: Path, found: Limits, asked: Limits) -> None:
    for name, value in asdict(asked).items():
        there = getattr(found, name)
        if value is not None and there is not None and there != value:
            raise LimitMismatch(
                f"the spool at {place} has {name}={there}, not {value}; leave {name} out to take what is there,"
                " or use another path"
            )
