"""pyzmq over ipc, without copies in Python: frames sent and received with copy=False."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..pair import Array, Read, Receiver, Sender
from .base import Carrier


class ZmqLink:
    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        self._address = f"ipc://{folder}/socket"
        self._each = max(1, window // 2)

    def sender(self) -> Sender:
        import zmq

        return ZmqEnd(zmq.PUSH, self._address, self._each)

    def receiver(self) -> Receiver:
        import zmq

        return ZmqEnd(zmq.PULL, self._address, self._each)

    def close(self) -> None:
        pass


class ZmqEnd:
    """A socket; both ends together hold as many messages as the window allows."""

    def __init__(self, kind: int, address: str, most: int) -> None:
        import zmq

        self._context: Any = zmq.Context()
        self._socket: Any = self._context.socket(kind)
        self._socket.set_hwm(most)
        if kind == zmq.PULL:
            self._socket.bind(address)
        else:
            self._socket.connect(address)

    def send(self, array: Array) -> None:
        self._socket.send(array, copy=False)

    def receive(self, read: Read) -> None:
        frame = self._socket.recv(copy=False)
        read(np.frombuffer(frame.buffer))

    def close(self) -> None:
        self._context.destroy(linger=0)


CARRIER = Carrier(
    "pyzmq",
    "https://pyzmq.readthedocs.io/en/latest/howto/serialization.html",
    "PUSH and PULL over ipc, copy=False on both sides, dtype and shape agreed beforehand",
    ZmqLink,
    module="zmq",
    package="pyzmq",
)
