"""What may happen to a spool: crashes at a chosen place, and pictures of what is there."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, ParamSpec

import pytest

from spoolipc import SpoolReader, SpoolWriter, gc, stat
from spoolipc.format import footer
from support.faults import Event, Injector, forked, kill
from support.peer import Peer

P = ParamSpec("P")
PARTS: Final = ("items", "free", "tmp", "failed", "alive")
_STOP_AFTER_RENAME: Final = """
import os, signal
from spoolipc.directory import fs
rename = fs.rename
def stopping(*names, **directories):
    rename(*names, **directories)
    fs.rename = rename
    os.kill(os.getpid(), signal.SIGSTOP)
fs.rename = stopping
"""


def item_name(number: int) -> str:
    """The name of the file with a number, in `items/`, `free/` or `failed/`."""
    return f"{number:020d}.npy"


def item(number: int) -> str:
    """The path of an item's file below its spool."""
    return f"items/{item_name(number)}"


def crafted(
    header: str | bytes, data: bytes = bytes(64), version: int = 1, pad: bool = True, end: int = 0
) -> bytes:
    """An item with a header of one's own, aligned, and an honest footer, but where `end` says what it should not."""
    text = header.encode("latin-1") if isinstance(header, str) else header
    width = 2 if version == 1 else 4
    if pad:
        text += b" " * (-(9 + width + len(text)) % 64) + b"\n"
    body = b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(width, "little") + text + data
    return body + footer.pack(end or len(body), 1, bytes(16))


def fields(descr: object = "<f8", fortran: object = False, shape: object = (2,)) -> str:
    return repr({"descr": descr, "fortran_order": fortran, "shape": shape})


def cut(place: Path) -> None:
    """Leave a file its beginning."""
    place.write_bytes(place.read_bytes()[:500])


def link_out(place: Path) -> None:
    """Plant a symbolic link in the place of a file."""
    place.unlink()
    place.symlink_to("/etc/passwd")


def pipe(place: Path) -> None:
    """Plant a FIFO in the place of a file."""
    place.unlink()
    os.mkfifo(place)


def picture(path: Path) -> dict[str, tuple[int, int, str]]:
    """Every name below `path` with its mode, size and contents, but for `alive/`, where sessions come and go."""
    found = {}
    for folder, _, names in os.walk(path):
        for name in names:
            place = Path(folder, name)
            if place.parent.name != "alive":
                status = place.lstat()
                regular = place.is_file() and not place.is_symlink()
                text = hashlib.sha256(place.read_bytes()).hexdigest() if regular else ""
                found[str(place.relative_to(path))] = (status.st_mode, status.st_size, text)
    return found


def crash(path: Path, code: str) -> None:
    """Run statements in a process that is killed right after them."""
    with Peer(path) as peer:
        peer.run(code)
        peer.kill()


def killed_at(place: int, work: Callable[P, object], after: bool, *args: P.args, **kwargs: P.kwargs) -> bool:
    """Do `work(...)` in a forked child that kills itself at its nth unlinking or renaming; whether it came to that.

    after: once that is done, not instead of it.
    """
    left = itertools.count(place - 1, -1)

    def deadly(event: Event, _: object = None) -> None:
        if event.name in ("unlink", "rename", "rmdir") and not next(left):
            kill()

    def doomed() -> None:
        with Injector(after=deadly) if after else Injector(deadly):
            work(*args, **kwargs)

    return forked(doomed) != 0


def stop_in_step(peer: Peer) -> None:
    """Have a peer that has a `writer` stop in the locked step of a put, where the file is visible and the table does
    not say so yet: `go` lets it go on."""
    peer.run(_STOP_AFTER_RENAME)
    peer.start("run", "writer.put(np.full(3, 1))")
    peer.until_stopped()


USERS: Final[tuple[Callable[[Path], object], ...]] = (SpoolReader, SpoolWriter)


def refused(
    path: Path,
    error: type[Exception],
    said: str,
    *more: Callable[[Path], object],
    only: tuple[Callable[[Path], object], ...] = (*USERS, stat, gc),
) -> None:
    """See everybody who opens the spool, or only these, and `more`, told so, and nothing in it changed."""
    before = picture(path)
    for call in (*only, *more):
        with pytest.raises(error, match=said):
            call(path)
    assert picture(path) == before
