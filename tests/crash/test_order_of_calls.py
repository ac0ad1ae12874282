"""What the order of system calls must be, where no state of a real file system shows it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.account import check_spool
from support.faults import Event, Injector
from support.mounts import tmpfs

from spoolipc import Empty, Full, SpoolReader, SpoolWriter, StorageError
from spoolipc.directory import fs


def test_a_new_spool_is_one_only_when_its_directories_are_durable(tmp_path: Path) -> None:
    met: list[str] = []

    def note(event: Event) -> None:
        is_directory = event.name == "sync" and stat.S_ISDIR(os.fstat(event.args[0]).st_mode)
        met.append("sync directory" if is_directory else event.name)

    with Injector(note):
        SpoolWriter(tmp_path / "spool").close()
    made = len(met) - met[::-1].index("mkdir")
    assert met[made:].index("sync directory") < met[made:].index("rename")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 256 KiB that says that it has room, as one with a quota does."""
    roomy = os.statvfs_result((4096, 4096, 10**6, 10**6, 10**6, 9, 9, 9, 0, 255))
    monkeypatch.setattr(fs, "statvfs", lambda _: roomy)
    with tmpfs(tmp_path / "small", "256k") as place:
        yield place


@pytest.mark.fault
def test_a_loan_has_all_its_blocks_before_anybody_writes_to_it(small: Path) -> None:
    with SpoolWriter(small / "spool") as writer:
        with pytest.raises(Full), writer.loan(100_000, "f8", block=False) as array:
            array[:] = 1  # a store that finds no block ends the process
        assert list((small / "spool" / "tmp").iterdir()) == []
        writer.put(np.zeros(5000))


@pytest.mark.fault
@pytest.mark.parametrize("pages", range(1, 12, 2))
def test_an_index_has_all_its_blocks_before_anybody_writes_to_it(small: Path, pages: int) -> None:
    filler = small / "filler"
    filler.write_bytes(bytes(256 * 1024 - pages * 4096))
    try:
        SpoolReader(small / "spool").close()
    except StorageError:
        filler.unlink()
    SpoolReader(small / "spool").close()
    check_spool(small / "spool")


@pytest.mark.fault
@pytest.mark.parametrize("missing", range(1, 6))
def test_space_that_comes_back_amid_a_write_leaves_no_hole_in_the_item(
    small: Path, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`np.save` does not tell of the last bytes that it could not write, and the footer comes after them."""
    array, filler, save = np.arange(1, 5001), small / "filler", np.save

    def save_and_free(*args: Any, **options: Any) -> None:
        try:
            save(*args, **options)
        finally:
            filler.unlink(missing_ok=True)

    with SpoolWriter(small / "spool") as writer, SpoolReader(small / "spool") as reader:
        filler.write_bytes(bytes((os.statvfs(small).f_bavail - 10 + missing) * 4096))
        monkeypatch.setattr(np, "save", save_and_free)
        writer.put(array, timeout=20)
        assert (reader.get() == array).all()
        assert list((small / "spool" / "tmp").iterdir()) == []


def test_who_waits_says_so_and_passes_a_barrier_before_it_looks_again(place: Path) -> None:
    """Else a processor that lets a load pass an earlier store would look before others can see that it waits."""
    with SpoolReader(place / "spool") as reader, Injector(stores=True) as injector, pytest.raises(Empty):
        reader.get(timeout=0.05)
    met = injector.met
    said = [
        "store",
        "store",
        "yield_core",
        "seek",
    ]  # what for, since when; the look begins with the table's size
    assert any(met[at : at + len(said)] == said for at in range(len(met))), met
