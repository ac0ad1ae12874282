"""The NPY blocks of an item file: from arrays to bytes, and back without trusting them.

This module owns the layout of an item file up to its footer: one or more NPY blocks back to back, each header
padded with spaces so that its data begins at a multiple of 64 bytes, so that `np.load` reads the first block
and further `np.load` on the same open file the others. Bytes after the footer are slack and mean nothing.

It promises that nothing is ever pickled or unpickled; that what `image_of` accepts, `parse` accepts and
`np.load` loads; that `parse` raises nothing but `BadItem`, whatever the bytes, reads nothing beyond the size
it is given, and allocates nothing in proportion to what a file merely claims; and that what `parse` returns,
`view` can show. Data bytes are carried as they are, padding of structured types included, as `np.save` does.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from spoolipc import footer
from spoolipc.errors import BadItem, TooLarge, UnsupportedArray
from spoolipc.footer import Buffer, Footer
from spoolipc.header import (
    LONG_PREFIX,
    MAGIC,
    MAX_HEADER,
    MAX_HEADER_TEXT,
    PREFIX,
    PREFIX_SIZE,
    TOO_LONG,
    Block,
    DType,
    canonical,
    fresh,
    header_of,
    read_header,
    text_of,
    widen,
)

Array = npt.NDArray[Any]
WritableBuffer = bytearray | memoryview | mmap.mmap

ALIGN = 64
"""Each block's data begins at a multiple of this many bytes."""
MAX_BLOCKS = 1024
"""The most arrays in one item."""

_CHUNK = 4 * 2**20
_NOTHING = bytearray(ALIGN)


@dataclass(frozen=True, slots=True)
class Image:
    """The layout of an item before it is written.

    Header k goes at `blocks[k].offset - len(headers[k])`; the footer goes at `end`, in bytes.
    """

    blocks: tuple[Block, ...]
    headers: tuple[bytes, ...]
    end: int


_MAX_IMAGES = 256
_MAX_IMAGE_BYTES = 16 * 1024
_images: dict[tuple[tuple[DType, int, tuple[int, ...], bool], ...], Image] = {}

_MAX_PARSED = 1024
_MAX_PARSED_BYTES = 4096
_parsed: dict[bytes, Block] = {}


def plain(obj: object) -> Array:
    """The array of an object, as a base `np.ndarray`.

    obj: an ndarray of any subclass but a masked array, or a numpy scalar. Returns the object itself if it is
    a base ndarray, a view of it if it is a subclass, a new 0-d array for a scalar.

    Raises UnsupportedArray for anything else.
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
    raise UnsupportedArray(f"a {name} is not a numpy array; convert it first, with np.asarray(x)")


def image_of(arrays: Sequence[Array]) -> Image:
    """The layout of an item that holds these arrays, from a bounded cache where it was asked for before.

    arrays: base ndarrays (see `plain`) of any dtype that needs no pickle, any shape and strides. One that is
    contiguous in Fortran order only keeps that order; metadata of a dtype is not kept, as with `np.save`.

    Returns an image that holds no reference to the arrays. Raises UnsupportedArray for a dtype that `np.save`
    cannot save and `np.load` restore without pickle, TooLarge for more than `MAX_BLOCKS` arrays, ValueError
    for none.
    """
    key = tuple([((dtype := a.dtype), dtype.num, a.shape, a.flags.fnc) for a in arrays])
    image = _images.get(key)
    if image is not None:
        return image
    if not arrays:
        raise ValueError("an item needs at least one array")
    if len(arrays) > MAX_BLOCKS:
        raise TooLarge(f"{len(arrays)} arrays in one item; at most {MAX_BLOCKS} are allowed")
    blocks: list[Block] = []
    headers: list[bytes] = []
    end = 0
    for array in arrays:
        descr, dtype = canonical(array.dtype)
        header = header_of(descr, array.flags.fnc, array.shape)
        spare = -(end + len(header)) % ALIGN
        if spare:
            header = widen(header, spare)
        if len(header) > MAX_HEADER or len(text_of(header)) > MAX_HEADER_TEXT:
            raise UnsupportedArray(TOO_LONG)
        block = Block(dtype, array.shape, array.flags.fnc, end + len(header), array.nbytes)
        blocks.append(block)
        headers.append(header)
        end = block.offset + block.nbytes
    image = Image(tuple(blocks), tuple(headers), end)
    if sum(map(len, headers)) <= _MAX_IMAGE_BYTES:
        if len(_images) >= _MAX_IMAGES:
            _images.clear()
        # Keyed by our own dtypes: the callers' can be renamed in place, and so would the key.
        own = [(b.dtype, num, b.shape, b.fortran) for b, (_, num, _, _) in zip(blocks, key, strict=True)]
        _images[tuple(own)] = image
    return image


def parse(buffer: Buffer, size: int) -> tuple[tuple[Block, ...], Footer]:
    """The blocks and the footer of an item file.

    buffer: the file's bytes, from its beginning; a memoryview must be of single bytes. size: the file's size
    in bytes, beyond which nothing is touched (a map longer than its file would be SIGBUS there).

    Returns blocks that `view` can show in this buffer, and the footer; neither refers to the buffer. Raises
    BadItem, with the reason, for anything but an undamaged item.
    """
    limit = len(buffer)
    if size < limit:
        limit = size
    blocks: list[Block] = []
    at = 0
    while True:
        if at + PREFIX_SIZE > limit:
            raise BadItem(_missing(len(blocks), at, limit))
        magic, version, minor, length = PREFIX.unpack_from(buffer, at)
        if magic != MAGIC:
            if blocks and magic == footer.MAGIC[:6]:
                break
            raise BadItem(_missing(len(blocks), at, limit))
        if len(blocks) == MAX_BLOCKS:
            raise BadItem(f"more than {MAX_BLOCKS} blocks")
        start = at + PREFIX_SIZE
        if version != 1 or minor:
            if version not in (2, 3) or minor:
                raise BadItem(f"block {len(blocks)}: NPY of unknown version {version}.{minor}")
            start = at + LONG_PREFIX.size
            if start > limit:
                raise BadItem(_missing(len(blocks), at, limit))
            length = LONG_PREFIX.unpack_from(buffer, at)[3]
        offset = start + length
        if length > MAX_HEADER:
            raise BadItem(f"block {len(blocks)}: header of {length} bytes; at most {MAX_HEADER} are allowed")
        if offset > limit:
            raise BadItem(f"block {len(blocks)}: header ends at {offset}, the file at {limit}")
        header = buffer[at:offset]
        if type(header) is not bytes:
            header = bytes(header)
        block = _parsed.get(header)
        if block is None:
            block = _parse_block(buffer, header, len(blocks), offset, limit)
        else:
            if block.offset != offset:
                block = _moved(block, len(blocks), offset)
            if offset + block.nbytes > limit:
                raise BadItem(_beyond(len(blocks), offset, block.nbytes, limit))
        blocks.append(block)
        at = offset + block.nbytes
    end = footer.read(buffer, at, limit)
    if end.names is not None and len(end.names) != len(blocks):
        raise BadItem(f"footer has {len(end.names)} names for {len(blocks)} arrays")
    return tuple(blocks), end


def parse_again(buffer: bytes | mmap.mmap, end: int) -> Block | None:
    """The one block of an item file whose header was parsed before and whose data end at `end`, else None.

    Never of an array in Fortran order, of one without data, or of one with fields. buffer: as for `parse`, and long
    enough for what lies before `end`.
    """
    header = buffer[: PREFIX_SIZE + int.from_bytes(buffer[8:PREFIX_SIZE], "little")]
    block = _parsed.get(header)
    offset = len(header)
    if block is None or offset + block.nbytes != end or offset % ALIGN:
        return None
    if block.fortran or not block.nbytes or block.dtype.names is not None:
        return None
    return block if block.offset == offset else _moved(block, 0, offset)


def view(buffer: Buffer, block: Block, *, writeable: bool) -> Array:
    """The array of one block, over the buffer itself.

    buffer: the file's bytes, from its beginning: the map itself, not a memoryview of it, and never an
    ndarray. block: of an image, or as `parse` returned it for this buffer. writeable: whether the array lets
    itself be written.

    Returns an array whose `base` is the buffer, so that every view taken of it, and of those, keeps this very
    array alive, and a `weakref.finalize` on it runs when none is left. numpy does not lock the buffer:
    closing or shrinking a map under the array is a segmentation fault. An array without data refers to no
    buffer.

    Raises ValueError if writeable is asked of a read-only buffer, TypeError if the block does not lie within
    the buffer.
    """
    # A dtype's field names can be changed in place by whoever gets the array: give away no shared one.
    dtype = block.dtype if block.dtype.names is None else fresh(block.dtype)
    order: Any = "F" if block.fortran else "C"
    array: Array
    if block.nbytes:
        array = np.ndarray(block.shape, dtype, buffer, block.offset, None, order)
    else:
        array = np.ndarray(block.shape, dtype, _NOTHING, 0, None, order)
    array.flags.writeable = writeable
    return array


def store(buffer: WritableBuffer, image: Image, arrays: Sequence[Array]) -> None:
    """Write headers and data of an item into a buffer, all of it but the footer.

    buffer: writable and at least `image.end` bytes; of a map, blocks must be allocated (a store to a hole on
    a full tmpfs is SIGBUS). image: what `image_of` returned for these very arrays. The arrays are read once,
    whatever their strides, and not kept.

    Raises ValueError or TypeError if buffer, image and arrays do not fit.
    """
    for block, header, array in zip(image.blocks, image.headers, arrays, strict=True):
        buffer[block.offset - len(header) : block.offset] = header
        if not block.nbytes:
            continue
        order: Any = "F" if block.fortran else "C"
        source = _opaque(array)
        dtype = block.dtype if source is array else source.dtype
        target: Array = np.ndarray(block.shape, dtype, buffer, block.offset, None, order)
        if source.shape != target.shape:
            raise ValueError(f"array of shape {source.shape} for a block of shape {target.shape}")
        np.copyto(target, source, casting="no")


def to_bytes(image: Image, arrays: Sequence[Array]) -> bytes:
    """Headers and data of an item as one bytes object, all of it but the footer; meant for small items.

    image: what `image_of` returned for these very arrays.
    """
    parts: list[Any] = []
    for block, header, array in zip(image.blocks, image.headers, arrays, strict=True):
        parts.append(header)
        if array.flags.c_contiguous:
            parts.append(array)
        elif block.fortran:
            parts.append(array.T)
        else:
            parts.append(_opaque(array).tobytes())
    return b"".join(parts)


def write_first(file: BinaryIO, arrays: Sequence[Array], image: Image) -> None:
    """Write headers and data of an item to a new file, all of it but the footer.

    file: a real binary file, empty and at its beginning; left flushed, and positioned at `image.end`. image:
    what `image_of` returned for these very arrays. Arrays that are not contiguous are copied a few MiB at a
    time.

    Raises OSError, with its errno, if not everything could be written.
    """
    for index, (block, header, array) in enumerate(zip(image.blocks, image.headers, arrays, strict=True)):
        contiguous = array.flags.c_contiguous or block.fortran
        if index == 0 and contiguous and header[6] == 1:
            _save(file, array.view(block.dtype), block, header)
            continue
        _write(file, header)
        if contiguous:
            _write(file, _raw(array))
        else:
            for chunk in _chunks(_opaque(array)):
                _write(file, _raw(chunk))
    file.flush()


def _parse_block(buffer: Buffer, header: bytes, index: int, offset: int, limit: int) -> Block:
    """The block of a header met for the first time, remembered if the file bears it out."""
    try:
        block = read_header(header, offset)
        if offset + block.nbytes <= limit:
            view(buffer, block, writeable=False)
    except Exception as error:  # literals provoke RecursionError, MemoryError, SyntaxError and more
        raise BadItem(f"block {index}: bad header: {error or type(error).__name__}") from None
    if offset % ALIGN:
        raise BadItem(_misaligned(index, offset))
    if offset + block.nbytes > limit:
        raise BadItem(_beyond(index, offset, block.nbytes, limit))
    if len(header) <= _MAX_PARSED_BYTES:
        if len(_parsed) >= _MAX_PARSED:
            _parsed.clear()
        _parsed[header] = block
    return block


def _moved(block: Block, index: int, offset: int) -> Block:
    if offset % ALIGN:
        raise BadItem(_misaligned(index, offset))
    return Block(block.dtype, block.shape, block.fortran, offset, block.nbytes)


def _misaligned(index: int, offset: int) -> str:
    return f"block {index}: data at {offset}, which is not a multiple of {ALIGN}"


def _beyond(index: int, offset: int, nbytes: int, limit: int) -> str:
    return f"block {index}: {nbytes} bytes of data at {offset}, but the file ends at {limit}"


def _missing(count: int, at: int, limit: int) -> str:
    if count:
        return f"no footer and no further block at {at} of {limit} bytes, after {count} blocks"
    return f"not an NPY file: no header at the beginning of its {limit} bytes"


def _opaque(array: Array) -> Array:
    """The same elements without their fields: a copy takes padding along and is a plain move of bytes."""
    if array.dtype.names is None or not array.dtype.itemsize:
        return array
    return array.view(f"V{array.dtype.itemsize}")


def _raw(array: Array) -> memoryview:
    """The bytes of a contiguous array, in the order in which they lie."""
    if not array.nbytes:
        return memoryview(b"")
    flat = array if array.flags.c_contiguous else array.T
    return flat.reshape(-1).view(np.uint8).data


def _chunks(array: Array) -> Iterator[Array]:
    """Contiguous copies of the parts of an array, in C order, each of a few MiB or of one element."""
    if array.nbytes <= _CHUNK or array.ndim == 0:
        yield np.ascontiguousarray(array)
        return
    row = array.nbytes // len(array)
    if row > _CHUNK:
        for part in array:
            yield from _chunks(np.asarray(part))
        return
    step = _CHUNK // row
    for start in range(0, len(array), step):
        yield np.ascontiguousarray(array[start : start + step])


def _save(file: BinaryIO, array: Array, block: Block, header: bytes) -> None:
    """`np.save`, and what it leaves out of a full disk's account.

    numpy writes data through a C stream. It reports a short write without an errno, and one in the last few
    KiB not at all, leaving the file's position after bytes that are not there. Writing the rest again either
    completes the file or raises what stood in the way.
    """
    end = block.offset + block.nbytes
    failure: OSError | None = None
    try:
        np.save(file, array, allow_pickle=False)
        file.flush()
    except OSError as error:
        if error.errno is not None:
            raise
        failure = error
    written = os.fstat(file.fileno()).st_size
    if written < end:
        file.seek(written)
        _write(file, header[written:])
        _write(file, _raw(array)[max(0, written - block.offset) :])
        file.flush()
    elif failure is not None:
        raise failure
    file.seek(end)


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of it: an unbuffered file may take only a part at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
