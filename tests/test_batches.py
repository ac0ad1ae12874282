"""put_many and get_many: the items of single puts and gets, in one step and with one ring."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from audit import audit

from spoolipc import (
    Empty,
    Full,
    ShutDown,
    SpoolReader,
    SpoolWriter,
    TooLarge,
    UnsupportedArray,
)
from spoolipc import words as W
from spoolipc.bell import Bells
from spoolipc.lock import IndexLock
from spoolipc.npy import Array

LARGE = 5000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def writer(path: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(path) as writer:
        yield writer
        audit(writer._sink.party)


@pytest.fixture
def reader(path: Path) -> Iterator[SpoolReader]:
    with SpoolReader(path) as reader:
        yield reader


def arrays(count: int, size: int = LARGE) -> list[Array]:
    return [np.full(size, number) for number in range(count)]


@pytest.mark.parametrize("size", [3, LARGE])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 200])
def test_batch_comes_back_whole_and_in_order(
    writer: SpoolWriter, reader: SpoolReader, count: int, size: int
) -> None:
    for _ in range(3):
        first = writer.put(np.full(3, -1))
        assert writer.put_many(arrays(count, size)) == list(range(first + 1, first + 1 + count))
        found = reader.get_many(1000)
        assert len(found) == 1 + count
        for number, array in enumerate(found[1:]):
            assert (array == number).all()


def test_sizes_names_and_metadata_may_differ(writer: SpoolWriter, reader: SpoolReader) -> None:
    batch: list[Array | dict[str, Array]] = [
        np.zeros(3),
        {"a": np.ones(LARGE), "b": np.zeros(0)},
        np.full(LARGE, 2),
        np.full(100_000, 3),
    ]
    for _ in range(3):
        writer.put_many(batch, metas=["x", None, {"n": 2}, [3]])
        metas = []
        for expected in batch:
            with reader.receive(block=False) as item:
                metas.append(item.meta)
                if isinstance(expected, dict):
                    assert list(item.arrays) == ["a", "b"]
                else:
                    assert (item.array == expected).all()
        assert metas == ["x", None, {"n": 2}, [3]]


def test_generators_are_taken(writer: SpoolWriter, reader: SpoolReader) -> None:
    writer.put_many((np.full(3, n) for n in range(5)), metas=(n for n in range(5)))
    assert [int(array[0]) for array in reader.get_many(5)] == list(range(5))


def test_bad_batch_puts_nothing(writer: SpoolWriter, path: Path) -> None:
    with pytest.raises(UnsupportedArray):
        writer.put_many([np.zeros(3), np.zeros(3, "O")])
    with pytest.raises(ValueError, match="2 arrays but 1 metas"):
        writer.put_many(arrays(2), metas=[1])
    with pytest.raises(ValueError, match=r"NaN|JSON|nan"):
        writer.put_many(arrays(2), metas=[1, float("nan")])
    for part in ("items", "tmp"):
        assert list((path / part).iterdir()) == []


@pytest.mark.parametrize(("block", "timeout"), [(False, None), (True, 0.0), (True, 0.02)])
def test_full_tells_what_was_put(path: Path, reader: SpoolReader, block: bool, timeout: float | None) -> None:
    with SpoolWriter(path, maxsize=5) as writer:
        for batch in (8, 100):
            with pytest.raises(Full) as raised:
                writer.put_many(arrays(batch), block, timeout)
            assert len(raised.value.seqs) == 5
            found = reader.get_many(100)
            assert [int(array[0]) for array in found] == list(range(5))
            assert list((path / "tmp").iterdir()) == []
        assert writer.put(np.zeros(3)) == 11
        writer.put_many(arrays(4))
        with pytest.raises(Full) as raised:
            writer.put_many(arrays(3), block, timeout)
        assert raised.value.seqs == ()
        audit(writer._sink.party)


def test_full_by_bytes_tells_what_was_put(path: Path, reader: SpoolReader) -> None:
    with SpoolWriter(path, max_bytes=3 * 45056) as writer:
        with pytest.raises(Full) as raised:
            writer.put_many(arrays(8), block=False)
        assert raised.value.seqs == (1, 2, 3)
        assert len(reader.get_many(10)) == 3
        with pytest.raises(TooLarge):
            writer.put_many([np.zeros(3), np.zeros(100_000)], block=False)


def test_batch_larger_than_the_room_waits_and_goes_through(path: Path, reader: SpoolReader) -> None:
    with SpoolWriter(path, maxsize=3) as writer, ThreadPoolExecutor(1) as aside:
        future = aside.submit(writer.put_many, arrays(200))
        seen: list[int] = []
        while len(seen) < 200:
            seen += [int(array[0]) for array in reader.get_many(10, timeout=10)]
        assert seen == list(range(200))
        assert future.result(10) == list(range(1, 201))


def test_shutdown_tells_what_was_put(path: Path, reader: SpoolReader) -> None:
    with SpoolWriter(path, maxsize=3) as writer, ThreadPoolExecutor(1) as aside:
        future = aside.submit(writer.put_many, arrays(10))
        while writer.qsize() < 3:
            assert not future.done()
        with SpoolWriter(path) as other:
            other.shutdown()
        error = future.exception(10)
        assert isinstance(error, ShutDown)
        assert error.seqs == (1, 2, 3)
        assert len(reader.get_many(10)) == 3


def test_get_many_takes_what_waits_and_waits_only_for_the_first(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    with pytest.raises(Empty):
        reader.get_many(5, block=False)
    with pytest.raises(Empty):
        reader.get_many(5, timeout=0.01)
    for bad in (0, -1):
        with pytest.raises(ValueError, match="limit"):
            reader.get_many(bad)
    writer.put_many(arrays(7))
    assert len(reader.get_many(5)) == 5
    assert len(reader.get_many(5)) == 2
    with ThreadPoolExecutor(1) as aside:
        future = aside.submit(reader.get_many, 5)
        writer.put(np.zeros(3))
        assert len(future.result(10)) == 1
    writer.shutdown()
    with pytest.raises(ShutDown):
        reader.get_many(5)


def test_copies_of_a_batch_are_writable(writer: SpoolWriter, reader: SpoolReader) -> None:
    writer.put_many(arrays(3))
    for array in reader.get_many(3, copy=True):
        array[:] = 1


def test_damaged_item_in_a_batch_costs_that_item(
    writer: SpoolWriter, reader: SpoolReader, path: Path
) -> None:
    seqs = writer.put_many(arrays(5))
    (path / "items" / f"{seqs[2]:020d}.npy").write_bytes(b"garbage")
    assert [int(array[0]) for array in reader.get_many(10)] == [0, 1, 3, 4]


@pytest.mark.parametrize(("size", "steps"), [(3, 1), (LARGE, 2)])
def test_one_step_each_and_one_ring_for_each_waiter(
    writer: SpoolWriter, reader: SpoolReader, monkeypatch: pytest.MonkeyPatch, size: int, steps: int
) -> None:
    """For what is given out as views, put_many reserves consumed files in a step of their own."""
    taken: list[IndexLock] = []
    struck: list[int] = []
    take = IndexLock.take

    def counted(self: IndexLock) -> None:
        taken.append(self)
        take(self)

    monkeypatch.setattr(IndexLock, "take", counted)
    monkeypatch.setattr(Bells, "_strike", lambda self, kind, k: struck.append(k))
    words = writer._sink.party.look()
    for flag in range(16):
        words[W.ITEM_FLAGS + flag] = 0
    for _ in range(6):  # until enough files go round
        writer.put_many(arrays(64, size))
        del taken[:]
        assert len(reader.get_many(64)) == 64
        assert len(taken) == 1
    del taken[:]
    writer.put_many(arrays(64, size))
    assert len(taken) == steps
    reader.get_many(64)
    assert not struck  # nobody waits
    for waiters in (1, 3):
        del struck[:]
        for bell in range(waiters):
            words[W.ITEM_FLAGS + bell] = 2**63
        writer.put_many(arrays(64, size))
        assert sorted(struck) == list(range(waiters))
        del struck[:]
        for bell in range(waiters):
            words[W.SPACE_FLAGS + bell] = 2**63
        reader.get_many(64)
        assert sorted(struck) == list(range(waiters))
