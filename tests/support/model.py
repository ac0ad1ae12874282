"""One queue as plain lists: what a spool must do, whichever calls are made on it, in whatever order."""

from __future__ import annotations

from dataclasses import dataclass, field

OPEN, DRAINING, DISCARDED = "open", "draining", "discarded"
CRASH, LEASE, CLOSE = "crash", "lease", "close"
"""Causes of a failure that nobody gave a reason for."""


@dataclass(eq=False)
class Session:
    """A session as the model knows it. lease: nanoseconds, 0 for none."""

    lease: int = 0
    crashed: bool = False


@dataclass(eq=False)
class Entry:
    """An item. due: when its lease or delay ends, 0 for never. failures: (attempt, reason or cause)."""

    value: int
    pages: int
    named: bool = False
    meta: object = None
    seq: int = 0
    attempt: int = 0
    due: int = 0
    claim: Claim | None = None
    failures: list[tuple[int, str]] = field(default_factory=list)


@dataclass(eq=False)
class Claim:
    """One delivery of an item to a session; the entry's own as long as the item is in flight by it."""

    entry: Entry
    attempt: int
    session: Session

    @property
    def current(self) -> bool:
        return self.entry.claim is self


@dataclass
class Model:
    """fresh, redelivered: items that wait. away: those in flight or delayed, in the order of their delivery.

    now: the monotonic clock in nanoseconds. Limits of 0 are none. In the state DISCARDED what waits may be there
    still or not; `collect` settles that. last_seq: the last number given, None after the table was lost. leftovers:
    whether a crashed session may have left files of its own.
    """

    maxsize: int = 0
    max_pages: int = 0
    max_attempts: int = 0
    now: int = 10**15
    state: str = OPEN
    last_seq: int | None = 0
    leftovers: bool = False
    fresh: list[Entry] = field(default_factory=list)
    redelivered: list[Entry] = field(default_factory=list)
    away: list[Entry] = field(default_factory=list)
    dead: dict[int, Entry] = field(default_factory=dict)

    # What can be seen

    @property
    def queue(self) -> list[Entry]:
        """What waits, in the order of delivery."""
        return self.redelivered + self.fresh

    @property
    def delayed(self) -> list[Entry]:
        return [entry for entry in self.away if entry.claim is None]

    @property
    def in_flight(self) -> list[Entry]:
        return [entry for entry in self.away if entry.claim is not None]

    def overdue(self, entry: Entry) -> bool:
        """Whether an item that is away is to be delivered again, and nobody noticed yet."""
        return 0 < entry.due <= self.now or (entry.claim is not None and entry.claim.session.crashed)

    @property
    def unnoticed(self) -> list[Entry]:
        return [entry for entry in self.away if self.overdue(entry)]

    def ended(self, session: Session) -> bool:
        """Whether nothing can come any more to this session."""
        others = [entry for entry in self.away if entry.claim is None or entry.claim.session is not session]
        return self.state == DISCARDED or (self.state == DRAINING and not self.queue and not others)

    def deliverable(self, limit: int) -> list[Entry]:
        return [] if self.state == DISCARDED else self.queue[:limit]

    def has_room(self, pages: int) -> bool:
        used = sum(entry.pages for entry in self.queue + self.away)
        if self.max_pages and used + pages > self.max_pages:
            return False
        return not self.maxsize or len(self.queue) + len(self.delayed) < self.maxsize

    def too_large(self, pages: int) -> bool:
        return bool(self.max_pages) and pages > self.max_pages

    def numbers(self) -> set[int]:
        """The sequence numbers in use."""
        return {entry.seq for entry in self.queue + self.away} | set(self.dead)

    # What is done

    def put(self, entry: Entry, seq: int) -> None:
        """A put committed under `seq`: the number after the last, any higher one after the table was lost."""
        if self.last_seq is None:
            assert seq > max(self.numbers(), default=0)
        else:
            assert seq == self.last_seq + 1
        self.last_seq = entry.seq = seq
        self.fresh.append(entry)

    def get(self) -> Entry:
        return (self.redelivered or self.fresh).pop(0)

    def receive(self, session: Session) -> Claim:
        entry = self.get()
        entry.attempt += 1
        entry.due = self.now + session.lease if session.lease else 0
        entry.claim = Claim(entry, entry.attempt, session)
        self.away.append(entry)
        return entry.claim

    def ack(self, entry: Entry) -> None:
        self.away.remove(entry)
        entry.claim = None

    def reject(self, entry: Entry, reason: str) -> None:
        self.ack(entry)
        entry.failures.append((entry.attempt, reason))
        self.dead[entry.seq] = entry

    def fail(self, entry: Entry, reason: str, delay: int = 0) -> None:
        """A delivery that failed: the item is redelivered, now or later, or dead-lettered after its last attempt."""
        if self.max_attempts and entry.attempt >= self.max_attempts:
            self.reject(entry, reason)
            return
        entry.claim = None
        entry.failures.append((entry.attempt, reason))
        if delay:
            entry.due = self.now + delay
        else:
            self._requeue(entry)

    def notice(self) -> None:
        """Housekeeping: what every look of a reader does about crashed sessions, ended leases and ended delays."""
        for entry in self.unnoticed:
            if entry.claim is None:
                self._requeue(entry)
            else:
                self.fail(entry, CRASH if entry.claim.session.crashed else LEASE)
        self.leftovers = False

    def close(self, session: Session) -> None:
        for entry in self.in_flight:
            if entry.claim is not None and entry.claim.session is session:
                self.fail(entry, CLOSE)

    def collect(self) -> None:
        """`gc`: housekeeping, and nothing waits any more in a spool that was discarded."""
        self.notice()
        if self.state == DISCARDED:
            self.fresh, self.redelivered, self.away = [], [], self.in_flight

    def lose_table(self) -> None:
        """All wait in the order of their numbers; an attempt is remembered when its failure was noted."""
        self.fresh = sorted(self.queue + self.away, key=lambda entry: entry.seq)
        self.redelivered, self.away = [], []
        for entry in self.fresh:
            entry.claim, entry.due = None, 0
            entry.attempt = entry.failures[-1][0] if entry.failures else 0
        self.last_seq = None

    def retry(self, seq: int, new: int) -> None:
        """A dead letter becomes a new put."""
        old = self.dead.pop(seq)
        self.put(Entry(old.value, old.pages, old.named, old.meta), new)

    def _requeue(self, entry: Entry) -> None:
        self.away.remove(entry)
        entry.due = 0
        self.redelivered.append(entry)
