"""A checksum on request: stored by the writer, compared by a verifying reader and by fsck."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spoolipc import BadItem, Empty, SpoolReader, SpoolWriter, failed_list, fsck

SIZES = (10, 100_000)  # floats: copied out when small, mapped when large
PADDED = np.dtype({"names": ["a", "b"], "formats": ["i1", "f8"], "offsets": [0, 8], "itemsize": 24})


@pytest.fixture
def writer(spool: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(spool, checksum=True) as writer:
        yield writer


@pytest.fixture
def reader(spool: Path) -> Iterator[SpoolReader]:
    with SpoolReader(spool, verify=True) as reader:
        yield reader


def flip_a_bit(spool: Path, seq: int, at: int) -> None:
    """Damage one byte of a waiting item in place."""
    with open(spool / "items" / f"{seq:020d}.npy", "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("how", ["new", "recycled", "loan", "strided", "padded", "named"])
def test_what_was_put_with_a_checksum_passes(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, count: int, how: str
) -> None:
    for number in range(1 if how == "new" else 4):
        array = np.full(count, number, PADDED if how == "padded" else float)
        if how == "loan":
            with writer.loan(count, meta={"x": 1}) as lent:
                lent[...] = array
        else:
            array = array[::2] if how == "strided" else array
            writer.put({"a": array, "b": array} if how == "named" else array, meta={"x": 1})
        assert fsck(spool).clean
        got = reader.get(timeout=5)
        assert np.array_equal(got["b"] if how == "named" else got, array)
        del got
    with pytest.raises(Empty):
        reader.get_nowait()
    assert failed_list(spool) == []


@pytest.mark.parametrize("count", SIZES)
def test_one_flipped_bit_costs_that_item_only(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, count: int
) -> None:
    bad = writer.put(np.zeros(count))
    writer.put(np.ones(count))
    flip_a_bit(spool, bad, 128 + count * 8 - 3)
    assert not fsck(spool).clean
    assert np.array_equal(reader.get(timeout=5), np.ones(count))
    (letter,) = failed_list(spool)
    assert letter.seq == bad
    assert "checksum mismatch" in letter.history[-1].why


def test_a_received_item_is_verified(writer: SpoolWriter, reader: SpoolReader, spool: Path) -> None:
    bad = writer.put(np.zeros(1000))
    flip_a_bit(spool, bad, 500)
    item = reader.receive(timeout=5)
    with pytest.raises(BadItem, match="checksum mismatch"):
        item.array  # noqa: B018
    assert item.settled


def test_without_a_checksum_nothing_is_compared(reader: SpoolReader, spool: Path) -> None:
    with SpoolWriter(spool) as writer:
        seq = writer.put(np.zeros(1000))
        flip_a_bit(spool, seq, 1000)
        assert np.count_nonzero(reader.get(timeout=5)) == 1
