"""multiprocessing.SimpleQueue, and multiprocessing.Pipe with raw bytes into memory that is used again."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import numpy as np

from ..pair import SPAWN, Array, Read, Receiver, Sender
from .base import Carrier

PIPE_BYTES = 1 << 20
"""The largest pipe that an ordinary user may ask the kernel for."""


class SimpleQueueLink:
    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        self._queue = SPAWN.SimpleQueue()

    def sender(self) -> Sender:
        return SimpleQueueEnd(self._queue)

    def receiver(self) -> Receiver:
        return SimpleQueueEnd(self._queue)

    def close(self) -> None:
        self._queue.close()


class SimpleQueueEnd:
    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def send(self, array: Array) -> None:
        self._queue.put(array)

    def receive(self, read: Read) -> None:
        read(self._queue.get())

    def close(self) -> None:
        self._queue.close()


class PipeLink:
    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        self._readable, self._writable = SPAWN.Pipe(duplex=False)
        fcntl.fcntl(self._writable.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._size = nbytes // 8

    def sender(self) -> Sender:
        return PipeSender(self._writable)

    def receiver(self) -> Receiver:
        return PipeReceiver(self._readable, self._size)

    def close(self) -> None:
        self._readable.close()
        self._writable.close()


class PipeSender:
    def __init__(self, writable: Any) -> None:
        self._writable = writable

    def send(self, array: Array) -> None:
        self._writable.send_bytes(array.data)

    def close(self) -> None:
        self._writable.close()


class PipeReceiver:
    def __init__(self, readable: Any, size: int) -> None:
        self._readable = readable
        self._own = np.ones(size)

    def receive(self, read: Read) -> None:
        self._readable.recv_bytes_into(self._own.data)
        read(self._own)

    def close(self) -> None:
        self._readable.close()


SIMPLE_QUEUE = Carrier(
    "multiprocessing.SimpleQueue",
    "https://docs.python.org/3/library/multiprocessing.html#multiprocessing.SimpleQueue",
    "put and get of the array; the pipe is the window",
    SimpleQueueLink,
)
PIPE = Carrier(
    "multiprocessing.Pipe",
    "https://docs.python.org/3/library/multiprocessing.html#multiprocessing.connection.Connection.recv_bytes_into",
    "send_bytes, and recv_bytes_into an array used again; the pipe, enlarged to 1 MiB, is the window",
    PipeLink,
)
