"""persist-queue: its SQLite queue, the one of its queues that two processes can share, with raw bytes as serializer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..pair import Array, Read, Receiver, Sender
from .base import Carrier, Window


class RawBytes:
    """A serializer that hands SQLite the array's own memory."""

    @staticmethod
    def dumps(array: Array) -> Any:
        return array.data

    @staticmethod
    def loads(stored: bytes) -> Array:
        return np.frombuffer(stored)


def open_queue(folder: Path) -> Any:
    from persistqueue import SQLiteQueue

    return SQLiteQueue(str(folder), auto_commit=True, multithreading=True, timeout=60, serializer=RawBytes)


class SqliteLink:
    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        self.folder = folder
        open_queue(folder).close()  # made before two processes open it at the same moment
        self.window = Window(window)

    def sender(self) -> Sender:
        return SqliteEnd(self)

    def receiver(self) -> Receiver:
        return SqliteEnd(self)

    def close(self) -> None:
        pass


class SqliteEnd:
    def __init__(self, link: SqliteLink) -> None:
        self._window = link.window
        self._queue = open_queue(link.folder)

    def send(self, array: Array) -> None:
        self._window.free.acquire()
        self._queue.put(array)
        self._window.filled.release()

    def receive(self, read: Read) -> None:
        self._window.filled.acquire()
        read(self._queue.get(block=False))
        self._window.free.release()

    def close(self) -> None:
        self._queue.close()


CARRIER = Carrier(
    "persist-queue",
    "https://github.com/peter-wangxu/persist-queue#sqlite3-based-queues",
    "SQLiteQueue with auto_commit and a raw serializer; semaphores are the window and wake the reader",
    SqliteLink,
    module="persistqueue",
    package="persist-queue",
    stored=True,
)
