"""What one builds first: np.save to a temporary name, rename, send the name, np.load, remove."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..pair import SPAWN, Array, Read, Receiver, Sender
from .base import Carrier, Window


class SaveLoadLink:
    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        self.folder = folder
        self.names = SPAWN.SimpleQueue()
        self.window = Window(window)

    def sender(self) -> Sender:
        return SaveLoadEnd(self)

    def receiver(self) -> Receiver:
        return SaveLoadEnd(self)

    def close(self) -> None:
        self.names.close()


class SaveLoadEnd:
    def __init__(self, link: SaveLoadLink) -> None:
        self._names, self._window = link.names, link.window
        self._folder = str(link.folder)
        self._number = 0

    def send(self, array: Array) -> None:
        self._window.free.acquire()
        self._number += 1
        name = f"{self._folder}/{self._number}.npy"
        with open(name + ".tmp", "wb") as file:
            np.save(file, array)
        os.rename(name + ".tmp", name)
        self._names.put(name)

    def receive(self, read: Read) -> None:
        name = self._names.get()
        read(np.load(name))
        os.unlink(name)
        self._window.free.release()

    def close(self) -> None:
        self._names.close()


CARRIER = Carrier(
    "save and load",
    "https://numpy.org/doc/stable/reference/generated/numpy.save.html",
    "np.save and rename, the name through a SimpleQueue, np.load and unlink; a semaphore is the window",
    SaveLoadLink,
    stored=True,
)
