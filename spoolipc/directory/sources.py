"""Which items came from which other spool, so that none that is forwarded again comes twice.

`sources.json` has, for each spool that forwards to this one, the ids of the items put last, and the files of `tmp/` in
which those of its last put were staged. It is written before any of them is committed, in the same step. Committing is
a rename: a file that is still in `tmp/` holds an item that was not put, and one that is gone an item that was, whatever
became of that since. So before the files of a crashed session are removed, what was not put is struck out.

It also has the name under which this spool is known to those to which its own items are forwarded.
"""

from __future__ import annotations

import errno
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from ..engine import Known
from ..errors import SpoolInUse, StorageError, UnsafeSpool
from . import fs
from .layout import Directories
from .liveness import has_crashed, process_of, token_name, token_of
from .pool import with_room
from .session import Session

NAME: Final = "sources.json"
NEW: Final = "sources.json.new"
_LONGEST: Final = 2**26


@dataclass
class _Source:
    """What came from one spool. session: that put it last. staged: the files of its last put, by the items' ids."""

    session: str
    known: Known = field(default_factory=Known)
    staged: dict[str, str] = field(default_factory=dict)


def own_name(session: Session) -> tuple[str, int, int]:
    """The name of this spool as a source, which no other has; made at the first call. A step."""
    name, sources = _read(session.directories)
    if not name:
        name = secrets.token_hex(16)
        _write(session, name, sources)
    return name, 0, 0


def begin(session: Session, source: str) -> tuple[Known, int, int]:
    """Let this session be the one that forwards from `source`; what came from there. A step.

    Raises SpoolInUse while another one does.
    """
    name, sources = _read(session.directories)
    known = _ours(session, sources, source, missing=True).known
    _write(session, name, sources)
    return known, 0, 0


def record(
    session: Session,
    source: str,
    done: Collection[str],
    staged: Mapping[str, tuple[int, str]],
    durable: bool,
) -> None:
    """Note what is about to be committed: by ids, the numbers of items at their source and their files in `tmp/`. Of
    `done` the source knows that they came. The commits follow in the same step. Raises SpoolInUse."""
    name, sources = _read(session.directories)
    ours = _ours(session, sources, source, missing=False)
    ours.known = ours.known.after(done, {each: seq for each, (seq, _) in staged.items()})
    ours.staged = {each: file for each, (_, file) in staged.items()}
    if durable:
        fs.sync(session.directories.tmp)
    _write(session, name, sources, durable)


def settle(session: Session, crashed: Collection[int]) -> tuple[bool, int, int]:
    """Strike out what these sessions had staged and did not put, before its files are removed; false where that cannot
    be done, and the files must stay. A step."""
    try:
        name, sources = _read(session.directories)
        theirs = [each for each in sources.values() if token_of(each.session) in crashed and each.staged]
        for each in theirs:
            _strike_out(session.directories, each)
        if theirs:
            _write(session, name, sources)
    except OSError as error:
        # Damaged, it tells nothing any more, as who forwards is told.
        return error.errno == errno.EINVAL, 0, 0
    return True, 0, 0


def _ours(session: Session, sources: dict[str, _Source], source: str, *, missing: bool) -> _Source:
    """The entry of a source, ours from now on, with no more in it than was put."""
    directories, token = session.directories, session.token
    found = sources.setdefault(source, _Source(token_name(token)))
    other = token_of(found.session)
    if other != token and not has_crashed(directories.alive, other, missing=missing):
        who = f"process {process_of(directories.alive, other)}"
        what = f"is in use: {who} forwards to it from the same spool"
        raise SpoolInUse(errno.EBUSY, what, str(directories.path))
    _strike_out(directories, found)
    found.session = token_name(token)
    return found


def _strike_out(directories: Directories, source: _Source) -> None:
    """Take out what was staged and not put."""
    left = {each for each, file in source.staged.items() if fs.exists(directories.tmp, file)}
    source.known, source.staged = source.known.without(left), {}


def _read(directories: Directories) -> tuple[str, dict[str, _Source]]:
    """The name of this spool, "" where it has none, and the sources. Raises StorageError, EINVAL for a damaged file."""
    try:
        said: Any = json.loads(fs.read_own(directories.root, NAME, _LONGEST))
        sources = {
            str(source): _Source(
                str(each["session"]),
                Known(*({str(key): int(seq) for key, seq in ids.items()} for ids in each["known"])),
                {str(key): str(file) for key, file in each["staged"].items()},
            )
            for source, each in said["sources"].items()
        }
        return str(said["name"]), sources
    except FileNotFoundError:
        return "", {}
    except (UnsafeSpool, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        what = (
            f"{NAME} is damaged; without it items that are forwarded again may come twice: remove it to go on"
        )
        raise StorageError(errno.EINVAL, what, str(directories.path)) from None


def _write(session: Session, name: str, sources: dict[str, _Source], durable: bool = False) -> None:
    """Replace the file as a whole; a crash leaves the old one or the new."""
    root = session.directories.root
    data = json.dumps(
        {"name": name, "sources": {key: asdict(each) for key, each in sources.items()}}
    ).encode()

    def make() -> None:
        fd = fs.make_own(root, NEW, session.directories.file_mode)
        try:
            fs.write_whole(fd, data)
            if durable:
                fs.sync(fd)
        finally:
            fs.close(fd)

    with_room(session.directories, session.journal, make)
    fs.rename(NEW, NAME, src_dir_fd=root, dst_dir_fd=root)
    if durable:
        fs.sync(root)
