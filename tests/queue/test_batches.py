"""put_many and get_many: the items of single puts and gets, in one step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.arrays import Array
from support.calls import Call

from spoolipc import Empty, Full, ShutDown, SpoolReader, SpoolWriter, UnsupportedArray

LARGE = 5000


def arrays(count: int, size: int = LARGE) -> list[Array]:
    return [np.full(size, number) for number in range(count)]


def firsts(found: list[Array]) -> list[int]:
    return [int(array[0]) for array in found]


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


def test_generators_are_taken(writer: SpoolWriter, reader: SpoolReader) -> None:
    writer.put_many((np.full(3, n) for n in range(5)), metas=(n for n in range(5)))
    assert firsts(reader.get_many(5)) == list(range(5))


def test_bad_batch_puts_nothing(writer: SpoolWriter, spool: Path) -> None:
    with pytest.raises(UnsupportedArray):
        writer.put_many([np.zeros(3), np.zeros(3, "O")])
    with pytest.raises(ValueError, match="2 arrays but 1 metas"):
        writer.put_many(arrays(2), metas=[1])
    with pytest.raises(ValueError, match=r"NaN|JSON|nan"):
        writer.put_many(arrays(2), metas=[1, float("nan")])
    for part in ("items", "tmp"):
        assert list((spool / part).iterdir()) == []


@pytest.mark.parametrize("size", [10, LARGE])
@pytest.mark.parametrize(("block", "timeout"), [(False, None), (True, 0.0), (True, 0.02)])
def test_full_tells_what_was_put(
    spool: Path, reader: SpoolReader, block: bool, timeout: float | None, size: int
) -> None:
    with SpoolWriter(spool, maxsize=5) as writer:
        for batch in (8, 100, 6, 7):
            with pytest.raises(Full) as raised:
                writer.put_many(arrays(batch, size), block, timeout)
            assert len(raised.value.seqs) == 5
            assert firsts(reader.get_many(100)) == list(range(5))
            assert list((spool / "tmp").iterdir()) == []
        assert writer.put(np.zeros(3)) == 21
        writer.put_many(arrays(4, size))
        with pytest.raises(Full) as raised:
            writer.put_many(arrays(3, size), block, timeout)
        assert raised.value.seqs == ()


def test_batch_larger_than_the_room_waits_and_goes_through(spool: Path, reader: SpoolReader) -> None:
    with SpoolWriter(spool, maxsize=3) as writer:
        putting = Call(writer.put_many, arrays(200))
        seen: list[int] = []
        while len(seen) < 200:
            seen += firsts(reader.get_many(10, timeout=10))
        assert seen == list(range(200))
        assert putting.result() == list(range(1, 201))


def test_shutdown_tells_what_was_put(spool: Path, reader: SpoolReader) -> None:
    with SpoolWriter(spool, maxsize=3) as writer:
        putting = Call(writer.put_many, arrays(10))
        putting.until_asleep()
        with SpoolWriter(spool) as other:
            other.shutdown()
        error = putting.error()
        assert isinstance(error, ShutDown)
        assert error.seqs == (1, 2, 3)
        assert len(reader.get_many(10)) == 3


def test_get_many_takes_what_waits_and_waits_only_for_the_first(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    for bad in (0, -1):
        with pytest.raises(ValueError, match="limit"):
            reader.get_many(bad)
    writer.put_many(arrays(7))
    assert len(reader.get_many(5)) == 5
    assert len(reader.get_many(5)) == 2
    getting = Call(reader.get_many, 5)
    getting.until_asleep()
    writer.put(np.zeros(3))
    assert len(getting.result()) == 1


def test_one_batch_wakes_as_many_as_wait(spool: Path, writer: SpoolWriter) -> None:
    readers = [SpoolReader(spool) for _ in range(3)]
    waiting = [Call(reader.get) for reader in readers]
    for call in waiting:
        call.until_asleep()
    writer.put_many(arrays(3))
    assert sorted(int(call.result()[0]) for call in waiting) == [0, 1, 2]
    for reader in readers:
        with pytest.raises(Empty):
            reader.get_nowait()
        reader.close()


def test_damaged_item_in_a_batch_costs_that_item(
    writer: SpoolWriter, reader: SpoolReader, spool: Path
) -> None:
    seqs = writer.put_many(arrays(5))
    (spool / "items" / f"{seqs[2]:020d}.npy").write_bytes(b"garbage")
    assert firsts(reader.get_many(10)) == [0, 1, 3, 4]
