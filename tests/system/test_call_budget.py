"""Python calls per put and per get in steady state: what keeps an item of a few kilobytes cheap."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median_low
from types import FrameType

import numpy as np
import pytest
from support.arrays import Array

from spoolipc import SpoolReader, SpoolWriter

WARM, ROUNDS = 40, 20
pytestmark = pytest.mark.usefixtures("unverified")


def put(writer: SpoolWriter, array: Array) -> None:
    writer.put(array)


def put_metadata(writer: SpoolWriter, array: Array) -> None:
    writer.put(array, meta={"frame": 7})


def put_two(writer: SpoolWriter, array: Array) -> None:
    writer.put({"image": array, "mask": array})


def get(reader: SpoolReader) -> None:
    """Dropping the array is part of it."""
    reader.get()


def receive(reader: SpoolReader) -> None:
    item = reader.receive()
    item.array  # noqa: B018
    item.ack()


def calls_of(step: Callable[..., None], *args: object) -> int:
    """How many Python functions `step` calls, itself and functions written in C left out."""
    count = 0

    def on_event(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        step(*args)
    finally:
        sys.setprofile(before)
    return count - 1


@pytest.mark.parametrize("nbytes", [1000, 64_000])
@pytest.mark.parametrize(
    ("putting", "most_put", "taking", "most_taken"),
    [(put, 40, get, 45), (put_metadata, 50, get, 50), (put_two, 50, get, 50), (put, 40, receive, 70)],
)
def test_steady_round_makes_few_calls(
    spool: Path,
    nbytes: int,
    putting: Callable[[SpoolWriter, Array], None],
    most_put: int,
    taking: Callable[[SpoolReader], None],
    most_taken: int,
) -> None:
    array = np.zeros(nbytes, "u1")
    rounds = []
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        for _ in range(WARM + ROUNDS):
            rounds.append((calls_of(putting, writer, array), calls_of(taking, reader)))
    puts, takes = zip(*rounds[WARM:], strict=True)
    found = {"put": median_low(puts), "taking": median_low(takes)}
    assert found["put"] <= most_put, found
    assert found["taking"] <= most_taken, found
