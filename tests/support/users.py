"""Other users, whom root can act as."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from support.faults import forked
from support.peer import Peer

OTHER_USER: Final = 12345
needs_root = [
    pytest.mark.fault,
    pytest.mark.skipif(os.geteuid() != 0, reason="giving files away and making devices needs root"),
]


def as_user(uid: int, gid: int, work: Callable[[], object], groups: Iterable[int] = ()) -> None:
    """Do `work` in a forked child that is another user, in these groups besides the primary one."""

    def become() -> None:
        os.setgroups(list(groups))
        os.setgid(gid)
        os.setuid(uid)
        work()

    forked(become)


@contextmanager
def peer_as(path: Path, user: int, groups: Iterable[int] = ()) -> Iterator[Peer]:
    """Another process, of another user."""
    with Peer(path) as peer:
        peer.run("import os, spoolipc.directory")  # what lies where that user cannot read
        peer.run(f"os.setgroups({list(groups)}); os.setgid({user}); os.setuid({user})")
        yield peer


def give_away(place: Path, user: int = OTHER_USER, group: int = OTHER_USER) -> None:
    """Let a directory and all in it belong to somebody else."""
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            os.chown(Path(folder, name), user, group, follow_symlinks=False)
    os.chown(place, user, group)
