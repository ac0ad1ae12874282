"""The footer gives back what it was packed from, and believes nothing else."""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spoolipc import footer
from spoolipc.errors import BadItem

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def forged(text: bytes, *, at: int = 0, flags: int = 0, version: int = 1, length: int | None = None) -> bytes:
    """A footer whose CRC is right, whatever else is wrong with it."""
    size = len(text) if length is None else length
    body = struct.pack("<8sHHIqQQ", b"SPOOLFTR", version, flags, size, 1, at, 0)
    return body + struct.pack("<I4x", zlib.crc32(text, zlib.crc32(body))) + text


@given(
    data_end=st.integers(0, 200),
    put_time=st.integers(-(2**63), 2**63 - 1),
    names=st.none() | st.lists(st.text(), unique=True, max_size=5),
    meta=JSON,
    checksum=st.none() | st.integers(0, 2**64 - 1),
    slack=st.binary(max_size=8),
)
def test_read_gives_back_what_was_packed(
    data_end: int, put_time: int, names: list[str] | None, meta: Any, checksum: int | None, slack: bytes
) -> None:
    packed = footer.pack(data_end, put_time, names=names, meta=meta, checksum=checksum)
    data = bytes(data_end) + packed + slack
    for buffer in (data, bytearray(data), memoryview(data)):
        found = footer.read(buffer, data_end, len(data))
        assert found == footer.Footer(
            put_time, data_end, checksum, None if names is None else tuple(names), meta, len(packed)
        )


def test_layout_on_disk_is_fixed() -> None:
    packed = footer.pack(0x1122, -5, checksum=0x33)
    assert footer.SIZE == len(packed) == 48
    assert struct.unpack("<8sHHIqQQ", packed[:40]) == (b"SPOOLFTR", 1, 1, 0, -5, 0x1122, 0x33)
    assert packed[40:] == struct.pack("<I4x", zlib.crc32(packed[:40]))


def test_json_holds_only_the_keys_that_are_present() -> None:
    assert len(footer.pack(0, 0)) == footer.SIZE
    assert json.loads(footer.pack(0, 0, names=["a"])[footer.SIZE :]) == {"names": ["a"]}
    assert json.loads(footer.pack(0, 0, meta={"x": 1})[footer.SIZE :]) == {"meta": {"x": 1}}


def test_a_map_is_read_at_an_offset() -> None:
    with mmap.mmap(-1, 4096) as buffer:
        packed = footer.pack(100, 7, meta=[1])
        buffer[100 : 100 + len(packed)] = packed
        assert footer.read(buffer, 100, 4096).meta == [1]
        with pytest.raises(BadItem, match="left in the file"):
            footer.read(buffer, 100, 100 + len(packed) - 1)
        with pytest.raises(BadItem, match="ends before the footer"):
            footer.read(buffer, 100, 100 + footer.SIZE - 1)
        with pytest.raises(BadItem, match="are there"):
            footer.read(buffer, 4090, 10_000)
        with pytest.raises(BadItem, match="ends before"):
            footer.read(buffer, -1, 4096)


@pytest.mark.parametrize(
    ("meta", "error", "reason"),
    [
        (np.int64(3), TypeError, r"meta is a numpy\.int64.*item\(\)"),
        ({"a": [1, {2}]}, TypeError, r"meta\['a'\]\[1\] is a builtins\.set"),
        ({1: 2}, TypeError, "key 1"),
        (b"x", TypeError, "bytes"),
        (float("nan"), ValueError, "meta must be JSON"),
        ([float("inf")], ValueError, "meta must be JSON"),
        pytest.param(10**5000, ValueError, "meta must be JSON", id="5000 digits"),
        pytest.param("x" * footer.MAX_JSON, ValueError, "at most", id="1 MiB"),
    ],
)
def test_meta_that_json_cannot_hold_is_refused(meta: Any, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        footer.pack(0, 0, meta=meta)


def test_meta_nested_too_deep_is_refused_and_as_deep_as_allowed_is_read() -> None:
    nested: Any = []
    for _ in range(footer.MAX_DEPTH - 1):
        nested = [nested]
    assert footer.read(footer.pack(0, 0, meta=nested), 0, 1000).meta == nested
    with pytest.raises(ValueError, match="nested deeper"):
        footer.pack(0, 0, meta=[nested])
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="nested deeper"):
        footer.pack(0, 0, meta=loop)


def test_names_must_be_distinct_strings() -> None:
    with pytest.raises(ValueError, match="distinct"):
        footer.pack(0, 0, names=["a", "a"])
    with pytest.raises(TypeError, match="sequence of strings"):
        footer.pack(0, 0, names="ab")
    with pytest.raises(TypeError, match="sequence of strings"):
        footer.pack(0, 0, names=[1])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "wrong", [{"data_end": -1}, {"put_time": 2**63}, {"checksum": 2**64}, {"checksum": -1}]
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="64-bit"):
        footer.pack(**({"data_end": 0, "put_time": 0} | wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends before"),
        (bytes(48), "no footer"),
        (forged(b"", version=2), "unknown version 2"),
        (forged(b"", flags=2), "unknown flags"),
        (forged(b"", at=64), "data ends at 64"),
        (forged(b"", length=2**32 - 1), "at most"),
        (forged(b"", length=5), "left in the file"),
        (forged(b"[]"), "is a list"),
        (forged(b"3"), "is a int"),
        (forged(b"nul"), "JSONDecodeError"),
        (forged(b"\xff\xff"), "UnicodeDecodeError"),
        (forged(b'{"meta":NaN}'), "NaN is not JSON"),
        (forged(b'{"meta":' + b"9" * 5000 + b"}"), "ValueError"),
        (forged(b'{"other":1}'), "other than"),
        (forged(b'{"names":"ab"}'), "list of strings"),
        (forged(b'{"names":[1]}'), "list of strings"),
        (forged(b'{"names":["a","a"]}'), "not distinct"),
        (forged(b"[" * 2**19), "RecursionError"),
        (forged(b'{"meta":' * 2**16), "RecursionError"),
    ],
    ids=range(19),
)
def test_a_forged_footer_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadItem, match=reason):
        footer.read(data, 0, len(data))


@given(data=st.data())
def test_one_changed_byte_is_noticed(data: st.DataObject) -> None:
    packed = bytearray(footer.pack(0, 123, names=["a"], meta={"k": [1, 2]}, checksum=9))
    at = data.draw(st.integers(0, len(packed) - 1).filter(lambda i: not 44 <= i < 48))
    packed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BadItem):
        footer.read(packed, 0, len(packed))


@given(data=st.binary(max_size=200), offset=st.integers(0, 200))
def test_random_bytes_raise_nothing_but_bad_item(data: bytes, offset: int) -> None:
    with pytest.raises(BadItem):
        footer.read(data, offset, len(data))
