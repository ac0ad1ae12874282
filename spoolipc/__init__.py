"""Large NumPy arrays handed between processes, through files in a spool directory."""

import logging

from .delivery import Item
from .errors import (
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
    ShutDown,
    SpoolClosed,
    SpoolError,
    SpoolGone,
    StorageError,
    TooLarge,
    UnknownVersion,
    UnsafeSpool,
    UnsupportedArray,
)
from .failed import DeadLetter, Retried, StoredArray, failed_drop, failed_list, failed_retry, failed_show
from .fsck import FsckReport, fsck
from .history import Failure
from .layout import Limits
from .premises import Problem
from .reader import Peeked, SpoolReader
from .status import SpoolStat, stat
from .sweep import GcReport, gc
from .writer import SpoolWriter

__version__ = "0.1.0"

logging.getLogger("spoolipc").addHandler(logging.NullHandler())

__all__ = [
    "AlreadySettled",
    "BadItem",
    "DeadLetter",
    "Empty",
    "Failure",
    "FsckReport",
    "Full",
    "GcReport",
    "Item",
    "LeaseExpired",
    "LimitMismatch",
    "Limits",
    "LockTimeout",
    "NetworkFileSystem",
    "NoSuchItem",
    "NotASpool",
    "Peeked",
    "Problem",
    "Retried",
    "ShutDown",
    "SpoolClosed",
    "SpoolError",
    "SpoolGone",
    "SpoolReader",
    "SpoolStat",
    "SpoolWriter",
    "StorageError",
    "StoredArray",
    "TooLarge",
    "UnknownVersion",
    "UnsafeSpool",
    "UnsupportedArray",
    "failed_drop",
    "failed_list",
    "failed_retry",
    "failed_show",
    "fsck",
    "gc",
    "stat",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
