"""Every transition, ended before any of its stores, is finished or forgotten by whoever recovers the table.

On random tables in memory; the directories are sets of names.
"""

from __future__ import annotations

import errno
import inspect
import random
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, Final

import pytest
from support.faults import tripwire

from spoolipc.directory import fs, journal, transitions
from spoolipc.directory import table as W
from spoolipc.directory.journal import Journal
from spoolipc.directory.layout import item_name
from spoolipc.directory.pool import LARGE, find_pooled, linking
from spoolipc.directory.table import bucket
from spoolipc.directory.transitions import CLEAN, Transition
from spoolipc.message import Limits

RECORDS: Final = 40
TABLES: Final = 15
STEPS: Final = 250
ARROWS: Final = {
    name
    for name, arrow in inspect.getmembers(transitions, inspect.isfunction)
    if not name.startswith("_") and arrow.__annotations__.get("return") == "Transition"
}


State = tuple[bytes, frozenset[tuple[str, str]], int, Limits]


class Ended(BaseException):
    """The process ended here."""


class Spool:
    """Directories in memory, in the place of `layout.Directories`, with a journal over bytes."""

    path = "/spool"
    root = "root"
    file_mode = 0o600
    items, free, tmp, failed, alive = "items", "free", "tmp", "failed", "alive"

    def __init__(self) -> None:
        self.places = {name: name for name in (".", "items", "free", "tmp", "failed", "alive")}
        self.names: set[tuple[str, str]] = set()
        self.marker = W.OPEN
        self.limits = self.next_limits = Limits()  # in spool.json, and in spool.json.new
        self.refusal: BaseException | None = None  # what the next move raises
        self.map = bytearray((W.HEADER + RECORDS * W.RECORD) * W.WORD)
        self.words: W.Words = memoryview(self.map).cast("Q")
        self.words[W.MAGIC], self.words[W.VERSION] = W.MAGIC_VALUE, W.VERSION_VALUE
        self.words[W.CAPACITY], self.words[W.EDGE] = len(self.words), W.HEADER
        self.words[W.NEXT_SEQ], self.words[W.NEXT_SEQ_CHECK] = 1, 1 ^ W.ALL_BITS
        self.words[W.MAX_BYTES] = 0
        self.journal = Journal.__new__(Journal)
        vars(self.journal).update(_directories=self, map=self.map, words=self.words)

    # The calls

    def rename(self, name: str, new: str, *, src_dir_fd: str, dst_dir_fd: str) -> None:
        self._move((src_dir_fd, name))
        self.names.add((dst_dir_fd, new))
        if new == "spool.json":
            self.limits = self.next_limits

    def unlink(self, name: str, *, dir_fd: str) -> None:
        self._move((dir_fd, name))

    def _move(self, name: tuple[str, str]) -> None:
        refusal, self.refusal = self.refusal, None
        if refusal is not None:
            raise refusal
        self.stat_at(name[1], dir_fd=name[0])
        self.names.remove(name)

    def stat_at(self, name: str, *, dir_fd: str) -> None:
        if (dir_fd, name) not in self.names:
            raise FileNotFoundError(errno.ENOENT, "is not there", name)

    def remove(self, part: str, name: str) -> None:
        with suppress(OSError):
            fs.unlink_missing_ok(self.places[part], name)  # type: ignore[arg-type]

    def write_shutdown(self, _: object, state: int, __: int) -> None:
        self.marker = state

    # States

    def state(self) -> State:
        return bytes(self.map), frozenset(self.names), self.marker, self.limits

    def restore(self, state: State) -> None:
        self.map[:] = state[0]
        self.names, self.marker, self.limits = set(state[1]), *state[2:]

    def table(self) -> bytes:
        """The table but for the journal, which says nothing once a transition is made."""
        first, last = W.SUBJECT * W.WORD, (W.JOURNAL + 2 * W.JOURNAL_ROOM) * W.WORD
        return bytes(self.map[:first]) + bytes(self.map[last:])

    def commit(self, transition: Transition, stores: int = -1) -> int:
        """Commit, or end the process before the store of that number; how many there were."""
        met = 0

        def store() -> None:
            nonlocal met
            if met == stores:
                raise Ended
            met += 1

        self.journal.words = tripwire(self.words, store)
        try:
            self.journal.commit(transition)
        finally:
            self.journal.words = self.words
        return met

    def check(self) -> None:
        """The table is as the schema says, and the directories hold what it knows."""
        assert W.violations(self.words) == []
        for part, states in (("items", W.IN_ITEMS), ("free", W.IN_FREE)):
            known = set(map(item_name, W.files(self.words, states)))
            assert known == {name for place, name in self.names if place == part}, part


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Spool:
    spool = Spool()
    for name in ("rename", "unlink", "stat_at"):
        monkeypatch.setattr(fs, name, getattr(spool, name))
    monkeypatch.setattr(journal, "write_shutdown", spool.write_shutdown)
    monkeypatch.setattr(journal, "read_shutdown", lambda _: spool.marker)
    monkeypatch.setattr(journal, "agree", lambda *_: spool.limits)
    return spool


class Walk:
    """Random transitions, each possible where it is made."""

    def __init__(self, spool: Spool, seed: int) -> None:
        self.spool = spool
        self.words = spool.words
        self.random = random.Random(seed)
        self.count = 0

    def of(self, *states: int) -> list[int]:
        words = self.words
        return [at for at in range(W.HEADER, words[W.EDGE], W.RECORD) if words[at + W.STATE] in states]

    def pick(self, *states: int) -> int:
        """A record in one of the states; of those that wait, the first to be delivered."""
        found = [at for at in self.of(*states) if self.words[at + W.STATE] != W.WAITING]
        head = transitions.first(self.words)
        return self.random.choice([*found, *([head] if head and W.WAITING in states else [])] or [0])

    def unused(self) -> int:
        if self.words[W.UNUSED]:
            return self.words[W.UNUSED]
        return self.words[W.EDGE] if self.words[W.EDGE] < self.words[W.CAPACITY] else 0

    def pooled(self) -> tuple[int, int]:
        """A pooled file and the position that links to it."""
        found = []
        for head in range(W.BUCKETS, W.BUCKETS + W.BUCKET_COUNT):
            link = head
            while self.words[link]:
                found.append((self.words[link], link))
                link = self.words[link] + W.NEXT
        return self.random.choice(found or [(0, 0)])

    def new_file(self, part: str) -> str:
        self.count += 1
        name = f"{self.count}.npy"
        self.spool.names.add((part, name))
        return name

    def describe(self, record: int, loan: int) -> None:
        seq, flags = transitions.next_seq(self.words), self.random.choice([0, W.NEVER_AGAIN, W.HAS_METADATA])
        at = (record + W.ITEM_AT) * W.WORD
        W.ITEM.pack_into(self.spool.map, at, seq, 1, 0, flags, self.random.choice([0, 640]), 0, 0, 0, loan)

    def due(self) -> int:
        return self.random.choice([0, self.random.randrange(1, 1000)])

    def released(self) -> int:
        """A record to be pooled by the transition of another, or 0."""
        free = [at for at in self.of(W.PINNED) if not self.words[at + W.LOAN]]
        return self.random.choice([0, *free])

    def token(self) -> int:
        return self.random.randrange(1, 5)

    def size(self) -> int:
        return 4096 * self.random.choice([1, 1, 2, 3, 5, 300])

    def next(self, arrow: str) -> Transition | None:
        """A transition by this arrow, None where the table has nothing for it."""
        make: Callable[[], Transition | None] = getattr(self, f"_{arrow}")  # of a new arrow: write one
        return make()

    def _on(self, arrow: Callable[..., Transition], *states: int, **options: Any) -> Transition | None:
        record = self.pick(*states)
        return arrow(self.words, record, **options) if record else None

    def _put_new(self) -> Transition | None:
        record, part = self.unused(), self.random.choice(["tmp", "tmp", "failed"])
        if not record:
            return None
        self.describe(record, self.random.choice([0, 0, self.token()]))
        return transitions.put_new(self.words, record, self.size(), part, self.new_file(part))

    def _put(self) -> Transition | None:
        record = self.pick(W.RESERVED)
        if not record:
            return None
        self.describe(record, 0)
        successor = self.random.choice([(0, 0), self.pooled()])
        size, owner, number = (self.words[record + at] for at in (W.BYTES, W.OWNER, W.FILE))
        return transitions.put(self.words, record, size, item_name(number), owner, *successor)

    def _claim(self) -> Transition | None:
        options = {"owner": self.token(), "due": self.due(), "released": self.released()}
        return self._on(transitions.claim, W.WAITING, **options)

    def _consume(self) -> Transition | None:
        record = self.pick(W.WAITING, W.WAITING, W.IN_FLIGHT)
        if not record:
            return None
        keep, owner = self.random.choice([(True, 0), (True, 3), (True, 3), (False, 0), (False, 3)])
        released = 0
        if self.words[record + W.STATE] == W.WAITING and keep and owner:
            released = self.released()
        return transitions.consume(self.words, record, owner, keep, released)

    def _requeue(self) -> Transition | None:
        if self.random.random() < 0.3:
            return self._on(transitions.requeue, W.IN_FLIGHT, due=0, counted=1)
        return self._on(transitions.requeue, W.IN_FLIGHT, W.DELAYED, due=self.due())

    def _restore(self) -> Transition | None:
        found = [self.pooled(), *((at, 0) for at in self.of(W.PINNED))]
        found = [(at, link) for at, link in found if at and self.words[at + W.SEQ]]
        return transitions.restore(self.words, *self.random.choice(found)) if found else None

    def _extend(self) -> Transition | None:
        return self._on(transitions.extend, W.IN_FLIGHT, due=self.random.randrange(1, 1000))

    def _dead_letter(self) -> Transition | None:
        record = self.pick(W.WAITING, W.IN_FLIGHT, W.DELAYED)
        if not record:
            return None
        name = item_name(self.words[record + W.SEQ])
        part = self.random.choice(["failed", "failed", ".", ""])
        if not part:
            self.spool.names.discard(("items", name))
        return transitions.dead_letter(
            self.words, record, part, f"{name[:20]}.failed.npy" if part == "." else name
        )

    def _discard(self) -> Transition | None:
        return self._on(transitions.discard, W.WAITING, W.IN_FLIGHT, W.DELAYED)

    def _release(self) -> Transition | None:
        return self._on(transitions.release, W.PINNED, W.RESERVED)

    def _drop(self) -> Transition | None:
        return self._on(transitions.drop, W.PINNED, W.RESERVED)

    def _reserve(self) -> Transition | None:
        record, link = self.pooled()
        return transitions.reserve(self.words, record, link, self.token()) if record else None

    def _evict(self) -> Transition | None:
        record, link = self.pooled()
        return transitions.evict(self.words, record, link) if record else None

    def _donate(self) -> Transition | None:
        record, number = self.unused(), W.FIRST_DONATED + self.random.randrange(1 << 62)
        if not record:
            return None
        return transitions.donate(self.words, record, number, self.size(), self.new_file("tmp"))

    def _end_loan(self) -> Transition | None:
        record = self.pick(*W.IN_ITEMS)
        return transitions.end_loan(self.words, record, shared=self.random.random() < 0.5) if record else None

    def _pass_to_lender(self) -> Transition | None:
        lent = [at for at in self.of(W.PINNED) if self.words[at + W.LOAN]]
        return transitions.pass_to_lender(self.words, self.random.choice(lent)) if lent else None

    def _set_shutdown(self) -> Transition:
        return transitions.set_shutdown(self.random.choice([W.OPEN, W.DRAINING, W.DISCARDED]))

    def _set_limits(self) -> Transition:
        self.spool.names.add((".", "spool.json.new"))
        self.spool.next_limits = Limits(*self.random.sample(range(100), 4))
        return transitions.set_limits(self.spool.next_limits)


@pytest.mark.parametrize("seed", range(TABLES))
def test_a_transition_ended_before_any_store_is_finished_or_forgotten(spool: Spool, seed: int) -> None:
    walk = Walk(spool, seed)
    made = set()
    for _ in range(STEPS):
        arrow = walk.random.choice([*sorted(ARROWS), "put_new", "donate", "claim", "consume"])
        transition = walk.next(arrow)
        if transition is None:
            continue
        made.add(arrow)
        before, table = spool.state(), spool.table()
        stores = spool.commit(transition)
        assert spool.words[W.MARK] == CLEAN
        after, finished = spool.state(), spool.table()
        spool.check()
        moved = after[1:] != before[1:]
        for number in range(stores):
            spool.restore(before)
            with pytest.raises(Ended):
                spool.commit(transition, number)
            spool.journal.recover()
            assert spool.words[W.MARK] == CLEAN
            # The first store is that of MARK; the move comes before the second.
            assert spool.table() == (table if number == 0 else finished), (arrow, number)
            assert spool.state()[1:] == (before if number == 0 else after)[1:], (arrow, number)
        if moved and transition[3] is not None:
            not_moved(spool, before, table, transition)
        spool.restore(after)
    assert len(made) > len(ARROWS) * 0.8, sorted(ARROWS - made)


def not_moved(spool: Spool, before: Any, table: bytes, transition: Transition) -> None:
    """A transition whose move did not happen, as its process ended or it failed, is as if it had never begun."""
    for error in (Ended(), OSError(errno.EIO, "failed")):
        spool.restore(before)
        spool.refusal = error
        is_left = transition[0] == transitions.UNLINK and isinstance(error, OSError)
        with nullcontext() if is_left else pytest.raises(type(error)):
            spool.commit(transition)
        if is_left:
            spool.names.discard(("free", item_name(transition[1])))  # stays, and stops nobody
        if isinstance(error, Ended):
            spool.journal.recover()
        assert spool.words[W.MARK] == CLEAN
        if transition[0] != transitions.UNLINK:  # what was to be unlinked is, by whoever recovers
            assert spool.table() == table
            assert spool.names == set(before[1])
        spool.check()


@pytest.mark.parametrize(
    ("word", "value"), [(W.MARK, transitions.FOLLOW + 1), (W.STORES, W.JOURNAL_ROOM + 1), (W.JOURNAL, 2**40)]
)
def test_a_journal_that_nobody_wrote_is_damage_and_nothing_is_stored(
    spool: Spool, word: int, value: int
) -> None:
    spool.words[W.MARK], spool.words[W.STORES], spool.words[W.JOURNAL] = transitions.MEMORY, 1, W.READY_HEAD
    spool.words[word] = value
    before = bytes(spool.map)
    with pytest.raises(W.IndexDamaged):
        spool.journal.recover()
    assert spool.map == before


@pytest.mark.parametrize("size", [8192, LARGE])
def test_of_large_pooled_files_one_already_mapped_is_found_and_of_small_ones_the_first(
    spool: Spool, size: int
) -> None:
    for number in range(W.FIRST_DONATED, W.FIRST_DONATED + 3):
        record = spool.journal.unused_record()
        name = item_name(number)
        spool.names.add(("tmp", name))
        spool.journal.commit(transitions.donate(spool.words, record, number, size, name))
    first, second, last = W.HEADER + 2 * W.RECORD, W.HEADER + W.RECORD, W.HEADER
    links = {first: bucket(size), second: first + W.NEXT, last: second + W.NEXT}
    assert {record: linking(spool.words, record) for record in links} == links
    best = last if size == LARGE else first
    mapped = {W.FIRST_DONATED}
    assert find_pooled(spool.words, size, size, mapped) == (best, links[best])
    assert find_pooled(spool.words, size, size, mapped, True) == (best, links[best])
    assert find_pooled(spool.words, size, size, ()) == (first, links[first])
    smaller = size // 2  # of another list
    assert find_pooled(spool.words, smaller, size, ()) == (first, links[first])
    assert find_pooled(spool.words, smaller, size - 1, ()) == (0, 0)
    if size == LARGE:
        assert find_pooled(spool.words, size, size, (), True) == (0, 0)


def test_a_queue_that_counts_what_it_does_not_link_is_damage(spool: Spool) -> None:
    assert transitions.first(spool.words) == 0
    for length in (W.READY_LENGTH, W.REDELIVERY_LENGTH):
        spool.words[length] = 1
        with pytest.raises(W.IndexDamaged):
            transitions.first(spool.words)
        spool.words[length] = 0


def test_a_file_is_moved_where_it_is_kept_and_is_its_item_until_it_is_to_be_written(spool: Spool) -> None:
    walk, words = Walk(spool, 1), spool.words
    new = walk.next("put_new")
    assert new is not None
    spool.commit(new)
    record = transitions.first(words)
    name = item_name(words[record + W.SEQ])
    assert transitions.consume(words, record, 3, keep=False)[3] == ("items", name, "", "")
    forgotten = transitions.dead_letter(words, record, "", "")
    assert (forgotten[0], forgotten[3]) == (transitions.MEMORY, None)
    spool.commit(transitions.consume(words, record, 0, keep=True))
    assert words[record + W.SEQ]
    spool.commit(transitions.reserve(words, *walk.pooled(), 7))
    spool.commit(transitions.release(words, record))
    assert words[record + W.SEQ] == 0


def test_a_list_without_end_is_damage() -> None:
    """And found in no more looks than there are records."""

    class Words(list[int]):
        looks = 0

        def __getitem__(self, at: Any) -> Any:
            self.looks += 1
            assert self.looks < 100
            return super().__getitem__(at)

    words = Words([0] * (W.HEADER + 4 * W.RECORD))
    words[W.CAPACITY] = len(words)
    words[W.ACTIVE] = words[W.HEADER + W.NEXT] = W.HEADER
    with pytest.raises(W.IndexDamaged):
        W.active(words)  # type: ignore[arg-type]
