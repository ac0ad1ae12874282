"""Large NumPy arrays handed between processes, through files in a spool directory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .admin import failed_drop, failed_list, failed_retry, failed_show, fsck, purge, remove, set_limits
from .admin import gc as gc
from .admin import stat as stat
from .directory.check import FsckReport, Problem
from .directory.temporary import remove_temporary
from .errors import (
    AccessDenied,
    AlreadySettled,
    BadItem,
    Empty,
    Full,
    LeaseExpired,
    LimitMismatch,
    LockTimeout,
    NetworkFileSystem,
    NoSuchItem,
    NotASpool,
    ReentrantCall,
    RemoteError,
    ServerUnreachable,
    ShutDown,
    SpoolClosed,
    SpoolError,
    SpoolGone,
    SpoolInUse,
    StorageError,
    TooLarge,
    UnknownVersion,
    UnsafeSpool,
    UnsupportedArray,
    UnsupportedItem,
    UnsupportedOperation,
    WorkerDied,
)
from .forward import forward
from .item import Item, Loan
from .message import DeadLetter, Failure, GcReport, Limits, Peeked, Retried, SpoolStat, StoredArray
from .queue import SpoolReader, SpoolWriter

if TYPE_CHECKING:
    from .mp import JoinableQueue, Queue
    from .workers import imap

__version__ = "0.1.0"

logging.getLogger("spoolipc").addHandler(logging.NullHandler())

__all__ = [
    "AccessDenied",
    "AlreadySettled",
    "BadItem",
    "DeadLetter",
    "Empty",
    "Failure",
    "FsckReport",
    "Full",
    "GcReport",
    "Item",
    "JoinableQueue",
    "LeaseExpired",
    "LimitMismatch",
    "Limits",
    "Loan",
    "LockTimeout",
    "NetworkFileSystem",
    "NoSuchItem",
    "NotASpool",
    "Peeked",
    "Problem",
    "Queue",
    "ReentrantCall",
    "RemoteError",
    "Retried",
    "ServerUnreachable",
    "ShutDown",
    "SpoolClosed",
    "SpoolError",
    "SpoolGone",
    "SpoolInUse",
    "SpoolReader",
    "SpoolStat",
    "SpoolWriter",
    "StorageError",
    "StoredArray",
    "TooLarge",
    "UnknownVersion",
    "UnsafeSpool",
    "UnsupportedArray",
    "UnsupportedItem",
    "UnsupportedOperation",
    "WorkerDied",
    "failed_drop",
    "failed_list",
    "failed_retry",
    "failed_show",
    "forward",
    "fsck",
    "imap",
    "purge",
    "remove",
    "remove_temporary",
    "set_limits",
]


def __getattr__(name: str) -> Any:
    if name in ("JoinableQueue", "Queue", "imap"):
        from . import mp, workers  # they import multiprocessing, which nobody else needs

        return getattr(workers if name == "imap" else mp, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # `gc` and `stat` are public too, and left out of `import *`, where they would shadow modules of these names.
    return [*__all__, "__version__", "gc", "stat"]
