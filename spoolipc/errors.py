"""Every error the package raises: each a `SpoolError`, and of the standard class a caller would already catch."""

from __future__ import annotations

import queue
import sys

if sys.version_info >= (3, 13):
    from queue import ShutDown as _QueueShutDown
else:

    class _QueueShutDown(Exception):
        """Stands where queue.ShutDown will be."""


class SpoolError(Exception):
    """Base of every error raised by spoolipc.

    seqs: the sequence numbers of what the failed call had put before.
    """

    seqs: tuple[int, ...] = ()

    def __str__(self) -> str:
        """What it is about, first, and what is the matter; of an error of the system without its number."""
        if isinstance(self, OSError) and self.strerror:
            return f"{self.filename}: {self.strerror}" if self.filename else self.strerror
        return super().__str__()


class Empty(SpoolError, queue.Empty):
    """No item came within the time given."""


class Full(SpoolError, queue.Full):
    """No room came within the time given: `maxsize`, `max_bytes` or the file system's free space."""


class ShutDown(SpoolError, _QueueShutDown):
    """The spool was shut down: it takes no more items, and a reader has none left to get."""


class SpoolClosed(SpoolError, ValueError):
    """This writer or reader was closed."""


class ReentrantCall(SpoolError, RuntimeError):
    """A signal handler or finalizer asked for what must not begin within the call that it came amid."""


class UnsupportedArray(SpoolError, TypeError):
    """The object is not an array that can be stored without pickle."""


class UnsupportedItem(SpoolError, TypeError):
    """A part of an item cannot travel without pickle, or is of a class that was not named; the message says where."""


class RemoteError(SpoolError):
    """What was told of an exception that travelled: the cause of one whose class is known here, else in its place.

    name: of its class. arguments: what it was made of. traceback: its text, which is also that of this.
    """

    def __init__(self, name: str, arguments: list[object], traceback: str) -> None:
        super().__init__(name, arguments, traceback)
        self.name = name
        self.arguments = arguments
        self.traceback = traceback

    def __str__(self) -> str:
        """The traceback, begun on a line of its own."""
        return f"\n{self.traceback}"


class WorkerDied(SpoolError):
    """Every worker of `imap` that was given the item died, or all died as soon as they began."""


class TooLarge(SpoolError, ValueError):
    """The array could never fit, however long the caller waits."""


class UnsupportedOperation(SpoolError, NotImplementedError):
    """The spool is kept by an engine that cannot do this; the message says what can."""


class LimitMismatch(SpoolError, ValueError):
    """The spool exists with other limits than the ones asked for."""


class NotASpool(SpoolError, OSError):
    """The path is not a spool and cannot be made one."""


class UnsafeSpool(SpoolError, PermissionError):
    """Something in the spool could be read, planted or changed by another user."""


class NetworkFileSystem(SpoolError, OSError):
    """The directory is on a network file system, where memory maps are not coherent between machines."""


class UnknownVersion(SpoolError, OSError):
    """The spool was written in a format this release does not know."""


class SpoolInUse(SpoolError, OSError):
    """Others have the spool open, or items in flight, and this is done only without them; the message names one."""


class SpoolGone(SpoolError, FileNotFoundError):
    """The spool's directory was deleted while it was in use."""


class LockTimeout(SpoolError, TimeoutError):
    """Another process holds the index lock and does not let go; the message names it."""


class StorageError(SpoolError, OSError):
    """A system call on the spool failed; the message names the path."""


class ServerUnreachable(SpoolError, ConnectionError):
    """The server of the spool cannot be connected to, or does not answer; the message names it."""


class AccessDenied(SpoolError, PermissionError):
    """The servers refuse who this is, or one of both is not trusted; the message says what to set."""


class BadItem(SpoolError, ValueError):
    """An item file is damaged; it has been moved to `failed/` with the reason."""


class LeaseExpired(SpoolError, TimeoutError):
    """The item is not in flight at this reader any more: its lease ended, or it was settled already."""


class AlreadySettled(SpoolError, RuntimeError):
    """The item was acknowledged, requeued or rejected before, or the loan committed or discarded."""


class NoSuchItem(SpoolError, LookupError):
    """The spool has no dead letter of that number."""


# What every engine says in the same words


def shut_down(path: str) -> ShutDown:
    """The error of a put into a spool that takes none any more."""
    what = "was shut down; SpoolWriter(path, reopen=True) opens it again, fresh=True empties it too"
    return ShutDown(f"{path}: {what}")


def nothing_left(path: str, *, writers_left: bool = False) -> ShutDown:
    """The error of a get from a spool that has come to its end. writers_left: without a shutdown."""
    if writers_left:
        return ShutDown(f"{path}: has ended: no item is left, and no writer")
    return ShutDown(f"{path}: was shut down and has no more items; a writer begins again with fresh=True")
