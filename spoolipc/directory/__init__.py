"""The engine of one machine: a spool is a directory, an item a plain `.npy` file in it.

Draft.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..engine import ConsumerOptions, ProducerOptions
from ..message import DeadLetter, Retried, SpoolStat
from .consumer import DirectoryConsumer
from .dead_letters import failed_drop, failed_list, failed_retry
from .producer import DirectoryProducer
from .stat import stat


class DirectoryEngine:
    """The spool in the directory `path`. Keeps `spoolipc.engine.Engine`, and is its own `Admin`."""

    crosses_processes = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def producer(self, options: ProducerOptions) -> DirectoryProducer:
        """Open it for putting, making it where there is none."""
        return DirectoryProducer(self.path, options)

    def consumer(self, options: ConsumerOptions) -> DirectoryConsumer:
        """Open it for getting, making it where there is none."""
        return DirectoryConsumer(self.path, options)

    def admin(self) -> DirectoryEngine:
        """Look after it."""
        return self

    def stat(self) -> SpoolStat:
        """What is in it now."""
        return stat(self.path)

    def failed_list(self) -> list[DeadLetter]:
        """Its dead letters, in the order in which they were put."""
        return failed_list(self.path)

    def failed_retry(self, seqs: Iterable[int] | None) -> Retried:
        """Requeue dead letters as new items; None for all. Raises NoSuchItem."""
        return failed_retry(self.path, seqs)

    def failed_drop(self, seqs: Iterable[int] | None) -> list[int]:
        """Remove dead letters for good; None for all. Raises NoSuchItem."""
        return failed_drop(self.path, seqs)
