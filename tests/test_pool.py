"""When a writer that waits for room is woken, decided from the words of the index alone."""

from __future__ import annotations

import pytest

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
