"""Memory for items that come in pieces, used again."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np


class Memory:
    """Memory for items that come in pieces, written again when no array is over it any more: new pages cost twice to
    forty times as much as a copy into those that are there."""

    def __init__(self) -> None:
        self._free = deque[memoryview](maxlen=2)
        self._is_used = False

    def buffer(self, size: int) -> np.ndarray[Any, Any]:
        """An array of so many bytes; no view of it reaches what it is over. Raises MemoryError."""
        self._is_used, memory = True, None
        for _ in range(len(self._free)):
            found = self._free.popleft()
            if memory is None and size <= len(found) <= 2 * size:
                memory = found
            else:
                self._free.append(found)
        memory = memory or np.empty(size, np.uint8).data
        buffer = np.frombuffer(memory, np.uint8, size)
        weakref.finalize(buffer, self._free.append, memory).atexit = False
        return buffer

    def trim(self) -> None:
        """Keep none where none was asked for since the last time."""
        if not self._is_used:
            self._free.clear()
        self._is_used = False
