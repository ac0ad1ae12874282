"""Threads may share a writer and a reader: every item arrives once and whole, and each thread's in its order."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support.calls import Call
from support.faults import Event, Injector

from spoolipc import AlreadySettled, Empty, LeaseExpired, ShutDown, SpoolClosed, SpoolReader, SpoolWriter
from spoolipc.directory import fs
from spoolipc.directory.session import Side

THREADS = 8
"""On each side."""
ITEMS = 150
"""Of each thread."""
LARGE = 5000


def test_threads_that_share_a_writer_and_a_reader_put_and_get_as_processes_would(spool: Path) -> None:
    """Each way to put, and each to get; half of the items are given out as views, which are looked at again later."""

    def numbered(thread: int, number: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.full(LARGE if number % 2 else 10, thread * ITEMS + number, dtype=float)

    with (
        SpoolWriter(spool, maxsize=20) as writer,
        SpoolReader(spool) as reader,
        ThreadPoolExecutor(2 * THREADS) as threads,
    ):

        def putting(thread: int) -> None:
            for number in range(ITEMS):
                array = numbered(thread, number)
                if thread % 3 == 0:
                    writer.put(array)
                elif thread % 3 == 1:
                    writer.put_many([array])
                else:
                    with writer.loan(array.shape, array.dtype) as lent:
                        lent[:] = array

        def getting(thread: int) -> list[float]:
            found: list[float] = []
            kept = []
            with contextlib.suppress(ShutDown):
                while True:
                    if thread % 3 == 0:
                        array = reader.get()
                    elif thread % 3 == 1:
                        (array,) = reader.get_many(1)
                    else:
                        with reader.receive() as item:
                            array = item.array
                        del item
                    found.append(array[0])
                    kept.append(array)
                    if len(kept) > thread:
                        view = kept.pop(0)
                        assert (view == found[-1 - len(kept)]).all()
            return found

        getters = [threads.submit(getting, thread) for thread in range(THREADS)]
        try:
            list(threads.map(putting, range(THREADS)))
        finally:
            writer.shutdown()
        found = [getter.result(60) for getter in getters]
    assert sorted(value for each in found for value in each) == list(range(THREADS * ITEMS))
    for each in found:
        for thread in range(THREADS):
            mine = [value for value in each if value // ITEMS == thread]
            assert mine == sorted(mine)


@pytest.mark.parametrize("what", ["looks, drops", "looks, keeps", "acknowledges"])
def test_array_of_an_item_that_another_thread_uses_at_once_stays_as_it_is(spool: Path, what: str) -> None:
    """The other one does so between each two lines of what gives the first the array."""
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        for line in range(1000):
            writer.put(np.full(LARGE, line))
            item = reader.receive()
            arrays: list[Any] = []
            look = partial(getattr, item, "array")
            other = item.ack if what == "acknowledges" else look
            with contextlib.suppress(LeaseExpired):
                if not at_once(look, line, other, arrays):
                    break
            if not item.settled:
                item.ack()
            del item, look, other
            array = arrays.pop(-1 if what == "looks, keeps" else 0)
            arrays.clear()
            for _ in range(3):
                writer.put_many([np.full(LARGE, -1)] * 3)
                reader.get_many(3)
            assert array is None or (array == line).all()  # None where it was acknowledged before
    assert line > 20


def test_item_that_another_thread_acknowledges_as_its_lease_is_extended_is_settled(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    """The other one does so between each two lines of the extension, which may be told so."""
    for line in range(1000):
        writer.put(np.zeros(3))
        item = reader.receive()
        with contextlib.suppress(AlreadySettled):
            if not at_once(partial(item.extend, 60), line, item.ack, []):
                break
        assert item.settled, line
    item.ack()
    assert line > 20


class Late(list[None]):
    """The users of a session that another thread closes when one has seen it open, and is not among them yet, or just
    is."""

    def __init__(self, close: Callable[[], object], is_in: bool = False) -> None:
        super().__init__()
        self._close, self._is_in = close, is_in

    def append(self, user: None) -> None:
        if self._is_in:
            super().append(user)
        self._close()
        if not self._is_in:
            super().append(user)


def test_call_that_ends_as_another_thread_closes_leaves_that_its_descriptors(
    writer: SpoolWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, begun, amid = writer._producer, threading.Event(), threading.Event()
    assert isinstance(side, Side)
    fstat, unlock = fs.fstat, fs.unlock

    def fstat_later(fd: int) -> os.stat_result:
        status = fstat(fd)
        begun.set()
        amid.wait()
        return status

    def unlock_later(fd: int) -> None:
        if not side.session.is_open:
            amid.set()
            other.join()
        unlock(fd)

    monkeypatch.setattr(fs, "fstat", fstat_later)
    other = threading.Thread(target=writer.full)
    other.start()
    begun.wait()
    monkeypatch.setattr(fs, "fstat", fstat)
    monkeypatch.setattr(fs, "unlock", unlock_later)
    writer.close()
    assert amid.is_set()
    assert not side.session._held


def test_put_that_begins_as_another_thread_closes_uses_no_descriptor_that_was_closed(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    for _ in range(2):
        writer.put(np.zeros(10))
    reader.get()
    writer.put(np.zeros(10))  # into the one consumed file: the next makes one, and looks at nothing before
    side = writer._producer
    assert isinstance(side, Side)
    side.session.users = Late(side.close)
    side.session.on_adopt.clear()  # the last that a close does; it has not come to that
    with Injector() as calls, pytest.raises(SpoolClosed):
        writer.put(np.zeros(10))
    assert calls.met[-1] == "close"


def test_session_closed_amid_a_call_has_no_descriptor_when_that_has_ended(spool: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    reader = SpoolReader(spool)
    side = reader._consumer
    assert isinstance(side, Side)
    side.session.users = Late(side.close, is_in=True)
    with Injector() as calls, pytest.raises(SpoolClosed):
        reader.get()
    assert calls.met[-7:] == ["close"] * 7
    assert len(os.listdir("/proc/self/fd")) == before


def test_file_that_a_thread_fills_is_not_taken_for_one_that_another_lost(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    writer.put_many([np.ones(LARGE)] * 5)
    reader.get_many(5)
    with pytest.raises(Empty):
        reader.get_nowait()  # and all files are in the pool
    others: list[threading.Thread] = []

    def meanwhile(event: Event, _: object) -> None:
        if event.name == "stat_at" and not others:
            writer._producer._recycler.has_strays = True  # type: ignore[attr-defined]  # as an interrupted put leaves it
            others.append(threading.Thread(target=writer.put, args=(np.full(LARGE, 2.0),)))
            others[0].start()
            others[0].join()

    with Injector(after=meanwhile):
        writer.put(np.ones(LARGE))
    assert [set(array) for array in reader.get_many(2)] == [{2.0}, {1.0}]


def at_once(call: Callable[[], Any], line: int, other: Callable[[], Any], results: list[Any]) -> bool:
    """Make a call, and another in a thread when the first is at a line of the package; false when it has not so many.

    results: takes what they return, that of the first first.
    """
    lines, begun = 0, list[Call]()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if "/spoolipc/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            if lines == line:
                sys.settrace(None)
                begun.append(Call(other))
                begun[0].until_asleep_or_done()  # it may wait for the first
            lines += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        results.insert(0, call())
    finally:
        sys.settrace(before)
        results += [each.result() for each in begun]
    return bool(begun)
