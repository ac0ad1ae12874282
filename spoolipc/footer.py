"""The footer of an item file: what is known of an item besides its arrays.

This module owns the bytes that follow the last block's data: a fixed little-endian record (magic, version,
flags, length of the JSON, put time, its own offset, checksum, CRC) and then, only for an item that has names
or metadata, that much JSON. It promises that `read` takes back whatever `pack` accepted, believes nothing
that the CRC and the bounds do not confirm, and raises nothing but `BadItem`. The CRC covers the record and
the JSON, not the arrays.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from spoolipc.errors import BadItem

Buffer = bytes | bytearray | memoryview | mmap.mmap


class Slices(Protocol):
    """Anything that gives a file's bytes by slices."""

    def __getitem__(self, where: slice, /) -> bytes | bytearray | memoryview:
        """The bytes from `where.start` to `where.stop`."""


MAGIC = b"SPOOLFTR"
VERSION = 1
MAX_JSON = 2**20
"""The most bytes that names and metadata may take, as JSON."""
MAX_DEPTH = 100
"""The deepest that lists and dicts of metadata may be nested."""

_HAS_CHECKSUM = 1
_BODY = struct.Struct("<8sHHIqQQ")
_TAIL = struct.Struct("<I4x")
_RECORD = struct.Struct("<8sHHIqQQI4x")
_CHECKED = _BODY.size
_PLAIN = _BODY.pack(MAGIC, VERSION, 0, 0, 0, 0, 0)[:16]
_PLAIN_BODY = struct.Struct("<16sqQ8x")

SIZE = _RECORD.size
"""Bytes of the fixed record, the JSON not counted."""


class Footer(NamedTuple):
    """What the footer of one item says.

    put_time: when the item was put, in nanoseconds since the epoch. data_end: the file offset, in bytes,
    where the footer begins. checksum: the writer's 64-bit checksum, or None. names: one for each array, or
    None. meta: what the writer attached, as JSON gives it back, or None. size: bytes of the whole footer, its
    JSON included.
    """

    put_time: int
    data_end: int
    checksum: int | None
    names: tuple[str, ...] | None
    meta: Any
    size: int


def pack(
    data_end: int,
    put_time: int,
    *,
    names: Sequence[str] | None = None,
    meta: Any = None,
    checksum: int | None = None,
) -> bytes:
    """The bytes of a footer.

    data_end: the file offset, in bytes, at which the footer will lie. put_time: nanoseconds since the epoch.
    names: distinct strings, one for each array. meta: anything JSON can hold and give back (a tuple comes
    back as a list). checksum: an integer below 2**64.

    Raises TypeError where names or meta hold what JSON cannot, ValueError where they hold NaN, are nested
    deeper than `MAX_DEPTH` or exceed `MAX_JSON` bytes, where names repeat, or where a number is out of range.
    """
    text = b"" if names is None and meta is None else _dump(names, meta)
    try:
        if checksum is None:
            body = _BODY.pack(MAGIC, VERSION, 0, len(text), put_time, data_end, 0)
        else:
            body = _BODY.pack(MAGIC, VERSION, _HAS_CHECKSUM, len(text), put_time, data_end, checksum)
    except struct.error:
        raise ValueError(
            f"put_time {put_time!r}, data_end {data_end!r} or checksum {checksum!r} is no 64-bit integer"
        ) from None
    return body + _TAIL.pack(zlib.crc32(text, zlib.crc32(body))) + text


def pack_plain(data_end: int, put_time: int) -> bytes:
    """What `pack` makes without names, metadata and checksum."""
    body = _PLAIN_BODY.pack(_PLAIN, put_time, data_end)
    return body + _TAIL.pack(zlib.crc32(body))


def is_plain(buffer: Buffer, offset: int) -> bool:
    """Whether an undamaged footer without names, metadata and checksum is at `offset`, all of it in the buffer."""
    record = buffer[offset : offset + SIZE]
    return (
        record[:16] == _PLAIN
        and record[24:32] == offset.to_bytes(8, "little")
        and record[_CHECKED:] == _TAIL.pack(zlib.crc32(record[:_CHECKED]))
    )


def read(buffer: Buffer | Slices, offset: int, limit: int) -> Footer:
    """The footer at one place of a file.

    buffer: the file's bytes; a memoryview must be of single bytes. offset: where the footer begins, in bytes.
    limit: the file's size in bytes, beyond which nothing is touched.

    Returns a footer that holds no reference to the buffer. Raises BadItem, with the reason, for anything but
    an undamaged footer written for that very offset.
    """
    end = offset + SIZE
    if offset < 0 or end > limit:
        raise BadItem(f"the file of {limit} bytes ends before the footer at {offset} does")
    record = buffer[offset:end]
    if len(record) != SIZE:
        raise BadItem(f"only {len(record)} of the footer's {SIZE} bytes at {offset} are there")
    magic, version, flags, length, put_time, data_end, checksum, crc = _RECORD.unpack(record)
    if magic != MAGIC:
        raise BadItem(f"no footer at {offset}")
    if version != VERSION:
        raise BadItem(f"footer of unknown version {version}")
    text = _text(buffer, end, length, limit) if length else b""
    actual = zlib.crc32(record[:_CHECKED])
    if text:
        actual = zlib.crc32(text, actual)
    if crc != actual:
        raise BadItem(f"footer is damaged: its CRC is {actual:#010x}, it says {crc:#010x}")
    if flags & ~_HAS_CHECKSUM:
        raise BadItem(f"footer has unknown flags {flags:#06x}")
    if data_end != offset:
        raise BadItem(f"footer says that the data ends at {data_end}, it ends at {offset}")
    names, meta = _load(text) if text else (None, None)
    return Footer(put_time, data_end, checksum if flags else None, names, meta, SIZE + length)


def _dump(names: Sequence[str] | None, meta: Any) -> bytes:
    record: dict[str, Any] = {}
    if names is not None:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"names must be a sequence of strings, not {names!r}")
        if len(set(names)) != len(names):
            raise ValueError(f"names must be distinct: {list(names)!r}")
        record["names"] = list(names)
    if meta is not None:
        _check(meta, "meta", 1)
        record["meta"] = meta
    try:
        text = json.dumps(record, allow_nan=False, separators=(",", ":")).encode("ascii")
    except ValueError as error:
        raise ValueError(f"meta must be JSON: {error}") from None
    if len(text) > MAX_JSON:
        raise ValueError(f"names and meta take {len(text)} bytes as JSON; at most {MAX_JSON} are allowed")
    return text


def _check(value: Any, where: str, depth: int) -> None:
    """Refuse what JSON would refuse, alter, or give back only to a reader with a deep stack."""
    if value is None or isinstance(value, (str, int, float)):
        return
    if depth > MAX_DEPTH:
        raise ValueError(f"meta is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; JSON keys are strings")
            _check(inner, f"{where}[{key!r}]", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check(inner, f"{where}[{index}]", depth + 1)
    else:
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which JSON cannot hold; "
            "give numbers, strings, lists and dicts (a numpy value as x.item() or x.tolist())"
        )


def _text(buffer: Buffer | Slices, start: int, length: int, limit: int) -> bytes:
    if length > MAX_JSON:
        raise BadItem(f"footer claims {length} bytes of JSON; at most {MAX_JSON} are allowed")
    if start + length > limit:
        raise BadItem(f"footer claims {length} bytes of JSON; {limit - start} are left in the file")
    text = bytes(buffer[start : start + length])
    if len(text) != length:
        raise BadItem(f"only {len(text)} of the footer's {length} bytes of JSON are there")
    return text


def _load(text: bytes) -> tuple[tuple[str, ...] | None, Any]:
    try:
        record = _DECODER.decode(text.decode("utf-8"))
    except Exception as error:  # also RecursionError and MemoryError, which nested or huge JSON provokes
        raise BadItem(f"footer's JSON cannot be read: {type(error).__name__}: {error}") from None
    if type(record) is not dict:
        raise BadItem(f"footer's JSON is a {type(record).__name__}, not a dict")
    if not record.keys() <= {"names", "meta"}:
        raise BadItem("footer's JSON has keys other than names and meta")
    names = record.get("names")
    if names is None:
        return None, record.get("meta")
    if type(names) is not list or not all(type(name) is str for name in names):
        raise BadItem("footer's names are not a list of strings")
    if len(set(names)) != len(names):
        raise BadItem("footer's names are not distinct")
    return tuple(names), record.get("meta")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
