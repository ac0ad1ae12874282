"""`stat`: what is in a spool now, read without changing anything and without becoming a session of it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ..errors import LockTimeout
from ..message import Limits, SpoolStat, State
from . import fs, liveness, pool
from . import table as W
from .doorbell import ears
from .layout import MEMORY, agree, item_number, read_shutdown
from .quarantine import failed_numbers
from .table import Words, rows
from .visitor import Visitor

_STATES: Final[dict[int, State]] = {W.OPEN: "open", W.DRAINING: "draining", W.DISCARDED: "discarded"}
_PATIENCE: Final = 1.0  # seconds to wait for the lock


def stat(path: str | os.PathLike[str]) -> SpoolStat:
    """What is in the spool at `path` now. Changes nothing, and is not counted as a session itself.

    Raises NotASpool, UnsafeSpool, NetworkFileSystem, UnknownVersion.
    """
    with fs.as_owner(path), Visitor(path, patience=_PATIENCE) as visitor:
        stuck_on = visitor.look()
        damage = visitor.damage
        counts = _listed(visitor) if visitor.journal is None else _counted(visitor.journal.words)
        kind = fs.file_system(Path(visitor.path))
        counts |= dict.fromkeys(("pinned_files", "pinned_bytes", "pinned_by", "live_sessions"))
        try:
            if not stuck_on:
                counts |= {**visitor.step(_pinned, visitor), "live_sessions": _live_sessions(visitor)}
        except LockTimeout:
            stuck_on = visitor.holder()
        return SpoolStat(
            path=visitor.path,
            failed=len(failed_numbers(visitor.directories)),
            **counts,
            limits=agree(visitor.directories, Limits()),
            file_system=kind,
            in_memory=kind in MEMORY,
            waiting_mode=ears.mode(),
            index_damage=damage,
            stuck_on=stuck_on,
        )


def _counted(words: Words) -> dict[str, Any]:
    """What the table's header says; one transition may be half in it."""
    return {
        "state": _STATES.get(words[W.SHUTDOWN], "open"),
        "depth": words[W.READY.length] + words[W.REDELIVERY.length],
        "delayed": words[W.DELAYED_COUNT],
        "in_flight": words[W.IN_FLIGHT_COUNT],
        "bytes": words[W.ITEM_BYTES],
        "oldest_age": _oldest_age(words),
        "puts": words[W.NEXT_SEQ] - words[W.FIRST_SEQ],
        "gets": words[W.DELIVERED_TOTAL],
        "free_files": words[W.POOL_COUNT],
        "free_bytes": words[W.POOL_BYTES],
        "wanted_bytes": pool.wanted(words),
    }


def _listed(visitor: Visitor) -> dict[str, Any]:
    """What the directories say, for a spool without an index."""
    counts = dict.fromkeys(
        "depth bytes delayed in_flight puts gets free_files free_bytes wanted_bytes".split(), 0
    )
    directories = visitor.directories
    for names in fs.batches(directories.items):
        for name in names:
            with suppress(FileNotFoundError):
                counts["bytes"] += fs.stat_at(name, dir_fd=directories.items).st_size
                counts["depth"] += item_number(name) is not None
    return {**counts, "state": _STATES[read_shutdown(directories.root)], "oldest_age": None}


def _oldest_age(words: Words) -> float | None:
    """Seconds since the first items to be delivered, requeued or never delivered, were put, at most; 0 when the wall
    clock was set back."""
    heads = [words[queue.head] for queue in (W.READY, W.REDELIVERY) if words[queue.head]]
    times = [words[head + W.PUT_TIME] for head in heads if head + W.RECORD <= len(words)]
    return max(0.0, (time.time_ns() - min(times)) / 1e9) if times else None


def _pinned(visitor: Visitor) -> dict[str, Any]:
    """How many files of `free/` are pinned or reserved, their bytes, and these by process: a step."""
    if visitor.journal is None:
        return {"pinned_files": 0, "pinned_bytes": 0, "pinned_by": {}}
    sizes = rows(visitor.journal.words, *W.UNLISTED)[:, W.BYTES]
    by = pool.held_by(visitor.directories, visitor.journal.words)
    return {"pinned_files": len(sizes), "pinned_bytes": int(sizes.sum()), "pinned_by": by}


def _live_sessions(visitor: Visitor) -> int:
    alive, live = visitor.directories.alive, 0
    for names in fs.batches(alive):
        tokens = set(map(liveness.token_of, names)) - {0}
        live += len(tokens) - len(visitor.step(liveness.crashed_among, alive, tokens))
    return live
