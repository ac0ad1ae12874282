"""Where the index and the directories disagree, each seen in one locked step, so that no change is between them."""

from __future__ import annotations

import numpy as np

from . import history
from . import words as W
from .index import exists
from .layout import Limits, agree
from .ledger import IN_ITEMS, Table, files_of, table
from .marker import read_shutdown
from .onlooker import Onlooker


def is_orphaned(spool: Onlooker, number: int) -> bool:
    """Whether there is no item that a history tells of: a locked step."""
    return not exists(spool.layout.items, number) and not exists(spool.layout.failed, number)


def contradictions(spool: Onlooker) -> list[str]:
    """What the index says otherwise than spool.json, the shutdown marker and `failed/`: a locked step."""
    if spool.index is None:
        return []
    layout, words = spool.layout, spool.index.words
    limits = agree(layout, Limits())
    said = {
        "maxsize": (words[W.MAXSIZE], limits.maxsize),
        "max_bytes": (words[W.MAX_BYTES], limits.max_bytes),
        "recycle_bytes": (words[W.RECYCLE_BYTES], limits.recycle_bytes),
        "max_attempts": (words[W.MAX_ATTEMPTS], limits.max_attempts),
        "state of shutdown": (words[W.SHUTDOWN], read_shutdown(layout)),
        "number of dead letters": (words[W.FAILED_COUNT], len(history.failed_numbers(layout))),
    }
    return [f"{what}: the index says {a}, the directory {b}" for what, (a, b) in said.items() if a != b]


def disagreements(spool: Onlooker, suspects: Table, states: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Which of `suspects` are files that no record stands for, and records that have no file: a locked
    step."""
    words = spool.snapshot()
    if words is None:
        return [], []
    directory = spool.layout.items if states is IN_ITEMS else spool.layout.free
    recorded = np.isin(suspects, files_of(table(words), states))
    unknown, missing = [], []
    for number, known in zip(suspects.tolist(), recorded.tolist(), strict=True):
        there = exists(directory, number)
        if there and not known:
            unknown.append(number)
        elif known and not there:
            missing.append(number)
    return unknown, missing
