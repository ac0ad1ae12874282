"""The suite that every engine passes.

It speaks only the protocols of `spoolipc.engine`. To run it for an engine, subclass `EngineSuite` in a test module, add
the suites of the capabilities that the engine has, and say how a spool is reached:

    class TestMyEngine(EngineSuite, LoanSuite, ProcessSuite):
        def engine(self, place: str) -> Engine:
            return MyEngine(place)

`SharedSuite` is a part of it: the tests with two readers, which `OtherProcess` runs with the second in a process of its
own. Nothing is skipped; a test fails when a suite was left out that the engine's capabilities ask for. Needs pytest.
"""

from __future__ import annotations

import multiprocessing
import select
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import cached_property
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, ClassVar, cast

import numpy as np
import pytest

from . import errors
from .engine import (
    Admin,
    Consumer,
    ConsumerOptions,
    Durability,
    Engine,
    Kind,
    Lender,
    Preallocator,
    Producer,
    ProducerOptions,
    Watchable,
)
from .errors import Empty, Full, LeaseExpired, LimitMismatch, ShutDown, TooLarge, UnsupportedArray
from .message import NOW, Ack, ArraySpec, Delivery, Extend, Limits, Message, Nack, Reject, Verdict

LARGE = 40_000
"""Float64 that are more than an engine would store apart from the large."""
DTYPES: list[Any] = ["?", "i1", "<f8", ">c16", "S5", "<U3", "M8[ns]", "V7", [("a", "i1"), ("b", ">f8", (2,))]]
VERDICTS: list[Verdict] = [Ack(), Nack(0, ""), Reject("")]
_SPAWN: Any = multiprocessing.get_context("spawn")


def message(number: float, size: int = 10, meta: Any = None) -> Message:
    """An item of `size` float64, all of them `number`."""
    return Message((np.full(size, float(number)),), None, meta)


def number_of(found: Message) -> float:
    """What `message` was called with, the array being whole."""
    (array,) = found.arrays
    assert (array == array[0]).all()
    return float(array[0])


def soon() -> float:
    """A deadline that is far enough for anything that should happen."""
    return time.monotonic() + 20


class Suite:
    """How an engine is reached, and what the tests do with it. place: of the test's spool."""

    durability: ClassVar[Durability] = "none"
    place: str

    def engine(self, place: str) -> Engine:
        """The engine of a spool at `place`, where there is none at first. Picklable if it crosses processes."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _opened(self, tmp_path: Any) -> Iterator[None]:
        self.place = str(tmp_path / "spool")
        with ExitStack() as self.opened:
            yield

    def open_producer(self, limits: Limits | None = None, **options: Any) -> Producer:
        """A producer that the test need not close."""
        asked = ProducerOptions(limits or Limits(), self.durability, **options)
        return self.opened.enter_context(closing(self.engine(self.place).producer(asked)))

    def open_consumer(self, limits: Limits | None = None) -> Consumer:
        """A consumer likewise."""
        asked = ConsumerOptions(limits or Limits())
        return self.opened.enter_context(closing(self.engine(self.place).consumer(asked)))

    @cached_property
    def producer(self) -> Producer:
        return self.open_producer()

    @cached_property
    def consumer(self) -> Consumer:
        return self.open_consumer()

    @property
    def admin(self) -> Admin:
        return self.engine(self.place).admin()

    @property
    def dead_letters(self) -> list[int]:
        """The numbers of the dead letters, in order."""
        return [letter.seq for letter in self.admin.failed_list()]

    def put(self, *numbers: float, size: int = 10) -> list[int]:
        """Put an item for each number."""
        return self.producer.put([message(number, size) for number in numbers], soon())

    def take(self, limit: int = 100) -> list[float]:
        """The numbers of what waits, at least one."""
        return list(map(number_of, self.consumer.take(limit, NOW)))

    def claim(self, lease: float | None = None) -> Delivery:
        """The next item in flight, waiting for it."""
        return self.consumer.claim(1, lease, soon())[0]

    def settle(self, delivery: Delivery, verdict: Verdict) -> None:
        self.consumer.settle([delivery], verdict)

    def aside(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """A call in another thread, which was seen to wait."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work(*args))
            except BaseException as error:
                future.set_exception(error)

        Thread(target=run, daemon=True).start()  # which no failed test has to wait for
        assert not wait([future], 0.05).done, "it should have waited"
        return future

    def gets(self, consumer: Consumer) -> list[Callable[[float | None], Any]]:
        """The calls of a consumer that wait for an item until a deadline."""
        return [
            lambda until: consumer.take(1, until),
            lambda until: consumer.claim(1, None, until),
            lambda until: consumer.peek(until),
        ]


class SharedSuite(Suite):
    """What holds between two readers of one spool."""

    @cached_property
    def other(self) -> Consumer:
        """The second of them."""
        return self.open_consumer()

    def claim_other(self) -> Delivery:
        """The next item in flight there, waiting for it without a deadline."""
        return self.other.claim(1, None, None)[0]

    def test_item_in_flight_is_no_one_elses(self) -> None:
        seqs = self.put(0, 1, size=LARGE)
        first = self.claim()
        (second,) = self.other.claim(5, None, NOW)
        assert [first.seq, second.seq] == seqs
        for get in self.gets(self.other):
            with pytest.raises(Empty):
                get(NOW)
        assert number_of(self.consumer.load(first)) == 0
        self.settle(first, Ack())
        self.other.settle([second], Ack())
        with pytest.raises(Empty):
            self.other.take(1, NOW)

    def test_requeued_item_comes_next_with_one_attempt_more(self) -> None:
        self.put(0, 1, 2)
        delivery = self.claim()
        self.settle(delivery, Nack(0, "not now"))
        again = self.claim_other()
        assert (again.seq, again.attempt) == (delivery.seq, 2)
        assert number_of(self.other.load(again)) == 0
        self.other.settle([again], Nack(0, "not now either"))
        assert self.take() == [0, 1, 2]

    def test_item_whose_lease_ended_is_redelivered_and_lost_to_the_first(self) -> None:
        self.put(0, size=LARGE)
        began = time.monotonic()
        delivery = self.claim(0.2)
        view = self.consumer.load(delivery)
        again = self.aside(self.claim_other).result(20)
        assert time.monotonic() - began >= 0.2
        assert (again.seq, again.attempt) == (delivery.seq, 2)
        for verdict in (*VERDICTS, Extend(10)):
            with pytest.raises(LeaseExpired):
                self.settle(delivery, verdict)
        assert number_of(self.other.load(again)) == 0
        self.other.settle([again], Ack())
        for _ in range(10):
            self.put(1, size=LARGE)
            self.take()
        assert number_of(view) == 0

    def test_lease_can_be_extended_and_shortened(self) -> None:
        self.put(0)
        delivery = self.claim(0.1)
        self.settle(delivery, Extend(30))
        with pytest.raises(Empty):
            self.other.claim(1, None, time.monotonic() + 0.3)
        waiting = self.aside(self.claim_other)
        self.settle(delivery, Extend(0.05))
        assert waiting.result(20).attempt == 2

    def test_without_a_lease_an_item_stays_in_flight(self) -> None:
        self.put(0)
        delivery = self.claim()
        with pytest.raises(Empty):
            self.other.claim(
                1, None, time.monotonic() + 1.3
            )  # longer than between two looks for crashed sessions
        self.settle(delivery, Ack())

    def test_items_in_flight_are_redelivered_when_their_consumer_closes(self) -> None:
        seqs = self.put(0, 1, 2, size=LARGE)
        view = self.consumer.load(self.consumer.claim(2, None, NOW)[0])
        self.consumer.close()
        again = self.other.claim(9, None, NOW)
        assert [(each.seq, each.attempt) for each in again] == list(zip(seqs, (2, 2, 1), strict=True))
        assert number_of(view) == 0

    def test_end_waits_for_what_others_have_in_flight(self) -> None:
        self.put(0)
        delivery = self.claim()
        self.producer.shutdown(False)
        waiting = self.aside(self.claim_other)
        self.settle(delivery, Nack(0, ""))
        self.other.settle([waiting.result(20)], Ack())
        for consumer in (self.consumer, self.other):
            with pytest.raises(ShutDown):
                consumer.claim(1, None, NOW)

    @pytest.mark.parametrize("verdict", [Ack(), Reject("")], ids=repr)
    def test_end_comes_when_the_last_item_in_flight_is_settled(self, verdict: Verdict) -> None:
        self.put(0)
        delivery = self.claim()
        self.producer.shutdown(False)
        waiting = self.aside(self.claim_other)
        self.settle(delivery, verdict)
        assert isinstance(waiting.exception(20), ShutDown)


class EngineSuite(SharedSuite):
    """What every engine keeps."""

    def test_suites_of_all_capabilities_are_run(self) -> None:
        assert isinstance(self.producer, Lender) == isinstance(self, LoanSuite)
        assert isinstance(self.producer, Preallocator) == isinstance(self, PreallocateSuite)
        assert isinstance(self.consumer, Watchable) == isinstance(self, WatchSuite)
        assert self.engine(self.place).crosses_processes == isinstance(self, ProcessSuite)

    # Putting and taking

    @pytest.mark.parametrize("size", [1, LARGE])
    def test_items_come_out_as_they_went_in_and_in_order(self, size: int) -> None:
        for number in range(20):
            self.producer.put([message(number, size, {"number": number})], NOW)
        for number in range(20):
            (found,) = self.consumer.take(1, None)
            assert (number_of(found), found.names, found.meta) == (number, None, {"number": number})

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_arrays_keep_dtype_shape_and_order(self, dtype: Any, order: Any) -> None:
        for shape in ((), (0,), (3, 4), (60, 70, 2)):
            array = np.ones(shape, dtype, order)
            self.producer.put([Message((array,))], NOW)
            (found,) = self.consumer.take(1, NOW)[0].arrays
            assert (type(found), found.dtype, found.shape) == (np.ndarray, array.dtype, array.shape)
            assert found.flags.f_contiguous == array.flags.f_contiguous
            assert found.flags.c_contiguous == array.flags.c_contiguous
            assert found.tobytes() == array.tobytes()
            assert not found.flags.writeable

    @pytest.mark.parametrize("size", [1, LARGE])
    def test_named_arrays_keep_their_names_and_order(self, size: int) -> None:
        self.producer.put([Message((np.zeros(size), np.ones(3, "i2")), ("b", "größe"), [1, None])], NOW)
        (found,) = self.consumer.take(1, NOW)
        assert (found.names, found.meta) == (("b", "größe"), [1, None])
        assert [(array.dtype.str, array.size) for array in found.arrays] == [("<f8", size), ("<i2", 3)]

    @pytest.mark.parametrize("size", [1, LARGE])
    def test_nothing_is_kept_of_the_array_that_was_put(self, size: int) -> None:
        array = np.zeros((size, 3))
        self.producer.put([Message((array,)), Message((array[:, 1],))], NOW)
        array[:] = 1
        assert not any(found.arrays[0].any() for found in self.consumer.take(2, NOW))

    def test_every_item_has_an_id_and_the_time_of_its_put(self) -> None:
        given = "0123456789abcdef" * 2
        self.producer.put([message(0), message(1), message(2)._replace(id=given)], NOW)
        found = self.consumer.take(2, NOW)
        delivery = self.claim()
        contents = self.consumer.describe(delivery)
        found.append(self.consumer.load(delivery))
        assert [len(bytes.fromhex(each.id)) for each in found] == [16, 16, 16]
        assert found[0].id != found[1].id
        assert found[2].id == contents.id == given
        whens: list[Any] = [*found, contents, delivery]
        for each in whens:
            assert abs(each.put_time / 1e9 - time.time()) < 3600

    def test_several_items_are_taken_at_once_as_far_as_there_are(self) -> None:
        self.put(0, 1, 2, 3, 4)
        assert self.take(3) == [0, 1, 2]
        assert list(map(number_of, self.consumer.take(9, None))) == [3, 4]
        with pytest.raises(Empty):
            self.take(1)

    def test_messages_put_together_lie_one_after_the_other(self) -> None:
        count = 150
        messages = [message(number, (1, LARGE // 8)[number % 2]) for number in range(count)]
        for _ in range(2):
            seqs = self.producer.put(messages, NOW)
            assert seqs == list(range(seqs[0], seqs[0] + count))
            assert [number for _ in range(3) for number in self.take(50)] == list(range(count))

    def test_either_side_may_come_first_and_items_outlive_all_sessions(self) -> None:
        with pytest.raises(Empty):
            self.take()
        seqs = self.put(0, 1)
        self.producer.close()
        self.consumer.close()
        assert [delivery.seq for delivery in self.open_consumer().claim(9, None, NOW)] == seqs

    @pytest.mark.parametrize("size", [1, LARGE])
    def test_arrays_outlive_their_consumer_and_later_traffic(self, size: int) -> None:
        self.put(0, 1, 2, size=size)
        consumer = self.open_consumer()
        found = consumer.take(5, NOW)
        consumer.close()
        for _ in range(30):
            self.put(-1, size=size)
            self.take()
        assert list(map(number_of, found)) == [0, 1, 2]

    def test_what_cannot_be_stored_is_refused_and_leaves_nothing(self) -> None:
        with pytest.raises(UnsupportedArray):
            self.producer.put([Message((np.array([None, {}]),))], NOW)
        for meta in ({1}, float("nan"), {"a": np.zeros(1)}):
            with pytest.raises((TypeError, ValueError)):
                self.producer.put([message(0, meta=meta)], NOW)
        assert self.consumer.qsize() == 0

    def test_qsize_counts_what_waits(self) -> None:
        self.put(0, 1, 2)
        assert (self.producer.qsize(), self.consumer.qsize()) == (3, 3)
        self.take(1)
        delivery = self.claim()
        assert self.producer.qsize() == 1
        self.settle(delivery, Nack(30, ""))
        assert (self.producer.qsize(), self.consumer.qsize()) == (2, 2)

    # Limits and waiting

    def test_who_asks_first_decides_a_limit(self) -> None:
        assert self.producer.maxsize == 0
        self.open_consumer(Limits(maxsize=3))
        self.open_producer(Limits(maxsize=3, max_attempts=0))
        assert (self.producer.maxsize, self.consumer.maxsize) == (3, 3)
        with pytest.raises(LimitMismatch, match="maxsize=3"):
            self.open_producer(Limits(maxsize=4))
        with pytest.raises(LimitMismatch, match="max_attempts=0"):
            self.open_consumer(Limits(max_attempts=1))
        limits = self.admin.stat().limits
        assert (limits.maxsize, limits.max_bytes, limits.max_attempts) == (3, 0, 0)

    def test_maxsize_counts_items_that_wait(self) -> None:
        self.producer = self.open_producer(Limits(maxsize=2))
        for number in (0, 1):
            assert not self.producer.full()
            self.put(number)
        assert self.producer.full()
        with pytest.raises(Full):
            self.producer.put([message(2)], NOW)
        delivery = self.claim()
        assert not self.producer.full()
        self.put(2)
        self.settle(delivery, Nack(30, ""))
        assert self.take() == [1, 2]
        self.put(3)
        assert self.producer.full()

    @pytest.mark.parametrize("verdict", VERDICTS, ids=repr)
    def test_max_bytes_counts_items_until_they_are_gone(self, verdict: Verdict) -> None:
        self.producer = self.open_producer(Limits(max_bytes=1_000_000))
        large = [message(0, 100_000)]
        self.producer.put(large, NOW)
        delivery = self.claim()
        with pytest.raises(Full):
            self.producer.put(large, NOW)
        self.put(1)
        self.settle(delivery, verdict)
        if isinstance(verdict, Nack):
            with pytest.raises(Full):
                self.producer.put(large, NOW)
            self.take(1)
        self.producer.put(large, NOW)

    def test_what_could_never_fit_is_refused(self) -> None:
        self.producer = self.open_producer(Limits(max_bytes=1_000_000))
        with pytest.raises(TooLarge, match="1000000") as caught:
            self.producer.put([message(0), message(1, 200_000), message(2)], soon())
        assert self.consumer.qsize() == len(getattr(caught.value, "seqs", ()))

    def test_messages_are_put_as_far_as_there_is_room_and_told(self) -> None:
        self.producer = self.open_producer(Limits(maxsize=2))
        for until in (NOW, time.monotonic() + 0.05):
            with pytest.raises(Full) as caught:
                self.producer.put([message(number) for number in range(4)], until)
            deliveries = self.consumer.claim(9, None, NOW)
            assert list(caught.value.seqs) == [delivery.seq for delivery in deliveries]
            assert [number_of(self.consumer.load(delivery)) for delivery in deliveries] == [0, 1]
            self.consumer.settle(deliveries, Ack())
        putting = self.aside(self.put, 0, 1, 2)
        self.producer.shutdown(False)
        error = putting.exception(20)
        assert isinstance(error, ShutDown)
        assert list(error.seqs) == [each.seq for each in self.consumer.claim(9, None, NOW)]
        assert len(error.seqs) == 2

    def test_messages_put_together_may_be_more_than_there_is_room(self) -> None:
        self.producer = self.open_producer(Limits(maxsize=2))
        putting = self.aside(self.put, *range(7))
        assert [number_of(self.consumer.take(1, soon())[0]) for _ in range(7)] == list(range(7))
        assert len(putting.result(20)) == 7

    @pytest.mark.parametrize("limits", [Limits(maxsize=1), Limits(max_bytes=400_000)], ids=repr)
    def test_put_goes_on_when_an_item_is_taken(self, limits: Limits) -> None:
        self.producer = self.open_producer(limits)
        self.put(0, size=LARGE)
        putting = self.aside(lambda: self.put(1, size=LARGE))
        assert self.take(1) == [0]
        assert len(putting.result(20)) == 1
        assert self.take() == [1]

    @pytest.mark.parametrize("call", [0, 1, 2], ids=["take", "claim", "peek"])
    def test_waiting_ends_with_an_item_a_deadline_or_the_end(self, call: int) -> None:
        get = self.gets(self.consumer)[call]
        began = time.monotonic()
        for until in (began + 0.05, began - 1, NOW):
            with pytest.raises(Empty):
                get(until)
            assert time.monotonic() - began >= 0.05
        waiting = self.aside(get, None)
        self.put(0)
        assert waiting.result(20)
        for _ in range(2 - call):
            with suppress(Empty):
                self.take()
        closed = self.open_consumer()
        with suppress(Empty):
            closed.take(1, NOW)
        waits = [self.aside(self.gets(closed)[call], None), self.aside(get, None)]
        closed.close()
        assert isinstance(waits[0].exception(20), ValueError)
        self.producer.shutdown(False)
        assert isinstance(waits[1].exception(20), ShutDown)

    def test_waiting_for_room_ends_with_the_deadline_or_the_session(self) -> None:
        self.producer = self.open_producer(Limits(maxsize=1))
        self.put(0)
        began = time.monotonic()
        for until in (began + 0.05, began - 1):
            with pytest.raises(Full):
                self.producer.put([message(1)], until)
            assert time.monotonic() - began >= 0.05
        waiting = self.aside(self.producer.put, [message(1)], None)
        self.producer.close()
        assert isinstance(waiting.exception(20), ValueError)

    # In flight

    def test_several_items_are_acknowledged_at_once(self) -> None:
        self.put(0, 1, 2, size=LARGE)
        self.put(3, 4)
        deliveries = self.consumer.claim(4, None, NOW)
        assert [number_of(self.consumer.load(delivery)) for delivery in deliveries] == [0, 1, 2, 3]
        assert [delivery.size >= LARGE * 8 for delivery in deliveries] == [True, True, True, False]
        self.consumer.settle(deliveries, Ack())
        self.consumer.close()
        self.consumer = self.open_consumer()
        assert self.take() == [4]

    def test_item_may_be_loaded_again(self) -> None:
        self.producer.put([message(7, LARGE, "meta")], NOW)
        delivery = self.claim()
        views = [self.consumer.load(delivery) for _ in range(3)]
        self.settle(delivery, Ack())
        for _ in range(10):
            self.put(8, size=LARGE)
            self.take()
        assert [(number_of(view), view.meta) for view in views] == [(7, "meta")] * 3
        assert not views[0].arrays[0].flags.writeable

    def test_requeued_items_keep_their_order(self) -> None:
        self.put(0, 1, 2, 3, 4)
        self.consumer.settle(self.consumer.claim(3, None, NOW), Nack(0, ""))
        assert self.take() == [0, 1, 2, 3, 4]

    def test_item_requeued_with_a_delay_comes_after_it(self) -> None:
        self.put(0)
        delivery = self.claim()
        began = time.monotonic()
        self.settle(delivery, Nack(0.2, "later"))
        self.put(1)
        assert self.take() == [1]
        (again,) = self.aside(self.consumer.claim, 1, None, None).result(20)
        assert time.monotonic() - began >= 0.2
        assert (again.seq, again.attempt) == (delivery.seq, 2)
        self.settle(again, Nack(0.01, ""))
        self.put(2)
        deadline = soon()
        while (
            self.consumer.peek(NOW).seq != delivery.seq
        ):  # until it is due, and before what was never delivered
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @pytest.mark.parametrize("verdict", VERDICTS, ids=repr)
    def test_settled_item_is_in_flight_no_more(self, verdict: Verdict) -> None:
        self.put(0)
        delivery = self.claim()
        self.settle(delivery, verdict)
        assert self.consumer.qsize() == isinstance(verdict, Nack)
        assert self.dead_letters == [delivery.seq] * isinstance(verdict, Reject)
        for look in (self.consumer.load, self.consumer.describe):
            with pytest.raises(LeaseExpired):
                look(delivery)
        if isinstance(verdict, Nack):
            self.claim()  # a later attempt is not what this delivery was
        for again in (*VERDICTS, Extend(10)):
            with pytest.raises(LeaseExpired):
                self.settle(delivery, again)

    def test_contents_are_told_without_the_arrays(self) -> None:
        self.producer.put([Message((np.zeros(LARGE), np.zeros(3)), ("a", "b"), {"x": (1, 2)})], NOW)
        peeked = self.consumer.peek(NOW)
        delivery = self.claim()
        contents = self.consumer.describe(delivery)
        assert (peeked.seq, peeked.nbytes) == (delivery.seq, delivery.size)
        assert peeked.names == contents.names == ("a", "b")
        assert peeked.meta == contents.meta == {"x": [1, 2]}
        assert peeked.put_time == pytest.approx(contents.put_time / 1e9)

    def test_peek_leaves_the_item(self) -> None:
        seq, _ = self.put(0, 1)
        assert [self.consumer.peek(NOW).seq for _ in range(3)] == [seq] * 3
        assert self.consumer.qsize() == 2
        delivery = self.claim()
        assert (delivery.seq, delivery.attempt) == (seq, 1)
        self.settle(delivery, Nack(0, ""))
        assert (self.consumer.peek(NOW).seq, self.consumer.peek(NOW).attempt) == (seq, 1)

    def test_lease_that_ended_is_over_even_when_nobody_else_came(self) -> None:
        self.put(0)
        delivery = self.claim(1e-6)
        with pytest.raises(LeaseExpired):
            self.settle(delivery, Ack())
        assert self.take() == [0]

    # Dead letters

    def test_rejected_item_is_a_dead_letter_at_once(self) -> None:
        self.put(0, 1, size=LARGE)
        delivery = self.claim()
        view = self.consumer.load(delivery)
        self.settle(delivery, Reject("no good"))
        (letter,) = self.admin.failed_list()
        assert (letter.seq, letter.reason, letter.attempts, letter.damage) == (delivery.seq, "no good", 1, "")
        assert [(array.dtype, array.shape) for array in letter.arrays] == [("float64", (LARGE,))]
        assert self.take() == [1]
        assert number_of(view) == 0

    def test_item_is_a_dead_letter_after_its_last_attempt(self) -> None:
        self.producer = self.open_producer(Limits(max_attempts=3))
        seqs = self.put(0, 1)
        for attempt in (1, 2):
            self.settle(self.claim(), Nack(0, f"reason {attempt}"))
        assert self.dead_letters == []
        assert self.claim(0.02).attempt == 3  # the end of a lease counts as well
        assert self.claim().seq == seqs[1]
        deadline = soon()
        while self.dead_letters != seqs[:1]:
            assert time.monotonic() < deadline
            with pytest.raises(Empty):
                self.consumer.claim(1, None, time.monotonic() + 0.02)
        (letter,) = self.admin.failed_list()
        assert [failure.attempt for failure in letter.history] == [1, 2, 3]
        assert [failure.why for failure in letter.history[:2]] == ["reason 1", "reason 2"]
        assert letter.attempts == 3

    def test_without_a_limit_an_item_may_be_requeued_for_ever(self) -> None:
        self.producer = self.open_producer(Limits(max_attempts=0))
        self.put(0)
        for attempt in range(1, 20):
            delivery = self.claim()
            assert delivery.attempt == attempt
            self.settle(delivery, Nack(0, ""))

    def test_dead_letters_are_retried_as_new_items_and_dropped(self) -> None:
        seqs = self.put(0, 1, 2)
        deliveries = self.consumer.claim(3, None, NOW)
        identity = self.consumer.load(deliveries[0]).id
        self.consumer.settle(deliveries[::-1], Reject("on purpose"))
        self.put(3)
        for call in (self.admin.failed_retry, self.admin.failed_drop):
            with pytest.raises(errors.NoSuchItem):
                call([seqs[0], 99])
        assert self.dead_letters == seqs
        assert self.admin.failed_drop([seqs[1]]) == seqs[1:2]
        assert self.dead_letters == [seqs[0], seqs[2]]
        retried = self.admin.failed_retry(None)
        assert (list(retried.seqs), retried.damaged) == ([seqs[0], seqs[2]], {})
        deliveries = self.consumer.claim(9, None, NOW)
        assert [number_of(self.consumer.load(each)) for each in deliveries] == [3, 0, 2]
        assert [each.seq for each in deliveries[1:]] == list(retried.seqs.values())
        assert [each.attempt for each in deliveries] == [1, 1, 1]
        assert self.consumer.load(deliveries[1]).id == identity
        assert (self.admin.failed_drop(None), self.dead_letters) == ([], [])

    def test_stat_counts_every_place(self) -> None:
        with pytest.raises(errors.NotASpool):
            self.admin.stat()
        self.put(0, 1, 2, 3, 4, 5, size=LARGE)
        self.take(1)
        rejected, delayed, _, acknowledged = self.consumer.claim(4, None, NOW)
        self.settle(acknowledged, Ack())
        self.settle(rejected, Reject(""))
        self.settle(delayed, Nack(30, ""))
        found = self.admin.stat()
        assert (found.path, found.state) == (self.producer.path, "open")
        assert (found.depth, found.delayed, found.in_flight, found.failed) == (1, 1, 1, 1)
        assert (found.puts, found.gets, found.live_sessions) == (6, 2, 2)
        assert found.bytes >= 3 * LARGE * 8
        assert found.oldest_age is not None
        assert 0 <= found.oldest_age < 3600
        self.consumer.close()
        assert self.admin.stat().live_sessions == 1

    # The end

    def test_shutdown_ends_puts_and_lets_what_waits_be_taken(self) -> None:
        self.put(0, 1)
        self.producer.shutdown(False)
        self.producer.close()
        for producer in (self.open_producer(), self.open_producer()):
            with pytest.raises(ShutDown):
                producer.put([message(2)], soon())
        assert self.take() == [0, 1]
        for get in self.gets(self.consumer):
            with pytest.raises(ShutDown):
                get(soon())

    def test_immediate_shutdown_removes_what_waits(self) -> None:
        self.put(0, 1, 2)
        self.settle(self.claim(), Nack(0, ""))
        self.settle(self.claim(), Nack(30, ""))
        for immediate in (True, False):  # the second changes nothing
            self.producer.shutdown(immediate)
            assert self.consumer.qsize() == 0
            for get in self.gets(self.consumer):
                with pytest.raises(ShutDown):
                    get(soon())
            assert self.admin.stat().state == "discarded"
        self.open_producer(reopen=True)
        self.put(3)
        assert self.take() == [3]

    def test_item_in_flight_at_an_immediate_shutdown_is_settled_and_not_redelivered(self) -> None:
        self.put(0, 1, 2, size=LARGE)
        first, second = self.consumer.claim(2, None, NOW)
        self.producer.shutdown(True)
        assert number_of(self.consumer.load(first)) == 0
        self.settle(first, Ack())
        self.settle(second, Nack(0, ""))
        with pytest.raises(ShutDown):
            self.claim()

    def test_end_does_not_wait_for_what_is_in_flight_at_the_asking_consumer(self) -> None:
        self.put(0)
        delivery = self.claim()
        self.producer.shutdown(False)
        with pytest.raises(ShutDown):
            self.claim()
        self.settle(delivery, Nack(0.1, ""))
        with pytest.raises(Empty):  # it may yet come
            self.take()
        assert self.claim().attempt == 2

    def test_reopening_takes_puts_again(self) -> None:
        self.put(0)
        self.producer.shutdown(False)
        self.open_producer(reopen=True)
        self.put(1)
        assert self.take() == [0, 1]
        with pytest.raises(Empty):
            self.take()

    def test_closed_session_says_so_and_closing_again_is_harmless(self) -> None:
        calls: list[Callable[[float], Any]] = [
            *self.gets(self.consumer),
            lambda until: self.producer.put([message(0)], until),
            lambda _: self.producer.qsize(),
            lambda _: self.consumer.qsize(),
        ]
        for _ in range(2):
            self.producer.close()
            self.consumer.close()
        for call in calls:
            with pytest.raises(ValueError, match="closed"):
                call(NOW)

    # Many at once

    def test_threads_share_a_producer_and_a_consumer(self) -> None:
        producer, consumer, acknowledged = self.producer, self.consumer, list[float]()

        def putting(me: int) -> None:
            for number in range(me * 50, me * 50 + 50):
                producer.put([message(number, LARGE // 8 if number % 3 else 5)], soon())

        def getting() -> None:
            with suppress(ShutDown):
                while True:
                    for delivery in consumer.claim(3, None, soon()):
                        number = number_of(consumer.load(delivery))
                        if number % 7 == 0 and delivery.attempt == 1:
                            consumer.settle([delivery], Nack(0, "on purpose"))
                            continue
                        consumer.settle([delivery], Ack())
                        acknowledged.append(number)
                        if len(acknowledged) == 200:
                            producer.shutdown(False)

        with ThreadPoolExecutor(8) as threads:
            futures = [threads.submit(putting, me) for me in range(4)]
            futures += [threads.submit(getting) for _ in range(4)]
            for future in futures:
                future.result(60)
        assert sorted(acknowledged) == list(range(200))


class LoanSuite(Suite):
    """The capability `Lender`."""

    SPEC = ArraySpec((LARGE,), np.dtype("f8"), "C")

    def loan(self, spec: ArraySpec = SPEC, meta: Any = None) -> Any:
        assert isinstance(self.producer, Lender)
        return self.producer.loan(spec, meta, NOW)

    @pytest.mark.parametrize("size", [1, 2, LARGE])
    def test_what_was_filled_in_is_what_readers_get_after_the_commit(self, size: int) -> None:
        for _ in range(3):
            loan = self.loan(ArraySpec((size, 2), np.dtype(">i4"), "F"), {"lent": size})
            array = loan.array
            assert (array.shape, array.dtype.str, array.flags.f_contiguous) == ((size, 2), ">i4", True)
            array[:] = size
            assert self.consumer.qsize() == 0
            loan.commit(NOW)
            assert not array.flags.writeable
            (found,) = self.consumer.take(1, NOW)
            assert found.meta == {"lent": size}
            assert (found.arrays[0] == array).all()
            assert found.arrays[0].flags.f_contiguous
            assert not found.arrays[0].flags.writeable

    def test_order_is_that_of_commit_and_a_discarded_loan_is_never_seen(self) -> None:
        for _ in range(3):
            loans = [self.loan() for _ in range(3)]
            for number, loan in enumerate(loans):
                loan.array[:] = number
            loans[2].discard()
            assert loans[1].commit(NOW) < loans[0].commit(NOW)
            for loan in loans:
                loan.discard()
            assert self.take() == [1, 0]

    def test_loan_stays_one_while_there_is_no_room_to_commit_it(self) -> None:
        self.producer = self.open_producer(Limits(maxsize=1))
        loan = self.loan()
        loan.array[:] = 1
        self.put(0)
        calls: list[Callable[[], Any]] = [self.loan, lambda: loan.commit(NOW)]
        for call in calls:
            with pytest.raises(Full):
                call()
        waiting = self.aside(loan.commit, soon())
        assert self.take(1) == [0]
        waiting.result(20)
        assert self.take() == [1]

    def test_loan_is_refused_where_a_put_would_be(self) -> None:
        self.producer = self.open_producer(Limits(max_bytes=100_000))
        small = self.SPEC._replace(shape=(3,))
        loans = [self.loan(small), self.loan(small)]
        with pytest.raises(TooLarge):
            self.loan()
        with pytest.raises(UnsupportedArray):
            self.loan(small._replace(dtype=np.dtype("O")))
        with pytest.raises((TypeError, ValueError)):
            self.loan(small, {1})
        self.producer.shutdown(False)
        calls: list[Callable[[], Any]] = [lambda: self.loan(small), lambda: loans[0].commit(NOW)]
        for call in calls:
            with pytest.raises(ShutDown):
                call()
        self.producer.close()
        with pytest.raises(ValueError, match="closed"):
            loans[1].commit(NOW)
        for loan in loans:
            loan.discard()
        assert self.consumer.qsize() == 0


class PreallocateSuite(Suite):
    """The capability `Preallocator`."""

    def test_what_was_made_ahead_takes_what_is_put(self) -> None:
        assert isinstance(self.producer, Preallocator)
        self.producer.preallocate(3, LARGE * 8)
        assert self.producer.qsize() == 0
        self.put(*range(5), size=LARGE)
        assert self.take() == [0, 1, 2, 3, 4]
        for count, nbytes in ((-1, 8), (1, -8)):
            with pytest.raises(ValueError, match="-"):
                self.producer.preallocate(count, nbytes)


class WatchSuite(Suite):
    """The capability `Watchable`."""

    @pytest.mark.parametrize("kind", ["items", "space"])
    def test_armed_watch_becomes_readable_when_there_is_news(self, kind: Kind) -> None:
        self.producer = self.open_producer(Limits(maxsize=1))
        waits, undo = (
            (self.take, lambda: self.put(0)) if kind == "space" else (lambda: self.put(0), self.take)
        )
        session: Any = self.consumer if kind == "items" else self.producer
        assert isinstance(session, Watchable)
        watch = session.watch(kind)
        if kind == "space":
            self.put(0)
        for _ in range(3):
            watch.arm()
            waits()
            if watch.fileno() >= 0:
                poll = select.poll()
                poll.register(watch.fileno(), select.POLLIN)
                assert poll.poll(20_000), "nobody was woken"
            watch.drain()
            undo()
        watch.close()
        watch.close()


class DamageSuite(Suite):
    """What an engine does that finds an item damaged."""

    def damage(self, seq: int) -> None:
        """Spoil the stored item `seq` of the spool at `self.place`, so that it can be seen."""
        raise NotImplementedError

    @pytest.mark.parametrize("size", [1, LARGE])
    def test_damaged_item_is_a_dead_letter_and_the_next_one_is_delivered(self, size: int) -> None:
        damaged: list[int] = []
        for peek in (False, True):
            seqs = self.put(0, 1, size=size)
            self.damage(seqs[0])
            damaged.append(seqs[0])
            assert not peek or self.consumer.peek(NOW).seq == seqs[1]
            assert self.take() == [1]
            assert self.dead_letters == damaged
        assert all(letter.damage for letter in self.admin.failed_list())
        assert list(self.admin.failed_retry(None).damaged) == damaged

    @pytest.mark.parametrize("look", ["load", "describe"])
    def test_damage_seen_in_flight_makes_a_dead_letter(self, look: str) -> None:
        self.put(0, size=LARGE)
        delivery = self.claim()
        self.damage(delivery.seq)
        with pytest.raises(errors.BadItem):
            getattr(self.consumer, look)(delivery)
        assert self.dead_letters == [delivery.seq]
        with pytest.raises(LeaseExpired):
            self.settle(delivery, Ack())


class OtherProcess(SharedSuite):
    """The tests with two readers, the second in a process of its own."""

    @cached_property
    def other(self) -> Consumer:
        other = cast(Consumer, Remote(*start(serve, self.engine(self.place))))
        self.opened.enter_context(closing(other))
        other.qsize()  # it is there now
        return other


class ProcessSuite(Suite):
    """For engines that cross processes: readers that are killed."""

    def held(self) -> Any:
        """A process that has the first item, number 0, in flight."""
        process, pipe = start(consume, self.engine(self.place), True)
        assert pipe.poll(30)
        assert pipe.recv() == 0
        return process

    def test_processes_settle_each_item_once(self) -> None:
        """Three readers, one of which is killed in the middle; what it had in flight goes to the others."""
        self.put(0, size=LARGE)
        victim = self.held()
        crew = [start(consume, self.engine(self.place), False) for _ in range(2)]
        for number in range(1, 300):
            self.put(number, size=LARGE // 8 if number % 3 else 5)
        victim.kill()
        victim.join(30)
        self.producer.shutdown(False)
        settled: list[tuple[float, int]] = []
        for process, pipe in crew:
            assert pipe.poll(60)
            settled += pipe.recv()
            process.join(30)
            assert process.exitcode == 0
        assert sorted(number for number, _ in settled) == list(range(300))
        assert [number for number, attempt in settled if attempt == 2] == [0]

    def test_item_that_kills_every_reader_becomes_a_dead_letter(self) -> None:
        self.producer = self.open_producer(Limits(max_attempts=2))
        seq, _ = self.put(0, 1)
        for _ in range(2):
            process = self.held()
            process.kill()
            process.join(30)
        assert list(map(number_of, self.consumer.take(5, soon()))) == [1]
        assert self.dead_letters == [seq]


def start(work: Callable[..., None], *args: Any) -> tuple[Any, Connection]:
    """Run `work(*args, pipe)` in a process of its own; returns it and our end of the pipe."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=work, args=(*args, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def consume(engine: Engine, holding: bool, pipe: Connection) -> None:
    """Settle items until the end and send them; or keep the first in flight (`holding`), send it and hang."""
    consumer = engine.consumer(ConsumerOptions())
    if holding:
        (delivery,) = consumer.claim(1, None, soon())
        pipe.send(number_of(consumer.load(delivery)))
        pipe.recv()
    settled = []
    with suppress(ShutDown):
        while True:
            deliveries = consumer.claim(4, None, soon())
            settled += [(number_of(consumer.load(each)), each.attempt) for each in deliveries]
            consumer.settle(deliveries, Ack())
    pipe.send(settled)
    consumer.close()


class Remote:
    """A consumer in another process: what is asked of it is done there, by `serve`."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self._process, self._pipe = process, pipe

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*args: Any) -> Any:
            self._pipe.send((name, args))
            assert self._pipe.poll(30), f"{name} did not return in the other process"
            done, value = self._pipe.recv()
            if name == "close":
                self._process.join(30)
            if not done:
                raise value
            return value

        return ask


def serve(engine: Engine, pipe: Connection) -> None:
    """Make the calls of a `Remote`. Deliveries stay here; a number stands for each over there."""
    consumer = engine.consumer(ConsumerOptions())
    known: list[Delivery] = []

    def ours(argument: Any) -> Any:
        if isinstance(argument, list):
            return [ours(each) for each in argument]
        return known[argument.handle] if isinstance(argument, Delivery) else argument

    def theirs(value: Any) -> Any:
        if isinstance(value, list):
            return [theirs(each) for each in value]
        if not isinstance(value, Delivery):
            return value
        known.append(value)
        return replace(value, handle=len(known) - 1)

    name = ""
    while name != "close":
        name, args = pipe.recv()
        try:
            pipe.send((True, theirs(getattr(consumer, name)(*map(ours, args)))))
        except Exception as error:
            pipe.send((False, error))
