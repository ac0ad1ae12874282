"""Work in a dead reader's hands is delivered again at once, in a hung reader's when its lease ends, never otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from audit import audit
from support.peer import Peer

from spoolipc import Empty, LeaseExpired, SpoolReader, SpoolWriter, history, tend, waiting
from spoolipc import words as W

LARGE = 5000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def writer(path: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(path) as writer:
        yield writer


@pytest.fixture
def leasing(path: Path) -> Iterator[SpoolReader]:
    with SpoolReader(path, lease=30.0) as reader:
        yield reader


@pytest.fixture
def reader(path: Path) -> Iterator[SpoolReader]:
    with SpoolReader(path) as reader:
        yield reader
        audit(reader._source.party)


class Clock:
    """The monotonic clock in nanoseconds, which leases and delays go by, moved ahead by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0
        real = time.monotonic_ns
        monkeypatch.setattr(time, "monotonic_ns", lambda: real() + self.ahead)

    def pass_by(self, seconds: float) -> None:
        self.ahead += int(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class TestLease:
    def test_item_goes_to_another_reader_when_its_lease_ends(
        self, writer: SpoolWriter, leasing: SpoolReader, reader: SpoolReader, clock: Clock
    ) -> None:
        seq = writer.put(np.zeros(LARGE))
        late = leasing.receive()
        clock.pass_by(29)
        with pytest.raises(Empty):
            reader.receive(block=False)
        clock.pass_by(1.1)
        item = reader.receive(block=False)
        assert (item.seq, item.attempt) == (seq, 2)
        (failure,) = history.read(reader._source.party.layout, seq)
        assert (failure.attempt, failure.why) == (1, "its lease ended")
        with pytest.raises(LeaseExpired):
            late.ack()
        item.ack()

    @pytest.mark.parametrize("late", ["ack", "nack", "reject", "extend"])
    @pytest.mark.parametrize("taken", ["nobody took it", "another has it", "another settled it"])
    def test_late_settling_is_refused_and_changes_nothing(
        self, writer: SpoolWriter, path: Path, reader: SpoolReader, clock: Clock, late: str, taken: str
    ) -> None:
        with SpoolReader(path, lease=5) as leasing:
            seq = writer.put(np.zeros(LARGE))
            item = leasing.receive()
            clock.pass_by(5.1)
            again = None if taken == "nobody took it" else reader.receive(block=False)
            if again and taken == "another settled it":
                again.ack()
            settle: dict[str, Callable[[], None]] = {
                "ack": item.ack,
                "nack": item.nack,
                "reject": lambda: item.reject("late"),
                "extend": lambda: item.extend(5),
            }
            with pytest.raises(LeaseExpired, match=f"item {seq} "):
                settle[late]()
            if taken == "nobody took it":
                again = reader.receive(block=False)
            assert again
            assert again.attempt == 2
            if not again.settled:
                again.ack()
            assert list((path / "failed").iterdir()) == []

    def test_late_acknowledgement_at_the_end_of_the_block_raises(
        self, writer: SpoolWriter, leasing: SpoolReader, clock: Clock
    ) -> None:
        writer.put(np.zeros(3))
        with pytest.raises(LeaseExpired), leasing.receive():
            clock.pass_by(31)
        with leasing.receive(block=False) as item:
            assert item.attempt == 2

    def test_error_of_the_block_is_not_hidden_by_a_lease_that_ended(
        self, writer: SpoolWriter, leasing: SpoolReader, clock: Clock
    ) -> None:
        def work() -> None:
            with leasing.receive():
                clock.pass_by(31)
                raise RuntimeError("mine")

        writer.put(np.zeros(3))
        with pytest.raises(RuntimeError, match="mine"):
            work()

    def test_own_item_whose_lease_ended_comes_back_as_another_delivery(
        self, writer: SpoolWriter, leasing: SpoolReader, clock: Clock
    ) -> None:
        writer.put(np.zeros(LARGE))
        first = leasing.receive()
        clock.pass_by(31)
        second = leasing.receive(block=False)
        assert second.attempt == 2
        with pytest.raises(LeaseExpired):
            first.ack()
        second.ack()

    def test_extend_counts_from_now(
        self, writer: SpoolWriter, leasing: SpoolReader, reader: SpoolReader, clock: Clock
    ) -> None:
        writer.put(np.zeros(3))
        item = leasing.receive()
        for _ in range(5):
            clock.pass_by(20)
            item.extend(30)
            with pytest.raises(Empty):
                reader.receive(block=False)
        item.extend(5)  # a shorter one counts too
        clock.pass_by(6)
        assert reader.receive(block=False).attempt == 2

    def test_extend_gives_a_lease_to_an_item_that_had_none(
        self, writer: SpoolWriter, path: Path, reader: SpoolReader, clock: Clock
    ) -> None:
        writer.put(np.zeros(3))
        with SpoolReader(path) as other:
            item = other.receive()
            clock.pass_by(1e6)
            with pytest.raises(Empty):
                reader.receive(block=False)
            item.extend(2)
            clock.pass_by(2.1)
            assert reader.receive(block=False).attempt == 2

    def test_array_of_a_late_reader_never_changes(
        self, writer: SpoolWriter, leasing: SpoolReader, reader: SpoolReader, clock: Clock
    ) -> None:
        writer.put(np.full(LARGE, 7.0))
        late = leasing.receive()
        array = late.array
        clock.pass_by(31)
        reader.receive(block=False).ack()
        for _ in range(8):
            writer.put(np.zeros(LARGE))
            reader.get()
        assert (array == 7).all()

    def test_hung_reader_loses_its_item_and_learns_it_when_it_goes_on(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path
    ) -> None:
        writer.put(np.zeros(LARGE))
        with Peer(path) as peer:
            peer.run("item = SpoolReader(path, lease=0.3).receive()")
            peer.stop()
            with reader.receive(timeout=20) as item:
                assert item.attempt == 2
            peer.go()
            peer.run("try: item.ack()\nexcept LeaseExpired as error: said = str(error)")
            assert "lease ended" in peer.ask("said")

    @pytest.mark.parametrize("jump", [-1e9, 1e9])
    def test_no_expiry_is_moved_by_a_jump_of_the_wall_clock(
        self,
        writer: SpoolWriter,
        leasing: SpoolReader,
        reader: SpoolReader,
        clock: Clock,
        monkeypatch: pytest.MonkeyPatch,
        jump: float,
    ) -> None:
        for _ in range(2):
            writer.put(np.zeros(3))
        leased, delayed = leasing.receive(), leasing.receive()
        delayed.nack(delay=30)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + jump)
        monkeypatch.setattr(time, "time_ns", lambda: int((now + jump) * 1e9))
        clock.pass_by(29)
        with pytest.raises(Empty):
            reader.receive(block=False)
        leased.extend(5)
        clock.pass_by(1.1)
        assert reader.receive(block=False).seq == delayed.seq
        with pytest.raises(Empty):
            reader.receive(block=False)
        clock.pass_by(4)
        assert reader.receive(block=False).seq == leased.seq


class TestDelay:
    def test_item_waits_out_its_delay_and_counts_as_waiting(
        self, writer: SpoolWriter, reader: SpoolReader, clock: Clock
    ) -> None:
        writer.put(np.full(3, 1))
        reader.receive().nack(delay=10)
        writer.put(np.full(3, 2))
        assert reader.qsize() == 2
        assert reader.get()[0] == 2
        clock.pass_by(9.9)
        with pytest.raises(Empty):
            reader.receive(block=False)
        clock.pass_by(0.2)
        item = reader.receive(block=False)
        assert (item.array[0], item.attempt) == (1, 2)

    def test_shorter_delay_is_over_first(
        self, writer: SpoolWriter, reader: SpoolReader, clock: Clock
    ) -> None:
        for number in range(4):
            writer.put(np.full(3, number))
        items = [reader.receive() for _ in range(4)]
        for item, delay in zip(items, (40, 10, 30, 20), strict=True):
            item.nack(delay=delay)
        order = []
        for _ in range(4):
            clock.pass_by(10.001)
            order.append(int(reader.get(block=False)[0]))
        assert order == [1, 3, 2, 0]

    @pytest.mark.parametrize("who", ["the same", "another"])
    def test_waiting_reader_gets_it_within_50_ms_of_the_delay_and_sleeps_until_then(
        self, writer: SpoolWriter, path: Path, reader: SpoolReader, monkeypatch: pytest.MonkeyPatch, who: str
    ) -> None:
        """The reader sleeps already, knowing nothing of the delay, when another gives the item back."""
        rounds = 0
        looked = tend.tend

        def counted(*args: object, **kwargs: object) -> None:
            nonlocal rounds
            rounds += 1
            looked(*args, **kwargs)  # type: ignore[arg-type]

        writer.put(np.zeros(3))
        item = reader.receive()
        with SpoolReader(path) as other, ThreadPoolExecutor(1) as aside:
            words = other._source.party.look()
            for flag in range(8):
                words[W.ITEM_FLAGS + flag] = 0
            monkeypatch.setattr(waiting, "tend", counted)
            if who == "another":
                future = aside.submit(lambda: (other.receive(timeout=20), time.monotonic()))
                while not any(words[W.ITEM_FLAGS : W.ITEM_FLAGS + 8]):
                    assert not future.done()
            cpu, began = time.process_time(), time.monotonic()
            item.nack(delay=0.4)
            if who == "another":
                again, came = future.result(20)
            else:
                again, came = reader.receive(timeout=20), time.monotonic()
            assert 0.4 <= came - began < 0.45
            assert rounds < 6
            assert time.process_time() - cpu < 0.2
            again.ack()

    def test_delay_that_never_ends_is_taken_as_a_long_one(
        self, writer: SpoolWriter, reader: SpoolReader, clock: Clock
    ) -> None:
        writer.put(np.zeros(3))
        reader.receive().nack(delay=float("inf"))
        clock.pass_by(1e8)
        with pytest.raises(Empty):
            reader.receive(block=False)


class TestDeath:
    def test_sleeping_reader_gets_the_item_of_a_dead_one_within_a_second_or_so(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path
    ) -> None:
        seq = writer.put(np.zeros(LARGE), meta="mine")
        with Peer(path) as peer, ThreadPoolExecutor(1) as aside:
            peer.run("item = SpoolReader(path).receive()")
            future = aside.submit(reader.receive, timeout=20)
            began = time.monotonic()
            peer.kill()
            item = future.result(20)
            assert time.monotonic() - began < 2.0
        assert (item.seq, item.attempt, item.meta) == (seq, 2, "mine")
        (failure,) = history.read(reader._source.party.layout, seq)
        assert (failure.attempt, failure.who, failure.why) == (1, f"process {peer.pid}", "its reader died")
        item.ack()

    def test_everything_in_its_hands_comes_first_in_the_order_it_had(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path, clock: Clock
    ) -> None:
        for number in range(6):
            writer.put(np.full(3, number))
        with Peer(path) as peer:
            peer.run("reader = SpoolReader(path); items = [reader.receive() for _ in range(3)]")
            peer.kill()
        clock.pass_by(1.1)
        found = [reader.receive(block=False) for _ in range(6)]
        assert [(int(item.array[0]), item.attempt) for item in found] == [
            (0, 2),
            (1, 2),
            (2, 2),
            (3, 1),
            (4, 1),
            (5, 1),
        ]

    def test_next_to_open_the_spool_finds_it_at_once(self, writer: SpoolWriter, path: Path) -> None:
        writer.put(np.zeros(3))
        with Peer(path) as peer:
            peer.run("item = SpoolReader(path).receive()")
            peer.kill()
        with SpoolReader(path) as reader, reader.receive(block=False) as item:
            assert item.attempt == 2

    def test_stopped_reader_without_a_lease_keeps_its_item(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path, clock: Clock
    ) -> None:
        writer.put(np.zeros(3))
        with Peer(path) as peer:
            peer.run("item = SpoolReader(path).receive()")
            peer.stop()
            clock.pass_by(1e6)
            with pytest.raises(Empty):
                reader.receive(block=False)
            peer.go()
            peer.run("item.ack()")

    def test_death_is_no_matter_for_other_readers_claims(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path, clock: Clock
    ) -> None:
        for _ in range(2):
            writer.put(np.zeros(3))
        mine = reader.receive()
        with Peer(path) as peer:
            peer.run("item = SpoolReader(path).receive()")
            peer.kill()
        clock.pass_by(1.1)
        with reader.receive(block=False) as item:
            assert item.attempt == 2
        mine.ack()


def test_attempts_are_remembered_when_the_index_is_lost(
    writer: SpoolWriter, reader: SpoolReader, path: Path
) -> None:
    for number in range(2):
        writer.put(np.full(3, number))
    for _ in range(3):
        item = reader.receive()
        assert item.array[0] == 0
        item.nack(reason="not now")
    (path / "index").unlink()
    item = reader.receive(block=False)
    assert (item.array[0], item.attempt) == (0, 4)
    assert [failure.attempt for failure in history.read(reader._source.party.layout, item.seq)] == [
        1,
        2,
        3,
    ]
    assert reader.receive(block=False).attempt == 1
