"""Counting what lies in a spool: names in batches, however many there are, and which parties live."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

from . import alive, bell
from .layout import FILES, OPEN_DIRECTORY, PARTS, Layout
from .onlooker import Onlooker
from .party import Party

AnySpool = Party | Onlooker
Progress = Callable[[int, int | None], None]
"""Told how many names were looked at, and of how many (None: nobody knows)."""
BATCH: Final = 256
"""Names judged in one locked step: a millisecond or so."""
_HEX = frozenset("0123456789abcdef")
_BELLS = frozenset(f"{kind}-{k}" for kind in bell.KINDS for k in range(bell.BELLS))
_ROOT = frozenset({*PARTS, *FILES})


def batches(directory: int, size: int = BATCH) -> Iterator[list[str]]:
    """The names in a directory, `size` at a time. Those removed meanwhile may come or not.

    directory: a descriptor; its own offset is not used, so others may list it meanwhile.
    """
    fd = os.open(".", OPEN_DIRECTORY, dir_fd=directory)
    try:
        with os.scandir(fd) as entries:
            while names := [entry.name for entry in islice(entries, size)]:
                yield names
    finally:
        os.close(fd)


def token_of(name: str) -> int:
    """The token in a name of `alive/`, 0 for any other name."""
    return int(name, 16) if len(name) == 16 and _HEX.issuperset(name) else 0


def dead_among(spool: AnySpool, tokens: set[int]) -> set[int]:
    """Which of `tokens` are of parties that have ended, for good: a locked step."""
    return {token for token in tokens if alive.is_dead(spool.layout.alive, token)}


def strangers_at_top(layout: Layout) -> list[str]:
    """Names at the top of the spool and in `bell/` that are none of ours, as paths below the spool."""
    found = [name for names in batches(layout.root) for name in names if name not in _ROOT]
    bells = [name for names in batches(layout.parts["bell"]) for name in names if name not in _BELLS]
    return sorted(found + [f"bell/{name}" for name in bells])
