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
)  # fmt: skip

LARGE = 5000
"""Of float64: 40 KB, which is given out as a view of the file."""
SETTLED = {"ack": "acknowledged", "nack": "given back|requeued", "reject": "rejected"}
"""What an item that was settled so says of itself."""
Pair = tuple[SpoolWriter, SpoolReader]


@pytest.fixture
def pair(spool: Path) -> Iterator[Pair]:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        yield writer, reader


def item_file(path: Path, seq: int) -> Path:
    return path / "items" / f"{seq:020d}.npy"


def settlings(item: Item) -> dict[str, Callable[[], None]]:
    return {"ack": item.ack, "nack": item.nack, "reject": lambda: item.reject("bad")}


def failure(path: Path, item: Item) -> Failure:
    """Why the one delivery before this one failed. The item is rejected to find out."""
    item.reject("to see its history")
    before, _ = failed_show(path, item.seq).history
    return before


def nothing_waits(reader: SpoolReader) -> None:
    with pytest.raises(Empty):
        reader.receive(block=False)


def test_item_says_what_it_is(pair: Pair) -> None:
    writer, reader = pair
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
def test_array_is_read_only_and_the_same_object_each_time(pair: Pair, size: int) -> None:
    writer, reader = pair
    writer.put(np.zeros(size))
    with reader.receive() as item:
        array = item.array
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        assert list(item.arrays) == [""]
        assert item.arrays[""] is array
    assert item.array is array


@pytest.mark.parametrize("look", ["array", "arrays", "meta"])
def test_what_was_never_looked_at_cannot_be_had_after_the_acknowledgement(pair: Pair, look: str) -> None:
    writer, reader = pair
    writer.put(np.zeros(LARGE))
    with reader.receive() as item:
        pass
    with pytest.raises(LeaseExpired):
        getattr(item, look)


def test_receive_waits_for_what_comes_until_its_timeout(pair: Pair) -> None:
    writer, reader = pair
    nothing_waits(reader)
    with pytest.raises(Empty):
        reader.receive(timeout=0.01)
    with ThreadPoolExecutor(1) as aside:
        waiting = aside.submit(reader.receive)
        writer.put(np.zeros(3), meta="here")
        with waiting.result(10) as item:
            assert item.meta == "here"


def test_leaving_the_block_acknowledges(pair: Pair, spool: Path) -> None:
    writer, reader = pair
    writer.put(np.zeros(LARGE))
    with reader.receive() as item:
        assert item_file(spool, item.seq).exists()
        assert reader.empty()
    assert list((spool / "items").iterdir()) == []
    nothing_waits(reader)


@pytest.mark.parametrize("error", [RuntimeError("no luck"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_exception_requeues_the_item_and_goes_on(pair: Pair, spool: Path, error: BaseException) -> None:
    writer, reader = pair
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


@pytest.mark.parametrize("last", ["receive", "get"])
def test_history_is_gone_once_the_item_is_acknowledged(pair: Pair, spool: Path, last: str) -> None:
    writer, reader = pair
    writer.put(np.zeros(3))
    reader.receive().nack()
    assert len(list((spool / "failed").iterdir())) == 1
    if last == "receive":
        reader.receive().ack()
    else:
        reader.get()
    assert list((spool / "failed").iterdir()) == []


def test_settling_by_hand_within_the_block_is_left_alone(pair: Pair) -> None:
    writer, reader = pair
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
    nothing_waits(reader)


@pytest.mark.parametrize("first", list(SETTLED))
def test_settling_twice_is_a_clear_error(pair: Pair, first: str) -> None:
    writer, reader = pair
    writer.put(np.zeros(3))
    item = reader.receive()
    done = settlings(item) | {"extend": lambda: item.extend(5)}
    done[first]()
    for again in done.values():
        with pytest.raises(AlreadySettled, match=SETTLED[first]):
            again()


def test_numbers_that_mean_nothing_are_refused_and_the_item_stays_in_flight(pair: Pair, spool: Path) -> None:
    writer, reader = pair
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


def test_closing_the_reader_requeues_what_is_in_flight(pair: Pair, spool: Path) -> None:
    writer, reader = pair
    seq = writer.put(np.zeros(3))
    with SpoolReader(spool) as closed:
        item = closed.receive()
    with pytest.raises(SpoolClosed):
        item.ack()
    again = reader.receive(block=False)
    assert (again.seq, again.attempt) == (seq, 2)
    assert "left" in failure(spool, again).why


def test_error_of_the_block_is_not_hidden_by_a_reader_closed_in_it(pair: Pair) -> None:
    writer, reader = pair
    writer.put(np.zeros(3))

    def work() -> None:
        with reader.receive():
            reader.close()
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        work()


@pytest.mark.parametrize("look", ["array", "arrays", "meta", "peek"])
def test_damaged_item_is_set_aside_and_the_rest_flows(pair: Pair, spool: Path, look: str) -> None:
    writer, reader = pair
    seq = writer.put(np.zeros(LARGE), meta=1)
    writer.put(np.ones(LARGE), meta="good")
    file = item_file(spool, seq)
    file.write_bytes(b"\x93NUMPY garbage" + bytes(file.stat().st_size - 14))
    if look == "peek":
        assert reader.peek().meta == "good"
    else:
        with pytest.raises(BadItem), reader.receive() as item:
            getattr(item, look)
        with pytest.raises(AlreadySettled):
            item.ack()
    assert (spool / "failed" / file.name).exists()
    (failed,) = failed_show(spool, seq).history
    assert "damaged" in failed.why
    with reader.receive(block=False) as item:
        assert item.array[0] == 1


def test_file_removed_by_hand_costs_that_item_only(pair: Pair, spool: Path) -> None:
    writer, reader = pair
    seq = writer.put(np.zeros(LARGE))
    writer.put(np.ones(LARGE))
    item_file(spool, seq).unlink()
    with pytest.raises(BadItem, match="missing"), reader.receive() as item:
        _ = item.array
    with reader.receive(block=False) as item:
        assert item.array[0] == 1
    gc(spool)  # the history of the lost item


def test_loop_has_each_item_in_flight_until_the_next_and_ends_with_the_spool(pair: Pair) -> None:
    writer, reader = pair
    for number in range(20):
        writer.put(np.full(3, number))
    writer.shutdown()
    found: list[Item] = []
    for item in reader.items():
        assert [before.settled for before in found] == [True] * len(found)
        assert not item.settled
        assert item.array[0] == len(found)
        found.append(item)
    assert len(found) == 20
    with pytest.raises(ShutDown):
        reader.receive()


def test_item_of_a_loop_that_breaks_or_raises_is_requeued(pair: Pair) -> None:
    writer, reader = pair
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


def test_settling_by_hand_in_the_loop_is_left_alone(pair: Pair) -> None:
    writer, reader = pair
    for number in range(4):
        writer.put(np.full(3, number))
    writer.shutdown()
    seen = []
    for item in reader.items():
        seen.append((int(item.array[0]), item.attempt))
        if seen[-1] == (1, 1):
            item.nack()
        if item.array[0] == 2:
            item.reject("two")
    assert seen == [(0, 1), (1, 1), (1, 2), (2, 1), (3, 1)]


def test_peek_leaves_the_item_where_it_is(pair: Pair, spool: Path) -> None:
    writer, reader = pair
    seq = writer.put({"a": np.zeros(LARGE), "b": np.ones(3)}, meta=[1, 2])
    for _ in range(3):
        peeked = reader.peek()
        assert (peeked.seq, peeked.attempt, peeked.meta, peeked.names) == (seq, 0, [1, 2], ("a", "b"))
        assert abs(peeked.put_time - time.time()) < 60
        assert peeked.nbytes == item_file(spool, seq).stat().st_size
    assert reader.qsize() == 1
    assert reader.receive().attempt == 1


def test_peek_shows_what_receive_would_take_or_raises_as_it_does(pair: Pair) -> None:
    writer, reader = pair
    for number in range(2):
        writer.put(np.zeros(3), meta=number)
    item = reader.receive()
    assert reader.peek().meta == 1
    item.nack()
    assert (reader.peek().meta, reader.peek().attempt) == (0, 1)
    assert [len(reader.get()) for _ in range(2)] == [3, 3]
    with pytest.raises(Empty):
        reader.peek(block=False)
    with pytest.raises(Empty):
        reader.peek(timeout=0.01)
    writer.shutdown()
    with pytest.raises(ShutDown):
        reader.peek()


def test_peek_beside_readers_that_take_never_shows_a_wrong_item(spool: Path) -> None:
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


def test_end_waits_for_what_is_delayed(pair: Pair) -> None:
    writer, reader = pair
    writer.put(np.zeros(3))
    reader.receive().nack(delay=0.1)
    writer.shutdown()
    nothing_waits(reader)
    with reader.receive(timeout=10) as item:
        assert item.attempt == 2
    with pytest.raises(ShutDown):
        reader.receive()


def test_end_waits_for_what_others_have_in_flight_unless_it_is_immediate_but_not_for_ones_own(
    pair: Pair, spool: Path
) -> None:
    writer, reader = pair
    with SpoolReader(spool) as other:
        writer.put(np.zeros(3))
        mine = reader.receive()
        writer.shutdown()
        with pytest.raises(ShutDown):
            reader.receive()
        with pytest.raises(Empty):
            other.receive(timeout=0.01)
        mine.nack()
        last = other.receive(timeout=0)
        assert last.attempt == 2
        nothing_waits(reader)
        writer.shutdown(immediate=True)
        for each in (reader, other):
            with pytest.raises(ShutDown):
                each.receive()
        last.ack()


def test_crashed_reader_does_not_keep_the_others_waiting_for_the_end(pair: Pair, spool: Path) -> None:
    writer, reader = pair
    writer.put(np.full(3, 5))
    with Peer(spool) as peer:
        peer.run("item = SpoolReader(path).receive()")
        writer.shutdown()
        peer.kill()
        assert [(int(item.array[0]), item.attempt) for item in reader.items()] == [(5, 2)]


def test_index_lost_while_an_item_is_in_flight_delivers_it_again(pair: Pair, spool: Path) -> None:
    writer, reader = pair
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


def test_counts_are_right_after_every_step(pair: Pair, spool: Path) -> None:
    writer, reader = pair

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
