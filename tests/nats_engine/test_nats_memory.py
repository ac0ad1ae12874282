"""Memory for items that come in pieces is written again when no array is over it, and let go of when none comes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest

from spoolipc.nats.memory import Memory

SIZE = 1_000_000


@pytest.fixture
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_memory_is_written_again_when_no_array_is_over_it() -> None:
    memory = Memory()
    first = memory.buffer(SIZE)
    place = first.ctypes.data
    view = first[10:20]
    del first
    other = memory.buffer(SIZE)
    assert other.ctypes.data != place
    del view
    assert memory.buffer(SIZE * 6 // 10).ctypes.data == place
    assert memory.buffer(SIZE * 4 // 10).ctypes.data != place  # which would waste most of it
    assert memory.buffer(SIZE * 6 // 10).ctypes.data == place


@pytest.mark.usefixtures("_traced")
def test_memory_is_kept_while_it_is_asked_for_and_no_longer() -> None:
    memory = Memory()
    for _ in range(3):
        memory.buffer(SIZE)
        memory.trim()
        assert tracemalloc.get_traced_memory()[0] > SIZE
    memory.trim()
    assert tracemalloc.get_traced_memory()[0] < SIZE // 2
