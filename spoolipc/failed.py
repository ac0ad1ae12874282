"""Dead letters: what lies in `failed/`, why, and what to do with it.

A dead letter is `failed/SEQ.npy`, an item that was rejected, failed in every attempt or was damaged, with its
history in `failed/SEQ.jsonl`. To retry one is a put whose file is there already: one change that renames the
file into `items/` under a new number. To drop one is a change that renames it into `free/`, where `gc` finds
it if the unlinking that follows is never reached. Either way the count of dead letters changes with the
rename.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from . import changes, header, history, npy
from . import words as W
from .checksum import verify
from .errors import BadItem, NoSuchItem, ShutDown, StorageError
from .footer import Footer
from .history import Failure
from .index import exists, unlink_missing_ok
from .layout import Layout, Limits, item_name
from .maps import OPEN_FILE, check_regular
from .onlooker import Onlooker
from .party import Party

_log = logging.getLogger("spoolipc")
Blocks = tuple[header.Block, ...]


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array of an item. name: None unless the item was put as a dict. nbytes: of its data."""

    name: str | None
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An item in `failed/`.

    seq: the number it was put under. path: its file, which np.load reads if it is not damaged. bytes: of the
    file. reason: why it was given up; attempts: how often it was delivered; history: every failure known,
    oldest first. arrays, meta, put_time (wall clock, seconds): what the file says; none of it when `damage`
    says why it cannot be read.
    """

    seq: int
    path: str
    bytes: int
    reason: str
    attempts: int
    history: tuple[Failure, ...]
    arrays: tuple[StoredArray, ...]
    meta: Any
    put_time: float | None
    damage: str


@dataclass(frozen=True, slots=True)
class Retried:
    """What `failed_retry` did. seqs: the new number of each item put back, by its old one.
    damaged: why those that cannot be read were left where they are."""

    seqs: dict[int, int]
    damaged: dict[int, str]


def failed_list(path: str | os.PathLike[str]) -> list[DeadLetter]:
    """The dead letters of the spool at `path`, in the order in which they were put. Changes nothing.

    Raises NotASpool, UnsafeSpool, NetworkFileSystem, UnknownVersion.
    """
    with Onlooker(path) as spool:
        layout = spool.layout
        return [letter for number in history.failed_numbers(layout) if (letter := _letter(layout, number))]


def failed_show(path: str | os.PathLike[str], seq: int) -> DeadLetter:
    """One dead letter of the spool at `path`. Raises NoSuchItem, and what `failed_list` raises."""
    with Onlooker(path) as spool:
        letter = _letter(spool.layout, seq)
        if letter is None:
            raise _no_such_item(spool.layout, seq)
        return letter


def failed_retry(path: str | os.PathLike[str], seqs: Iterable[int] | None = None) -> Retried:
    """Put dead letters back at the end of the queue, as new puts: new numbers, no attempts, no history.

    seqs: their numbers, None for all. `maxsize` and `max_bytes` do not hold them back: their bytes are there
    already. Those that cannot be read stay. Crash-safe: a dead letter is in one place or the other.

    Raises NoSuchItem, before anything is done, for a number that is no dead letter; ShutDown when the spool
    takes no puts; and what SpoolWriter raises.
    """
    done: dict[int, int] = {}
    damaged: dict[int, str] = {}

    def work(party: Party, number: int) -> None:
        try:
            size, _, tail = read_item(party.layout, party.layout.failed, number)
        except FileNotFoundError:
            return  # somebody else was first
        except BadItem as error:
            damaged[number] = str(error)
            _log.warning("%s: item %d stays in failed/: %s", party.path, number, error)
            return
        seq = party.run(_put_again, number, size, tail)
        if seq is not None:
            done[number] = seq

    def last(party: Party) -> None:
        if done:
            os.fsync(party.layout.items)

    _each(path, seqs, work, last)
    return Retried(done, damaged)


def failed_drop(path: str | os.PathLike[str], seqs: Iterable[int] | None = None) -> list[int]:
    """Remove dead letters and their histories for good; returns their numbers.

    seqs: their numbers, None for all. Raises NoSuchItem, before anything is done, for a number that is no
    dead letter; StorageError for a directory that somebody has planted; and what SpoolReader raises.
    """
    done: list[int] = []

    def work(party: Party, number: int) -> None:
        if party.run(_drop, number):
            done.append(number)

    _each(path, seqs, work, _nothing)
    return done


def _nothing(party: Party) -> None:
    """The last step of a party that has nothing in its hands."""


def _each(
    path: str | os.PathLike[str],
    seqs: Iterable[int] | None,
    work: Callable[[Party, int], None],
    last: Callable[[Party], None],
) -> None:
    """Do `work` for each of `seqs` that are all there, or for every dead letter, and then `last`."""
    party = Party(path, Limits(), create=False)
    try:
        with party:
            there = history.failed_numbers(party.layout)
            wanted = there if seqs is None else sorted(set(seqs))
            if missing := sorted(set(wanted) - set(there)):
                raise _no_such_item(party.layout, missing[0])
            for number in wanted:
                work(party, number)
            last(party)
    finally:
        party.close(_nothing)


def _no_such_item(layout: Layout, seq: int) -> NoSuchItem:
    return NoSuchItem(f"{layout.path} has no dead letter {seq}; failed_list() tells those it has")


def read_item(
    layout: Layout, directory: int, number: int, *, whole: bool = False
) -> tuple[int, Blocks, Footer]:
    """The size, blocks and footer of an item's file; its data untouched, or `whole` compared with the checksum
    it may have. Raises BadItem, OSError."""
    name = item_name(number)
    check_regular(os.stat(name, dir_fd=directory, follow_symlinks=False))
    fd = os.open(name, os.O_RDONLY | OPEN_FILE, dir_fd=directory)
    try:
        status = os.fstat(fd)
        check_regular(status)
        if not status.st_size:
            raise BadItem("the file is empty")
        with mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ) as buffer:
            blocks, tail = npy.parse(buffer, status.st_size)
            if whole:
                verify(buffer, tail)
        return status.st_size, blocks, tail
    finally:
        os.close(fd)


def _letter(layout: Layout, number: int) -> DeadLetter | None:
    """A dead letter as the files tell it; None when it is gone."""
    try:
        size = os.stat(item_name(number), dir_fd=layout.failed, follow_symlinks=False).st_size
        failures = history.read(layout, number)
        arrays: tuple[StoredArray, ...] = ()
        meta, put_time, damage = None, None, ""
        try:
            _, blocks, tail = read_item(layout, layout.failed, number)
            names = tail.names or (None,) * len(blocks)
            arrays = tuple(
                StoredArray(name, str(block.dtype), block.shape, block.nbytes)
                for name, block in zip(names, blocks, strict=True)
            )
            meta, put_time = tail.meta, tail.put_time / 1e9
        except BadItem as error:
            damage = str(error)
    except FileNotFoundError:
        return None
    return DeadLetter(
        seq=number,
        path=str(layout.path / "failed" / item_name(number)),
        bytes=size,
        reason=failures[-1].why if failures else "unknown: its history is lost",
        attempts=max((failure.attempt for failure in failures), default=0),
        history=failures,
        arrays=arrays,
        meta=meta,
        put_time=put_time,
        damage=damage,
    )


def _put_again(party: Party, number: int, size: int, tail: Footer) -> int | None:
    """The locked step of a retry; None when the dead letter is gone. A crash after the change leaves the
    old history, which belongs to no item any more: `gc` removes it."""
    index, layout = party.index, party.layout
    if index.words[W.SHUTDOWN]:
        raise ShutDown(f"the spool {party.path} was shut down; SpoolWriter(path, reopen=True) opens it again")
    if not exists(layout.failed, number):
        return None
    record = index.new_record()
    words = index.words
    seq = changes.next_seq(words)
    # Whether its file survives power loss is not known any more: it is never written again, as one that does.
    changes.describe(index, record, seq, max(0, tail.put_time), W.DURABLE, 0, tail.data_end)
    stores = changes.put_new(index, record, seq, size)
    stores[W.FAILED_COUNT] = max(0, words[W.FAILED_COUNT] - 1)
    index.change(W.ARRIVE, seq, stores, _move(layout.failed, item_name(number), layout.items, item_name(seq)))
    history.forget(layout, number)
    party.news("items")
    return seq


def _drop(party: Party, number: int) -> bool:
    """The locked step of a drop; False when the dead letter is gone already."""
    index, layout = party.index, party.layout
    name = item_name(number)
    try:
        mode = os.stat(name, dir_fd=layout.failed, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        where = str(layout.path / "failed" / name)
        raise StorageError(errno.EISDIR, "is a directory, which spoolipc did not make; remove it", where)
    stores = {W.FAILED_COUNT: max(0, index.words[W.FAILED_COUNT] - 1)}
    index.change(W.DONATE, number, stores, _move(layout.failed, name, layout.free, name))
    unlink_missing_ok(layout.free, name)
    history.forget(layout, number)
    return True


def _move(source: int, name: str, target: int, new_name: str) -> Callable[[], None]:
    return lambda: os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)
