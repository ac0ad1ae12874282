"""What the faces (writer, reader, queue, asyncio) ask of an engine, and the values that pass between them.

The directory engine keeps this for one machine. Another engine stands behind the same faces by keeping it
too; `tests/contract.py` says what that means. Nothing here blocks but `wait_items` and `wait_space`: a face
loops over a step and a wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

Array = np.ndarray[Any, Any]
Arrays = Array | Any  # or a dict of named arrays: "Any" spares the callers who know which
D = TypeVar("D")


@dataclass(slots=True)
class Payload:
    """What is put: the arrays in order, their names where they have any, and metadata (any JSON value)."""

    arrays: tuple[Array, ...]
    names: tuple[str, ...] | None
    meta: Any


@dataclass(slots=True)
class Delivery:
    """An item that a reader has taken.

    seq: its sequence number. attempt: 1 at its first delivery. put_time: wall clock, ns; 0 when only the
    contents tell it. size: bytes stored. handle: the engine's own, for settling.
    """

    seq: int
    attempt: int
    put_time: int
    size: int
    handle: Any


class Contents(NamedTuple):
    """What is said of an item beside its arrays: their names, if they have any, the metadata, and when it was put
    (wall clock, ns)."""

    names: tuple[str, ...] | None
    meta: Any
    put_time: int


class Source(Protocol):
    """An engine as a reader uses it."""

    @property
    def path(self) -> str:
        """Where it keeps the items."""

    @property
    def maxsize(self) -> int:
        """Most items waiting, 0 for no limit."""

    def get(self, limit: int, *, sure: bool = True) -> list[Payload]:
        """Take up to `limit` items off the spool for good. Raises Empty, ShutDown.

        sure: make sure that there is nothing before Empty is raised; not worth it for a caller that waits next.
        """

    def claim(self, limit: int, lease: float | None, *, sure: bool = True) -> list[Delivery]:
        """Take up to `limit` items in hand, for `lease` seconds (None: as long as this party lives). Raises Empty,
        ShutDown. sure: as for `get`."""

    def load(self, delivery: Delivery) -> Payload:
        """The contents of an item in hand. Raises BadItem, having given it up; LeaseExpired."""

    def contents(self, delivery: Delivery) -> Contents:
        """What an item in hand, or one peeked at, says of itself, read without its arrays. Raises BadItem, having given
        it up; LeaseExpired when it is elsewhere now."""

    def peek(self) -> Delivery:
        """The next item, left where it is. Raises Empty, ShutDown."""

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Take items in hand off the spool for good. Raises LeaseExpired for one that is not in hand any more."""

    def nack(self, delivery: Delivery, delay: float, why: str) -> None:
        """Give an item back, to be delivered again after `delay` seconds."""

    def reject(self, delivery: Delivery, why: str) -> None:
        """Give an item up: it becomes a dead letter."""

    def extend(self, delivery: Delivery, lease: float) -> None:
        """Keep an item in hand for `lease` seconds from now."""

    def wait_items(self, deadline: float | None) -> bool:
        """Wait until there may be an item, or the spool was shut down; False when the deadline (monotonic
        seconds) is past."""

    def qsize(self) -> int:
        """How many items wait."""

    def close(self) -> None:
        """Leave; what is still in hand is delivered to others."""


class Sink(Protocol[D]):
    """An engine as a writer uses it. D: a payload written where the engine keeps it, not yet visible to anybody."""

    @property
    def path(self) -> str:
        """Where it keeps the items."""

    @property
    def maxsize(self) -> int:
        """Most items waiting, 0 for no limit."""

    def preallocate(self, count: int, nbytes: int) -> None:
        """Make ahead what `count` arrays of `nbytes` bytes will need. Raises Full, ValueError."""

    def put_again(self, arrays: Sequence[Array]) -> list[int]:
        """Put single arrays, from the first on, as far as the engine's shortest way goes; their sequence numbers.

        The other way goes on from there: admit, prepare, commit.
        """

    def admit(self, payload: Payload) -> bool:
        """Whether there is room for a payload now. Raises ShutDown, TooLarge, UnsupportedArray."""

    def prepare(self, payload: Payload) -> D:
        """Write a payload, invisible to all. Raises Full when space ran out."""

    def stock(self, payloads: Sequence[Payload]) -> None:
        """Get ready, in one step, for preparing several payloads."""

    def commit(self, drafts: Sequence[D]) -> list[int]:
        """Make drafts items, each whole and at once, from the first on as far as there is room.

        Returns the sequence numbers, at least one. Raises Full, ShutDown.
        """

    def lend(self, template: Array, meta: Any) -> tuple[D, Array]:
        """A draft like `template` and its array, to be filled in place. Raises Full."""

    def finish(self, draft: D) -> None:
        """Say that a lent array's contents are final; the commit follows."""

    def discard(self, draft: D) -> None:
        """Remove a draft."""

    def wait_space(self, payload: Payload, deadline: float | None) -> bool:
        """Wait until there may be room for a payload, or the spool was shut down; False when the deadline is past."""

    def shutdown(self, immediate: bool) -> None:
        """End the spool for all: no more puts; with `immediate` no more gets either."""

    def qsize(self) -> int:
        """How many items wait."""

    def full(self) -> bool:
        """Whether a put would have to wait for `maxsize`."""

    def close(self) -> None:
        """Leave; drafts are removed."""
