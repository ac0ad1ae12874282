"""Dead letters: what they are, why, and what to do with them.

A dead letter is an item that was rejected, failed in every attempt or was damaged (`quarantine.py` says where it is),
with its history in `failed/SEQ.jsonl`. To retry one is a put whose file is there already: one transition that renames
the file into `items/` under a new number. To drop one is to unlink it.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable

from ..errors import BadItem, NoSuchItem, StorageError, shut_down
from ..format.footer import Footer
from ..message import DeadLetter, Retried, StoredArray, numbers_of
from . import fs, transitions
from . import table as W
from .itemfile import ItemFile
from .layout import Directories
from .quarantine import failed_numbers, forget_history, letter_at, read_history
from .session import Session
from .visitor import Visitor, administration

_log = logging.getLogger("spoolipc")


def failed_list(path: str | os.PathLike[str], seqs: Iterable[int] | None) -> list[DeadLetter]:
    """The dead letters of the spool at `path`, in the order in which they were put. Raises NoSuchItem."""
    with fs.as_owner(path), Visitor(path) as visitor:
        numbers = _wanted(visitor.directories, seqs)
        return [letter for number in numbers if (letter := _letter(visitor.directories, number))]


def failed_retry(path: str | os.PathLike[str], seqs: Iterable[int] | None) -> Retried:
    """Requeue dead letters at the end of the queue. Raises NoSuchItem, ShutDown."""
    done: dict[int, int] = {}
    damaged: dict[int, str] = {}
    with administration(path) as session:
        directories = session.directories
        for number in _wanted(directories, seqs):
            part, name = letter_at(directories, number)
            try:
                with ItemFile(directories.places[part], name) as file:
                    _, tail = file.parse()
            except FileNotFoundError:
                continue  # somebody else was first
            except BadItem as error:
                damaged[number] = str(error)
                _log.warning("%s: item %d stays a dead letter: %s", session.path, number, error)
                continue
            seq = session.step(_requeue, session, number, file.size, tail)
            if seq is not None:
                done[number] = seq
        if done:
            fs.sync(directories.items)
    return Retried(done, damaged)


def failed_drop(path: str | os.PathLike[str], seqs: Iterable[int] | None) -> list[int]:
    """Remove dead letters and their histories for good; returns their numbers. Raises NoSuchItem, and StorageError for
    a directory that somebody has planted."""
    with administration(path) as session:
        wanted = _wanted(session.directories, seqs)
        return [number for number in wanted if session.step(drop_letter, session, number)]


def _wanted(directories: Directories, seqs: Iterable[int] | None) -> list[int]:
    """The numbers of these dead letters, or of all, in order. Raises NoSuchItem."""
    there = failed_numbers(directories)
    wanted = there if seqs is None else numbers_of(seqs)
    if missing := set(wanted).difference(there):
        what = (
            f"{directories.path}: has no dead letter {min(missing)}; spoolipc failed list tells those it has"
        )
        raise NoSuchItem(what)
    return wanted


def _letter(directories: Directories, number: int) -> DeadLetter | None:
    """A dead letter as the files tell it; None when it is gone."""
    part, name = letter_at(directories, number)
    directory = directories.places[part]
    try:
        size = fs.stat_at(name, dir_fd=directory).st_size
        failures = read_history(directories, number)
        arrays: tuple[StoredArray, ...] = ()
        meta, put_time, damage = None, None, ""
        try:
            with ItemFile(directory, name) as file:
                blocks, tail = file.parse()
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
        path=str(directories.path / part / name),
        bytes=size,
        reason=failures[-1].why if failures else "unknown: its history is lost",
        attempts=max((failure.attempt for failure in failures), default=0),
        history=failures,
        arrays=arrays,
        meta=meta,
        put_time=put_time,
        damage=damage,
    )


def _requeue(session: Session, number: int, size: int, tail: Footer) -> tuple[int | None, int, int]:
    """Put a dead letter; None when it is gone. A crash after the transition leaves the old history, which belongs to
    no item any more: `gc` removes it. A step."""
    journal, directories = session.journal, session.directories
    if journal.words[W.SHUTDOWN]:
        raise shut_down(session.path)
    part, name = letter_at(directories, number)
    if not fs.exists(directories.places[part], name):
        return None, 0, 0
    record = journal.unused_record()
    words = journal.words
    seq = transitions.next_seq(words)
    # Whether its file survives power loss is not known any more: it is never written again, as one that does.
    flags = W.NEVER_AGAIN | (0 if not tail.names and tail.meta is None else W.HAS_METADATA)
    at = (record + W.ITEM_AT) * W.WORD
    W.ITEM.pack_into(journal.map, at, seq, max(0, tail.put_time), 0, flags, tail.data_end, 0, 0, 0, 0)
    journal.commit(transitions.put_new(words, record, size, part, name))
    forget_history(directories, number)
    return seq, 1, 0


def drop_letter(session: Session, number: int) -> tuple[bool, int, int]:
    """Remove a dead letter; false when it is gone already. A crash after the first call leaves a history of no item.
    A step, so that nobody retries it meanwhile."""
    directories = session.directories
    part, name = letter_at(directories, number)
    try:
        fs.unlink(name, dir_fd=directories.places[part])
    except FileNotFoundError:
        return False, 0, 0
    except IsADirectoryError as error:
        where = str(directories.path / part / name)
        what = "is a directory, which spoolipc did not make; remove it"
        raise StorageError(errno.EISDIR, what, where) from error
    forget_history(directories, number)
    return True, 0, 0
