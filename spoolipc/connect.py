"""From a path or a URL to the engine that keeps the spool there."""

from __future__ import annotations

import os
import re
from typing import Final

from .engine import Engine
from .errors import UnsupportedOperation

SCHEMES: Final = {"memory": "NAME", "nats": "HOST[:PORT]/NAME", "tls": "HOST[:PORT]/NAME"}
"""What each is followed by."""
_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_SLIP: Final = tuple(f"{each}:" for each in SCHEMES)


def connect(path_or_url: str | os.PathLike[str]) -> Engine:
    """The engine for a directory's path or for a URL; opens nothing yet.

    `memory://NAME` is a spool of this process alone, without files; everything without a scheme is a directory.

    Raises ValueError for a scheme that no engine has, and for an empty path; a directory of such a name is "./NAME".
    """
    place = os.fsdecode(path_or_url)
    if not place:
        raise ValueError("path is empty; give the directory of the spool, or '.' for this one")
    url = _URL.fullmatch(place)
    # An engine is imported when it is used: what one of them depends on is nobody else's concern.
    if url is None and not place.startswith(_SLIP):
        from .directory import DirectoryEngine

        return DirectoryEngine(place)
    if url is not None and url[1] == "memory":
        from .memory import MemoryEngine

        return MemoryEngine(url[2])
    if url is not None and url[1] in ("nats", "tls"):
        try:
            from .nats import NatsEngine
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "nats":
                raise
            what = "needs nats-py, which is not installed: pip install nats-py"
            raise UnsupportedOperation(f"a spool on a server {what}") from None
        return NatsEngine(place)
    known = ", ".join(f"{scheme}://{rest}" for scheme, rest in SCHEMES.items())
    told = shown(place)
    raise ValueError(f"{told!r} is no URL that is known ({known}); the directory of that name is './{told}'")


def shown(path_or_url: str | os.PathLike[str]) -> str:
    """A path or URL as messages show it, without what may be a password."""
    return re.sub("(?s):.*@", ":...@", os.fsdecode(path_or_url))
