"""Every change of a spool's state, and the account of what it may have done when it did not come to its end.

A scenario is a generator: what it does before its `yield` prepares the spool, what comes after is the operation under
test. It acts through a `Stage`, which says in a `Log` what becomes of each item before and after it is done. An item is
known by its value, which every element of its array is; what may have become of it is a set of fates: "waiting N"
(N deliveries so far), "failed" or "gone"; as value 0 stands the spool, "open" or "shut".
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

import spoolipc
from spoolipc import BadItem, Empty, Item, ShutDown, SpoolError, SpoolReader, SpoolWriter
from support.account import check_spool
from support.damage import cut, item
from support.faults import After, Hook, Injector, forked, kill
from support.peek import peek_table, poke
from support.waits import is_locked

Scenario = Callable[["Stage"], Iterator[None]]
SCENARIOS: Final[dict[str, Scenario]] = {}
ALONE: Final[set[str]] = set()
"""Those in which anybody else who opens the spool would do the work under test."""
SPOOL: Final = 0
LAST: Final = 777  # put when all else is done
META: Final = {"camera": 1}


def arrays(value: int, kind: str) -> Any:
    """What is put as `value`: "small", "large" (given out as a view) or "several" arrays."""
    small, large = np.full(8, value, "i8"), np.full((100, 80), value, "f8")
    return {"small": small, "large": large, "several": {"a": small, "b": large}}[kind]


def value_of(got: Any) -> int:
    """Which item this is, having made sure that it is whole."""
    first = got["a"] if isinstance(got, dict) else got
    value = int(first.flat[0])
    kind = "several" if isinstance(got, dict) else "small" if first.dtype == "i8" else "large"
    np.testing.assert_equal(got, arrays(value, kind))
    return value


class Log:
    """Lines in memory shared with children: written without a system call, kept when the writer is killed."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1 << 17)

    def say(self, *said: Any) -> None:
        line = json.dumps(said).encode() + b"\n"
        end = int.from_bytes(self._memory[:8], "little")
        self._memory[8 + end : 8 + end + len(line)] = line
        self._memory[:8] = (end + len(line)).to_bytes(8, "little")

    def lines(self) -> list[Any]:
        end = int.from_bytes(self._memory[:8], "little")
        return [json.loads(line) for line in self._memory[8 : 8 + end].splitlines()]


class Account:
    """What may have become of each item, as a log tells it."""

    def __init__(self, log: Log) -> None:
        self.fates: dict[int, set[str]] = {SPOOL: {"open"}}
        self.seqs: dict[int, int] = {}
        before, after = self.fates, self.fates
        for verb, *said in log.lines():
            if verb == "try":
                before, after = dict(self.fates), dict(self.fates)  # the sets in it never change
                for value, fate in said[0]:
                    self.fates[value] = self.fates.get(value, {"gone"}) | {fate}
                    after[value] = {fate}
                    if fate == "waiting 0":
                        self.seqs.pop(value, None)
            elif verb == "done":
                self.fates = after
                self.seqs.update(said[0])
            elif verb == "failed":  # and changed nothing
                self.fates = before
            else:
                self.took(*said)

    def took(self, value: int, attempt: int) -> None:
        """An item was delivered, for the time `attempt`, and acknowledged."""
        fates = self.fates.get(value, set())
        assert f"waiting {attempt - 1}" in fates, f"attempt {attempt} of {value}, which is {fates}"
        self.fates[value] = {"gone"}


class Stage:
    """What a scenario acts with."""

    def __init__(self, path: Path, log: Log) -> None:
        self.path = path
        self.log = log
        self.last = 0
        self.writers: list[SpoolWriter] = []
        self.readers: list[SpoolReader] = []

    def writer(self, **options: Any) -> SpoolWriter:
        self.writers.append(SpoolWriter(self.path, **options))
        return self.writers[-1]

    def reader(self, **options: Any) -> SpoolReader:
        self.readers.append(SpoolReader(self.path, **options))
        return self.readers[-1]

    @contextmanager
    def change(self, fates: dict[int, str], *, partly: bool = False) -> Iterator[dict[int, int]]:
        """Do what gives items these fates. partly: an error may leave some of it done. Yields where to say numbers."""
        seqs: dict[int, int] = {}
        self.log.say("try", list(fates.items()))
        try:
            yield seqs
        except SpoolError:
            if not partly:
                self.log.say("failed")
            raise
        self.log.say("done", list(seqs.items()))

    def put(self, writer: SpoolWriter, kind: str = "small", **options: Any) -> None:
        self.last += 1
        value = self.last
        durable = writer.__reduce__()[0].keywords["durability"] == "fsync"
        with self.change({value: "waiting 0"}, partly=durable) as seqs:
            seqs[value] = writer.put(arrays(value, kind), block=False, **options)

    def get(self, reader: SpoolReader, value: int) -> Any:
        with self.change({value: "gone"}):
            got = reader.get_nowait()
        if value_of(got) != value:
            assert any("cannot be read" in letter.reason for letter in spoolipc.failed_list(self.path))
            self.log.say("took", value_of(got), 1)
        return got

    def receive(self, reader: SpoolReader, value: int, attempt: int = 1) -> Item:
        with self.change({value: f"waiting {attempt}"}, partly=True):
            received = reader.receive(block=False)
            assert received.attempt == attempt
        return received

    def settle(self, value: int, fate: str, settle: Callable[[], None]) -> None:
        with self.change({value: fate}):
            settle()

    def shutdown(self, writer: SpoolWriter, immediate: bool, *values: int) -> None:
        with self.change({SPOOL: "shut"} | dict.fromkeys(values, "gone"), partly=True):
            writer.shutdown(immediate)

    def spoil(self, value: int) -> None:
        """Damage the file of an item that waits."""
        with self.change({value: "failed"}):
            cut(self.path / item(value))

    def elsewhere(self, act: Callable[[Stage], object]) -> None:
        """Let another process do something and crash."""

        def work() -> None:
            stage = Stage(self.path, self.log)
            stage.last = self.last
            act(stage)
            kill()

        forked(work)

    def end(self, *sessions: SpoolWriter | SpoolReader) -> None:
        self.writers = [writer for writer in self.writers if writer not in sessions]
        self.readers = [reader for reader in self.readers if reader not in sessions]
        for session in sessions:
            session.close()

    def go_on(self) -> None:
        """After a fault that did not kill: the same objects work."""
        with suppress(ShutDown):
            for writer in self.writers:
                for kind in ("small", "large"):
                    self.put(writer, kind)
        for reader in self.readers:
            with suppress(ShutDown, Empty, BadItem):
                received = reader.receive(block=False)
                value = value_of(_arrays_of(received))
                received.ack()
                self.log.say("took", value, received.attempt)

    def close(self) -> None:
        self.end(*self.writers, *self.readers)


def _arrays_of(received: Item) -> Any:
    found = received.arrays
    return found[""] if "" in found else dict(found)


def verify(
    path: Path, log: Log, bystander: SpoolReader | None = None, *, ended: bool = True, explained: bool = True
) -> None:
    """Hold the spool against the log.

    bystander: a session that was open before the fault. ended: the sessions before have: one whose end was interrupted
    may seem to live until its process ends. explained: dead letters have a reason; one that could not be written is in
    the log of Python.
    """
    account = Account(log)
    if bystander is not None:
        with suppress(Empty, ShutDown):  # its first step repairs what must be
            bystander.peek(block=False)
    with SpoolWriter(path) as writer, SpoolReader(path) as fresh:
        with suppress(Empty, ShutDown):
            (bystander or fresh).peek(block=False)
        assert os.listdir(path / "tmp") == []
        check_spool(path, orphans=True, checked=False)
        _drain(bystander or fresh, account)
        try:
            writer.put_nowait(arrays(LAST, "small"))
            assert "open" in account.fates[SPOOL]
        except ShutDown:
            assert "shut" in account.fates[SPOOL]
            SpoolWriter(path, reopen=True).close()
        writer.put_nowait(arrays(LAST, "large"))
        got = [value_of(array) for array in fresh.get_many(3, block=False)]
        assert set(got) == {LAST}
    if bystander is not None:
        bystander.close()
    spoolipc.gc(path)
    assert os.listdir(path / "alive") == [] or not ended
    check_spool(path, checked=False)
    assert spoolipc.fsck(path).problems == ()
    failed = spoolipc.failed_list(path)
    by_seq = {seq: value for value, seq in account.seqs.items()}
    for letter in failed:
        value = by_seq.get(letter.seq, letter.seq) if letter.damage else value_of(np.load(letter.path))
        fate = "gone" if letter.reason.startswith("could not be removed") else "failed"
        if "cannot be read" not in letter.reason:  # else a fault met it
            assert fate in account.fates[value], f"{value} is {fate}, not {account.fates[value]}"
        account.fates[value] = {"gone"}
    for value, fates in account.fates.items():
        if value != SPOOL:
            assert "gone" in fates, f"{value} is gone, not {fates}"
    assert not explained or all(letter.history for letter in failed)
    assert {name for name in os.listdir(path) if ".failed." not in name} <= {*PLACES, "shutdown"}


PLACES: Final = ("spool.json", "index", "spare", "alive", "failed", "free", "items", "tmp")


def _drain(reader: SpoolReader, account: Account) -> None:
    """Deliver all that waits: once, whole, in order."""
    fresh = []
    while True:
        try:
            received = reader.receive(block=False)
        except (Empty, ShutDown):
            break
        try:
            value = value_of(_arrays_of(received))
        except BadItem:
            continue
        account.took(value, received.attempt)
        assert account.seqs.get(value, received.seq) == received.seq
        fresh += [received.seq] if received.attempt == 1 else []
        received.ack()
    assert fresh == sorted(fresh), f"delivered in the order {fresh}"


class Run:
    """One run of a scenario in this process; verified at the end of the `with` block. error: what it raised."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.error = path, ""
        self._interrupted, self._is_faulty = False, False
        self._name = name
        self.log = Log()
        self.stage = Stage(path, self.log)
        self._steps = SCENARIOS[name](self.stage)
        next(self._steps)

    def with_fault(
        self, before: Hook = lambda _: None, after: After = lambda *_: None, *, stores: bool = False
    ) -> list[str]:
        """Do the operation under test, with a fault; returns the names of the events that it met."""
        self._is_faulty = True
        with Injector(before, after, stores=stores) as injector:
            self._do()
        return injector.met

    def traced(self, trace: Callable[[], AbstractContextManager[Callable[[], int]]]) -> int:
        """Do it within the context `trace()`; returns what that yields calls at the end."""
        with trace() as count:
            self._do()
        return count()

    def _do(self) -> None:
        try:
            for _ in self._steps:
                pass
        except KeyboardInterrupt:
            self._interrupted = True
        except SpoolError as error:
            self.error = str(error)

    def _check_nothing_is_left(self) -> None:
        """While the sessions live, nothing lies about that only their end would remove."""
        assert self._interrupted or os.listdir(self.path / "tmp") == []
        account = Account(self.log)
        values = {seq: value for value, seq in account.seqs.items()}
        for row in peek_table(self.path).of("in_flight"):
            fates = account.fates[values.get(row.seq, row.seq)]
            assert "waiting 0" not in fates, f"item {row.seq} is in flight at nobody who knows, {fates}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                assert not (self.path / "items").exists() or not is_locked(self.path), "the lock was kept"
                self.stage.go_on()
                if self._is_faulty and self._name not in ALONE and (self.path / "index").exists():
                    self._check_nothing_is_left()
                self.stage.close()
                gc.collect()  # a session interrupted as it was opened ends with its last reference
                verify(self.path, self.log, ended=not self._interrupted, explained=not self._is_faulty)
        except BaseException as failure:
            failure.add_note("\n".join(map(str, self.log.lines())))
            raise
        finally:
            shutil.rmtree(self.path, ignore_errors=True)


# The scenarios


def scenario(act: Scenario) -> Scenario:
    """Register a scenario under the name of its function."""
    SCENARIOS[act.__name__] = act
    return act


def alone(act: Scenario) -> Scenario:
    """Register one that does its work only where nobody else opens the spool."""
    ALONE.add(act.__name__)
    return scenario(act)


@scenario
def put_small(stage: Stage) -> Iterator[None]:
    writer = stage.writer()
    stage.put(writer)
    yield
    stage.put(writer)
    stage.put(writer, meta=META)


@scenario
def put_large(stage: Stage) -> Iterator[None]:
    writer = stage.writer()
    yield
    stage.put(writer, "large")
    stage.put(writer, "several", meta=META)


@scenario
def put_durably(stage: Stage) -> Iterator[None]:
    writer = stage.writer(durability="fsync", checksum=True)
    yield
    stage.put(writer)
    stage.put(writer, "large")


def consumed(stage: Stage, count: int, kind: str = "large") -> SpoolWriter:
    """A writer whose spool has `count` consumed files to be written again, and an item that waits."""
    writer, reader = stage.writer(), stage.reader()
    for _ in range(count):
        stage.put(writer, kind)
    for value in range(stage.last - count + 1, stage.last + 1):
        stage.get(reader, value)
    stage.end(reader)
    stage.put(writer)
    return writer


@scenario
def put_into_a_consumed_file(stage: Stage) -> Iterator[None]:
    writer = consumed(stage, 3)
    yield
    stage.put(writer, "large")  # and reserves the next
    stage.put(writer, "large")
    stage.put(writer, "several")


def steady(stage: Stage, kind: str) -> tuple[SpoolWriter, SpoolReader]:
    """A writer and a reader for whom every file has come round: both use only files they have mapped from now on."""
    writer, reader = stage.writer(), stage.reader()
    for _ in range(8):
        for _ in range(2):
            stage.put(writer, kind)
        for value in (stage.last - 1, stage.last):
            stage.get(reader, value)
    return writer, reader


@scenario
def put_again(stage: Stage) -> Iterator[None]:
    writer, _ = steady(stage, "small")
    steady(stage, "large")
    yield
    stage.put(writer)
    stage.put(stage.writers[1], "large")


@scenario
def put_a_batch(stage: Stage) -> Iterator[None]:
    writer = consumed(stage, 2, "small")
    values = range(stage.last + 1, stage.last + 5)
    stage.last += 4
    yield
    with stage.change(dict.fromkeys(values, "waiting 0"), partly=True) as seqs:
        put = writer.put_many([arrays(value, "small") for value in values], block=False)
        seqs.update(zip(values, put, strict=True))


@scenario
def lend_and_commit(stage: Stage) -> Iterator[None]:
    writer = consumed(stage, 1)
    yield
    for _ in range(2):
        stage.last += 1
        loan = writer.loan((100, 80), "f8", block=False, meta=META)
        with stage.change({stage.last: "waiting 0"}), loan as array:
            array[...] = stage.last
        del array, loan


@scenario
def preallocate(stage: Stage) -> Iterator[None]:
    stage.put(stage.writer())
    yield
    stage.writer(preallocate=(3, 64_000))


@scenario
def put_and_grow_the_index(stage: Stage) -> Iterator[None]:
    writer, values = stage.writer(), range(1, 241)
    stage.last = 240
    with stage.change(dict.fromkeys(values, "waiting 0")):
        writer.put_many([arrays(value, "small") for value in values])
    yield
    stage.put(writer)


def filled(stage: Stage, kind: str = "large", **options: Any) -> SpoolReader:
    """A reader of a spool in which three items wait."""
    writer, reader = stage.writer(), stage.reader(**options)
    for _ in range(3):
        stage.put(writer, kind)
    return reader


@scenario
def get_small(stage: Stage) -> Iterator[None]:
    reader = filled(stage, "small")
    yield
    stage.get(reader, 1)
    stage.get(reader, 2)


@scenario
def get_large(stage: Stage) -> Iterator[None]:
    reader = filled(stage)
    yield
    view = stage.get(reader, 1)
    stage.get(reader, 2)
    del view
    stage.get(reader, 3)  # the files of both go to the pool


@scenario
def get_again(stage: Stage) -> Iterator[None]:
    writer, reader = steady(stage, "large")
    first = stage.last + 1
    for _ in range(2):
        stage.put(writer, "large")
    yield
    stage.get(reader, first)
    stage.get(reader, first + 1)


@scenario
def get_a_batch(stage: Stage) -> Iterator[None]:
    reader = filled(stage)
    yield
    with stage.change(dict.fromkeys((1, 2, 3), "gone"), partly=True):
        got = reader.get_many(3, block=False)
        assert list(map(value_of, got)) == [1, 2, 3][: len(got)]
    with stage.change({value: "waiting 0" for value in (1, 2, 3) if value > len(got)}):
        pass  # what an error kept from being taken is left


@scenario
def get_verified(stage: Stage) -> Iterator[None]:
    writer, reader = stage.writer(checksum=True), stage.reader(verify=True)
    for kind in ("large", "large", "small"):
        stage.put(writer, kind)
    stage.spoil(1)
    yield
    with stage.change({2: "waiting 1"}, partly=True):
        stage.get(reader, 2)


@scenario
def get_with_a_damaged_one_before(stage: Stage) -> Iterator[None]:
    reader = filled(stage)
    stage.spoil(1)
    yield
    stage.get(reader, 2)


@scenario
def peek_with_a_damaged_one_before(stage: Stage) -> Iterator[None]:
    reader = filled(stage)
    stage.spoil(1)
    yield
    reader.peek(block=False)


def received(stage: Stage, kind: str = "large", **options: Any) -> Item:
    """The first of three items, in flight."""
    return stage.receive(filled(stage, kind, **options), 1)


@scenario
def receive_and_acknowledge(stage: Stage) -> Iterator[None]:
    reader = filled(stage)
    yield
    for value in (1, 2):
        item = stage.receive(reader, value)
        array = item.array
        stage.settle(value, "gone", item.ack)
        del item, array


@scenario
def receive_a_damaged_one(stage: Stage) -> Iterator[None]:
    item = received(stage)
    stage.spoil(1)
    yield
    with suppress(BadItem):
        item.array  # noqa: B018


@scenario
def ack_unread(stage: Stage) -> Iterator[None]:
    item = received(stage, "small")
    yield
    stage.settle(1, "gone", item.ack)


@scenario
def nack_and_ack_the_second_attempt(stage: Stage) -> Iterator[None]:
    item = received(stage)
    yield
    stage.settle(1, "waiting 1", item.nack)
    item = stage.receive(stage.readers[0], 1, 2)
    stage.settle(1, "gone", item.ack)


@scenario
def nack_for_later(stage: Stage) -> Iterator[None]:
    item = received(stage)
    yield
    stage.settle(1, "waiting 1", lambda: item.nack(1e-6))


@scenario
def nack_for_the_last_time(stage: Stage) -> Iterator[None]:
    stage.writer(max_attempts=1)
    item = received(stage)
    with stage.change({1: "failed"}):  # however it comes back
        pass
    yield
    item.nack()


@scenario
def reject(stage: Stage) -> Iterator[None]:
    item = received(stage)
    yield
    stage.settle(1, "failed", lambda: item.reject("not wanted"))


@scenario
def extend(stage: Stage) -> Iterator[None]:
    item = received(stage, lease=100.0)
    yield
    item.extend(1e-6)


@scenario
def open_new(stage: Stage) -> Iterator[None]:
    yield
    stage.put(stage.writer(maxsize=100, mode=0o770))


@scenario
def open_and_decide_limits(stage: Stage) -> Iterator[None]:
    stage.put(stage.writer())
    yield
    stage.reader(maxsize=700, max_attempts=3)


@scenario
def close(stage: Stage) -> Iterator[None]:
    writer = consumed(stage, 3)
    for _ in range(3):
        stage.put(writer, "large")
    reader = stage.reader()
    first = stage.last - 3
    item, second = stage.receive(reader, first), stage.receive(reader, first + 1)
    shown = second.array
    stage.settle(first + 1, "gone", second.ack)
    yield
    stage.end(reader)
    stage.end(writer)
    del item, shown


@scenario
def shutdown(stage: Stage) -> Iterator[None]:
    filled(stage)
    yield
    stage.shutdown(stage.writers[0], False)


@scenario
def shutdown_immediately(stage: Stage) -> Iterator[None]:
    filled(stage)
    yield
    stage.shutdown(stage.writers[0], True, 1, 2, 3)


@scenario
def reopen(stage: Stage) -> Iterator[None]:
    filled(stage)
    stage.shutdown(stage.writers[0], False)
    yield
    with stage.change({SPOOL: "open"}, partly=True):
        stage.writer(reopen=True)


def _requeued(stage: Stage) -> None:
    """Three items wait, the first having failed once."""
    item = received(stage)
    stage.settle(1, "waiting 1", item.nack)


@scenario
def open_fresh(stage: Stage) -> Iterator[None]:
    _requeued(stage)
    stage.shutdown(stage.writers[0], False)
    stage.end(*stage.writers)
    yield
    with stage.change({SPOOL: "open", **dict.fromkeys((1, 2, 3), "gone")}, partly=True):
        stage.writer(fresh=True, maxsize=700, max_attempts=9)


@scenario
def purge(stage: Stage) -> Iterator[None]:
    _requeued(stage)
    item = stage.receive(stage.readers[0], 1, attempt=2)
    yield
    with stage.change({2: "gone", 3: "gone"}, partly=True):
        spoolipc.purge(stage.path)
    del item


@alone
def remove(stage: Stage) -> Iterator[None]:
    _requeued(stage)
    item = stage.receive(stage.readers[0], 1, attempt=2)
    stage.settle(1, "failed", lambda: item.reject("not wanted"))
    stage.put(stage.writers[0], "large")
    stage.close()
    stage.writers, stage.readers = [], []
    yield
    stage.log.say("try", [(SPOOL, "shut")])
    with stage.change({SPOOL: "open", **dict.fromkeys(range(1, 5), "gone")}, partly=True):
        spoolipc.remove(stage.path)


@scenario
def set_limits(stage: Stage) -> Iterator[None]:
    filled(stage)
    yield
    spoolipc.set_limits(stage.path, maxsize=700, max_attempts=9)


def _crash_with_much(stage: Stage) -> None:
    """Crash with an item in flight, a view of another, a new file lent and a consumed one."""
    writer, reader, first = stage.writer(), stage.reader(), stage.last - 3
    kept: list[Any] = [stage.receive(reader, first), stage.receive(reader, first + 1)]
    kept.append(kept[1].array)
    stage.settle(first + 1, "gone", kept[1].ack)
    for shape in ((100, 80), (900,)):
        loan = writer.loan(shape)
        kept += loan, loan.__enter__()
    kill()


def _crashed(stage: Stage) -> None:
    consumed(stage, 2)
    for _ in range(3):
        stage.put(stage.writers[0], "large")
    stage.elsewhere(_crash_with_much)


@alone
def open_after_a_crash(stage: Stage) -> Iterator[None]:
    _crashed(stage)
    yield
    stage.reader()


@alone
def collect_garbage(stage: Stage) -> Iterator[None]:
    _crashed(stage)
    for left in ("free/%020d.npy", "failed/%020d.jsonl", "alive/%016d"):
        (stage.path / (left % 900)).touch(mode=0o600)
    yield
    if spoolipc.gc(stage.path).not_removed:
        spoolipc.gc(stage.path)


@alone
def dead_letter_after_a_crash(stage: Stage) -> Iterator[None]:
    stage.writer(max_attempts=1)
    filled(stage)
    stage.elsewhere(lambda other: other.receive(other.reader(), 1))
    with stage.change({1: "failed"}):
        pass
    yield
    stage.reader()


@alone
def end_a_lease(stage: Stage) -> Iterator[None]:
    item = received(stage, lease=100.0)
    item.extend(1e-6)
    yield
    stage.reader()


def _killed_after_the_rename(act: Callable[[Stage], object]) -> Callable[[Stage], object]:
    """Do something, and be killed between the move of a file and the stores that go with it."""

    def work(stage: Stage) -> None:
        with Injector(after=lambda event, _: kill() if event.name == "rename" else None):
            act(stage)

    return work


@alone
def finish_a_put_that_crashed(stage: Stage) -> Iterator[None]:
    stage.put(stage.writer())
    stage.elsewhere(_killed_after_the_rename(lambda other: other.put(other.writer())))
    stage.last = 2
    yield
    stage.put(stage.writers[0])


@alone
def finish_a_get_that_crashed(stage: Stage) -> Iterator[None]:
    filled(stage)
    stage.elsewhere(_killed_after_the_rename(lambda other: other.get(other.reader(), 1)))
    yield
    stage.put(stage.writers[0], "large")


@alone
def rebuild_a_deleted_index(stage: Stage) -> Iterator[None]:
    writer = consumed(stage, 2)
    stage.put(writer, "large")
    (stage.path / "index").unlink()
    yield
    stage.put(writer, "large")


@alone
def rebuild_an_overwritten_index(stage: Stage) -> Iterator[None]:
    item = received(stage)  # stays in flight; of a crash that nobody noticed a rebuild knows nothing
    stage.log.say("try", [[1, "waiting 0"]])
    poke(stage.path, "capacity", 1 << 40)
    yield
    stage.put(stage.writers[0], "large")
    del item


@scenario
def repair(stage: Stage) -> Iterator[None]:
    filled(stage)
    stage.spoil(1)
    yield
    spoolipc.fsck(stage.path, repair=True)


def _dead_letter(stage: Stage) -> None:
    item = received(stage)
    stage.settle(1, "failed", lambda: item.reject("not wanted"))


@scenario
def retry_a_dead_letter(stage: Stage) -> Iterator[None]:
    _dead_letter(stage)
    yield
    with stage.change({1: "waiting 0"}, partly=True) as seqs:
        done = spoolipc.failed_retry(stage.path)
        if done.damaged:
            raise BadItem(f"{stage.path}: {done.damaged}")
        seqs.update(done.seqs)


@scenario
def drop_a_dead_letter(stage: Stage) -> Iterator[None]:
    _dead_letter(stage)
    yield
    with stage.change({1: "gone"}, partly=True):
        spoolipc.failed_drop(stage.path)


@scenario
def evict(stage: Stage) -> Iterator[None]:
    """Files of a backlog that is gone leave the pool."""
    writer = consumed(stage, 3)
    yield
    SpoolReader(stage.path).close()
    stage.put(writer)


CORE: Final = (
    "put_small put_into_a_consumed_file lend_and_commit put_durably get_large get_with_a_damaged_one_before"
    " receive_and_acknowledge nack_and_ack_the_second_attempt close shutdown_immediately open_after_a_crash"
    " rebuild_a_deleted_index retry_a_dead_letter"
).split()
