"""torch.multiprocessing on the CPU: shared tensors that the consumer sends back to be filled again.

That is what its notes advise ("Reuse buffers passed through a Queue"). The sharing strategy is `file_system`, and
the consumer keeps the tensors it has seen: so neither side maps anything in the steady state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..pair import SPAWN, Array, Read, Receiver, Sender
from .base import Carrier


def torch_ready() -> Any:
    import torch
    import torch.multiprocessing

    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    return torch


class TorchLink:
    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        self.size, self.window = nbytes // 8, window
        self.filled = SPAWN.Queue(window)
        self.free = SPAWN.Queue(window)

    def sender(self) -> Sender:
        return TorchSender(self)

    def receiver(self) -> Receiver:
        return TorchReceiver(self)

    def close(self) -> None:
        self.filled.close()
        self.free.close()


class TorchSender:
    def __init__(self, link: TorchLink) -> None:
        torch = torch_ready()
        self._link = link
        size = link.size
        self._pool = [torch.ones(size, dtype=torch.float64).share_memory_() for _ in range(link.window)]
        self._fresh = list(self._pool)

    def send(self, array: Array) -> None:
        tensor = self._fresh.pop() if self._fresh else self._link.free.get()
        np.copyto(tensor.numpy(), array)
        self._link.filled.put(tensor)

    def close(self) -> None:
        self._link.filled.cancel_join_thread()
        self._link.filled.close()


class TorchReceiver:
    def __init__(self, link: TorchLink) -> None:
        torch_ready()
        self._link = link
        self._seen: dict[int, Any] = {}

    def receive(self, read: Read) -> None:
        tensor = self._link.filled.get()
        self._seen[tensor.data_ptr()] = tensor
        read(tensor.numpy())
        self._link.free.put(tensor)

    def close(self) -> None:
        self._link.free.cancel_join_thread()
        self._link.free.close()


CARRIER = Carrier(
    "torch.multiprocessing",
    "https://docs.pytorch.org/docs/stable/notes/multiprocessing.html#reuse-buffers-passed-through-a-queue",
    "a pool of shared tensors through a Queue and back, file_system strategy, mappings kept",
    TorchLink,
    module="torch",
    package="torch",
)
