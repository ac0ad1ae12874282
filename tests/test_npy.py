"""An item file is plain NPY for everyone, and nothing but `BadItem` for hostile bytes."""

from __future__ import annotations

import errno
import gc
import io
import mmap
import pickle
import resource
import tracemalloc
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spoolipc import footer, npy
from spoolipc.errors import BadItem, TooLarge, UnsupportedArray
from spoolipc.npy import Array

ALIGNED = np.dtype([("a", "i1"), ("b", "f8"), ("c", "i2")], align=True)
NESTED = np.dtype([("x", ALIGNED), ("y", [("p", ">i4", (2, 3)), ("q", "S3")], (2,)), ("z", "M8[us]")])
TITLED = np.dtype([(("a title", "a"), "<i4"), ("b", "V3")])
DTYPES: list[Any] = [
    *"?bBhHiIlLqQefdgFDG",
    *("S5", "U3", "V7", "U0", "S0", "V0", "<c16", ">c8", ">i2", ">f8", ">U2", ">M8[s]"),
    *("M8[ns]", "M8[D]", "M8[25s]", "M8", "m8[ms]", "m8"),
    *(ALIGNED, NESTED, TITLED, np.dtype([]), np.dtype({"names": [], "formats": [], "itemsize": 8})),
    np.dtype([("a", "<i4"), ("b", "<f8")]).newbyteorder(),
    np.dtype((np.record, [("r", "u1"), ("g", "u1")])),
    np.dtype({"names": ["late"], "formats": ["<i4"], "offsets": [12], "itemsize": 32}),
    np.dtype([("größe", "f4")]),
    np.dtype([("長さ", "f4"), ("\udc80", "i1")]),
    np.dtype([("(" * 40 + "'\"\n", "f4")]),
]


def filled(dtype: Any, shape: tuple[int, ...]) -> Array:
    """An array of distinct bytes, padding included, without invalid characters or booleans."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = bytes(range(1, 128)) * (size // 127 + 1)
    if dtype.kind == "U":
        raw = "".join(map(chr, range(1, size + 1))).encode(
            "utf-32-be" if dtype.str[0] == ">" else "utf-32-le"
        )
    if dtype.kind == "b":
        raw = b"\x01\x00" * size
    array: Array = np.ndarray(shape, dtype, bytearray(raw[:size] or b"\0"))
    return array


ARRAYS: list[Array] = [filled(dtype, (3, 4)) for dtype in DTYPES]
LAYOUTS: dict[str, Array] = {
    "0-d": np.array(2.5),
    "0-d structured": np.array((1, 2.0, 3), ALIGNED),
    "no elements": np.zeros((0, 3)),
    "no elements, Fortran": np.zeros((0, 3, 2), order="F"),
    "no elements of huge rows": np.ndarray((0, 2**52), "f8", bytearray(1)),
    "Fortran": np.asfortranarray(filled("f8", (5, 7))),
    "Fortran 3-d": np.asfortranarray(filled("i2", (5, 7, 3))),
    "Fortran structured": np.asfortranarray(filled(NESTED, (5, 7))),
    "stepped": filled("f8", (9, 10))[::2, 1::3],
    "reversed": filled("i4", (50,))[::-1],
    "transposed": filled("f4", (3, 4, 5)).transpose(1, 2, 0),
    "broadcast": np.broadcast_to(filled("i8", (3,)), (4, 3)),
    "stepped structured": filled(NESTED, (9, 10))[::2, ::3],
    "stepped unicode": filled("U3", (9,))[::2],
    "unaligned": np.ndarray((5,), "f8", bytearray(range(41)), 1),
    "64 dimensions": np.ones((1,) * 63 + (3,)),
    "read-only": filled("f8", (3,)),
}
LAYOUTS["read-only"].flags.writeable = False
EVERY = [pytest.param(a, id=f"{i} {a.dtype.str}") for i, a in enumerate(ARRAYS)]
EVERY += [pytest.param(a, id=name) for name, a in LAYOUTS.items()]


def item(arrays: Sequence[Array], slack: bytes = b"", **footing: Any) -> bytes:
    image = npy.image_of(arrays)
    return npy.to_bytes(image, arrays) + footer.pack(image.end, 1, **footing) + slack


def raw(array: Array) -> bytes:
    """The bytes that `np.save` writes after the header."""
    return npy.to_bytes(npy.image_of([array]), [array])[npy.image_of([array]).blocks[0].offset :]


def same(found: Array, array: Array) -> None:
    assert found.dtype == array.dtype
    assert found.dtype.byteorder == array.dtype.byteorder
    assert found.shape == array.shape
    assert found.flags.fnc == array.flags.fnc
    assert raw(found) == raw(array)


def owner(array: Array) -> object:
    return array.base


def saved(array: Array) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # field names beyond Latin-1
        np.save(out, array, allow_pickle=False)
    return out.getvalue()


def crafted(header: str | bytes, data: bytes = b"", version: int = 1, pad: bool = True) -> bytes:
    """An item with a header of one's own, aligned, and an honest footer."""
    text = header.encode("latin-1") if isinstance(header, str) else header
    width = 2 if version == 1 else 4
    if pad:
        text += b" " * (-(9 + width + len(text)) % 64) + b"\n"
    body = b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(width, "little") + text + data
    return body + footer.pack(len(body), 1)


def fields(descr: object = "<f8", fortran: object = False, shape: object = (2,)) -> str:
    return repr({"descr": descr, "fortran_order": fortran, "shape": shape})


class TestRoundTrip:
    @pytest.mark.parametrize("array", EVERY)
    def test_first_block_is_what_np_save_writes(self, array: Array) -> None:
        image = npy.image_of([array])
        data = npy.to_bytes(image, [array])
        expected = saved(array)
        assert data[: image.blocks[0].offset] == image.headers[0] == expected[: image.blocks[0].offset]
        if array.dtype.names is None or array.flags.c_contiguous or array.flags.f_contiguous:
            assert data == expected
        assert len(data) == image.end

    @pytest.mark.parametrize("array", EVERY)
    def test_np_load_reads_the_file(self, array: Array, tmp_path: Path) -> None:
        path = tmp_path / "item.npy"
        path.write_bytes(item([array], b"slack", meta={"k": 1}))
        same(np.load(path), array)

    @pytest.mark.parametrize("array", EVERY)
    def test_parse_and_view_give_back_the_array(self, array: Array) -> None:
        data = item([array], b"slack")
        for _ in range(2):  # the second time from the cache
            blocks, end = npy.parse(data, len(data))
            assert blocks == npy.image_of([array]).blocks
            assert end.put_time == 1
            same(npy.view(data, blocks[0], writeable=False), array)

    @pytest.mark.parametrize("array", EVERY)
    def test_store_writes_the_same_bytes(self, array: Array) -> None:
        image = npy.image_of([array, array])
        expected = npy.to_bytes(image, [array, array])
        for buffer in (bytearray(b"\xaa" * image.end), mmap.mmap(-1, image.end)):
            npy.store(buffer, image, [array, array])
            assert buffer[: image.end] == expected
        held = bytearray(image.end)
        npy.store(memoryview(held), image, [array, array])
        assert held == expected

    @pytest.mark.parametrize("buffering", [0, -1])
    @pytest.mark.parametrize("array", EVERY)
    def test_write_first_writes_the_same_bytes(self, array: Array, buffering: int, tmp_path: Path) -> None:
        image = npy.image_of([array, array])
        with open(tmp_path / "item.npy", "wb", buffering) as file:
            npy.write_first(file, [array, array], image)
            assert file.tell() == image.end
        assert (tmp_path / "item.npy").read_bytes() == npy.to_bytes(image, [array, array])

    def test_further_blocks_are_aligned_and_read_by_repeated_np_load(self, tmp_path: Path) -> None:
        arrays = [*ARRAYS, *LAYOUTS.values()]
        data = item(arrays, b"\x93NUMPY slack", names=[str(i) for i in range(len(arrays))])
        path = tmp_path / "item.npy"
        path.write_bytes(data)
        blocks, end = npy.parse(data, len(data))
        assert len(blocks) == len(arrays)
        assert all(block.offset % 64 == 0 for block in blocks)
        with open(path, "rb") as file:
            for block, array in zip(blocks, arrays, strict=True):
                same(np.load(file), array)
                same(npy.view(data, block, writeable=False), array)
            assert file.tell() == end.data_end

    def test_padding_and_payload_bytes_survive_strided_copies(self) -> None:
        array = filled(ALIGNED, (8,))[::2]
        assert raw(array) == b"".join(array[i : i + 1].tobytes() for i in range(4))
        assert raw(np.array([np.nan, -0.0]).view("u8")[::-1]) == np.array([-0.0, np.nan]).tobytes()

    @pytest.mark.parametrize("shape", [(3, 700_000, 2), (5_000_000, 2), (2, 3_000_000)])
    def test_large_strided_arrays_are_written_in_pieces(self, shape: tuple[int, ...], tmp_path: Path) -> None:
        array = np.arange(np.prod(shape), dtype="i4").reshape(shape)[..., ::-1]
        image = npy.image_of([array])
        with open(tmp_path / "item.npy", "wb") as file:
            tracemalloc.start()
            npy.write_first(file, [array], image)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 10 * 2**20
        assert np.array_equal(np.load(tmp_path / "item.npy"), array)


class TestPlain:
    def test_base_arrays_pass_through(self) -> None:
        array = np.zeros(3)
        assert npy.plain(array) is array

    def test_subclasses_become_views_without_copy(self, tmp_path: Path) -> None:
        mapped = np.memmap(tmp_path / "m", "f8", "w+", shape=(4,))
        matrix = np.eye(2).view(np.matrix)
        record = np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
        for array in (mapped, matrix, record):
            found = npy.plain(array)
            assert type(found) is np.ndarray
            assert np.shares_memory(found, array)
            same(npy.view(item([found]), npy.image_of([found]).blocks[0], writeable=False), found)

    @pytest.mark.parametrize(
        "scalar", [np.float32(1.5), np.int8(3), np.str_("ab"), np.datetime64(1, "s"), np.bool()]
    )
    def test_numpy_scalars_become_0d_arrays(self, scalar: np.generic) -> None:
        found = npy.plain(scalar)
        assert found.shape == ()
        assert found.dtype == scalar.dtype
        assert found[()] == scalar

    @pytest.mark.parametrize("other", [[1, 2], 1.0, "text", None, memoryview(b"x"), object])
    def test_anything_else_is_refused_with_the_remedy(self, other: object) -> None:
        with pytest.raises(UnsupportedArray, match=rf"a {type(other).__name__} is.*np\.asarray"):
            npy.plain(other)

    def test_a_masked_array_is_refused_rather_than_unmasked(self) -> None:
        with pytest.raises(UnsupportedArray, match="lose its mask"):
            npy.plain(np.ma.masked_array([1, 2], [True, False]))


class TestImage:
    @pytest.mark.parametrize("array", EVERY)
    def test_asked_again_comes_from_the_cache(self, array: Array) -> None:
        assert npy.image_of([array]) is npy.image_of([array])

    def test_cache_is_bounded(self) -> None:
        for n in range(600):
            npy.image_of([np.zeros(n, "u1")])
        npy.image_of([np.zeros(0)] * 1000)
        assert len(npy._images) <= npy._MAX_IMAGES
        assert all(sum(map(len, i.headers)) <= npy._MAX_IMAGE_BYTES for i in npy._images.values())

    def test_dtypes_that_differ_never_share_an_image(self) -> None:
        plain = np.dtype([("a", "i4")])
        for dtype in (
            plain,
            [(("t", "a"), "i4")],
            [(("u", "a"), "i4")],
            [("a", ">i4")],
            [("b", "i4")],
            "i4",
            "V4",
        ):
            array = np.zeros(3, dtype)
            assert npy.image_of([array]).headers[0] == saved(array)[:128]
            assert npy.image_of([array]).blocks[0].dtype == array.dtype

    def test_dtypes_that_compare_equal_leak_nothing_into_each_other(self) -> None:
        tagged = np.dtype([("a", np.dtype("f8", metadata={"secret": 1}))], metadata={"secret": 2})
        array = np.zeros(3, tagged)
        image = npy.image_of([array])
        assert npy.image_of([np.zeros(3, [("a", "f8")])]) is image
        assert image.blocks[0].dtype.metadata is None
        assert image.blocks[0].dtype["a"].metadata is None
        data = item([array])
        same(npy.view(data, npy.parse(data, len(data))[0][0], writeable=False), np.zeros(3, [("a", "f8")]))

    def test_metadata_is_dropped_without_a_warning_by_every_way_of_writing(self, tmp_path: Path) -> None:
        array = np.arange(3, dtype=np.dtype("f8", metadata={"x": 1}))
        image = npy.image_of([array])
        with open(tmp_path / "item.npy", "wb") as file:
            npy.write_first(file, [array], image)
        held = bytearray(image.end)
        npy.store(held, image, [array])
        assert (tmp_path / "item.npy").read_bytes() == held == npy.to_bytes(image, [array])

    def test_fields_renamed_in_place_do_not_corrupt_the_caches(self) -> None:
        dtype = np.dtype([("in", [("a", "i4")]), ("b", "i4")])
        array = np.zeros(2, dtype)
        data = item([array])
        array.dtype["in"].names = ("renamed",)
        assert b"renamed" in npy.image_of([array]).headers[0]
        shown = npy.view(data, npy.parse(data, len(data))[0][0], writeable=False)
        shown.dtype.names = ("p", "q")
        shown.dtype["p"].names = ("r",)
        again = npy.view(data, npy.parse(data, len(data))[0][0], writeable=False)
        assert again.dtype == np.dtype([("in", [("a", "i4")]), ("b", "i4")])

    @pytest.mark.parametrize("dtype", ["O", [("a", "i4"), ("b", "O")], [("a", [("b", "O", (2,))])]])
    def test_objects_are_refused_with_the_remedy(self, dtype: Any) -> None:
        with pytest.raises(UnsupportedArray, match=r"Python objects.*pickle.*astype"):
            npy.image_of([np.zeros(2, dtype)])

    def test_variable_width_strings_are_refused_with_the_remedy(self) -> None:
        with pytest.raises(UnsupportedArray, match=r"cannot describe.*astype\('U'\)"):
            npy.image_of([np.array(["a", "b"], np.dtypes.StringDType())])

    @pytest.mark.parametrize(
        "dtype",
        [
            np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 2]}),
            np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [4, 0]}),
        ],
    )
    def test_overlapping_and_shuffled_fields_are_refused(self, dtype: Any) -> None:
        with pytest.raises(UnsupportedArray, match=r"cannot be stored.*repack_fields"):
            npy.image_of([np.zeros(2, dtype)])

    @pytest.mark.parametrize("fields", [500, 8000])
    def test_a_header_that_np_load_would_refuse_is_refused(self, fields: int) -> None:
        with pytest.raises(UnsupportedArray, match="several arrays"):
            npy.image_of([np.zeros(2, [(f"field number {i}", "f8") for i in range(fields)])])

    def test_number_of_arrays_is_bounded(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            npy.image_of([])
        arrays = [np.zeros(1)] * npy.MAX_BLOCKS
        data = item(arrays)
        assert len(npy.parse(data, len(data))[0]) == npy.MAX_BLOCKS
        with pytest.raises(TooLarge, match="at most 1024"):
            npy.image_of([*arrays, np.zeros(1)])
        one_more = data[: npy.image_of(arrays).end] + npy.image_of([np.zeros(0)]).headers[0]
        with pytest.raises(BadItem, match="more than 1024"):
            npy.parse(one_more, len(one_more))


class TestView:
    def test_views_of_views_keep_the_very_array_alive(self) -> None:
        buffer = mmap.mmap(-1, 4096)
        array = np.arange(100.0).reshape(10, 10)
        image = npy.image_of([array])
        npy.store(buffer, image, [array])
        shown = npy.view(buffer, image.blocks[0], writeable=False)
        assert owner(shown) is buffer
        alive = weakref.ref(shown)
        part: Any = shown[2:][::2].T.view(np.uint64)[None, 1:]
        held: list[Any] = [
            part.data,
            np.asarray(part.view(np.recarray)),
            np.frombuffer(shown, "u1")[3:4],
            part[0].flat,
        ]
        del shown, part
        while held:
            gc.collect()
            assert alive() is not None
            held.pop()
        gc.collect()
        assert alive() is None

    def test_structured_views_refer_to_the_buffer_too(self) -> None:
        data = item([filled(NESTED, (3,))])
        shown = npy.view(data, npy.parse(data, len(data))[0][0], writeable=False)
        assert owner(shown) is data
        alive = weakref.ref(shown)
        field = shown["y"]["p"][1:]
        del shown
        gc.collect()
        assert alive() is not None
        del field
        gc.collect()
        assert alive() is None

    def test_writeable_views_write_into_the_buffer_and_others_refuse(self) -> None:
        buffer = bytearray(item([np.zeros(4)]))
        block = npy.parse(buffer, len(buffer))[0][0]
        npy.view(buffer, block, writeable=True)[:] = 7
        shown = npy.view(buffer, block, writeable=False)
        assert shown.tolist() == [7] * 4
        with pytest.raises(ValueError, match="read-only"):
            shown[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            npy.view(bytes(buffer), block, writeable=True)

    @pytest.mark.parametrize("dtype", ["f8", "U0", ALIGNED])
    def test_arrays_without_data_need_no_buffer(self, dtype: Any) -> None:
        for order in "CF":
            array = np.zeros((3, 0, 2), dtype, order=order)  # type: ignore[call-overload]
            shown = npy.view(b"", npy.image_of([array]).blocks[0], writeable=True)
            assert (shown.shape, shown.dtype, shown.flags.writeable) == (array.shape, array.dtype, True)


class TestStore:
    def test_what_does_not_fit_is_refused(self) -> None:
        image = npy.image_of([np.zeros((2, 3))])
        for wrong in (np.zeros(3), np.zeros((2, 3), ">f8"), np.zeros((2, 3), "i8")):
            with pytest.raises((ValueError, TypeError)):
                npy.store(bytearray(image.end), image, [wrong])
        with pytest.raises(ValueError, match="zip"):
            npy.store(bytearray(image.end), image, [])
        with pytest.raises((ValueError, TypeError)):
            npy.store(bytearray(image.end - 1), image, [np.zeros((2, 3))])


class TestFullDisk:
    @pytest.mark.parametrize("buffering", [0, -1])
    @pytest.mark.parametrize("room", [0, 50, 128, 129, 1000, 300_000])
    @pytest.mark.parametrize("order", ["C", "F", "K"])
    def test_a_write_cut_short_is_an_error_with_its_errno(
        self, order: Any, room: int, buffering: int, tmp_path: Path
    ) -> None:
        size = (300, 200) if room > 1000 else (20, 10)
        array = np.ones(size, order="C" if order == "K" else order)
        arrays = [array[:, ::2] if order == "K" else array] * 2
        image = npy.image_of(arrays)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        file = open(tmp_path / "item.npy", "wb", buffering)  # noqa: SIM115
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            with pytest.raises(OSError) as caught:  # noqa: PT011
                npy.write_first(file, arrays, image)
            assert caught.value.errno == errno.EFBIG
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            file.close()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not an NPY file"),
    "nine bytes": (b"\x93NUMPY\x01\x00\x10", "not an NPY file"),
    "garbage": (b"GARBAGE" * 100, "not an NPY file"),
    "only a footer": (footer.pack(0, 1), "not an NPY file"),
    "version 4": (crafted(fields(), bytes(16), version=4), "unknown version 4.0"),
    "version 1.1": (b"\x93NUMPY\x01\x01\x10\x00" + bytes(100), "unknown version 1.1"),
    "cut in a long prefix": (b"\x93NUMPY\x02\x00\x10\x00\x00", "not an NPY file"),
    "header of 10 MB": (crafted(fields().ljust(10**7), bytes(16), version=2), "at most 65536"),
    "header of 4 GB, claimed": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "at most 65536"),
    "header past the end": (b"\x93NUMPY\x01\x00\xff\xff" + bytes(100), "header ends at"),
    "header np.load refuses": (crafted(fields().ljust(20_000), bytes(16)), "at most 10000"),
    "not a literal": (crafted("__import__('os').abort()"), "not a Python literal"),
    "not closed": (crafted("{'descr': '<f8', "), "SyntaxError"),
    "null byte": (crafted(fields() + "\0"), "not a Python literal"),
    "not a dict": (crafted("[1, 2]"), "a list, not a dict"),
    "not UTF-8": (crafted(b"\xff\xfe" * 50, version=3), "bad header"),
    "a key missing": (crafted("{'descr': '<f8', 'shape': (2,)}"), "keys other than"),
    "a key too many": (crafted(fields()[:-1] + ", 'x': 1}"), "keys other than"),
    "keys not strings": (crafted("{1: 2, 3: 4, 5: 6}"), "keys other than"),
    "order not bool": (crafted(fields(fortran=1), bytes(16)), "neither True nor False"),
    "shape a list": (crafted(fields(shape=[2]), bytes(16)), "tuple of integers"),
    "shape of bools": (crafted(fields(shape=(True, True)), bytes(16)), "tuple of integers"),
    "shape of floats": (crafted(fields(shape=(2.0,)), bytes(16)), "tuple of integers"),
    "negative": (crafted(fields(shape=(-1,))), "negative"),
    "two negatives": (crafted(fields(shape=(-2, -1)), bytes(16)), "negative"),
    "2**60 elements": (crafted(fields(shape=(2**60,))), "larger than any memory"),
    "2**60 bytes": (crafted(fields(shape=(2**57,))), "the file ends at"),
    "2**64 rows": (crafted(fields(shape=(2**64,))), "impossibly large"),
    "an enormous integer": (crafted(fields().replace("2,", "0x" + "f" * 9000 + ",")), "impossibly large"),
    "product overflows to 0": (crafted(fields(shape=(2**32, 2**32))), "larger than any memory"),
    "overflow hidden by a zero": (crafted(fields(shape=(0, 2**62, 4))), "larger than any memory"),
    "zero-size elements": (crafted(fields("<U0", shape=(2**62, 4))), "larger than any memory"),
    "65 dimensions": (crafted(fields(shape=(1,) * 65), bytes(8)), "bad header"),
    "objects": (crafted(fields("|O"), bytes(16)), "needs pickle"),
    "objects in a field": (crafted(fields([("a", "|O")]), bytes(16)), "needs pickle"),
    "pickle inside": (crafted(fields("|O", shape=()), pickle.dumps(print)), "needs pickle"),
    "dtype by code": (crafted(fields("f8,f8"), bytes(32)), "unknown dtype"),
    "dtype by name": (crafted(fields("float64"), bytes(16)), "unknown dtype"),
    "dtype by dict": (crafted(fields({"names": ["a"], "formats": ["O"]}), bytes(16)), "not a string"),
    "dtype of subarray": (crafted(fields(("<f8", (2,))), bytes(32)), "not a string"),
    "dtype of odd size": (crafted(fields("<f7"), bytes(16)), "bad header"),
    "dtype of bytes": (crafted(fields(b"<f8"), bytes(16)), "not a string"),
    "dtype too large": (crafted(fields("<V9999999999"), bytes(16)), "bad header"),
    "subarray too large": (crafted(fields([("a", "<f8", (2**40,))]), bytes(16)), "bad header"),
    "subarray negative": (crafted(fields([("a", "<f8", (-1,))]), bytes(16)), "shape"),
    "subarray of bools": (crafted(fields([("a", "<f8", (True,))]), bytes(16)), "shape"),
    "field twice": (crafted(fields([("a", "<f8"), ("a", "<f8")]), bytes(32)), "bad header"),
    "field without dtype": (crafted(fields([("a",)]), bytes(32)), "tuple of name"),
    "field name not a string": (crafted(fields([(1, "<f8")]), bytes(32)), "name"),
    "datetime unit": (crafted(fields("<M8[xy]"), bytes(32)), "bad header"),
    "misaligned data": (crafted(fields() + "\n", bytes(16), pad=False), "multiple of 64"),
    "data past the end": (saved(np.zeros(100))[:-1], "but the file ends"),
    "no footer": (saved(np.zeros(100)), "no footer"),
    "half a footer": (item([np.zeros(3)])[:-1], "ends before the footer"),
    "footer of elsewhere": (saved(np.zeros(4)) + footer.pack(64, 1), "data ends at 64"),
    "garbage for a footer": (saved(np.zeros(4)) + b"garbage" * 10, "no footer"),
    "names too many": (item([np.zeros(4)], names=["a", "b"]), "2 names for 1 arrays"),
    "names too few": (item([np.zeros(4)] * 3, names=["a", "b"]), "2 names for 3 arrays"),
    "misaligned second block": (saved(np.zeros(1)) + item([np.zeros(4)]), "block 1: data at"),
    "brackets": (crafted("[" * 9000), "bad header"),
    "minuses": (crafted("-" * 9000 + "1"), "bad header"),
    "additions": (crafted("1+" * 4500 + "1"), "bad header"),
    "nested dicts": (crafted("{1:" * 90 + "1" + "}" * 90), "keys"),
    "nested dtypes": (
        crafted(fields("<f8").replace("'<f8'", "[('a'," * 40 + "'<f8'" + ")]" * 40)),
        "nested too deep",
    ),
    "powers": (crafted("9**" * 3000 + "9"), "bad header"),
    "invalid escape": (crafted(r"{'\d': 1}"), "bad header|keys"),
}


class TestHostile:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_is_refused_with_its_reason_in_little_memory(self, name: str) -> None:
        data, reason = HOSTILE[name]
        cached = len(npy._parsed)
        tracemalloc.start()
        try:
            for buffer in (data, memoryview(data)):
                with pytest.raises(BadItem, match=reason):
                    npy.parse(buffer, len(data))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 8 * 2**20
        assert len(npy._parsed) <= cached + ("footer" in reason or "names" in reason or "block 1" in reason)

    def test_nothing_beyond_the_given_size_is_touched(self) -> None:
        class Watched(bytearray):
            def __getitem__(self, at: Any) -> Any:
                assert at.stop <= size
                return super().__getitem__(at)

        data = Watched(item([np.zeros(4), np.zeros((2, 2))], meta=[1, 2, 3]))
        for size in range(len(data)):
            with pytest.raises(BadItem):
                npy.parse(data, size)
        size = len(data)
        npy.parse(data, size)

    def test_a_size_beyond_the_buffer_is_not_believed(self) -> None:
        data = item([np.zeros(4)])
        npy.parse(data, 10**9)
        with pytest.raises(BadItem):
            npy.parse(data[:-1], 10**9)

    def test_parse_cache_is_bounded(self) -> None:
        for n in range(npy._MAX_PARSED + 10):
            data = item([np.zeros((n, 0))])
            npy.parse(data, len(data))
        wide = item([np.zeros(1, [(f"field number {i}", "f8") for i in range(200)])])
        npy.parse(wide, len(wide))
        assert len(npy._parsed) <= npy._MAX_PARSED
        assert max(map(len, npy._parsed)) <= npy._MAX_PARSED_BYTES

    @given(data=st.binary(max_size=400), magic=st.booleans())
    def test_random_bytes_raise_nothing_but_bad_item(self, data: bytes, magic: bool) -> None:
        data = b"\x93NUMPY\x01\x00" * magic + data
        with pytest.raises(BadItem):
            npy.parse(data, len(data))

    @given(text=st.text(alphabet="{}()[]',:<>|=fiOUVMm0123456789TrueFalsdcrhpn_ \n\\-+*.", max_size=150))
    def test_random_headers_raise_nothing_but_bad_item(self, text: str) -> None:
        data = crafted(text, bytes(64))
        with pytest.raises(BadItem):
            npy.parse(data, len(data))

    @given(
        descr=st.recursive(
            st.sampled_from(["<f8", "|O", "|V0", "<M8[ns]", "<U2", "i4", "", "|b1", "<f3"]) | st.integers(),
            lambda inner: st.lists(
                st.tuples(st.sampled_from(["", "a", "b", ("t", "a"), 3]), inner)
                | st.tuples(
                    st.sampled_from("ab"), inner, st.lists(st.integers(-1, 3), max_size=2).map(tuple)
                ),
                max_size=3,
            ),
            max_leaves=6,
        ),
        shape=st.lists(st.integers(-1, 2**65) | st.integers(0, 3), max_size=4).map(tuple),
        fortran=st.booleans(),
        data=st.binary(max_size=200),
    )
    def test_plausible_headers_are_shown_or_refused(
        self, descr: object, shape: object, fortran: bool, data: bytes
    ) -> None:
        whole = crafted(fields(descr, fortran, shape), data)
        try:
            blocks, _ = npy.parse(whole, len(whole))
        except BadItem:
            return
        for block in blocks:
            assert npy.view(whole, block, writeable=False).nbytes == block.nbytes

    @given(data=st.data())
    def test_mutated_items_are_shown_or_refused(self, data: st.DataObject) -> None:
        arrays = [filled(ALIGNED, (3,)), np.asfortranarray(filled("f8", (2, 3))), filled("U2", (2,))]
        whole = bytearray(item(arrays, b"slack", names=["a", "b", "c"], meta={"k": 1}))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(whole) - 1))
            match data.draw(st.integers(0, 3)):
                case 0:
                    whole[at] = data.draw(st.integers(0, 255))
                case 1:
                    whole[at] = data.draw(st.sampled_from(b"0123456789()[]{}',<>|OTF -"))
                case 2:
                    del whole[at : at + data.draw(st.integers(1, 100))]
                case _:
                    whole[at:at] = data.draw(st.binary(min_size=1, max_size=70))
            if not whole:
                return
        try:
            blocks, end = npy.parse(whole, len(whole))
        except BadItem:
            return
        assert end.names is None or len(end.names) == len(blocks)
        for block in blocks:
            assert npy.view(whole, block, writeable=False).shape == block.shape
