"""An item received is acknowledged, given back or given up exactly once, and everybody is told the truth about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from audit import audit
from support.peer import Peer

from spoolipc import (
    AlreadySettled,
    BadItem,
    Empty,
    LeaseExpired,
    ShutDown,
    SpoolClosed,
    SpoolReader,
    SpoolWriter,
    history,
)
from spoolipc import words as W
from spoolipc.npy import Array

LARGE = 5000
"""Of float64: 40 KB, which is given out as a view of the file."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def writer(path: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(path) as writer:
        yield writer


@pytest.fixture
def reader(path: Path) -> Iterator[SpoolReader]:
    with SpoolReader(path) as reader:
        yield reader
        if not reader._source.party.closed:
            audit(reader._source.party)


@pytest.fixture
def other(path: Path) -> Iterator[SpoolReader]:
    with SpoolReader(path) as other:
        yield other


def item_file(path: Path, seq: int) -> Path:
    return path / "items" / f"{seq:020d}.npy"


class TestItem:
    def test_says_what_it_is(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        before = time.time()
        seq = writer.put(np.arange(LARGE), meta={"camera": 3})
        with reader.receive() as item:
            assert (item.seq, item.attempt, item.meta) == (seq, 1, {"camera": 3})
            assert before <= item.put_time <= time.time()
            assert item.nbytes >= LARGE * 8
            assert (item.array == np.arange(LARGE)).all()
            assert "in hand" in repr(item)
            assert not item.settled
        assert item.settled
        assert "acknowledged" in repr(item)

    @pytest.mark.parametrize("size", [3, LARGE])
    def test_array_is_read_only_and_the_same_object_each_time(
        self, writer: SpoolWriter, reader: SpoolReader, size: int
    ) -> None:
        writer.put(np.zeros(size))
        with reader.receive() as item:
            assert item.array is item.array
            with pytest.raises(ValueError, match="read-only"):
                item.array[0] = 1
            assert list(item.arrays) == [""]
            assert item.arrays[""] is item.array

    def test_array_stays_valid_after_the_acknowledgement(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        writer.put(np.full(LARGE, 7.0))
        with reader.receive() as item:
            array = item.array
        for _ in range(5):
            writer.put(np.zeros(LARGE))
            reader.get()
        assert (array == 7).all()
        assert item.array is array

    def test_array_never_looked_at_cannot_be_had_after_the_acknowledgement(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        writer.put(np.zeros(LARGE))
        with reader.receive() as item:
            pass
        with pytest.raises(LeaseExpired):
            _ = item.array
        with pytest.raises(LeaseExpired):
            _ = item.meta

    def test_nothing_waiting_is_empty(self, reader: SpoolReader) -> None:
        with pytest.raises(Empty):
            reader.receive(block=False)
        with pytest.raises(Empty):
            reader.receive(timeout=0.01)

    def test_receive_waits_for_what_comes(self, writer: SpoolWriter, reader: SpoolReader, path: Path) -> None:
        with ThreadPoolExecutor(1) as aside:
            waiting = aside.submit(reader.receive)
            writer.put(np.zeros(3), meta="here")
            with waiting.result(10) as item:
                assert item.meta == "here"


class TestSettling:
    def test_leaving_the_block_acknowledges(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path
    ) -> None:
        writer.put(np.zeros(LARGE))
        with reader.receive() as item:
            assert item_file(path, item.seq).exists()
            assert reader.empty()
        assert list((path / "items").iterdir()) == []
        with pytest.raises(Empty):
            reader.receive(block=False)

    @pytest.mark.parametrize("error", [RuntimeError("no luck"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
    def test_exception_gives_the_item_back_and_goes_on(
        self, writer: SpoolWriter, reader: SpoolReader, error: BaseException
    ) -> None:
        seq = writer.put(np.zeros(3))
        with pytest.raises(type(error)) as raised, reader.receive():
            raise error
        assert raised.value is error
        with reader.receive(block=False) as item:
            assert (item.seq, item.attempt) == (seq, 2)
            (failure,) = history.read(reader._source.party.layout, seq)
            assert (failure.attempt, failure.why) == (1, f"{type(error).__name__}: {error}")
            assert failure.who.startswith("process ")
            assert abs(failure.when - time.time()) < 60

    def test_history_is_gone_once_the_item_is_acknowledged(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path
    ) -> None:
        for last in ("receive", "get"):
            writer.put(np.zeros(3))
            reader.receive().nack()
            assert len(list((path / "failed").iterdir())) == 1
            if last == "receive":
                reader.receive().ack()
            else:
                reader.get()
            assert list((path / "failed").iterdir()) == []

    def test_settling_by_hand_within_the_block_is_left_alone(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        for _ in range(3):
            writer.put(np.zeros(3))
        with reader.receive() as item:
            item.ack()
        with reader.receive() as item:
            item.reject("on purpose")
        with reader.receive() as item:
            item.nack()
        assert reader.receive(block=False).attempt == 2

    def test_error_after_settling_by_hand_changes_nothing(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        writer.put(np.zeros(3))

        def work() -> None:
            with reader.receive() as item:
                item.ack()
                raise RuntimeError("later")

        with pytest.raises(RuntimeError, match="later"):
            work()
        with pytest.raises(Empty):
            reader.receive(block=False)

    @pytest.mark.parametrize("first", ["ack", "nack", "reject"])
    def test_settling_twice_is_a_clear_error(
        self, writer: SpoolWriter, reader: SpoolReader, first: str
    ) -> None:
        writer.put(np.zeros(3))
        item = reader.receive()
        done: dict[str, Callable[[], None]] = {
            "ack": item.ack,
            "nack": item.nack,
            "reject": lambda: item.reject("bad"),
        }
        said = {"ack": "acknowledged", "nack": "given back", "reject": "rejected"}[first]
        done[first]()
        done["extend"] = lambda: item.extend(5)
        for again in done.values():
            with pytest.raises(AlreadySettled, match=said):
                again()

    def test_numbers_that_mean_nothing_are_refused_and_the_item_stays_in_hand(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        writer.put(np.zeros(3))
        item = reader.receive()
        for bad in (-1.0, float("nan")):
            with pytest.raises(ValueError, match="delay"):
                item.nack(bad)
        for bad in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="lease"):
                item.extend(bad)
            with pytest.raises(ValueError, match="lease"):
                SpoolReader(reader.path, lease=bad)
        item.extend(float("inf"))
        item.ack()

    def test_closing_the_reader_gives_back_what_is_in_hand(self, writer: SpoolWriter, path: Path) -> None:
        seq = writer.put(np.zeros(3))
        with SpoolReader(path) as one:
            item = one.receive()
        with pytest.raises(SpoolClosed):
            item.ack()
        with SpoolReader(path) as two, two.receive(block=False) as again:
            assert (again.seq, again.attempt) == (seq, 2)
            (failure,) = history.read(two._source.party.layout, seq)
            assert "left" in failure.why

    def test_error_of_the_block_is_not_hidden_by_a_reader_closed_in_it(
        self, writer: SpoolWriter, path: Path
    ) -> None:
        writer.put(np.zeros(3))
        reader = SpoolReader(path)

        def work() -> None:
            with reader.receive():
                reader.close()
                raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            work()

    def test_get_mixes_with_receive(
        self, writer: SpoolWriter, reader: SpoolReader, other: SpoolReader
    ) -> None:
        for number in range(4):
            writer.put(np.full(3, number))
        item = reader.receive()
        assert other.get()[0] == 1
        item.nack()
        assert [int(other.get()[0]) for _ in range(3)] == [0, 2, 3]


class TestDamage:
    @pytest.mark.parametrize("look", ["array", "arrays", "meta"])
    def test_damaged_item_is_kept_aside_and_the_rest_flows(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path, look: str
    ) -> None:
        seq = writer.put(np.zeros(LARGE), meta=1)
        writer.put(np.ones(LARGE))
        file = item_file(path, seq)
        file.write_bytes(b"\x93NUMPY garbage" + bytes(file.stat().st_size - 14))
        with pytest.raises(BadItem), reader.receive() as item:
            getattr(item, look)
        with pytest.raises(AlreadySettled):
            item.ack()
        assert (path / "failed" / file.name).exists()
        (failure,) = history.read(reader._source.party.layout, seq)
        assert "damaged" in failure.why
        with reader.receive(block=False) as item:
            assert item.array[0] == 1

    def test_file_removed_by_hand_costs_that_item_only(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path
    ) -> None:
        seq = writer.put(np.zeros(LARGE))
        writer.put(np.ones(LARGE))
        item_file(path, seq).unlink()
        with pytest.raises(BadItem, match="missing"), reader.receive() as item:
            _ = item.array
        with reader.receive(block=False) as item:
            assert item.array[0] == 1

    def test_peek_passes_over_a_damaged_item(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path
    ) -> None:
        seq = writer.put(np.zeros(LARGE))
        writer.put(np.ones(LARGE), meta="good")
        file = item_file(path, seq)
        file.write_bytes(bytes(file.stat().st_size))
        assert reader.peek().meta == "good"
        assert (path / "failed" / file.name).exists()


class TestItems:
    def test_loop_acknowledges_each_and_ends_with_the_spool(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        for number in range(20):
            writer.put(np.full(3, number))
        writer.shutdown()
        assert [int(item.array[0]) for item in reader.items()] == list(range(20))
        with pytest.raises(ShutDown):
            reader.receive()

    def test_item_is_in_hand_until_the_next_is_asked_for(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        for _ in range(2):
            writer.put(np.zeros(3))
        items = reader.items()
        first = next(items)
        assert not first.settled
        second = next(items)
        assert first.settled
        assert not second.settled
        items.close()

    def test_item_of_a_loop_that_breaks_or_raises_is_given_back(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        seq = writer.put(np.zeros(3))

        def failing() -> None:
            for _ in reader.items():
                raise RuntimeError("no luck")

        with pytest.raises(RuntimeError, match="no luck"):
            failing()
        for item in reader.items():
            assert (item.seq, item.attempt) == (seq, 2)
            break
        with reader.receive(block=False) as item:
            assert (item.seq, item.attempt) == (seq, 3)

    def test_settled_by_hand_in_the_loop(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        for number in range(4):
            writer.put(np.full(3, number))
        writer.shutdown()
        seen = []
        for item in reader.items():
            seen.append((int(item.array[0]), item.attempt))
            if item.array[0] == 1 and item.attempt == 1:
                item.nack()
            if item.array[0] == 2:
                item.reject("two")
        assert seen == [(0, 1), (1, 1), (1, 2), (2, 1), (3, 1)]


class TestPeek:
    def test_leaves_the_item_where_it_is(self, writer: SpoolWriter, reader: SpoolReader, path: Path) -> None:
        seq = writer.put({"a": np.zeros(LARGE), "b": np.ones(3)}, meta=[1, 2])
        for _ in range(3):
            peeked = reader.peek()
            assert (peeked.seq, peeked.attempt, peeked.meta, peeked.names) == (seq, 0, [1, 2], ("a", "b"))
            assert abs(peeked.put_time - time.time()) < 60
            assert peeked.nbytes == item_file(path, seq).stat().st_size
        assert reader.qsize() == 1
        assert reader.receive().attempt == 1

    def test_looks_at_the_one_that_receive_would_take(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        for number in range(3):
            writer.put(np.zeros(3), meta=number)
        item = reader.receive()
        assert reader.peek().meta == 1
        item.nack()
        assert reader.peek().meta == 0
        assert reader.peek().attempt == 1

    def test_raises_empty_and_shutdown(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        with pytest.raises(Empty):
            reader.peek(block=False)
        with pytest.raises(Empty):
            reader.peek(timeout=0.01)
        writer.shutdown()
        with pytest.raises(ShutDown):
            reader.peek()

    def test_beside_readers_that_take_never_shows_a_wrong_item(self, path: Path) -> None:
        count = 3000
        with SpoolWriter(path, maxsize=4) as writer, SpoolReader(path) as reader, Peer(path) as peer:
            peer.start(
                "ask",
                "[0 for reader in [SpoolReader(path)] for _ in reader] and None",
            )
            seen = 0

            def peeking() -> int:
                seen = 0
                while True:
                    try:
                        peeked = reader.peek(timeout=10)
                    except ShutDown:
                        return seen
                    assert peeked.meta == {"seq": peeked.seq}
                    seen += 1

            with ThreadPoolExecutor(1) as aside:
                looking = aside.submit(peeking)
                for number in range(1, count + 1):
                    assert writer.put(np.full(LARGE, number), meta={"seq": number}) == number
                writer.shutdown()
                seen = looking.result(30)
            assert seen
            peer.answer()


class TestShutdown:
    def test_waits_for_what_other_readers_have_in_hand_but_not_for_ones_own(
        self, writer: SpoolWriter, reader: SpoolReader, other: SpoolReader
    ) -> None:
        writer.put(np.zeros(3))
        mine = reader.receive()
        writer.shutdown()
        with pytest.raises(ShutDown):
            reader.receive()
        with pytest.raises(Empty):
            other.receive(block=False)
        with pytest.raises(Empty):
            other.receive(timeout=0.01)
        mine.nack()
        with other.receive(timeout=0) as item:
            assert item.attempt == 2
        for each in (reader, other):
            with pytest.raises(ShutDown):
                each.receive()

    def test_waits_for_what_is_delayed(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        writer.put(np.zeros(3))
        reader.receive().nack(delay=0.1)
        writer.shutdown()
        with pytest.raises(Empty):
            reader.receive(block=False)
        with reader.receive(timeout=10) as item:
            assert item.attempt == 2
        with pytest.raises(ShutDown):
            reader.receive()

    def test_dead_reader_does_not_keep_the_others_waiting_for_ever(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path
    ) -> None:
        writer.put(np.full(3, 5))
        with Peer(path) as peer:
            peer.run("item = SpoolReader(path).receive()")
            writer.shutdown()
            peer.kill()
            assert [(int(item.array[0]), item.attempt) for item in reader.items()] == [(5, 2)]

    def test_immediate_ends_even_for_items_in_hand(
        self, writer: SpoolWriter, reader: SpoolReader, other: SpoolReader
    ) -> None:
        for _ in range(3):
            writer.put(np.zeros(3))
        item = reader.receive()
        writer.shutdown(immediate=True)
        for each in (reader, other):
            with pytest.raises(ShutDown):
                each.receive()
        item.ack()


def test_file_of_an_acknowledged_item_is_written_again_only_when_its_array_is_gone(
    writer: SpoolWriter, reader: SpoolReader, path: Path
) -> None:
    inodes = []
    for number in range(6):
        seq = writer.put(np.full(LARGE, number))
        inodes.append(item_file(path, seq).stat().st_ino)
        with reader.receive() as item:
            assert item.array[0] == number
        del item
    assert len(set(inodes)) <= 3
    kept: list[Array] = []
    for number in range(6):
        writer.put(np.full(LARGE, number))
        with reader.receive() as item:
            kept.append(item.array)
    del item
    assert [int(array[0]) for array in kept] == list(range(6))


def test_file_of_a_redelivered_item_is_never_written_again(
    writer: SpoolWriter, reader: SpoolReader, other: SpoolReader
) -> None:
    """Its first reader may still look at it."""
    writer.put(np.full(LARGE, 7.0))
    first = reader.receive()
    array = first.array
    first.nack()
    other.receive().ack()
    for _ in range(8):
        writer.put(np.zeros(LARGE))
        other.get()
    assert (array == 7).all()


def test_index_lost_while_an_item_is_in_hand_delivers_it_again(
    writer: SpoolWriter, reader: SpoolReader, path: Path
) -> None:
    seq = writer.put(np.full(LARGE, 3.0), meta="m")
    late = reader.receive()
    array = late.array
    (path / "index").unlink()
    with pytest.raises(LeaseExpired):
        late.ack()
    with reader.receive(block=False) as item:
        assert (item.seq, item.meta) == (seq, "m")
        assert (item.array == 3).all()
    assert (array == 3).all()


def test_counts_are_right_after_every_step(writer: SpoolWriter, reader: SpoolReader) -> None:
    party = reader._source.party

    def counts() -> tuple[int, int, int]:
        audit(party)
        words = party.index.words
        return reader.qsize(), words[W.IN_FLIGHT], words[W.DELAYED_COUNT]

    for _ in range(3):
        writer.put(np.zeros(LARGE))
    assert counts() == (3, 0, 0)
    items = [reader.receive() for _ in range(3)]
    assert counts() == (0, 3, 0)
    items[0].nack()
    assert counts() == (1, 2, 0)
    items[1].nack(delay=60)
    assert counts() == (2, 1, 1)
    items[2].reject("bad")
    assert counts() == (2, 0, 1)
    reader.receive().ack()
    assert counts() == (1, 0, 1)
