"""An item received is acknowledged, requeued or dead-lettered exactly once, and everybody is told the truth."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.faults import Event, Injector, forked
from support.peer import Peer
from support.waits import until, until_asleep

from spoolipc import (
    AlreadySettled,
    Empty,
    Item,
    LeaseExpired,
    ShutDown,
    SpoolReader,
    SpoolWriter,
    UnsupportedOperation,
    failed_retry,
    failed_show,
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


def settlings(item: Item) -> dict[str, Callable[[], None]]:
    return {
        "ack": item.ack,
        "nack": item.nack,
        "reject": lambda: item.reject("bad"),
        "extend": lambda: item.extend(5),
    }


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


@pytest.mark.parametrize("second", [*SETTLED, "extend", "the end of its block"])
def test_of_two_threads_that_settle_an_item_the_later_is_told_that_it_is_settled(
    pair: Pair, second: str
) -> None:
    """At the end of a block there is nothing to be told: the item is settled, as it is to be."""
    writer, reader = pair
    writer.put(np.zeros(LARGE))
    item = reader.receive()
    ways = settlings(item) | {"the end of its block": lambda: item.__exit__(None, None, None)}
    begun: list[int] = []
    with ThreadPoolExecutor(1) as aside:

        def settle() -> None:
            begun.append(threading.get_native_id())
            ways[second]()

        def meanwhile(event: Event) -> None:
            if event.name == "rename":
                later.append(aside.submit(settle))
                until(lambda: begun)
                until_asleep(os.getpid(), begun[0])

        later: list[Future[None]] = []
        with Injector(meanwhile):
            item.ack()
        assert isinstance(later[0].exception(), AlreadySettled if second in settlings(item) else type(None))
    with pytest.raises(AlreadySettled, match="acknowledged before"):
        item.ack()


@pytest.mark.parametrize("look", ["array", "arrays", "meta"])
def test_what_was_never_looked_at_cannot_be_had_after_the_acknowledgement(pair: Pair, look: str) -> None:
    writer, reader = pair
    writer.put(np.zeros(LARGE))
    with reader.receive() as item:
        pass
    with pytest.raises(LeaseExpired):
        getattr(item, look)


@pytest.mark.parametrize("error", [RuntimeError("no luck"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_exception_requeues_the_item_and_goes_on(pair: Pair, spool: Path, error: BaseException) -> None:
    writer, reader = pair
    seq = writer.put(np.zeros(3))
    with pytest.raises(type(error)) as raised, reader.receive():
        raise error
    assert raised.value is error
    item = reader.receive(block=False)
    assert (item.seq, item.attempt) == (seq, 2)
    item.reject("to see its history")
    failed, _ = failed_show(spool, seq).history
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
    assert reader.empty()


@pytest.mark.parametrize("first", list(SETTLED))
def test_settling_twice_is_a_clear_error(pair: Pair, first: str) -> None:
    writer, reader = pair
    writer.put(np.zeros(3))
    item = reader.receive()
    done = settlings(item)
    done[first]()
    for again in done.values():
        with pytest.raises(AlreadySettled, match=SETTLED[first]):
            again()


def test_error_of_the_block_is_not_hidden_by_a_reader_closed_in_it(pair: Pair) -> None:
    writer, reader = pair
    writer.put(np.zeros(3))

    def work() -> None:
        with reader.receive():
            reader.close()
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        work()


def test_loop_has_each_item_in_flight_until_the_next_or_the_break(pair: Pair) -> None:
    writer, reader = pair
    writer.put_many(np.full(3, number) for number in range(20))
    writer.shutdown()
    found: list[Item] = []
    for item in reader.items():
        assert item.attempt == 1
        break
    for item in reader.items():
        assert [before.settled for before in found] == [True] * len(found)
        assert not item.settled
        assert item.array[0] == len(found)
        found.append(item)
    assert [item.attempt for item in found] == [2] + [1] * 19


def test_settling_by_hand_in_the_loop_is_left_alone(pair: Pair) -> None:
    writer, reader = pair
    writer.put_many(np.full(3, number) for number in range(4))
    writer.shutdown()
    seen = []
    for item in reader.items():
        seen.append((int(item.array[0]), item.attempt))
        if seen[-1] == (1, 1):
            item.nack()
        if item.array[0] == 2:
            item.reject("two")
    assert seen == [(0, 1), (1, 1), (1, 2), (2, 1), (3, 1)]


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
            for number in range(1, 1001):
                assert writer.put(np.full(LARGE, number), meta={"seq": number}) == number
            writer.shutdown()
            assert looking.result(30)
        assert peer.answer() == 1000


@pytest.mark.usefixtures("look_often")
def test_crashed_reader_does_not_keep_the_others_waiting_for_the_end(pair: Pair, spool: Path) -> None:
    writer, reader = pair
    writer.put(np.full(3, 5))
    with Peer(spool) as peer:
        peer.run("item = SpoolReader(path).receive()")
        writer.shutdown()
        peer.kill()
        assert [(int(item.array[0]), item.attempt) for item in reader.items()] == [(5, 2)]


def test_get_beside_an_item_of_ones_own_ends_whenever_in_it_the_spool_is_shut_down(tmp_path: Path) -> None:
    def met(path: Path, number: int, timeout: float) -> list[str]:
        """The calls of a get before whose call of that number the spool is shut down; 0 for never."""
        with SpoolWriter(path) as writer, SpoolReader(path) as reader:
            writer.put(np.zeros(3))
            item = reader.receive()

            def shut_down(event: Event) -> None:
                if event.number == number:
                    writer.shutdown()

            with Injector(shut_down) as calls, pytest.raises(ShutDown if number else Empty):
                reader.get(timeout=timeout)
            item.ack()
        return calls.met

    polls = [number for number, name in enumerate(met(tmp_path / "0", 0, 0.05), 1) if name == "poll"]
    for number in range(1, polls[1] + 1):  # until it sleeps; the first sees whether its watch hears
        later = met(tmp_path / f"{number}", number, 5.0)[number:]
        assert later.count("poll") <= 2, f"it slept on, shut down before call {number}"


def test_an_item_keeps_its_id_through_redelivery_and_retry(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put_many([np.zeros(3), np.zeros(3)])
        first, second = reader.receive(), reader.receive()
        first.array  # noqa: B018 - the id is told by the arrays' message as well
        ids = [first.id, second.id]
        assert len({*ids}) == 2
        assert all(len(bytes.fromhex(said)) == 16 for said in ids)
        first.nack()
        with reader.receive() as again:
            assert again.id == ids[0]
        second.reject("to be retried")
        failed_retry(spool)
        with reader.receive() as retried:
            assert (retried.id, retried.seq) == (ids[1], 3)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("size", [3, LARGE])
def test_an_item_taken_knows_what_one_received_knows_and_is_settled(
    spool: Path, size: int, verify: bool
) -> None:
    with SpoolWriter(spool, checksum=True) as writer, SpoolReader(spool, verify=verify) as reader:
        writer.put(np.full(size, 7.0), meta={"camera": 3})
        writer.put({"a": np.zeros(size), "b": np.ones(3)})
        with reader.receive() as received:
            known = [received.seq, received.nbytes, received.put_time, received.id, received.meta]
            received.nack()
        with reader.take() as item:
            assert [item.seq, item.nbytes, item.put_time, item.id, item.meta] == known
            assert (item.attempt, item.settled, (item.array == 7).all()) == (2, True, True)
            assert item.array is item.arrays[""]
            with pytest.raises(AlreadySettled, match=r"item 1 was acknowledged before"):
                item.nack()
        named = reader.take(block=False)
        assert (named.seq, named.meta, sorted(named.arrays)) == (2, None, ["a", "b"])
        with pytest.raises(Empty):
            reader.take(timeout=0.01)
        writer.shutdown()
        with pytest.raises(ShutDown):
            reader.take()


def test_what_is_in_flight_or_lent_cannot_be_pickled_and_says_what_to_do(pair: Pair) -> None:
    writer, reader = pair
    writer.put(np.arange(3))
    item, loan = reader.receive(), writer.loan(3)
    for mine in (item, loan):
        with pytest.raises(UnsupportedOperation, match=f"{type(mine).__name__}.* pass on its array"):
            pickle.dumps(mine)
    item.ack()
    loan.discard()


def test_an_item_dropped_in_a_cycle_is_redelivered_as_the_collector_finds_it(pair: Pair) -> None:
    writer, reader = pair
    writer.put(np.zeros(LARGE))
    item: Any = reader.receive()
    item.cycle, array = item, item.array
    del item
    assert reader.empty()
    gc.collect()
    with pytest.warns(ResourceWarning):
        assert reader.qsize() == 1
    reader.receive().ack()
    writer.put_many([np.ones(LARGE)] * 9)
    assert (array == 0).all()


@pytest.mark.usefixtures("look_often")
def test_an_item_dropped_while_its_reader_waits_is_redelivered_by_its_next_look(pair: Pair) -> None:
    writer, reader = pair
    writer.put(np.zeros(3))
    held = [reader.receive()]
    with warnings.catch_warnings(), ThreadPoolExecutor(1) as aside:
        warnings.simplefilter("ignore")
        waiting = aside.submit(reader.receive)
        held.clear()
        with waiting.result(20) as item:
            assert item.attempt == 2


def test_an_item_whose_lease_ended_is_dropped_without_a_word(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool, lease=1e-6) as reader, SpoolReader(spool) as other:
        writer.put(np.zeros(3))
        reader.receive()
        with other.receive() as item:
            assert item.attempt == 2
        assert reader.empty()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_item_dropped_in_a_forked_child_is_the_parents_still(pair: Pair) -> None:
    writer, reader = pair
    writer.put(np.zeros(3))
    held = [reader.receive()]

    def work() -> None:
        held.clear()
        gc.collect()
        assert reader.empty()
        writer.put(np.ones(3))
        assert (reader.get() == 1).all()

    assert forked(work) == 0
    held[0].ack()
