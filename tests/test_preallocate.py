"""Files made ahead are the ones that the first puts are written to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from audit import audit
from support.peer import Peer

from spoolipc import Full, SpoolReader, SpoolWriter

SIZE = 5000
NBYTES = SIZE * 8


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def pooled(path: Path) -> set[int]:
    return {file.stat().st_ino for file in (path / "free").iterdir()}


def waiting(path: Path) -> list[int]:
    return [file.stat().st_ino for file in sorted((path / "items").iterdir())]


@pytest.mark.parametrize("how", ["put", "loan", "put_many"])
def test_first_puts_go_into_the_files_made_ahead(path: Path, how: str) -> None:
    with SpoolWriter(path, preallocate=(4, NBYTES)) as writer, SpoolReader(path) as reader:
        made = pooled(path)
        assert len(made) == 4
        assert all(file.stat().st_blocks * 512 >= NBYTES for file in (path / "free").iterdir())
        if how == "put":
            for number in range(4):
                writer.put(np.full(SIZE, number))
        elif how == "loan":
            for number in range(4):
                with writer.loan(SIZE) as array:
                    array[:] = number
        else:
            writer.put_many([np.full(SIZE, number) for number in range(4)])
        assert set(waiting(path)) == made
        for number in range(4):
            assert (reader.get() == number).all()
        audit(writer._sink.party)


def test_pool_is_filled_up_not_added_to(path: Path) -> None:
    for count in (3, 3, 5, 2):
        with SpoolWriter(path, preallocate=(count, NBYTES)) as writer:
            audit(writer._sink.party)
    assert len(pooled(path)) == 5


def test_several_arrays_and_metadata_fit_beside_the_bytes_asked_for(path: Path) -> None:
    with SpoolWriter(path, preallocate=(1, NBYTES)) as writer:
        made = pooled(path)
        writer.put({"a": np.zeros(SIZE // 2), "b": np.zeros(SIZE // 2)}, meta="m")
        assert set(waiting(path)) == made


def test_more_than_the_pool_may_hold_is_an_error_and_closes_the_writer(path: Path) -> None:
    with pytest.raises(ValueError, match="recycle_bytes"):
        SpoolWriter(path, recycle_bytes=100_000, preallocate=(3, NBYTES))
    assert list((path / "alive").iterdir()) == []
    with SpoolWriter(path, recycle_bytes=100_000, preallocate=(2, NBYTES)):
        assert len(pooled(path)) == 2


@pytest.mark.parametrize("asked", [(-1, NBYTES), (1, -1)])
def test_numbers_that_mean_nothing_are_refused(path: Path, asked: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="preallocate"):
        SpoolWriter(path, preallocate=asked)


def test_none_asked_for_is_none_made(path: Path) -> None:
    with SpoolWriter(path, preallocate=(0, NBYTES)):
        assert pooled(path) == set()


def test_files_made_ahead_outlive_their_writer(path: Path) -> None:
    with Peer(path) as peer:
        peer.run(f"writer = SpoolWriter(path, preallocate=(3, {NBYTES}))")
        peer.kill()
    made = pooled(path)
    with SpoolWriter(path) as writer:
        audit(writer._sink.party)
        for _ in range(3):
            writer.put(np.zeros(SIZE))
        assert set(waiting(path)) == made


def test_index_lost_forgets_them_and_gives_no_number_away(path: Path) -> None:
    with SpoolWriter(path, preallocate=(3, NBYTES)) as writer:
        (path / "index").unlink()
        assert writer.put(np.zeros(SIZE)) == 1
        assert writer.put(np.zeros(SIZE)) == 2


@pytest.mark.fault
def test_full_file_system_is_a_clear_error_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
    try:
        path = place / "spool"
        with pytest.raises(Full):
            SpoolWriter(path, preallocate=(100, NBYTES))
        assert list((path / "tmp").iterdir()) == []
        assert list((path / "alive").iterdir()) == []
        with SpoolWriter(path) as writer, SpoolReader(path) as reader:
            writer.put(np.full(SIZE, 1.0))
            assert (reader.get() == 1).all()
            audit(writer._sink.party)
    finally:
        subprocess.run(["umount", "-l", place], check=True)
