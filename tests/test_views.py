"""An array that a reader returned never changes, whatever becomes of its item, file, reader or process."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from spoolipc import Empty, ShutDown, SpoolReader, SpoolWriter
from spoolipc.engine import Payload
from spoolipc.layout import Limits
from spoolipc.npy import Array
from spoolipc.source import DirectorySource

SIZE = 5000
"""Of float64: 40 KB, which is given out as a view of the file."""
SPAWN = multiprocessing.get_context("spawn")


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


def full_of(number: float) -> Array:
    return np.full(SIZE, number)


def traffic(writer: SpoolWriter, reader: SpoolReader, rounds: int = 30) -> None:
    """Puts and gets of the same size, so that every file that may be written again is."""
    for number in range(rounds):
        for _ in range(3):
            writer.put(full_of(-number))
        for _ in range(3):
            assert (reader.get_nowait() == -number).all()


def inodes(path: Path) -> set[int]:
    return {file.stat().st_ino for part in ("items", "free") for file in (path / part).iterdir()}


def settled(reader: SpoolReader) -> None:
    """Let the reader take note of the arrays that are gone."""
    gc.collect()
    with pytest.raises(Empty):
        reader.get_nowait()


def test_consumed_file_is_written_again_when_no_view_is_left(
    writer: SpoolWriter, reader: SpoolReader, path: Path
) -> None:
    writer.put(full_of(1))
    before = inodes(path)
    array = reader.get_nowait()
    assert (array == 1).all()
    del array
    settled(reader)
    writer.put(full_of(2))
    assert inodes(path) == before
    assert (reader.get_nowait() == 2).all()


def test_traffic_keeps_to_a_few_files(writer: SpoolWriter, reader: SpoolReader, path: Path) -> None:
    traffic(writer, reader, 200)
    assert len(inodes(path)) <= 8


WAYS: list[Callable[[Array], Array]] = [
    lambda a: a,
    lambda a: a[10:],
    lambda a: a[::-2][3:][:5],
    lambda a: a.reshape(50, 100).T[3],
    lambda a: a.view("u1")[8:],
    lambda a: a.view(np.recarray),
    lambda a: np.asarray(memoryview(cast(Any, a))[5:]),
    lambda a: np.frombuffer(a, "f8", 7, 80),
    lambda a: np.lib.stride_tricks.sliding_window_view(a, 9),
    lambda a: np.broadcast_to(a[:1], (3, 1)),
]


@pytest.mark.parametrize("keep", WAYS)
def test_any_view_of_a_view_keeps_the_file_as_it_is(
    writer: SpoolWriter, reader: SpoolReader, keep: Callable[[Array], Array]
) -> None:
    writer.put(full_of(7))
    kept = keep(reader.get_nowait())
    before = kept.tobytes()
    gc.collect()
    traffic(writer, reader)
    assert kept.tobytes() == before


def test_field_and_record_of_a_structured_array_keep_the_file(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    dtype = np.dtype([("a", "f8"), ("b", "i4", (3,))])
    ways: list[Callable[[Array], Array]] = [lambda a: a["b"], lambda a: a[17], lambda a: a["b"][3]]
    for keep in ways:
        writer.put(np.full(SIZE, 3, dtype))
        kept = keep(reader.get_nowait())
        before = kept.tobytes()
        for number in range(30):
            writer.put(np.full(SIZE, number, dtype))
            reader.get_nowait()
        assert kept.tobytes() == before


def test_each_of_several_named_arrays_keeps_the_file(writer: SpoolWriter, reader: SpoolReader) -> None:
    for name in ("a", "b", "c"):
        writer.put({key: full_of(ord(key)) for key in "abc"})
        kept = reader.get_nowait()[name]
        gc.collect()
        for _ in range(20):
            writer.put({key: full_of(0) for key in "abc"})
            reader.get_nowait()
        assert (kept == ord(name)).all()


def test_views_outlive_closing_and_other_parties_traffic(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as other:
        reader = SpoolReader(path)
        for number in range(20):
            writer.put(full_of(number))
        views = [reader.get_nowait() for _ in range(20)]
        reader.close()
        del reader
        gc.collect()
        traffic(writer, other)
    with SpoolWriter(path) as writer, SpoolReader(path) as other:
        traffic(writer, other)
    for number, view in enumerate(views):
        assert (view == number).all()


def test_views_outlive_the_deletion_of_the_spool(path: Path) -> None:
    writer, reader = SpoolWriter(path), SpoolReader(path)
    for number in range(5):
        writer.put(full_of(number))
    views = [reader.get_nowait() for _ in range(5)]
    shutil.rmtree(path)
    with SpoolWriter(path) as again, SpoolReader(path) as other:
        traffic(again, other)
    writer.close()
    reader.close()
    for number, view in enumerate(views):
        assert (view == number).all()


def test_views_outlive_a_lost_index(writer: SpoolWriter, reader: SpoolReader, path: Path) -> None:
    for number in range(5):
        writer.put(full_of(number))
    views = [reader.get_nowait() for _ in range(5)]
    (path / "index").unlink()
    traffic(writer, reader)
    for number, view in enumerate(views):
        assert (view == number).all()


def test_views_outlive_shutdown(writer: SpoolWriter, reader: SpoolReader) -> None:
    writer.put(full_of(1))
    writer.put(full_of(2))
    view = reader.get_nowait()
    writer.shutdown(immediate=True)
    with pytest.raises(ShutDown):
        reader.get_nowait()
    assert (view == 1).all()


def test_view_outlives_acknowledgement(writer: SpoolWriter, reader: SpoolReader) -> None:
    source = reader._source
    writer.put(full_of(1))
    (delivery,) = source.claim(1, None)
    view = source.load(delivery).arrays[0]
    source.ack([delivery])
    traffic(writer, reader)
    assert (view == 1).all()


def test_view_of_an_item_given_back_stays_whoever_takes_it_next(
    writer: SpoolWriter, reader: SpoolReader, path: Path
) -> None:
    with SpoolReader(path) as other:
        for number, second in enumerate((reader, other, reader, other)):
            source = reader._source
            writer.put(full_of(number))
            (delivery,) = source.claim(1, None)
            view = source.load(delivery).arrays[0]
            source.nack(delivery, 0, "on purpose")
            if number < 2:
                assert (second.get_nowait() == number).all()
            else:
                (again,) = second._source.claim(1, None)
                second._source.load(again)
                second._source.ack([again])
            traffic(writer, other)
            traffic(writer, reader)
            assert (view == number).all()


def test_view_of_an_item_whose_lease_ended_stays(
    writer: SpoolWriter, reader: SpoolReader, path: Path
) -> None:
    source = reader._source
    writer.put(full_of(1))
    (delivery,) = source.claim(1, 1e-6)
    view = source.load(delivery).arrays[0]
    with SpoolReader(path) as other:
        assert (other.get(timeout=5) == 1).all()
        traffic(writer, other)
    assert (view == 1).all()


def test_both_views_of_an_item_loaded_twice_stay(writer: SpoolWriter, reader: SpoolReader) -> None:
    source = reader._source
    writer.put(full_of(1))
    (delivery,) = source.claim(1, None)
    first = source.load(delivery).arrays[0]
    second = source.load(delivery).arrays[0]
    del second
    source.ack([delivery])
    gc.collect()
    traffic(writer, reader)
    assert (first == 1).all()


def test_view_of_a_claimed_item_outlives_the_reader(writer: SpoolWriter, path: Path) -> None:
    writer.put(full_of(1))
    source = DirectorySource(path, Limits())
    (delivery,) = source.claim(1, None)
    view = source.load(delivery).arrays[0]
    source.close()
    with SpoolReader(path) as reader:
        assert (reader.get_nowait() == 1).all()
        traffic(writer, reader)
    assert (view == 1).all()


def test_file_with_another_name_is_not_written_again(
    writer: SpoolWriter, reader: SpoolReader, path: Path, tmp_path: Path
) -> None:
    writer.put(full_of(1))
    (file,) = (path / "items").iterdir()
    os.link(file, tmp_path / "mine.npy")
    assert (reader.get_nowait() == 1).all()
    traffic(writer, reader)
    assert (np.load(tmp_path / "mine.npy") == 1).all()


def test_file_linked_elsewhere_after_it_was_got_is_not_written_again(
    writer: SpoolWriter, reader: SpoolReader, path: Path, tmp_path: Path
) -> None:
    writer.put(full_of(1))
    array = reader.get_nowait()
    (file,) = (path / "free").iterdir()
    os.link(file, tmp_path / "mine.npy")
    del array
    traffic(writer, reader)
    assert (np.load(tmp_path / "mine.npy") == 1).all()


def test_view_got_in_another_process_stays_while_this_one_puts(path: Path) -> None:
    ours, theirs = SPAWN.Pipe()
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for number in range(10):
            writer.put(full_of(number))
        child = SPAWN.Process(target=keep_views, args=(path, 10, theirs))
        child.start()
        assert ours.poll(30)
        assert ours.recv() == "kept"
        traffic(writer, reader)
        ours.send("compare")
        assert ours.poll(30)
        assert ours.recv() == list(range(10))
        child.join(30)
        assert child.exitcode == 0


def keep_views(path: Path, count: int, pipe: Connection) -> None:
    reader = SpoolReader(path)
    views = [reader.get_nowait() for _ in range(count)]
    pipe.send("kept")
    pipe.recv()
    pipe.send([float(view[0]) if (view == view[0]).all() else None for view in views])


def test_process_that_ends_without_closing_leaves_nothing_broken(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for number in range(4):
            writer.put(full_of(number))
        child = SPAWN.Process(target=leave_in_the_middle, args=(path,))
        child.start()
        child.join(30)
        assert child.exitcode == 7
        found = [float(reader.get(timeout=5)[0]) for _ in range(3)]
        assert sorted(found) == [1, 2, 3]  # 0 was got, 1 was in hand
        traffic(writer, reader)
    with SpoolReader(path) as reader:
        assert reader.empty()
    assert list((path / "tmp").iterdir()) == []
    assert list((path / "alive").iterdir()) == []


def leave_in_the_middle(path: Path) -> None:
    writer, reader = SpoolWriter(path), SpoolReader(path)
    view = reader.get_nowait()
    (delivery,) = reader._source.claim(1, None)
    also = reader._source.load(delivery).arrays[0]
    writer._sink.prepare(Payload((full_of(9),), None, None))
    assert view[0] == 0
    assert also[0] == 1
    os._exit(7)


def descriptors() -> Counter[str]:
    """What this process has open, without the numbers in names."""
    gc.collect()
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[re.sub(r"[0-9]+", "#", os.readlink(f"/proc/self/fd/{name}"))] += 1
    return found


def work(writer: SpoolWriter, reader: SpoolReader) -> None:
    for size in (1, SIZE, 2 * SIZE):
        writer.put(np.zeros(size))
        reader.get_nowait()
    with pytest.raises(Empty):
        reader.get(timeout=0.01)


@pytest.mark.parametrize("closed", [True, False])
def test_parties_that_are_dropped_leave_nothing_open(path: Path, closed: bool) -> None:
    with SpoolWriter(path) as onlooker, SpoolReader(path) as waiting:
        work(onlooker, waiting)
        before = descriptors()
        for _ in range(20):
            writer, reader = SpoolWriter(path), SpoolReader(path)
            work(writer, reader)
            if closed:
                writer.close()
                reader.close()
            del writer, reader
        opened = descriptors() - before
        assert sum(opened.values()) <= 3, opened  # bells that the two who stay have rung meanwhile
        assert len(list((path / "alive").iterdir())) == 2


def test_closed_parties_have_no_item_open(path: Path) -> None:
    writer, reader = SpoolWriter(path), SpoolReader(path)
    work(writer, reader)
    writer.close()
    reader.close()
    assert [
        name
        for name in descriptors()
        if name.startswith(re.sub(r"[0-9]+", "#", str(path))) and not name.endswith("index")
    ] == []


def test_refused_opening_leaves_nothing_open(path: Path) -> None:
    with SpoolWriter(path, maxsize=3):
        before = descriptors()
        for _ in range(5):
            with pytest.raises(ValueError, match="maxsize"):
                SpoolWriter(path, maxsize=4)
        assert descriptors() - before == Counter()


def test_writer_and_reader_can_be_pickled(path: Path) -> None:
    with SpoolWriter(path, maxsize=5, durability="fsync") as writer, SpoolReader(path) as reader:
        other: SpoolWriter = pickle.loads(pickle.dumps(writer))
        another: SpoolReader = pickle.loads(pickle.dumps(reader))
        with other, another:
            assert (other.path, another.path, other.maxsize) == (writer.path, reader.path, 5)
            other.put(full_of(1))
            assert (another.get_nowait() == 1).all()


def test_writer_and_reader_can_be_given_to_a_spawned_process(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        child = SPAWN.Process(target=echo, args=(reader, writer, 5))
        writer.put(full_of(0))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert (reader.get_nowait() == 5).all()


def echo(reader: SpoolReader, writer: SpoolWriter, count: int) -> None:
    with reader, writer:
        for _ in range(count):
            writer.put(reader.get(timeout=30) + 1)


def test_threads_share_a_writer_and_a_reader(path: Path) -> None:
    """Eight of each: every item once and whole, no view changed while it was kept."""
    count = 150
    seen: list[tuple[int, int]] = []
    noting = threading.Lock()

    shared_writer, shared_reader = SpoolWriter(path, maxsize=40), SpoolReader(path)

    def put(me: int) -> None:
        for number in range(count):
            shared_writer.put(np.full(100 + 700 * ((number + me) % 9), me * count + number))

    def get() -> None:
        kept: list[tuple[Array, int]] = []
        try:
            while True:
                array = shared_reader.get()
                value = int(array[0])
                kept.append((array, value))
                if len(kept) > 5:
                    old, value = kept.pop(0)
                    assert (old == value).all()
                with noting:
                    seen.append(divmod(int(array[0]), count))
        except ShutDown:
            for array, value in kept:
                assert (array == value).all()

    with shared_writer, shared_reader, ThreadPoolExecutor(16) as pool:
        getting = [pool.submit(get) for _ in range(8)]
        putting = [pool.submit(put, me) for me in range(8)]
        for future in putting:
            future.result(50)
        shared_writer.shutdown()
        for future in getting:
            future.result(50)
    assert sorted(seen) == [(me, number) for me in range(8) for number in range(count)]
