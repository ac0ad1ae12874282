"""Several named arrays are one item: one file, committed at once, every array a view of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spoolipc import SpoolReader, SpoolWriter, UnsupportedArray
from spoolipc.npy import Array

LARGE = 50_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def writer(path: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(path) as writer:
        yield writer


@pytest.fixture
def reader(path: Path) -> Iterator[SpoolReader]:
    with SpoolReader(path) as reader:
        yield reader


def arrays() -> dict[str, Array]:
    return {
        "image": np.arange(LARGE, dtype="f4").reshape(250, 200),
        "mask": np.asfortranarray(np.arange(LARGE).reshape(250, 200) % 3 == 0),
        "größe": np.array(2.5),
        "": np.zeros((0, 3), "i2"),
        "last": np.arange(7, dtype=">i8"),
    }


def check(found: dict[str, Array]) -> None:
    expected = arrays()
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].flags.fnc == array.flags.fnc
        assert (found[name] == array).all()


@pytest.mark.parametrize("lost", [False, True], ids=["", "index lost"])
def test_get_and_receive_give_the_dict(
    writer: SpoolWriter, reader: SpoolReader, path: Path, lost: bool
) -> None:
    for _ in range(3):
        for _ in range(2):
            writer.put(arrays(), meta="m")
        if lost:
            (path / "index").unlink()
        assert reader.peek().names == tuple(arrays())
        with reader.receive(block=False) as item:
            check(dict(item.arrays))
            assert item.meta == "m"
            with pytest.raises(TypeError, match="named arrays"):
                _ = item.array
        check(dict(reader.get()))


def test_every_array_is_a_view_of_one_mapping_and_aligned(writer: SpoolWriter, reader: SpoolReader) -> None:
    def root(array: Array) -> object:
        base: object = array
        while isinstance(base, np.ndarray):
            base = base.base
        return base.obj if isinstance(base, memoryview) else base

    writer.put(arrays())
    with reader.receive() as item:
        found = item.arrays
        assert len({id(root(array)) for array in found.values() if array.size}) == 1
        for array in found.values():
            assert not array.flags.writeable
            assert not array.size or array.ctypes.data % 64 == 0


def test_one_view_left_keeps_the_whole_file_from_being_written_again(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    writer.put(arrays())
    kept = reader.get()["mask"][3]
    before = kept.copy()
    for _ in range(10):
        writer.put({name: np.ones_like(array) for name, array in arrays().items()})
        reader.get()
    assert (kept == before).all()


def test_the_file_is_read_by_repeated_np_load(writer: SpoolWriter, path: Path) -> None:
    seq = writer.put(arrays())
    with open(path / "items" / f"{seq:020d}.npy", "rb") as file:
        for array in arrays().values():
            found = np.load(file, allow_pickle=False)
            assert found.dtype == array.dtype
            assert (found == array).all()


def test_names_are_strings_and_arrays_are_arrays(writer: SpoolWriter, path: Path) -> None:
    with pytest.raises(UnsupportedArray):
        writer.put({1: np.zeros(3)})  # type: ignore[dict-item]
    with pytest.raises(UnsupportedArray):
        writer.put({"a": np.zeros(3), "b": np.zeros(3, "O")})
    with pytest.raises(ValueError, match="empty"):
        writer.put({})
    assert list((path / "items").iterdir()) == []
    assert list((path / "tmp").iterdir()) == []


def test_a_single_named_array_stays_named(writer: SpoolWriter, reader: SpoolReader) -> None:
    writer.put({"only": np.arange(3)})
    assert list(reader.get()) == ["only"]


def test_many_arrays_of_one_item(writer: SpoolWriter, reader: SpoolReader) -> None:
    several = {f"a{number}": np.full(number, number) for number in range(300)}
    for _ in range(2):
        writer.put(several)
        found = reader.get()
        assert all((found[name] == array).all() for name, array in several.items())


def test_order_of_the_names_is_kept_and_same_object_twice_is_two_arrays(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    array = np.arange(LARGE)
    writer.put({"z": array, "a": array[::-1]})
    found = reader.get()
    assert list(found) == ["z", "a"]
    assert (found["z"] == found["a"][::-1]).all()
