"""`gc`: what dead parties left in a spool is put back or removed, however much it is.

Each kind of leftover is judged by something final: a token whose lock can be taken is dead for ever, a number
that left the index never comes back. So names are listed a batch at a time, judged in a locked step of about
a millisecond, and removed without the lock. Two sweeps at once find some of it gone already; one that is
killed leaves the rest to the next.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import alive, shutdown
from . import words as W
from .census import AnySpool, Progress, batches, dead_among, strangers_at_top, token_of
from .history import history_number
from .index import Index, exists
from .layout import Limits, item_name, item_number
from .ledger import table
from .onlooker import Onlooker
from .party import Party
from .retrieval import abandoned, foreseen, settle
from .tend import temporary_owner

Numbers = npt.NDArray[np.uint64]
_FREE_BATCH = 16384


@dataclass(frozen=True, slots=True)
class GcReport:
    """What `gc` did, or would do where `dry_run` says so.

    temporary_files: removed from `tmp/`, their writer being dead. returned_items: taken back from dead
    readers, to be delivered again. given_up_items: likewise, but that was their last attempt; they are in
    `failed/`. abandoned_files: consumed files that a dead reader looked at or a dead writer was writing.
    orphaned_files: in `free/` but unknown to the index. orphaned_histories: in `failed/`, of items that are
    no more. stale_parties: removed from `alive/`. half_written: replacements of `index` and `spool.json`
    never finished. discarded_items: items of a spool that was shut down at once, which nobody gets.
    index_rebuilt: the index was damaged. strangers: names that are none of ours, left alone. bytes_freed:
    disk blocks that the files removed had (st_blocks * 512); what another process has open or mapped comes
    back when it lets go.
    """

    path: str
    dry_run: bool
    temporary_files: int = 0
    returned_items: int = 0
    given_up_items: int = 0
    abandoned_files: int = 0
    orphaned_files: int = 0
    orphaned_histories: int = 0
    stale_parties: int = 0
    half_written: int = 0
    discarded_items: int = 0
    index_rebuilt: bool = False
    strangers: int = 0
    bytes_freed: int = 0


def gc(path: str | os.PathLike[str], *, dry_run: bool = False, progress: Progress | None = None) -> GcReport:
    """Put back and remove what dead parties left in the spool at `path`; live work is never touched.

    dry_run: only say what would be done; changes nothing. progress: called now and then with the number of
    names looked at, and None.

    Safe at any time: during traffic, several at once, and when killed, after which another one finishes.
    Raises NotASpool, UnsafeSpool, UnknownVersion, LockTimeout, SpoolGone, StorageError.
    """
    with Onlooker(path) as outside:
        outside.look()
        damaged = outside.damage != ""
        if dry_run:
            sweep = _Sweep(outside, None, progress)
            sweep.run()
            return GcReport(outside.path, True, index_rebuilt=damaged, **sweep.counts)
    party = Party(path, Limits(), create=False)
    try:
        sweep = _Sweep(party, party, progress)
        with party:
            sweep.run()
    finally:
        party.close(_nothing)
    return GcReport(party.path, False, index_rebuilt=damaged, **sweep.counts)


def _nothing(party: Party) -> None:
    """The last step of a party that has nothing in its hands."""


class _Sweep:
    """One round over a spool. party: None for a dry run, which only looks."""

    def __init__(self, spool: AnySpool, party: Party | None, progress: Progress | None) -> None:
        self.spool = spool
        self.party = party
        self.progress = progress
        self.counts: Counter[str] = Counter()
        self._seen = 0

    def run(self) -> None:
        """Everything, in the order that lets one kind of leftover become another before that is looked
        for."""
        self._claims()
        self._discarded()
        self._half_written()
        self._temporary_files()
        self._free_files()
        self._failed()
        self._parties()
        layout = self.spool.layout
        self.counts["strangers"] += len(strangers_at_top(layout))
        for names in batches(layout.items):
            self._looked_at(names, sum(item_number(name) is None for name in names))

    def _looked_at(self, names: list[str], strangers: int) -> None:
        self.counts["strangers"] += strangers
        self._seen += len(names)
        if self.progress is not None:
            self.progress(self._seen, None)

    def _remove(self, directory: int, name: str, kind: str) -> None:
        """Remove one file and count it; what is no regular file was planted and stays."""
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                self.counts["strangers"] += 1
                return
            if self.party is not None:
                os.unlink(name, dir_fd=directory)
        except FileNotFoundError:
            return  # another sweep was first
        self.counts[kind] += 1
        if status.st_nlink == 1:
            self.counts["bytes_freed"] += status.st_blocks * 512

    def _claims(self) -> None:
        index, records = self.spool.run(abandoned)
        done = 0
        while done < len(records) and index is not None:
            if self.party is None:
                self.counts += foreseen(self.spool, index, records)
                return
            step, counts = self.party.run(settle, index, records[done:])
            done += step
            self.counts += counts
            self._looked_at([], 0)

    def _discarded(self) -> None:
        if self.party is not None:
            more = True
            while more:
                more, counts = self.party.run(_discard)
                self.counts += counts
        elif self.spool.index is not None and self.spool.index.words[W.SHUTDOWN] == W.DISCARDED:
            words = self.spool.index.words
            waiting = words[W.READY_COUNT] + words[W.RETURNED_COUNT] + self.counts["returned_items"]
            self.counts["discarded_items"] += waiting
            self.counts["bytes_freed"] += words[W.ITEM_BYTES]

    def _half_written(self) -> None:
        self.spool.run(_each, self, self.spool.layout.root, ["index.new", "spool.json.new"], "half_written")

    def _temporary_files(self) -> None:
        directory = self.spool.layout.tmp
        for names in batches(directory):
            owners = {name: temporary_owner(name) for name in names}
            dead = self.spool.run(dead_among, set(owners.values()) - {0})
            for name, owner in owners.items():
                if owner in dead:
                    self._remove(directory, name, "temporary_files")
            self._looked_at(names, sum(not owner for owner in owners.values()))

    def _free_files(self) -> None:
        directory = self.spool.layout.free
        for names in batches(directory, _FREE_BATCH):
            found = [number for number in map(item_number, names) if number is not None and number < 2**64]
            for number in self._orphans(np.array(found, np.uint64)).tolist():
                self._remove(directory, item_name(number), "orphaned_files")
            self._looked_at(names, len(names) - len(found))

    def _orphans(self, listed: Numbers) -> Numbers:
        """Which files of `free/`, listed before, no record stands for.

        A file enters `free/` in the locked step that has or makes its record, and is renamed or unlinked
        before that record is given up: so in an index seen after the listing, a file that is still there and
        in use has its record. The records are read without the lock; a step before and after makes
        sure that it is the spool's index, with no change unfinished.
        """
        while True:
            index = self.spool.run(_index)
            if index is None:
                return listed  # a rebuild removes every file of free/
            orphans = np.setdiff1d(listed, _known_files(index.words))
            if self.party is None or not orphans.size or self.party.run(_index) is index:
                return orphans

    def _failed(self) -> None:
        for names in batches(self.spool.layout.failed):
            histories = [name for name in names if history_number(name) is not None]
            self.spool.run(_orphaned_histories, self, histories)
            known = sum(item_number(name) is not None for name in names) + len(histories)
            self._looked_at(names, len(names) - known)

    def _parties(self) -> None:
        directory = self.spool.layout.alive
        for names in batches(directory):
            tokens = set(map(token_of, names)) - {0}
            for token in self.spool.run(dead_among, tokens):
                self._remove(directory, alive.token_name(token), "stale_parties")
            self._looked_at(names, len(names) - len(tokens))


def _known_files(words: memoryview[int]) -> Numbers:
    """The numbers of all files that records of an index stand for."""
    records = table(words)
    files: Numbers = records[records[:, W.STATE] != W.NOTHING, W.FILE]
    return files


def _index(spool: AnySpool) -> Index | None:
    return spool.index


def _each(spool: AnySpool, sweep: _Sweep, directory: int, names: Iterable[str], kind: str) -> None:
    """Remove names in the locked step, as only its holder may be making them."""
    for name in names:
        sweep._remove(directory, name, kind)


def _orphaned_histories(spool: AnySpool, sweep: _Sweep, names: list[str]) -> None:
    """An item moves from items/ to failed/ and not back, so it is looked for in that order."""
    layout = spool.layout
    gone = [
        name
        for name in names
        if (number := history_number(name)) is not None
        and not exists(layout.items, number)
        and not exists(layout.failed, number)
    ]
    _each(spool, sweep, layout.failed, gone, "orphaned_histories")


def _discard(party: Party) -> tuple[bool, Counter[str]]:
    """Remove some of the items that wait in a spool that was shut down at once."""
    words = party.index.words
    if words[W.SHUTDOWN] != W.DISCARDED:
        return False, Counter()
    waiting, size = words[W.READY_COUNT] + words[W.RETURNED_COUNT], words[W.ITEM_BYTES]
    more = shutdown.discard(party)
    gone = waiting - words[W.READY_COUNT] - words[W.RETURNED_COUNT]
    return more, Counter(discarded_items=gone, bytes_freed=size - words[W.ITEM_BYTES])
