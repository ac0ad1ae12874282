"""Where the lock of a spool lies: the only place in the tests that knows it."""

from __future__ import annotations

from pathlib import Path


def lock_file(path: Path) -> Path:
    """The directory that a change of the spool at `path` is locked by, with flock on a descriptor of it."""
    return path / "items"
