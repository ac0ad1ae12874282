"""faster-fifo: its ring in shared memory, with raw bytes instead of pickles, and get_many."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from ..pair import TIMEOUT, Array, Read, Receiver, Sender
from .base import Carrier


def dumps(array: Array) -> bytes:
    return array.tobytes()


def loads(buffer: Any) -> Array:
    return np.frombuffer(buffer)


class FifoLink:
    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        import faster_fifo
        import faster_fifo_reduction  # noqa: F401  (makes its queues picklable)

        self._window = window
        self._queue = faster_fifo.Queue(window * (nbytes + 16) + 64, loads=loads, dumps=dumps)

    def sender(self) -> Sender:
        return FifoEnd(self._queue, self._window)

    def receiver(self) -> Receiver:
        return FifoEnd(self._queue, self._window)

    def close(self) -> None:
        self._queue.close()


class FifoEnd:
    def __init__(self, queue: Any, window: int) -> None:
        self._queue = queue
        self._window = window
        self._got: deque[Array] = deque()

    def send(self, array: Array) -> None:
        self._queue.put(array, timeout=TIMEOUT)

    def receive(self, read: Read) -> None:
        if not self._got:
            self._got.extend(self._queue.get_many(max_messages_to_get=self._window, timeout=TIMEOUT))
        read(self._got.popleft())

    def close(self) -> None:
        self._got.clear()


CARRIER = Carrier(
    "faster-fifo",
    "https://github.com/alex-petrenko/faster-fifo#usage-example",
    "put and get_many, with loads and dumps that pass raw bytes",
    FifoLink,
    module="faster_fifo",
    package="faster-fifo",
)
