"""`fsck`: checks a spool's directories, every file, the table, and each against the others; and repairs on demand.

A check changes nothing. The table is copied under its lock and studied without it; as the spool may be in use
meanwhile, what the copy and a listing disagree on is looked at again in a locked step before it is called a problem.

A repair has three verbs, and nothing operates on the table itself. The directories are put right: modes closed, missing
parts made, what stands in the place of a file that can be made again removed. Bad files are set aside: a damaged item
moves to `failed/` with its reason. Every other disagreement is settled by building the table again, which keeps what is
in flight at sessions that live.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

from ..errors import BadItem, NotASpool, SpoolError, UnknownVersion
from ..message import Limits, Progress
from . import fs, liveness
from . import table as W
from .gc import gc, is_ours
from .itemfile import ItemFile
from .layout import (
    FILES,
    PARTS,
    PRIVATE,
    SHARED,
    agree,
    item_name,
    item_number,
    make_part,
    open_directories,
    permit,
    read_limits,
    read_shutdown,
    write_limits,
)
from .quarantine import history_number, is_known, set_file_aside
from .rebuild import limits_in, old_table
from .session import Session
from .table import IndexDamaged, Words, files, owners, rows, violations
from .visitor import Visitor, administration

_log = logging.getLogger("spoolipc")
_MOST_ROUNDS: Final = 100
_MOST_OF_A_KIND: Final = 10_000
_SLICE: Final = 65536  # names looked for in one locked step
_FOREIGN: Final = "is none of the spool's names"
_WHO: Final = "spoolipc fsck"
_REPLACEABLE: Final = ("index", "index.new", "spool.json.new", "shutdown")
_REBUILT: Final = ("index", "limits", "unknown", "missing", "size")
"""Kinds that building the table again puts right."""
Kind: TypeAlias = Literal[
    "directory", "index", "limits", "item", "unknown", "missing", "size", "orphan",
    "mode", "owner", "link", "planted", "foreign",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a spool. where: a path below it. what: in words. repaired: it is not there any more.

    kind: "directory", a part that is missing; "index", an invariant of the table that does not hold, and "limits",
    where it contradicts spool.json or the shutdown marker; "item", a damaged one; "unknown" to the table; "missing"
    though the table has it; "size", another than the table has; "orphan", of no item; "mode", open to others, and
    "owner", somebody else; "link", has another name too; "planted", not a regular file; "foreign", none of the
    spool's names.
    """

    kind: Kind
    where: str
    what: str
    repaired: bool = False


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


def fsck(path: str | os.PathLike[str], repair: bool, progress: Progress | None) -> FsckReport:
    """Check the spool at `path`, and repair it on demand: see `spoolipc.fsck`."""
    place = Path(os.path.abspath(os.fsdecode(path)))
    with fs.as_owner(place):
        try:
            before = _check_directories(place, repair)
        except OSError as error:
            if not fs.is_of_file(error):
                raise
            raise fs.storage_error(error, str(place)) from error
        try:
            return _checked(place, repair, progress, before)
        except OSError:
            if all(problem.repaired for problem in before):
                raise
            return FsckReport(str(place), 0, 0, tuple(before))  # no way in


def _checked(place: Path, repair: bool, progress: Progress | None, before: list[Problem]) -> FsckReport:
    noted: list[Problem] = []
    last: set[tuple[str, str, str]] | None = None
    for _ in range(_MOST_ROUNDS):
        # Repairs bring to light what was hidden: an item that only a new table knows may be damaged too.
        with Visitor(place) as visitor:
            look = _Look(visitor, progress)
            look.run()
        keys = set(map(_key, look.found))
        noted = [replace(problem, repaired=_key(problem) not in keys) for problem in noted]
        known = set(map(_key, noted))
        noted += [problem for problem in look.found if _key(problem) not in known]
        if not repair or keys == last or not look.found:
            break
        _repair_all(place, look.found)
        last = keys
    return FsckReport(str(place), look.items, look.bytes, (*before, *noted))


def _key(problem: Problem) -> tuple[str, str, str]:
    return problem.kind, problem.where, problem.what


# Directories, and the files at the top: what must be in order before anybody can open the spool


def _check_directories(place: Path, repair: bool) -> list[Problem]:
    """What keeps the spool from being opened, repaired where that was asked for and possible."""
    try:
        root = fs.open_place(place)
    except OSError:
        open_directories(place, Limits(), create=False, as_found=True).close()  # it says best what is wrong
        raise
    with fs.Closing(root):
        if not fs.exists(root, "spool.json") and not fs.exists(root, "index"):
            raise NotASpool(errno.EINVAL, "is not a spool: it has no spool.json", str(place))
        mode = _mode(place, root)
        found = _wrong_at_top(root, mode)
        if repair:
            for problem in found:
                with _trying(place, problem.where, _log.log):
                    _put_right(root, problem, mode)
            left = set(map(_key, _wrong_at_top(root, mode)))
            found = [replace(problem, repaired=_key(problem) not in left) for problem in found]
        return found


def _mode(place: Path, root: int) -> int:
    """The mode in spool.json, 0700 where it says none that is possible; that of the directory where it is missing."""
    try:
        limits = read_limits(place, root)
    except UnknownVersion:
        raise
    except SpoolError:
        return PRIVATE
    if limits is None:
        return SHARED if fs.fstat(root).st_mode & SHARED == SHARED else PRIVATE
    return limits.mode or PRIVATE


def _wrong_at_top(root: int, mode: int) -> list[Problem]:
    """What is wrong with a spool's directories, and with the files at its top. mode: the spool's."""
    found = [_wrong_status(fs.fstat(root), mode, ".", is_directory=True)]
    for name in (*PARTS, *FILES):
        is_part = name in PARTS
        try:
            found.append(_wrong_status(fs.stat_at(name, dir_fd=root), mode, name, is_directory=is_part))
        except FileNotFoundError:
            if is_part:
                found.append(Problem("directory", name, "is missing"))
            elif name == "spool.json":
                found.append(Problem("limits", name, "is missing"))
    return [problem for problem in found if problem is not None]


def _wrong_status(
    status: os.stat_result, mode: int, where: str, *, is_directory: bool = False
) -> Problem | None:
    """What is wrong with a file, or a directory, by its status alone. mode: the spool's, which files have without
    execution."""
    if is_directory and not stat.S_ISDIR(status.st_mode):
        return Problem("planted", where, "is not a directory of its own")
    if not is_directory and not stat.S_ISREG(status.st_mode):
        return Problem("planted", where, f"is not a regular file ({stat.filemode(status.st_mode)})")
    if status.st_uid not in (fs.user(), 0) and not mode & 0o070:
        return Problem("owner", where, f"belongs to user {status.st_uid}")
    if status.st_mode & 0o777 & ~mode:
        return Problem("mode", where, f"is open to others (mode {stat.S_IMODE(status.st_mode):o})")
    if not is_directory and status.st_nlink > 1:
        return Problem("link", where, f"is linked from {status.st_nlink - 1} more places")
    return None


def _put_right(root: int, problem: Problem, mode: int) -> None:
    """Put a directory, or a file at the top, right where that can be."""
    name = problem.where
    if problem.kind == "directory":
        make_part(root, name, mode)
    elif problem.kind == "limits":
        words = old_table(root)
        limits = Limits() if words is None else limits_in(words)
        write_limits(root, replace(limits, mode=mode))
    elif problem.kind == "mode":
        permit(root, name, mode if name in (".", *PARTS) else mode & 0o666)
    elif problem.kind in ("planted", "link") and name in _REPLACEABLE:
        fs.unlink(name, dir_fd=root)


# All files, and the table


class _Look:
    """One look at all of a spool. items, bytes: item files looked at, in `items/` and `failed/`."""

    def __init__(self, visitor: Visitor, progress: Progress | None) -> None:
        self.visitor = visitor
        self.directories = visitor.directories
        self.found: list[Problem] = []
        self.items = 0
        self.bytes = 0
        self._progress = progress
        self._counts: Counter[Kind] = Counter()
        self._damaged: set[int] = set()
        self._seen = 0

    def run(self) -> None:
        words = self.visitor.step(self.visitor.snapshot)
        if words is None:
            self._note("index", "index", self.visitor.damage)
        else:
            for what in violations(words):
                self._note("index", "index", what)
            for what in self.visitor.step(self._contradictions):
                self._note("limits", "index", what)
        sizes = {part: self._part(part) for part in PARTS}
        if words is not None:
            self._compare(words, "items", sizes["items"], W.IN_ITEMS)
            self._compare(words, "free", sizes["free"], W.IN_FREE)
        for name in self.visitor.step(self._missing_sessions):
            self._note("missing", f"alive/{name}", "is not there, but its session has items or files")
        for name in sorted(fs.list_names(self.directories.root)):
            if not is_ours(".", name):
                self._note("foreign", name, _FOREIGN)
        for kind, count in self._counts.items():
            if count > _MOST_OF_A_KIND:
                self.found.insert(0, Problem(kind, ".", f"{count - _MOST_OF_A_KIND} more of this kind"))

    def _note(self, kind: Kind, where: str, what: str) -> None:
        """Keep a problem. Of a kind of which there are very many, the rest is only counted: the next look names it."""
        self._counts[kind] += 1
        if self._counts[kind] <= _MOST_OF_A_KIND:
            self.found.append(Problem(kind, where, what))

    def _contradictions(self) -> list[str]:
        """What the table says otherwise than spool.json and the shutdown marker: a step."""
        words, limits = self.visitor.snapshot(), agree(self.directories, Limits())
        if words is None:
            return []
        said = {
            "maxsize": (words[W.MAXSIZE], limits.maxsize),
            "max_bytes": (words[W.MAX_BYTES], limits.max_bytes),
            "recycle_bytes": (words[W.RECYCLE_BYTES], limits.recycle_bytes),
            "max_attempts": (words[W.MAX_ATTEMPTS], limits.max_attempts),
            "state of shutdown": (words[W.SHUTDOWN], read_shutdown(self.directories.root)),
        }
        return [f"{what}: the index says {a}, the directory {b}" for what, (a, b) in said.items() if a != b]

    def _part(self, part: str) -> dict[int, int]:
        """Look at the files of a part; returns the sizes of those that are items or consumed files, by number."""
        sizes: dict[int, int] = {}
        for names in fs.batches(self.directories.parts[part]):
            for name in names:
                if not is_ours(part, name):
                    self._note("foreign", f"{part}/{name}", _FOREIGN)
                    continue
                status, number = self._status(part, name), item_number(name)
                if status is not None and number is not None:
                    sizes[number] = status.st_size
                    if part == "items":
                        self._item(number)
                of = history_number(name)
                if of is not None and not self.visitor.step(is_known, self.directories, of):
                    self._note("orphan", f"{part}/{name}", "is the history of an item that is no more")
            self._seen += len(names)
            if self._progress is not None:
                self._progress(self._seen, None)
        return sizes

    def _status(self, part: str, name: str) -> os.stat_result | None:
        """A file's status; None when it is gone or not a regular file."""
        try:
            status = fs.stat_at(name, dir_fd=self.directories.parts[part])
        except FileNotFoundError:
            return None
        problem = _wrong_status(status, self.directories.mode, f"{part}/{name}")
        if problem is None:
            return status
        is_aside = problem.kind == "planted" and part == "failed" and item_number(name) is not None
        if not is_aside:
            self._note(problem.kind, problem.where, problem.what)
        return status if problem.kind != "planted" else None

    def _missing_sessions(self) -> list[str]:
        """The names in `alive/` of sessions that have something, and no file there: a step."""
        words = self.visitor.snapshot()
        names = map(liveness.token_name, () if words is None else owners(words))
        return [name for name in names if not fs.exists(self.directories.alive, name)]

    def _item(self, number: int) -> None:
        name, size, said = item_name(number), 0, ""
        try:
            with ItemFile(self.directories.items, name) as file:
                # So that it is not emptied when it is taken meanwhile: `pool.evict_one`.
                if not fs.lock(file.fd, blocking=False):
                    return  # another fsck reads it
                file.parse(whole=True)
                size = file.size
        except FileNotFoundError:
            return  # taken meanwhile
        except BadItem as error:
            said = str(error)
            if not fs.exists(self.directories.items, name):
                return  # taken while it was read, and its file written again
        self.items += 1
        self.bytes += size
        if said:
            self._damaged.add(number)
            self._note("item", f"items/{name}", said)

    def _compare(self, words: Words, part: str, sizes: dict[int, int], states: tuple[int, ...]) -> None:
        """Hold the files of a part, by number, against the records of its states."""
        suspects = sorted({number for number, _ in sizes.items() ^ files(words, states).items()})
        for start in range(0, len(suspects), _SLICE):
            self._disagree(part, suspects[start : start + _SLICE], states)

    def _disagree(self, part: str, suspects: list[int], states: tuple[int, ...]) -> None:
        """Note which of `suspects` are files without a record, records without a file, or differ in size."""
        again, sizes = self.visitor.step(self._look_again, part, suspects)
        if again is None:
            return
        said = files(again, states)
        for number in suspects:
            where, size = f"{part}/{item_name(number)}", sizes.get(number)
            if number not in said:
                if size is not None and part == "items":
                    self._note("unknown", where, "is an item that the index does not know")
                elif size is not None:
                    self._note("orphan", where, "is a file that no item and no process needs")
            elif size is None:
                self._note("missing", where, "is in the index, but not there")
            elif size != said[number] and number not in self._damaged:
                self._note("size", where, f"has {size} bytes, the index says {said[number]}")

    def _look_again(self, part: str, numbers: list[int]) -> tuple[Words | None, dict[int, int]]:
        """The table, and the sizes of those files that are there. A step."""
        sizes = {}
        for number in numbers:
            with contextlib.suppress(FileNotFoundError):
                status = fs.stat_at(item_name(number), dir_fd=self.directories.parts[part])
                sizes[number] = status.st_size
        return self.visitor.snapshot(), sizes


# The verbs of repair


def _repair_all(place: Path, found: list[Problem]) -> None:
    """Repair what can be; what fails is found again by the next look."""
    aside = {
        number: problem.what if problem.kind == "planted" else f"damaged: {problem.what}"
        for problem in found
        if problem.kind in ("item", "planted")
        and (number := item_number(problem.where.removeprefix("items/"))) is not None
    }
    sessions = [problem for problem in found if problem.where.startswith("alive/")]
    with administration(place) as session:
        for problem in found:
            if problem.kind == "mode" and problem.where != ".":
                part, _, name = problem.where.partition("/")
                with _trying(place, problem.where, _log.log):
                    permit(session.directories.parts[part], name, session.directories.file_mode)
        if aside or any(problem.kind in _REBUILT for problem in found if problem not in sessions):
            session.step(_rebuild, session, aside, [])
        if sessions or any(problem.kind == "orphan" for problem in found):
            gc(session.path)


@contextlib.contextmanager
def _trying(place: Path, where: str, say: Callable[..., None]) -> Iterator[None]:
    """In the block, what cannot be repaired is told: the next look finds it again."""
    try:
        yield
    except OSError as error:
        say(logging.WARNING, "%s: %s was not repaired: %s", place, where, error)


def _is_in_flight(session: Session, number: int) -> bool:
    records, alive = rows(session.journal.words, W.IN_FLIGHT), session.directories.alive
    found = records[records[:, W.SEQ] == number, W.OWNER]
    return any(not liveness.has_crashed(alive, owner) for owner in found.tolist())


def _rebuild(session: Session, aside: dict[int, str], done: list[bool]) -> tuple[None, int, int]:
    """Set bad files aside, each with its reason, and build the table again. A step, which is begun again with the new
    one.

    The old table is made one that does not hold first: after a crash in between, whoever comes next builds it again.
    """
    if not done:
        done.append(True)
        directories = session.directories
        session.journal.words[W.CAPACITY] = W.ALL_BITS
        for number, why in aside.items():
            with _trying(directories.path, f"items/{item_name(number)}", directories.say):
                is_there = fs.exists(directories.items, item_name(number))
                # One that a live session has in flight stays: its reader finds out by itself.
                if is_there and not _is_in_flight(session, number):
                    set_file_aside(directories, number, _WHO, why)
        raise IndexDamaged("fsck found that it is not as the directories are")
    return None, 0, 0
