"""The footer of an item file: what is known of an item besides its arrays.

It lies where the last block's data end: a fixed little-endian record, each field at a multiple of its size, and then,
only for an item that has names or metadata, JSON.

     0  magic, 8 bytes      8  version, u16     10  kind, u16           12  flags, u32
    16  put time, i64, ns  24  data end, u64    32  checksum, u64       40  id, 16 bytes
    56  expires, i64, ns   64  JSON length, u32 68  CRC-32, u32         72  JSON

The CRC covers the record before it and the JSON, not the arrays. `data end` is the record's own file offset. Magic and
version keep their places in every version. This module promises that `read` takes back whatever `pack` accepted,
believes nothing that the CRC and the bounds do not confirm, and raises nothing but `BadItem` and `UnknownVersion`.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import operator
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from zlib import crc32

import numpy as np

from spoolipc.errors import BadItem, UnknownVersion

Buffer = bytes | bytearray | memoryview | mmap.mmap


class Slices(Protocol):
    """Anything that gives a file's bytes by slices."""

    def __getitem__(self, where: slice, /) -> bytes | bytearray | memoryview:
        """The bytes from `where.start` to `where.stop`."""


MAGIC = b"SPOOLFTR"
VERSION = 2
ARRAYS, VALUE = 0, 1
"""The kinds of an item: arrays, or a value whose first array is its frame (`values.py`). Others are reserved."""
MAX_JSON = 2**20
"""The most bytes that names and metadata may take, as JSON."""
MAX_DEPTH = 100
"""The deepest that lists and dicts of metadata may be nested."""

_HAS_CHECKSUM = 1
_ID_SIZE = 16
_BODY = struct.Struct("<8sHHIqQQ16sqI")
_WHOLE = struct.Struct("<10sHIqQQ16sqII")  # magic and version as one
_CHECKED = _BODY.size
_new = tuple.__new__
_BEGINNING = MAGIC + VERSION.to_bytes(2, "little")

SIZE = _WHOLE.size
"""Bytes of the fixed record, the JSON not counted."""


class Footer(NamedTuple):
    """What the footer of one item says.

    put_time: when the item was put, in nanoseconds since the epoch. data_end: the file offset, in bytes, where the
    footer begins. checksum: the writer's checksum of all bytes before it, or None. names: one for each array, None,
    or none of a VALUE. meta: what the writer attached, as JSON gives it back, or None. id: 32 hexadecimal digits.
    expires: until when the item is of use, in nanoseconds since the epoch, 0 for ever. size: bytes of the whole
    footer, its JSON included.
    """

    put_time: int
    data_end: int
    checksum: int | None
    names: tuple[str, ...] | None
    meta: Any
    id: str
    kind: int
    expires: int
    size: int


def pack(
    data_end: int,
    put_time: int,
    id: bytes,
    names: Sequence[str] | None = None,
    meta: Any = None,
    checksum: int | None = None,
    *,
    kind: int | None = None,
    expires: int = 0,
) -> bytes:
    """The bytes of a footer, as long for the same names and metadata whatever the rest.

    data_end: the file offset, in bytes, at which the footer will lie. put_time, expires: nanoseconds since the
    epoch; expires 0 for never. id: 16 bytes. names: distinct strings, one for each array; none of a VALUE. meta:
    anything JSON can hold and give back (a tuple comes back as a list, NumPy's numbers as those of Python). checksum:
    below 2**64. kind: as `names` say it, or one that `read` does not know: an item to be left alone.

    Raises TypeError where names or meta hold what JSON cannot, ValueError where they hold NaN, are nested deeper
    than `MAX_DEPTH` or exceed `MAX_JSON` bytes, where names repeat, or where a number or the id is out of range.
    """
    text = b"" if not names and meta is None else _dump(names, meta)
    if kind is None:
        kind = ARRAYS if names is None or names else VALUE
    flags = 0 if checksum is None else _HAS_CHECKSUM
    try:
        body = _BODY.pack(
            MAGIC, VERSION, kind, flags, put_time, data_end, checksum or 0, id, expires, len(text)
        )
    except struct.error:
        raise ValueError(
            f"put_time {put_time!r}, data_end {data_end!r}, checksum {checksum!r} or expires {expires!r} is no"
            f" 64-bit integer, kind {kind!r} no 16-bit one, or the id {id!r} not bytes"
        ) from None
    if len(id) != _ID_SIZE:  # struct would cut or fill it
        raise ValueError(f"an id has {_ID_SIZE} bytes, not {len(id)}")
    crc = crc32(body)
    return body + (crc32(text, crc) if text else crc).to_bytes(4, "little") + text


def json_size(names: Sequence[str] | None, meta: Any) -> int:
    """Bytes of JSON that `pack` appends for these names and metadata, 0 for None and None.

    Raises TypeError and ValueError as `pack` does.
    """
    return 0 if not names and meta is None else len(_dump(names, meta))


def read(buffer: Buffer | Slices, offset: int, limit: int) -> Footer:
    """The footer at one place of a file.

    buffer: the file's bytes; a memoryview must be of single bytes. offset: where the footer begins, in bytes.
    limit: the file's size in bytes, beyond which nothing is touched.

    Returns a footer that holds no reference to the buffer. Raises UnknownVersion for the footer of a later release
    or of a kind it brought, BadItem, with the reason, for anything else but an undamaged footer written for that
    very offset.
    """
    end = offset + SIZE
    if offset < 0 or end > limit:
        raise _refusal(buffer[offset:limit] if 0 <= offset <= limit else b"", offset)
    record = buffer[offset:end]
    if len(record) != SIZE:
        raise _refusal(record, offset)
    beginning, kind, flags, put_time, data_end, checksum, id, expires, length, crc = _WHOLE.unpack(record)
    if beginning != _BEGINNING:
        raise _refusal(record, offset)
    actual = crc32(record[:_CHECKED])
    names = meta = None
    text = b""
    if length:
        if length > MAX_JSON:
            raise BadItem(f"footer claims {length} bytes of JSON; at most {MAX_JSON} are allowed")
        text = bytes(buffer[end : min(end + length, limit)])
        if len(text) != length:
            raise BadItem(f"footer claims {length} bytes of JSON; {len(text)} are left in the file")
        actual = crc32(text, actual)
    if crc != actual:
        raise BadItem(f"footer is damaged: its CRC is {actual:#010x}, it says {crc:#010x}")
    if data_end != offset:
        raise BadItem(f"footer says that the data ends at {data_end}, it ends at {offset}")
    if kind > VALUE:
        raise UnknownVersion(errno.EINVAL, f"item of kind {kind}, which this release does not know")
    if flags & ~_HAS_CHECKSUM:
        raise BadItem(f"footer has unknown flags {flags:#06x}")
    if text:
        names, meta = _load(text)
    if kind:
        if names is not None:
            raise BadItem("footer has names for the arrays of a value")
        names = ()
    said = checksum if flags else None
    # Not Footer(...), which is a call of Python code, and this is on the path of every get.
    return _new(Footer, (put_time, data_end, said, names, meta, id.hex(), kind, expires, SIZE + length))


def _refusal(record: bytes | bytearray | memoryview, offset: int) -> Exception:
    """The error for what is no whole footer of this version: UnknownVersion where it begins as that of a later release
    does, which may be shorter than ours."""
    version = int.from_bytes(record[8:10], "little")
    is_footer = record[:8] == MAGIC
    if is_footer and version > VERSION:
        text = f"item in version {version} of the format; this release knows versions up to {VERSION}"
        return UnknownVersion(errno.EINVAL, text)
    if len(record) != SIZE:
        return BadItem(
            f"the file ends before the footer at {offset}: {len(record)} of {SIZE} bytes are there"
        )
    return BadItem(f"footer of unknown version {version}" if is_footer else f"no footer at {offset}")


def _dump(names: Sequence[str] | None, meta: Any) -> bytes:
    record: dict[str, Any] = {}
    if names:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"names must be a sequence of strings, not {names!r}")
        if len(set(names)) != len(names):
            raise ValueError(f"names must be distinct: {list(names)!r}")
        record["names"] = list(names)
    if meta is not None:
        _check(meta, "meta", 1)
        record["meta"] = meta
    try:
        text = _ENCODER.encode(record).encode("ascii")
    except ValueError as error:
        raise ValueError(f"meta must be JSON: {error}") from None
    if len(text) > MAX_JSON:
        raise ValueError(f"names and meta take {len(text)} bytes as JSON; at most {MAX_JSON} are allowed")
    return text


def _check(value: Any, where: str, depth: int) -> None:
    """Refuse what JSON would refuse, alter, or give back only to a reader with a deep stack."""
    if value is None or isinstance(value, _PLAIN):
        if isinstance(value, (float, np.floating)) and not math.isfinite(value):
            raise ValueError(
                f"{where} is {value}, which JSON cannot hold; give None, or a string as with str(x)"
            )
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
            "give numbers, strings, lists and dicts, as with float(x), str(x) or x.tolist()"
        )


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
    if type(names) is not list or not names or not all(type(name) is str for name in names):
        raise BadItem("footer's names are not a list of strings")
    if len(set(names)) != len(names):
        raise BadItem("footer's names are not distinct")
    return tuple(names), record.get("meta")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_PLAIN = (str, int, float, np.bool, np.integer, np.float16, np.float32)
_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=operator.methodcaller("item"))
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
