"""The footer gives back what it was packed from, and believes nothing else."""

from __future__ import annotations

import errno
import json
import mmap
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spoolipc.errors import BadItem, UnknownVersion
from spoolipc.format import footer

ID = bytes(range(16))
BODY = "<8sHHIqQQ16sqI"
I64 = st.integers(-(2**63), 2**63 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
SAID: dict[str, st.SearchStrategy[Any]] = {
    "put_time": I64,
    "id": st.binary(min_size=16, max_size=16),
    "names": st.none() | st.lists(st.text(), unique=True, max_size=5).map(tuple),
    "meta": JSON,
    "checksum": st.none() | st.integers(0, 2**64 - 1),
    "expires": I64,
}


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth > 1 else []


def forged(
    text: bytes = b"", *, at: int = 0, flags: int = 0, version: int = 2, kind: int = 0, more: int = 0
) -> bytes:
    """A footer whose CRC is right, whatever else is wrong with it."""
    body = struct.pack(BODY, b"SPOOLFTR", version, kind, flags, 1, at, 0, ID, 0, len(text) + more)
    return body + struct.pack("<I", zlib.crc32(text, zlib.crc32(body))) + text


@given(data_end=st.integers(0, 200), said=st.fixed_dictionaries(SAID), slack=st.binary(max_size=8))
def test_read_gives_back_what_was_packed(data_end: int, said: dict[str, Any], slack: bytes) -> None:
    packed = footer.pack(data_end, **said)
    assert len(packed) == footer.SIZE + footer.json_size(said["names"], said["meta"])
    data = bytes(data_end) + packed + slack
    kind = footer.VALUE if said["names"] == () else footer.ARRAYS
    expected = said | {"data_end": data_end, "id": said["id"].hex(), "kind": kind, "size": len(packed)}
    for buffer in (data, bytearray(data), memoryview(data)):
        assert footer.read(buffer, data_end, len(data))._asdict() == expected


def test_layout_on_disk_is_fixed() -> None:
    packed = footer.pack(0x1122, -5, ID, ["a"], {"x": 1}, 0x33, kind=4, expires=6)
    assert footer.SIZE == len(footer.pack(0, 0, ID)) == 72
    assert struct.unpack(BODY, packed[:68]) == (
        b"SPOOLFTR",
        2,
        4,
        1,
        -5,
        0x1122,
        0x33,
        ID,
        6,
        len(packed) - 72,
    )
    assert packed[68:72] == struct.pack("<I", zlib.crc32(packed[:68] + packed[72:]))
    assert json.loads(packed[72:]) == {"names": ["a"], "meta": {"x": 1}}
    assert json.loads(footer.pack(0, 0, ID, meta=[1])[72:]) == {"meta": [1]}


def test_a_map_is_read_at_an_offset_and_not_beyond_the_limit() -> None:
    with mmap.mmap(-1, 4096) as buffer:
        packed = footer.pack(100, 7, ID, meta=[1])
        end = 100 + len(packed)
        buffer[100:end] = packed
        assert footer.read(buffer, 100, 4096) == footer.read(buffer, 100, end)
        for offset, limit in ((100, 99), (100, 171), (4090, 10**4), (9000, 10**4), (-1, 4096), (-100, 4096)):
            with pytest.raises(BadItem, match="ends before the footer"):
                footer.read(buffer, offset, limit)
        with pytest.raises(BadItem, match="left in the file"):
            footer.read(buffer, 100, end - 1)


def test_meta_nested_as_deep_as_allowed_is_read() -> None:
    assert footer.read(footer.pack(0, 0, ID, meta=nested(100)), 0, 1000).meta == nested(100)


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("wrong", "error", "reason"),
    [
        ({"meta": np.zeros(3)}, TypeError, r"meta is a numpy\.ndarray.*x.tolist\(\)"),
        ({"meta": {"a": [1, {2}]}}, TypeError, r"meta\['a'\]\[1\] is a builtins\.set"),
        ({"meta": {1: 2}}, TypeError, "key 1"),
        ({"meta": b"x"}, TypeError, "bytes"),
        (
            {"meta": {"a": [float("nan")]}},
            ValueError,
            r"meta\['a'\]\[0\] is nan, which JSON cannot hold; give None",
        ),
        ({"meta": [np.float32("inf")]}, ValueError, r"meta\[0\] is inf, which JSON cannot hold"),
        ({"meta": 10**5000}, ValueError, "meta must be JSON"),
        ({"meta": "x" * footer.MAX_JSON}, ValueError, "at most"),
        ({"meta": nested(101)}, ValueError, "nested deeper"),
        ({"meta": LOOP}, ValueError, "nested deeper"),
        ({"names": ["a", "a"]}, ValueError, "distinct"),
        ({"names": "ab"}, TypeError, "sequence of strings"),
        ({"names": [1]}, TypeError, "sequence of strings"),
        ({"data_end": -1}, ValueError, "64-bit"),
        ({"put_time": 2**63}, ValueError, "64-bit"),
        ({"checksum": 2**64}, ValueError, "64-bit"),
        ({"checksum": -1}, ValueError, "64-bit"),
        ({"expires": 2**63}, ValueError, "64-bit"),
        ({"kind": 2**16}, ValueError, "16-bit"),
        ({"id": bytes(15)}, ValueError, "16 bytes"),
        ({"id": bytes(17)}, ValueError, "16 bytes"),
        ({"id": "0" * 16}, ValueError, "not bytes"),
    ],
    ids=range(22),
)
def test_what_could_not_be_read_back_is_not_packed(
    wrong: dict[str, Any], error: type[Exception], reason: str
) -> None:
    whole: dict[str, Any] = {"data_end": 0, "put_time": 0, "id": ID} | wrong
    with pytest.raises(error, match=reason):
        footer.pack(**whole)
    if wrong.keys() <= {"names", "meta"}:
        with pytest.raises(error, match=reason):
            footer.json_size(wrong.get("names"), wrong.get("meta"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends before"),
        (bytes(80), "no footer"),
        (forged(version=1), "unknown version 1"),
        (forged(version=0), "unknown version 0"),
        (forged(flags=2), "unknown flags"),
        (forged(at=64, kind=2), "data ends at 64"),
        (forged(more=2**32 - 1), "at most"),
        (forged(more=5), "left in the file"),
        (forged(b"[]"), "is a list"),
        (forged(b"nul"), "JSONDecodeError"),
        (forged(b"\xff\xff"), "UnicodeDecodeError"),
        (forged(b'{"meta":NaN}'), "NaN is not JSON"),
        (forged(b'{"meta":' + b"9" * 5000 + b"}"), "ValueError"),
        (forged(b'{"other":1}'), "other than"),
        (forged(b'{"names":"ab"}'), "list of strings"),
        (forged(b'{"names":[1]}'), "list of strings"),
        (forged(b'{"names":[]}'), "list of strings"),
        (forged(b'{"names":["a"]}', kind=1), "arrays of a value"),
        (forged(b'{"names":["a","a"]}'), "not distinct"),
        (forged(b"[" * 2**19), "RecursionError"),
        (forged(b'{"meta":' * 2**16), "RecursionError"),
    ],
    ids=range(21),
)
def test_a_forged_footer_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadItem, match=reason):
        footer.read(data, 0, len(data))


@pytest.mark.parametrize(
    "data",
    [
        forged(version=3),
        forged(version=2**16 - 1)[:10],
        forged(version=3, at=9, flags=77, more=2**32 - 1)[:40] + bytes(99),
        forged(kind=2),
        forged(b"no JSON", kind=2**16 - 1, flags=8),
    ],
    ids=range(5),
)
def test_the_footer_of_a_later_release_is_told_from_a_damaged_one(data: bytes) -> None:
    with pytest.raises(UnknownVersion, match="this release") as caught:
        footer.read(data, 0, len(data))
    assert caught.value.errno == errno.EINVAL


@given(at=st.integers(0, 200), change=st.integers(1, 255), cut=st.booleans())
def test_one_changed_byte_is_noticed(at: int, change: int, cut: bool) -> None:
    packed = bytearray(footer.pack(0, 123, ID, ["a"], {"k": [1, 2]}, 9, expires=8))
    packed[at % len(packed)] ^= change
    later = struct.unpack_from("<H", packed, 8)[0] > footer.VERSION
    with pytest.raises(UnknownVersion if later else BadItem):
        footer.read(packed, 0, len(packed) - cut)


@given(data=st.binary(max_size=200), offset=st.integers(0, 200))
def test_random_bytes_raise_nothing_but_bad_item(data: bytes, offset: int) -> None:
    with pytest.raises(BadItem):
        footer.read(data, offset, len(data))
