"""Other users, whom root can act as."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import pytest

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


def forked(work: Callable[[], object]) -> None:
    """Do `work` in a forked child."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child failed, as printed above"


def reachable(place: Path) -> None:
    """Let other users reach a spool below pytest's own directories."""
    for folder in place.parents:
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o011)


def give_away(place: Path, user: int = OTHER_USER, group: int = OTHER_USER) -> None:
    """Let a directory and all in it belong to somebody else."""
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            os.chown(Path(folder, name), user, group, follow_symlinks=False)
    os.chown(place, user, group)
