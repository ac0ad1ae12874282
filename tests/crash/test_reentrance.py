"""A signal handler or a collection that comes amid a call may call the same objects: it is done, or refused at once.

Nothing waits for itself, nobody else's lock times out, and what was interrupted goes on as if nothing had come between.
"""

from __future__ import annotations

import gc
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.account import check_spool
from support.faults import Injector, at, forked, interrupted_at
from support.waits import is_locked

import spoolipc
from spoolipc import (
    AlreadySettled,
    Empty,
    LeaseExpired,
    ReentrantCall,
    ShutDown,
    SpoolClosed,
    SpoolReader,
    SpoolWriter,
    stat,
)

PACKAGE = str(Path(spoolipc.__file__).parent)
SIZE = 5000
"""Of float64: 40 KB, which is given out as a view of the file."""


OVERTAKEN = (Empty, ShutDown, SpoolClosed, AlreadySettled, LeaseExpired)
"""What a call may raise that a handler came amid, or the handler."""


class Scene:
    """A writer and a reader of one spool, in which items wait and one is in flight."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer, self.reader = SpoolWriter(path), SpoolReader(path)
        for number in range(6):
            self.writer.put(np.full(SIZE, number))
        self.item: Any = self.reader.receive()
        self.array: Any = self.item.array

    def close(self) -> None:
        self.writer.close()
        self.reader.close()
        SpoolReader(self.path).close()  # finds the sessions that were collected crashed
        check_spool(self.path)
        now = stat(self.path)
        assert (now.in_flight, now.pinned_files) == (0, 0)


def a_loop_over_items(scene: Scene) -> Any:
    items = scene.reader.items()
    return items, next(items)


def a_loan(scene: Scene) -> Any:
    loan = scene.writer.loan(SIZE)
    return loan, loan.__enter__()


def a_reader(scene: Scene) -> Any:
    def reading() -> Iterator[Any]:
        with SpoolReader(scene.path) as reader:
            yield from reader

    arrays = reading()
    return arrays, next(arrays)


AMID: dict[str, Callable[[Scene], Any]] = {
    "put": lambda scene: scene.writer.put(np.full(SIZE, 6)),
    "put_small": lambda scene: scene.writer.put(np.full(3, 6)),
    "get": lambda scene: scene.reader.get_nowait(),
    "receive": lambda scene: scene.reader.receive(),
    "ack": lambda scene: scene.item.ack(),
    "nack": lambda scene: scene.item.nack(),
    "loan": lambda scene: a_loan(scene)[0].__exit__(None, None, None),
    "stat": lambda scene: stat(scene.path),
}
EACH = [pytest.param(name, marks=[] if name in ("put", "get") else pytest.mark.exhaustive) for name in AMID]
HANDLERS: dict[str, Callable[[Scene], object]] = {
    "put": lambda scene: scene.writer.put(np.full(3, 7)),
    "get": lambda scene: scene.reader.get_nowait(),
    "receive": lambda scene: scene.reader.receive().ack(),
    "ack": lambda scene: scene.item.ack(),
    "nack": lambda scene: scene.item.nack(),
    "shutdown": lambda scene: scene.writer.shutdown(),
    "shutdown_immediately": lambda scene: scene.writer.shutdown(immediate=True),
    "close": lambda scene: [side.close() for side in (scene.writer, scene.reader)],
    "stat": lambda scene: stat(scene.path),
    "open": lambda scene: SpoolWriter(scene.path).close(),
}


def amid_each_call(
    place: Path,
    amid: str,
    act: Callable[[Scene], object],
    check: Callable[[Scene], object],
    prepare: Callable[[Scene], object] = lambda _: None,
) -> None:
    """Do `act` amid each system call of an operation in turn, each time on a new spool, and check what it left."""
    calls, number = ["first"], 1
    while number <= len(calls):
        scene = Scene(place / str(number))
        prepare(scene)
        injector = Injector(at(number, lambda _, scene=scene: act(scene)))  # type: ignore[misc]
        try:
            with injector, suppress(*OVERTAKEN):
                AMID[amid](scene)
            calls = injector.met
            if number <= len(calls):
                check(scene)
            assert not is_locked(scene.path)
            scene.close()
        except BaseException as failure:
            failure.add_note(f"amid {amid}, at call {number}: {injector.met[number - 1 :][:1]}")
            raise
        number += 1


@pytest.mark.parametrize("name", HANDLERS)
@pytest.mark.parametrize("amid", EACH)
def test_a_handler_amid_any_call_is_done_or_refused_at_once(place: Path, amid: str, name: str) -> None:
    def handle(scene: Scene) -> None:
        with suppress(ReentrantCall, *OVERTAKEN):
            HANDLERS[name](scene)

    def check(scene: Scene) -> None:
        if name.startswith("shutdown"):
            assert stat(scene.path).state != "open"
        if name == "close":
            for act in (scene.reader.get_nowait, scene.writer.shutdown):
                with pytest.raises(SpoolClosed):
                    act()

    forked(lambda: amid_each_call(place, amid, handle, check))


@pytest.mark.parametrize("abandoned", [a_loop_over_items, a_loan, a_reader])
@pytest.mark.parametrize("amid", EACH)
def test_a_collection_amid_any_call_closes_what_was_abandoned(
    place: Path, amid: str, abandoned: Callable[[Scene], Any]
) -> None:
    box: list[Any] = []

    def prepare(scene: Scene) -> None:
        box[:] = [[abandoned(scene)]]
        box[0].append(box[0])

    def collect(_: Scene) -> None:
        box.clear()
        gc.collect()

    def check(scene: Scene) -> None:
        with suppress(*OVERTAKEN):
            scene.item.ack()
        scene.item = scene.array = None
        scene.writer.put(np.zeros(3))
        scene.reader.get_nowait()

    def work() -> None:
        gc.disable()
        amid_each_call(place, amid, collect, check, prepare)

    forked(work)


@pytest.mark.exhaustive
@pytest.mark.parametrize("amid", AMID)
def test_a_handler_wherever_a_signal_can_come_is_done_or_refused_at_once(place: Path, amid: str) -> None:
    """It puts, gets, receives and settles."""

    def handle(scene: Scene) -> None:
        for name in ("put", "get", "receive", "ack", "stat"):
            with suppress(ReentrantCall, *OVERTAKEN):
                HANDLERS[name](scene)

    number, places = 0, 1
    while number <= places:
        scene = Scene(place / str(number))
        act = partial(handle, scene)
        try:
            with interrupted_at(number, PACKAGE, act) as met, suppress(*OVERTAKEN):
                AMID[amid](scene)
            places = max(places, met())
            assert not is_locked(scene.path)
            scene.close()
        except BaseException as failure:
            failure.add_note(f"amid {amid}, at place {number}")
            raise
        shutil.rmtree(scene.path)
        number += 1
    assert places > 50


def test_handlers_that_put_and_get_all_the_time(place: Path) -> None:
    """By real signals, wherever they come."""

    def work() -> None:
        path = place / "spool"
        put = got = 0
        with SpoolWriter(path) as writer, SpoolReader(path) as reader:

            def handle(*_: object) -> None:
                nonlocal put, got
                with suppress(ReentrantCall):
                    writer.put(np.zeros(3))
                    put += 1
                with suppress(ReentrantCall, Empty):
                    reader.get_nowait()
                    got += 1

            signal.signal(signal.SIGPROF, handle)
            for number in range(1000):
                signal.setitimer(signal.ITIMER_PROF, number % 50 * 20e-6)
                writer.put(np.zeros(SIZE if number % 2 else 3))
                put += 1
                with suppress(Empty):
                    reader.get_nowait()
                    got += 1
            signal.setitimer(signal.ITIMER_PROF, 0)
            with suppress(Empty):
                while True:
                    reader.get_nowait()
                    got += 1
            assert put == got
        check_spool(path)

    forked(work)
