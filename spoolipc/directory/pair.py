"""Both sides of a spool through one session, and the count of unfinished tasks that only who has both can keep.

A writer and a reader of one process have 16 descriptors, a pair has the 8 of its one session. The two sides keep what
they keep apart: each has mappings and pins of its own, under one token. To others the session is a writer.

A task is finished when `task_done` says so. Unfinished are the items in the spool, and of those delivered for good as
many as are not said to be done: both are counted by the transitions that make and take items, so a crash between a put
and its being counted cannot be.
"""

from __future__ import annotations

import os

from ..engine import ConsumerOptions, ProducerOptions
from ..message import Deadline, Limits
from . import housekeeping
from . import table as W
from .forwarding import DirectorySource
from .liveness import is_alone
from .pool import waiting
from .producer import DirectoryProducer
from .session import MEMBERS, Session, Side, operation
from .table import Words


class DirectoryPair(Side):
    """A session in a spool directory that puts and gets. Keeps `spoolipc.engine.Pair`."""

    def __init__(self, path: str | os.PathLike[str], limits: Limits) -> None:
        self.session = Session(path, limits, "writer")
        self.producer = DirectoryProducer(path, ProducerOptions(limits), self.session)
        self.consumer = DirectorySource(path, ConsumerOptions(limits, values=True), self.session)
        with self.session.explaining():
            self.session.step(self._begin)

    def _begin(self) -> tuple[None, int, int]:
        """Where nobody else has the spool open, nobody has a task in work: what a crash left is no task. A step."""
        words = self.session.journal.words
        if is_alone(self.session.directories.alive, self.session.token):
            words[W.DONE_TOTAL] = words[W.DELIVERED_TOTAL]
        return None, 0, 0

    @operation
    def task_done(self) -> bool:
        """Count one task as finished; false where none is unfinished."""
        return self.session.step(self._count)

    def _count(self) -> tuple[bool, int, int]:
        """One store, so a crash leaves it made or not. A step."""
        words = self.session.journal.words
        left = unfinished(words)
        if left <= 0:
            return False, 0, 0
        words[W.DONE_TOTAL] = words[W.DONE_TOTAL] + 1 & W.ALL_BITS
        return True, 0, 0 if left > 1 else MEMBERS

    @operation
    def join(self, until: Deadline) -> bool:
        """Wait until no task is unfinished; false when the deadline is past."""

        def look(words: Words) -> bool:
            return unfinished(words) <= 0

        while self.session.step(self._unfinished) > 0:  # a look amid a transition may see less
            if not self.session.wait("space", until, look, lambda: housekeeping.round_if_due(self.session)):
                return False
        return True

    def _unfinished(self) -> tuple[int, int, int]:
        return unfinished(self.session.journal.words), 0, 0

    def close(self) -> None:
        """Leave, as a reader and as a writer does."""
        self.session.close(self._leave)
        self.producer.lent.clear()

    def _leave(self) -> tuple[bool, int, int]:
        """What is in flight is requeued before the writer drops all that is left."""
        left, items, space = self.consumer.leave()
        return (True, items, space) if left else (self.producer.leave()[0], items, space)


def unfinished(words: Words) -> int:
    """Tasks that were put and are not said to be done."""
    in_work = words[W.DELIVERED_TOTAL] - words[W.DONE_TOTAL] & W.ALL_BITS
    return waiting(words) + words[W.IN_FLIGHT_COUNT] + (in_work if in_work < 2**63 else in_work - 2**64)
