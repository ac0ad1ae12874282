"""An item received is acknowledged, requeued or dead-lettered exactly once, and everybody is told the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.account import check_spool
from support.peek import peek_table
from support.peer import Peer

from spoolipc import (
    AlreadySettled,
    BadItem,
    Empty,
    Failure,
    Item,
    LeaseExpired,
    ShutDown,
    SpoolClosed,
    SpoolReader,
    SpoolWriter,
    failed_show,
    gc,
)

LARGE = 5000
"""Of float64: 40 KB, which is given out as a view of the file."""
SETTLED = {"ack": "acknowledged", "nack": "given back|requeued", "reject": "rejected"}
"""What an item that was settled so says of itself."""


@pytest.fixture
def writer(spool: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(spool) as writer:
        yield writer


@pytest.fixture
def reader(spool: Path) -> Iterator[SpoolReader]:
    with SpoolReader(spool) as reader:
        yield reader


@pytest.fixture
def other(spool: Path) -> Iterator[SpoolReader]:
    with SpoolReader(spool) as other:
        yield other


def item_file(path: Path, seq: int) -> Path:
    return path / "items" / f"{seq:020d}.npy"


def settlings(item: Item) -> dict[str, Callable[[], None]]:
    return {"ack": item.ack, "nack": item.nack, "reject": lambda: item.reject("bad")}


def failure(path: Path, item: Item) -> Failure:
    """Why the one delivery before this one failed. The item is rejected to find out."""
    item.reject("to see its history")
    before, _ = failed_show(path, item.seq).history
    return before


class TestItem:
    def test_says_what_it_is(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        before = time.time()
        seq = writer.put(np.arange(LARGE), meta={"camera": 3})
        with reader.receive() as item:
            assert (item.seq, item.attempt, item.meta) == (seq, 1, {"camera": 3})
            assert before <= item.put_time <= time.time()
            assert item.nbytes >= LARGE * 8
            assert (item.array == np.arange(LARGE)).all()
            assert str(seq) in repr(item)
            assert not item.settled
        assert item.settled
        assert "acknowledged" in repr(item)

    @pytest.mark.parametrize("size", [3, LARGE])
    def test_array_is_read_only_and_the_same_object_each_time(
        self, writer: SpoolWriter, reader: SpoolReader, size: int
    ) -> None:
        writer.put(np.zeros(size))
        with reader.receive() as item:
            array = item.array
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
            assert list(item.arrays) == [""]
            assert item.arrays[""] is array
        assert item.array is array

    def test_array_never_looked_at_cannot_be_had_after_the_acknowledgement(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        writer.put(np.zeros(LARGE))
        with reader.receive() as item:
            pass
        for look in ("array", "arrays", "meta"):
            with pytest.raises(LeaseExpired):
                getattr(item, look)

    def test_receive_waits_for_what_comes_until_its_timeout(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        for arguments in ({"block": False}, {"timeout": 0.01}):
            with pytest.raises(Empty):
                reader.receive(**arguments)
        with ThreadPoolExecutor(1) as aside:
            waiting = aside.submit(reader.receive)
            writer.put(np.zeros(3), meta="here")
            with waiting.result(10) as item:
                assert item.meta == "here"


class TestSettling:
    def test_leaving_the_block_acknowledges(
        self, writer: SpoolWriter, reader: SpoolReader, spool: Path
    ) -> None:
        writer.put(np.zeros(LARGE))
        with reader.receive() as item:
            assert item_file(spool, item.seq).exists()
            assert reader.empty()
        assert list((spool / "items").iterdir()) == []
        with pytest.raises(Empty):
            reader.receive(block=False)

    @pytest.mark.parametrize("error", [RuntimeError("no luck"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
    def test_exception_requeues_the_item_and_goes_on(
        self, writer: SpoolWriter, reader: SpoolReader, spool: Path, error: BaseException
    ) -> None:
        seq = writer.put(np.zeros(3))
        with pytest.raises(type(error)) as raised, reader.receive():
            raise error
        assert raised.value is error
        item = reader.receive(block=False)
        assert (item.seq, item.attempt) == (seq, 2)
        failed = failure(spool, item)
        assert (failed.attempt, failed.why) == (1, f"{type(error).__name__}: {error}")
        assert failed.who.startswith("process ")
        assert abs(failed.when - time.time()) < 60

    def test_history_is_gone_once_the_item_is_acknowledged(
        self, writer: SpoolWriter, reader: SpoolReader, spool: Path
    ) -> None:
        for last in ("receive", "get"):
            writer.put(np.zeros(3))
            reader.receive().nack()
            assert len(list((spool / "failed").iterdir())) == 1
            if last == "receive":
                reader.receive().ack()
            else:
                reader.get()
            assert list((spool / "failed").iterdir()) == []

    def test_settling_by_hand_within_the_block_is_left_alone(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        for how in ("ack", "reject", "nack"):
            writer.put(np.zeros(3))
            with reader.receive() as item:
                settlings(item)[how]()

        def work() -> None:
            with reader.receive(block=False) as item:
                assert item.attempt == 2
                item.ack()
                raise RuntimeError("later")

        with pytest.raises(RuntimeError, match="later"):
            work()
        with pytest.raises(Empty):
            reader.receive(block=False)

    @pytest.mark.parametrize("first", list(SETTLED))
    def test_settling_twice_is_a_clear_error(
        self, writer: SpoolWriter, reader: SpoolReader, first: str
    ) -> None:
        writer.put(np.zeros(3))
        item = reader.receive()
        done = settlings(item) | {"extend": lambda: item.extend(5)}
        done[first]()
        for again in done.values():
            with pytest.raises(AlreadySettled, match=SETTLED[first]):
                again()

    def test_numbers_that_mean_nothing_are_refused_and_the_item_stays_in_flight(
        self, writer: SpoolWriter, reader: SpoolReader, spool: Path
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
                SpoolReader(spool, lease=bad)
        item.extend(float("inf"))
        item.ack()

    def test_closing_the_reader_requeues_what_is_in_flight(
        self, writer: SpoolWriter, reader: SpoolReader, spool: Path
    ) -> None:
        seq = writer.put(np.zeros(3))
        with SpoolReader(spool) as closed:
            item = closed.receive()
        with pytest.raises(SpoolClosed):
            item.ack()
        again = reader.receive(block=False)
        assert (again.seq, again.attempt) == (seq, 2)
        assert "left" in failure(spool, again).why

    def test_error_of_the_block_is_not_hidden_by_a_reader_closed_in_it(
        self, writer: SpoolWriter, spool: Path
    ) -> None:
        writer.put(np.zeros(3))
        reader = SpoolReader(spool)

        def work() -> None:
            with reader.receive():
                reader.close()
                raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            work()

    def test_requeued_item_is_the_next_that_get_takes(
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
    def test_damaged_item_is_set_aside_and_the_rest_flows(
        self, writer: SpoolWriter, reader: SpoolReader, spool: Path, look: str
    ) -> None:
        seq = writer.put(np.zeros(LARGE), meta=1)
        writer.put(np.ones(LARGE))
        file = item_file(spool, seq)
        file.write_bytes(b"\x93NUMPY garbage" + bytes(file.stat().st_size - 14))
        with pytest.raises(BadItem), reader.receive() as item:
            getattr(item, look)
        with pytest.raises(AlreadySettled):
            item.ack()
        assert (spool / "failed" / file.name).exists()
        (failed,) = failed_show(spool, seq).history
        assert "damaged" in failed.why
        with reader.receive(block=False) as item:
            assert item.array[0] == 1

    def test_file_removed_by_hand_costs_that_item_only(
        self, writer: SpoolWriter, reader: SpoolReader, spool: Path
    ) -> None:
        seq = writer.put(np.zeros(LARGE))
        writer.put(np.ones(LARGE))
        item_file(spool, seq).unlink()
        with pytest.raises(BadItem, match="missing"), reader.receive() as item:
            _ = item.array
        with reader.receive(block=False) as item:
            assert item.array[0] == 1
        gc(spool)  # the history of the lost item

    def test_peek_passes_over_a_damaged_item(
        self, writer: SpoolWriter, reader: SpoolReader, spool: Path
    ) -> None:
        seq = writer.put(np.zeros(LARGE))
        writer.put(np.ones(LARGE), meta="good")
        file = item_file(spool, seq)
        file.write_bytes(bytes(file.stat().st_size))
        assert reader.peek().meta == "good"
        assert (spool / "failed" / file.name).exists()


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

    def test_item_is_in_flight_until_the_next_is_asked_for(
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

    def test_item_of_a_loop_that_breaks_or_raises_is_requeued(
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

    def test_settling_by_hand_in_the_loop_is_left_alone(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
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
    def test_leaves_the_item_where_it_is(self, writer: SpoolWriter, reader: SpoolReader, spool: Path) -> None:
        seq = writer.put({"a": np.zeros(LARGE), "b": np.ones(3)}, meta=[1, 2])
        for _ in range(3):
            peeked = reader.peek()
            assert (peeked.seq, peeked.attempt, peeked.meta, peeked.names) == (seq, 0, [1, 2], ("a", "b"))
            assert abs(peeked.put_time - time.time()) < 60
            assert peeked.nbytes == item_file(spool, seq).stat().st_size
        assert reader.qsize() == 1
        assert reader.receive().attempt == 1

    def test_looks_at_the_one_that_receive_would_take(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        for number in range(3):
            writer.put(np.zeros(3), meta=number)
        item = reader.receive()
        assert reader.peek().meta == 1
        item.nack()
        assert (reader.peek().meta, reader.peek().attempt) == (0, 1)

    def test_raises_empty_and_shutdown(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        with pytest.raises(Empty):
            reader.peek(block=False)
        with pytest.raises(Empty):
            reader.peek(timeout=0.01)
        writer.shutdown()
        with pytest.raises(ShutDown):
            reader.peek()

    def test_beside_readers_that_take_never_shows_a_wrong_item(self, spool: Path) -> None:
        def peeking(reader: SpoolReader) -> int:
            seen = 0
            while True:
                try:
                    peeked = reader.peek(timeout=10)
                except ShutDown:
                    return seen
                assert peeked.meta == {"seq": peeked.seq}
                seen += 1

        with SpoolWriter(spool, maxsize=4) as writer, SpoolReader(spool) as reader, Peer(spool) as peer:
            peer.start("ask", "sum(1 for reader in [SpoolReader(path)] for _ in reader)")
            with ThreadPoolExecutor(1) as aside:
                looking = aside.submit(peeking, reader)
                for number in range(1, 3001):
                    assert writer.put(np.full(LARGE, number), meta={"seq": number}) == number
                writer.shutdown()
                assert looking.result(30)
            assert peer.answer() == 3000


class TestShutdown:
    def test_end_waits_for_what_other_readers_have_in_flight_but_not_for_ones_own(
        self, writer: SpoolWriter, reader: SpoolReader, other: SpoolReader
    ) -> None:
        writer.put(np.zeros(3))
        mine = reader.receive()
        writer.shutdown()
        with pytest.raises(ShutDown):
            reader.receive()
        for arguments in ({"block": False}, {"timeout": 0.01}):
            with pytest.raises(Empty):
                other.receive(**arguments)
        mine.nack()
        with other.receive(timeout=0) as item:
            assert item.attempt == 2
        for each in (reader, other):
            with pytest.raises(ShutDown):
                each.receive()

    def test_end_waits_for_what_is_delayed(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        writer.put(np.zeros(3))
        reader.receive().nack(delay=0.1)
        writer.shutdown()
        with pytest.raises(Empty):
            reader.receive(block=False)
        with reader.receive(timeout=10) as item:
            assert item.attempt == 2
        with pytest.raises(ShutDown):
            reader.receive()

    def test_crashed_reader_does_not_keep_the_others_waiting_for_ever(
        self, writer: SpoolWriter, reader: SpoolReader, spool: Path
    ) -> None:
        writer.put(np.full(3, 5))
        with Peer(spool) as peer:
            peer.run("item = SpoolReader(path).receive()")
            writer.shutdown()
            peer.kill()
            assert [(int(item.array[0]), item.attempt) for item in reader.items()] == [(5, 2)]

    def test_immediate_shutdown_ends_even_for_items_in_flight(
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


def test_index_lost_while_an_item_is_in_flight_delivers_it_again(
    writer: SpoolWriter, reader: SpoolReader, spool: Path
) -> None:
    seq = writer.put(np.full(LARGE, 3.0), meta="m")
    late = reader.receive()
    array = late.array
    (spool / "index").unlink()
    with pytest.raises(LeaseExpired):
        late.ack()
    with reader.receive(block=False) as item:
        assert (item.seq, item.meta) == (seq, "m")
        assert (item.array == 3).all()
    assert (array == 3).all()


def test_counts_are_right_after_every_step(writer: SpoolWriter, reader: SpoolReader, spool: Path) -> None:
    def counts() -> tuple[int, int, int]:
        check_spool(spool)
        counted = peek_table(spool).counts
        return reader.qsize(), counted["in_flight"], counted["delayed"]

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
