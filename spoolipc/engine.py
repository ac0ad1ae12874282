"""What the faces ask of an engine: operations with a deadline, and capabilities that one engine has and another lacks.

An operation may do I/O and may wait until its deadline; nothing here speaks of files or of the stages of a put. A
second engine stands behind the same faces by keeping these protocols; `spoolipc.testing` is the suite that shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from .errors import Empty, Full
from .message import (
    NOW,
    Array,
    ArraySpec,
    Contents,
    DeadLetter,
    Deadline,
    Delivery,
    GcReport,
    Json,
    Limits,
    Message,
    Peeked,
    Progress,
    Retried,
    SpoolStat,
    Verdict,
)

T = TypeVar("T")
Durability = Literal["none", "fsync"]
End = Literal["shutdown", "writers"]


@dataclass(frozen=True, slots=True)
class ProducerOptions:
    """How a producer is opened. An engine refuses with ValueError what it cannot do.

    durability: "fsync" survives the loss of power. reopen: take puts again after a shutdown. checksum: store one with
    every item. fresh: begin with no item waiting, the spool open, and the limits given in force, whatever they were;
    raises SpoolInUse while another producer has the spool open, or anybody has items in flight. create: make the spool
    where there is none; else raises NotASpool.
    """

    limits: Limits = field(default_factory=Limits)
    durability: Durability = "none"
    reopen: bool = False
    checksum: bool = False
    fresh: bool = False
    create: bool = True


@dataclass(frozen=True, slots=True)
class ConsumerOptions:
    """How a consumer is opened. verify: compare every item with its checksum. create: as for a producer. end: when
    there is nothing to wait for any more, so that ShutDown is raised: "shutdown", after one; "writers", also when no
    producer has the spool open, nothing is in flight at others or delayed, and since this was opened there was a
    producer, or an item. values: deliver those of a Queue too, by `names` of (); else one stays where it is, and who
    takes or loads it gets an UnsupportedItem."""

    limits: Limits = field(default_factory=Limits)
    verify: bool = False
    create: bool = True
    end: End = "shutdown"
    values: bool = False


class Session(Protocol):
    """An open spool, of either side. Threads may share one."""

    @property
    def path(self) -> str:
        """Where the items are kept: a path or a URL that `connect` takes."""

    @property
    def maxsize(self) -> int:
        """Most items waiting, 0 for no limit."""

    def qsize(self) -> int:
        """How many items wait, delayed ones included."""

    def close(self) -> None:
        """Leave; items still in flight here are redelivered to others. Harmless when repeated."""


class Producer(Session, Protocol):
    """An engine as a writer uses it."""

    def put(self, messages: Sequence[Message], until: Deadline) -> list[int]:
        """Put messages in order, each whole and at once; returns their sequence numbers.

        Raises Full when the deadline passes, ShutDown, TooLarge, UnsupportedArray; each names in `seqs` what was put.
        """

    def full(self) -> bool:
        """Whether a put would have to wait for `maxsize`, or one has been waiting for space."""

    def join(self, until: Deadline, last: int = 0) -> int:
        """Wait until none of the items is left that were put before this call, by whomever: each was delivered for
        good, removed, or is a dead letter. Returns 0 then; when the deadline is past, the number of the last of them:
        given as `last`, another call waits for the same."""

    def shutdown(self, immediate: bool) -> None:
        """End the spool for all: no more puts; with `immediate` no more gets either."""


class Consumer(Session, Protocol):
    """An engine as a reader uses it."""

    def take(self, limit: int, until: Deadline, writable: bool = False, kept: bool = False) -> list[Message]:
        """Take up to `limit` items off the spool for good; waits only for the first. Raises Empty, ShutDown.

        writable: the arrays may be written, which nobody else sees; copied at once or page by page. kept: as long as
        the list lives, a `Restorer` can put all of it back, whoever puts meanwhile.
        """

    def claim(self, limit: int, lease: float | None, until: Deadline) -> list[Delivery]:
        """Take up to `limit` items in flight, for `lease` seconds (None: as long as this session lives); waits only
        for the first, and may take fewer than wait. One whose delivery nobody holds any more, unsettled, is redelivered
        by the next call of this session, with a ResourceWarning. Raises Empty, ShutDown."""

    def load(self, delivery: Delivery, writable: bool = False) -> Message:
        """The whole of an item in flight here; `writable` as for `take`. Raises BadItem, having dead-lettered it;
        LeaseExpired."""

    def describe(self, delivery: Delivery) -> Contents:
        """What an item in flight here says of itself, read without its arrays. Raises what `load` raises."""

    def settle(self, deliveries: Sequence[Delivery], verdict: Verdict) -> None:
        """Decide what becomes of items in flight here. Raises LeaseExpired for one that is not any more."""

    def peek(self, until: Deadline) -> Peeked:
        """The next item, left where it is. Raises Empty, ShutDown. A damaged one is dead-lettered and passed over."""


class Loan(Protocol):
    """An array in the very memory that readers will see, not yet an item. array: writable until the commit. One thread
    at a time calls it."""

    array: Array

    def commit(self, until: Deadline) -> int:
        """Put it; returns its sequence number. Raises Full, ShutDown; it then stays a loan."""

    def discard(self) -> None:
        """Put nothing. Harmless when repeated, and after the commit."""


@runtime_checkable
class Lender(Protocol):
    """A capability of a producer: items computed in place."""

    def loan(self, spec: ArraySpec, meta: Json, until: Deadline) -> Loan:
        """Lend an array, its contents undefined. Raises what `put` raises."""


@runtime_checkable
class Preallocator(Protocol):
    """A capability of a producer: what puts will need is made ahead."""

    def preallocate(self, count: int, nbytes: int) -> None:
        """Make ahead what `count` arrays of `nbytes` bytes need. Raises Full, ValueError."""


@runtime_checkable
class Restorer(Protocol):
    """A capability of a consumer: what nobody received is not lost."""

    def put_back(self, taken: list[Message], start: int = 0) -> None:
        """Let the items of what `take` returned, from the one at `start` on, wait again; harmless when repeated."""


class Known(NamedTuple):
    """The items that came last from another spool: their numbers there, by their ids, in the order in which they came.

    acknowledged: those of which the source is known to know it. put: the others, which it may deliver again.
    """

    acknowledged: Mapping[str, int] = {}
    put: Mapping[str, int] = {}

    def has(self, message: Message) -> bool:
        """Whether this one came. An item that came, went on and came to its source again has another number there."""
        return message.seq in (self.acknowledged.get(message.id), self.put.get(message.id))

    def after(self, done: Collection[str], new: Mapping[str, int]) -> Known:
        """The same when those of `done` are acknowledged, and then others were put."""
        acknowledged = dict(self.acknowledged) | {each: seq for each, seq in self.put.items() if each in done}
        return Known(_last(acknowledged, 1024), _last(dict(self.without(done).put) | dict(new), REMEMBERED))

    def without(self, ids: Collection[str]) -> Known:
        """The same without some that were not put."""
        return self._replace(put={each: seq for each, seq in self.put.items() if each not in ids})


def _last(ids: dict[str, int], count: int) -> dict[str, int]:
    return dict(list(ids.items())[-count:])


REMEMBERED: Final = 8192
"""Ids of one source that are kept for as long as it is not known to know that they came: a forwarder that is killed
leaves up to 256, which a source on servers delivers again some seconds later."""


@runtime_checkable
class Source(Protocol):
    """A capability of a consumer: its items can be forwarded."""

    def name(self) -> str:
        """The name of the spool, which no other has but a copy of its directory: it stays its own however it is
        reached."""

    def identity(self) -> object:
        """Equal to that of a `Destination` where both are of the same spool, and to that of no other spool."""

    def unclaim(self, deliveries: Sequence[Delivery]) -> None:
        """Let items in flight here wait again, as if they had not been delivered; those that are not any more stay as
        they are."""

    def browse(self, after: int) -> Iterator[Message]:
        """The items that wait or are in flight and have a number above `after`, in the order of their numbers: copies,
        the items stay as they are. One that cannot be read is passed over."""


@runtime_checkable
class Destination(Protocol):
    """A capability of a producer: items forwarded from another spool, each of them once, whatever crashes when."""

    def identity(self) -> object:
        """Equal to that of a `Source` where both are of the same spool, and to that of no other spool."""

    def forwarded(self, source: str) -> Known:
        """What `put_forwarded` put last from the spool of that name. To be called before it. Raises SpoolInUse while
        another process forwards from there, where that is known."""

    def put_forwarded(
        self, source: str, messages: Sequence[Message], until: Deadline, done: Collection[str] = ()
    ) -> int:
        """Put the first of these messages, as many as can be put at once, and note with them, as one, that they came
        from that source under their numbers; returns how many. Of the ids in `done` the source knows that they came.
        Raises what `put` raises, having put none, but for a ServerUnreachable: then `forwarded` tells; SpoolInUse when
        another process has forwarded from the same source meanwhile."""


class Watch(Protocol):
    """One wait of an event loop."""

    def fileno(self) -> int:
        """A descriptor, which several may share: when it is readable, call `drain`. -1 where there is none."""

    def arm(self) -> float:
        """Keep house and ask for the next news; returns 0 when another try may help, else in how many seconds to arm
        again even without news."""

    def drain(self) -> None:
        """Hear what made the descriptor readable; of every session that it concerns, `news` is called."""

    def close(self) -> None:
        """Wait no more. Harmless when repeated."""


@runtime_checkable
class Watchable(Protocol):
    """A capability of a session: an event loop can wait for it without a thread, and work with it, if it is not remote:
    whose every call takes as long as a network does."""

    is_remote: bool

    def briefly(self, step: Callable[[], T]) -> T:
        """What `step` returns, which calls this session and does not wait for items or room. Raises LockTimeout when
        others do not let go of the spool within about a millisecond; what `step` was to do is then not done."""

    def watch(self, news: Callable[[], None], lacking: Message | int | None = None) -> Watch:
        """Begin to wait for items; or, of a producer, for room for the message `lacking`, or for no item up to that
        number to be left, after a `join` that found some. Raises TooLarge.

        news: called, in any thread, when it is time to arm again.
        """


class Pair(Protocol):
    """A session that puts and gets, with the count of what it was told is done."""

    @property
    def producer(self) -> Producer:
        """Its putting side; closed with the pair only."""

    @property
    def consumer(self) -> Consumer:
        """Its getting side; closed with the pair only."""

    def task_done(self) -> bool:
        """Count one item as done; false where all that were put are."""

    def join(self, until: Deadline) -> bool:
        """Wait until all items that were put are done; false when the deadline is past."""

    def close(self) -> None:
        """Leave. Harmless when repeated."""


@runtime_checkable
class Pairing(Protocol):
    """A capability of an engine: both sides through one session."""

    def pair(self, limits: Limits) -> Pair:
        """Open it for both, making it where there is none."""


class Admin(Protocol):
    """A spool looked after from outside."""

    def stat(self) -> SpoolStat:
        """What is in it now."""

    def failed_list(self, seqs: Iterable[int] | None = None) -> list[DeadLetter]:
        """Its dead letters, in the order in which they were put; None for all. Raises NoSuchItem."""

    def failed_retry(self, seqs: Iterable[int] | None) -> Retried:
        """Requeue dead letters as new items; None for all. Raises NoSuchItem."""

    def failed_drop(self, seqs: Iterable[int] | None) -> list[int]:
        """Remove dead letters for good; None for all. Raises NoSuchItem."""

    def purge(self) -> int:
        """Remove the items that wait or are delayed; returns how many. What is in flight stays."""

    def remove(self) -> None:
        """Delete the spool and all that is in it, dead letters included. Raises SpoolInUse while anybody has it
        open."""

    def set_limits(self, limits: Limits) -> Limits:
        """Let the limits that are not None be in force from now on, for all; returns all limits."""


@runtime_checkable
class Collector(Protocol):
    """A capability of an admin: what crashed sessions left can be more than the others put right by themselves."""

    def gc(self, dry_run: bool, progress: Progress | None) -> GcReport:
        """Put right and remove all of it; with `dry_run` only say what that would be."""


class Engine(Protocol):
    """A spool at one place, not yet opened. crosses_processes: whether another process can open the same one."""

    crosses_processes: bool

    def producer(self, options: ProducerOptions) -> Producer:
        """Open it for putting, making it where there is none unless asked not to."""

    def consumer(self, options: ConsumerOptions) -> Consumer:
        """Open it for getting, making it where there is none unless asked not to."""

    def admin(self) -> Admin:
        """Look after it. Raises NotASpool where there is none."""


def retry(step: Callable[[], T], wait: Callable[[Deadline], bool], until: Deadline) -> T:
    """The result of `step`, tried again whenever there may be what it lacks: the one blocking loop of all engines.

    step: does it or raises Empty or Full. wait: waits until another try may help (True) or the deadline is past
    (False).
    """
    while True:
        try:
            return step()
        except (Empty, Full):
            if until == NOW:
                raise
        if not wait(until):
            until = NOW
