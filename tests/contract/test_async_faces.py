"""The faces for asyncio pass the suite of engines: each operation is a call of a face, in a loop of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import pytest

from spoolipc import memory
from spoolipc.aio import AsyncItem, AsyncSpoolReader, AsyncSpoolWriter
from spoolipc.connect import connect
from spoolipc.engine import Admin, ConsumerOptions, Engine, ProducerOptions
from spoolipc.errors import Empty, ShutDown
from spoolipc.message import NOW, Deadline, Delivery, Message, Verdict
from spoolipc.testing import EngineSuite

T = TypeVar("T")


def run(call: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(call)


class Side:
    """What the suite asks of either side; `face` is a writer or a reader."""

    face: Any

    @property
    def path(self) -> str:
        return str(self.face.path)

    @property
    def maxsize(self) -> int:
        return int(self.face.maxsize)

    def qsize(self) -> int:
        return int(self.face.qsize())

    def close(self) -> None:
        run(self.face.close())


class Producer(Side):
    def __init__(self, path: str, options: ProducerOptions) -> None:
        given = {each.name: getattr(options, each.name) for each in fields(options)}
        self.face: AsyncSpoolWriter = AsyncSpoolWriter(path, **given)

    def put(self, messages: Sequence[Message], until: Deadline) -> list[int]:
        return run(self.face._put(list(messages), until))

    def full(self) -> bool:
        return self.face.full()

    def join(self, until: Deadline, last: int = 0) -> int:
        left = None if until is None else max(0.0, until - time.monotonic())
        return not run(self.face.join(left))

    def shutdown(self, immediate: bool) -> None:
        run(self.face.shutdown(immediate))


class Consumer(Side):
    def __init__(self, path: str, options: ConsumerOptions) -> None:
        given = {each.name: getattr(options, each.name) for each in fields(options) if each.name != "values"}
        self.face: AsyncSpoolReader = AsyncSpoolReader(path, **given)

    def take(self, limit: int, until: Deadline, writable: bool = False, kept: bool = False) -> list[Message]:
        return run(self.face._take(limit, until, "on-write" if writable else False, lambda message: message))

    def claim(self, limit: int, lease: float | None, until: Deadline) -> list[Delivery]:
        self.face._reader._lease = lease
        found = [run(self.face._receive(until, False))._delivery]
        with suppress(Empty, ShutDown):
            while len(found) < limit:
                found.append(run(self.face._receive(NOW, False))._delivery)
        return found

    def load(self, delivery: Delivery, writable: bool = False) -> Message:
        return self.item(delivery, writable)._load()

    def describe(self, delivery: Delivery) -> Any:
        return self.item(delivery)._describe()

    def settle(self, deliveries: Sequence[Delivery], verdict: Verdict) -> None:
        for delivery in deliveries:
            settle: Any = getattr(self.item(delivery), type(verdict).__name__.lower())
            run(settle(*verdict))

    def item(self, delivery: Delivery, writable: bool = False) -> AsyncItem:
        return AsyncItem(self.face, delivery, "on-write" if writable else False)

    def peek(self, until: Deadline) -> Any:
        return run(self.face._until(until, partial(self.face._reader._consumer.peek, NOW)))


class Faces:
    """The faces of a spool, as an engine."""

    crosses_processes = False

    def __init__(self, path: str) -> None:
        self.path = path

    def producer(self, options: ProducerOptions) -> Producer:
        return Producer(self.path, options)

    def consumer(self, options: ConsumerOptions) -> Consumer:
        return Consumer(self.path, options)

    def admin(self) -> Admin:
        return connect(self.path).admin()


@pytest.mark.usefixtures("look_often")
class TestAsyncFacesOfADirectory(EngineSuite):
    looks = 0.2

    def engine(self, place: str) -> Engine:
        return Faces(place)


class TestAsyncFacesInMemory(EngineSuite):
    looks = 0.1

    @pytest.fixture(autouse=True)
    def _clear(self) -> Iterator[None]:
        yield
        memory.clear(self.place)

    def engine(self, place: str) -> Engine:
        return Faces(f"memory://{place}")
