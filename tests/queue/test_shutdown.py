"""Whoever waits learns of the end of a spool at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.calls import Call

from spoolipc import Item, ShutDown, SpoolReader, SpoolWriter

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


def test_immediate_shutdown_leaves_no_history_of_what_is_requeued_after_it(
    writer: SpoolWriter, spool: Path
) -> None:
    writer.put(np.zeros(3))
    with SpoolReader(spool) as reader:
        item = reader.receive()
        writer.shutdown(immediate=True)
        item.nack()
    SpoolReader(spool).close()
    assert os.listdir(spool / "failed") == []


def test_who_leaves_leaves_nothing_in_alive_and_tmp(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        lent = writer.loan(5000)
        writer.put(lent.array)
        reader.get()
        reader.close()
        assert len(list((spool / "alive").iterdir())) == 1
        assert len(list((spool / "tmp").iterdir())) == 1
    for part in ("alive", "tmp"):
        assert list((spool / part).iterdir()) == []
    lent.array[:] = 1  # and who has it may write it
