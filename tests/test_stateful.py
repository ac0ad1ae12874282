"""Any sequence of calls does what the same calls do to a deque, and no array once got ever changes."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit import party_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import spoolipc
from spoolipc import Empty, Full, LeaseExpired, ShutDown, SpoolReader, SpoolWriter, TooLarge
from spoolipc.engine import Delivery
from spoolipc.npy import Array
from spoolipc.party import Party

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # of threads, from Python 3.12
    pytest.mark.timeout(600),
]
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
PAGE = 4096
PAGES = (1, 1, 2, 5, 6, 7, 12)
"""Of an item's file: up to four are copied by a reader, the others given out as views."""
MOST_ATTEMPTS = 3
OPEN, DRAINING, DISCARDED = "open", "draining", "discarded"


@dataclass(eq=False)
class Item:
    """What the model knows of an item. noted: the attempt that was last written to its history."""

    number: int
    pages: int
    seq: int = 0
    attempt: int = 0
    noted: int = 0

    @property
    def array(self) -> Array:
        return np.full(self.pages * PAGE - 1024, self.number % 251, "u1")


@dataclass(eq=False)
class Reader:
    """An open reader, and what it has in hand, in the order in which it claimed it."""

    face: SpoolReader
    hand: list[tuple[Item, Delivery]]


def take_note(party: Party) -> None:
    """A locked step, in which a party notices that it has lost its index."""


def lend(writer: SpoolWriter, item: Item) -> Array:
    """Put an item by filling a lent array, which may be looked at afterwards."""
    with writer.loan(item.array.shape, "u1", block=False) as lent:
        lent[:] = item.array
    return lent


PUTS: dict[str, Callable[[SpoolWriter, Item], int | Array]] = {
    "put": lambda writer, item: writer.put(item.array, timeout=0),
    "put_nowait": lambda writer, item: writer.put_nowait(item.array),
    "loan": lend,
}


class SpoolMachine(RuleBasedStateMachine):
    """The spool beside lists: `returned` are delivered before `fresh`."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="spoolipc-stateful-", dir=MEMORY))
        self.path = self.place / "spool"
        self.writers: list[SpoolWriter] = []
        self.readers: list[Reader] = []
        self.fresh: list[Item] = []
        self.returned: list[Item] = []
        self.lost: list[tuple[Reader, Delivery]] = []
        self.dead: list[int] = []
        self.views: list[tuple[Array, int]] = []
        self.state = OPEN
        self.count = 0
        self.last_seq = 0  # not known, after the index was lost
        self.maxsize = 0
        self.max_pages = 0

    @initialize(
        maxsize=st.sampled_from([0, 1, 4]), max_pages=st.sampled_from([0, 12, 30]), first=st.booleans()
    )
    def make(self, maxsize: int, max_pages: int, first: bool) -> None:
        self.maxsize, self.max_pages = maxsize, max_pages
        limits: Any = {"maxsize": maxsize, "max_bytes": max_pages * PAGE, "max_attempts": MOST_ATTEMPTS}
        if first:
            self.writers.append(SpoolWriter(self.path, **limits))
        else:
            self.readers.append(Reader(SpoolReader(self.path, **limits), []))

    def teardown(self) -> None:
        self.views_are_as_they_were()
        for writer in self.writers:
            writer.close()
        for reader in self.readers:
            reader.face.close()
        self.views_are_as_they_were()
        shutil.rmtree(self.place)

    # The model

    @property
    def waiting(self) -> list[Item]:
        return self.returned + self.fresh

    @property
    def in_hand(self) -> list[Item]:
        return [item for reader in self.readers for item, _ in reader.hand]

    def faces(self) -> list[SpoolWriter | SpoolReader]:
        return [*self.writers, *(reader.face for reader in self.readers)]

    def take(self) -> Item:
        return (self.returned or self.fresh).pop(0)

    def give_back(self, item: Item) -> None:
        item.noted = item.attempt
        if item.attempt >= MOST_ATTEMPTS:
            self.dead.append(item.seq)
        else:
            self.returned.append(item)

    def room(self, pages: int) -> bool:
        used = sum(item.pages for item in self.waiting + self.in_hand)
        by_bytes = not self.max_pages or used + pages <= self.max_pages
        return by_bytes and (not self.maxsize or len(self.waiting) < self.maxsize)

    def ended(self, reader: Reader) -> bool:
        return self.state == DISCARDED or (
            self.state == DRAINING and not self.waiting and len(self.in_hand) <= len(reader.hand)
        )

    def committed(self, item: Item, seq: int) -> None:
        assert seq == self.last_seq + 1 or (not self.last_seq and seq > max(self.numbers(), default=0))
        self.last_seq = item.seq = seq
        self.fresh.append(item)

    def numbers(self) -> set[int]:
        """The sequence numbers that are in use."""
        return {item.seq for item in self.waiting + self.in_hand} | set(self.dead)

    def put_unseen(self) -> list[int]:
        """The sequence numbers of items that the model does not know yet."""
        return sorted({int(name[:20]) for name in os.listdir(self.path / "items")} - self.numbers())

    def new_item(self, pages: int) -> Item:
        self.count += 1
        return Item(self.count, pages)

    def refusal(self, pages: int) -> type[Exception] | None:
        """What a put of so many pages raises now."""
        if self.state != OPEN:
            return ShutDown
        if self.max_pages and pages > self.max_pages:
            return TooLarge
        return None if self.room(pages) else Full

    def got(self, item: Item, array: Array) -> None:
        assert (array == item.number % 251).all()
        assert len(array) == len(item.array)
        self.views.append((array, item.number % 251))

    # Coming and going

    @precondition(lambda self: len(self.writers) < 3)
    @rule()
    def open_writer(self) -> None:
        self.writers.append(SpoolWriter(self.path))

    @precondition(lambda self: len(self.readers) < 3)
    @rule()
    def open_reader(self) -> None:
        self.readers.append(Reader(SpoolReader(self.path), []))

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def close_writer(self, data: st.DataObject) -> None:
        self.writers.pop(data.draw(st.integers(0, len(self.writers) - 1))).close()

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def close_reader(self, data: st.DataObject) -> None:
        reader = self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
        reader.face.close()
        for item, _ in reader.hand:
            self.give_back(item)
        self.lost = [each for each in self.lost if each[0] is not reader]

    @precondition(lambda self: self.writers)
    @rule(immediate=st.booleans())
    def shutdown(self, immediate: bool) -> None:
        self.writers[0].shutdown(immediate)
        if immediate:
            self.state = DISCARDED
            self.fresh, self.returned = [], []
        elif self.state == OPEN:
            self.state = DRAINING

    @precondition(lambda self: self.state != OPEN and len(self.writers) < 3)
    @rule()
    def reopen(self) -> None:
        self.writers.append(SpoolWriter(self.path, reopen=True))
        if self.state == DISCARDED:
            self.fresh, self.returned = [], []
        self.state = OPEN

    # Putting

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), pages=st.sampled_from(PAGES), way=st.sampled_from(sorted(PUTS)))
    def put(self, data: st.DataObject, pages: int, way: str) -> None:
        writer = data.draw(st.sampled_from(self.writers))
        item = self.new_item(pages)
        refusal = self.refusal(pages)
        if refusal is not None:
            with pytest.raises(refusal):
                PUTS[way](writer, item)
            return
        done = PUTS[way](writer, item)
        if isinstance(done, int):
            self.committed(item, done)
        else:
            self.committed(item, *self.put_unseen())
            self.views.append((done, item.number % 251))

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), several=st.lists(st.sampled_from(PAGES), max_size=5))
    def put_many(self, data: st.DataObject, several: list[int]) -> None:
        writer = data.draw(st.sampled_from(self.writers))
        items = [self.new_item(pages) for pages in several]
        arrays = [item.array for item in items]
        expected = len(items)
        room = SpoolMachine.room
        before = list(self.fresh)
        for position, item in enumerate(items):
            if self.state != OPEN or not room(self, item.pages):
                expected = position
                break
            self.fresh.append(item)
        self.fresh = before
        if expected == len(items):
            seqs = writer.put_many(arrays, block=False)
        else:
            with pytest.raises((Full, ShutDown, TooLarge)) as caught:
                writer.put_many(arrays, block=False)
            if isinstance(caught.value, TooLarge):
                expected = 0 if self.max_pages else expected
                seqs = self.put_unseen()
            else:
                assert isinstance(caught.value, Full | ShutDown)
                seqs = list(caught.value.seqs)
        assert len(seqs) == expected
        for item, seq in zip(items, seqs, strict=False):
            self.committed(item, seq)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), pages=st.sampled_from(PAGES))
    def put_what_is_refused(self, data: st.DataObject, pages: int) -> None:
        writer = data.draw(st.sampled_from(self.writers))
        with pytest.raises((TypeError, ShutDown, Full)):
            writer.put_nowait(np.full(pages * 500, None))
        if self.refusal(pages) is None:
            with (
                pytest.raises(ZeroDivisionError),
                writer.loan(pages * PAGE - 1024, "u1", block=False) as lent,
            ):
                lent[0] = 1 / 0

    # Getting

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), keep=st.booleans(), copy=st.booleans())
    def get(self, data: st.DataObject, keep: bool, copy: bool) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        if self.waiting and self.state != DISCARDED:
            item = self.take()
            array = reader.face.get(timeout=5, copy=copy)
            self.got(item, array)
            if copy:
                assert array.flags.writeable
            if not keep:
                self.views.pop()
        else:
            with pytest.raises(ShutDown if self.ended(reader) else Empty):
                reader.face.get_nowait(copy=copy)

    @precondition(lambda self: self.readers and self.waiting and self.state != DISCARDED)
    @rule(data=st.data(), limit=st.integers(1, 6))
    def get_many(self, data: st.DataObject, limit: int) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        arrays = reader.face.get_many(limit)
        assert len(arrays) == min(limit, len(self.waiting))
        for array in arrays:
            self.got(self.take(), array)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), limit=st.integers(1, 3))
    def claim(self, data: st.DataObject, limit: int) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        source = reader.face._source
        if not self.waiting or self.state == DISCARDED:
            with pytest.raises(ShutDown if self.ended(reader) else Empty):
                source.claim(limit, None)
            return
        deliveries = source.claim(limit, None)
        assert len(deliveries) == min(limit, len(self.waiting))
        for delivery in deliveries:
            item = self.take()
            item.attempt += 1
            assert (delivery.seq, delivery.attempt) == (item.seq, item.attempt)
            reader.hand.append((item, delivery))

    def from_hand(self, data: st.DataObject) -> tuple[Reader, Item, Delivery]:
        reader = data.draw(st.sampled_from([reader for reader in self.readers if reader.hand]))
        item, delivery = reader.hand[data.draw(st.integers(0, len(reader.hand) - 1))]
        return reader, item, delivery

    @precondition(lambda self: self.in_hand)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        reader, item, delivery = self.from_hand(data)
        self.got(item, reader.face._source.load(delivery).arrays[0])

    @precondition(lambda self: self.in_hand)
    @rule(data=st.data(), how=st.sampled_from(["ack", "nack", "reject"]))
    def settle(self, data: st.DataObject, how: str) -> None:
        reader, item, delivery = self.from_hand(data)
        source = reader.face._source
        reader.hand.remove((item, delivery))
        if how == "ack":
            source.ack([delivery])
        elif how == "reject":
            source.reject(delivery, "on purpose")
            self.dead.append(item.seq)
        else:
            source.nack(delivery, 0, "on purpose")
            self.give_back(item)
        with pytest.raises(LeaseExpired):
            source.ack([delivery])

    @precondition(lambda self: self.lost)
    @rule()
    def settle_what_was_lost(self) -> None:
        reader, delivery = self.lost.pop()
        with pytest.raises(LeaseExpired):
            reader.face._source.ack([delivery])

    # What must not matter

    @rule()
    def collect_garbage_of_the_spool(self) -> None:
        report = spoolipc.gc(self.path)
        assert report.returned_items == report.given_up_items == report.strangers == 0
        assert not report.index_rebuilt
        if self.state == DISCARDED:
            self.fresh, self.returned = [], []

    @rule()
    def look_from_outside(self) -> None:
        spoolipc.stat(self.path)
        spoolipc.gc(self.path, dry_run=True)

    @precondition(lambda self: self.views)
    @rule(data=st.data(), most=st.integers(1, 4))
    def drop_views(self, data: st.DataObject, most: int) -> None:
        for _ in range(min(most, len(self.views))):
            self.views.pop(data.draw(st.integers(0, len(self.views) - 1)))

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def keep_only_a_part_of_a_view(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, len(self.views) - 1))
        array, value = self.views[position]
        self.views[position] = array[7::3].reshape(1, -1), value

    @rule()
    def fork(self) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                self.views_are_as_they_were()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    @rule(truncate=st.booleans())
    def lose_the_index(self, truncate: bool) -> None:
        """Every item not acknowledged is delivered again, in order of sequence; nothing is in hand any more."""
        if truncate:
            os.truncate(self.path / "index", 100)
        else:
            (self.path / "index").unlink()
        for reader in self.readers:
            self.lost += [(reader, delivery) for _, delivery in reader.hand]
        self.fresh = sorted(self.waiting + self.in_hand, key=lambda item: item.seq)
        self.returned, self.last_seq = [], 0
        for reader in self.readers:
            reader.hand.clear()
        for item in self.fresh:
            item.attempt = item.noted
        for face in self.faces() or [SpoolReader(self.path)]:
            party_of(face).run(take_note)

    # What always holds

    @invariant()
    def views_are_as_they_were(self) -> None:
        for array, value in self.views:
            assert (array == value).all()

    @invariant()
    def every_side_sees_what_waits(self) -> None:
        for face in self.faces():
            count = face.qsize()
            assert count == len(self.waiting) or (self.state == DISCARDED and count < len(self.waiting))
            assert face.empty() == (not count)

    @invariant()
    def directories_hold_what_the_model_does(self) -> None:
        if not self.path.exists():
            return
        waiting = {f"{item.seq:020d}.npy" for item in self.waiting}
        in_hand = {f"{item.seq:020d}.npy" for item in self.in_hand}
        names = set(os.listdir(self.path / "items"))
        if self.state == DISCARDED:  # what is given back now may be gone already
            assert in_hand <= names <= waiting | in_hand
        else:
            assert names == waiting | in_hand
        assert os.listdir(self.path / "tmp") == []
        failed = {name for name in os.listdir(self.path / "failed") if name.endswith(".npy")}
        assert failed == {f"{seq:020d}.npy" for seq in self.dead}


def test_any_sequence_of_calls_does_what_it_does_to_a_deque() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    gc.collect()
    run_state_machine_as_test(
        SpoolMachine,
        settings=settings(
            max_examples=int(os.environ.get("SPOOLIPC_EXAMPLES", "25")),
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            report_multiple_bugs=False,
        ),
    )
