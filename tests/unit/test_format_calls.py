"""On the path of every put and get, calls of Python code are what costs: each operation has a budget of them."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from types import FrameType

import numpy as np
import pytest

from spoolipc.format import footer, item

ARRAYS = (np.arange(1000.0).reshape(10, 100),)
LAYOUT = item.layout_of(ARRAYS)
END = LAYOUT.end
ID = bytes(16)
SMALL = item.to_bytes(LAYOUT, ARRAYS) + footer.pack(END, 1, ID)
LARGE = mmap.mmap(-1, len(SMALL))
LARGE.write(SMALL)
BLOCKS, FOOTER = item.parse(SMALL, len(SMALL))
# In another file the same header came first, further back.
PAIR = (np.zeros(8), *ARRAYS)
BEHIND = item.to_bytes(item.layout_of(PAIR), PAIR) + footer.pack(item.layout_of(PAIR).end, 1, ID)


def calls(operation: Callable[[], object]) -> list[str]:
    """The functions called by an operation, which is a lambda."""
    seen: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            seen.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        operation()
    finally:
        sys.setprofile(None)
    return seen[1:]


@pytest.mark.parametrize(
    ("budget", "operation"),
    [
        (1, lambda: item.layout_of(ARRAYS)),
        (1, lambda: item.store(LARGE, LAYOUT, ARRAYS)),
        (1, lambda: item.to_bytes(LAYOUT, ARRAYS)),
        (1, lambda: footer.pack(END, 1, ID)),
        (1, lambda: footer.pack(END, 1, ID, None, None, 7, expires=9)),
        (1, lambda: footer.read(LARGE, END, len(LARGE))),
        (2, lambda: item.parse(LARGE, len(LARGE))),
        (2, lambda: item.parse(SMALL, len(SMALL))),
        (1, lambda: item.view(LARGE, BLOCKS[0])),
        (2, lambda: item.message(LARGE, BLOCKS, FOOTER, copy=False)),
        (2, lambda: item.message(LARGE, BLOCKS, FOOTER, copy=True)),
    ],
)
def test_an_item_of_one_plain_array_takes_few_calls(budget: int, operation: Callable[[], object]) -> None:
    item._parsed.clear()
    for known in (BEHIND, SMALL):
        item.parse(known, len(known))
    item.layout_of(ARRAYS)  # other tests may have filled the cache, which then begins anew
    assert 0 < len(calls(operation)) <= budget
