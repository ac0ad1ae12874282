"""Where the lock of a spool lies: the only place in the tests that knows it."""

from __future__ import annotations

from pathlib import Path


def lock_file(path: Path) -> Path:
    """The file or directory that a change of the spool at `path` is locked by, with flock on a descriptor of it."""
    lock = path / "index.lock"
    return lock if lock.exists() else path / "items"
