"""diskcache.Deque: bytes, which it stores as they are; over 32 KB in files of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..pair import Array, Read, Receiver, Sender
from .base import Carrier, Window


class DequeLink:
    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        self.folder = folder
        self.window = Window(window)

    def sender(self) -> Sender:
        return DequeEnd(self)

    def receiver(self) -> Receiver:
        return DequeEnd(self)

    def close(self) -> None:
        pass


class DequeEnd:
    def __init__(self, link: DequeLink) -> None:
        from diskcache import Deque

        self._window = link.window
        self._deque = Deque(directory=str(link.folder))

    def send(self, array: Array) -> None:
        self._window.free.acquire()
        self._deque.append(array.tobytes())
        self._window.filled.release()

    def receive(self, read: Read) -> None:
        self._window.filled.acquire()
        read(np.frombuffer(self._deque.popleft()))
        self._window.free.release()

    def close(self) -> None:
        self._deque.cache.close()


CARRIER = Carrier(
    "diskcache.Deque",
    "https://grantjenks.com/docs/diskcache/tutorial.html#deque",
    "append and popleft of raw bytes, which it does not pickle; semaphores are the window and wake the reader",
    DequeLink,
    module="diskcache",
    package="diskcache",
    stored=True,
)
