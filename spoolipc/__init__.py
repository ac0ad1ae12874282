"""Large NumPy arrays handed between processes, through files in a spool directory."""

from .errors import (
    BadItem,
    Empty,
    Full,
    LeaseExpired,
    LimitMismatch,
    LockTimeout,
    NetworkFileSystem,
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
from .reader import SpoolReader
from .writer import SpoolWriter

__all__ = [
    "BadItem",
    "Empty",
    "Full",
    "LeaseExpired",
    "LimitMismatch",
    "LockTimeout",
    "NetworkFileSystem",
    "NotASpool",
    "ShutDown",
    "SpoolClosed",
    "SpoolError",
    "SpoolGone",
    "SpoolReader",
    "SpoolWriter",
    "StorageError",
    "TooLarge",
    "UnknownVersion",
    "UnsafeSpool",
    "UnsupportedArray",
]
