"""Blocks in which no thread of this process forks.

For what a child must not inherit half done: a lock taken but not yet known to the party that closes it in the child,
or Python's own lock on a module being imported, which nobody would release in the child.
"""

from __future__ import annotations

import os
import threading

no_fork = threading.RLock()
"""Use: `with no_fork:`. A fork on another thread waits for the end of the block; keep it short."""

os.register_at_fork(before=no_fork.acquire, after_in_parent=no_fork.release, after_in_child=no_fork.release)
