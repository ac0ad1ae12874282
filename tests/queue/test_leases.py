"""What a crashed reader had in flight is redelivered at once, a hung reader's when its lease ends, never otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.peer import Peer

from spoolipc import Empty, Failure, Item, LeaseExpired, SpoolReader, SpoolWriter, failed_show, stat

LARGE = 5000
SHORT = 0.05
"""Seconds of a lease that is to end."""
CRASHED = "its reader crashed"
"""What the history says of a reader that crashed."""
Pair = tuple[SpoolWriter, SpoolReader]


@pytest.fixture
def pair(spool: Path) -> Iterator[Pair]:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        yield writer, reader


@pytest.fixture
def leasing(spool: Path) -> Iterator[SpoolReader]:
    with SpoolReader(spool, lease=SHORT) as reader:
        yield reader


def let_it_end() -> None:
    """Let the time of a short lease go by."""
    time.sleep(SHORT * 1.2)


def history(path: Path, item: Item) -> tuple[Failure, ...]:
    """Why the deliveries before this one failed. The item is rejected to find out."""
    item.reject("to see its history")
    return failed_show(path, item.seq).history[:-1]


def test_late_acknowledgement_at_the_end_of_the_block_raises_and_hides_no_error(
    pair: Pair, leasing: SpoolReader
) -> None:
    writer, reader = pair

    def work(error: Exception | None) -> None:
        with leasing.receive(timeout=20):
            let_it_end()
            if error:
                raise error

    writer.put(np.zeros(3))
    with pytest.raises(LeaseExpired):
        work(None)
    with pytest.raises(RuntimeError, match="mine"):
        work(RuntimeError("mine"))
    assert reader.receive(block=False).attempt == 3


@pytest.mark.usefixtures("look_often")
@pytest.mark.parametrize("lease", [0.3, None])
def test_hung_reader_loses_its_item_when_the_lease_ends_and_learns_it_when_it_goes_on(
    pair: Pair, spool: Path, lease: float | None
) -> None:
    writer, reader = pair
    writer.put(np.zeros(LARGE))
    with Peer(spool) as peer:
        peer.run(f"item = SpoolReader(path, lease={lease}).receive()")
        peer.stop()
        if lease:
            with reader.receive(timeout=20) as item:
                assert item.attempt == 2
            peer.go()
            peer.run("try: item.ack()\nexcept LeaseExpired as error: said = str(error)")
            assert "lease ended" in peer.ask("said")
        else:
            with pytest.raises(Empty):
                reader.receive(timeout=0.2)  # crashed sessions were looked for
            peer.go()
            peer.run("item.ack()")


def test_shorter_delay_is_over_first_and_one_without_an_end_is_a_long_one(
    pair: Pair, spool: Path, spend: Callable[[float], None]
) -> None:
    writer, reader = pair
    for number in range(5):
        writer.put(np.full(3, number))
    items = [reader.receive() for _ in range(5)]
    for item, delay in zip(items, (500, 200, float("inf"), 400, 300), strict=True):
        item.nack(delay=delay)
    spend(100)
    for number in (1, 4, 3, 0):
        spend(100)
        assert int(reader.get(timeout=20)[0]) == number
    with pytest.raises(Empty):
        reader.receive(timeout=0.1)
    assert stat(spool).delayed == 1


def test_sleeping_reader_gets_the_item_of_a_crashed_one_within_a_second_or_so(
    pair: Pair, spool: Path
) -> None:
    writer, reader = pair
    seq = writer.put(np.zeros(LARGE), meta="mine")
    with Peer(spool) as peer, ThreadPoolExecutor(1) as aside:
        peer.run("item = SpoolReader(path).receive()")
        future = aside.submit(reader.receive, timeout=20)
        peer.kill()
        item = future.result(5)
    assert (item.seq, item.attempt, item.meta) == (seq, 2, "mine")
    (failure,) = history(spool, item)
    assert (failure.attempt, failure.who, failure.why) == (1, f"process {peer.pid}", CRASHED)


def test_who_opens_next_finds_what_a_crashed_reader_had_first_in_the_old_order_and_others_keep_theirs(
    pair: Pair, spool: Path
) -> None:
    writer, reader = pair
    for number in range(7):
        writer.put(np.full(3, number))
    mine = reader.receive()
    with Peer(spool) as peer:
        peer.run("reader = SpoolReader(path); items = [reader.receive() for _ in range(3)]")
        peer.kill()
    with SpoolReader(spool) as opened:
        found = [opened.receive(block=False) for _ in range(5)]
        assert [(int(item.array[0]), item.attempt) for item in found] == [
            (1, 2),
            (2, 2),
            (3, 2),
            (4, 1),
            (5, 1),
        ]
        assert opened.get(block=False)[0] == 6
    mine.ack()


def test_attempts_are_remembered_when_the_index_is_lost(pair: Pair, spool: Path) -> None:
    writer, reader = pair
    for number in range(2):
        writer.put(np.full(3, number))
    for _ in range(3):
        item = reader.receive()
        assert item.array[0] == 0
        item.nack(reason="not now")
    (spool / "index").unlink()
    item = reader.receive(block=False)
    assert (item.array[0], item.attempt) == (0, 4)
    other = reader.receive(block=False)
    assert other.attempt == 1
    assert [failure.attempt for failure in history(spool, item)] == [1, 2, 3]
