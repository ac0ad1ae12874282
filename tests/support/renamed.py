"""The names of reports that the rebuild changes: tests are written with the new ones.

Once `REBUILT` is true for good, `new_names` is `dataclasses.asdict`, and what stands under `if not REBUILT` goes.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from spoolipc import SpoolStat

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REBUILT: Final = hasattr(SpoolStat, "live_sessions")
FOREIGN: Final = "foreign" if REBUILT else "stranger"
_NEW: Final = {
    "held_files": "pinned_files",
    "held_bytes": "pinned_bytes",
    "live_parties": "live_sessions",
    "returned_items": "requeued_items",
    "given_up_items": "dead_lettered_items",
    "stale_parties": "crashed_sessions",
    "strangers": "foreign_files",
}


def renamed(said: dict[str, Any]) -> dict[str, Any]:
    """A report as JSON has it, under its new names."""
    return {_NEW.get(name, name): value for name, value in said.items()}


def new_names(report: DataclassInstance) -> dict[str, Any]:
    """The fields of a report, under their new names."""
    return renamed(asdict(report))
