"""Whoever waits learns of the end of a spool at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.calls import Call

from spoolipc import Empty, Item, ShutDown, SpoolReader, SpoolWriter, stat

LARGE = 40_000
LOOK = 1.0
"""Seconds after which whoever waits looks without being woken."""


def reject(item: Item) -> None:
    item.reject("on purpose")


def woken(end: Callable[[], None], *waiting: Call) -> float:
    """Seconds until everybody who waits raised ShutDown, from just before what ends their waiting."""
    for call in waiting:
        call.until_asleep()
    began = time.monotonic()
    end()
    assert all(isinstance(call.error(), ShutDown) for call in waiting)
    return time.monotonic() - began


def test_immediate_shutdown_leaves_no_file_of_what_waits(writer: SpoolWriter, spool: Path) -> None:
    writer.put_many(np.full(1 + number, number) for number in range(200))
    writer.shutdown(immediate=True)
    assert list((spool / "items").iterdir()) == []


@pytest.mark.parametrize("kind", ["getters", "putters"])
@pytest.mark.parametrize("immediate", [False, True])
def test_whoever_waits_wakes_at_once(spool: Path, kind: str, immediate: bool) -> None:
    seconds = []
    one, two, three, four = (
        SpoolWriter(spool, maxsize=1),
        SpoolWriter(spool),
        SpoolReader(spool),
        SpoolReader(spool),
    )
    with one, two, three, four:
        for _ in range(3):
            if kind == "getters":
                waiting = [Call(reader.get) for reader in (three, three, four)]
            else:
                one.put(np.zeros(1))
                waiting = [Call(writer.put, np.zeros(LARGE)) for writer in (one, one, two)]
            seconds.append(woken(lambda: one.shutdown(immediate), *waiting))
            assert list((spool / "tmp").iterdir()) == []
            SpoolWriter(spool, reopen=True).close()
            if kind == "putters" and not immediate:
                three.get()
    assert min(seconds) < LOOK / 2


@pytest.mark.parametrize("settle", [Item.ack, reject])
def test_end_comes_at_once_when_the_last_item_in_flight_is_settled(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, settle: Callable[[Item], None]
) -> None:
    seconds = []
    with SpoolReader(spool) as other:
        for _ in range(3):
            writer.put(np.zeros(1))
            item = other.receive()
            writer.shutdown()
            seconds.append(woken(lambda: settle(item), Call(reader.get)))  # noqa: B023
            SpoolWriter(spool, reopen=True).close()
    assert min(seconds) < LOOK / 2


def test_end_waits_for_what_other_readers_may_nack(
    writer: SpoolWriter, reader: SpoolReader, spool: Path
) -> None:
    writer.put(np.zeros(1))
    with SpoolReader(spool) as other:
        item = other.receive()
        writer.shutdown()
        with pytest.raises(Empty):
            reader.get_nowait()
        waiting = Call(reader.get)
        waiting.until_asleep()
        item.nack()
        assert waiting.result() == 0


def test_shutdown_outlives_the_processes_and_reopen_ends_it(spool: Path) -> None:
    with SpoolWriter(spool) as writer:
        writer.put(np.zeros(1))
        writer.shutdown()
    with SpoolWriter(spool) as writer, pytest.raises(ShutDown):
        writer.put(np.zeros(1))
    with SpoolReader(spool) as reader, SpoolWriter(spool, reopen=True) as writer:
        writer.put(np.ones(1))
        assert [int(reader.get_nowait()[0]) for _ in range(2)] == [0, 1]
        with pytest.raises(Empty):
            reader.get_nowait()


def test_immediate_shutdown_is_not_taken_back_by_another(writer: SpoolWriter, spool: Path) -> None:
    writer.shutdown(immediate=True)
    writer.shutdown()
    assert stat(spool).state == "discarded"
