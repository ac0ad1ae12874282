"""`stat`: what is in a spool now, read without changing anything and without becoming a party of it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Final, Literal

from . import changes, mounts, watch
from . import words as W
from .census import batches, dead_among, token_of
from .errors import LockTimeout
from .index import Torn
from .layout import Limits, agree, item_number
from .marker import read_shutdown
from .onlooker import Onlooker

State = Literal["open", "draining", "discarded"]
_STATES: Final[dict[int, State]] = {W.OPEN: "open", W.DRAINING: "draining", W.DISCARDED: "discarded"}
_PATIENCE = 1.0


@dataclass(frozen=True, slots=True)
class SpoolStat:
    """A spool at one moment. Bytes are those of whole files.

    path: absolute. state: "open"; "draining" after shutdown(); "discarded" after shutdown(immediate=True).
    depth: items that wait to be delivered now. delayed: items given back that are not due yet. in_flight:
    items in readers' hands. bytes: of all these. oldest_age: seconds since the first item to be delivered was
    put, None when none waits. failed: dead letters. puts, gets: items ever put and ever delivered for good.
    free_files, free_bytes: consumed files kept to be written again. held_files, held_bytes: consumed files
    that a reader's arrays still show, or that a writer has taken. live_parties: readers and writers that have
    the spool open. limits: as they are in force. file_system: its type; in_memory: whether that is RAM.
    waiting_mode: how this process would wait, "inotify" or "polling". index_damage: why the index cannot be
    used, "" as a rule; then only items, dead letters and limits are counted, from the directories, and the
    next reader or writer repairs it. stuck_on: the process that did not let go of the index lock for a
    second, "" as a rule; then what needs the lock is None.
    """

    path: str
    state: State
    depth: int
    delayed: int
    in_flight: int
    bytes: int
    oldest_age: float | None
    failed: int
    puts: int
    gets: int
    free_files: int
    free_bytes: int
    held_files: int | None
    held_bytes: int | None
    live_parties: int | None
    limits: Limits
    file_system: str
    in_memory: bool
    waiting_mode: Literal["inotify", "polling"]
    index_damage: str
    stuck_on: str


def stat(path: str | os.PathLike[str]) -> SpoolStat:
    """What is in the spool at `path` now. Changes nothing, and is not counted as a party itself.

    Raises NotASpool, UnsafeSpool, NetworkFileSystem, UnknownVersion.
    """
    with Onlooker(path, patience=_PATIENCE) as spool:
        stuck_on = spool.look()
        damage = spool.damage
        counts = _listed(spool) if spool.index is None else _counted(spool.index.words)
        kind = mounts.file_system(Path(spool.path))
        try:
            held, held_bytes = (None, None) if stuck_on else spool.run(_held)
            live = None if stuck_on else _live_parties(spool)
        except LockTimeout:
            stuck_on, held, held_bytes, live = spool.holder(), None, None, None
        return SpoolStat(
            path=spool.path,
            **counts,
            held_files=held,
            held_bytes=held_bytes,
            live_parties=live,
            limits=agree(spool.layout, Limits()),
            file_system=kind,
            in_memory=kind in mounts.MEMORY,
            waiting_mode=_waiting_mode(spool.path),
            index_damage=damage,
            stuck_on=stuck_on,
        )


def _counted(words: memoryview[int]) -> dict[str, Any]:
    """What the index's header says; one change may be half in it."""
    return {
        "state": _STATES.get(words[W.SHUTDOWN], "open"),
        "depth": words[W.READY_COUNT] + words[W.RETURNED_COUNT],
        "delayed": words[W.DELAYED_COUNT],
        "in_flight": words[W.IN_FLIGHT],
        "bytes": words[W.ITEM_BYTES],
        "oldest_age": oldest_age(words, time.time_ns()),
        "failed": words[W.FAILED_COUNT],
        "puts": words[W.NEXT_SEQ] - words[W.FIRST_SEQ],
        "gets": words[W.GOTS],
        "free_files": words[W.POOL_COUNT],
        "free_bytes": words[W.POOL_BYTES],
    }


def _listed(spool: Onlooker) -> dict[str, Any]:
    """What the directories say, for a spool without an index."""
    counts = dict.fromkeys(
        ["depth", "bytes", "failed", "delayed", "in_flight", "puts", "gets", "free_files", "free_bytes"], 0
    )
    layout = spool.layout
    for names in batches(layout.items):
        for name in names:
            with suppress(FileNotFoundError):
                size = os.stat(name, dir_fd=layout.items, follow_symlinks=False).st_size
                counts["depth"] += item_number(name) is not None
                counts["bytes"] += size
    for names in batches(layout.failed):
        counts["failed"] += sum(item_number(name) is not None for name in names)
    return {**counts, "state": _STATES[read_shutdown(layout)], "oldest_age": None}


def oldest_age(words: memoryview[int], now: int) -> float | None:
    """Seconds since the first items to be delivered, given back or never delivered, were put, at most.

    now: wall clock, ns; a clock that was set back gives 0.
    """
    heads = [words[queue] for queue in (W.READY, W.RETURNED) if words[queue]]
    times = [words[head + W.PUT_TIME] for head in heads if head + W.RECORD <= len(words)]
    return max(0.0, (now - min(times)) / 1e9) if times else None


def _held(spool: Onlooker) -> tuple[int, int]:
    """How many files of `free/` are in somebody's hands, and their bytes: a locked step."""
    index = spool.index
    if index is None:
        return 0, 0
    words = index.words
    try:
        held = [r for r in changes.away(index) if words[r + W.STATE] in (W.HELD, W.RESERVED)]
    except Torn:
        return 0, 0
    return len(held), sum(words[record + W.BYTES] for record in held)


def _live_parties(spool: Onlooker) -> int:
    alive = 0
    for names in batches(spool.layout.alive):
        tokens = set(map(token_of, names)) - {0}
        alive += len(tokens) - len(spool.run(dead_among, tokens))
    return alive


def _waiting_mode(path: str) -> Literal["inotify", "polling"]:
    """What this process uses, or would use: found out without a ring, which would wake somebody."""
    mode = watch.mode()
    if mode != "idle":
        return mode
    listener = watch.listen(os.path.join(path, "bell"), Event().set)
    if listener is None:
        return "polling"
    listener.close()
    return "inotify"
