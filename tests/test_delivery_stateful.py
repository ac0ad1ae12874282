"""A spool beside a model of it: whatever writers and readers do, in whatever order, both say the same.

The clock is a number that the test moves; a reader dies by losing its descriptors, as a killed process does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from audit import audit
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from spoolipc import (
    AlreadySettled,
    Empty,
    Full,
    Item,
    LeaseExpired,
    ShutDown,
    SpoolReader,
    SpoolWriter,
    failed_drop,
    failed_list,
    failed_retry,
)
from spoolipc import words as W

SIZES = st.sampled_from([1, 3000])
SECOND = 10**9


@dataclass(eq=False)
class Known:
    """What the model knows of an item."""

    seq: int
    value: int
    meta: int | None
    attempt: int = 0
    owner: object = None
    due: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)


class DeliveryMachine(RuleBasedStateMachine):
    """ready, returned: queues of the items that wait. away: those in hand or delayed, as they were taken."""

    items = Bundle("items")

    def __init__(self) -> None:
        super().__init__()
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.place = Path(tempfile.mkdtemp(prefix="spoolipc-", dir=memory))
        self.path = self.place / "spool"
        self.now = 10**15
        self.clock = mock.patch.object(time, "monotonic_ns", self.clock_reads)
        self.clock.start()
        self.ready: list[Known] = []
        self.returned: list[Known] = []
        self.away: list[Known] = []
        self.dead: dict[int, Known] = {}
        self.next_seq = 1
        self.draining = False
        self.views: list[tuple[Any, int]] = []

    @initialize(
        max_attempts=st.sampled_from([0, 1, 2, 5]),
        maxsize=st.sampled_from([0, 3]),
        lease=st.sampled_from([None, 10.0]),
    )
    def open(self, max_attempts: int, maxsize: int, lease: float | None) -> None:
        self.most, self.maxsize, self.lease = max_attempts, maxsize, lease
        self.writer = SpoolWriter(self.path, max_attempts=max_attempts, maxsize=maxsize)
        self.readers = [SpoolReader(self.path), SpoolReader(self.path, lease=lease)]
        self.living = [object(), object()]

    def clock_reads(self) -> int:
        return self.now

    # -- the model

    def give_back(self, known: Known, why: str, due: int = 0) -> None:
        known.failures.append((known.attempt, why))
        known.owner = None
        if self.most and known.attempt >= self.most:
            self.away.remove(known)
            self.dead[known.seq] = known
        elif due:
            known.due = due
        else:
            known.due = 0
            self.away.remove(known)
            self.returned.append(known)

    def tend(self) -> None:
        """What every look at the spool does when a second has gone by, or a lease or delay has ended.

        Every rule that ends a party lets more than a second go by first.
        """
        for known in list(self.away):
            if known.owner is not None and known.owner not in self.living:
                self.give_back(known, "its reader died")
            elif 0 < known.due <= self.now:
                if known.owner is None:
                    self.away.remove(known)
                    known.due = 0
                    self.returned.append(known)
                else:
                    self.give_back(known, "its lease ended")

    def pop(self) -> Known | None:
        queue = self.returned or self.ready
        return queue.pop(0) if queue else None

    def ended(self, reader: int) -> bool:
        others = [known for known in self.away if known.owner is not self.living[reader]]
        return self.draining and not others

    # -- rules

    @rule(size=SIZES, value=st.integers(0, 99), meta=st.none() | st.integers(0, 9))
    def put(self, size: int, value: int, meta: int | None) -> None:
        self.put_some([value], size, meta)

    @rule(size=SIZES, values=st.lists(st.integers(0, 99), min_size=1, max_size=4))
    def put_many(self, size: int, values: list[int]) -> None:
        self.put_some(values, size, None)

    def put_some(self, values: list[int], size: int, meta: int | None) -> None:
        waiting = len(self.ready) + len(self.returned) + sum(known.owner is None for known in self.away)
        room = max(0, self.maxsize - waiting) if self.maxsize else len(values)
        put = [] if self.draining else values[:room]
        arrays = [np.full(size, value) for value in values]
        try:
            seqs = self.writer.put_many(arrays, False, metas=[meta] * len(values))
            assert len(put) == len(values)
        except Full as error:
            assert not self.draining
            assert room < len(values)
            seqs = list(error.seqs)
        except ShutDown as error:
            assert self.draining
            seqs = list(error.seqs)
        assert seqs == list(range(self.next_seq, self.next_seq + len(put)))
        self.ready += [Known(seq, value, meta) for seq, value in zip(seqs, put, strict=True)]
        self.next_seq += len(put)

    @rule(size=SIZES, value=st.integers(0, 99), fails=st.booleans())
    def loan(self, size: int, value: int, fails: bool) -> None:
        waiting = len(self.ready) + len(self.returned) + sum(known.owner is None for known in self.away)
        room = not self.maxsize or waiting < self.maxsize
        try:
            with self.writer.loan(size, int, block=False) as array:
                array[:] = value
                if fails:
                    raise RuntimeError
        except Full:
            assert not room
        except ShutDown:
            assert self.draining
        except RuntimeError:
            assert fails
        else:
            assert room
            assert not self.draining
            self.ready.append(Known(self.next_seq, value, None))
            self.next_seq += 1

    @rule(reader=st.integers(0, 1))
    def get(self, reader: int) -> None:
        self.tend()
        known = self.pop()
        try:
            array = self.readers[reader].get(block=False)
        except Empty:
            assert known is None
            assert not self.ended(reader)
        except ShutDown:
            assert known is None
            assert self.ended(reader)
        else:
            assert known is not None
            self.check_array(array, known)

    @rule(reader=st.integers(0, 1), limit=st.integers(1, 4))
    def get_many(self, reader: int, limit: int) -> None:
        self.tend()
        known = [each for _ in range(limit) if (each := self.pop())]
        try:
            arrays = self.readers[reader].get_many(limit, block=False)
        except (Empty, ShutDown):
            assert not known
        else:
            for array, each in zip(arrays, known, strict=True):
                self.check_array(array, each)

    @rule(reader=st.integers(0, 1))
    def peek(self, reader: int) -> None:
        self.tend()
        waiting = self.returned + self.ready
        try:
            peeked = self.readers[reader].peek(block=False)
        except (Empty, ShutDown):
            assert not waiting
        else:
            known = waiting[0]
            assert (peeked.seq, peeked.attempt, peeked.meta) == (known.seq, known.attempt, known.meta)

    @rule(target=items, reader=st.integers(0, 1))
    def receive(self, reader: int) -> Any:
        self.tend()
        known = self.pop()
        try:
            item = self.readers[reader].receive(block=False)
        except Empty:
            assert known is None
            assert not self.ended(reader)
            return multiple()
        except ShutDown:
            assert known is None
            assert self.ended(reader)
            return multiple()
        assert known is not None
        known.attempt += 1
        known.owner = self.living[reader]
        lease = self.lease if reader else None
        known.due = self.now + int(lease * SECOND) if lease else 0
        self.away.append(known)
        assert (item.seq, item.attempt) == (known.seq, known.attempt)
        return item, known, known.attempt, known.owner

    @rule(held=items)
    def look(self, held: tuple[Item, Known, int, object]) -> None:
        item, known, _, _ = held
        if self.in_hand(held) and not item.settled:
            assert item.meta == known.meta
            self.check_array(item.array, known)

    @rule(
        held=consumes(items),
        how=st.sampled_from(["ack", "nack", "delay", "reject", "leave", "raise"]),
        delay=st.sampled_from([0.5, 2.0, 20.0]),
    )
    def settle(self, held: tuple[Item, Known, int, object], how: str, delay: float) -> None:
        item, known, _, _ = held
        if held[3] not in self.living or item.settled:
            return  # a dead reader does nothing; extend was late and said so
        mine = self.in_hand(held)
        late = mine and 0 < known.due <= self.now
        steps: dict[str, Callable[[], None]] = {
            "ack": item.ack,
            "nack": lambda: item.nack(reason="given back"),
            "delay": lambda: item.nack(delay, "given back"),
            "reject": lambda: item.reject("rejected"),
            "leave": lambda: item.__exit__(None, None, None),
            "raise": lambda: item.__exit__(RuntimeError, RuntimeError("no luck"), None),
        }
        if late:
            self.give_back(known, "its lease ended")
        if not mine or late:
            with contextlib.ExitStack() as stack:
                if how != "raise":
                    stack.enter_context(pytest.raises(LeaseExpired))
                steps[how]()
        else:
            steps[how]()
            if how in ("ack", "leave"):
                self.away.remove(known)
            elif how == "reject":
                self.away.remove(known)
                known.failures.append((known.attempt, "rejected"))
                self.dead[known.seq] = known
            else:
                why = "RuntimeError: no luck" if how == "raise" else "given back"
                self.give_back(known, why, self.now + int(delay * SECOND) if how == "delay" else 0)
        for again in (item.ack, item.nack):
            with pytest.raises(AlreadySettled):
                again()

    @rule(held=items, seconds=st.sampled_from([1.0, 30.0]))
    def extend(self, held: tuple[Item, Known, int, object], seconds: float) -> None:
        item, known, _, owner = held
        if owner not in self.living or item.settled:
            return
        if self.in_hand(held) and not 0 < known.due <= self.now:
            item.extend(seconds)
            known.due = self.now + int(seconds * SECOND)
        else:
            if self.in_hand(held):
                self.give_back(known, "its lease ended")
            with pytest.raises(LeaseExpired):
                item.extend(seconds)

    def in_hand(self, held: tuple[Item, Known, int, object]) -> bool:
        _, known, attempt, owner = held
        return known in self.away and known.owner is owner and known.attempt == attempt

    @rule(seconds=st.sampled_from([0.1, 1.5, 11.0, 40.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)

    @rule(reader=st.integers(0, 1), how=st.sampled_from(["dies", "leaves"]))
    def reader_ends(self, reader: int, how: str) -> None:
        old = self.readers[reader]
        gone = self.living[reader]
        self.now += 2 * SECOND
        if how == "dies":
            die(old)
        else:
            old.close()
            for known in [each for each in self.away if each.owner is gone]:
                self.give_back(known, "its reader left")
        self.living[reader] = object()
        self.readers[reader] = SpoolReader(self.path, lease=self.lease if reader else None)
        self.tend()

    @rule()
    def index_is_lost(self) -> None:
        (self.path / "index").unlink()
        everything = sorted(self.ready + self.returned + self.away, key=lambda known: known.seq)
        self.returned, self.away = [], []
        self.ready = [
            replace(known, owner=None, due=0, attempt=known.failures[-1][0] if known.failures else 0)
            for known in everything
        ]
        audit(self.writer._sink.party)
        self.next_seq = self.writer._sink.party.index.words[W.NEXT_SEQ]
        assert self.next_seq > max([0, *self.dead, *(known.seq for known in self.ready)])

    @precondition(lambda self: self.dead and not self.draining)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.dead)))
        (new,) = failed_retry(self.path, [seq]).seqs.values()
        assert new == self.next_seq
        self.next_seq += 1
        known = self.dead.pop(seq)
        self.ready.append(Known(new, known.value, known.meta))

    @precondition(lambda self: self.dead)
    @rule()
    def drop(self) -> None:
        assert failed_drop(self.path) == sorted(self.dead)
        self.dead.clear()

    @rule(reopen=st.booleans())
    def shutdown(self, reopen: bool) -> None:
        if reopen:
            self.writer.close()
            self.writer = SpoolWriter(self.path, reopen=True)
            self.tend()
        else:
            self.writer.shutdown()
        self.draining = not reopen

    # -- what always holds

    def check_array(self, array: Any, known: Known) -> None:
        assert (array == known.value).all()
        self.views = [*self.views[-5:], (array, known.value)]

    @invariant()
    def no_view_ever_changes(self) -> None:
        for array, value in self.views:
            assert (array == value).all()

    @invariant()
    def counts_agree(self) -> None:
        delayed = sum(known.owner is None for known in self.away)
        if hasattr(self, "writer"):
            assert self.writer.qsize() == len(self.ready) + len(self.returned) + delayed
            audit(self.writer._sink.party)
            said = {
                letter.seq: [(each.attempt, each.why.split(";")[0]) for each in letter.history]
                for letter in failed_list(self.path)
            }
            assert said == {seq: known.failures for seq, known in self.dead.items()}

    def teardown(self) -> None:
        self.views.clear()
        if hasattr(self, "writer"):
            self.writer.close()
            for reader in self.readers:
                reader.close()
        self.clock.stop()
        shutil.rmtree(self.place)


def die(reader: SpoolReader) -> None:
    """End a reader as the kernel does it to a killed process."""
    party = reader._source.party
    party._finalizer.detach()
    for fd in party._held:
        os.close(fd)
    party._held = []
    party.bells.close()
    party.closed = True


TestDelivery = DeliveryMachine.TestCase
TestDelivery.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
