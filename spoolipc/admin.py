"""A spool looked after from outside: each function makes one engine call for the spool at a path or a URL.

Any of them may be called at any time, also while readers and writers use the spool.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from .connect import connect, shown
from .directory import DirectoryEngine, check
from .directory.check import FsckReport
from .engine import Collector
from .errors import NoSuchItem, UnsupportedOperation
from .message import DeadLetter, GcReport, Limits, Progress, Retried, SpoolStat, flag

Place = str | os.PathLike[str]


def stat(path: Place) -> SpoolStat:
    """What is in the spool at `path` now. Changes nothing, and is not counted as a session itself.

    Raises NotASpool, UnsafeSpool, NetworkFileSystem, UnknownVersion.
    """
    return connect(path).admin().stat()


def failed_list(path: Place, seqs: Iterable[int] | None = None) -> list[DeadLetter]:
    """The dead letters of the spool at `path`, in the order in which they were put. Changes nothing.

    seqs: their numbers, None for all. Raises NoSuchItem for a number that is no dead letter, and what `stat` raises.
    """
    return connect(path).admin().failed_list(seqs)


def failed_show(path: Place, seq: int) -> DeadLetter:
    """One dead letter of the spool at `path`. Raises NoSuchItem, and what `stat` raises."""
    for letter in failed_list(path, [seq]):
        return letter
    raise NoSuchItem(f"{shown(path)}: has no dead letter {seq} any more")


def failed_retry(path: Place, seqs: Iterable[int] | None = None) -> Retried:
    """Requeue dead letters at the end of the queue, as new puts: new numbers, no attempts, no history.

    seqs: their numbers, None for all. `maxsize` and `max_bytes` do not hold them back: their bytes are there
    already. Those that cannot be read stay. Crash-safe: a dead letter is in one place or the other.

    Raises NoSuchItem, before anything is done, for a number that is no dead letter; ShutDown when the spool
    takes no puts; and what SpoolWriter raises.
    """
    return connect(path).admin().failed_retry(seqs)


def failed_drop(path: Place, seqs: Iterable[int] | None = None) -> list[int]:
    """Remove dead letters and their histories for good; returns their numbers.

    seqs: their numbers, None for all. Raises NoSuchItem, before anything is done, for a number that is no
    dead letter; StorageError for a directory that somebody has planted; and what SpoolReader raises.
    """
    return connect(path).admin().failed_drop(seqs)


def purge(path: Place) -> int:
    """Remove the items that wait in the spool at `path` for good; returns how many.

    What crashed readers had in flight goes too. What live readers have in flight stays, and so do dead letters
    (`failed_drop`). Crash-safe: an item is removed or waits. Raises what SpoolReader raises.
    """
    return connect(path).admin().purge()


def remove(path: Place) -> None:
    """Delete the spool at `path` with all that is in it, dead letters included, and its directory.

    Crash-safe: until it is gone it is a spool that was shut down, with some of its items; another call finishes.
    Raises SpoolInUse while anybody has it open, StorageError, having done nothing, where it holds names that are not
    the spool's, and what SpoolReader raises.
    """
    connect(path).admin().remove()


def set_limits(
    path: Place,
    *,
    maxsize: int | None = None,
    max_bytes: int | None = None,
    recycle_bytes: int | None = None,
    max_attempts: int | None = None,
) -> Limits:
    """Change limits of the spool at `path`, for all who have it open and all to come; returns those now in force.

    Those left out stay. Nothing is removed: where more waits than a new `maxsize`, puts wait until less does.
    Crash-safe: all are changed or none. Raises ValueError for what is no limit, and what SpoolReader raises.
    """
    return connect(path).admin().set_limits(Limits(maxsize, max_bytes, recycle_bytes, max_attempts))


def gc(path: Place, *, dry_run: bool = False, progress: Progress | None = None) -> GcReport:
    """Requeue and remove what crashed sessions left in the spool at `path`; live work is never touched. A session whose
    file in `alive/` somebody removed counts as crashed here, and nowhere else; the log names it.

    dry_run: only say what would be done; changes nothing. progress: called now and then with the number of
    names looked at, and None.

    Safe at any time: during traffic, several at once, and when killed, after which another one finishes.
    Raises NotASpool, UnsafeSpool, UnknownVersion, LockTimeout, SpoolGone, StorageError; UnsupportedOperation for a
    spool in memory.
    """
    is_dry, engine = flag("dry_run", dry_run), connect(path)
    admin = engine.admin() if engine.crosses_processes else None
    if not isinstance(admin, Collector):
        what = "is in the memory of this process, where a crash leaves nothing to remove"
        raise UnsupportedOperation(f"{shown(path)}: {what}")
    return admin.gc(is_dry, progress)


def fsck(path: Place, *, repair: bool = False, progress: Progress | None = None) -> FsckReport:
    """Check the spool at `path`: directories, modes, links, every item file, the index, and each against the
    others.

    repair: put right what can be. Modes are closed, missing directories made, damaged items moved to `failed/` with
    the reason, files of no item removed; where the index contradicts itself, an item, or a limit it is built again
    from the items. What live sessions have in flight stays so. Names that are not the spool's are left alone.
    progress: called now and then with the number of names looked at, and None.

    The spool may be in use. A problem counts as repaired when a second look does not find it.
    Raises NotASpool, NetworkFileSystem, UnknownVersion, LockTimeout, StorageError.
    """
    repairs, engine = flag("repair", repair), connect(path)
    if not isinstance(engine, DirectoryEngine):
        where = "on a server" if engine.crosses_processes else "in the memory of this process"
        raise UnsupportedOperation(f"{shown(path)}: is {where}, which has no files to check")
    return check.fsck(path, repairs, progress)
