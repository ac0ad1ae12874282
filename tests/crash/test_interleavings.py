"""Whatever another session does between two calls of an operation, nothing is lost, nothing is delivered twice.

Before each call of each operation another session acts, unless the lock keeps it out, as it would wait then.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from support.account import check_spool
from support.faults import Event, Injector
from support.scenarios import arrays, value_of
from support.waits import is_locked

import spoolipc
from spoolipc import Empty, LeaseExpired, SpoolReader, SpoolWriter


class Book:
    """A spool that has been in use, and what was put into it and got from it so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.put: list[int] = []
        self.got: list[int] = []
        self.writer, self.reader = SpoolWriter(path), SpoolReader(path)
        for kind in ("large", "small") * 3:
            self.add(self.writer, kind)
        self.take(self.reader)
        self.take(self.reader)

    def add(self, writer: SpoolWriter, *kinds: str) -> None:
        values = [len(self.put) + number for number in range(len(kinds))]
        self.put += values
        writer.put_many([arrays(value, kind) for value, kind in zip(values, kinds, strict=True)])

    def take(self, reader: SpoolReader, limit: int = 1) -> None:
        with suppress(Empty):
            self.got += map(value_of, reader.get_many(limit, block=False))

    def lend(self) -> None:
        value = len(self.put)
        self.put.append(value)
        with self.writer.loan((100, 80), "f8") as array:
            array[...] = value

    def receive(self, *, done: bool) -> None:
        with suppress(LeaseExpired):  # when the index was lost: then it is delivered again
            item = self.reader.receive(block=False)
            value = value_of(item.array)
            if done:
                item.ack()
                self.got.append(value)
            else:
                item.nack()


def put(book: Book) -> None:
    with SpoolWriter(book.path) as writer:
        book.add(writer, "large")
        book.add(writer, "small")


def get(book: Book) -> None:
    with SpoolReader(book.path) as reader:
        book.take(reader)
        book.take(reader)


def collect(book: Book) -> None:
    spoolipc.gc(book.path)


def lose_the_index(book: Book) -> None:
    (book.path / "index").unlink()
    SpoolReader(book.path).close()


OPERATIONS: dict[str, Callable[[Book], object]] = {
    "put_small": lambda book: book.add(book.writer, "small"),
    "put_large": lambda book: book.add(book.writer, "large"),
    "put_a_batch": lambda book: book.add(book.writer, "small", "large", "small", "large"),
    "loan": Book.lend,
    "get": lambda book: book.take(book.reader),
    "get_a_batch": lambda book: book.take(book.reader, 3),
    "receive_and_acknowledge": lambda book: book.receive(done=True),
    "receive_and_requeue": lambda book: book.receive(done=False),
    "peek": lambda book: book.reader.peek(block=False),
    "open": put,
    "gc": collect,
    "fsck": lambda book: spoolipc.fsck(book.path, repair=True),
}


@pytest.mark.parametrize("other", [put, get, collect, lose_the_index])
@pytest.mark.parametrize("name", OPERATIONS)
def test_another_session_acts_between_any_two_calls(
    place: Path, name: str, other: Callable[[Book], None]
) -> None:
    path, number, acted = place / "spool", 0, 0
    while True:
        number += 1
        book = Book(path)

        def act(event: Event, book: Book = book, number: int = number) -> None:
            nonlocal acted
            if event.number == number and not is_locked(path):
                acted += 1
                other(book)

        with Injector(act) as injector:
            OPERATIONS[name](book)
        with SpoolReader(path) as rest:
            while rest.qsize():
                book.take(rest)
        assert sorted(book.got) == book.put, f"at call {number}"
        book.writer.close()
        book.reader.close()
        spoolipc.gc(path)
        check_spool(path)
        shutil.rmtree(path)
        if number > len(injector.met):
            break
    assert acted


def test_peek_tells_of_no_other_item_though_the_file_is_written_again(place: Path) -> None:
    path, number, told = place / "spool", 0, set()
    while True:
        number += 1
        with SpoolWriter(path) as writer, SpoolReader(path) as reader, SpoolReader(path) as peeking:
            seqs = [writer.put(arrays(0, "small"), meta=seq) for seq in (1, 2)]

            def act(
                event: Event, number: int = number, both: tuple[SpoolWriter, SpoolReader] = (writer, reader)
            ) -> None:
                if event.number == number and not is_locked(path):
                    both[1].get_nowait()
                    both[0].put(arrays(0, "small"), meta=3)

            with Injector(act) as injector:
                seen = peeking.peek(block=False)
        assert seen.meta == seen.seq, f"at call {number}"
        told.add(seen.seq)
        shutil.rmtree(path)
        if number > len(injector.met):
            break
    assert seqs == [1, 2]
    assert told == {1, 2}
