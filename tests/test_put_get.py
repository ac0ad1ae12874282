"""put and get mean what they mean for queue.Queue in Python 3.13, and an array comes back as it went in."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit import party_of

from spoolipc import Empty, Full, ShutDown, SpoolReader, SpoolWriter, UnsupportedArray
from spoolipc import words as W
from spoolipc.npy import Array

LARGE = 40_000
"""Bytes beyond which an array is given out as a view of its file."""
ALIGNED = np.dtype([("a", "i1"), ("b", "f8"), ("c", "i2")], align=True)
NESTED = np.dtype([("x", ALIGNED), ("y", [("p", ">i4", (2, 3)), ("q", "S3")], (2,)), ("z", "M8[us]")])
DTYPES: list[Any] = [
    *"?bBhHiIlLqQefdgFDG",
    *("S5", "U3", "V7", "<c16", ">c8", ">i2", ">f8", ">U2", ">M8[s]"),
    *("M8[ns]", "M8[D]", "M8[25s]", "M8", "m8[ms]", "m8"),
    *(ALIGNED, NESTED, np.dtype([("größe", "f4"), ("長さ", "i2")])),
    np.dtype((np.record, [("r", "u1"), ("g", "u1")])),
    np.dtype({"names": ["late"], "formats": ["<i4"], "offsets": [12], "itemsize": 32}),
]
UNSIZED: list[Any] = ["U0", "S0", "V0", np.dtype([])]


def filled(dtype: Any, least: int) -> Array:
    """An array of distinct bytes, without invalid characters or booleans, of at least `least` bytes."""
    dtype = np.dtype(dtype)
    count = least // max(dtype.itemsize, 1) + 3
    size = count * dtype.itemsize
    raw = bytes(range(1, 128)) * (size // 127 + 1)
    if dtype.kind == "U":
        text = "".join(chr(33 + i % 5000) for i in range(size // 4))
        raw = text.encode("utf-32-be" if dtype.str[0] == ">" else "utf-32-le")
    if dtype.kind == "b":
        raw = b"\x01\x00" * size
    array: Array = np.ndarray((count,), dtype, bytearray(raw[:size] or b"\0"))
    return array


class Plain(np.ndarray[Any, Any]):
    """A subclass, which is stored as a plain array."""


def layouts() -> dict[str, Array]:
    base = np.arange(60_000, dtype="f8")
    cube = base[:59_400].reshape(30, 44, 45)
    locked = base[:9000].copy()
    locked.flags.writeable = False
    return {
        "0-d": np.array(2.5),
        "0-d structured": np.array((1, 2.0, 3), ALIGNED),
        "no elements": np.zeros((0, 3)),
        "no elements, Fortran": np.zeros((0, 3, 2), order="F"),
        "Fortran": np.asfortranarray(cube[0]),
        "Fortran, large": np.asfortranarray(cube),
        "transposed": cube.transpose(1, 2, 0),
        "stepped": base[::3],
        "reversed": base[::-1],
        "broadcast": np.broadcast_to(base[:7], (4000, 7)),
        "unaligned": np.ndarray((5000,), "f8", bytearray(range(256)) * 160, 3),
        "read-only": locked,
        "subclass": base[:8000].view(Plain),
        "masked": np.ma.masked_less(base[:8000], 5.0).data,
        "one byte below a page": np.ones(4096 - 128 - 49, "u1"),
    }


LAYOUTS = layouts()


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


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until a condition that another thread or process brings about holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not reached"
        time.sleep(0.0005)


def asleep(face: SpoolWriter | SpoolReader, kind: str) -> bool:
    """Whether somebody sleeps on a bell of this kind, as the index says."""
    words = party_of(face).look()
    start = W.ITEM_FLAGS if kind == "items" else W.SPACE_FLAGS
    return any(words[start : start + 8])


def settle_flags(face: SpoolWriter | SpoolReader) -> None:
    """A new index has every flag set, as nobody knows who waits: clear them."""
    words = party_of(face).look()
    for flag in range(8):
        words[W.ITEM_FLAGS + flag] = words[W.SPACE_FLAGS + flag] = 0


def when_asleep(face: SpoolWriter | SpoolReader, kind: str, waiting: Future[Any]) -> None:
    until(lambda: asleep(face, kind) or waiting.done())
    assert not waiting.done()


def same(found: Array, array: Array) -> None:
    assert type(found) is np.ndarray
    assert found.dtype == array.dtype
    assert found.dtype.byteorder == array.dtype.byteorder
    assert found.shape == array.shape
    assert found.flags.fnc == array.flags.fnc
    same_values(found, array)


def same_values(found: Array, array: Array) -> None:
    """The same bytes, but for the padding between fields."""
    if array.dtype.names is None:
        assert found.tobytes() == array.tobytes()
    else:
        for name in array.dtype.names:
            same_values(found[name], array[name])


class TestRoundTrip:
    @pytest.mark.parametrize("least", [0, LARGE])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_comes_back_as_it_went_in(
        self, writer: SpoolWriter, reader: SpoolReader, dtype: Any, least: int
    ) -> None:
        array = filled(dtype, least)
        for _ in range(3):  # the second and third into a file that was consumed
            writer.put(array)
            same(reader.get_nowait(), array)

    @pytest.mark.parametrize("dtype", UNSIZED, ids=str)
    def test_dtypes_of_no_size_come_back(self, writer: SpoolWriter, reader: SpoolReader, dtype: Any) -> None:
        array = np.zeros((3, 4), dtype)
        writer.put(array)
        same(reader.get_nowait(), array)

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_every_layout_comes_back(self, writer: SpoolWriter, reader: SpoolReader, name: str) -> None:
        array = LAYOUTS[name]
        for _ in range(3):
            writer.put(array)
            same(reader.get_nowait(), array.view(np.ndarray))

    def test_memory_mapped_array_comes_back(
        self, writer: SpoolWriter, reader: SpoolReader, tmp_path: Path
    ) -> None:
        np.save(tmp_path / "a.npy", LAYOUTS["stepped"])
        writer.put(np.load(tmp_path / "a.npy", mmap_mode="r"))
        same(reader.get_nowait(), LAYOUTS["stepped"])

    def test_item_that_was_got_can_be_put_again(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        writer.put(LAYOUTS["Fortran, large"])
        for _ in range(4):
            writer.put(reader.get_nowait())
        same(reader.get_nowait(), LAYOUTS["Fortran, large"])

    def test_named_arrays_come_back_as_a_dict(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        arrays = {
            "a": filled("f8", LARGE),
            "größe": filled("?", 0),
            "": filled(NESTED, 100),
            "z": np.zeros(0),
        }
        for _ in range(3):
            writer.put(arrays)
            found = reader.get_nowait()
            assert list(found) == list(arrays)
            for name, array in arrays.items():
                same(found[name], array)

    def test_item_file_is_plain_npy_until_it_is_got(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path
    ) -> None:
        for array in (filled("f8", 0), filled(NESTED, LARGE), filled(">c8", LARGE)):
            for _ in range(2):
                seq = writer.put(array)
                (file,) = (path / "items").iterdir()
                assert file.name == f"{seq:020d}.npy"
                same(np.load(file, allow_pickle=False), array)
                reader.get_nowait()

    def test_named_arrays_lie_in_the_file_one_after_another(self, writer: SpoolWriter, path: Path) -> None:
        arrays = {"a": filled("f8", LARGE), "b": filled("u1", 7), "c": filled(NESTED, 300)}
        writer.put(arrays)
        (name,) = (path / "items").iterdir()
        with open(name, "rb") as file:
            for array in arrays.values():
                same(np.load(file, allow_pickle=False), array)

    def test_metadata_goes_with_the_item(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        meta = {"größe": [1, 2.5, None, True, "x"], "deep": {"a": {"b": []}}}
        for size in (10, LARGE):
            writer.put(np.zeros(size, "u1"), meta=meta)
            (payload,) = reader._source.get(1)
            assert payload.meta == meta

    @pytest.mark.parametrize("size", [1, LARGE])
    def test_put_keeps_nothing_of_the_array(
        self, writer: SpoolWriter, reader: SpoolReader, size: int
    ) -> None:
        array = np.zeros(size)
        for _ in range(3):
            array[:] = 1
            writer.put(array)
            array[:] = 2
            assert (reader.get_nowait() == 1).all()

    @pytest.mark.parametrize("size", [1, LARGE])
    def test_got_array_is_read_only_and_a_copy_is_writable(
        self, writer: SpoolWriter, reader: SpoolReader, size: int
    ) -> None:
        for _ in range(4):
            writer.put(np.zeros(size))
        with pytest.raises(ValueError, match="read-only"):
            reader.get()[0] = 1
        assert not reader.get()[:1].flags.writeable
        copy = reader.get(copy=True)
        copy[:] = 7
        assert copy.flags.owndata
        assert (reader.get() == 0).all()

    def test_copy_of_named_arrays_is_writable(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        writer.put({"a": np.zeros((100, 100), order="F"), "b": np.zeros(3)})
        found = reader.get(copy=True)
        found["a"][:] = found["b"][0] = 1
        assert found["a"].flags.f_contiguous

    def test_sequence_numbers_rise_by_one_from_one(self, writer: SpoolWriter, path: Path) -> None:
        with SpoolWriter(path) as other:
            assert [side.put(np.zeros(3)) for side in (writer, other, writer)] == [1, 2, 3]


class TestRefused:
    @pytest.mark.parametrize("dtype", ["O", [("a", "i4"), ("b", "O")]], ids=str)
    @pytest.mark.parametrize("recycled", [False, True])
    def test_object_arrays_are_a_type_error_and_leave_nothing(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path, dtype: Any, recycled: bool
    ) -> None:
        if recycled:
            for _ in range(2):
                writer.put(np.zeros(LARGE))
                reader.get()
        with pytest.raises(TypeError, match="object"):
            writer.put(np.zeros(LARGE, dtype))
        with pytest.raises(UnsupportedArray):
            writer.put({"a": np.zeros(3), "b": np.zeros(3, dtype)})
        assert writer.empty()
        assert list((path / "tmp").iterdir()) == []
        assert writer.put(np.zeros(3)) == (3 if recycled else 1)

    @pytest.mark.parametrize("thing", [[1, 2], 3.0, "text", None, b"bytes"], ids=repr)
    def test_what_is_not_an_array_is_a_type_error(self, writer: SpoolWriter, thing: Any) -> None:
        with pytest.raises(TypeError):
            writer.put(thing)
        with pytest.raises(TypeError):
            writer.put({"a": thing})

    @pytest.mark.parametrize("meta", [object(), {1, 2}, float("nan"), b"x"], ids=str)
    def test_metadata_that_is_not_json_is_refused_and_leaves_nothing(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path, meta: Any
    ) -> None:
        with pytest.raises((TypeError, ValueError)):
            writer.put(np.zeros(LARGE), meta=meta)
        assert list((path / "tmp").iterdir()) == []
        writer.put(np.zeros(1))
        assert reader.get_nowait() == 0

    def test_empty_dict_and_names_that_are_no_strings_are_refused(self, writer: SpoolWriter) -> None:
        with pytest.raises(ValueError, match="empty"):
            writer.put({})
        with pytest.raises(TypeError, match="strings"):
            writer.put({1: np.zeros(3)})  # type: ignore[dict-item]


class TestLikeQueue:
    def test_order_is_that_of_put(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        for i in range(300):
            writer.put(np.full(1 + 50 * (i % 90), i))
        assert [int(reader.get_nowait()[0]) for _ in range(300)] == list(range(300))

    def test_reader_may_come_first(self, path: Path) -> None:
        with SpoolReader(path) as reader:
            with pytest.raises(Empty):
                reader.get_nowait()
            with SpoolWriter(path) as writer:
                writer.put(np.arange(3))
                assert reader.get_nowait().tolist() == [0, 1, 2]

    def test_items_outlive_the_writer(self, path: Path) -> None:
        with SpoolWriter(path) as writer:
            writer.put(np.arange(3))
        with SpoolReader(path) as reader:
            assert reader.get_nowait().tolist() == [0, 1, 2]

    def test_get_of_an_empty_spool_raises_queue_empty(self, reader: SpoolReader) -> None:
        with pytest.raises(queue.Empty):
            reader.get_nowait()
        with pytest.raises(queue.Empty):
            reader.get(block=False)
        with pytest.raises(queue.Empty):
            reader.get(
                False, -1
            )  # as in queue.Queue: the timeout of a call that does not block means nothing
        with pytest.raises(queue.Empty):
            reader.get(timeout=0)

    def test_put_into_a_full_spool_raises_queue_full(self, path: Path) -> None:
        with SpoolWriter(path, maxsize=2) as writer:
            writer.put(np.zeros(1))
            assert not writer.full()
            writer.put_nowait(np.zeros(LARGE))
            assert writer.full()
            with pytest.raises(queue.Full):
                writer.put_nowait(np.zeros(1))
            with pytest.raises(queue.Full):
                writer.put(np.zeros(LARGE), block=False)
            with pytest.raises(queue.Full):
                writer.put(np.zeros(1), False, -1)
            with pytest.raises(queue.Full):
                writer.put(np.zeros(1), timeout=0)
            assert writer.qsize() == 2
            assert list((path / "tmp").iterdir()) == []

    def test_timeout_is_kept(self, path: Path) -> None:
        with SpoolWriter(path, maxsize=1) as writer, SpoolReader(path) as reader:
            for timeout in (0.05, 0.3):
                began = time.monotonic()
                with pytest.raises(Empty):
                    reader.get(timeout=timeout)
                assert timeout <= time.monotonic() - began < timeout + 0.5
            writer.put(np.zeros(1))
            for timeout in (0.05, 0.3):
                began = time.monotonic()
                with pytest.raises(Full):
                    writer.put(np.zeros(LARGE), timeout=timeout)
                assert timeout <= time.monotonic() - began < timeout + 0.5

    @pytest.mark.parametrize("timeout", [-1, -0.001, float("nan")])
    def test_negative_timeout_is_a_value_error_even_when_it_need_not_wait(
        self, writer: SpoolWriter, reader: SpoolReader, timeout: float
    ) -> None:
        with pytest.raises(ValueError, match="non-negative"):
            writer.put(np.zeros(1), timeout=timeout)
        writer.put(np.zeros(1))
        with pytest.raises(ValueError, match="non-negative"):
            reader.get(timeout=timeout)
        assert reader.qsize() == 1

    def test_qsize_empty_and_full_say_what_is_there(self, path: Path) -> None:
        with SpoolWriter(path, maxsize=3) as writer, SpoolReader(path) as reader:
            for count in range(4):
                assert (writer.qsize(), reader.qsize()) == (count, count)
                assert writer.empty() == reader.empty() == (count == 0)
                assert writer.full() == (count == 3)
                if count < 3:
                    writer.put(np.zeros(count))
            reader.get()
            assert not writer.full()
            assert writer.qsize() == 2

    def test_blocked_get_takes_what_comes(
        self, writer: SpoolWriter, reader: SpoolReader, aside: ThreadPoolExecutor
    ) -> None:
        settle_flags(writer)
        waiting = aside.submit(reader.get)
        when_asleep(writer, "items", waiting)
        writer.put(np.arange(4))
        assert waiting.result(10).tolist() == [0, 1, 2, 3]

    def test_blocked_put_goes_on_when_there_is_room(self, path: Path, aside: ThreadPoolExecutor) -> None:
        with SpoolWriter(path, maxsize=1) as writer, SpoolReader(path) as reader:
            settle_flags(writer)
            writer.put(np.zeros(1))
            waiting = aside.submit(writer.put, np.ones(1))
            when_asleep(writer, "space", waiting)
            assert reader.get_nowait() == 0
            assert waiting.result(10) == 2
            assert reader.get_nowait() == 1

    def test_unlimited_spool_is_never_full(self, path: Path) -> None:
        with SpoolWriter(path, maxsize=0) as writer:
            for _ in range(1000):
                writer.put_nowait(np.zeros(1))
            assert not writer.full()
            assert writer.qsize() == 1000


class TestShutdown:
    def test_puts_raise_and_gets_drain_then_raise(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        for i in range(3):
            writer.put(np.full(LARGE, i))
        writer.shutdown()
        for put in (writer.put, writer.put_nowait):
            with pytest.raises(ShutDown):
                put(np.zeros(1))
        with pytest.raises(ShutDown):
            writer.put(np.zeros(LARGE), timeout=5)
        assert [int(reader.get()[0]) for _ in range(3)] == [0, 1, 2]
        for get in (reader.get, reader.get_nowait):
            with pytest.raises(ShutDown):
                get()
        with pytest.raises(ShutDown):
            reader.get(timeout=5)

    def test_put_into_a_full_spool_that_was_shut_down_raises_shutdown(self, path: Path) -> None:
        with SpoolWriter(path, maxsize=1) as writer:
            writer.put(np.zeros(1))
            writer.shutdown()
            with pytest.raises(ShutDown):
                writer.put_nowait(np.zeros(1))
            with pytest.raises(ShutDown):
                writer.put(np.zeros(1), timeout=1)

    def test_immediate_shutdown_removes_what_waits(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path
    ) -> None:
        for i in range(200):
            writer.put(np.full(1 + i, i))
        writer.shutdown(immediate=True)
        assert (writer.qsize(), reader.qsize()) == (0, 0)
        assert reader.empty()
        for get in (reader.get, reader.get_nowait):
            with pytest.raises(ShutDown):
                get()
        with pytest.raises(ShutDown):
            writer.put(np.zeros(1))
        assert list((path / "items").iterdir()) == []

    def test_shutdown_repeated_changes_nothing_and_immediate_may_follow(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        for _ in range(3):
            writer.put(np.zeros(1))
        writer.shutdown()
        writer.shutdown()
        reader.get_nowait()
        writer.shutdown(immediate=True)
        writer.shutdown()
        with pytest.raises(ShutDown):
            reader.get_nowait()

    def test_iteration_ends(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        for i in range(50):
            writer.put(np.full(i % 7, i))
        writer.shutdown()
        assert [len(array) for array in reader] == [i % 7 for i in range(50)]
        assert list(reader) == []

    @pytest.mark.parametrize("immediate", [False, True])
    def test_waiting_getters_wake_at_once(
        self, writer: SpoolWriter, path: Path, aside: ThreadPoolExecutor, immediate: bool
    ) -> None:
        settle_flags(writer)
        with SpoolReader(path) as one, SpoolReader(path) as two:
            waiting = [aside.submit(reader.get) for reader in (one, one, two)]
            when_asleep(writer, "items", waiting[0])
            began = time.monotonic()
            writer.shutdown(immediate)
            for future in waiting:
                assert isinstance(future.exception(10), ShutDown)
            assert time.monotonic() - began < 0.8  # not the look once a second

    @pytest.mark.parametrize("immediate", [False, True])
    def test_waiting_putters_wake_at_once(
        self, path: Path, aside: ThreadPoolExecutor, immediate: bool
    ) -> None:
        with SpoolWriter(path, maxsize=1) as one, SpoolWriter(path) as two:
            settle_flags(one)
            one.put(np.zeros(1))
            waiting = [aside.submit(writer.put, np.zeros(LARGE)) for writer in (one, one, two)]
            when_asleep(one, "space", waiting[0])
            began = time.monotonic()
            one.shutdown(immediate)
            for future in waiting:
                assert isinstance(future.exception(10), ShutDown)
            assert time.monotonic() - began < 0.8  # not the look once a second
            assert list((path / "tmp").iterdir()) == []

    def test_shutdown_outlives_the_processes_and_reopen_ends_it(self, path: Path) -> None:
        with SpoolWriter(path) as writer:
            writer.put(np.zeros(1))
            writer.shutdown()
        with SpoolWriter(path) as writer, pytest.raises(ShutDown):
            writer.put(np.zeros(1))
        with SpoolReader(path) as reader, SpoolWriter(path, reopen=True) as writer:
            writer.put(np.ones(1))
            assert [int(reader.get_nowait()[0]) for _ in range(2)] == [0, 1]
            with pytest.raises(Empty):
                reader.get_nowait()

    def test_reopen_after_immediate_shutdown_starts_empty(self, path: Path) -> None:
        with SpoolWriter(path) as writer, SpoolReader(path) as reader:
            writer.put(np.zeros(1))
            writer.shutdown(immediate=True)
            with SpoolWriter(path, reopen=True) as again:
                again.put(np.ones(1))
                writer.put(np.full(1, 2.0))
                assert [int(reader.get_nowait()[0]) for _ in range(2)] == [1, 2]

    def test_end_waits_for_what_other_readers_may_give_back(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path, aside: ThreadPoolExecutor
    ) -> None:
        writer.put(np.zeros(1))
        with SpoolReader(path) as other:
            (delivery,) = other._source.claim(1, None)
            writer.shutdown()
            with pytest.raises(Empty):
                reader.get_nowait()
            settle_flags(writer)
            waiting = aside.submit(reader.get)
            when_asleep(writer, "items", waiting)
            other._source.nack(delivery, 0, "on purpose")
            assert waiting.result(10) == 0

    @pytest.mark.parametrize("settle", ["ack", "reject"])
    def test_end_comes_when_the_last_item_in_hand_is_settled(
        self, writer: SpoolWriter, reader: SpoolReader, path: Path, aside: ThreadPoolExecutor, settle: str
    ) -> None:
        writer.put(np.zeros(1))
        with SpoolReader(path) as other:
            (delivery,) = other._source.claim(1, None)
            writer.shutdown()
            settle_flags(writer)
            waiting = aside.submit(reader.get)
            when_asleep(writer, "items", waiting)
            began = time.monotonic()
            if settle == "ack":
                other._source.ack([delivery])
            else:
                other._source.reject(delivery, "on purpose")
            assert isinstance(waiting.exception(10), ShutDown)
            assert time.monotonic() - began < 0.8  # not the look once a second

    def test_errors_are_those_of_queue(self) -> None:
        assert issubclass(ShutDown, getattr(queue, "ShutDown", Exception))
        assert issubclass(Full, queue.Full)
        assert issubclass(Empty, queue.Empty)


class TestClose:
    def test_closing_twice_is_harmless_and_use_after_it_is_an_error(self, path: Path) -> None:
        writer, reader = SpoolWriter(path), SpoolReader(path)
        for _ in range(2):
            writer.close()
            reader.close()
        with pytest.raises(ValueError, match="closed"):
            writer.put(np.zeros(1))
        with pytest.raises(ValueError, match="closed"):
            reader.get_nowait()
        with pytest.raises(ValueError, match="closed"):
            reader.qsize()

    def test_closing_ends_the_waits_of_other_threads(self, path: Path, aside: ThreadPoolExecutor) -> None:
        with SpoolWriter(path, maxsize=1) as onlooker:
            settle_flags(onlooker)
            onlooker.put(np.zeros(1))
            writer = SpoolWriter(path)
            putting = aside.submit(writer.put, np.zeros(LARGE))
            when_asleep(onlooker, "space", putting)
            writer.close()
            assert isinstance(putting.exception(10), ValueError)
            with SpoolReader(path) as other:
                other.get()
            reader = SpoolReader(path)
            settle_flags(onlooker)
            getting = aside.submit(reader.get)
            when_asleep(onlooker, "items", getting)
            reader.close()
            assert isinstance(getting.exception(10), ValueError)

    def test_closing_amid_traffic_of_other_threads_ends_it_with_a_clear_error(
        self, path: Path, aside: ThreadPoolExecutor
    ) -> None:
        def putting(writer: SpoolWriter, size: int, going: threading.Semaphore) -> None:
            while True:
                writer.put(np.zeros(size))
                going.release()

        def getting(reader: SpoolReader, going: threading.Semaphore) -> None:
            while True:
                reader.get()
                going.release()

        for size in (10, LARGE):
            for _ in range(10):
                writer, reader, going = SpoolWriter(path), SpoolReader(path), threading.Semaphore(0)
                futures = [aside.submit(putting, writer, size, going) for _ in range(2)]
                futures += [aside.submit(getting, reader, going) for _ in range(2)]
                for _ in range(20):
                    going.acquire(timeout=10)
                writer.close()
                reader.close()
                for future in futures:
                    with pytest.raises(ValueError, match="closed"):
                        future.result(10)
        with SpoolWriter(path) as writer, SpoolReader(path) as reader:
            writer.put(np.ones(3))
            assert sum(int(array.sum()) for array in drained(reader)) == 3
        assert list((path / "tmp").iterdir()) == []

    def test_repr_names_the_path(self, writer: SpoolWriter, reader: SpoolReader, path: Path) -> None:
        assert repr(writer) == f"SpoolWriter({str(path)!r})"
        assert repr(reader) == f"SpoolReader({str(path)!r})"


def drained(reader: SpoolReader) -> Iterator[Array]:
    while True:
        try:
            yield reader.get_nowait()
        except Empty:
            return
