"""What any engine keeps: subclass `EngineContract`, say how a sink and a source are opened, and the tests are yours.

The tests know nothing of files. Times are kept short, and nothing is slept for: what ends by the clock is
awaited with `wait_items` and `wait_space`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np
import pytest

from spoolipc import Empty, Full, LeaseExpired, ShutDown, TooLarge, UnsupportedArray
from spoolipc.engine import Delivery, Payload, Sink, Source
from spoolipc.layout import Limits

LARGE = 40_000
SPAWN: Any = multiprocessing.get_context("spawn")
DTYPES: list[Any] = ["?", "i1", "<f8", ">c16", "S5", "<U3", "M8[ns]", "V7", [("a", "i1"), ("b", ">f8", (2,))]]


def payload(number: float, size: int = 10, meta: Any = None) -> Payload:
    """An item of `size` float64, all of them `number`."""
    return Payload((np.full(size, float(number)),), None, meta)


def number_of(item: Payload) -> float:
    """What `payload` was called with, the array being whole."""
    (array,) = item.arrays
    assert (array == array[0]).all()
    return float(array[0])


def soon() -> float:
    """A deadline that is far enough for anything that should happen."""
    return time.monotonic() + 20


class EngineContract:
    """The promises of `spoolipc.engine`. Its subclasses are made without arguments, also in spawned processes."""

    def sink(self, place: str, limits: Limits | None = None, *, reopen: bool = False) -> Sink[Any]:
        """Open a writer's side at `place`, which does not exist at first."""
        raise NotImplementedError

    def source(self, place: str, limits: Limits | None = None) -> Source:
        """Open a reader's side."""
        raise NotImplementedError

    def dead_letters(self, place: str) -> list[int]:
        """The sequence numbers of the items given up, in order."""
        raise NotImplementedError

    @pytest.fixture
    def place(self, tmp_path: Any) -> str:
        """A place of its own for each test; an engine that keeps its items elsewhere overrides it."""
        return str(tmp_path / "place")

    @pytest.fixture
    def one(self, place: str) -> Iterator[Sink[Any]]:
        sink = self.sink(place)
        yield sink
        sink.close()

    @pytest.fixture
    def reader(self, place: str) -> Iterator[Source]:
        source = self.source(place)
        yield source
        source.close()

    @pytest.fixture(params=["here", "in another process"])
    def other(self, place: str, request: pytest.FixtureRequest) -> Iterator[Source]:
        """A second reader, beside `reader`: in this process, and in one of its own."""
        there = request.param != "here"
        source: Source = cast(Source, Remote(*self.start(serve, place))) if there else self.source(place)
        source.qsize()  # it is there now
        yield source
        source.close()

    # Putting and getting

    def test_items_come_out_as_they_went_in_and_in_order(self, one: Sink[Any], reader: Source) -> None:
        for size in (1, LARGE):
            for number in range(20):
                put(one, payload(number, size, {"number": number}))
            for number in range(20):
                (item,) = reader.get(1)
                assert number_of(item) == number
                assert item.names is None
                assert item.meta == {"number": number}

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_arrays_keep_dtype_shape_and_order(
        self, one: Sink[Any], reader: Source, dtype: Any, order: Any
    ) -> None:
        for shape in ((), (0,), (3, 4), (60, 70, 2)):
            array = (
                np.ones(shape, "u1").astype(dtype, order)
                if dtype != DTYPES[-1]
                else np.ones(shape, dtype, order)
            )
            put(one, Payload((array,), None, None))
            (found,) = reader.get(1)[0].arrays
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.flags.f_contiguous == array.flags.f_contiguous
            assert found.flags.c_contiguous == array.flags.c_contiguous
            assert (found == array).all()
            assert not found.flags.writeable

    def test_named_arrays_keep_their_names_and_order(self, one: Sink[Any], reader: Source) -> None:
        for size in (1, LARGE):
            put(one, Payload((np.zeros(size), np.ones(3, "i2")), ("b", "größe"), [1, None]))
            (item,) = reader.get(1)
            assert item.names == ("b", "größe")
            assert [array.dtype.str for array in item.arrays] == ["<f8", "<i2"]
            assert item.meta == [1, None]

    def test_several_items_are_got_at_once_as_far_as_there_are(self, one: Sink[Any], reader: Source) -> None:
        for number in range(5):
            put(one, payload(number))
        assert list(map(number_of, reader.get(3))) == [0, 1, 2]
        assert list(map(number_of, reader.get(9))) == [3, 4]
        with pytest.raises(Empty):
            reader.get(1)

    def test_either_side_may_come_first(self, place: str) -> None:
        source = self.source(place)
        with pytest.raises(Empty):
            source.get(1)
        sink = self.sink(place)
        put(sink, payload(1))
        sink.close()
        assert number_of(source.get(1)[0]) == 1
        source.close()

    def test_items_outlive_all_parties(self, place: str) -> None:
        sink = self.sink(place)
        seqs = [put(sink, payload(number)) for number in range(3)]
        sink.close()
        source = self.source(place)
        assert [delivery.seq for delivery in source.claim(3, None)] == seqs
        source.close()

    def test_qsize_counts_what_waits(self, one: Sink[Any], reader: Source) -> None:
        for number in range(3):
            put(one, payload(number))
        assert (one.qsize(), reader.qsize()) == (3, 3)
        reader.get(1)
        (delivery,) = reader.claim(1, None)
        assert (one.qsize(), reader.qsize()) == (1, 1)
        reader.nack(delivery, 0, "")
        assert one.qsize() == 2

    def test_arrays_outlive_their_source_and_later_traffic(self, place: str, one: Sink[Any]) -> None:
        source = self.source(place)
        for number in range(5):
            put(one, payload(number, LARGE))
        items = source.get(5)
        source.close()
        source = self.source(place)
        for _ in range(30):
            put(one, payload(-1, LARGE))
            source.get(1)
        source.close()
        assert list(map(number_of, items)) == [0, 1, 2, 3, 4]

    # Drafts

    def test_draft_is_seen_by_nobody_until_it_is_committed(self, one: Sink[Any], reader: Source) -> None:
        for size in (1, LARGE):
            draft = one.prepare(payload(1, size))
            assert reader.qsize() == 0
            with pytest.raises(Empty):
                reader.get(1)
            one.commit([draft])
            assert number_of(reader.get(1)[0]) == 1

    def test_order_is_that_of_commit(self, one: Sink[Any], reader: Source) -> None:
        first, second = one.prepare(payload(1)), one.prepare(payload(2))
        assert one.commit([second]) < one.commit([first])
        assert list(map(number_of, reader.get(2))) == [2, 1]

    def test_drafts_committed_together_lie_one_after_the_other(self, one: Sink[Any], reader: Source) -> None:
        payloads = [payload(number, size) for number, size in enumerate((1, LARGE, 7, LARGE))]
        for _ in range(3):
            one.stock(payloads)
            seqs = one.commit([one.prepare(each) for each in payloads])
            assert seqs == list(range(seqs[0], seqs[0] + 4))
            assert list(map(number_of, reader.get(4))) == [0, 1, 2, 3]

    def test_drafts_are_committed_as_far_as_there_is_room(self, place: str) -> None:
        sink, source = self.sink(place, Limits(maxsize=2)), self.source(place)
        drafts = [sink.prepare(payload(number)) for number in range(3)]
        assert len(sink.commit(drafts)) == 2
        with pytest.raises(Full):
            sink.commit(drafts[2:])
        source.get(1)
        assert len(sink.commit(drafts[2:])) == 1
        assert list(map(number_of, source.get(3))) == [1, 2]
        sink.close()
        source.close()

    def test_discarded_draft_is_never_seen(self, one: Sink[Any], reader: Source) -> None:
        for size in (1, LARGE, LARGE):
            one.discard(one.prepare(payload(1, size)))
            put(one, payload(2, size))
            assert number_of(reader.get(1)[0]) == 2
        assert reader.qsize() == 0

    def test_draft_of_a_closed_sink_is_never_seen(self, place: str, reader: Source) -> None:
        sink = self.sink(place)
        draft = sink.prepare(payload(1, LARGE))
        sink.close()
        with pytest.raises(ValueError, match="closed"):
            sink.commit([draft])
        sink.discard(draft)
        assert reader.qsize() == 0

    def test_lent_array_is_filled_in_place(self, one: Sink[Any], reader: Source) -> None:
        for size in (1, LARGE, LARGE, LARGE):
            draft, array = one.lend(np.empty((size, 2), ">i4", "F"), {"lent": size})
            assert (array.shape, array.dtype.str, array.flags.f_contiguous) == ((size, 2), ">i4", True)
            array[:] = size
            assert reader.qsize() == 0
            one.finish(draft)
            one.commit([draft])
            (item,) = reader.get(1)
            assert item.meta == {"lent": size}
            assert (item.arrays[0] == size).all()
            assert item.arrays[0].flags.f_contiguous

    def test_lent_array_that_is_discarded_is_never_seen(self, one: Sink[Any], reader: Source) -> None:
        draft, array = one.lend(np.empty(LARGE), None)
        array[:] = 1
        one.discard(draft)
        assert reader.qsize() == 0

    # Room

    def test_maxsize_counts_items_that_wait(self, place: str) -> None:
        sink, source = self.sink(place, Limits(maxsize=2)), self.source(place)
        put(sink, payload(0))
        assert sink.admit(payload(1))
        assert not sink.full()
        put(sink, payload(1, LARGE))
        assert sink.full()
        assert not sink.admit(payload(2))
        assert not sink.wait_space(payload(2), time.monotonic() + 0.02)
        (delivery,) = source.claim(1, None)
        assert not sink.full()
        put(sink, payload(2))
        source.ack([delivery])
        assert sink.full()
        sink.close()
        source.close()

    def test_max_bytes_counts_items_in_hand_too(self, place: str) -> None:
        sink, source = self.sink(place, Limits(max_bytes=1_000_000)), self.source(place)
        put(sink, payload(0, 100_000))
        assert not sink.admit(payload(1, 100_000))
        (delivery,) = source.claim(1, None)
        assert not sink.admit(payload(1, 100_000))
        assert sink.admit(payload(1, 10))
        source.ack([delivery])
        assert sink.admit(payload(1, 100_000))
        sink.close()
        source.close()

    def test_what_could_never_fit_is_refused(self, place: str) -> None:
        sink = self.sink(place, Limits(max_bytes=1_000_000))
        with pytest.raises(TooLarge, match="1000000"):
            sink.admit(payload(0, 200_000))
        sink.close()

    def test_object_arrays_are_refused(self, one: Sink[Any], reader: Source) -> None:
        with pytest.raises(UnsupportedArray):
            put(one, Payload((np.array([None, {}]),), None, None))
        assert reader.qsize() == 0

    def test_wait_for_space_ends_when_an_item_is_taken(self, place: str) -> None:
        sink, source = self.sink(place, Limits(maxsize=1)), self.source(place)
        put(sink, payload(0))
        with ThreadPoolExecutor(1) as aside:
            waiting = aside.submit(sink.wait_space, payload(1), soon())
            source.get(1)
            assert waiting.result(20)
        sink.close()
        source.close()

    # Waiting

    def test_wait_for_items_ends_with_its_deadline(self, reader: Source) -> None:
        began = time.monotonic()
        assert not reader.wait_items(began + 0.05)
        assert not reader.wait_items(began - 1)
        assert 0.05 <= time.monotonic() - began < 1

    def test_wait_for_items_ends_when_there_is_one(self, one: Sink[Any], reader: Source) -> None:
        with ThreadPoolExecutor(1) as aside:
            waiting = aside.submit(reader.wait_items, soon())
            put(one, payload(0))
            assert waiting.result(20)
        assert reader.wait_items(time.monotonic())

    # In hand

    def test_item_in_hand_is_no_one_elses_until_it_is_settled(
        self, one: Sink[Any], reader: Source, other: Source
    ) -> None:
        seqs = [put(one, payload(number, LARGE)) for number in range(2)]
        (delivery,) = reader.claim(1, None)
        assert (delivery.seq, delivery.attempt) == (seqs[0], 1)
        assert abs(delivery.put_time / 1e9 - time.time()) < 3600
        assert delivery.size >= LARGE * 8
        (second,) = other.claim(5, None)
        assert second.seq == seqs[1]
        with pytest.raises(Empty):
            other.claim(1, None)
        assert number_of(reader.load(delivery)) == 0
        reader.ack([delivery])
        other.ack([second])
        with pytest.raises(Empty):
            other.get(1)

    def test_several_items_are_acknowledged_at_once(self, one: Sink[Any], reader: Source) -> None:
        for number in range(6):
            put(one, payload(number, LARGE if number % 2 else 1))
        deliveries = reader.claim(4, None)
        assert [number_of(reader.load(delivery)) for delivery in deliveries] == [0, 1, 2, 3]
        reader.ack(deliveries)
        assert list(map(number_of, reader.get(9))) == [4, 5]

    def test_item_may_be_loaded_again(self, one: Sink[Any], reader: Source) -> None:
        put(one, payload(7, LARGE, "meta"))
        (delivery,) = reader.claim(1, None)
        views = [reader.load(delivery) for _ in range(3)]
        reader.ack([delivery])
        for _ in range(10):
            put(one, payload(8, LARGE))
            reader.get(1)
        assert list(map(number_of, views)) == [7, 7, 7]
        assert views[0].meta == "meta"

    def test_item_given_back_comes_next_with_one_attempt_more(
        self, one: Sink[Any], reader: Source, other: Source
    ) -> None:
        for number in range(3):
            put(one, payload(number))
        (delivery,) = reader.claim(1, None)
        reader.nack(delivery, 0, "not now")
        (again,) = other.claim(1, None)
        assert (again.seq, again.attempt) == (delivery.seq, 2)
        assert number_of(other.load(again)) == 0
        other.nack(again, 0, "not now either")
        assert list(map(number_of, reader.get(3))) == [0, 1, 2]

    def test_items_given_back_keep_their_order(self, one: Sink[Any], reader: Source) -> None:
        for number in range(5):
            put(one, payload(number))
        for delivery in reader.claim(3, None):
            reader.nack(delivery, 0, "")
        assert list(map(number_of, reader.get(5))) == [0, 1, 2, 3, 4]

    def test_item_given_back_with_a_delay_comes_after_it(self, one: Sink[Any], reader: Source) -> None:
        put(one, payload(0))
        (delivery,) = reader.claim(1, None)
        began = time.monotonic()
        reader.nack(delivery, 0.2, "later")
        assert reader.qsize() == 1
        with pytest.raises(Empty):
            reader.claim(1, None)
        put(one, payload(1))
        assert number_of(reader.get(1)[0]) == 1
        (again,) = claimed(reader)
        assert 0.2 <= time.monotonic() - began < 1.0
        assert again.attempt == 2

    def test_what_a_closed_source_had_in_hand_is_delivered_again(self, place: str, one: Sink[Any]) -> None:
        put(one, payload(0, LARGE))
        put(one, payload(1))
        source = self.source(place)
        (delivery,) = source.claim(1, None)
        view = source.load(delivery)
        source.close()
        source = self.source(place)
        assert list(map(number_of, source.get(2))) == [0, 1]
        assert number_of(view) == 0
        source.close()

    def test_settled_item_cannot_be_settled_again(self, one: Sink[Any], reader: Source) -> None:
        settlings: list[Callable[[Delivery], None]] = [
            lambda delivery: reader.ack([delivery]),
            lambda delivery: reader.nack(delivery, 0, ""),
            lambda delivery: reader.reject(delivery, ""),
        ]
        for settle in settlings:
            put(one, payload(0))
            (delivery,) = reader.claim(1, None)
            settle(delivery)
            for again in settlings:
                with pytest.raises(LeaseExpired):
                    again(delivery)
            with pytest.raises(LeaseExpired):
                reader.extend(delivery, 10)
            with suppress(Empty):
                reader.get(1)
        assert reader.qsize() == 0

    def test_contents_are_told_without_the_arrays(self, one: Sink[Any], reader: Source) -> None:
        put(one, Payload((np.zeros(LARGE), np.zeros(3)), ("a", "b"), {"x": 1}))
        peeked = reader.peek()
        (delivery,) = reader.claim(1, None)
        for each in (peeked, delivery):
            contents = reader.contents(each)
            assert (contents.names, contents.meta) == (("a", "b"), {"x": 1})
        reader.ack([delivery])
        for each in (peeked, delivery):
            with pytest.raises(LeaseExpired):
                reader.contents(each)

    def test_peek_leaves_the_item(self, one: Sink[Any], reader: Source) -> None:
        with pytest.raises(Empty):
            reader.peek()
        seq = put(one, payload(0))
        put(one, payload(1))
        assert [reader.peek().seq for _ in range(3)] == [seq] * 3
        assert reader.qsize() == 2
        assert reader.claim(1, None)[0].attempt == 1

    # Leases

    def test_item_whose_lease_ended_is_delivered_to_another(
        self, one: Sink[Any], reader: Source, other: Source
    ) -> None:
        put(one, payload(0, LARGE))
        began = time.monotonic()
        (delivery,) = reader.claim(1, 0.2)
        view = reader.load(delivery)
        with pytest.raises(Empty):
            other.claim(1, None)
        (again,) = claimed(other)
        assert 0.2 <= time.monotonic() - began < 1.0
        assert (again.seq, again.attempt) == (delivery.seq, 2)
        with pytest.raises(LeaseExpired):
            reader.ack([delivery])
        with pytest.raises(LeaseExpired):
            reader.nack(delivery, 0, "")
        with pytest.raises(LeaseExpired):
            reader.reject(delivery, "")
        with pytest.raises(LeaseExpired):
            reader.extend(delivery, 10)
        assert number_of(other.load(again)) == 0
        other.ack([again])
        for _ in range(10):
            put(one, payload(1, LARGE))
            other.get(1)
        assert number_of(view) == 0

    def test_lease_that_ended_is_over_even_when_nobody_else_came(
        self, one: Sink[Any], reader: Source
    ) -> None:
        put(one, payload(0))
        (delivery,) = reader.claim(1, 1e-6)
        with pytest.raises(LeaseExpired):
            reader.ack([delivery])
        assert number_of(reader.get(1)[0]) == 0

    def test_lease_can_be_extended(self, one: Sink[Any], reader: Source, other: Source) -> None:
        put(one, payload(0))
        (delivery,) = reader.claim(1, 0.1)
        reader.extend(delivery, 30)
        assert not other.wait_items(time.monotonic() + 0.3)
        reader.ack([delivery])

    def test_lease_can_be_shortened(self, one: Sink[Any], reader: Source, other: Source) -> None:
        put(one, payload(0))
        (delivery,) = reader.claim(1, 30)
        reader.extend(delivery, 0.05)
        assert claimed(other)[0].attempt == 2

    def test_without_a_lease_an_item_stays_in_hand(
        self, one: Sink[Any], reader: Source, other: Source
    ) -> None:
        put(one, payload(0))
        (delivery,) = reader.claim(1, None)
        assert not other.wait_items(time.monotonic() + 1.3)  # longer than the look for the dead
        reader.ack([delivery])

    # Dead letters

    def test_rejected_item_is_a_dead_letter_at_once(self, place: str, one: Sink[Any], reader: Source) -> None:
        seq = put(one, payload(0, LARGE))
        put(one, payload(1))
        (delivery,) = reader.claim(1, None)
        view = reader.load(delivery)
        reader.reject(delivery, "no good")
        assert self.dead_letters(place) == [seq]
        assert list(map(number_of, reader.get(5))) == [1]
        assert number_of(view) == 0

    def test_item_is_a_dead_letter_after_its_last_attempt(self, place: str) -> None:
        sink, source = self.sink(place, Limits(max_attempts=3)), self.source(place)
        seqs = [put(sink, payload(number)) for number in range(2)]
        for attempt in (1, 2, 3):
            assert self.dead_letters(place) == []
            (delivery,) = source.claim(1, None)
            assert (delivery.seq, delivery.attempt) == (seqs[0], attempt)
            source.nack(delivery, 0, "on purpose")
        assert self.dead_letters(place) == seqs[:1]
        assert list(map(number_of, source.get(5))) == [1]
        sink.close()
        source.close()

    def test_leases_that_end_count_as_attempts(self, place: str) -> None:
        sink, source = self.sink(place, Limits(max_attempts=2)), self.source(place)
        seq = put(sink, payload(0))
        assert source.claim(1, 0.02)[0].attempt == 1
        assert claimed(source, 0.02)[0].attempt == 2
        deadline = soon()
        while self.dead_letters(place) != [seq]:
            assert not source.wait_items(time.monotonic() + 0.02)
            assert time.monotonic() < deadline
        sink.close()
        source.close()

    def test_without_a_limit_an_item_may_be_given_back_for_ever(self, place: str) -> None:
        sink, source = self.sink(place, Limits(max_attempts=0)), self.source(place)
        put(sink, payload(0))
        for attempt in range(1, 20):
            (delivery,) = source.claim(1, None)
            assert delivery.attempt == attempt
            source.nack(delivery, 0, "")
        assert number_of(source.get(1)[0]) == 0
        sink.close()
        source.close()

    # The end

    def test_shutdown_lets_what_waits_be_got(self, one: Sink[Any], reader: Source) -> None:
        draft = one.prepare(payload(2))
        for number in range(2):
            put(one, payload(number))
        one.shutdown(False)
        with pytest.raises(ShutDown):
            one.admit(payload(3))
        with pytest.raises(ShutDown):
            one.commit([draft])
        one.discard(draft)
        assert list(map(number_of, reader.get(9))) == [0, 1]
        with pytest.raises(ShutDown):
            reader.get(1)
        with pytest.raises(ShutDown):
            reader.claim(1, None)
        assert reader.wait_items(soon())
        assert one.wait_space(payload(3), soon())

    def test_immediate_shutdown_removes_what_waits(self, one: Sink[Any], reader: Source) -> None:
        for number in range(3):
            put(one, payload(number))
        one.shutdown(True)
        assert reader.qsize() == 0
        with pytest.raises(ShutDown):
            reader.get(1)

    def test_item_in_hand_at_an_immediate_shutdown_can_be_acknowledged(
        self, one: Sink[Any], reader: Source
    ) -> None:
        put(one, payload(0, LARGE))
        put(one, payload(1))
        (delivery,) = reader.claim(1, None)
        one.shutdown(True)
        assert number_of(reader.load(delivery)) == 0
        reader.ack([delivery])
        with pytest.raises(ShutDown):
            reader.claim(1, None)

    def test_end_waits_for_what_others_have_in_hand(
        self, one: Sink[Any], reader: Source, other: Source
    ) -> None:
        put(one, payload(0))
        (delivery,) = reader.claim(1, None)
        one.shutdown(False)
        with pytest.raises(Empty):
            other.claim(1, None)
        with ThreadPoolExecutor(1) as aside:
            waiting = aside.submit(claimed, other)
            reader.nack(delivery, 0, "")
            (again,) = waiting.result(20)
        other.ack([again])
        for source in (reader, other):
            with pytest.raises(ShutDown):
                source.claim(1, None)

    def test_end_does_not_wait_for_what_the_asking_source_has_in_hand(
        self, one: Sink[Any], reader: Source
    ) -> None:
        put(one, payload(0))
        (delivery,) = reader.claim(1, None)
        one.shutdown(False)
        with pytest.raises(ShutDown):
            reader.claim(1, None)
        reader.nack(delivery, 0, "")
        assert number_of(reader.get(1)[0]) == 0

    def test_reopening_takes_puts_again(self, place: str, one: Sink[Any], reader: Source) -> None:
        put(one, payload(0))
        one.shutdown(False)
        again = self.sink(place, reopen=True)
        put(again, payload(1))
        put(one, payload(2))
        assert list(map(number_of, reader.get(9))) == [0, 1, 2]
        with pytest.raises(Empty):
            reader.get(1)
        again.close()

    def test_closed_side_says_so(self, place: str) -> None:
        sink, source = self.sink(place), self.source(place)
        for _ in range(2):
            sink.close()
            source.close()
        with pytest.raises(ValueError, match="closed"):
            sink.admit(payload(0))
        with pytest.raises(ValueError, match="closed"):
            source.get(1)

    # Many at once

    def test_threads_share_a_sink_and_a_source(self, one: Sink[Any], reader: Source) -> None:
        acknowledged: list[float] = []
        failures: list[BaseException] = []

        def putting(me: int) -> None:
            for number in range(50):
                put(one, payload(me * 50 + number, LARGE // 8 if number % 3 else 5))

        def getting() -> None:
            try:
                turn = 0
                while True:
                    for delivery in claimed(reader, most=3):
                        turn += 1
                        number = number_of(reader.load(delivery))
                        if turn % 7 == 0 and delivery.attempt == 1:
                            reader.nack(delivery, 0, "on purpose")
                        else:
                            reader.ack([delivery])
                            acknowledged.append(number)
            except ShutDown:
                pass
            except BaseException as error:
                failures.append(error)

        getters = [threading.Thread(target=getting) for _ in range(4)]
        putters = [threading.Thread(target=putting, args=(me,)) for me in range(4)]
        for thread in getters + putters:
            thread.start()
        for thread in putters:
            thread.join(50)
        while one.qsize() or len(acknowledged) < 200:
            assert not failures
            one.wait_space(payload(0), soon())
        one.shutdown(False)
        for thread in getters:
            thread.join(50)
        assert failures == []
        assert sorted(acknowledged) == list(range(200))

    def test_processes_settle_each_item_once(self, place: str, one: Sink[Any]) -> None:
        """Three readers, one of which is killed in the middle; what it had in hand goes to the others."""
        count = 300
        put(one, payload(0, LARGE))
        victim, pipe = self.start(consume, place, True)
        assert pipe.poll(30)
        assert pipe.recv() == [0]
        crew = [self.start(consume, place, False) for _ in range(2)]
        for number in range(1, count):
            put(one, payload(number, LARGE // 8 if number % 3 else 5))
        os.kill(victim.pid, signal.SIGKILL)
        victim.join(30)
        one.shutdown(False)
        settled: list[tuple[float, int]] = []
        for process, pipe in crew:
            assert pipe.poll(30)
            settled += pipe.recv()
            process.join(30)
            assert process.exitcode == 0
        assert sorted(number for number, _ in settled) == list(range(count))
        assert [number for number, attempt in settled if attempt == 2] == [0]

    def test_item_that_kills_every_reader_becomes_a_dead_letter(self, place: str) -> None:
        sink = self.sink(place, Limits(max_attempts=2))
        seq = put(sink, payload(0))
        put(sink, payload(1))
        for _ in range(2):
            process, pipe = self.start(consume, place, True)
            assert pipe.poll(30)
            assert pipe.recv() == [0]
            process.kill()
            process.join(30)
        source = self.source(place)
        assert list(map(number_of, source.get(5))) == [1]
        assert self.dead_letters(place) == [seq]
        sink.close()
        source.close()

    def start(self, work: Callable[..., None], place: str, *args: Any) -> tuple[Any, Connection]:
        """Run `work(contract, place, *args, pipe)` in a spawned process."""
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=work, args=(type(self), place, *args, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def put(sink: Sink[Any], item: Payload) -> int:
    """Put an item, waiting for room."""
    while not sink.admit(item):
        assert sink.wait_space(item, soon())
    draft = sink.prepare(item)
    while True:
        with suppress(Full):
            return sink.commit([draft])[0]
        assert sink.wait_space(item, soon())


def claimed(source: Source, lease: float | None = None, most: int = 1) -> Sequence[Delivery]:
    """Claim items, waiting for the first."""
    while True:
        with suppress(Empty):
            return source.claim(most, lease)
        assert source.wait_items(soon())


class Remote:
    """A source in another process: what is asked of it is done there, by `serve`."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self._process, self._pipe = process, pipe

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*args: Any, **more: Any) -> Any:
            self._pipe.send((name, args, more))
            assert self._pipe.poll(30), f"{name} did not return in the other process"
            done, value = self._pipe.recv()
            if not done:
                raise value
            if name == "close":
                self._process.join(30)
            return value

        return ask


def serve(contract: type[EngineContract], place: str, pipe: Connection) -> None:
    """Make the calls of a `Remote`. Deliveries stay here; a number stands for each over there."""
    source = contract().source(place)
    held: list[Delivery] = []

    def ours(argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return [ours(each) for each in argument]
        return held[argument.handle] if isinstance(argument, Delivery) else argument

    def theirs(value: Any) -> Any:
        if isinstance(value, list):
            return [theirs(each) for each in value]
        if not isinstance(value, Delivery):
            return value
        held.append(value)
        return replace(value, handle=len(held) - 1)

    name = ""
    while name != "close":
        name, args, more = pipe.recv()
        try:
            pipe.send((True, theirs(getattr(source, name)(*map(ours, args), **more))))
        except Exception as error:
            pipe.send((False, error))


def consume(contract: type[EngineContract], place: str, holding: bool, pipe: Connection) -> None:
    """Settle items until the end and send them; or hold the first (`holding`), send it and hang."""
    source = contract().source(place)
    if holding:
        (delivery,) = claimed(source)
        pipe.send([number_of(source.load(delivery))])
        pipe.recv()
    settled = []
    try:
        while True:
            deliveries = claimed(source, most=4)
            settled += [(number_of(source.load(each)), each.attempt) for each in deliveries]
            source.ack(deliveries)
    except ShutDown:
        pipe.send(settled)
        source.close()
