"""Arrays of every kind, and whether one came back as it was put."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from spoolipc import Empty, SpoolReader

Array = np.ndarray[Any, Any]
ALIGNED: Final = np.dtype([("a", "i1"), ("b", "f8"), ("c", "i2")], align=True)
NESTED: Final = np.dtype([("x", ALIGNED), ("y", [("p", ">i4", (2, 3)), ("q", "S3")], (2,)), ("z", "M8[us]")])
LARGE: Final = 40_000
"""Bytes beyond which an array is given out as a view of its file."""


def inode_of(array: Array) -> int:
    """The inode of the file whose mapping an array lies in, as the kernel says."""
    address = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return int(inode)
    raise AssertionError("the array is in no mapping")


def drained(reader: SpoolReader) -> list[int]:
    """The numbers of all that waits, each array full of its own."""
    found: list[int] = []
    with suppress(Empty):
        while True:
            array = reader.get_nowait()
            assert (array == array[0]).all()
            found.append(int(array[0]))
    return found


def filled(dtype: Any, shape: tuple[int, ...]) -> Array:
    """An array of distinct bytes, padding included, without invalid characters or booleans."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = bytes(range(1, 128)) * (size // 127 + 1)
    if dtype.kind == "U":
        text = "".join(map(chr, range(1, size + 1)))
        raw = text.encode("utf-32-be" if dtype.str[0] == ">" else "utf-32-le")
    if dtype.kind == "b":
        raw = b"\x01\x00" * size
    return np.ndarray(shape, dtype, bytearray(raw[:size] or b"\0"))


def content(array: Array) -> bytes:
    """The bytes of an array in the order of its file, padding included."""
    whole = array.view(f"V{array.itemsize}") if array.dtype.names and array.itemsize else array
    return whole.tobytes("F" if array.flags.fnc else "C")


def same(found: Array, array: Array) -> None:
    """Assert that `found` is a plain array with the dtype, byte order, shape, memory order and bytes of `array`."""
    assert type(found) is np.ndarray
    assert found.dtype == array.dtype
    assert found.dtype.byteorder == array.dtype.byteorder
    assert "metadata" not in repr(found.dtype)
    assert found.shape == array.shape
    assert found.flags.fnc == array.flags.fnc
    assert content(found) == content(array)
