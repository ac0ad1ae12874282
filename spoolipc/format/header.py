"""The header of an NPY block: what it says of an array, written as `np.save` does and read without trust.

This module promises that nothing is ever pickled or unpickled: a dtype that a header cannot describe without pickle
is refused, in either direction, and a header is read as a Python literal of known form, nothing else.
"""

from __future__ import annotations

import ast
import io
import re
import struct
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import numpy as np
from numpy.lib import format as npformat

from spoolipc.errors import TooLarge, UnsupportedArray

DType = np.dtype[Any]
MAX_HEADER = 64 * 1024
"""The most bytes of a header that are ever read."""
MAX_HEADER_TEXT = 10_000
"""The most characters in a header: `np.load` refuses longer ones."""
MAGIC = b"\x93NUMPY"
PREFIX = struct.Struct("<6sBBH")
LONG_PREFIX = struct.Struct("<6sBBI")
"""Magic, major and minor version, bytes that follow; the long one is of versions 2 and 3."""
_MAX_SIZE = 2**63 - 1
_MAX_DIMENSIONS = 64
_FIRST_USER_DTYPE = 256
_SIMPLE_DESCR = re.compile(r"[<>|](?:[biufcSUV][0-9]{1,10}|[mM]8(?:\[[0-9]{0,10}[A-Za-z]{1,2}\])?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Block:
    """Where one array lies in an item file: its data are the `nbytes` bytes from file offset `offset` on.

    fortran: whether they are in Fortran order, and not in C order as well.
    """

    dtype: DType
    shape: tuple[int, ...]
    fortran: bool
    offset: int
    nbytes: int


def make_header(
    dtype: DType, shape: tuple[int, ...], fortran: bool, at: int, align: int
) -> tuple[bytes, Block]:
    """The header that `np.save` writes, with spaces so that from file offset `at` it ends at a multiple of `align`.

    Returns it and the block that `read_header` makes of it: its dtype is equal to the one given, but without metadata,
    and an object of its own. Raises UnsupportedArray for a dtype that `np.save` cannot save and `np.load` restore
    without pickle, and what `size_of` raises.
    """
    dtype = npformat.drop_metadata(dtype)
    if dtype.hasobject or dtype.num >= _FIRST_USER_DTYPE:
        raise UnsupportedArray(_of_pickle(dtype))
    nbytes = size_of(shape, dtype)
    reason: object = "np.load would not restore it as it is"
    try:
        descr: Any = dtype.str if dtype.names is None else dtype.descr
        own = _dtype_of(descr if dtype.names is None else _literal(repr(descr)))
        header = _written({"descr": descr, "fortran_order": fortran, "shape": shape}, at, align)
        if own == dtype and _text_of(header):
            return header, Block(own, shape, fortran, at + len(header), nbytes)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = error
    raise UnsupportedArray(
        f"dtype {dtype} cannot be stored without pickle ({reason}); put each of its fields as an array of its own,"
        " {name: x[name] for name in x.dtype.names}, or numpy.lib.recfunctions.repack_fields(x) where they overlap"
    )


def read_header(header: bytes, offset: int) -> Block:
    """The block that a header, prefix included, describes; its data begin at file offset `offset`.

    Raises ValueError or whatever a hostile literal provokes (RecursionError, MemoryError, SyntaxError ...): catch
    Exception. Whether numpy can show such an array remains to be tried.
    """
    fields = _literal(_text_of(header))
    if type(fields) is not dict:
        raise ValueError(f"a {type(fields).__name__}, not a dict")
    if fields.keys() != npformat.EXPECTED_KEYS:
        raise ValueError("keys other than descr, fortran_order and shape")
    fortran, shape = fields["fortran_order"], fields["shape"]
    if type(fortran) is not bool:
        raise ValueError("fortran_order is neither True nor False")
    if type(shape) is not tuple or not all(type(n) is int for n in shape):
        raise ValueError("shape is not a tuple of integers")
    dtype = _dtype_of(fields["descr"])
    return Block(dtype, shape, fortran, offset, size_of(shape, dtype))


def size_of(shape: tuple[int, ...], dtype: DType) -> int:
    """Bytes of an array. Raises ValueError for a shape that none can have, TooLarge for one beyond any memory."""
    if not all(0 <= n <= _MAX_SIZE for n in shape):
        raise ValueError("shape has a negative or an impossibly large size")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"shape has {len(shape)} dimensions; numpy takes at most {_MAX_DIMENSIONS}")
    # numpy itself refuses sizes that overflow before a zero among them is counted.
    if prod(n or 1 for n in shape) * (dtype.itemsize or 1) > _MAX_SIZE:
        raise TooLarge("shape is larger than any memory")
    return prod(shape) * dtype.itemsize


def fresh(dtype: DType) -> DType:
    """The same structured dtype as an object of its own, whose names nobody else can change."""
    return npformat.descr_to_dtype(cast(Any, dtype.descr))


def _of_pickle(dtype: DType) -> str:
    """Why a dtype needs pickle, and what does not."""
    if dtype.num < _FIRST_USER_DTYPE:
        return (
            f"dtype {dtype} holds Python objects, which only pickle could store; give the array a dtype of "
            "numbers, strings or fields, as with x.astype(float) or x.astype('U')"
        )
    bits = f"x.view(np.uint{8 * dtype.itemsize}), or x.astype(np.float32)"
    remedy = "x.astype('U')" if dtype.hasobject else bits
    return f"dtype {dtype} is one that an .npy file cannot describe without pickle; put {remedy}"


def _dtype_of(descr: Any) -> DType:
    """The dtype of a descr in the forms that `np.save` writes; ValueError or TypeError for any other."""
    _check(descr)
    dtype = npformat.descr_to_dtype(descr)
    hash(dtype)  # a title may be a list, and then nobody could put such an array
    return dtype


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except Exception as error:
        raise ValueError(f"not a Python literal ({type(error).__name__})") from None


def _check(descr: Any) -> None:
    """Raise ValueError for what no header says of a dtype but numpy would make something of. The rest is checked by
    numpy: names, titles, sizes."""
    if type(descr) is str:
        if descr.lstrip("<>|=").startswith("O"):
            raise ValueError("object dtype, which needs pickle")
        if not _SIMPLE_DESCR.fullmatch(descr):
            raise ValueError(f"unknown dtype {descr[:40]!r}")
    elif type(descr) is list:
        for field in descr:
            if type(field) is not tuple or len(field) not in (2, 3):
                raise ValueError("a field is not a tuple of name, dtype and perhaps shape")
            _check(field[1:] if len(field) == 3 else field[1])
    elif type(descr) is tuple and len(descr) == 2:
        if type(descr[1]) is not tuple:
            raise ValueError("a subarray's shape is not a tuple")
        _check(descr[0])
    else:
        raise ValueError(f"a dtype is a {type(descr).__name__}, not a string or a list of fields")


class _Utf8:
    """A descr whose repr, written as Latin-1, is UTF-8."""

    def __init__(self, descr: Any) -> None:
        self.descr = descr

    def __repr__(self) -> str:
        return repr(self.descr).encode().decode("latin-1")


def _written(fields: dict[str, Any], at: int, align: int) -> bytes:
    """The header of `np.save`, made longer so that from `at` it ends at a multiple of `align`."""
    out = io.BytesIO()
    try:
        npformat.write_array_header_1_0(out, fields)
        header = out.getvalue()
    except UnicodeEncodeError:
        # Field names beyond Latin-1 make it version 3.0: 2.0 in UTF-8. numpy has no public writer of that.
        npformat.write_array_header_2_0(out, fields | {"descr": _Utf8(fields["descr"])})
        header = out.getvalue()
        header = header[:6] + b"\x03" + header[7:]
    padding = -(at + len(header)) % align
    if padding:
        start = _text_at(header)
        length = (len(header) - start + padding).to_bytes(start - 8, "little")
        header = header[:8] + length + header[start:-1] + b" " * padding + b"\n"
    return header


def _text_at(header: bytes) -> int:
    return PREFIX.size if header[6] == 1 else LONG_PREFIX.size


def _text_of(header: bytes) -> str:
    """The literal in a header. Raises ValueError where `np.load` refuses to read it."""
    text = header[_text_at(header) :].decode("utf-8" if header[6] == 3 else "latin-1")
    if len(text) > MAX_HEADER_TEXT:
        raise ValueError(f"{len(text)} characters; np.load takes at most {MAX_HEADER_TEXT}")
    return text
