"""When a writer that waits for room is woken, decided from the words of the index alone."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from spoolipc import SpoolReader, SpoolWriter, bell
from spoolipc import words as W
from spoolipc.pool import worth_waking


@pytest.mark.parametrize(
    ("maxsize", "waiting", "woken"),
    [
        *((0, 0, True), (0, 1000, True)),
        *((1, 0, True), (2, 1, True), (3, 2, True), (8, 4, True), (8, 5, False), (8, 7, False)),
        *((100, 100, False), (100, 51, False), (100, 50, True), (100, 0, True)),
    ],
)
def test_woken_for_half_a_queue_of_room_or_any_where_items_are_not_counted(
    maxsize: int, waiting: int, woken: bool
) -> None:
    words = memoryview(bytearray(W.HEADER * W.WORD)).cast("Q")
    words[W.MAXSIZE] = maxsize
    words[W.READY_COUNT], words[W.RETURNED_COUNT] = waiting - waiting // 4, waiting // 4
    assert worth_waking(words) is woken


def putting(writer: SpoolWriter, done: list[float]) -> None:
    writer.put(np.zeros(3))
    done.append(time.monotonic())


@pytest.mark.parametrize("maxsize", [1, 3, 20])
def test_a_blocked_writer_is_woken_by_the_bell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maxsize: int
) -> None:
    monkeypatch.setattr(bell, "LOOK_FOR_SPACE", bell.LOOK_EVERY)  # so that the clock is too late
    path, done = tmp_path / "spool", list[float]()
    with SpoolWriter(path, maxsize=maxsize) as writer, SpoolReader(path) as reader:
        for _ in range(3):
            while writer.qsize() < maxsize:
                writer.put(np.zeros(3))
            put = threading.Thread(target=putting, args=(writer, done))
            put.start()
            room = writer._sink.party.bells._rooms["space"]
            while not room.sleepers:
                os.sched_yield()
            for _ in range(maxsize - maxsize // 2):
                reader.get()
            taken = time.monotonic()
            put.join(20)
            assert done.pop() - taken < 0.5
