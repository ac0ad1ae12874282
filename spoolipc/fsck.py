"""`fsck`: checks every file of a spool and its index against each other, names each problem, and repairs it
on demand."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from .census import Progress
from .errors import NotASpool, SpoolError, storage_error
from .inspection import Found, Inspection
from .layout import OPEN_DIRECTORY, Limits, open_layout
from .mend import Mender
from .onlooker import Onlooker
from .party import Party
from .premises import Problem, check_premises

_log = logging.getLogger("spoolipc")
_MOST_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class FsckReport:
    """What `fsck` found. items, bytes: of item files looked at. problems: in the order in which they were
    found."""

    path: str
    items: int
    bytes: int
    problems: tuple[Problem, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong, or nothing is any more."""
        return all(problem.repaired for problem in self.problems)


def fsck(
    path: str | os.PathLike[str], *, repair: bool = False, progress: Progress | None = None
) -> FsckReport:
    """Check the spool at `path`: directories, modes, links, every item file, the index, and each against the
    others.

    repair: put right what can be. Modes are closed, missing directories made, damaged items moved to
    `failed/` with the reason, files of no item removed; an index that contradicts itself or does not know an
    item is built again from the items, whereupon what readers have in hands is delivered again. Names that
    are not the spool's are left alone. progress: called now and then with the number of names looked at, and
    None.

    The spool may be in use. A problem counts as repaired when a second look does not find it.
    Raises NotASpool, NetworkFileSystem, UnknownVersion, LockTimeout, StorageError.
    """
    place = os.path.abspath(os.fspath(path))
    try:
        before = _premises(path, repair)
    except SpoolError:
        raise
    except OSError as error:
        raise storage_error(error, place) from error
    try:
        return _inspected(path, repair, progress, before)
    except OSError:
        if all(problem.repaired for problem in before):
            raise
        return FsckReport(place, 0, 0, tuple(before))  # no way in


def _premises(path: str | os.PathLike[str], repair: bool) -> list[Problem]:
    """What kept the spool from being opened, repaired where that was asked for and possible."""
    place = Path(os.path.abspath(os.fspath(path)))
    try:
        root = os.open(place, OPEN_DIRECTORY)
    except OSError:
        open_layout(place, Limits(), create=False).close()  # it says best what is wrong
        raise
    try:
        if not os.path.lexists(place / "spool.json"):
            raise NotASpool(errno.EINVAL, "is not a spool: it has no spool.json", str(place))
        found = check_premises(root)
        for problem, mend in found if repair else []:
            if mend is not None:
                try:
                    mend()
                except OSError as error:
                    _log.warning("%s: %s was not repaired: %s", place, problem.where, error)
        left = {_key(problem) for problem, _ in check_premises(root)} if repair else None
        return [_judged(problem, left) for problem, _ in found]
    finally:
        os.close(root)


def _inspected(
    path: str | os.PathLike[str], repair: bool, progress: Progress | None, before: list[Problem]
) -> FsckReport:
    noted: list[Problem] = []
    last: set[tuple[str, str, str]] | None = None
    for _ in range(_MOST_ROUNDS):
        # Repairs bring to light what was hidden: an item that only a new index knows may be damaged too.
        look = _look(path, progress)
        keys = {_key(problem) for problem, _ in look.found}
        noted = [_judged(problem, keys) for problem in noted]
        known = {_key(problem) for problem in noted}
        noted += [problem for problem, _ in look.found if _key(problem) not in known]
        if not repair or keys == last or not any(mend for _, mend in look.found):
            break
        _mend(path, look.found)
        last = keys
    return FsckReport(os.path.abspath(path), look.items, look.bytes, (*before, *noted))


def _look(path: str | os.PathLike[str], progress: Progress | None) -> Inspection:
    with Onlooker(path) as spool:
        inspection = Inspection(spool, progress)
        inspection.run()
        return inspection


def _mend(path: str | os.PathLike[str], found: Found) -> None:
    """Repair what can be; what fails is found again by the next look."""
    party = Party(path, Limits(), create=False)
    try:
        mender = Mender(party)
        for problem, mend in found:
            if mend is not None:
                _log.warning("%s: repairing %s, which %s", party.path, problem.where, problem.what)
                try:
                    mend(mender)
                except OSError as error:
                    _log.warning("%s: %s was not repaired: %s", party.path, problem.where, error)
    finally:
        party.close(_nothing)


def _nothing(party: Party) -> None:
    """The last step of a party that has nothing in its hands."""


def _key(problem: Problem) -> tuple[str, str, str]:
    return problem.kind, problem.where, problem.what


def _judged(problem: Problem, left: set[tuple[str, str, str]] | None) -> Problem:
    """A problem, repaired unless it is among those that are left."""
    return problem if left is None else replace(problem, repaired=_key(problem) not in left)
