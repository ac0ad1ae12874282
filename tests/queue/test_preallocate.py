"""Files made ahead are the ones that the first puts are written to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.account import check_spool
from support.mounts import tmpfs
from support.peer import Peer

from spoolipc import Full, SpoolReader, SpoolWriter

SIZE = 5000
NBYTES = SIZE * 8


def inodes(spool: Path, part: str) -> set[int]:
    return {file.stat().st_ino for file in (spool / part).iterdir()}


@pytest.mark.parametrize("how", ["put", "loan", "put_many"])
def test_first_puts_go_into_the_files_made_ahead(spool: Path, how: str) -> None:
    arrays = [np.full(SIZE, number) for number in range(4)]
    with SpoolWriter(spool, preallocate=(4, NBYTES)) as writer, SpoolReader(spool) as reader:
        made = inodes(spool, "free")
        assert len(made) == 4
        assert all(file.stat().st_blocks * 512 >= NBYTES for file in (spool / "free").iterdir())
        if how == "put_many":
            writer.put_many(arrays)
        for array in [] if how == "put_many" else arrays:
            if how == "put":
                writer.put(array)
            else:
                with writer.loan(SIZE) as lent:
                    lent[:] = array
        assert inodes(spool, "items") == made
        for number in range(4):
            assert (reader.get() == number).all()


def test_pool_is_filled_up_not_added_to(spool: Path) -> None:
    with SpoolReader(spool):  # who leaves last would empty the pool
        for count in (0, 3, 3, 5, 2):
            with SpoolWriter(spool, preallocate=(count, NBYTES)):
                assert len(inodes(spool, "free")) == (5 if count == 2 else count)
    assert not inodes(spool, "free")


def test_several_arrays_and_metadata_fit_beside_the_bytes_asked_for(spool: Path) -> None:
    with SpoolWriter(spool, preallocate=(1, NBYTES)) as writer:
        made = inodes(spool, "free")
        writer.put({"a": np.zeros(SIZE // 2), "b": np.zeros(SIZE // 2)}, meta="m")
        assert inodes(spool, "items") == made


def test_more_than_the_pool_may_hold_is_an_error_and_closes_the_writer(spool: Path) -> None:
    with pytest.raises(ValueError, match="recycle_bytes"):
        SpoolWriter(spool, recycle_bytes=100_000, preallocate=(3, NBYTES))
    assert list((spool / "alive").iterdir()) == []
    with SpoolWriter(spool, recycle_bytes=100_000, preallocate=(2, NBYTES)):
        assert len(inodes(spool, "free")) == 2


def test_files_made_ahead_outlive_their_writer(spool: Path) -> None:
    with Peer(spool) as peer:
        peer.run(f"writer = SpoolWriter(path, preallocate=(3, {NBYTES}))")
        peer.kill()
    made = inodes(spool, "free")
    with SpoolWriter(spool) as writer:
        for _ in range(3):
            writer.put(np.zeros(SIZE))
        assert inodes(spool, "items") == made


def test_loss_of_the_table_forgets_them_and_gives_no_number_away(spool: Path) -> None:
    with SpoolWriter(spool, preallocate=(3, NBYTES)) as writer:
        (spool / "index").unlink()
        assert writer.put(np.zeros(SIZE)) == 1
        assert writer.put(np.zeros(SIZE)) == 2


@pytest.mark.fault
def test_full_file_system_is_a_clear_error_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "2m") as place:
        spool = place / "spool"
        with pytest.raises(Full):
            SpoolWriter(spool, preallocate=(100, NBYTES))
        assert list((spool / "tmp").iterdir()) == list((spool / "alive").iterdir()) == []
        with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
            writer.put(np.full(SIZE, 1.0))
            assert (reader.get() == 1).all()
        check_spool(spool)
