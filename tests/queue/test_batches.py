"""put_many and get_many: the items of single puts and gets, in one step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.arrays import Array
from support.calls import Call

from spoolipc import Empty, SpoolReader, SpoolWriter, UnsupportedArray

LARGE = 5000


def arrays(count: int, size: int = LARGE) -> list[Array]:
    return [np.full(size, number) for number in range(count)]


@pytest.mark.parametrize("size", [3, LARGE])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 200])
def test_batch_comes_back_whole_and_in_order(
    writer: SpoolWriter, reader: SpoolReader, count: int, size: int
) -> None:
    for _ in range(3):
        first = writer.put(np.full(3, -1))
        assert writer.put_many(iter(arrays(count, size))) == list(range(first + 1, first + 1 + count))
        found = reader.get_many(1000)
        assert len(found) == 1 + count
        for number, array in enumerate(found[1:]):
            assert (array == number).all()


def test_bad_batch_puts_nothing(writer: SpoolWriter, spool: Path) -> None:
    with pytest.raises(UnsupportedArray):
        writer.put_many([np.zeros(3), np.zeros(3, "O")])
    with pytest.raises(ValueError, match=r"NaN|JSON|nan"):
        writer.put_many(arrays(2), metas=[1, float("nan")])
    for part in ("items", "tmp"):
        assert list((spool / part).iterdir()) == []


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
