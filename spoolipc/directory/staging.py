"""Staging: a message written to a file that nobody sees yet.

The file is a consumed one, written through a mapping kept from last time (a small one that is not mapped, with one
write), or a new one in `tmp/`. A crash leaves a reserved file, or a temporary file under a crashed session's token.
"""

from __future__ import annotations

import errno
import itertools
import logging
import mmap
import os
import stat
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import BadItem, Full, SpoolClosed, SpoolError, StorageError
from ..format import footer
from ..format.item import Layout, checksum_of, layout_of, store, to_bytes
from ..message import Message
from . import fs, pool
from .itemfile import ItemFile, check_regular
from .layout import temporary_owner
from .liveness import token_name
from .recycling import MOST_RESERVED, PAGE, SMALL, Pin, Recycler, Reserved, keeper, rounded
from .session import EVERY, Session
from .table import (
    DELIVERED_TOTAL,
    HAS_METADATA,
    ITEM_BYTES,
    NEVER_AGAIN,
    NEXT_SEQ,
    POOL_BYTES,
    POOL_COUNT,
    Words,
)

T = TypeVar("T")
_log = logging.getLogger("spoolipc")
PATIENCE = 3.0
"""Seconds after which a wait for space is told."""


class Staged:
    """A message in a file not yet in `items/`: a reserved file, or `name` in `tmp/`.

    need: bytes written. size: bytes of the file. flags: of its record. loan: the array is the file's own memory; pages:
    all of that, as what is lent; pin: who shows it.
    """

    file: Reserved | None = None
    name = ""
    size = 0
    loan = False
    pin: Pin | None = None
    pages: Any = None
    buffer: mmap.mmap | None = None
    status: os.stat_result | None = None

    def __init__(self, message: Message, layout: Layout, said: bytes, flags: int) -> None:
        self.arrays, names, meta = message[:3]
        self.names, self.meta, self.id = names, meta, said
        self.layout = layout
        self.put_time = put_time = time.time_ns()
        self.tail = tail = footer.pack(layout.end, put_time, said, names, meta)
        self.need = layout.end + len(tail)
        self.flags = flags if not names and meta is None else flags | HAS_METADATA


class Staging:
    """Where one writer stages its messages.

    durable: every file is synced. recycles: consumed files are written again, and with `flags` these will be; not where
    an older name could show the new bytes after a loss of power. checksum: stored with every item.
    limits_bytes: whether `max_bytes` is set. no_space: what the spool was like when the file system refused a write.
    """

    def __init__(self, session: Session, recycler: Recycler, *, durable: bool, checksum: bool) -> None:
        self.session = session
        self.recycler = recycler
        self.durable = durable
        self.recycles = not durable
        self.flags = NEVER_AGAIN if durable else 0
        self.checksum = checksum
        self.limits_bytes = False
        self.no_space: tuple[int, ...] | None = None
        # Of the wait for space under way: when it began and was last heard of, and what was said of it
        self._since = self._waited = 0.0
        self._next_seq = 0
        self._wanted = self._told = False
        self._numbers = itertools.count()
        self._is_masked: bool | None = None  # whether new files lack bits of their mode, by the umask

    def most(self, need: int) -> int:
        """Size up to which a consumed file may be used for `need` bytes: exact where bytes are limited."""
        if self.limits_bytes:
            return rounded(need)
        return 2 * need if need > PAGE // 2 else PAGE

    def space(self, words: Words) -> tuple[int, ...]:
        """What a full file system is like: another answer later is a reason to try again."""
        return words[DELIVERED_TOTAL], words[POOL_COUNT], *fs.room(self.session.directories.root)

    def say_what_for(self, need: int, refused: bool) -> None:
        """To be called each second that a put waits. After some without any put done: note for `stat` what the file
        system lacks, and say once in the log who has it. refused: it refused what `statvfs` says it has."""
        words, now = self.session.look(), time.monotonic()
        if words[NEXT_SEQ] != self._next_seq or now - self._waited > 2 * EVERY:
            self._since, self._told, self._next_seq = now, False, words[NEXT_SEQ]
        self._waited = now
        lacks = refused or (not words[POOL_COUNT] and self.recycler.lacking(need) > 0)
        if now - self._since < PATIENCE or not pool.has_room(words, need) or not lacks:
            need = 0
        if need or self._wanted:
            said = self.session.step(self._want, need)
            if need and not self._told:
                self._told = True
                what = "%s: a put waits for %d bytes that the file system lacks: %s"
                _log.warning(what, self.session.path, need, said)

    def _want(self, need: int) -> tuple[str, int, int]:
        session, words = self.session, self.session.journal.words
        pool.want(words, session.token, need)
        self._wanted = need > 0
        status = fs.statvfs(session.directories.root)
        held = pool.held_by(session.directories, words)
        other = (status.f_blocks - status.f_bfree) * status.f_frsize - words[ITEM_BYTES] - words[POOL_BYTES]
        parts = [f"{status.f_bavail * status.f_frsize} are free", f"items have {words[ITEM_BYTES]}"]
        parts += [f"arrays shown or filled by process {process} {size}" for process, size in held.items()]
        parts += [f"the pool {words[POOL_BYTES]}", f"other files {max(0, other - sum(held.values()))}"]
        return ", ".join(parts), 0, 0

    def stage(self, message: Message) -> Staged:
        """Write a message to a file that nobody sees yet. Raises Full when the file system is full."""
        said = bytes.fromhex(message.id) if message.id else self.new_id()
        staged = Staged(message, layout_of(message[0]), said, self.flags)
        if self.recycles:
            need, pick = staged.need, self.recycler.pick
            most = self.most(need)
            while (file := pick(need, most)) is not None:
                if self._fill(file, staged):
                    return staged
        self.write_new(staged)
        return staged

    def new_id(self) -> bytes:
        """An id that no other item has: the session's random number and one that counts."""
        return self.session.token_bytes + next(self._numbers).to_bytes(8, "big")

    def _fill(self, file: Reserved, staged: Staged) -> bool:
        """Write into a consumed file through its mapping, or a small one with one write; false when it is not as it
        should be any more, and was discarded."""
        mappings, free, name = self.recycler.mappings, self.session.directories.free, file.name
        need, size, number = staged.need, file.size, file.number
        try:
            kept = mappings.kept.get(number)
            if kept is None and size <= SMALL and not mappings.wants(number):
                with ItemFile(free, name, writable=True) as opened:
                    if opened.status.st_nlink != 1 or opened.size != size:
                        raise BadItem("the file is linked elsewhere or has changed its size")
                    opened.write(self._small(staged))
            else:
                status = fs.stat_at(name, dir_fd=free)
                if status[3] != 1 or status[6] != size:
                    raise BadItem("the file is linked elsewhere or has changed its size")
                if kept is not None and kept.identity == status[1:3] and kept.size == size:
                    buffer = kept.buffer
                    kept.used = keeper.now
                else:
                    check_regular(status)
                    buffer = mappings.of(free, name, status, number, file.record)
                if need <= SMALL:
                    buffer[:need] = self._small(staged)
                else:
                    store(buffer, staged.layout, staged.arrays)
                    if self.checksum:
                        staged.tail = self.sealed(staged, buffer)
                    buffer[staged.layout.end : need] = staged.tail
        except (BadItem, FileNotFoundError):
            self.recycler.discard(file)
            return False
        except OSError as error:
            if error.errno == errno.ELOOP:
                self.recycler.discard(file)
                return False
            self.recycler.has_strays = True
            where = str(self.session.directories.path / "free" / name)
            raise fs.storage_error(error, where) from error
        except BaseException:
            self.recycler.has_strays = True
            raise
        staged.file, staged.size = file, size
        return True

    def _small(self, staged: Staged) -> bytes:
        """All bytes of a small item."""
        if self.checksum:
            data = to_bytes(staged.layout, staged.arrays)
            staged.tail = self.sealed(staged, data)
            return data + staged.tail
        return to_bytes(staged.layout, staged.arrays, staged.tail)

    def sealed(self, staged: Staged, buffer: mmap.mmap | bytes) -> bytes:
        """The footer with the checksum of the blocks in `buffer`; it is as long as without."""
        end = staged.layout.end
        return footer.pack(
            end, staged.put_time, staged.id, staged.names, staged.meta, checksum_of(buffer, end)
        )

    def write_new(self, staged: Staged) -> None:
        """Write it to a new file in `tmp/`. A crash leaves it there under a crashed session's token."""
        if staged.name:
            fs.unlink_missing_ok(self.session.directories.tmp, staged.name)  # of a try before
        staged.file, staged.loan = None, False
        layout, arrays, end = staged.layout, staged.arrays, staged.layout.end
        size = rounded(staged.need)

        def fill(fd: int) -> None:
            tail = staged.tail + bytes(size - staged.need)
            if size <= SMALL:
                fs.write_whole(fd, to_bytes(layout, arrays, tail))
            else:
                fs.save(fd, arrays, layout, tail)
            if self.checksum:
                with fs.map_file(fd, end) as written:
                    staged.tail = self.sealed(staged, written)
                fs.pwrite(fd, staged.tail[: footer.SIZE], end)
            if self.durable:
                fs.sync(fd)

        staged.name, _ = self._make_file(size, fill)
        staged.size = size

    def _make_file(self, size: int, fill: Callable[[int], T]) -> tuple[str, T]:
        """A new file in `tmp/`, filled; its name, and what `fill` returned.

        Raises Full when the file system or a quota is full, StorageError for any other failure; the file is then
        removed.
        """
        directories = self.session.directories
        name = f"{token_name(self.session.token)}-{next(self._numbers)}.npy"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | fs.CAREFUL
        recycler, session = self.recycler, self.session
        while True:
            while lacking := recycler.lacking(size):
                if not recycler.let_give_way(lacking):
                    raise Full(f"{session.path}: its file system is full: it has not {size} bytes free now")
            try:
                try:
                    fd = fs.open_at(name, flags, directories.file_mode, dir_fd=directories.tmp)
                except FileNotFoundError:
                    session.step(session.see_itself)
                    fd = fs.open_at(name, flags, directories.file_mode, dir_fd=directories.tmp)
                try:
                    if self._is_masked is None:
                        self._is_masked = stat.S_IMODE(fs.fstat(fd).st_mode) != directories.file_mode
                    if self._is_masked:
                        fs.fchmod(fd, directories.file_mode)
                    return name, fill(fd)
                except BaseException:
                    fs.unlink_missing_ok(directories.tmp, name)
                    raise
                finally:
                    fs.close(fd)
            except SpoolError:
                raise
            except OSError as error:
                if not fs.is_shortage(error):
                    where = str(directories.path / "tmp" / name)
                    raise fs.storage_error(error, where) from error
                # Whatever statvfs says: a quota may be used up, and others may have been faster.
                if not recycler.let_give_way(size):
                    self.no_space = self.space(session.look())
                    what = f"{session.path}: its file system is full: {size} bytes do not fit now"
                    raise Full(what) from error

    def lost(self) -> SpoolError:
        """The error for a staged file that is gone: another thread closes the session, or `items/` takes none."""
        if self.session.leaving:
            return SpoolClosed(self.session.end)
        what = f"items/ takes no file any more; run: spoolipc fsck --repair {self.session.path}"
        return StorageError(errno.ENOENT, what, self.session.path)

    def make_mapped(self, size: int) -> tuple[str, mmap.mmap, os.stat_result]:
        """A new file of `size` bytes in `tmp/`, mapped to be written. Raises what `_make_file` does.

        Its blocks are allocated first: a store to a hole of a full file system would end the process.
        """

        def fill(fd: int) -> tuple[mmap.mmap, os.stat_result]:
            fs.allocate(fd, 0, size)
            return fs.map_file(fd, size, writable=True, populate=True), fs.fstat(fd)

        name, (buffer, status) = self._make_file(size, fill)
        return name, buffer, status

    def unstage(self, staged: Staged) -> None:
        """Remove what was staged and not committed. What a close meanwhile leaves is a crashed session's."""
        try:
            if staged.file is not None and staged.loan:
                self.recycler.discard(staged.file)  # whoever filled it may still write to it
            elif staged.file is not None:
                self.recycler.has_strays = True
            elif staged.name:
                fs.unlink_missing_ok(self.session.directories.tmp, staged.name)
        except SpoolClosed:
            pass

    def clear(self) -> bool:
        """Remove some of what this session still has in `tmp/`; whether more is left. A step."""
        directories, token = self.session.directories, self.session.token
        names = set(fs.list_names(directories.tmp)) - directories.stuck
        ours = [name for name in names if temporary_owner(name) == token]
        for name in ours[:MOST_RESERVED]:
            directories.remove("tmp", name)
        return len(ours) > MOST_RESERVED

    def map_reserved(self, staged: Staged) -> mmap.mmap | None:
        """The mapping of a consumed file to be lent, None where there is none."""
        free, mappings = self.session.directories.free, self.recycler.mappings
        while (file := self.recycler.pick(staged.need, self.most(staged.need))) is not None:
            try:
                status = fs.stat_at(file.name, dir_fd=free)
                check_regular(status)
                if status.st_nlink == 1 and status.st_size == file.size:
                    buffer = mappings.of(free, file.name, status, file.number, file.record)
                    staged.file, staged.size = file, file.size
                    return buffer
            except (BadItem, FileNotFoundError):
                pass  # not as it should be any more
            except BaseException:
                self.recycler.has_strays = True
                raise
            self.recycler.discard(file)
        return None
