"""An item file is plain NPY for everyone, and gives back what was put in, whichever way it was written."""

from __future__ import annotations

import gc
import io
import mmap
import pickle
import tracemalloc
import weakref
from array import array as typed_array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.arrays import ALIGNED, NESTED, content, filled, same

from spoolipc.errors import BadItem, TooLarge, UnknownVersion, UnsupportedArray
from spoolipc.format import footer, item
from spoolipc.message import Array, ArraySpec

ID = bytes(range(16))
TITLED = np.dtype([(("a title", "a"), "<i4"), ("b", "V3"), ((2.5, "c"), "u1"), (((1, b"x"), "d"), "u1")])
DEEP: Any = np.dtype("f8")
for _ in range(60):
    DEEP = np.dtype([("a", DEEP), ("b", "u1")])
DTYPES: list[Any] = [
    *"?bBhHiIlLqQefdgFDG",
    *("S5", "U3", "V7", "U0", "S0", "V0", "<c16", ">c8", ">i2", ">f8", ">U2", ">M8[s]"),
    *("M8[ns]", "M8[D]", "M8[25s]", "M8", "m8[ms]", "m8"),
    *(
        DEEP,
        np.dtype([("a", np.dtype(("<f4", (2,))), (3,)), ("b", [("c", "i1", (0, 2))])]),
        np.dtype([("a", "S0")]),
    ),
    *(ALIGNED, NESTED, TITLED, np.dtype([]), np.dtype({"names": [], "formats": [], "itemsize": 8})),
    np.dtype([("a", "<i4"), ("b", "<f8")]).newbyteorder(),
    np.dtype((np.record, [("r", "u1"), ("g", "u1")])),
    np.dtype({"names": ["late"], "formats": ["<i4"], "offsets": [12], "itemsize": 32}),
    np.dtype([("größe", "f4")]),
    np.dtype([("長さ", "f4"), ("\udc80", "i1")]),
    np.dtype([("(" * 40 + "'\"\n", "f4")]),
    np.dtype("f8", metadata={"x": 1}),
    np.dtype([("a", np.dtype("f8", metadata={"secret": 1}))], metadata={"secret": 2}),
]


SHAPES: dict[str, Array] = {
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
    "read-only": np.frombuffer(bytes(24), "f8"),
}
ARRAYS = [filled(dtype, (3, 4)) for dtype in DTYPES] + list(SHAPES.values())
NAMES = [f"{number} {dtype!s:.20}" for number, dtype in enumerate(DTYPES)] + list(SHAPES)
every_array = pytest.mark.parametrize("array", ARRAYS, ids=NAMES)


def made(*arrays: Array, slack: bytes = b"", **said: Any) -> bytes:
    layout = item.layout_of(arrays)
    return item.to_bytes(layout, arrays) + footer.pack(layout.end, 1, ID, **said) + slack


def shown(data: bytes | bytearray) -> list[Array]:
    return [item.view(data, block) for block in item.parse(data, len(data))[0]]


@every_array
def test_every_way_of_writing_makes_the_same_bytes(array: Array) -> None:
    layout, arrays = item.layout_of([array, array]), [array, array]
    whole = item.to_bytes(layout, arrays)
    first, second = layout.blocks
    assert len(whole) == layout.end == second.offset + second.nbytes
    assert first.offset % item.ALIGN == second.offset % item.ALIGN == 0
    assert whole[second.offset - len(layout.headers[1]) :] == layout.headers[1] + content(array)
    assert b"".join(item.parts(layout, arrays)) == whole
    assert b"".join(item.parts(layout, arrays, skip_first=True)) == whole[first.offset + first.nbytes :]
    held = bytearray(layout.end)
    for buffer in (bytearray(b"\xaa" * layout.end), mmap.mmap(-1, layout.end), memoryview(held)):
        item.store(buffer, layout, arrays)
        assert bytes(buffer) == whole


@every_array
@pytest.mark.filterwarnings("ignore:Stored array in format:UserWarning")
@pytest.mark.filterwarnings("ignore:metadata on a dtype:UserWarning")
def test_the_first_block_is_what_np_save_writes(array: Array, recwarn: pytest.WarningsRecorder) -> None:
    layout, saved = item.layout_of([array]), io.BytesIO()
    np.save(saved, array, allow_pickle=False)
    contiguous = array.flags.c_contiguous or array.flags.f_contiguous
    assert layout.headers[0] == saved.getvalue()[: layout.blocks[0].offset]
    if contiguous or array.dtype.names is None:  # numpy loses padding where it copies by fields
        assert item.to_bytes(layout, [array]) == saved.getvalue()
    assert item.savable(layout, [array]) == (contiguous and not recwarn.list)


@every_array
def test_what_was_written_is_read_back_and_by_np_load_too(array: Array, tmp_path: Path) -> None:
    data = made(array, slack=b"slack", meta={"k": 1})
    for _ in range(2):  # the second time from the cache
        blocks, tail = item.parse(data, len(data))
        assert blocks == item.layout_of([array]).blocks
        for copy in (False, True):
            got = item.message(data, blocks, tail, copy=copy)
            assert got[1:5] == (None, {"k": 1}, 1, ID.hex())
            same(got.arrays[0], array)
            assert not got.arrays[0].flags.writeable
    (tmp_path / "item.npy").write_bytes(data)
    same(np.load(tmp_path / "item.npy"), array)


def test_several_arrays_are_read_by_repeated_np_load(tmp_path: Path) -> None:
    data = made(*ARRAYS, slack=b"\x93NUMPY slack", names=NAMES)
    (tmp_path / "item.npy").write_bytes(data)
    got = item.message(data, *item.parse(data, len(data)), copy=True)
    assert got.names == tuple(NAMES)
    with open(tmp_path / "item.npy", "rb") as file:
        for array, found in zip(ARRAYS, got.arrays, strict=True):
            same(np.load(file), array)
            same(found, array)
        assert file.read(8) == footer.MAGIC


@pytest.mark.parametrize("shape", [(3, 700_000, 2), (5_000_000, 2), (2, 3_000_000)])
def test_a_large_strided_array_is_copied_in_pieces(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype="i4").reshape(shape)[..., ::-1]
    written = io.BytesIO(bytes(array.nbytes + 128))
    tracemalloc.start()
    for piece in item.parts(item.layout_of([array]), [array]):
        written.write(piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20
    written.seek(0)
    assert np.array_equal(np.load(written), array)


def test_a_large_element_is_a_piece_of_its_own() -> None:
    array = filled("V5000000", (4,))[::2]
    assert list(item.parts(item.layout_of([array]), [array]))[1:] == [row.tobytes() for row in array]


class Converts:
    """As a data frame does: it would lose more than it shows."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        return np.zeros(3)


class Tensor(Converts):
    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, **how: Any) -> Any:
        return self.array.__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class Elsewhere(Converts):
    def __dlpack__(self, **how: Any) -> Any:
        raise BufferError("on a device")

    def __dlpack_device__(self) -> Any:
        return 2, 0


class TestPlain:
    def test_base_arrays_pass_through_and_subclasses_become_views(self, tmp_path: Path) -> None:
        array = np.zeros(3)
        assert item.plain(array) is array
        mapped = np.memmap(tmp_path / "m", "f8", "w+", shape=(4,))
        record = np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
        for other in (mapped, np.eye(2).view(np.matrix), record):
            found = item.plain(other)
            assert type(found) is np.ndarray
            assert np.shares_memory(found, other)
            same(shown(made(found))[0], found)

    @pytest.mark.parametrize("scalar", [np.float32(1.5), np.str_("ab"), np.datetime64(1, "s"), np.bool()])
    def test_numpy_scalars_become_0d_arrays(self, scalar: np.generic) -> None:
        same(item.plain(scalar), np.array(scalar))

    @pytest.mark.parametrize(
        ("other", "expected"),
        [
            (bytearray(b"abc"), np.frombuffer(b"abc", "u1")),
            (np.arange(6).reshape(2, 3)[::2].data, np.arange(6).reshape(2, 3)[::2]),
            (typed_array("d", [1, 2]), np.array([1.0, 2.0])),
            (Tensor(np.eye(3, dtype="f4")), np.eye(3, dtype="f4")),
        ],
    )
    def test_what_lends_its_memory_is_read_where_it_is(self, other: Any, expected: Array) -> None:
        found = item.plain(other)
        same(shown(made(found))[0], expected)
        assert np.shares_memory(found, other.array if isinstance(other, Tensor) else np.asarray(other))

    def test_what_lends_memory_that_numpy_cannot_read_is_refused_with_its_reason(self) -> None:
        with pytest.raises(
            UnsupportedArray, match=r"a .*Elsewhere where it is \(on a device\); put a plain copy"
        ):
            item.plain(Elsewhere())

    @pytest.mark.parametrize("other", [[1, 2], 1.0, "text", None, Converts(), object, memoryview])
    def test_anything_else_is_refused_with_the_remedy(self, other: object) -> None:
        with pytest.raises(UnsupportedArray, match=rf"a (.*\.)?{type(other).__name__} is.*np\.asarray"):
            item.plain(other)
        with pytest.raises(UnsupportedArray, match="lose its mask"):
            item.plain(np.ma.masked_array([1, 2], [True, False]))


class TestLayout:
    @every_array
    def test_an_array_not_yet_made_has_the_layout_it_will_have(self, array: Array) -> None:
        for order in ("C", "F"):
            template: Array = np.ndarray(array.shape, array.dtype, order=order)
            layout = item.layout_of([template])
            assert item.layout_of_spec(ArraySpec(array.shape, array.dtype, order)) is layout
            assert item.layout_of([template]) is layout

    @pytest.mark.parametrize(
        ("spec", "error"),
        [
            (((-1,), "f8", "C"), ValueError),
            (((2,) * 65, "f8", "C"), ValueError),
            (((2**62, 4), "f8", "F"), TooLarge),
            (((2**62, 4, 0), "f8", "C"), TooLarge),
            (((2**60,), "f8", "C"), TooLarge),
            (((2.5,), "f8", "C"), TypeError),
            (((2,), "f8", "K"), ValueError),
            (((2,), "O", "C"), UnsupportedArray),
            (((2,), ("f8", (3,)), "C"), UnsupportedArray),
        ],
    )
    def test_an_array_that_cannot_be_is_refused(self, spec: Any, error: type[Exception]) -> None:
        with pytest.raises(error):
            item.layout_of_spec(ArraySpec(spec[0], np.dtype(spec[1]), spec[2]))

    def test_number_of_arrays_is_bounded(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            item.layout_of([])
        arrays = [np.zeros(1)] * item.MAX_BLOCKS
        data = made(*arrays)
        assert len(shown(data)) == item.MAX_BLOCKS
        with pytest.raises(TooLarge, match="at most 1024"):
            item.layout_of([*arrays, np.zeros(1)])
        one_more = data[: item.layout_of(arrays).end] + item.layout_of([np.zeros(0)]).headers[0]
        with pytest.raises(BadItem, match="more than 1024"):
            item.parse(one_more, len(one_more))

    def test_dtypes_that_differ_never_share_a_layout(self) -> None:
        fields: list[Any] = [[(name, "i4")] for name in ("a", "b", ("t", "a"), ("u", "a"))]
        for dtype in ("i4", "V4", [("a", ">i4")], *fields):
            array = np.zeros(3, np.dtype(dtype))
            assert item.layout_of([array]).blocks[0].dtype == array.dtype
            same(shown(made(array))[0], array)

    def test_fields_renamed_in_place_do_not_corrupt_the_caches(self) -> None:
        names = [("in", [("a", "i4")]), ("b", "i4")]
        array = np.zeros(2, names)
        data = made(array)
        array.dtype["in"].names = ("renamed",)
        assert b"renamed" in item.layout_of([array]).headers[0]
        for copy in (False, True):
            got = item.message(data, *item.parse(data, len(data)), copy=copy).arrays[0]
            assert got.dtype == np.dtype(names)
            got.dtype.names = ("p", "q")
            got.dtype["p"].names = ("r",)

    def test_caches_are_bounded(self) -> None:
        for n in range(item._MAX_PARSED + 10):
            shown(made(np.zeros((n, 0))))
        wide = np.zeros(1, [(f"field number {i}", "f8") for i in range(200)])
        shown(made(wide, *[np.zeros(0)] * 1000))
        assert len(item._layouts) <= item._MAX_LAYOUTS
        assert len(item._parsed) <= item._MAX_PARSED
        assert max(sum(map(len, layout.headers)) for layout in item._layouts.values()) <= 16 * 1024
        assert max(map(len, item._parsed)) <= 4096


class TestView:
    @pytest.mark.parametrize("dtype", ["f8", NESTED])
    def test_views_of_views_keep_the_very_array_alive(self, dtype: Any) -> None:
        data = made(filled(dtype, (6, 6)))
        array = shown(data)[0]
        assert array.base is data  # type: ignore[comparison-overlap]
        alive = weakref.ref(array)
        part: Any = array[2:][::2].T[None, 1:]
        held = [
            part.view(np.recarray),
            part[0].flat,
            np.asarray(memoryview(part.view("V8")) if dtype == "f8" else part),
        ]
        del array, part
        while held:
            gc.collect()
            assert alive() is not None
            held.pop()
        gc.collect()
        assert alive() is None

    def test_a_copy_needs_no_buffer(self) -> None:
        array = filled(NESTED, (3,))
        with mmap.mmap(-1, 4096) as buffer:
            buffer[: len(made(array))] = made(array)
            got = item.message(buffer, *item.parse(buffer, 4096), copy=True)
        same(got.arrays[0], array)

    def test_writeable_views_write_into_the_buffer_and_others_refuse(self) -> None:
        buffer = bytearray(made(np.zeros(4)))
        block = item.parse(buffer, len(buffer))[0][0]
        item.view(buffer, block, writeable=True)[:] = 7
        array = item.view(buffer, block)
        assert array.tolist() == [7] * 4
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            item.view(bytes(buffer), block, writeable=True)

    @pytest.mark.parametrize("dtype", ["f8", "U0", ALIGNED])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_arrays_without_data_need_no_buffer(self, dtype: Any, order: Any) -> None:
        array = np.zeros((3, 0, 2), dtype, order=order)
        same(item.view(b"", item.layout_of([array]).blocks[0], writeable=True), array)


def test_what_does_not_fit_a_layout_is_not_stored() -> None:
    layout, array = item.layout_of([np.zeros((2, 3))]), np.zeros((2, 3))
    for wrong in ([np.zeros(3)], [array.T], [array.astype(">f8")], [array.astype("i8")], [array] * 2, []):
        with pytest.raises(ValueError, match=r"for a block of|for a layout of"):
            item.store(bytearray(layout.end), layout, wrong)
    with pytest.raises((ValueError, TypeError)):
        item.store(bytearray(layout.end - 1), layout, [array])


@pytest.mark.parametrize("at", [0, 70, 128, 200, 227])
def test_a_changed_byte_does_not_pass_a_checksum(at: int) -> None:
    array = np.arange(100, dtype="u1")
    checksum = item.checksum_of(made(array), 228)
    with mmap.mmap(-1, 4096) as buffer:
        buffer.write(made(array, checksum=checksum))
        tail = item.parse(buffer, 4096)[1]
        item.verify(buffer, tail)
        buffer[at] ^= 4
        with pytest.raises(BadItem, match="checksum mismatch"):
            item.verify(buffer, tail)
        item.verify(buffer, tail._replace(checksum=None))


FOUR = np.zeros(4)
WHOLE = made(FOUR)
BARE = WHOLE[:160]
DAMAGED = [
    (b"", "not an NPY file"),
    (b"\x93", "not an NPY file"),
    (b"\x93NUMPY\x01\x00\x10", "not an NPY file"),
    (bytes(300), "not an NPY file"),
    (b"GARBAGE" * 100, "not an NPY file"),
    (pickle.dumps(print), "not an NPY file"),
    (footer.pack(0, 1, ID), "not an NPY file"),
    (WHOLE[:70], "header ends at"),
    (WHOLE[:150], "but the file ends"),
    (WHOLE[:-1], "ends before the footer"),
    (BARE, "no footer"),
    (BARE + b"garbage" * 10, "no footer"),
    (WHOLE.replace(footer.MAGIC, b"SPOOLFTX"), "no footer"),
    (BARE + footer.pack(64, 1, ID), "data ends at 64"),
    (made(FOUR, names=["a", "b"]), "2 names for 1 arrays"),
    (made(FOUR, FOUR, FOUR, names=["a", "b"]), "2 names for 3 arrays"),
    (made(FOUR, names=[f"{n:x}" for n in range(100_000)]), "100000 names"),
    (made(np.zeros(1))[:136] + WHOLE, "block 1: data at"),
]


@pytest.mark.parametrize(("data", "reason"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    item._parsed.clear()
    for _ in range(2):  # the second time with a known header
        for buffer in (data, memoryview(data)):
            with pytest.raises(BadItem, match=reason):
                item.parse(buffer, len(data))
        shown(WHOLE)


LATER = footer.MAGIC + b"\x03\x00 and anything"


@pytest.mark.parametrize(
    "data",
    [BARE + LATER, LATER, BARE + footer.pack(160, 1, ID, kind=7), footer.pack(0, 1, ID, kind=7)],
    ids=range(4),
)
def test_the_item_of_a_later_release_is_told_from_a_damaged_one(data: bytes) -> None:
    with pytest.raises(UnknownVersion):
        item.parse(data, len(data))


def test_nothing_beyond_the_given_size_is_touched() -> None:
    class Watched(bytearray):
        def __getitem__(self, at: Any) -> Any:
            assert at.stop <= size
            return super().__getitem__(at)

    data = Watched(made(FOUR, np.zeros((2, 2)), meta=[1, 2, 3]))
    for size in range(len(data)):
        with pytest.raises(BadItem):
            item.parse(data, size)
    size = len(data)
    item.parse(data, size)
    item.parse(bytes(data), 10**9)  # a size beyond the buffer is not believed
    with pytest.raises(BadItem):
        item.parse(bytes(data[:-1]), 10**9)


def test_a_header_is_known_again_wherever_it_lies() -> None:
    array = np.arange(7, dtype="i2")
    for arrays in ([FOUR, array], [array], [np.zeros((2, 2)), FOUR, array], [array]):
        assert [found.tolist() for found in shown(made(*arrays))] == [one.tolist() for one in arrays]


@given(
    data=st.binary(max_size=400),
    begins=st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x76\x00{'descr'"]),
)
def test_random_bytes_raise_nothing_but_bad_item(data: bytes, begins: bytes) -> None:
    with pytest.raises(BadItem):
        item.parse(begins + data, len(begins + data))


@given(data=st.data())
def test_a_mutated_item_is_shown_or_refused(data: st.DataObject) -> None:
    arrays = filled(ALIGNED, (3,)), np.asfortranarray(filled("f8", (2, 3))), filled("U2", (2,))
    whole = bytearray(made(*arrays, slack=b"slack", names=["a", "b", "c"], meta={"k": 1}))
    telling = st.sampled_from([bytes([letter]) for letter in b"0123456789()[]{}',<>|OTF -"])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole)))
        cut = data.draw(st.sampled_from([0, 1, 1, 1, 60]))
        whole[at : at + cut] = data.draw(st.binary(max_size=70) | telling)
    try:
        blocks, tail = item.parse(whole, len(whole))
    except (BadItem, UnknownVersion):
        return
    got = item.message(whole, blocks, tail, copy=False)
    assert [array.shape for array in got.arrays] == [block.shape for block in blocks]
    assert got.names is None or len(got.names) == len(blocks)
