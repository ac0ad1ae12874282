"""What only the engine of one process promises; the rest is the suite of engines."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import pytest

from spoolipc import memory
from spoolipc.engine import ConsumerOptions, ProducerOptions
from spoolipc.errors import (
    AlreadySettled,
    Empty,
    LimitMismatch,
    NotASpool,
    ReentrantCall,
    ShutDown,
    SpoolInUse,
    UnsupportedOperation,
)
from spoolipc.memory import MemoryEngine
from spoolipc.message import NOW, Ack, ArraySpec, Limits, Message, Nack, Verdict


@pytest.fixture
def engine() -> Iterator[MemoryEngine]:
    yield MemoryEngine("unit")
    memory.clear("unit")


def amid(line: int, call: Callable[[], object], act: Callable[[], object]) -> bool:
    """Make a call, and another one when it has come to so many lines of the engine; false where it has not so many."""
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if "/spoolipc/memory/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                sys.settrace(None)
                act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines == line


def test_spool_lives_until_it_is_cleared_and_open_sessions_keep_it(engine: MemoryEngine) -> None:
    for number in range(2):
        producer = engine.producer(ProducerOptions())
        assert producer.put([Message((np.full(1, number),))], NOW) == [number + 1]
        producer.close()
    old = engine.consumer(ConsumerOptions())
    memory.clear("unit")
    memory.clear("unit")
    with pytest.raises(NotASpool):
        engine.admin()
    with pytest.raises(Empty):
        engine.consumer(ConsumerOptions()).take(1, NOW)
    assert len(old.take(9, NOW)) == 2


@pytest.mark.parametrize("create", [True, False])
def test_who_opens_a_spool_as_it_is_removed_has_the_one_that_others_open(
    engine: MemoryEngine, create: bool
) -> None:
    def join() -> None:
        with suppress(NotASpool):
            joined.append(engine.consumer(ConsumerOptions(create=create)))

    def remove() -> None:
        with suppress(NotASpool, SpoolInUse, ReentrantCall):
            engine.admin().remove()

    line, joined = 0, list[memory.Consumer]()
    engine.producer(ProducerOptions()).close()
    while amid(line := line + 1, join, remove):
        assert joined or not create
        producer = engine.producer(ProducerOptions())
        producer.put([Message((np.zeros(1),))], NOW)
        for consumer in joined:
            consumer.take(1, NOW)
            consumer.close()
        joined.clear()
        producer.close()
    assert line > 5


def test_spool_that_came_in_the_place_of_another_is_not_removed_as_that(engine: MemoryEngine) -> None:
    engine.producer(ProducerOptions()).close()
    old = engine.admin()
    memory.clear("unit")
    producer = engine.producer(ProducerOptions())
    old.remove()
    assert engine.admin().stat().live_sessions == 1
    producer.close()


def test_errors_say_what_to_do_and_who_is_there(engine: MemoryEngine) -> None:
    producer, consumer = (
        engine.producer(ProducerOptions(Limits(maxsize=2))),
        engine.consumer(ConsumerOptions()),
    )
    with pytest.raises(
        LimitMismatch, match=r"or change it \(spoolipc\.set_limits\('memory://.*', maxsize=3\)\)"
    ):
        engine.producer(ProducerOptions(Limits(maxsize=3)))
    with pytest.raises(SpoolInUse, match=r"is in use: it has another writer$"):
        engine.producer(ProducerOptions(fresh=True))
    producer.put([Message((np.zeros(3),))], NOW)
    deliveries = consumer.claim(1, None, NOW)
    producer.close()
    with pytest.raises(SpoolInUse, match=r"is in use: items in flight at readers: 1$"):
        engine.producer(ProducerOptions(fresh=True))
    consumer.settle(deliveries, Ack())


def test_durability_is_refused(engine: MemoryEngine) -> None:
    with pytest.raises(ValueError, match="durability"):
        engine.producer(ProducerOptions(durability="fsync"))


def test_delivered_array_is_the_memory_lent_and_read_only(engine: MemoryEngine) -> None:
    producer, consumer = engine.producer(ProducerOptions()), engine.consumer(ConsumerOptions())
    loan = producer.loan(ArraySpec((3,), np.dtype("i4"), "C"), None, NOW)
    loan.array[:] = 7
    loan.commit(NOW)
    with pytest.raises(AlreadySettled):
        loan.commit(NOW)
    (delivery,) = consumer.claim(1, None, NOW)
    (array,) = consumer.load(delivery).arrays
    assert np.shares_memory(array, loan.array)
    assert not array.flags.writeable
    consumer.settle([delivery], Ack())
    assert array.tolist() == [7, 7, 7]


@pytest.mark.filterwarnings("ignore:.*dropped unsettled:ResourceWarning")
def test_call_amid_another_of_the_same_thread_is_done_or_refused(engine: MemoryEngine) -> None:
    """As a signal handler makes it, between any two lines of the engine."""
    producer, consumer = engine.producer(ProducerOptions()), engine.consumer(ConsumerOptions())
    put, taken, refused = list[int](), list[Message](), 0

    def use(verdict: Verdict) -> None:
        put.extend(producer.put([Message((np.zeros(1),))] * 2, NOW))
        taken.extend(consumer.take(1, NOW))
        deliveries = consumer.claim(1, None, NOW)
        loaded = consumer.load(deliveries[0])
        consumer.settle(deliveries, verdict)
        if isinstance(verdict, Ack):
            taken.append(loaded)

    def meanwhile() -> None:
        nonlocal refused
        try:
            use(Nack(0, ""))
        except ReentrantCall:
            refused += 1

    line = 1
    while amid(line, partial(use, Ack()), meanwhile):
        line += 1
    assert 20 < refused < line
    assert consumer.qsize() == len(put) - len(taken)


def test_writer_that_was_dropped_unclosed_has_left(engine: MemoryEngine) -> None:
    consumer = engine.consumer(ConsumerOptions(end="writers"))
    producer = engine.producer(ProducerOptions())
    with pytest.raises(Empty):
        consumer.take(1, time.monotonic() + 0.01)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(consumer.take, 1, None)
        producer.put([Message((np.zeros(1),))], NOW)
        assert waiting.result(20)
        waiting = pool.submit(consumer.take, 1, None)
        del producer
        gc.collect()
        assert isinstance(waiting.exception(20), ShutDown)


def test_stat_tells_the_age_of_the_next_item_and_no_files(engine: MemoryEngine) -> None:
    engine.producer(ProducerOptions()).put([Message((np.zeros(1),))], NOW)
    time.sleep(0.01)
    found = engine.admin().stat()
    assert found.oldest_age is not None
    assert found.oldest_age >= 0.01
    assert (found.file_system, found.in_memory, found.waiting_mode) == ("memory", True, "condition")


def test_forked_child_is_refused_what_nobody_else_would_see(engine: MemoryEngine) -> None:
    producer, consumer = engine.producer(ProducerOptions()), engine.consumer(ConsumerOptions())
    producer.put([Message((np.zeros(1),))], NOW)
    child = os.fork()
    if not child:
        refused = 0
        try:
            for use in (
                lambda: producer.put([Message((np.ones(1),))], NOW),
                lambda: consumer.take(9, NOW),
                engine.admin().stat,
                lambda: engine.consumer(ConsumerOptions()),
            ):
                with suppress(UnsupportedOperation):
                    use()
                    break
                refused += 1
        finally:
            os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    assert len(consumer.take(9, NOW)) == 1
