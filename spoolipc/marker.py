"""The marker file of a spool that was shut down: it outlives the processes and the index."""

from __future__ import annotations

import contextlib
import os

from . import words as W
from .layout import Layout
from .ownfile import open_own

_SHUTDOWN = "shutdown"
_STATES = {W.DRAINING: b"draining", W.DISCARDED: b"discarded"}


def read_shutdown(layout: Layout) -> int:
    """The state of the spool as its marker file says it."""
    try:
        fd = open_own(layout.root, _SHUTDOWN, os.O_RDONLY)
    except FileNotFoundError:
        return W.OPEN
    with open(fd, "rb") as file:
        return W.DISCARDED if file.read(16) == _STATES[W.DISCARDED] else W.DRAINING


def write_shutdown(layout: Layout, state: int) -> None:
    """Make the marker file say `state`. A crash within may leave DRAINING where DISCARDED was meant."""
    if state == W.OPEN:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_SHUTDOWN, dir_fd=layout.root)
        return
    fd = open_own(layout.root, _SHUTDOWN, os.O_WRONLY | os.O_CREAT, layout.file_mode)
    try:
        os.ftruncate(fd, 0)
        os.write(fd, _STATES[state])
    finally:
        os.close(fd)
