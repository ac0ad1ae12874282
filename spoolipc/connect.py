"""From a path or a URL to the engine that keeps the spool there."""

from __future__ import annotations

import os
import re
from typing import Final

from .engine import Engine

SCHEMES: Final = ("memory",)
_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def connect(path_or_url: str | os.PathLike[str]) -> Engine:
    """The engine for a directory's path or for a URL; opens nothing yet.

    `memory://NAME` is a spool of this process alone, without files; everything without a scheme is a directory.

    Raises ValueError for a scheme that no engine has; a directory of such a name is "./NAME".
    """
    place = os.fspath(path_or_url)
    url = _URL.fullmatch(place) if isinstance(place, str) else None
    # An engine is imported when it is used: what one of them depends on is nobody else's concern.
    if url is None:
        from .directory import DirectoryEngine

        return DirectoryEngine(place)
    scheme, name = url.groups()
    if scheme == "memory":
        from .memory import MemoryEngine

        return MemoryEngine(name)
    known = ", ".join(f"{each}://" for each in SCHEMES)
    raise ValueError(f"{place!r} has an unknown scheme; known are {known} and a plain path, of a directory")
