"""The engine of one machine: a spool is a directory, an item a plain `.npy` file in it.

The files hold the data. The table, a memory-mapped file, holds what becomes of them; it is built again from the
directories at any time. Read from the top: `producer`, `consumer`, then what they stand on. `docs/format.md` has every
byte, `docs/design.md` the reasons.

         first put            take, ack
    tmp/ ----------> items/ ------------> free/ pinned ---- array gone ----> free/ pooled
                     ^ |  ^                                                       |
                     | |  '--- later puts ---- free/ reserved <--- next file -----'
               retry | | rejected, failed too often, damaged
                     | v
                   failed/

    in items/:  waiting -- claim --> in flight -- nack, crash, lease ended --> waiting, or delayed for a while

Seven ways in. "The lock" is the flock on `items/`, held for microseconds and never around array bytes; "a step" is
`Session.step`, which takes it and makes sure of the table first.

put (`producer.put`). Room is looked at without the lock. A reserved file, or a new one in `tmp/`, is written without
the lock. One step: `transitions.put` renames it into `items/` and reserves the next file. A crash before the rename
leaves a file that only housekeeping sees; after it, an item.

take (`consumer.take`). Items are opened without the lock. One step: `transitions.consume` renames each to `free/`. A
crash before the rename leaves the item waiting; after it the item is gone, and its file is pinned by a crashed session.

claim, settle (`consumer.claim`, `settle`). A step each, the work between them without the lock. A claim moves no file.
A crash before settling leaves an item in flight at a crashed session, which the next round of housekeeping requeues.

loan (`producer.loan`). As put, but the caller writes into the mapping itself. After the commit he may keep the array;
the file then bears his token in LOAN, and comes back to him. A crash before the commit leaves what a put leaves.

a round of housekeeping (`housekeeping.round_of`). One bounded step a second, by whoever is at work or waits: requeues
what crashed sessions and ended leases had, ends delays, removes their files in `tmp/` and `alive/`, trims the pool.
`gc` does all of it in many steps. Everything is judged by something final, so a crash leaves the rest to the next.

open, rebuild (`session.Session`, `rebuild.rebuild`). Opening makes what is missing, `spool.json` last, then one step:
agree on limits, lock `alive/TOKEN`. A step that finds the table missing, damaged or of an earlier boot builds it again
from the listing of `items/`, all under the lock, and renames it into place: a crash leaves the old one, or none.

forward (`forwarding.put_forwarded`). As put, always to a new file; in the step of the commits, and before them, these
files are noted in `sources.json`. A crash leaves files that are there and were not put, and files that are gone and
were: whoever finds it strikes out the former (`sources.settle`), the others are known when they are delivered again.

A crash within a step: MARK in the table names the transition under way. The next holder of the lock asks the directory
whether its file was moved, and finishes or forgets it (`journal.recover`).

Words:

    session          an open spool, alive as long as it holds the lock on alive/TOKEN: a writer, a reader, or an admin
                     that works for one call. A visitor only looks and is no session
    crashed session  one whose lock can be taken. One whose file somebody removed may live, and makes it again
    item             a file in items/: waiting, in flight at a reader, or delayed
    in flight        received and not settled. To settle: ack, nack, reject, extend
    requeue          let an item wait again, before all never delivered; to redeliver is that, unless it was the last
                     attempt, after which it is dead-lettered
    dead letter      an item in failed/. To set a bad file aside is to quarantine it there
    consumed file    what an item leaves in free/: pinned by arrays that show it, reserved by a writer, or pooled
    loan             an array over a reserved file, computed in place
    stage, commit    write a file nobody sees; make it an item. Staged files are in tmp/, or reserved
    transition       one change of the table and at most one of a name, made whole or not at all
    table, index     the words; the file that holds them. A record stands for one file, the journal for one transition
    number of a file the sequence number under which it was first an item: its name whenever it is in free/
    doorbell         alive/TOKEN as what a waiting session watches and others write to
    foreign file     a name that is none of the spool's
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from ..engine import ConsumerOptions, ProducerOptions
from ..errors import NotASpool
from ..message import DeadLetter, GcReport, Limits, Progress, Retried, SpoolStat
from . import gc as sweep
from .dead_letters import failed_drop, failed_list, failed_retry
from .forwarding import DirectoryDestination, DirectorySource
from .pair import DirectoryPair
from .reset import purge, remove, set_limits
from .stat import stat


class DirectoryEngine:
    """The spool in the directory `path`. Keeps `spoolipc.engine.Engine`, and is its own `Admin`."""

    crosses_processes = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = os.path.abspath(path)
        except FileNotFoundError:
            what = "is relative to a working directory that is no more; give an absolute path"
            raise NotASpool(errno.ENOENT, what, os.fsdecode(path)) from None

    def producer(self, options: ProducerOptions) -> DirectoryDestination:
        """Open it for putting, making it where there is none unless asked not to."""
        return DirectoryDestination(self.path, options)

    def consumer(self, options: ConsumerOptions) -> DirectorySource:
        """Open it for getting, making it where there is none unless asked not to."""
        return DirectorySource(self.path, options)

    def pair(self, limits: Limits) -> DirectoryPair:
        """Open it for both through one session, making it where there is none."""
        return DirectoryPair(self.path, limits)

    def admin(self) -> DirectoryEngine:
        """Look after it."""
        return self

    def stat(self) -> SpoolStat:
        """What is in it now."""
        return stat(self.path)

    def failed_list(self, seqs: Iterable[int] | None = None) -> list[DeadLetter]:
        """Its dead letters, in the order in which they were put; None for all. Raises NoSuchItem."""
        return failed_list(self.path, seqs)

    def failed_retry(self, seqs: Iterable[int] | None) -> Retried:
        """Requeue dead letters as new items; None for all. Raises NoSuchItem."""
        return failed_retry(self.path, seqs)

    def failed_drop(self, seqs: Iterable[int] | None) -> list[int]:
        """Remove dead letters for good; None for all. Raises NoSuchItem."""
        return failed_drop(self.path, seqs)

    def gc(self, dry_run: bool, progress: Progress | None) -> GcReport:
        """Requeue and remove what crashed sessions left, or only count it."""
        return sweep.gc(self.path, dry_run, progress)

    def purge(self) -> int:
        """Remove the items that wait or are delayed; returns how many."""
        return purge(self.path)

    def remove(self) -> None:
        """Delete the spool and all that is in it. Raises SpoolInUse."""
        remove(self.path)

    def set_limits(self, limits: Limits) -> Limits:
        """Let the limits that are not None be in force; returns all limits. Raises LimitMismatch for another mode."""
        return set_limits(self.path, limits)
