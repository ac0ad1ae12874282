"""Arrays, and dicts of named ones, come back as they were put, whatever their file held before.

That every dtype and every layout does, written in whichever way, is shown in `tests/unit/test_format_item.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.arrays import ALIGNED, LARGE, NESTED, Array, filled, same

from spoolipc import SpoolReader, SpoolWriter, UnsupportedArray

ROUNDS = 12
"""Enough for files to be written again, and for whatever is remembered of the last put to be used."""
UNSIZED: list[Any] = [
    "U0",
    "S0",
    "V0",
    [],
    [("a", "S0")],
    [("a", "f8", (0,))],
    [("a", "V0"), ("b", [], (3,))],
]
STRIDED = np.zeros(2, [("a", "S0"), ("b", "f8")])["a"]
NAMED: dict[str, Array] = {
    "image": np.arange(50_000, dtype="f4").reshape(250, 200),
    "mask": np.asfortranarray(np.arange(50_000).reshape(250, 200) % 3 == 0),
    "größe": np.array(2.5),
    "": np.zeros((0, 3), "i2"),
    "records": filled(NESTED, (3,)),
    "last": np.arange(7, dtype=">i8"),
}


def item_file(spool: Path) -> Path:
    (file,) = (spool / "items").iterdir()
    return file


def nothing_left(spool: Path) -> bool:
    return list((spool / "tmp").iterdir()) == list((spool / "items").iterdir()) == []


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (10**13,), (10**6, 10**7)], ids=str)
@pytest.mark.parametrize("dtype", UNSIZED, ids=str)
def test_elements_of_no_bytes_come_back_at_once_however_many(
    writer: SpoolWriter, reader: SpoolReader, dtype: Any, shape: tuple[int, ...], copy: bool
) -> None:
    array: Array = np.ndarray(shape, dtype, bytearray(1))
    for put in (array, array.T, np.broadcast_to(STRIDED, (*shape, 2))):
        writer.put(put)
        found = reader.get_nowait(copy=copy)
        assert (found.dtype, found.shape, found.flags.writeable) == (put.dtype, put.shape, copy)
        writer.put({"a": put, "b": np.arange(5000)})
        named = reader.get_nowait(copy=copy)
        assert (named["a"].dtype, named["a"].shape, named["b"][-1]) == (put.dtype, put.shape, 4999)
    if array.dtype.kind not in "SU":  # of which np.empty makes elements of one character
        with writer.loan(shape, dtype) as lent:
            assert (lent.dtype, lent.shape) == (array.dtype, shape)
        assert reader.get(copy=copy).shape == shape


@pytest.mark.parametrize("length", [2, 1000])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [ALIGNED, NESTED], ids=str)
def test_padding_comes_as_it_was_put_and_holds_no_other_memory(
    writer: SpoolWriter, reader: SpoolReader, dtype: Any, order: Any, length: int
) -> None:
    array = filled(dtype, (2 * length,)).reshape((2, -1), order=order)
    for copy in (False, True):
        for put in (array, array[:, ::-1]):
            writer.put(put)
            found = reader.get_nowait(copy=copy)
            same(found, put)
            assert found.flags.owndata is copy


@pytest.mark.parametrize("large", [False, True])
def test_kinds_orders_and_shapes_may_alternate_in_the_same_files(
    writer: SpoolWriter, reader: SpoolReader, large: bool
) -> None:
    base = np.arange(20_000.0 if large else 20.0)
    wide = base.reshape(4, -1)
    same_size: list[Array] = [
        *(wide, wide.T.copy(), np.asfortranarray(wide), wide.astype(">f8"), wide.astype("i8"), base),
        *(np.repeat(wide, 2, axis=1)[:, ::2], base.view("V8"), base.view("M8[s]"), base[::-1]),
    ]
    same_size += [base.view([("a", "f4"), ("b", "i4")]), base[: len(base) // 2].astype("c16"), wide[:0]]
    for number in range(3):
        for first in same_size:
            seconds: list[Array | dict[str, Array]] = [
                wide + number,
                first,
                {"a": first},
                {"b": wide, "a": first[:1]},
                first,
            ]
            for second in seconds:
                writer.put(second)
                found = reader.get_nowait()
                if isinstance(second, dict):
                    for name, array in second.items():
                        same(found[name], array)
                else:
                    same(found, second)


def test_an_array_of_the_kind_of_a_named_one_before_it_comes_back(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    array = np.arange(77, dtype="<u4")
    writer.put({"a": np.zeros(8), "b": array})  # whose header is then the same, at another place of the file
    same(reader.get_nowait()["b"], array)
    for _ in range(ROUNDS):
        writer.put(array)
        same(reader.get_nowait(), array)


def test_memory_mapped_array_comes_back(writer: SpoolWriter, reader: SpoolReader, tmp_path: Path) -> None:
    array = np.arange(20_000.0)
    np.save(tmp_path / "a.npy", array)
    writer.put(np.load(tmp_path / "a.npy", mmap_mode="r"))
    same(reader.get_nowait(), array)


def test_item_that_was_got_can_be_put_again(writer: SpoolWriter, reader: SpoolReader) -> None:
    array = np.asfortranarray(np.arange(59_400.0).reshape(30, 44, 45))
    writer.put(array)
    for _ in range(4):
        writer.put(reader.get_nowait())
    same(reader.get_nowait(), array)


@pytest.mark.parametrize("lost", [False, True], ids=["", "table lost"])
def test_named_arrays_come_back_in_their_order(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, lost: bool
) -> None:
    def check(found: dict[str, Array]) -> None:
        assert list(found) == list(NAMED)
        for name, array in NAMED.items():
            same(found[name], array)
            assert not found[name].flags.writeable
            assert not array.size or found[name].ctypes.data % 64 == 0

    for _ in range(3):
        for _ in range(3):
            writer.put(NAMED, meta="m")
        if lost:
            (spool / "index").unlink()
        assert reader.peek().names == tuple(NAMED)
        with reader.receive(block=False) as item:
            check(dict(item.arrays))
            assert item.meta == "m"
            with pytest.raises(TypeError, match="named arrays"):
                _ = item.array
        check(dict(reader.get()))
        copies = reader.get(copy=True)
        copies["mask"][:] = copies["last"][0] = 1
        assert copies["mask"].flags.f_contiguous


@pytest.mark.parametrize("size", [3, LARGE])
@pytest.mark.parametrize("dtype", ["f8", ALIGNED, "V0"], ids=str)
def test_array_of_ones_own_is_filled(writer: SpoolWriter, reader: SpoolReader, dtype: Any, size: int) -> None:
    put = filled(dtype, (size,))
    whole = np.zeros((len(put), 2), put.dtype)
    for out in (np.zeros(len(put), put.dtype), whole[:, 1]):
        writer.put(put)
        assert reader.get(timeout=20, out=out) is out
        assert out.tolist() == put.tolist()
    assert whole[:, 0].tolist() == np.zeros(len(put), put.dtype).tolist()


def test_item_that_does_not_fit_into_ones_array_stays_the_next(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    out = np.zeros(LARGE)
    locked = np.zeros(LARGE)
    locked.flags.writeable = False
    for put in (np.ones(LARGE, "f4"), np.ones((LARGE, 1)), np.ones(LARGE + 1), {"a": np.ones(LARGE)}):
        writer.put(put)
        writer.put(np.ones(LARGE))
        for _ in range(7):  # more often than an item is delivered
            with pytest.raises(ValueError, match=r"the item is an? (array|dict)"):
                reader.get(out=out)
        assert not out.any()
        found = reader.receive(block=False)
        assert found.attempt == 1
        found.ack()
        for wrong in (locked, [0.0], np.zeros(3, "O")):
            with pytest.raises(ValueError, match="out must be a writable array"):
                reader.get(out=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="leave copy away"):
            reader.get(copy=True, out=out)
        reader.get(out=out)
        out[:] = 0


def test_same_object_under_two_names_is_two_arrays(writer: SpoolWriter, reader: SpoolReader) -> None:
    array = np.arange(5000)
    writer.put({"z": array, "a": array[::-1], "b": array})
    found = reader.get()
    assert list(found) == ["z", "a", "b"]
    assert (found["z"] == found["a"][::-1]).all()
    assert (found["b"] == array).all()


def test_item_file_is_plain_npy_until_it_is_got(
    writer: SpoolWriter, reader: SpoolReader, spool: Path
) -> None:
    for array in (filled("f8", (3,)), filled(NESTED, (900,)), filled(">c8", (5000,))):
        for _ in range(2):
            seq = writer.put(array)
            assert item_file(spool).name == f"{seq:020d}.npy"
            same(np.load(item_file(spool), allow_pickle=False), array)
            reader.get_nowait()
    for _ in range(2):
        writer.put(NAMED)
        with open(item_file(spool), "rb") as file:  # one after another
            for array in NAMED.values():
                same(np.load(file, allow_pickle=False), array)
        reader.get_nowait()


@pytest.mark.parametrize("dtype", ["O", [("a", "i4"), ("b", "O")]], ids=str)
@pytest.mark.parametrize("recycled", [False, True])
def test_object_arrays_are_a_type_error_and_leave_nothing(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, dtype: Any, recycled: bool
) -> None:
    if recycled:
        for _ in range(2):
            writer.put(np.zeros(LARGE))
            reader.get()
    with pytest.raises(TypeError, match="object"):
        writer.put(np.zeros(LARGE, dtype))
    with pytest.raises(UnsupportedArray):
        writer.put({"a": np.zeros(3), "b": np.zeros(3, dtype)})
    with pytest.raises(UnsupportedArray):
        writer.put_many([np.zeros(3), np.zeros(3, dtype)])
    assert writer.empty()
    assert nothing_left(spool)
    assert writer.put(np.zeros(3)) == (3 if recycled else 1)


def test_a_title_that_cannot_be_hashed_is_refused_with_a_remedy_that_helps(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    array = np.zeros(3, np.dtype([(([1, 2], "x"), "f4")]))
    for call in (writer.put, lambda array: writer.loan(3, array.dtype)):
        with pytest.raises(UnsupportedArray, match="give the field a title that is a string or a tuple"):
            call(array)
    with pytest.raises(UnsupportedArray, match="title that cannot be hashed"):
        writer.put({"one": array, "other": np.zeros(3)})
    writer.put(np.zeros(3, np.dtype([(((1, 2), "x"), "f4")])))
    assert reader.get_nowait().dtype.fields["x"][2] == (1, 2)
