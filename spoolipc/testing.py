"""The suite that every engine passes: the promises of `spoolipc.engine`, and nothing else.

It speaks only the protocols of that module. To run it for an engine, subclass `EngineSuite` in a test module, add the
suites of the capabilities that the engine has, and say how a spool is reached:

    class TestMyEngine(EngineSuite, LoanSuite, ProcessSuite):
        def engine(self, place: str) -> Engine:
            return MyEngine(place)

`SharedSuite` is a part of it: the tests with two readers, which `OtherProcess` runs with the second in a process of its
own. Nothing is skipped; a test fails when a suite was left out that the engine's capabilities ask for. Needs pytest.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import pytest

from . import engine as engines
from . import errors
from .engine import Consumer, Engine, Lender, Preallocator, Producer, Watchable
from .errors import Empty, Full, LeaseExpired, ShutDown
from .message import NOW, Ack, ArraySpec, Delivery, Extend, Limits, Message, Nack, Reject, Verdict

LARGE = 40_000
"""Float64 that are more than an engine would store apart from the large."""
SIZES = pytest.mark.parametrize("size", [1, LARGE])
DTYPES: list[Any] = ["?", "i1", "<f8", ">c16", "S5", "<U3", "M8[ns]", "V7", [("a", "i1"), ("b", ">f8", (2,))]]
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 4), (60, 70, 2)]
T = TypeVar("T")
SETTLED: list[Verdict] = [Ack(), Nack(0, ""), Reject("")]
VERDICTS = pytest.mark.parametrize("verdict", SETTLED, ids=repr)
Call = Callable[..., Any]


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


def refused(error: Any, *calls: Call) -> None:
    """Assert that each call raises `error`."""
    for call in calls:
        with pytest.raises(error):
            call()


def gets(consumer: Consumer, until: float | None = NOW) -> list[Call]:
    """The calls of a consumer that wait for an item."""
    return [
        partial(consumer.take, 1, until),
        partial(consumer.claim, 1, None, until),
        partial(consumer.peek, until),
    ]


def came_as_put(found: Message, put: Message) -> None:
    """Assert that it did, its arrays read-only, with an id and the time of the put."""
    assert (found.names, found.meta) == (put.names, put.meta)
    for here, array in zip(found.arrays, put.arrays, strict=True):
        assert (type(here), here.dtype, here.shape) == (np.ndarray, array.dtype, array.shape)
        assert (here.flags.fnc, here.flags.writeable) == (array.flags.fnc, False)
        assert here.tobytes() == array.tobytes()
    assert abs(found.put_time / 1e9 - time.time()) < 3600
    assert len(bytes.fromhex(found.id)) == 16
    assert found.id == put.id or not put.id


class Suite:
    """How an engine is reached, and what the tests do with it. place: of the test's spool."""

    durability: ClassVar[engines.Durability] = "none"
    looks: ClassVar[float] = 1.3
    """Seconds that are longer than between two looks of the engine for crashed sessions."""
    place: str

    def engine(self, place: str) -> Engine:
        """The engine of a spool at `place`, where there is none at first. Picklable if it crosses processes."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _opened(self, tmp_path: Any) -> Iterator[None]:
        self.place = str(tmp_path / "spool")
        self.held: list[Delivery] = []
        with ThreadPoolExecutor() as self.threads, ExitStack() as self.opened:
            yield

    def open_producer(self, reopen: bool = False, fresh: bool = False, **limits: int) -> Producer:
        """A producer that the test need not close."""
        asked = engines.ProducerOptions(Limits(**limits), self.durability, reopen, fresh=fresh)
        return self.opened.enter_context(closing(self.engine(self.place).producer(asked)))

    def open_consumer(self, end: engines.End = "shutdown", **limits: int) -> Consumer:
        """A consumer likewise."""
        asked = engines.ConsumerOptions(Limits(**limits), end=end)
        return self.opened.enter_context(closing(self.engine(self.place).consumer(asked)))

    @cached_property
    def producer(self) -> Producer:
        return self.open_producer()

    @cached_property
    def consumer(self) -> Consumer:
        return self.open_consumer()

    @property
    def admin(self) -> engines.Admin:
        return self.engine(self.place).admin()

    @property
    def dead_letters(self) -> list[int]:
        """The numbers of the dead letters, in order."""
        return [letter.seq for letter in self.admin.failed_list()]

    def put(self, *numbers: float, size: int = 10) -> list[int]:
        """Put an item for each number."""
        return self.producer.put([message(number, size) for number in numbers], soon())

    def join(self, until: float | None) -> bool:
        """Whether all that was put is done before the deadline."""
        return not self.producer.join(until)

    def take(self, limit: int = 100, until: float | None = NOW) -> list[float]:
        """The numbers of what waits, at least one."""
        return list(map(number_of, self.consumer.take(limit, until)))

    def claim(self, lease: float | None = None) -> Delivery:
        """The next item in flight, waiting for it; held until the end of the test."""
        self.held += (claimed := self.consumer.claim(1, lease, soon()))
        return claimed[0]

    def claim_and(self, use: Callable[[Delivery], T]) -> tuple[float, Delivery, T, float]:
        """The next item in flight, and what `use` made of it before its lease ended, which was long enough for that;
        with the moment before it was claimed, and its lease in seconds."""
        for lease in (0.1, 0.5, 3.0, 20.0):
            began = time.monotonic()
            delivery = self.claim(lease)
            with suppress(LeaseExpired):
                return began, delivery, use(delivery), lease
        raise AssertionError("it takes longer than any lease")

    def load(self, *deliveries: Delivery) -> list[float]:
        """The numbers of what is in flight."""
        return [number_of(self.consumer.load(delivery)) for delivery in deliveries]

    def settle(self, delivery: Delivery, verdict: Verdict) -> None:
        self.consumer.settle([delivery], verdict)

    def go_on(self, size: int = LARGE) -> None:
        """Later traffic, which writes over whatever may be written over."""
        for _ in range(10):
            self.put(-1, size=size)
            self.take()

    def aside(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """A call in another thread, which was seen to wait."""
        future = self.threads.submit(work, *args)
        assert not wait([future], 0.05).done, "it should have waited"
        return future


class SharedSuite(Suite):
    """What holds between two readers of one spool."""

    @cached_property
    def other(self) -> Consumer:
        """The second of them."""
        return self.open_consumer()

    def claim_other(self) -> Delivery:
        """The next item in flight there, waiting for it without a deadline; held as well."""
        self.held += (claimed := self.other.claim(1, None, None))
        return claimed[0]

    def claim_other_aside(self) -> Future[Delivery]:
        """The same in another thread, seen to wait: the second reader is open before that begins."""
        assert self.other is not self.consumer
        return self.aside(self.claim_other)

    def test_items_in_flight_are_no_one_elses_and_are_acknowledged_at_once(self) -> None:
        seqs = [*self.put(0, 1, size=LARGE), *self.put(2)]
        mine = self.consumer.claim(2, None, NOW)
        (last,) = self.other.claim(5, None, NOW)
        assert [delivery.seq for delivery in (*mine, last)] == seqs
        assert [delivery.size >= LARGE * 8 for delivery in (*mine, last)] == [True, True, False]
        refused(Empty, *gets(self.other))
        assert self.load(*mine) == [0, 1]
        self.consumer.settle(mine, Ack())
        self.consumer.close()
        self.other.settle([last], Ack())
        refused(Empty, *gets(self.other))

    def test_requeued_items_come_next_in_order_with_one_attempt_more(self) -> None:
        self.put(0, 1, 2, 3)
        first, second = self.consumer.claim(2, None, NOW)
        self.consumer.settle([first, second], Nack(0, "not now"))
        again = self.claim_other()
        assert (again.seq, again.attempt) == (first.seq, 2)
        assert number_of(self.other.load(again)) == 0
        self.other.settle([again], Nack(0, "not now either"))
        assert self.take() == [1, 0, 2, 3]

    def test_item_whose_lease_ended_is_redelivered_and_lost_to_the_first(self) -> None:
        self.put(0, size=LARGE)
        began, delivery, view, lease = self.claim_and(self.consumer.load)
        again = self.claim_other()
        assert time.monotonic() - began >= lease
        assert (again.seq, again.attempt) == (delivery.seq, delivery.attempt + 1)
        settles = [partial(self.settle, delivery, verdict) for verdict in (*SETTLED, Extend(10))]
        refused(LeaseExpired, *settles)
        assert number_of(self.other.load(again)) == 0
        self.other.settle([again], Ack())
        refused(LeaseExpired, *settles)
        self.go_on()
        assert number_of(view) == 0

    def test_item_stays_in_flight_until_its_lease_ends_which_may_be_changed(self) -> None:
        self.put(0, 1)
        began, leased, _, lease = self.claim_and(lambda delivery: self.settle(delivery, Extend(30)))
        endless = self.claim()
        with pytest.raises(Empty):
            self.other.claim(1, None, max(time.monotonic() + self.looks, began + 1.5 * lease))
        again = []  # an engine may requeue what nobody holds any more
        for delivery in (endless, leased):
            waiting = self.claim_other_aside()
            self.settle(delivery, Extend(0.05))
            again.append(waiting.result(20))
            assert (again[-1].seq, again[-1].attempt) == (delivery.seq, delivery.attempt + 1)

    def test_items_in_flight_are_redelivered_when_their_consumer_closes(self) -> None:
        seqs = self.put(0, 1, 2, size=LARGE)
        deliveries = self.consumer.claim(2, None, NOW)
        view = self.consumer.load(deliveries[0])
        self.consumer.close()
        again = self.other.claim(9, None, NOW)
        assert [(each.seq, each.attempt) for each in again] == list(zip(seqs, (2, 2, 1), strict=True))
        assert number_of(view) == 0

    def test_item_that_is_dropped_unsettled_is_redelivered_by_the_next_call(self) -> None:
        self.put(0)
        self.consumer.claim(1, None, NOW)
        with pytest.warns(ResourceWarning, match="item 1 .* was dropped unsettled"):
            assert self.consumer.qsize() == 1
        again = self.claim_other()
        assert (again.seq, again.attempt) == (1, 2)

    @pytest.mark.parametrize("verdict", [Ack(), Nack(30, ""), Reject("")], ids=repr)
    def test_end_waits_for_what_others_have_in_flight_or_delayed(self, verdict: Verdict) -> None:
        self.put(0)
        delivery = self.claim()
        self.producer.shutdown(False)
        refused(ShutDown, *gets(self.consumer, None))  # which would wait for what it has itself
        waiting = self.claim_other_aside()
        self.settle(delivery, verdict)
        if isinstance(verdict, Nack):
            refused(Empty, *gets(self.consumer))
            assert not waiting.done()
            assert self.admin.purge() == 1
        assert isinstance(waiting.exception(20), ShutDown)
        refused(ShutDown, *gets(self.consumer, None), *gets(self.other, None))

    @pytest.mark.parametrize("verdict", [Ack(), Nack(0, ""), Nack(0.1, ""), Reject("")], ids=repr)
    def test_last_writer_leaves_while_another_reader_has_an_item_in_flight(self, verdict: Verdict) -> None:
        self.consumer = self.open_consumer("writers")
        self.put(0)
        delivery = self.claim_other()
        waiting = self.aside(self.consumer.take, 1, None)
        self.producer.close()
        assert not wait([waiting], 0.05).done, "the item may be requeued"
        self.other.settle([delivery], verdict)
        if isinstance(verdict, Nack):
            assert list(map(number_of, waiting.result(20))) == [0]
        else:
            assert isinstance(waiting.exception(20), ShutDown)
        refused(ShutDown, *gets(self.consumer, None))
        refused(Empty, *gets(self.other))

    @pytest.mark.parametrize("verdict", [Ack(), Reject("")], ids=repr)
    def test_join_waits_until_another_reader_is_done_with_the_last_item(self, verdict: Verdict) -> None:
        self.put(0, 1)
        deliveries = [self.claim_other(), self.claim_other()]
        joining = self.aside(self.join, None)
        self.put(2)  # after the call
        self.other.settle(deliveries[1:], verdict)
        assert not wait([joining], 0.05).done
        self.other.settle(deliveries[:1], Nack(0, ""))
        assert not wait([joining], 0.05).done
        again = self.claim_other()
        assert again.seq == deliveries[0].seq
        self.other.settle([again], verdict)
        assert joining.result(20)
        assert self.take() == [2]

    def test_threads_and_readers_settle_each_item_once(self) -> None:
        def put(me: int) -> None:
            for number in range(me * 50, me * 50 + 50):
                self.put(number, size=LARGE // 8 if number % 3 else 5)

        def get(consumer: Consumer) -> list[float]:
            settled = []
            with suppress(ShutDown):
                while True:
                    for delivery in consumer.claim(3, None, soon()):
                        number = number_of(consumer.load(delivery))
                        again = number % 7 == 0 and delivery.attempt == 1
                        consumer.settle([delivery], Nack(0, "on purpose") if again else Ack())
                        settled += [] if again else [number]
            return settled

        getting = [self.aside(get, each) for each in (self.consumer, self.consumer, self.other)]
        for putting in [self.threads.submit(put, me) for me in range(4)]:
            putting.result(60)
        self.producer.shutdown(False)
        assert sorted(number for each in getting for number in each.result(60)) == list(range(200))


class EngineSuite(SharedSuite):
    """What every engine keeps."""

    def test_suites_of_all_capabilities_are_run(self) -> None:
        assert isinstance(self.producer, Lender) == isinstance(self, LoanSuite)
        assert isinstance(self.producer, Preallocator) == isinstance(self, PreallocateSuite)
        assert isinstance(self.consumer, engines.Restorer) == isinstance(self, RestoreSuite)
        assert isinstance(self.consumer, Watchable) == isinstance(self, WatchSuite)
        assert self.engine(self.place).crosses_processes == isinstance(self, ProcessSuite)

    # Putting and taking

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_items_come_as_they_were_put_and_in_order(self, dtype: Any) -> None:
        put = [message(number, 10, {"number": number}) for number in range(20)]
        put += [Message((np.ones(shape, dtype, order),)) for shape in SHAPES for order in ("C", "F")]
        several = np.zeros(LARGE), np.ones(3, dtype), np.zeros(1)
        put += [Message(several, ("b", "größe", ""), [1, None], id="0123456789abcdef" * 2)]
        for each in put:
            self.producer.put([each], NOW)
        found = [self.consumer.take(1, None)[0] for _ in put]
        for each, original in zip(found, put, strict=True):
            came_as_put(each, original)
        assert len({each.id for each in found}) == len(put)

    def test_batches_lie_one_after_the_other_and_are_taken_as_far_as_there_are(self) -> None:
        messages = [message(number, (1, LARGE // 8)[number % 2]) for number in range(150)]
        for _ in range(2):
            seqs = self.producer.put(messages, NOW)
            assert seqs == list(range(seqs[0], seqs[0] + 150))
            taken = [self.take(60), self.take(70), self.take(80, None)]
            assert list(map(len, taken)) == [60, 70, 20]
            assert [number for each in taken for number in each] == list(range(150))
        refused(Empty, self.take)

    @SIZES
    def test_delivered_arrays_never_change(self, size: int) -> None:
        array = np.zeros((size, 3))
        self.producer.put([Message((array,)), Message((array[:, 1],)), message(0, size)], NOW)
        array[:] = 1
        taken = self.consumer.take(1, NOW)
        deliveries = self.consumer.claim(2, None, NOW)
        taken += [self.consumer.load(delivery) for delivery in deliveries * 2]
        self.settle(deliveries[0], Ack())
        self.settle(deliveries[1], Reject(""))
        self.consumer.close()
        self.consumer = self.open_consumer()
        self.go_on(size)
        assert not any(found.arrays[0].any() for found in taken)
        assert not any(found.arrays[0].flags.writeable for found in taken)

    @SIZES
    def test_arrays_to_be_written_are_nobody_elses(self, size: int) -> None:
        self.put(0, 1, 2, size=size)
        found = self.consumer.take(1, NOW, True)
        deliveries = self.consumer.claim(2, None, NOW)
        found += [self.consumer.load(delivery, True) for delivery in deliveries]
        for each in found:
            each.arrays[0][size // 2 :] = 7
        self.settle(deliveries[0], Nack(0, ""))
        self.settle(deliveries[1], Ack())
        assert self.take() == [1]
        self.go_on(size)
        for number, each in enumerate(found):
            assert (each.arrays[0][: size // 2] == number).all()
            assert (each.arrays[0][size // 2 :] == 7).all()

    @SIZES
    def test_items_know_their_number_attempt_and_bytes_however_they_are_delivered(self, size: int) -> None:
        seqs = self.put(0, 1, 2, size=size)
        delivery = self.claim()
        loaded = self.consumer.load(delivery)
        self.settle(delivery, Nack(0, ""))
        found = [loaded, *self.consumer.take(2, NOW), *self.consumer.take(1, NOW, True)]
        assert [(each.seq, each.attempt) for each in found] == [
            (seqs[0], 1),
            (seqs[0], 2),
            (seqs[1], 1),
            (seqs[2], 1),
        ]
        assert {each.nbytes for each in found} == {delivery.size}

    def test_either_side_may_come_first_and_items_outlive_all_sessions(self) -> None:
        refused(Empty, self.take)
        seqs = self.put(0, 1)
        self.producer.close()
        self.consumer.close()
        assert [delivery.seq for delivery in self.open_consumer().claim(9, None, NOW)] == seqs

    def test_none_is_made_where_that_was_not_asked_for(self) -> None:
        produced = engines.ProducerOptions(durability=self.durability, create=False)
        consumed = engines.ConsumerOptions(create=False)
        opened: list[Call] = [
            lambda: self.engine(self.place).producer(produced),
            lambda: self.engine(self.place).consumer(consumed),
        ]
        for call in opened:
            with pytest.raises(errors.NotASpool, match=r"there is no spool here.*makes one"):
                call()
        refused(errors.NotASpool, lambda: self.admin.stat())
        self.put(0)
        for call in opened:
            assert self.opened.enter_context(closing(call())).qsize() == 1

    def test_what_cannot_be_stored_is_refused_and_leaves_nothing(self) -> None:
        refused(errors.UnsupportedArray, lambda: self.producer.put([Message((np.array([None, {}]),))], NOW))
        for meta in ({1}, float("nan"), {"a": np.zeros(1)}):
            refused((TypeError, ValueError), partial(self.producer.put, [message(0, meta=meta)], NOW))
        assert self.consumer.qsize() == 0

    # Limits and waiting

    def test_who_asks_first_decides_a_limit(self) -> None:
        assert self.producer.maxsize == 0
        self.open_consumer(maxsize=3)
        self.open_producer(maxsize=3, max_attempts=0)
        assert (self.producer.maxsize, self.consumer.maxsize) == (3, 3)
        with pytest.raises(errors.LimitMismatch, match="maxsize=3"):
            self.open_producer(maxsize=4)
        with pytest.raises(errors.LimitMismatch, match="max_attempts=0"):
            self.open_consumer(max_attempts=1)
        limits = self.admin.stat().limits
        assert (limits.maxsize, limits.max_bytes, limits.max_attempts) == (3, 0, 0)

    def test_maxsize_and_qsize_count_items_that_wait(self) -> None:
        self.producer = self.open_producer(maxsize=2)

        def waiting() -> tuple[int, int, bool]:
            return self.producer.qsize(), self.consumer.qsize(), self.producer.full()

        for number in (0, 1):
            assert waiting() == (number, number, False)
            self.put(number)
        assert waiting() == (2, 2, True)
        refused(Full, partial(self.producer.put, [message(2)], NOW))
        delivery = self.claim()
        assert waiting() == (1, 1, False)
        self.put(2)
        self.settle(delivery, Nack(30, ""))
        assert waiting() == (3, 3, True)
        assert self.take() == [1, 2]
        assert waiting() == (1, 1, False)

    @VERDICTS
    def test_max_bytes_counts_items_until_they_are_gone(self, verdict: Verdict) -> None:
        self.producer = self.open_producer(max_bytes=1_000_000)
        put_large = partial(self.producer.put, [message(0, 100_000)], NOW)
        put_large()
        delivery = self.claim()
        refused(Full, put_large)
        self.put(1)
        self.settle(delivery, verdict)
        if isinstance(verdict, Nack):
            refused(Full, put_large)
            self.take(1)
        put_large()
        with pytest.raises(errors.TooLarge, match="1000000") as caught:
            self.producer.put([message(2), message(3, 200_000), message(4)], soon())
        assert self.consumer.qsize() == 2 + len(caught.value.seqs)

    def test_batch_is_put_as_far_as_there_is_room_and_told(self) -> None:
        self.producer = self.open_producer(maxsize=2)
        for until in (NOW, time.monotonic() + 0.05):
            with pytest.raises(Full) as caught:
                self.producer.put([message(number) for number in range(4)], until)
            deliveries = self.consumer.claim(9, None, NOW)
            assert list(caught.value.seqs) == [delivery.seq for delivery in deliveries]
            assert self.load(*deliveries) == [0, 1]
            self.consumer.settle(deliveries, Ack())
        putting = self.aside(self.put, *range(7))
        assert [number for _ in range(7) for number in self.take(1, soon())] == list(range(7))
        assert len(putting.result(20)) == 7
        putting = self.aside(self.put, 0, 1, 2)
        self.producer.shutdown(False)
        error = putting.exception(20)
        assert isinstance(error, ShutDown)
        assert len(error.seqs) == 2
        assert list(error.seqs) == [delivery.seq for delivery in self.consumer.claim(9, None, NOW)]

    @pytest.mark.parametrize("limits", [{"maxsize": 1}, {"max_bytes": 400_000}], ids=str)
    def test_put_waits_for_room_until_its_deadline_or_the_end_of_its_session(self, limits: Any) -> None:
        self.producer = self.open_producer(**limits)
        self.put(0, size=LARGE)
        began = time.monotonic()
        for until in (began + 0.05, began - 1):
            refused(Full, partial(self.producer.put, [message(1, LARGE)], until))
            assert time.monotonic() - began >= 0.05
        waiting = self.aside(self.producer.put, [message(1, LARGE)], None)
        assert self.take(1) == [0]
        waiting.result(20)
        waiting = self.aside(self.producer.put, [message(2, LARGE)], None)
        self.producer.close()
        assert isinstance(waiting.exception(20), errors.SpoolClosed)
        assert self.take() == [1]

    @pytest.mark.parametrize("call", [0, 1, 2], ids=["take", "claim", "peek"])
    def test_get_waits_for_an_item_until_its_deadline_or_the_end(self, call: int) -> None:
        began = time.monotonic()
        for until in (began + 0.05, began - 1, NOW):
            refused(Empty, gets(self.consumer, until)[call])
            assert time.monotonic() - began >= 0.05
        get = gets(self.consumer, None)[call]
        waiting = self.aside(get)
        self.put(0)
        assert waiting.result(20)
        with suppress(Empty):  # which only a peek left
            self.take()
        closed = self.open_consumer()
        waits = [self.aside(gets(closed, None)[call]), self.aside(get)]
        closed.close()
        assert isinstance(waits[0].exception(20), errors.SpoolClosed)
        self.producer.shutdown(False)
        assert isinstance(waits[1].exception(20), ShutDown)

    # In flight

    def test_item_requeued_with_a_delay_comes_after_it(self) -> None:
        self.put(0, 1)
        late, delivery = self.claim(), self.claim()
        self.settle(late, Nack(30, "much later"))
        self.put(2)
        assert self.take() == [2]
        began = time.monotonic()
        self.settle(delivery, Nack(0.2, "later"))
        again = self.aside(self.consumer.claim, 1, None, None).result(20)[0]
        assert time.monotonic() - began >= 0.2
        assert (again.seq, again.attempt) == (delivery.seq, 2)
        self.settle(again, Nack(0.01, ""))
        self.put(3)
        deadline = soon()
        while self.consumer.peek(NOW).seq != delivery.seq:  # it is due, and before what was never delivered
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @pytest.mark.parametrize("verdict", [*SETTLED, None], ids=repr)
    def test_item_settled_or_whose_lease_ended_is_in_flight_no_more(self, verdict: Verdict | None) -> None:
        self.put(0)
        delivery = self.claim(1e-6 if verdict is None else None)
        if verdict is not None:
            self.settle(delivery, verdict)
        settles = [partial(self.settle, delivery, again) for again in (*SETTLED, Extend(10))]
        refused(LeaseExpired, *settles)
        refused(LeaseExpired, partial(self.load, delivery), partial(self.consumer.describe, delivery))
        assert self.consumer.qsize() == (verdict in (None, Nack(0, "")))
        assert self.dead_letters == [delivery.seq] * isinstance(verdict, Reject)
        if self.consumer.qsize():
            later = self.claim()  # another attempt is not what this delivery was
            refused(LeaseExpired, *settles)
            self.settle(later, Ack())

    def test_contents_are_told_without_the_arrays_and_peek_leaves_the_item(self) -> None:
        self.producer.put([Message((np.zeros(LARGE), np.zeros(3)), ("a", "b"), {"x": (1, 2)})], NOW)
        peeked = [self.consumer.peek(NOW) for _ in range(3)]
        assert self.consumer.qsize() == 1
        delivery = self.claim()
        contents = self.consumer.describe(delivery)
        assert contents[:2] == (("a", "b"), {"x": [1, 2]})
        assert contents[2:] == self.consumer.load(delivery)[3:5]
        for each in peeked:
            assert (each.seq, each.nbytes, each.attempt) == (delivery.seq, delivery.size, 0)
            assert (each.names, each.meta) == contents[:2]
            assert each.put_time == pytest.approx(contents.put_time / 1e9)
        self.settle(delivery, Nack(0, ""))
        assert (self.consumer.peek(NOW).seq, self.consumer.peek(NOW).attempt) == (delivery.seq, 1)

    # Dead letters

    def test_item_is_a_dead_letter_when_it_is_rejected_or_after_its_last_attempt(self) -> None:
        self.producer = self.open_producer(max_attempts=3)
        seqs = self.put(0, 1, 2, size=LARGE)
        self.settle(self.claim(), Reject("no good"))
        for attempt in (1, 2):
            self.settle(self.claim(), Nack(0, f"reason {attempt}"))
        assert self.dead_letters == seqs[:1]
        leased, last = self.claim(0.02), self.claim()
        assert (leased.attempt, last.seq) == (3, seqs[2])  # the end of a lease counts as well
        deadline = soon()
        while self.dead_letters != seqs[:2]:
            assert time.monotonic() < deadline
            refused(Empty, partial(self.consumer.claim, 1, None, time.monotonic() + 0.02))
        rejected, failed = self.admin.failed_list()
        assert (rejected.reason, rejected.attempts, rejected.damage) == ("no good", 1, "")
        assert [(array.dtype, array.shape) for array in rejected.arrays] == [("float64", (LARGE,))]
        assert [failure.attempt for failure in failed.history] == [1, 2, 3]
        assert [failure.why for failure in failed.history[:2]] == ["reason 1", "reason 2"]

    def test_without_a_limit_an_item_may_be_requeued_for_ever(self) -> None:
        self.producer = self.open_producer(max_attempts=0)
        self.put(0)
        for attempt in range(1, 20):
            self.settle(delivery := self.claim(), Nack(0, ""))
            assert delivery.attempt == attempt

    def test_dead_letters_are_retried_as_new_items_and_dropped(self) -> None:
        seqs = self.put(0, 1, 2)
        deliveries = self.consumer.claim(3, None, NOW)
        identity = self.consumer.load(deliveries[0]).id
        self.consumer.settle(deliveries[::-1], Reject("on purpose"))
        self.put(3)
        admin = self.admin
        refused(
            errors.NoSuchItem, partial(admin.failed_retry, [seqs[0], 99]), partial(admin.failed_drop, [99])
        )
        assert self.dead_letters == seqs
        assert admin.failed_drop([seqs[1]]) == seqs[1:2]
        assert self.dead_letters == [seqs[0], seqs[2]]
        retried = admin.failed_retry(None)
        assert (list(retried.seqs), retried.damaged) == ([seqs[0], seqs[2]], {})
        deliveries = self.consumer.claim(9, None, NOW)
        assert self.load(*deliveries) == [3, 0, 2]
        assert [each.seq for each in deliveries[1:]] == list(retried.seqs.values())
        assert [each.attempt for each in deliveries] == [1, 1, 1]
        assert self.consumer.load(deliveries[1]).id == identity
        assert (admin.failed_drop(None), self.dead_letters) == ([], [])

    def test_stat_counts_every_place(self) -> None:
        refused(errors.NotASpool, lambda: self.admin.stat())
        self.put(0, 1, 2, 3, 4, 5, size=LARGE)
        self.take(1)
        rejected, delayed, _, acknowledged = self.consumer.claim(4, None, NOW)
        self.settle(acknowledged, Ack())
        self.settle(rejected, Reject(""))
        self.settle(delayed, Nack(30, ""))
        found = self.admin.stat()
        assert (found.path, found.state) == (self.producer.path, "open")
        assert (found.depth, found.delayed, found.in_flight, found.failed) == (1, 1, 1, 1)
        assert (found.puts, found.gets) in ((6, 2), (None, None))
        assert found.live_sessions == 2
        assert found.bytes >= 3 * LARGE * 8
        assert 0 <= (found.oldest_age or 0) < 3600
        self.consumer.close()
        assert self.admin.stat().live_sessions == 1

    # Starting again

    def test_purge_removes_what_waits_and_leaves_what_is_in_flight(self) -> None:
        self.put(0, 1, 2, 3, size=LARGE)
        mine, requeued, delayed = self.consumer.claim(3, None, NOW)
        self.settle(requeued, Nack(0, ""))
        self.settle(delayed, Nack(30, ""))
        assert self.admin.purge() == 3
        assert self.consumer.qsize() == 0
        assert self.load(mine) == [0]
        self.settle(mine, Nack(0, ""))
        self.put(4)
        assert self.take() == [0, 4]
        assert self.admin.purge() == 0
        assert self.admin.stat().bytes == 0

    def test_purge_makes_room_for_who_waits(self) -> None:
        self.producer = self.open_producer(maxsize=1)
        self.put(0)
        waiting = self.aside(self.put, 1)
        self.admin.purge()
        waiting.result(20)
        assert self.take() == [1]

    def test_limits_are_changed_for_all_who_have_the_spool_open(self) -> None:
        self.producer = self.open_producer(maxsize=1, max_attempts=4)
        self.put(0)
        waiting = self.aside(self.put, 1, 2)
        assert self.admin.set_limits(Limits(maxsize=3)) == self.admin.stat().limits
        waiting.result(20)
        assert (self.producer.maxsize, self.consumer.maxsize) == (3, 3)
        assert self.admin.stat().limits.max_attempts == 4
        self.admin.set_limits(Limits(maxsize=2, max_attempts=1))
        refused(Full, partial(self.producer.put, [message(3)], NOW))
        assert self.take() == [0, 1, 2]
        self.put(3)
        self.settle(self.claim(), Nack(0, ""))
        assert len(self.dead_letters) == 1
        self.open_consumer(maxsize=2)
        refused(errors.LimitMismatch, partial(self.open_consumer, maxsize=1))

    def test_fresh_producer_begins_with_an_empty_open_spool_and_its_limits(self) -> None:
        self.producer = self.open_producer(maxsize=5, max_attempts=4)
        self.put(0, 1, 2)
        self.settle(self.claim(), Reject(""))
        self.settle(self.claim(), Nack(30, ""))
        self.producer.shutdown(False)
        self.producer.close()
        self.producer = self.open_producer(fresh=True, maxsize=1)
        found = self.admin.stat()
        assert (found.depth, found.delayed, found.failed, found.bytes) == (0, 0, 1, 0)
        assert (found.limits.maxsize, found.limits.max_attempts) == (1, 4)
        self.put(3)
        assert self.take() == [3]

    def test_fresh_producer_makes_a_spool_and_serves_a_consumer_that_waits(self) -> None:
        self.open_producer(fresh=True, maxsize=1).close()
        taking = self.aside(self.consumer.take, 1, None)
        self.producer = self.open_producer(fresh=True)
        self.put(0)
        assert list(map(number_of, taking.result(20))) == [0]
        assert self.producer.maxsize == 1

    def test_fresh_producer_is_refused_beside_another_and_items_in_flight(self) -> None:
        self.put(0, 1)
        open_fresh = partial(self.open_producer, fresh=True, maxsize=7)
        refused(errors.SpoolInUse, open_fresh)
        self.producer.close()
        delivery = self.claim()
        refused(errors.SpoolInUse, open_fresh)
        assert (self.consumer.qsize(), self.consumer.maxsize) == (1, 0)
        self.settle(delivery, Ack())
        open_fresh()
        assert (self.consumer.qsize(), self.consumer.maxsize) == (0, 7)

    def test_removed_spool_is_no_more_and_the_next_one_begins_anew(self) -> None:
        self.producer = self.open_producer(maxsize=5)
        seqs = [*self.put(0), *self.put(1, 2, size=LARGE)]
        self.settle(self.claim(), Reject(""))
        self.producer.close()
        refused(errors.SpoolInUse, self.admin.remove)
        assert self.take() == [1, 2]
        self.consumer.close()
        self.admin.remove()
        refused(errors.NotASpool, lambda: self.admin.remove(), lambda: self.admin.stat())
        self.producer, self.consumer = self.open_producer(maxsize=6), self.open_consumer()
        assert self.put(3) == seqs[:1]
        assert self.take() == [3]
        assert self.dead_letters == []

    # The end

    def test_shutdown_ends_puts_and_lets_what_waits_be_taken_until_it_is_reopened(self) -> None:
        self.put(0, 1)
        self.producer.shutdown(False)
        refused(ShutDown, partial(self.put, 2))
        self.producer.close()
        refused(ShutDown, partial(self.open_producer().put, [message(2)], soon()))
        assert self.take() == [0, 1]
        refused(ShutDown, *gets(self.consumer, soon()))
        self.producer = self.open_producer(reopen=True)
        self.put(3)
        assert self.take() == [3]
        refused(Empty, *gets(self.consumer))

    def test_immediate_shutdown_removes_what_waits_and_what_is_requeued_after_it(self) -> None:
        self.put(0, 1, 2, 3, 4, size=LARGE)
        first, second, third, fourth = self.consumer.claim(4, None, NOW)
        self.settle(first, Nack(0, ""))
        self.settle(second, Nack(30, ""))
        for immediate in (True, False):  # the second changes nothing
            self.producer.shutdown(immediate)
            assert self.consumer.qsize() == 0
            refused(ShutDown, *gets(self.consumer, soon()))
            assert self.admin.stat().state == "discarded"
        assert self.load(third) == [2]
        self.settle(third, Ack())
        self.settle(fourth, Nack(0, ""))
        self.producer = self.open_producer(reopen=True)
        self.put(5)
        assert self.take() == [5]
        assert self.admin.stat().bytes == 0

    def test_join_waits_for_what_waits_is_delayed_or_in_flight_and_no_longer(self) -> None:
        assert self.join(None)
        assert self.join(NOW)
        self.put(0, 1, 2)
        began = time.monotonic()
        assert not self.join(NOW)
        assert not self.join(began + 0.05)
        assert time.monotonic() - began >= 0.05
        joins = [self.aside(self.join, None), self.aside(self.open_producer().join, soon())]
        assert self.take(2) == [0, 1]
        delivery = self.claim()
        self.settle(delivery, Nack(0.1, ""))
        assert not self.join(time.monotonic() + 0.02)
        self.settle(self.claim(), Ack())
        assert [each.result(20) for each in joins] == [True, 0]
        self.put(3)
        joining = self.aside(self.join, None)
        self.admin.purge()
        assert joining.result(20)

    def test_join_waits_for_an_item_until_it_is_a_dead_letter(self) -> None:
        self.producer = self.open_producer(max_attempts=2)
        self.put(0)
        self.settle(self.claim(), Nack(0, ""))
        joining = self.aside(self.join, None)
        last = self.claim(0.05)
        with pytest.raises(Empty):
            self.consumer.claim(1, None, time.monotonic() + 0.2)
        assert joining.result(20)
        assert self.dead_letters == [last.seq]

    def test_each_join_waits_for_what_was_put_before_it(self) -> None:
        self.put(0)
        first = self.aside(self.join, None)
        self.put(1)
        second = self.aside(self.join, None)
        self.put(2)
        assert self.take(1) == [0]
        assert first.result(20)
        assert not wait([second], 0.05).done
        assert self.take(1) == [1]
        assert second.result(20)
        assert not self.join(NOW)

    def test_join_ends_with_its_session_or_when_what_waits_is_discarded(self) -> None:
        self.put(0)
        joining = self.aside(self.join, None)
        self.open_producer().shutdown(False)
        assert not wait([joining], 0.05).done, "what waits is to be delivered"
        self.open_producer().shutdown(True)
        assert joining.result(20)
        self.producer = self.open_producer(reopen=True)
        self.put(1)
        joining = self.aside(self.join, None)
        self.producer.close()
        assert isinstance(joining.exception(20), errors.SpoolClosed)
        refused(errors.SpoolClosed, partial(self.producer.join, NOW))

    def test_reader_ends_when_the_last_writer_has_left_and_not_before_the_first_came(self) -> None:
        self.consumer = self.open_consumer("writers")
        for _ in range(2):  # the second run is like the first
            refused(Empty, *gets(self.consumer), *gets(self.consumer, time.monotonic() + 0.05))
            waiting = self.aside(self.consumer.take, 1, soon())
            producers = [self.open_producer() for _ in range(2)]
            for number, producer in enumerate(producers):
                producer.put([message(number)], NOW)
            assert list(map(number_of, waiting.result(20))) == [0]
            producers[0].close()
            assert self.take() == [1]
            refused(Empty, *gets(self.consumer))
            waiting = self.aside(self.consumer.take, 1, None)
            producers[1].close()
            assert isinstance(waiting.exception(20), ShutDown)
            refused(ShutDown, *gets(self.consumer, None), *gets(self.consumer))
            self.consumer.close()
            self.consumer = self.open_consumer("writers")

    def test_reader_ends_that_came_after_the_writer_had_left(self) -> None:
        self.put(0, 1)
        self.producer.close()
        self.consumer, late = self.open_consumer("writers"), self.open_consumer("writers")
        assert self.take() == [0, 1]
        refused(ShutDown, *gets(self.consumer, None), *gets(late, None))
        refused(Empty, *gets(self.open_consumer("writers")), *gets(self.open_consumer()))

    def test_reader_ends_after_a_writer_that_put_nothing(self) -> None:
        self.consumer = self.open_consumer("writers")
        self.open_producer().close()
        refused(ShutDown, *gets(self.consumer, None))
        self.producer = self.open_producer()
        refused(Empty, *gets(self.consumer))
        self.put(0)
        assert self.take() == [0]

    def test_writer_keeps_a_reader_from_its_end_that_was_there_before(self) -> None:
        assert self.producer.qsize() == 0
        self.consumer = self.open_consumer("writers")
        waiting = self.aside(self.consumer.claim, 1, None, None)
        self.producer.close()
        assert isinstance(waiting.exception(20), ShutDown)

    def test_reader_does_not_wait_for_what_it_has_in_flight_itself_and_shutdown_ends_it_too(self) -> None:
        self.consumer = self.open_consumer("writers")
        self.put(0)
        delivery = self.claim()
        self.producer.shutdown(False)
        refused(ShutDown, *gets(self.consumer, None))
        self.producer.close()
        refused(ShutDown, *gets(self.consumer, None))
        self.settle(delivery, Nack(0, ""))
        assert self.take() == [0]

    def test_closed_session_says_so_and_closing_again_is_harmless(self) -> None:
        self.put(0)
        calls: list[Call] = [
            *gets(self.consumer),
            partial(self.settle, self.claim(), Ack()),
            partial(self.put, 1),
        ]
        calls += [self.consumer.qsize, self.producer.qsize, self.producer.full]
        for _ in range(2):
            self.producer.close()
            self.consumer.close()
        refused(errors.SpoolClosed, *calls)


class LoanSuite(Suite):
    """The capability `Lender`."""

    SPEC = ArraySpec((LARGE,), np.dtype("f8"), "C")

    def loan(self, spec: ArraySpec = SPEC, meta: Any = None) -> engines.Loan:
        assert isinstance(self.producer, Lender)
        return self.producer.loan(spec, meta, NOW)

    @pytest.mark.parametrize("size", [1, 2, LARGE])
    def test_committed_loan_is_what_readers_get_and_a_discarded_one_is_never_seen(self, size: int) -> None:
        for _ in range(3):
            loans = [self.loan(ArraySpec((size, 2), np.dtype(">i4"), "F"), {"lent": k}) for k in range(3)]
            arrays = [loan.array for loan in loans]
            for number, array in enumerate(arrays):
                assert (array.shape, array.dtype.str, array.flags.f_contiguous) == ((size, 2), ">i4", True)
                array[:] = number
            loans[2].discard()
            assert self.consumer.qsize() == 0
            assert loans[1].commit(NOW) < loans[0].commit(NOW)
            for loan in loans:
                loan.discard()
            for number, found in zip((1, 0), self.consumer.take(9, NOW), strict=True):
                assert not arrays[number].flags.writeable
                came_as_put(found, Message((arrays[number],), None, {"lent": number}))

    def test_loan_stays_one_while_there_is_no_room_to_commit_it(self) -> None:
        self.producer = self.open_producer(maxsize=1)
        loan = self.loan()
        loan.array[:] = 1
        self.put(0)
        refused(Full, self.loan, partial(loan.commit, NOW))
        waiting = self.aside(loan.commit, soon())
        assert self.take(1) == [0]
        waiting.result(20)
        assert self.take() == [1]

    def test_loan_is_refused_where_a_put_would_be(self) -> None:
        self.producer = self.open_producer(max_bytes=100_000)
        small = self.SPEC._replace(shape=(3,))
        loans = [self.loan(small), self.loan(small)]
        refused(errors.TooLarge, self.loan)
        refused(errors.UnsupportedArray, partial(self.loan, small._replace(dtype=np.dtype("O"))))
        refused((TypeError, ValueError), partial(self.loan, small, {1}))
        self.producer.shutdown(False)
        refused(ShutDown, partial(self.loan, small), partial(loans[0].commit, NOW))
        loans[0].array[:] = 1  # it is a loan still
        self.producer.close()
        refused(errors.SpoolClosed, partial(loans[1].commit, NOW))
        for loan in loans:
            loan.discard()
        assert self.consumer.qsize() == 0

    def test_what_can_never_fit_is_too_large_and_no_memory_is_asked_for(self) -> None:
        shape = (2**50,)
        put = Message((np.broadcast_to(np.zeros(1), shape),))
        for _ in range(2):
            refused(errors.TooLarge, partial(self.loan, self.SPEC._replace(shape=shape)))
            refused(errors.TooLarge, partial(self.producer.put, [put], NOW))
            self.go_on()


class PreallocateSuite(Suite):
    """The capability `Preallocator`."""

    def test_what_was_made_ahead_takes_what_is_put(self) -> None:
        assert isinstance(self.producer, Preallocator)
        self.producer.preallocate(3, LARGE * 8)
        assert self.producer.qsize() == 0
        self.put(*range(5), size=LARGE)
        assert self.take() == [0, 1, 2, 3, 4]
        for wrong in ((-1, 8), (1, -8)):
            refused(ValueError, partial(self.producer.preallocate, *wrong))


class RestoreSuite(Suite):
    """The capability `Restorer`."""

    @pytest.mark.parametrize("start", [0, 1])
    @SIZES
    def test_what_is_put_back_waits_in_its_place_as_if_never_taken(self, size: int, start: int) -> None:
        assert isinstance(self.consumer, engines.Restorer)
        self.put(*range(5), size=size)
        self.settle(self.claim(), Nack(0, ""))
        taken = self.consumer.take(4, NOW)
        for _ in range(2):
            self.consumer.put_back(taken, start)
            found = self.admin.stat()
            assert (found.depth, found.gets) in ((5 - start, start), (5 - start, None))
        for _ in range(3):
            self.consumer.put_back(self.consumer.take(1, NOW))
        claimed = [self.claim() for _ in range(start, 5)]
        assert self.load(*claimed) == [*range(start, 5)]
        assert [delivery.attempt for delivery in claimed] == [2, 1, 1, 1, 1][start:]

    @SIZES
    def test_what_was_put_back_and_taken_again_can_be_put_back_again(self, size: int) -> None:
        assert isinstance(self.consumer, engines.Restorer)
        self.put(0, 1, 2, size=size)
        shown = self.consumer.take(1, NOW, kept=True)
        self.consumer.put_back(shown)
        again = self.consumer.take(1, NOW, kept=True)
        del shown
        assert self.take(1) == [1]
        self.consumer.put_back(again)
        assert self.take() == [0, 2]


class WatchSuite(Suite):
    """The capability `Watchable`."""

    @pytest.mark.parametrize("kind", ["items", "space"])
    def test_armed_watch_is_told_when_another_try_may_help(self, kind: str) -> None:
        self.producer = self.open_producer(maxsize=1)
        session: Any = self.consumer if kind == "items" else self.producer
        calls: list[Call] = [partial(self.put, 0), self.take]
        news, undo = calls if kind == "items" else calls[::-1]
        told = threading.Event()
        watch = session.watch(told.set, message(0) if kind == "space" else None)
        assert session.briefly(session.qsize) == 0
        if kind == "space":
            undo()
        for _ in range(3):
            assert watch.arm() > 0
            told.clear()
            news()
            if watch.fileno() >= 0 and not told.is_set():
                assert select.select([watch], [], [], 20)[0], "nobody was woken"
                watch.drain()
            assert told.wait(20)
            assert watch.arm() == 0
            undo()
        told.clear()
        session.close()
        assert told.wait(20)
        refused(errors.SpoolClosed, watch.arm)
        for _ in range(2):
            watch.close()

    def test_watch_arms_again_when_a_delay_ends(self) -> None:
        assert isinstance(self.consumer, Watchable)
        self.put(0, 1)
        late, delivery = self.claim(), self.claim()
        self.settle(late, Nack(30, ""))
        with closing(self.consumer.watch(lambda: None)) as watch:
            assert 0 < watch.arm() <= 30
            self.settle(delivery, Nack(0.2, ""))
            while seconds := watch.arm():
                assert seconds <= 0.2
                time.sleep(seconds)
        assert self.take() == [1]


class DamageSuite(Suite):
    """What an engine does that finds an item damaged."""

    def damage(self, seq: int) -> None:
        """Spoil the stored item `seq` of the spool at `self.place`, so that it can be seen."""
        raise NotImplementedError

    @pytest.mark.parametrize("look", ["take", "peek", "load", "describe"])
    @SIZES
    def test_damaged_item_is_a_dead_letter_and_the_next_one_is_delivered(self, look: str, size: int) -> None:
        damaged, whole = self.put(0, 1, size=size)
        if look in ("load", "describe"):
            delivery = self.claim()
            self.damage(damaged)
            refused(errors.BadItem, partial(getattr(self.consumer, look), delivery))
            refused(LeaseExpired, lambda: self.settle(delivery, Ack()))
        else:
            self.damage(damaged)
        assert look != "peek" or self.consumer.peek(NOW).seq == whole
        assert self.take() == [1]
        (letter,) = self.admin.failed_list()
        assert (letter.seq, bool(letter.damage)) == (damaged, True)
        assert list(self.admin.failed_retry(None).damaged) == [damaged]


class OtherProcess(SharedSuite):
    """The tests with two readers, the second in a process of its own."""

    @cached_property
    def other(self) -> Consumer:
        return cast(Consumer, self.opened.enter_context(closing(Remote(self.engine(self.place)))))


class ProcessSuite(Suite):
    """For engines that cross processes: readers that are killed."""

    def test_item_in_flight_at_a_killed_reader_is_redelivered_until_its_last_attempt(self) -> None:
        self.producer = self.open_producer(max_attempts=3)
        (killing,) = self.put(0)
        for attempt in (1, 2, 3):
            reader = Remote(self.engine(self.place))
            (delivery,) = reader.claim(1, None, soon())
            assert (delivery.seq, delivery.attempt) == (killing, attempt)
            reader.kill()
        (harmless,) = self.put(1)
        assert self.claim().seq == harmless
        deadline = soon()
        while self.dead_letters != [killing]:  # an engine may see a death some seconds later
            assert time.monotonic() < deadline
            refused(Empty, partial(self.consumer.claim, 1, None, time.monotonic() + 0.1))


class Remote:
    """A consumer in a process of its own: what is asked of it is done there, by `served`."""

    def __init__(self, engine: Engine) -> None:
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), serve, (engine,))
        self._pid = self._process.submit(os.getpid).result(30)

    def __getattr__(self, name: str) -> Call:
        return partial(self._ask, name)

    def _ask(self, name: str, *args: Any) -> Any:
        return self._process.submit(served, name, *args).result(30)

    def close(self) -> None:
        self._ask("close")
        self._process.shutdown()

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self._process.shutdown()


_there: dict[str, Any] = {}
"""In the process of a `Remote`: its consumer, and the handles of its deliveries, which stay there."""


def serve(engine: Engine) -> None:
    """Open a consumer in this process."""
    _there.update(consumer=engine.consumer(engines.ConsumerOptions()), handles={})


def served(name: str, *args: Any) -> Any:
    """What the consumer of this process returns."""
    handles = _there["handles"]
    for each in args[0] if name == "settle" else args:
        if isinstance(each, Delivery):
            each.handle = handles[each.seq, each.attempt]
    found = getattr(_there["consumer"], name)(*args)
    if name != "claim":
        return found
    handles.update({(each.seq, each.attempt): each.handle for each in found})
    return [replace(each, handle=None) for each in found]
