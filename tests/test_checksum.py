"""A checksum on request: stored by the writer, compared by a verifying reader and by fsck."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import spoolipc
from spoolipc import Empty, SpoolReader, SpoolWriter

SIZES = (10, 100_000)  # floats: copied out when small, mapped when large


def flip_a_bit(spool: Path, seq: int, at: int) -> None:
    """Damage one byte of a waiting item in place."""
    with open(spool / "items" / f"{seq:020d}.npy", "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("how", ["new", "recycled", "loan", "strided", "padded"])
def test_what_was_put_with_a_checksum_passes(tmp_path: Path, count: int, how: str) -> None:
    padded = np.dtype({"names": ["a", "b"], "formats": ["i1", "f8"], "offsets": [0, 8], "itemsize": 24})
    with (
        SpoolWriter(tmp_path / "s", checksum=True) as writer,
        SpoolReader(tmp_path / "s", verify=True) as reader,
    ):
        for number in range(4 if how == "recycled" else 1):
            array = np.full(count, number, padded if how == "padded" else float)
            if how == "loan":
                with writer.loan(count, meta={"x": 1}) as lent:
                    lent[...] = array
            else:
                writer.put(array[::2] if how == "strided" else array, meta={"x": 1})
            assert spoolipc.fsck(tmp_path / "s").clean
            got = reader.get(timeout=5)
            assert np.array_equal(got, array[::2] if how == "strided" else array)
            del got
        with pytest.raises(Empty):
            reader.get_nowait()
    assert os.listdir(tmp_path / "s" / "failed") == []


@pytest.mark.parametrize("count", SIZES)
def test_one_flipped_bit_costs_that_item_only(tmp_path: Path, count: int) -> None:
    with (
        SpoolWriter(tmp_path / "s", checksum=True) as writer,
        SpoolReader(tmp_path / "s", verify=True) as reader,
    ):
        bad = writer.put(np.zeros(count))
        writer.put(np.ones(count))
        flip_a_bit(tmp_path / "s", bad, 128 + count * 8 - 3)
        assert not spoolipc.fsck(tmp_path / "s").clean
        assert np.array_equal(reader.get(timeout=5), np.ones(count))
        (letter,) = spoolipc.failed_list(tmp_path / "s")
        assert letter.seq == bad
        assert "checksum mismatch" in letter.history[-1].why


def test_a_received_item_is_verified(tmp_path: Path) -> None:
    with (
        SpoolWriter(tmp_path / "s", checksum=True) as writer,
        SpoolReader(tmp_path / "s", verify=True) as reader,
    ):
        bad = writer.put(np.zeros(1000))
        flip_a_bit(tmp_path / "s", bad, 500)
        item = reader.receive(timeout=5)
        with pytest.raises(spoolipc.BadItem, match="checksum mismatch"):
            item.array  # noqa: B018
        assert item.settled


def test_without_a_checksum_nothing_is_compared(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path / "s") as writer, SpoolReader(tmp_path / "s", verify=True) as reader:
        seq = writer.put(np.zeros(1000))
        flip_a_bit(tmp_path / "s", seq, 1000)
        assert np.count_nonzero(reader.get(timeout=5)) == 1
