"""Whatever calls are made on a spool, in whatever order, it does what the model does, and no array ever changes.

The clock that leases and delays go by is a number that the test moves. A session crashes in a forked process, which
kills itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support.account import check_spool
from support.arrays import Array
from support.model import CLOSE, CRASH, DISCARDED, DRAINING, LEASE, OPEN, Claim, Entry, Model, Session

import spoolipc
from spoolipc import (
    AlreadySettled,
    Empty,
    Full,
    Item,
    LeaseExpired,
    ShutDown,
    SpoolReader,
    SpoolWriter,
    TooLarge,
)
from spoolipc.directory import fs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # of threads, from Python 3.12
    pytest.mark.timeout(900),
]
MEMORY: Final = "/dev/shm" if os.path.isdir("/dev/shm") else None
PAGE: Final = 4096
SECOND: Final = 10**9
SAID: Final = {CRASH: r"died|dead|crash", LEASE: "lease ended", CLOSE: "left|closed"}
"""What a history says, as a pattern, of a failure that nobody gave a reason for."""
Payload = Array | dict[str, Array]
PAYLOADS = st.builds(
    lambda value, pages, named, meta: Entry(value, pages, named, meta),
    st.integers(0, 250),
    st.sampled_from([1, 2, 6, 6, 7, 12]),  # pages of the file: up to four are copied, the others views
    st.booleans(),
    st.sampled_from([None, 7, {"größe": [1, None]}]),
)


def payload(entry: Entry) -> Payload:
    """What is put for an entry: its file has exactly its pages."""
    size = entry.pages * PAGE - 1024
    if entry.named:
        fortran = np.full((size // 2 - 8, 2), entry.value, "u1", order="F")
        return {"a": np.full(9, entry.value), "b": fortran}
    return np.full(size, entry.value, "u1")


@dataclass(eq=False)
class Reader:
    face: SpoolReader
    session: Session


@dataclass(eq=False)
class Held:
    """An item as its reader has it, and the claim that the model has on it."""

    item: Item
    claim: Claim


class SpoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="spoolipc-model-", dir=MEMORY))
        self.path = self.place / "spool"
        self.model = Model()
        self.clock = mock.patch.object(fs, "monotonic_ns", self.now)
        self.clock.start()
        self.writers: list[SpoolWriter] = []
        self.readers: list[Reader] = []
        self.views: list[tuple[Array, int]] = []
        self.held: list[Held] = []
        self.discarded = False

    @initialize(
        maxsize=st.sampled_from([0, 0, 1, 4]),
        max_pages=st.sampled_from([0, 0, 12, 30]),
        max_attempts=st.sampled_from([0, 1, 2, 3, 5]),
        data=st.data(),
    )
    def make(self, maxsize: int, max_pages: int, max_attempts: int, data: st.DataObject) -> None:
        self.model.maxsize, self.model.max_pages, self.model.max_attempts = maxsize, max_pages, max_attempts
        limits: Any = {"maxsize": maxsize, "max_bytes": max_pages * PAGE, "max_attempts": max_attempts}
        self.writers.append(SpoolWriter(self.path, **limits))
        self.open_reader(data)

    def teardown(self) -> None:
        try:
            self.no_array_ever_changes()
            for face in self.faces():
                face.close()
            if self.path.exists():
                SpoolReader(self.path).close()  # takes back what crashed sessions left
                if self.discarded:
                    spoolipc.gc(self.path)  # which removes the histories of what was discarded
                check_spool(self.path)
            self.no_array_ever_changes()
        finally:
            self.clock.stop()
            shutil.rmtree(self.place)

    def now(self) -> int:
        return self.model.now

    def faces(self) -> list[SpoolWriter | SpoolReader]:
        return [*self.writers, *(reader.face for reader in self.readers)]

    def catch_up(self) -> None:
        """Have the spool notice what ended, where the model cannot know whether the next call does."""
        if self.model.unnoticed or self.model.leftovers:
            SpoolReader(self.path).close()
            self.model.notice()

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """One rule for all calls: of many rules Hypothesis leaves out about half in any one run."""
        model = self.model
        rare = [self.collect_garbage, self.fork, self.lose_the_table]
        rare += [self.open_writer] * (len(self.writers) < 3) + [self.open_reader] * (len(self.readers) < 3)
        rare += [self.close_writer] * (len(self.writers) > 1) + [self.close_reader] * bool(self.readers)
        rare += [self.drop_dead_letters] * bool(model.dead)
        steps = [data.draw(st.sampled_from(rare)), self.crash, self.time_goes_by]
        steps += [self.put] * 4 + [self.put_many, self.loan]
        if model.state != OPEN and len(self.writers) < 3:
            steps += [self.reopen] * 2
        if model.away:  # or it is not worth it
            steps += [self.shutdown]
        if self.readers:
            steps += [self.get] * 2 + [self.receive] * 3 + [self.peek]
        if self.readers and model.state == OPEN:
            steps += [self.traffic]
        if self.held:
            steps += [self.settle] * 4 + [self.extend, self.look_at_an_item]
        if model.dead:
            steps += [self.retry]
        if self.views:
            steps += [self.drop_a_view_or_keep_only_a_part]
        data.draw(st.sampled_from(steps))(data)

    # Sessions

    def open_writer(self, data: st.DataObject) -> None:
        durability: Any = data.draw(st.sampled_from(["none", "none", "fsync"]))
        checksum = data.draw(st.booleans())
        self.writers.append(SpoolWriter(self.path, durability=durability, checksum=checksum))
        self.model.notice()

    def open_reader(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from([None, 10.0]))
        face = SpoolReader(self.path, lease=lease, verify=data.draw(st.booleans()))
        self.readers.append(Reader(face, Session(int((lease or 0) * SECOND))))
        self.model.notice()

    def close_writer(self, data: st.DataObject) -> None:
        self.writers.pop(data.draw(st.integers(0, len(self.writers) - 1))).close()

    def close_reader(self, data: st.DataObject) -> None:
        self.catch_up()
        reader = self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
        reader.face.close()
        self.model.close(reader.session)
        self.held = [held for held in self.held if held.claim.session is not reader.session]

    def crash(self, data: st.DataObject) -> None:
        """A process puts, gets, receives and lends, and is killed; more than a second goes by."""
        puts, lends = data.draw(st.lists(PAYLOADS, max_size=4)), data.draw(st.booleans())
        gets, receives = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 3))
        self.catch_up()
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            kept: list[object] = []
            try:
                writer, reader = SpoolWriter(self.path), SpoolReader(self.path)
                for entry in puts:
                    with contextlib.suppress(Full, ShutDown, TooLarge):
                        os.write(tell, b"%d " % writer.put_nowait(payload(entry), meta=entry.meta))
                with contextlib.suppress(Empty, ShutDown):
                    kept += [reader.get_nowait() for _ in range(gets)]
                    for _ in range(receives):
                        item = reader.receive(block=False)
                        kept += [item, item.arrays]
                with contextlib.suppress(Full, ShutDown):
                    if lends:
                        writer.loan(9 * PAGE, "u1", block=False).__enter__()[:] = 1
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(tell)
        with open(told) as pipe:
            seqs = [int(seq) for seq in pipe.read().split()]
        session = Session()
        for entry in puts:
            if self.refusal(entry) is None:
                self.model.put(entry, seqs.pop(0))
        assert seqs == []
        for _ in self.model.deliverable(gets):
            self.model.get()
        for _ in self.model.deliverable(receives):
            self.model.receive(session)
        session.crashed = self.model.leftovers = True
        self.model.now += 2 * SECOND

    def time_goes_by(self, data: st.DataObject) -> None:
        self.model.now += int(data.draw(st.sampled_from([0.1, 1.5, 11.0, 30.0])) * SECOND)

    def shutdown(self, data: st.DataObject) -> None:
        self.catch_up()
        immediate = data.draw(st.booleans())
        self.writers[0].shutdown(immediate)
        if immediate:
            self.model.state = DISCARDED
            self.discarded = True
            self.model.fresh, self.model.redelivered, self.model.away = [], [], self.model.in_flight
        elif self.model.state == OPEN:
            self.model.state = DRAINING

    def reopen(self, data: st.DataObject) -> None:
        self.writers.append(SpoolWriter(self.path, reopen=True))
        self.model.collect()
        self.model.state = OPEN

    # Producers

    def refusal(self, entry: Entry) -> type[Exception] | None:
        """What a put raises now."""
        if self.model.state != OPEN:
            return ShutDown
        if self.model.too_large(entry.pages):
            return TooLarge
        return None if self.model.has_room(entry.pages) else Full

    def unseen(self) -> list[int]:
        """The sequence numbers of items that the model does not know yet."""
        names = {int(name[:20]) for name in os.listdir(self.path / "items")}
        return sorted(names - self.model.numbers())

    @contextlib.contextmanager
    def refused_as_the_model_says(self, entry: Entry) -> Iterator[None]:
        refusal = self.refusal(entry)
        with pytest.raises(refusal) if refusal else contextlib.nullcontext():
            yield

    def put(self, data: st.DataObject) -> None:
        self.catch_up()
        entry = data.draw(PAYLOADS)
        writer = data.draw(st.sampled_from(self.writers))
        ways: list[Callable[[], int]] = [
            lambda: writer.put(payload(entry), False, meta=entry.meta),
            lambda: writer.put_nowait(payload(entry), meta=entry.meta),
            lambda: writer.put(payload(entry), timeout=0, meta=entry.meta),
        ]
        way = data.draw(st.sampled_from(ways))
        with self.refused_as_the_model_says(entry):
            self.model.put(entry, way())

    def put_many(self, data: st.DataObject) -> None:
        """Put as far as there is room. Of a batch with one that is too large, any part before that one."""
        self.catch_up()
        writer = data.draw(st.sampled_from(self.writers))
        entries = data.draw(st.lists(PAYLOADS, max_size=5))
        arrays, metas = [payload(entry) for entry in entries], [entry.meta for entry in entries]
        refusal: type[Exception] | None = None
        try:
            seqs = writer.put_many(arrays, False, metas=metas)
        except (Full, ShutDown) as error:
            refusal, seqs = type(error), list(error.seqs)
        except TooLarge:
            assert any(self.model.too_large(entry.pages) for entry in entries)
            refusal, seqs = TooLarge, self.unseen()
        for entry, seq in zip(entries, seqs, strict=refusal is None):
            assert self.refusal(entry) is None
            self.model.put(entry, seq)
        if refusal in (Full, ShutDown):
            assert self.refusal(entries[len(seqs)]) is refusal

    def loan(self, data: st.DataObject) -> None:
        self.catch_up()
        entry, fails = data.draw(PAYLOADS), data.draw(st.booleans())
        writer = data.draw(st.sampled_from(self.writers))
        shape = entry.pages * PAGE - 1024
        entry.named = False
        error = ZeroDivisionError if fails and self.refusal(entry) is None else None
        with (
            self.refused_as_the_model_says(entry),
            pytest.raises(error) if error else contextlib.nullcontext(),
            writer.loan(shape, "u1", block=False, meta=entry.meta) as lent,
        ):
            lent[:] = entry.value
            if fails:
                raise ZeroDivisionError
        if self.refusal(entry) is None and not fails:
            self.model.put(entry, *self.unseen())
            self.views.append((lent, entry.value))

    # Consumers

    @contextlib.contextmanager
    def nothing_to_get(self, reader: Reader) -> Iterator[None]:
        with pytest.raises(ShutDown if self.model.ended(reader.session) else Empty):
            yield

    def check(self, found: Payload | Any, entry: Entry) -> None:
        """Compare what came with what was put, and keep an eye on it from now on."""
        put = payload(entry)
        assert isinstance(found, dict) == isinstance(put, dict)
        there = found if isinstance(found, dict) else {"": found}
        for name, array in (put if isinstance(put, dict) else {"": put}).items():
            assert (there[name] == entry.value).all()
            assert there[name].shape == array.shape
            assert there[name].flags.fnc == array.flags.fnc
        assert list(there) == list(put if isinstance(put, dict) else [""])
        self.views.append((list(there.values())[-1], entry.value))

    def get(self, data: st.DataObject) -> None:
        copy, limit = data.draw(st.booleans()), data.draw(st.sampled_from([None, None, 1, 3, 6]))
        reader = data.draw(st.sampled_from(self.readers))
        self.model.notice()
        entries = self.model.deliverable(limit or 1)
        with contextlib.nullcontext() if entries else self.nothing_to_get(reader):
            if limit:
                found: list[Any] = reader.face.get_many(limit, block=False, copy=copy)
            else:
                found = [reader.face.get(timeout=0, copy=copy)]
            assert len(found) == len(entries)
            for arrays, entry in zip(found, entries, strict=True):
                assert self.model.get() is entry
                self.check(arrays, entry)
                assert self.views[-1][0].flags.writeable == copy

    def peek(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        self.model.notice()
        entries = self.model.deliverable(1)
        with contextlib.nullcontext() if entries else self.nothing_to_get(reader):
            peeked = reader.face.peek(block=False)
            names = ("a", "b") if entries[0].named else None
            expected = (entries[0].seq, entries[0].attempt, entries[0].meta, names)
            assert (peeked.seq, peeked.attempt, peeked.meta, peeked.names) == expected

    def receive(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        self.model.notice()
        if not self.model.deliverable(1):
            with self.nothing_to_get(reader):
                reader.face.receive(block=False)
        for _ in self.model.deliverable(data.draw(st.integers(1, 3))):
            item = reader.face.receive(block=False)
            claim = self.model.receive(reader.session)
            assert (item.seq, item.attempt) == (claim.entry.seq, claim.attempt)
            self.held.append(Held(item, claim))

    def look_at_an_item(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.held))
        entry = held.claim.entry
        if held.claim.current and not self.model.overdue(entry):
            assert held.item.meta == entry.meta
            self.check(dict(held.item.arrays) if entry.named else held.item.array, entry)

    def is_late(self, held: Held) -> bool:
        """Whether an item is in flight no more; when its own lease ended, this call is the first to notice."""
        if self.model.unnoticed != [held.claim.entry]:
            self.catch_up()
        return not held.claim.current or self.model.overdue(held.claim.entry)

    def settle(self, data: st.DataObject) -> None:
        how = data.draw(st.sampled_from(["ack", "nack", "delay", "delay", "reject", "leave", "raise"]))
        delay = data.draw(st.sampled_from([0.5, 20.0, 100.0]))
        self.model.now += data.draw(st.sampled_from([0, 0, 0, 11])) * SECOND
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        item, entry = held.item, held.claim.entry
        steps: dict[str, Callable[[], None]] = {
            "ack": item.ack,
            "nack": lambda: item.nack(reason="no luck"),
            "delay": lambda: item.nack(delay, "no luck"),
            "reject": lambda: item.reject("no luck"),
            "leave": lambda: item.__exit__(None, None, None),
            "raise": lambda: item.__exit__(RuntimeError, RuntimeError("no luck"), None),
        }
        if self.is_late(held):
            with contextlib.nullcontext() if how == "raise" else pytest.raises(LeaseExpired):
                steps[how]()
            self.catch_up()
        else:
            steps[how]()
            if how in ("ack", "leave"):
                self.model.ack(entry)
            elif how == "reject":
                self.model.reject(entry, "no luck")
            else:
                reason = "RuntimeError: no luck" if how == "raise" else "no luck"
                self.model.fail(entry, reason, int(delay * SECOND) if how == "delay" else 0)
        for again in (item.ack, item.nack):
            with pytest.raises(AlreadySettled):
                again()

    def extend(self, data: st.DataObject) -> None:
        seconds = data.draw(st.sampled_from([1.0, 30.0]))
        held = data.draw(st.sampled_from(self.held))
        if self.is_late(held):
            self.held.remove(held)
            with pytest.raises(LeaseExpired):
                held.item.extend(seconds)
            self.catch_up()
        else:
            held.item.extend(seconds)
            held.claim.entry.due = self.model.now + int(seconds * SECOND)

    # Dead letters

    def retry(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.model.dead)))
        if self.model.state != OPEN:
            with pytest.raises(ShutDown):
                spoolipc.failed_retry(self.path, [seq])
            return
        done = spoolipc.failed_retry(self.path, [seq])
        assert not done.damaged
        self.model.retry(seq, done.seqs[seq])

    def drop_dead_letters(self, data: st.DataObject) -> None:
        assert spoolipc.failed_drop(self.path) == sorted(self.model.dead)
        self.model.dead.clear()

    # What must not matter

    def traffic(self, data: st.DataObject) -> None:
        """Whatever file may be written again is, if it is of this size."""
        self.catch_up()
        writer, reader = data.draw(st.sampled_from(self.writers)), data.draw(st.sampled_from(self.readers))
        entry = data.draw(PAYLOADS)
        for value in range(251, 255):
            if self.model.queue or not self.model.has_room(entry.pages):
                return
            again = Entry(value, entry.pages, entry.named, entry.meta)
            self.model.put(again, writer.put(payload(again), meta=again.meta))
            assert self.model.get() is again
            self.check(reader.face.get_nowait(), again)
            self.views.pop()

    def collect_garbage(self, data: st.DataObject) -> None:
        self.catch_up()
        assert not spoolipc.gc(self.path).index_rebuilt
        self.model.collect()

    def drop_a_view_or_keep_only_a_part(self, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, len(self.views) - 1))
        array, value = self.views.pop(position)
        if data.draw(st.booleans()):
            self.views.append((array[1::3].T, value))

    def fork(self, data: st.DataObject) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                self.no_array_ever_changes()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def lose_the_table(self, data: st.DataObject) -> None:
        """Every item not acknowledged is delivered again, in the order of the numbers; none is in flight any more.

        Who maps a table that was replaced learns it in the next locked step, of which a writer has none but a put.
        """
        if data.draw(st.booleans()):
            os.truncate(self.path / "index", 100)
        else:
            (self.path / "index").unlink()
        self.model.lose_table()
        for writer in self.writers:
            writer.close()
        self.writers = [SpoolWriter(self.path) for _ in self.writers]
        for face in [reader.face for reader in self.readers] or [SpoolReader(self.path)]:
            with contextlib.suppress(Empty, ShutDown):
                face.peek(block=False)
        self.model.notice()

    # What always holds

    @invariant()
    def no_array_ever_changes(self) -> None:
        for array, value in self.views:
            assert (array == value).all()

    @invariant()
    def the_spool_holds_what_the_model_does(self) -> None:
        model = self.model
        if not self.path.exists():
            return
        waiting = len(model.queue) + len(model.delayed)
        certain = model.state != DISCARDED and not model.unnoticed
        for face in self.faces():
            count = face.qsize()
            assert count == waiting if certain else count <= waiting + len(model.unnoticed)
            assert face.empty() == (not count)
        if certain and self.writers and model.maxsize and not model.max_pages:
            assert self.writers[0].full() == (not model.has_room(0))
        found = spoolipc.stat(self.path)
        assert (found.state, found.failed) == (model.state, len(model.dead))
        if certain:
            counts = (len(model.queue), len(model.delayed), len(model.in_flight))
            assert (found.depth, found.delayed, found.in_flight) == counts
        names = {int(name[:20]) for name in os.listdir(self.path / "items")}
        waits = [] if model.state == DISCARDED else model.queue + model.delayed
        sure = {entry.seq for entry in model.in_flight + waits}
        assert sure <= names <= model.numbers() - set(model.dead)
        assert model.leftovers or os.listdir(self.path / "tmp") == []
        check_spool(self.path, checked=False)

    @invariant()
    def dead_letters_tell_their_history(self) -> None:
        if not self.path.exists() or not self.model.dead:
            return
        letters = {letter.seq: letter for letter in spoolipc.failed_list(self.path)}
        assert set(letters) == set(self.model.dead)
        for seq, entry in self.model.dead.items():
            history = letters[seq].history
            assert [failure.attempt for failure in history] == [attempt for attempt, _ in entry.failures]
            for failure, (_, why) in zip(history, entry.failures, strict=True):
                assert re.search(SAID.get(why, re.escape(why)), failure.why), failure
            assert (letters[seq].attempts, letters[seq].meta) == (entry.attempt, entry.meta)


@pytest.mark.parametrize("examples", [40, pytest.param(600, marks=pytest.mark.exhaustive)])
def test_any_sequence_of_calls_does_what_it_does_to_the_model(
    monkeypatch: pytest.MonkeyPatch, examples: int
) -> None:
    monkeypatch.setenv("SPOOLIPC_WATCH", "polling")  # nobody waits, and `stat` need not try how one would
    run_state_machine_as_test(
        SpoolMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            report_multiple_bugs=False,
        ),
    )
