"""Large NumPy arrays handed between processes, through files in a spool directory."""

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
from .reader import Peeked, SpoolReader
from .writer import SpoolWriter

__all__ = [
    "AlreadySettled",
    "BadItem",
    "Empty",
    "Full",
    "Item",
    "LeaseExpired",
    "LimitMismatch",
    "LockTimeout",
    "NetworkFileSystem",
    "NotASpool",
    "Peeked",
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
