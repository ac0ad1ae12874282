"""The spool's directory: its names, how it is made, and what is checked before it is trusted.

    SPOOL/
      spool.json     format version and the limits fixed at creation; its presence makes the directory a spool
      index          state of every item (`table.py`, `journal.py`)
      tmp/           files being written, named TOKEN-N.npy by the session that writes them
      items/         one SEQ.npy per item, from commit to acknowledgement; its descriptor bears the index lock
      free/          consumed files, pinned, reserved, or pooled to be written again
      failed/        dead letters and quarantined items SEQ.npy, each with its history in SEQ.jsonl
      SEQ.failed.npy a dead letter that failed/ did not take
      alive/         one locked file per session (`liveness.py`)
      spare          what the next session's file is where no more files can be made
      shutdown       there once the spool was shut down
      sources.json   the items that came last from each spool that forwards to this one (`sources.py`)

Everything is opened relative to the spool's descriptor and without following links, so nothing planted at a name can
lead out of the directory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import stat
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

from ..errors import (
    LimitMismatch,
    NetworkFileSystem,
    NotASpool,
    SpoolGone,
    StorageError,
    UnknownVersion,
    UnsafeSpool,
)
from ..message import DEFAULTS, Limits, completed, differing
from . import fs
from .lock import exclusively, put_off
from .table import ALL_BITS, CAPACITY, DISCARDED, DRAINING, OPEN, WORD, IndexDamaged

_log = logging.getLogger("spoolipc")
FORMAT: Final = 2
PARTS: Final = ("items", "free", "tmp", "failed", "alive")
FILES: Final = (
    *("spool.json", "spool.json.new", "index", "index.new", "shutdown", "spare"),
    *("sources.json", "sources.json.new"),
)
NUMBERS: Final = 2**64
"""Numbers of files are below this, as the table holds them in 64 bits."""
_ITEM: Final = re.compile(r"(\d{20})\.npy")
_TEMPORARY: Final = re.compile(r"([0-9a-f]{16})-\d+\.npy")
_LONGEST_JSON: Final = 65536
PRIVATE: Final = 0o700
SHARED: Final = 0o770
_MAKE_ONE: Final = "SpoolWriter(path) makes one"
_DELETING: Final = 0.1  # seconds after which more is gone where all of a spool is being removed, not a part
_MARKS: Final = {DRAINING: b"draining", DISCARDED: b"discarded"}
NETWORK: Final = frozenset(
    "nfs nfs4 cifs smb3 smbfs ncpfs afs ceph lustre gfs2 ocfs2 glusterfs 9p beegfs gpfs pvfs2 orangefs coda"
    " fuse.sshfs fuse.glusterfs fuse.ceph fuse.s3fs fuse.rclone fuse.gcsfuse fuse.juicefs".split()
)
MEMORY: Final = frozenset({"tmpfs", "ramfs"})


def item_name(number: int) -> str:
    """The file name of an item (or of a consumed file) by its number."""
    return str(number).zfill(20) + ".npy"  # in less than half the time that a format takes


free_name: Final = lru_cache(1024)(item_name)
"""The file name of a consumed file by its number, which it keeps: soon asked for again."""


def item_number(name: str) -> int | None:
    """The number in an item's file name, or None for any other name."""
    match = _ITEM.fullmatch(name)
    number = int(match[1]) if match else NUMBERS
    return number if number < NUMBERS else None


def temporary_owner(name: str) -> int:
    """The token in a temporary file's name, 0 for any other name."""
    match = _TEMPORARY.fullmatch(name)
    return int(match[1], 16) if match else 0


class Directories:
    """Open descriptors of one spool's directories, `root` among them; close() lets them go.

    parts: the descriptors by name. places: likewise, and that of the spool itself as ".".
    restore: make a part again that somebody removed. Whoever has the spool open shares the lock on its own directory,
    which keeps cleaners of old files away that honour it, as systemd-tmpfiles does; nobody takes that for himself.
    """

    def __init__(self, path: Path, root: int, mode: int, shared: bool, restore: bool) -> None:
        self.path = path
        self.mode = mode
        self.root = root
        self.file_mode = mode & 0o666
        self.parts: dict[str, int] = {}
        self._shared = shared
        self.stuck: set[str] = set()  # files that could not be removed
        fs.lock_shared(root)
        try:
            for name in PARTS:
                if restore and not fs.exists(root, name):
                    self._make_missing(name)
                self.parts[name] = self._open_part(name)
        except BaseException:
            for fd in self.parts.values():
                fs.close(fd)
            raise
        self.items, self.free, self.tmp, self.failed, self.alive = (self.parts[name] for name in PARTS)
        self.places = {**self.parts, ".": root}

    def _make_missing(self, name: str) -> None:
        """For who opens the spool: make a part again that somebody removed; items/, the first, bears the lock under
        which the others are made. Raises SpoolGone, LockTimeout."""
        if name == "items":
            self._make_again(name)
        with exclusively(self.root, str(self.path)):
            self._make_again(name)

    def _open_part(self, name: str) -> int:
        try:
            fd = fs.open_directory(name, self.root)
        except (NotADirectoryError, FileNotFoundError):
            what = (
                f"{name}/ is missing or not a directory of its own; run: spoolipc fsck --repair {self.path}"
            )
            raise UnsafeSpool(errno.EPERM, what, str(self.path)) from None
        try:
            _check_private(self.path, self.path / name, fs.fstat(fd), self.mode, self._shared)
        except BaseException:
            fs.close(fd)
            raise
        return fd

    def _make_again(self, name: str) -> None:
        """Make a part again that somebody removed, where there is none, unless all of the spool is being removed. The
        caller holds the lock. Raises SpoolGone.

        Who still has the lock on an `items/` that was removed is alone with it: he is made to find the index damaged
        first, so that he builds it again under the lock that all others take.
        """
        if fs.exists(self.root, name):
            return
        fs.sleep(_DELETING)
        self.check_there(whole=True)
        if name == "items" and not fs.exists(self.root, name):  # nobody was first
            with fs.Closing(fs.open_own(self.root, "index", os.O_WRONLY)) as fd:
                fs.pwrite(fd, ALL_BITS.to_bytes(WORD, "little"), CAPACITY * WORD)
        make_part(self.root, name, self.mode)

    def check_there(self, *, whole: bool = False) -> None:
        """Raise SpoolGone when the spool was deleted: it has neither spool.json nor an index, or not both (whole)."""
        there = [fs.exists(self.root, name) for name in ("spool.json", "index")]
        if not (all(there) if whole else any(there)):
            what = "the spool was deleted while in use; close this and open a new one"
            raise SpoolGone(errno.ENOENT, what, str(self.path))

    def explained(self, error: OSError) -> StorageError | SpoolGone:
        """The error to raise for one of a system call: it names the path, and a deleted spool is called so."""
        try:
            self.check_there()
        except SpoolGone as gone:
            return gone
        except OSError:
            pass  # the error at hand says more
        return fs.storage_error(error, str(self.path))

    def check(self) -> None:
        """Make sure that the spool is there, and each part under its name. Raises SpoolGone; IndexDamaged for a part
        that is not: the step is then begun again after `restore`."""
        lost = self._lost()
        self.check_there(whole=bool(lost))
        if lost:
            raise IndexDamaged(f"{lost[0]}/ was removed")

    def _lost(self) -> list[str]:
        found = []
        for name, fd in self.parts.items():
            try:
                if fs.stat_at(name, dir_fd=self.root)[1:3] != fs.fstat(fd)[1:3]:  # inode and device
                    found.append(name)
            except FileNotFoundError:
                found.append(name)
        return found

    def restore(self) -> bool:
        """Open each part again that is not the one under its name, made again where there is none; whether `items/` was
        among them, and with it the lock. The caller holds the lock. Raises SpoolGone, UnsafeSpool."""
        self.check_there()
        lost = self._lost()
        for name in lost:
            self._make_again(name)
            fs.replace(self._open_part(name), self.parts[name])
        return "items" in lost

    def remove(self, part: str, name: str) -> None:
        """Remove a file that nobody needs, which may be gone already. One that cannot be removed stops nobody: it
        stays, for `gc` to try, and no round of this session tries again."""
        try:
            fs.unlink_missing_ok(self.parts[part], name)
        except OSError as error:
            if not fs.is_of_file(error):
                raise
            self.stuck.add(name)
            what = "%s: %s/%s cannot be removed (%s), and is left to gc"
            self.say(logging.WARNING, what, self.path, part, name, error.strerror)

    def retire(self, name: str) -> None:
        """Remove the file of a session that leaves, or lay it by where the spare one was used."""
        with contextlib.suppress(OSError):
            if not fs.exists(self.root, "spare"):
                fs.rename(name, "spare", src_dir_fd=self.alive, dst_dir_fd=self.root)
        self.remove("alive", name)

    def say(self, level: int, message: str, *values: object) -> None:
        """Log something, once the lock is let go, as a log may be slow or blocked."""
        if not put_off(_log.log, level, message, *values):
            _log.log(level, message, *values)

    def descriptors(self) -> list[int]:
        """All descriptors held, for closing them in a forked child or at the end."""
        return [self.root, *self.parts.values()]

    def close(self) -> None:
        """Close every descriptor; harmless when repeated."""
        for fd in self.descriptors():
            if fd >= 0:
                fs.close(fd)
        self.root = -1
        self.parts = dict.fromkeys(self.parts, -1)


def open_directories(
    path: str | os.PathLike[str],
    asked: Limits,
    *,
    create: bool = True,
    as_found: bool = False,
    restore: bool = True,
) -> Directories:
    """Open the spool at `path`, making it first where it does not exist and `create` is true.

    as_found: for who looks after it: one that is shared with a group is opened whether that was asked for or not.
    restore: make parts again that somebody removed.
    Raises LimitMismatch, NotASpool, UnsafeSpool, NetworkFileSystem, UnknownVersion, StorageError.
    """
    place = Path(os.path.abspath(os.fsdecode(path)))
    _refuse_network(place)
    try:
        return _opened(place, asked, create, as_found, restore)
    except OSError as error:
        if not fs.is_of_file(error):
            raise
        raise fs.storage_error(error, str(place)) from error


def _opened(place: Path, asked: Limits, create: bool, as_found: bool, restore: bool) -> Directories:
    if create:
        _make_root(place)
    root = open_root(place)
    try:
        found = read_limits(place, root)
        # Looked for again: somebody may just have made both.
        if found is None and fs.exists(root, "index") and (found := read_limits(place, root)) is None:
            raise _lost_limits(place)
        if found is None:
            if not create:
                what = f"is not a spool: it has no spool.json; {_MAKE_ONE}"
                raise NotASpool(errno.EINVAL, what, str(place))
            found = _make_spool(place, root, asked)
        _compare(place, found, asked)
        mode = found.mode or PRIVATE
        shared = mode == SHARED and (as_found or asked.mode == SHARED)
        _check_private(place, place, fs.fstat(root), mode, shared)
        return Directories(place, root, mode, shared, restore)
    except BaseException:
        fs.close(root)
        raise


def agree(directories: Directories, asked: Limits) -> Limits:
    """Decide the limits that nobody had asked for before; the caller holds the index lock.

    Returns the limits in force, the undecided ones as their defaults. Raises LimitMismatch.
    """
    found = _limits_of(directories)
    _compare(directories.path, found, asked)
    decided = completed(found, asked)
    if decided != found:
        write_limits(directories.root, decided)
    return completed(decided, DEFAULTS)


def stage_limits(directories: Directories, asked: Limits) -> Limits:
    """Write the limits, changed to those asked for, to spool.json.new, synced; the caller holds the index lock.

    Returns what will be in force with it. Raises LimitMismatch for another mode, which cannot be changed.
    """
    found = _limits_of(directories)
    _compare(directories.path, Limits(mode=found.mode), Limits(mode=asked.mode))
    changed = completed(asked, found)
    _stage(directories.root, changed)
    return completed(changed, DEFAULTS)


def _limits_of(directories: Directories) -> Limits:
    path, root = directories.path, directories.root
    found = read_limits(path, root)
    if found is None:
        raise _lost_limits(path)
    return found


def _lost_limits(place: Path) -> NotASpool:
    what = f"has lost its spool.json; run: spoolipc fsck --repair {place}"
    return NotASpool(errno.ENOENT, what, str(place))


def _make_root(place: Path) -> None:
    try:
        spool = fs.nearest_with(place, "spool.json")
        if spool not in (place, None):
            raise NotASpool(
                errno.EINVAL, f"is inside the spool {spool}; give a path outside of it", str(place)
            )
        fs.make_parents(place)
        fs.make_directory(place)
    except (FileExistsError, NotADirectoryError):
        return  # whoever opens it says what is there


def open_root(place: Path) -> int:
    """A descriptor of the spool's directory. Raises NotASpool, UnsafeSpool."""
    try:
        return fs.open_place(place)
    except FileNotFoundError:
        is_tilde = any(part.startswith("~") for part in place.parts)
        remedy = "'~' was not expanded: os.path.expanduser(path) does that" if is_tilde else _MAKE_ONE
        raise NotASpool(errno.ENOENT, f"there is no spool here; {remedy}", str(place)) from None
    except NotADirectoryError:
        what = "lies in a file, which is no directory; give another path"
        with contextlib.suppress(NotADirectoryError):
            link = stat.S_ISLNK(fs.stat_at(place).st_mode)
            what = "is a symbolic link; give the directory itself" if link else "is not a directory"
        raise NotASpool(errno.ENOTDIR, what, str(place)) from None
    except PermissionError:
        if fs.stat_at(place).st_uid == fs.user():
            raise
        what = "belongs to another user and is closed to you; use a path of your own, or have it made with mode=0o770"
        raise UnsafeSpool(errno.EACCES, what, str(place)) from None


def read_limits(place: Path, root: int) -> Limits | None:
    """The limits in spool.json, None where there is none. Raises NotASpool, UnsafeSpool, UnknownVersion."""
    try:
        text = fs.read_own(root, "spool.json", _LONGEST_JSON)
    except FileNotFoundError:
        return None
    return _limits_told(text, place)


@lru_cache(64)  # a session reads them several times while it opens
def _limits_told(text: bytes, place: Path) -> Limits:
    try:
        said = json.loads(text)
        version = said["format"]
        if not isinstance(version, int):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        what = "spool.json is damaged; restore it or move the directory away"
        raise NotASpool(errno.EINVAL, what, str(place)) from None
    if version != FORMAT:
        what = f"the spool has format {version}, this release knows format {FORMAT}"
        raise UnknownVersion(errno.EINVAL, what, str(place))
    try:
        return Limits(**{name: said[name] for name in Limits.__slots__})
    except (KeyError, TypeError, ValueError):
        raise NotASpool(errno.EINVAL, "spool.json lacks a limit or has a bad one", str(place)) from None


def _make_spool(place: Path, root: int, asked: Limits) -> Limits:
    """Fill an empty directory. spool.json comes last and by rename: a crash before it leaves a directory holding none
    but our own names, which the next caller fills again. Whoever makes spool.json decides the mode of all."""
    foreign = sorted(set(fs.list_names(root)) - set(PARTS) - set(FILES))
    if foreign:
        what = f"is not empty (it holds {foreign[0]!r}) and not a spool; give a new path, such as {place / 'spool'}"
        raise NotASpool(errno.ENOTEMPTY, what, str(place))
    if fs.fstat(root).st_uid != fs.user():
        what = f"belongs to another user; give a path of your own, such as {place / 'spool'}"
        raise UnsafeSpool(errno.EPERM, what, str(place))
    limits = replace(asked, mode=asked.mode or PRIVATE)
    for name in PARTS:
        make_part(root, name, PRIVATE)
    with exclusively(root, str(place)):
        found = read_limits(place, root)
        if found is not None:
            return found
        for name in (".", *PARTS):
            permit(root, name, limits.mode or PRIVATE)
        with contextlib.suppress(OSError):
            fs.close(fs.make_own(root, "spare", (limits.mode or PRIVATE) & 0o666))
        fs.sync(root)  # no spool.json without its directories, whatever a loss of power leaves
        write_limits(root, limits)
    return limits


def permit(directory: int, name: str, mode: int) -> None:
    """Give a directory or file of the spool its mode, following no link; a shared directory also the group of the one
    it is in, which all that is made in it then has."""
    flags = fs.DIRECTORY if mode & 0o100 else os.O_RDONLY | fs.CAREFUL
    with fs.Closing(fs.open_at(name, flags, dir_fd=directory)) as fd:
        if mode == SHARED:
            fs.fchown(fd, -1, fs.fstat(directory).st_gid)
            mode |= stat.S_ISGID
        fs.fchmod(fd, mode)


def write_limits(root: int, limits: Limits) -> None:
    """Put a new spool.json in place, whole and synced; the caller holds the index lock."""
    _stage(root, limits)
    fs.rename("spool.json.new", "spool.json", src_dir_fd=root, dst_dir_fd=root)
    fs.sync(root)


def _stage(root: int, limits: Limits) -> None:
    with fs.Closing(fs.make_own(root, "spool.json.new", (limits.mode or PRIVATE) & 0o666)) as fd:
        fs.write_whole(fd, json.dumps({"format": FORMAT, **asdict(limits)}).encode("ascii"))
        fs.sync(fd)


def make_part(root: int, name: str, mode: int) -> None:
    """Make a directory of the spool, where there is none."""
    with contextlib.suppress(FileExistsError):
        fs.make_directory(name, root)
        if mode != PRIVATE:
            permit(root, name, mode)


def _check_private(spool: Path, place: Path, status: os.stat_result, mode: int, shared: bool) -> None:
    if status.st_uid not in (fs.user(), 0) and not shared:
        remedy = "if you share it, ask for mode=0o770" if mode == SHARED else "use a path of your own"
        raise UnsafeSpool(errno.EPERM, f"belongs to another user; {remedy}", str(place))
    if stat.S_IMODE(status.st_mode) & 0o777 & ~mode:
        whom = "o" if mode == SHARED else "go"
        what = f"is open to others (mode {stat.S_IMODE(status.st_mode):o}); run: chmod -R {whom}= {spool}"
        raise UnsafeSpool(errno.EPERM, what, str(place))


def _compare(place: Path, found: Limits, asked: Limits) -> None:
    for name, (there, value) in differing(found, asked).items():
        said, remedy = f"{there}, not {value}", f"change it (spoolipc set {place} {name}={value})"
        if name == "mode":
            said, remedy = f"{there:#o}, not {value:#o}", "use another path"
        what = f"has {name}={said}; leave {name} out to take what is there, or {remedy}"
        raise LimitMismatch(f"{place}: {what}")


# The marker of a spool that was shut down: it outlives the processes and the table.


def read_shutdown(root: int) -> int:
    """The state of the spool as its marker file says it. Raises UnsafeSpool for anything planted in its place."""
    try:
        said = fs.read_own(root, "shutdown", 16)
    except FileNotFoundError:
        return OPEN
    return DISCARDED if said == _MARKS[DISCARDED] else DRAINING


def write_shutdown(root: int, state: int, mode: int) -> None:
    """Make the marker file say `state`. A crash within may leave DRAINING where DISCARDED was meant."""
    if state == OPEN:
        fs.unlink_missing_ok(root, "shutdown")
        return
    with fs.Closing(fs.open_own(root, "shutdown", os.O_WRONLY | os.O_CREAT, mode)) as fd:
        fs.truncate(fd, 0)
        try:
            fs.write(fd, _MARKS[state])
        except OSError as error:
            if state != DRAINING or not fs.is_shortage(error):  # an empty one says DRAINING too
                raise


def _refuse_network(path: Path) -> None:
    kind = fs.file_system(path)
    if kind in NETWORK:
        raise NetworkFileSystem(
            errno.ENOTSUP,
            f"lies on a network file system ({kind}), where processes on two machines would see different data;"
            " use a local directory such as /dev/shm, or the NATS engine between machines",
            str(path),
        )
