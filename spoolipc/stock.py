"""A writer's stock: consumed files it has reserved, mappings it keeps, arrays it has lent."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from . import footer, npy, pool, spares
from . import words as W
from .alive import token_name
from .engine import Payload
from .errors import BadItem, StorageError
from .holds import Hold, Holds
from .layout import Limits
from .maps import MOST_MAPPED, Maps, check_regular, write_small
from .newfile import SMALL
from .party import Party
from .preallocate import preallocate
from .room import PAGE, rounded
from .spares import Spare
from .tend import tend

T = TypeVar("T")
_ENOUGH = 4
"""Mapped files with which one is most likely free when the next is reserved."""
MOST_SPARES = 64
CHEAP = 4 << 20
"""Bytes up to which one new file costs less than going without a file reserved ahead."""


@dataclass(slots=True)
class FileDraft:
    """A payload in a file not yet in `items/`: a spare, or the file `name` in `tmp/`.

    need: bytes written. size: bytes of the file. put_time: wall clock, ns. lent: the payload's array is the
    file's own memory. hold: who looks at that.
    """

    payload: Payload
    image: npy.Image
    tail: bytes
    put_time: int
    need: int
    buffer: mmap.mmap | None = None
    status: os.stat_result | None = None
    spare: Spare | None = None
    name: str = ""
    size: int = 0
    lent: bool = False
    hold: Hold | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How an array of one kind is stored, for the next of that kind.

    header: its bytes, which end at `start`. start, end: where the array's bytes lie. need: bytes with the footer.
    most: size up to which a consumed file is not too large. pool: where the index links to such files.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    header: bytes
    start: int
    end: int
    need: int
    most: int
    pool: int


class Stock:
    """A writer's party, and the files it may write. asked: limits, None for what is there.

    durable: every item must survive the loss of power, so no consumed file is written again. short: how many
    files more in circulation would let a commit find its successors in the pool. places: how many more items there was
    room for when the last was put.
    """

    def __init__(self, path: str | os.PathLike[str], asked: Limits, *, durable: bool) -> None:
        self.party = Party(path, asked)
        self.durable = durable
        self._forget()
        self.party.on_adopt = self._forget
        self.party.run(tend, force=True)

    def _forget(self) -> None:
        """Start afresh: the index is another, or this is a forked child."""
        self.spares: list[Spare] = []
        self.holds = Holds()
        self.maps = Maps(writable=True, most_bytes=MOST_MAPPED)
        self.short = 0
        self.plan: Plan | None = None
        self.places = 0

    def keeps_to_mapped(self, need: int) -> bool:
        """Whether only a file that is mapped is worth being reserved ahead: each is large, and some go round."""
        return need >= pool.LARGE and len(self.maps) >= _ENOUGH

    def lack(self, need: int) -> None:
        """A commit found no file of the kind for the next put: let there be more of them, where that is cheap."""
        if need < CHEAP:
            self.short = min(self.short + 1, MOST_SPARES if need <= SMALL else 1)

    def take_spare(self, need: int) -> Spare | None:
        """A consumed file of the right size that is ours to write."""
        most = self.most(need)
        spare = self._fitting(need, most)
        if spare is not None:
            return spare
        useless = self._clear()
        if self.short and not useless:
            # One file more in circulation, so that the next commit finds one to reserve in the same step.
            self.short -= 1
            return None
        if not useless and not self.party.look()[W.POOL_COUNT]:
            return None
        return self.party.run(spares.swap, useless, need, most, self.maps)

    def _fitting(self, need: int, most: int) -> Spare | None:
        for spare in list(self.spares):
            if need <= spare.size <= most:
                with contextlib.suppress(ValueError):  # another thread has it
                    self.spares.remove(spare)
                    return spare
        return None

    def _clear(self) -> list[Spare]:
        """Take all spares. The list itself stays, as other threads add to it and take from it."""
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self.spares.pop())
        return taken

    def most(self, need: int) -> int:
        """Size up to which a consumed file may be used for `need` bytes: exact where bytes are limited."""
        return rounded(need) if self.party.index.words[W.MAX_BYTES] else max(PAGE, 2 * need)

    def map_spare(self, spare: Spare) -> mmap.mmap | None:
        """The bytes of a consumed file; None when it is not fit to be written any more and was dropped."""
        free = self.party.layout.free
        return self._use(
            spare, lambda name, status: self.maps.of(free, name, status, spare.birth, spare.record)
        )

    def write_spare(self, spare: Spare, data: bytes) -> bool:
        """Write a small consumed file without a map; False when it is not fit any more and was dropped."""
        free = self.party.layout.free
        return self._use(spare, lambda name, _: write_small(free, name, data)) is not None

    def _use(self, spare: Spare, use: Callable[[str, os.stat_result], T]) -> T | None:
        """What `use` makes of a consumed file that is still as it should be; else it is dropped."""
        layout, name = self.party.layout, spare.name
        try:
            status = os.stat(name, dir_fd=layout.free, follow_symlinks=False)
            check_regular(status)
            if status.st_nlink != 1 or status.st_size != spare.size:
                raise BadItem("the file is linked elsewhere or has changed its size")
            return use(name, status)
        except BadItem:
            self.drop(spare)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                self.put_aside(spare)
                raise StorageError(error.errno, error.strerror, str(layout.path / "free" / name)) from error
            self.drop(spare)
        return None

    def drop(self, spare: Spare) -> None:
        self.maps.forget(spare.birth)
        self.party.run(spares.drop, spare)

    def stock(self, payloads: Sequence[Payload]) -> None:
        """Reserve consumed files for several payloads in one step."""
        if self.durable or not self.party.look()[W.POOL_COUNT]:
            return
        needs = [need_of(payload) for payload in payloads[:MOST_SPARES]]
        fresh = self.short if max(needs, default=0) <= SMALL else 0
        wanted = [(need, self.most(need)) for need in needs[fresh:]]
        if spares.suffice(list(self.spares), wanted):
            return
        useless = self._clear()
        with self.party:
            self.spares += self.party.run(spares.restock, useless, wanted, self.maps)

    def preallocate(self, count: int, nbytes: int) -> None:
        """Fill the pool ahead with files for `count` arrays of `nbytes` bytes. Raises Full, ValueError."""
        with self.party:
            preallocate(self.party, self.maps, count, nbytes, f"{token_name(self.party.token)}-0")

    def put_aside(self, spare: Spare) -> None:
        """Keep a spare after all, unless an interrupted commit has made it an item."""
        if self.party.run(spares.is_ours, spare):
            self.spares.append(spare)


def need_of(payload: Payload) -> int:
    end = npy.image_of(payload.arrays).end
    if payload.names is None and payload.meta is None:
        return rounded(end + footer.SIZE)
    return rounded(end + len(footer.pack(end, 0, names=payload.names, meta=payload.meta)))
