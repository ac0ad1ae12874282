"""The order in which items are delivered: every row of the table in docs/delivery.md, in its order."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.arrays import drained
from support.peer import Peer

from spoolipc import Item, SpoolReader, SpoolWriter, failed_retry

DOCS = Path(__file__).parents[2] / "docs" / "delivery.md"
Spend = Callable[[float], None]


def put(writer: SpoolWriter, count: int) -> None:
    for number in range(count):
        writer.put(np.full(3, number))


def receive(reader: SpoolReader, count: int) -> list[Item]:
    return [reader.receive(block=False) for _ in range(count)]


def test_one_writer_s_items_come_in_the_order_of_its_puts(writer: SpoolWriter, reader: SpoolReader) -> None:
    put(writer, 200)
    assert drained(reader) == list(range(200))


def test_items_of_several_writers_come_in_the_order_of_their_numbers(
    spool: Path, writer: SpoolWriter, reader: SpoolReader
) -> None:
    def several(first: int) -> None:
        with SpoolWriter(spool) as own:
            for number in range(first, first + 100):
                own.put(np.full(3, number))

    with ThreadPoolExecutor(3) as aside:
        list(aside.map(several, (0, 1000, 2000)))
    items = receive(reader, 300)
    assert [item.seq for item in items] == list(range(1, 301))
    for first in (0, 1000, 2000):
        own = [int(item.array[0]) for item in items if first <= item.array[0] < first + 1000]
        assert own == list(range(first, first + 100))


def test_several_readers_take_turns_in_one_order(spool: Path, writer: SpoolWriter) -> None:
    put(writer, 300)
    writer.shutdown()
    taken: list[list[int]] = []

    def one() -> None:
        with SpoolReader(spool) as reader:
            taken.append([item.seq for item in reader.items()])

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(share == sorted(share) for share in taken)
    assert sorted(seq for share in taken for seq in share) == list(range(1, 301))


def test_items_of_one_put_many_lie_together(spool: Path, reader: SpoolReader) -> None:
    def several(first: int) -> None:
        with SpoolWriter(spool) as own:
            for batch in range(10):
                own.put_many([np.full(3, first + batch * 20 + number) for number in range(20)])

    with ThreadPoolExecutor(3) as aside:
        list(aside.map(several, (0, 1000, 2000)))
    numbers = drained(reader)
    assert all((np.diff(numbers[start : start + 20]) == 1).all() for start in range(0, 600, 20))


def test_loan_takes_its_place_when_its_block_ends(writer: SpoolWriter, reader: SpoolReader) -> None:
    with writer.loan(3, int) as array:
        array[:] = 2
        writer.put(np.full(3, 1))
    assert drained(reader) == [1, 2]


def test_item_given_back_comes_before_all_never_delivered(writer: SpoolWriter, reader: SpoolReader) -> None:
    put(writer, 4)
    first, second = receive(reader, 2)
    second.nack()
    assert drained(reader) == [1, 2, 3]
    first.nack()
    assert drained(reader) == [0]


def test_items_given_back_come_in_the_order_in_which_they_were(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    put(writer, 5)
    items = receive(reader, 4)
    for position in (2, 0, 3, 1):
        items[position].nack()
    assert drained(reader) == [2, 0, 3, 1, 4]


@pytest.mark.parametrize("how", ["dies", "leaves"])
def test_items_of_a_reader_that_ends_come_in_the_order_in_which_it_took_them(
    spool: Path, writer: SpoolWriter, reader: SpoolReader, spend: Spend, how: str
) -> None:
    put(writer, 6)
    with Peer(spool) as peer:
        peer.run("reader = SpoolReader(path); items = [reader.receive() for _ in range(3)]")
        if how == "dies":
            peer.kill()
            spend(1.1)
        else:
            peer.run("reader.close()")
    assert drained(reader) == [0, 1, 2, 3, 4, 5]


def test_item_whose_lease_ended_comes_before_all_never_delivered(
    spool: Path, writer: SpoolWriter, reader: SpoolReader, spend: Spend
) -> None:
    put(writer, 4)
    with SpoolReader(spool, lease=10) as other:
        receive(other, 2)
        spend(10.1)
        assert drained(reader) == [0, 1, 2, 3]


def test_others_pass_an_item_that_is_delayed(writer: SpoolWriter, reader: SpoolReader, spend: Spend) -> None:
    put(writer, 4)
    receive(reader, 1)[0].nack(delay=10)
    assert int(reader.get()[0]) == 1
    spend(10.1)
    assert drained(reader) == [0, 2, 3]


def test_of_two_delays_the_one_that_ends_first_is_first_unless_both_ended_unseen(
    writer: SpoolWriter, reader: SpoolReader, spend: Spend
) -> None:
    for seen in (True, False):
        put(writer, 3)
        first, second = receive(reader, 2)
        first.nack(delay=20)
        second.nack(delay=10)
        spend(10.1)
        early = [int(reader.get()[0])] if seen else []
        spend(10.1)
        assert early + drained(reader) == ([1, 0, 2] if seen else [0, 1, 2])


def test_dead_letter_retried_is_a_new_put(spool: Path, writer: SpoolWriter, reader: SpoolReader) -> None:
    put(writer, 3)
    receive(reader, 1)[0].reject("bad")
    failed_retry(spool)
    assert drained(reader) == [1, 2, 0]


def test_after_the_loss_of_the_index_all_come_in_the_order_of_their_numbers(
    spool: Path, writer: SpoolWriter, reader: SpoolReader
) -> None:
    put(writer, 6)
    items = receive(reader, 4)
    items[2].nack()
    items[0].nack()
    items[3].nack(delay=1e6)
    (spool / "index").unlink()
    assert drained(reader) == [0, 1, 2, 3, 4, 5]


def test_get_receive_and_get_many_share_one_order(writer: SpoolWriter, reader: SpoolReader) -> None:
    put(writer, 6)
    assert int(reader.get()[0]) == 0
    assert int(reader.peek().seq) == 2
    assert [int(array[0]) for array in reader.get_many(2)] == [1, 2]
    with reader.receive() as item:
        assert int(item.array[0]) == 3
    assert drained(reader) == [4, 5]


def test_every_row_of_the_table_is_a_test_here_and_every_test_a_row() -> None:
    named = re.findall(r"`(test_\w+)`", DOCS.read_text())
    here = [name for name in globals() if name.startswith("test_")][:-1]
    assert named == here
