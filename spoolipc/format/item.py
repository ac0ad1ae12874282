"""An item file as a whole: from arrays to bytes, and back without trusting them.

This module owns the layout of an item file up to its footer: one or more NPY blocks back to back, each header padded
with spaces so that its data begin at a multiple of 64 bytes, so that `np.load` reads the first block and further
`np.load` on the same open file the others. Bytes after the footer are slack and mean nothing.

It promises that nothing is ever pickled or unpickled; that what `layout_of` accepts, `parse` accepts and `np.load`
loads; that `parse` raises nothing but `BadItem` and `UnknownVersion`, whatever the bytes, reads nothing beyond the size
it is given, and allocates nothing in proportion to what a file merely claims; and that what `parse` returns, `view` can
show. Data bytes are carried as they are, padding of structured types included, as `np.save` does.

Some functions here are on the path of every put and get, where a call of Python code is what costs: they do the case of
one array in line.
"""

from __future__ import annotations

import mmap
import operator
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray  # by itself: reading a name of numpy's takes long, as it has a `__getattr__`
from numpy.lib import format as npformat

from spoolipc.errors import BadItem, TooLarge, UnsupportedArray
from spoolipc.format import footer as footers
from spoolipc.format.footer import Buffer, Footer
from spoolipc.format.header import (
    LONG_PREFIX,
    MAGIC,
    MAX_HEADER,
    PREFIX,
    Block,
    DType,
    fresh,
    make_header,
    read_header,
)
from spoolipc.message import Array, ArraySpec, Message

WritableBuffer = bytearray | memoryview | mmap.mmap

ALIGN = 64
"""Each block's data begin at a multiple of this many bytes."""
MAX_BLOCKS = 1024
"""The most arrays in one item."""

_CHUNK = 2 * 2**20
_NOTHING = bytearray(ALIGN)
_new = tuple.__new__
_LENGTH = struct.Struct("<H").unpack_from
_NO_PREFIX = b"", 0, 0, 0


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an item's parts go.

    Header k goes at `blocks[k].offset - len(headers[k])`; the footer goes at `end`, in bytes.
    """

    blocks: tuple[Block, ...]
    headers: tuple[bytes, ...]
    end: int


_Kind = tuple[DType, int, tuple[int, ...], bool]
"""What a layout depends on: an array's dtype, the dtype's number (types that compare equal may differ in it), shape,
and whether it is in Fortran order only."""

_SMALL, _SMALL_OF_MAP = 2**14, 2**20
"""Bytes up to which a buffer, or a map, copies a contiguous array sooner than numpy does: that takes longer to make its
target than to copy 16 KB, and lets other threads run meanwhile."""
_MAX_LAYOUTS = 256
_MAX_LAYOUT_BYTES = 16 * 1024
_layouts: dict[tuple[_Kind, ...], Layout] = {}

_MAX_PARSED = 1024
_MAX_PARSED_BYTES = 4096
_parsed: dict[bytes, Block] = {}


def plain(obj: object) -> Array:
    """The array of an object, as a base `np.ndarray`.

    obj: an ndarray of any subclass but a masked array, a numpy scalar, or what lends its memory by `__dlpack__` or as a
    buffer (`memoryview`, `array.array`, `bytearray`). Returns the object itself if it is a base ndarray, a new 0-d
    array for a scalar, and else an array over the same memory.

    Raises UnsupportedArray for anything else: what is merely convertible would lose what is more than its numbers.
    """
    if type(obj) is np.ndarray:
        return obj
    if isinstance(obj, np.ma.MaskedArray):
        raise UnsupportedArray(
            "a masked array would lose its mask; "
            "put x.filled(value), or x.data and np.ma.getmaskarray(x) as two arrays"
        )
    if isinstance(obj, (np.ndarray, np.generic)):
        return np.asarray(obj)
    name = f"{type(obj).__module__}.{type(obj).__qualname__}".removeprefix("builtins.")
    if not isinstance(obj, type):
        try:
            if hasattr(type(obj), "__dlpack__"):  # of the type: some answer for what they merely wrap
                return np.asarray(np.from_dlpack(obj))  # type: ignore[arg-type]
            return np.asarray(memoryview(obj))  # type: ignore[arg-type]
        except TypeError:  # it has no buffer
            pass
        except (BufferError, RuntimeError, ValueError) as error:
            what = f"numpy cannot read a {name} where it is ({error}); put a plain copy of it in host memory"
            raise UnsupportedArray(what) from error
    raise UnsupportedArray(f"a {name} is not a numpy array; convert it first, with np.asarray(x)")


def layout_of(arrays: Sequence[Array]) -> Layout:
    """The layout of an item that holds these arrays, from a bounded cache where it was asked for before.

    arrays: base ndarrays (see `plain`) of any dtype that needs no pickle, any shape and strides. One that is
    contiguous in Fortran order only keeps that order; metadata of a dtype is not kept, as with `np.save`.

    Returns a layout that holds no reference to the arrays. Raises UnsupportedArray for a dtype that `np.save`
    cannot save and `np.load` restore without pickle, TooLarge for more than `MAX_BLOCKS` arrays, ValueError
    for none.
    """
    if len(arrays) == 1:
        array = arrays[0]
        dtype = array.dtype
        key: tuple[_Kind, ...] = ((dtype, dtype.num, array.shape, array.flags.fnc),)
    else:
        key = tuple([((dtype := a.dtype), dtype.num, a.shape, a.flags.fnc) for a in arrays])
    try:
        layout = _layouts.get(key)
    except TypeError:
        raise _unhashable(key) from None
    return _lay_out(key) if layout is None else layout


def layout_of_spec(spec: ArraySpec) -> Layout:
    """The layout of an item that holds one array as specified, which is not made.

    Raises as `layout_of` does, ValueError for a shape or an order that no array can have, TooLarge for one beyond
    any memory.
    """
    shape, dtype, order = spec
    if order not in ("C", "F"):
        raise ValueError(f"order must be 'C' or 'F', not {order!r}")
    shape = tuple(map(operator.index, shape))
    # As numpy sees it: what has no elements, or only one dimension that counts, is in both orders.
    fortran = order == "F" and 0 not in shape and sum(n > 1 for n in shape) > 1
    key = ((dtype, dtype.num, shape, fortran),)
    try:
        layout = _layouts.get(key)
    except TypeError:
        raise _unhashable(key) from None
    return _lay_out(key) if layout is None else layout


def store(buffer: WritableBuffer, layout: Layout, arrays: Sequence[Array]) -> None:
    """Write headers and data of an item into a buffer, all of it but the footer.

    buffer: writable and at least `layout.end` bytes; of a map, blocks must be allocated (a store to a hole on
    a full tmpfs is SIGBUS). layout: what `layout_of` returned for such arrays. The arrays are read once,
    whatever their strides, and not kept; one that lies in the buffer already, where it belongs, may be given.

    Raises ValueError or TypeError if buffer, layout and arrays do not fit.
    """
    if len(buffer) < layout.end:
        raise ValueError(f"a buffer of {len(buffer)} bytes for an item of {layout.end}")
    if len(arrays) != len(layout.blocks):
        raise ValueError(f"{len(arrays)} arrays for a layout of {len(layout.blocks)}")
    is_map = type(buffer) is mmap.mmap
    small = _SMALL_OF_MAP if is_map else _SMALL
    data: Any
    for block, header, array in zip(layout.blocks, layout.headers, arrays):  # noqa: B905 - `strict` doubles its time
        dtype = block.dtype
        if array.shape != block.shape or array.dtype != dtype:
            raise ValueError(
                f"array of {array.dtype} and shape {array.shape} for a block of {dtype} and {block.shape}"
            )
        start, nbytes = block.offset, block.nbytes
        buffer[start - len(header) : start] = header
        if not nbytes:  # of which numpy would copy each, and there may be any number
            continue
        if nbytes <= small and array.flags.c_contiguous:
            data = array if is_map else array.tobytes()
            buffer[start : start + nbytes] = data
            continue
        if dtype.names is not None:
            array = _opaque(array)
            dtype = array.dtype
        order: Any = "F" if block.fortran else "C"
        target: Array = ndarray(block.shape, dtype, buffer, start, None, order)
        target[...] = array  # not np.copyto, which calls Python code first


def to_bytes(layout: Layout, arrays: Sequence[Array], tail: bytes = b"") -> bytes:
    """Headers and data of an item, and `tail`, as one bytes object; meant for small items.

    layout: what `layout_of` returned for such arrays.
    """
    if len(arrays) == 1 and arrays[0].flags.c_contiguous:
        return b"".join((layout.headers[0], arrays[0].tobytes(), tail))
    buffer = bytearray(layout.end)
    store(buffer, layout, arrays)
    return bytes(buffer) + tail


def parts(
    layout: Layout, arrays: Sequence[Array], *, skip_first: bool = False
) -> Iterator[bytes | memoryview]:
    """Headers and data of an item piece by piece, in the order of the file, all of it but the footer.

    layout: what `layout_of` returned for such arrays. skip_first: leave out the first block, header and data.
    A contiguous array is one piece, its own memory; another is copied a few MiB at a time.
    """
    for index, (block, header, array) in enumerate(zip(layout.blocks, layout.headers, arrays, strict=True)):
        if skip_first and index == 0:
            continue
        yield header
        if array.flags.c_contiguous or block.fortran or not block.nbytes:
            yield _raw(array)
        else:
            size = max(1, _CHUNK // array.itemsize)
            how: Any = {"flags": ["external_loop", "buffered"], "op_flags": ["readonly", "contig"]}
            for chunk in np.nditer(_opaque(array), order="C", buffersize=size, **how):
                yield np.asarray(chunk).tobytes()


def savable(layout: Layout, arrays: Sequence[Array]) -> bool:
    """Whether `np.save` of the first array writes the first block, byte for byte, and warns of nothing."""
    array, header = arrays[0], layout.headers[0]
    return bool(
        (array.flags.c_contiguous or layout.blocks[0].fortran)
        and header[6] == 1  # later versions make np.save warn
        and npformat.drop_metadata(array.dtype) is array.dtype
    )


def parse(buffer: Buffer, size: int) -> tuple[tuple[Block, ...], Footer]:
    """The blocks and the footer of an item file.

    buffer: the file's bytes, from its beginning; a memoryview must be of single bytes. size: the file's size
    in bytes, beyond which nothing is touched (a map longer than its file would be SIGBUS there).

    Returns blocks that `view` can show in this buffer, and the footer; neither refers to the buffer. Raises
    UnknownVersion for the item of a later release, BadItem, with the reason, for anything else but an undamaged
    item.
    """
    limit = len(buffer)
    if size < limit:
        limit = size
    # Nearly every item is one array with a header met before.
    length = 10 + _LENGTH(buffer, 8)[0] if limit > 10 else 0
    header = bytes(buffer[: length if length < limit else limit])
    block = _parsed.get(header)
    if block is not None and block.offset == length:
        at = length + block.nbytes
        if at + 8 <= limit and buffer[at : at + 8] == footers.MAGIC:
            end = footers.read(buffer, at, limit)
            names = end[3]
            if not names or len(names) == 1:
                return (block,), end
    blocks: list[Block] = []
    at = 0
    while True:
        whole = at + PREFIX.size <= limit
        magic, version, minor, length = PREFIX.unpack_from(buffer, at) if whole else _NO_PREFIX
        if magic == footers.MAGIC[:6]:
            break
        if magic != MAGIC:
            raise BadItem(_missing(len(blocks), at, limit))
        if len(blocks) == MAX_BLOCKS:
            raise BadItem(f"more than {MAX_BLOCKS} blocks")
        start = at + PREFIX.size
        if version != 1 or minor:
            if version not in (2, 3) or minor:
                raise BadItem(f"block {len(blocks)}: NPY of unknown version {version}.{minor}")
            start = at + LONG_PREFIX.size
            length = LONG_PREFIX.unpack_from(buffer, at)[3] if start <= limit else 0
        offset = start + length
        if length > MAX_HEADER:
            raise BadItem(f"block {len(blocks)}: header of {length} bytes; at most {MAX_HEADER} are allowed")
        if offset > limit:
            raise BadItem(f"block {len(blocks)}: header ends at {offset}, the file at {limit}")
        header = bytes(buffer[at:offset])
        block = _parsed.get(header)
        if block is None or block.offset != offset or offset + block.nbytes > limit:
            block = _block(buffer, header, len(blocks), offset, limit)
        blocks.append(block)
        at = offset + block.nbytes
    end = footers.read(buffer, at, limit)
    if not blocks:
        raise BadItem(_missing(0, at, limit))
    if end.names and len(end.names) != len(blocks):
        raise BadItem(f"footer has {len(end.names)} names for {len(blocks)} arrays")
    return tuple(blocks), end


def view(buffer: Buffer, block: Block, *, writeable: bool = False) -> Array:
    """The array of one block, over the buffer itself.

    buffer: the file's bytes, from its beginning: the map itself, not a memoryview of it, or an ndarray of single
    bytes over it, which all then keep alive. block: of a layout, or as `parse` returned it for this buffer.
    writeable: whether the array lets itself be written.

    Returns an array whose `base` is the buffer, and so is that of every view taken of it where the buffer is an
    ndarray; else the array itself. numpy does not lock a map that is the buffer: closing or shrinking it under the
    array is a segmentation fault. An array without data refers to no buffer.

    Raises ValueError if writeable is asked of a read-only buffer, TypeError if the block does not lie within
    the buffer.
    """
    # A dtype's field names can be changed in place by whoever gets the array: give away no shared one.
    dtype = block.dtype if block.dtype.names is None else fresh(block.dtype)
    order: Any = "F" if block.fortran else "C"
    array: Array
    if block.nbytes:
        array = ndarray(block.shape, dtype, buffer, block.offset, None, order)
    else:
        array = ndarray(block.shape, dtype, _NOTHING, 0, None, order)
    if array.flags.writeable is not writeable:
        array.setflags(write=writeable)
    return array


def message(
    buffer: Buffer,
    blocks: Sequence[Block],
    footer: Footer,
    known: tuple[int, int, int] = (0, 0, 0),
    *,
    copy: bool,
    writeable: bool = False,
) -> Message:
    """The message in an item file.

    buffer: as for `view`. blocks, footer: as `parse` returned them for it. known: seq, attempt, nbytes. copy: whether
    the arrays are over a copy of their own and do not need the buffer. writeable: whether they let themselves be
    written.
    """
    put_time, end, _, names, meta, id, _, _, _ = footer
    if copy:  # not by numpy, which would lose padding
        buffer = (bytearray if writeable else bytes)(buffer[:end])
    if len(blocks) == 1:
        arrays: tuple[Array, ...] = (view(buffer, blocks[0], writeable=writeable),)
    else:
        arrays = tuple([view(buffer, block, writeable=writeable) for block in blocks])
    seq, attempt, nbytes = known
    # Not Message(...), which is a call of Python code.
    return _new(Message, (arrays, names, meta, put_time, id, seq, attempt, nbytes))


def copied(message: Message) -> Message:
    """The same with arrays of one's own, writable, in the same order of memory and with the same padding."""
    return message._replace(arrays=tuple(map(_copied, message.arrays)))


def copied_into(message: Message, out: Array) -> Array:
    """`out`, which holds the message's one array from now on, padding included. Raises ValueError, `out` being as it
    was, where the message is another kind of thing."""
    array = message.arrays[0]
    if message.names is not None:
        raise ValueError(
            f"the item is a dict of arrays {list(message.names)}; out takes one array, put as such"
        )
    if array.shape != out.shape or array.dtype != out.dtype:
        what = f"the item is an array of {array.dtype} and shape {array.shape}, out one of {out.dtype} and {out.shape}"
        raise ValueError(what)
    if array.nbytes:
        _opaque(out)[...] = _opaque(array)
    return out


def _copied(array: Array) -> Array:
    if not array.nbytes:
        return np.ndarray(array.shape, array.dtype, bytearray(1), order="F" if array.flags.fnc else "C")
    copy = np.empty_like(array)
    _opaque(copy)[...] = _opaque(array)
    return copy


def checksum_of(buffer: Buffer, end: int) -> int:
    """The checksum of an item: CRC-32 of the first `end` bytes, that is all before the footer, padding included.

    `zlib.crc32` reads 54 MB in 13 ms, three times what writing them costs, so it is stored only on request.
    """
    with memoryview(buffer) as whole:
        return zlib.crc32(whole[:end])


def verify(buffer: Buffer, footer: Footer) -> None:
    """Raise BadItem when an item's bytes are not those that its footer was written for; without a checksum
    there, anything passes."""
    if footer.checksum is None:
        return
    actual = checksum_of(buffer, footer.data_end)
    if actual != footer.checksum:
        raise BadItem(
            f"checksum mismatch: the data have {actual:#010x}, the footer says {footer.checksum:#010x}"
        )


def _unhashable(key: tuple[_Kind, ...]) -> UnsupportedArray:
    what = "has a title that cannot be hashed, as a list or a dict; give the field a title that is a string or a tuple"
    return UnsupportedArray(f"dtype {key[0][0]} {what}" if len(key) == 1 else f"one of the dtypes {what}")


def _lay_out(key: tuple[_Kind, ...]) -> Layout:
    if not key:
        raise ValueError("an item needs at least one array")
    if len(key) > MAX_BLOCKS:
        raise TooLarge(f"{len(key)} arrays in one item; at most {MAX_BLOCKS} are allowed")
    blocks: list[Block] = []
    headers: list[bytes] = []
    own: list[_Kind] = []
    end = 0
    for dtype, number, shape, fortran in key:
        header, block = make_header(dtype, shape, fortran, end, ALIGN)
        blocks.append(block)
        headers.append(header)
        # Keyed by our own dtypes: the callers' can be renamed in place, and so would the key.
        own.append((block.dtype, number, shape, fortran))
        end = block.offset + block.nbytes
    layout = Layout(tuple(blocks), tuple(headers), end)
    if sum(map(len, headers)) <= _MAX_LAYOUT_BYTES:
        if len(_layouts) >= _MAX_LAYOUTS:
            _layouts.clear()
        _layouts[tuple(own)] = layout
    return layout


def _block(buffer: Buffer, header: bytes, index: int, offset: int, limit: int) -> Block:
    """The block of a header that was not met before, or not there; remembered if the file bears it out."""
    block = _parsed.get(header)
    try:
        if block is None:
            block = read_header(header, offset)
            if offset + block.nbytes <= limit:
                view(buffer, block)  # or numpy says what else it minds
        elif block.offset != offset:
            block = Block(block.dtype, block.shape, block.fortran, offset, block.nbytes)
    except Exception as error:  # literals provoke RecursionError, MemoryError, SyntaxError and more
        raise BadItem(f"block {index}: bad header: {error or type(error).__name__}") from None
    if offset % ALIGN:
        raise BadItem(f"block {index}: data at {offset}, which is not a multiple of {ALIGN}")
    if offset + block.nbytes > limit:
        raise BadItem(
            f"block {index}: {block.nbytes} bytes of data at {offset}, but the file ends at {limit}"
        )
    if len(header) <= _MAX_PARSED_BYTES:
        if len(_parsed) >= _MAX_PARSED and header not in _parsed:
            _parsed.clear()
        if index == 0 or header not in _parsed:  # the most are first blocks: those are found at once
            _parsed[header] = block
    return block


def _missing(count: int, at: int, limit: int) -> str:
    if count:
        return f"no footer and no further block at {at} of {limit} bytes, after {count} blocks"
    return f"not an NPY file: no header at the beginning of its {limit} bytes"


def _opaque(array: Array) -> Array:
    """The same elements without their fields: a copy takes padding along and is a plain move of bytes."""
    if array.dtype.names is None:
        return array
    return array.view(f"V{array.dtype.itemsize}")


def _raw(array: Array) -> memoryview:
    """The bytes of a contiguous array, in the order in which they lie."""
    if not array.nbytes:
        return memoryview(b"")
    flat = array if array.flags.c_contiguous else array.T
    return flat.reshape(-1).view(np.uint8).data
