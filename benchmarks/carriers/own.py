"""The carriers that everybody has: the limit, multiprocessing.Queue, and spoolipc itself."""

from __future__ import annotations

import shutil
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

import numpy as np

from spoolipc import SpoolReader, SpoolWriter

from ..pair import SPAWN, Array, Read, Receiver, Sender
from .base import Carrier

SHM = Path("/dev/shm")


class RingLink:
    """The limit: slots in a SharedMemory that both sides keep mapped.

    The producer copies into a slot, and the consumer reads it where it is.
    """

    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        size = nbytes // 8 * 8
        if shutil.disk_usage(SHM).free < size * window:
            raise OSError(f"{SHM} has no room for {size * window} bytes")
        self._shape = (window, size // 8)
        self._memory = SharedMemory(create=True, size=size * window)
        self._free: Semaphore = SPAWN.Semaphore(window)
        self._filled: Semaphore = SPAWN.Semaphore(0)

    def sender(self) -> Sender:
        return _RingEnd(self._memory.name, self._shape, self._free, self._filled)

    def receiver(self) -> Receiver:
        return _RingEnd(self._memory.name, self._shape, self._filled, self._free)

    def close(self) -> None:
        self._memory.close()
        self._memory.unlink()


class _RingEnd:
    """One end of the ring: waits on one semaphore, posts the other."""

    def __init__(self, name: str, shape: tuple[int, int], wait: Semaphore, post: Semaphore) -> None:
        self._memory = SharedMemory(name)
        slots: Array = np.ndarray(shape, np.float64, self._memory.buf)
        self._slots = list(slots)
        self._wait, self._post = wait, post
        self._next = 0

    def _turn(self) -> Array:
        slot: Array = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        return slot

    def send(self, array: Array) -> None:
        self._wait.acquire()
        np.copyto(self._turn(), array)
        self._post.release()

    def receive(self, read: Read) -> None:
        self._wait.acquire()
        read(self._turn())
        self._post.release()

    def close(self) -> None:
        self._slots.clear()
        self._memory.close()


class QueueLink:
    """multiprocessing.Queue, as it comes."""

    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        self._queue = SPAWN.Queue(window)

    def sender(self) -> Sender:
        return _QueueEnd(self._queue)

    def receiver(self) -> Receiver:
        return _QueueEnd(self._queue)

    def close(self) -> None:
        self._queue.close()


class _QueueEnd:
    def __init__(self, queue: Any) -> None:
        self.send = queue.put
        self._get = queue.get
        self._queue = queue

    def receive(self, read: Read) -> None:
        read(self._get())

    def close(self) -> None:
        self._queue.close()


class SpoolLink:
    """spoolipc: put, and get of a view."""

    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        self._path = folder / "spool"
        self._window = window

    def sender(self) -> Sender:
        return _SpoolSender(SpoolWriter(self._path, maxsize=self._window))

    def receiver(self) -> Receiver:
        return _SpoolReceiver(SpoolReader(self._path, maxsize=self._window))

    def close(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


class _SpoolSender:
    def __init__(self, writer: SpoolWriter) -> None:
        self._put = writer.put
        self.close = writer.close

    def send(self, array: Array) -> None:
        self._put(array)


class _SpoolReceiver:
    def __init__(self, reader: SpoolReader) -> None:
        self._get = reader.get
        self.close = reader.close

    def receive(self, read: Read) -> None:
        read(self._get())


LIMIT = Carrier(
    "limit",
    "https://docs.python.org/3/library/multiprocessing.shared_memory.html",
    "a ring of slots in one SharedMemory, kept mapped; two semaphores; the reader reads the slot itself",
    RingLink,
)
SPOOL = Carrier("spoolipc", "docs/performance.md", "put, and get of a view", SpoolLink, stored=True)
QUEUE = Carrier(
    "multiprocessing.Queue",
    "https://docs.python.org/3/library/multiprocessing.html#multiprocessing.Queue",
    "Queue(maxsize), put and get of the array",
    QueueLink,
)
