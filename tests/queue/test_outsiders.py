"""What another program may do with the file of an item that waits, as `docs/format.md` has it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from support.damage import item

from spoolipc import SpoolReader, SpoolWriter, fsck


@pytest.mark.parametrize("size", [10, 40_000])
def test_hard_link_of_a_waiting_item_is_never_written_again(spool: Path, tmp_path: Path, size: int) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put(np.full(size, 1.0))
        os.link(spool / item(1), tmp_path / "kept.npy")
        assert [problem.kind for problem in fsck(spool).problems] == ["link"]
        assert (reader.get() == 1).all()
        for number in range(2, 20):
            writer.put(np.full(size, float(number)))
            assert (reader.get() == number).all()
        assert (np.load(tmp_path / "kept.npy") == 1).all()
        assert (tmp_path / "kept.npy").stat().st_nlink == 1


def test_map_made_by_name_changes_when_the_file_is_written_again(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put(np.full(40_000, 1.0))
        seen = np.load(spool / item(1), mmap_mode="r")
        assert (reader.get() == 1).all()
        assert (seen == 1).all()
        for number in range(2, 20):
            writer.put(np.full(40_000, float(number)))
            reader.get()
        assert not (seen == 1).any()
