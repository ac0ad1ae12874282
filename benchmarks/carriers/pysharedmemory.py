"""py-sharedmemory: recycled shared-memory blocks, one copy in and one copy out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..pair import SPAWN, Array, Read, Receiver, Sender
from .base import Carrier


class BlocksLink:
    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        from py_sharedmemory import create_shared_memory_pair

        self._sender, self._receiver = create_shared_memory_pair(capacity=window, ctx=SPAWN)

    def sender(self) -> Sender:
        return BlocksEnd(self._sender)

    def receiver(self) -> Receiver:
        return BlocksEnd(self._receiver)

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()


class BlocksEnd:
    def __init__(self, end: Any) -> None:
        self._end = end

    def send(self, array: Array) -> None:
        self._end.put(array)

    def receive(self, read: Read) -> None:
        read(self._end.get())

    def close(self) -> None:
        self._end.close()


CARRIER = Carrier(
    "py-sharedmemory",
    "https://github.com/tobiaswuerth/python_shared_memory_queue#quick-start",
    "create_shared_memory_pair(capacity), put and get of the array",
    BlocksLink,
    module="py_sharedmemory",
    package="py-sharedmemory",
)
