"""Processes that die by SIGKILL in the middle of their work, and pictures of what they leave."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from spoolipc.layout import Limits, item_name
from spoolipc.party import Party

from spoolipc import fsck
from spoolipc import words as W

_PRELUDE = """
import os, signal, sys
import numpy as np
from spoolipc import SpoolReader, SpoolWriter
from spoolipc.engine import Payload
path = sys.argv[1]
big = np.arange(100_000)
def prepare(writer, array):
    return writer._sink.prepare(Payload((array,), None, None))
"""


def die(path: Path, work: str) -> None:
    """Run `work` in a process that is killed right after it. It has `path`, `big` (800 KB) and `prepare` at hand."""
    program = f"{_PRELUDE}\n{work}\nos.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def picture(path: Path) -> dict[str, tuple[int, int, str]]:
    """Every name below `path` with its mode, size and contents, but for `alive/`, where parties come and go."""
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


def poke(path: Path, values: dict[int, int]) -> None:
    """Overwrite words of a spool's index, as a stray store would."""
    with open(path / "index", "r+b") as file:
        for position, value in values.items():
            file.seek(position * W.WORD)
            file.write(value.to_bytes(W.WORD, "little"))


def words_of(path: Path) -> list[int]:
    """The words of a spool's index."""
    data = (path / "index").read_bytes()
    return memoryview(data).cast("Q").tolist()


def open_party(path: Path) -> Party:
    """A party of the spool; it does not tend it."""
    return Party(path, Limits(), create=False)


def close_party(party: Party) -> None:
    party.close(lambda _: None)


def check(path: Path) -> None:
    """The next step of anybody finds nothing to repair, and index and directories agree."""
    close_party(open_party(path))
    assert fsck(path).problems == ()
    words = words_of(path)
    states: dict[int, list[int]] = {}
    for record in range(W.HEADER, words[W.EDGE], W.RECORD):
        states.setdefault(words[record + W.STATE], []).append(words[record + W.FILE])
    for part, there in (
        ("items", (W.WAITING, W.CLAIMED, W.DELAYED)),
        ("free", (W.HELD, W.RESERVED, W.POOLED)),
    ):
        numbers = sorted(number for state in there for number in states.get(state, []))
        assert sorted(os.listdir(path / part)) == [item_name(number) for number in numbers]
    waiting = words[W.READY_COUNT] + words[W.RETURNED_COUNT]
    assert waiting == len(states.get(W.WAITING, []))
    assert words[W.FAILED_COUNT] == sum(name.endswith(".npy") for name in os.listdir(path / "failed"))
