"""What a carrier is, and the window that carriers without a bound of their own are given."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.synchronize import Semaphore

from ..pair import SPAWN, MakeLink


@dataclass(frozen=True)
class Carrier:
    """A way to hand arrays over.

    url: its own documentation of the use that is measured. usage: that use, in a line.
    module, package: what must be installed for it, and the name on PyPI; empty for what is always there.
    stored: keeps its messages in files, so that it is measured on disk too.
    apart: keeps daemons running, so that it is measured after the others.
    """

    name: str
    url: str
    usage: str
    make: MakeLink
    module: str = ""
    package: str = ""
    stored: bool = False
    apart: bool = False
    stop: Callable[[], None] = lambda: None

    def missing(self) -> str | None:
        """Why it cannot be measured here, or None."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed"
        return None

    def version(self) -> str:
        """The version installed; empty for what is always there."""
        return importlib.metadata.version(self.package) if self.package else ""


class Window:
    """At most `size` messages in flight, and a reader that sleeps until there is one: two semaphores.

    For carriers that have no bound, or no blocking get, across processes. It costs less than polling would.
    """

    def __init__(self, size: int) -> None:
        self.free: Semaphore = SPAWN.Semaphore(size)
        self.filled: Semaphore = SPAWN.Semaphore(0)
