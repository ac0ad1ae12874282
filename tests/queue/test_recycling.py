"""Consumed files are written again, if nobody else may see them, and give way as `recycle_bytes` says."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.arrays import Array
from support.faults import Event, Injector
from support.peek import peek_table

from spoolipc import Empty, Limits, SpoolReader, SpoolWriter, set_limits, stat
from spoolipc.directory import recycling

PAGE = 4096
SIZE = 5000
"""Of float64: 40 KB, which is given out as a view of the file."""
ROUNDS = 16


def inodes(spool: Path) -> set[int]:
    return {file.stat().st_ino for part in ("items", "free") for file in (spool / part).iterdir()}


def traffic(writer: SpoolWriter, reader: SpoolReader, array: Array, rounds: int = ROUNDS) -> None:
    for number in range(rounds):
        expected = array - number
        writer.put(expected)
        writer.put(array)
        assert (reader.get() == expected).all()
        assert (reader.get() == array).all()


def pages(count: int) -> Array:
    """An array whose file has this many pages."""
    return np.ones(count * PAGE - 1024, "u1")


def test_consumed_file_is_written_again_when_no_view_is_left(
    writer: SpoolWriter, reader: SpoolReader, spool: Path
) -> None:
    writer.put(np.ones(SIZE))
    before = inodes(spool)
    array = reader.get_nowait()
    assert (array == 1).all()
    del array
    gc.collect()
    with pytest.raises(Empty):
        reader.get_nowait()
    writer.put(np.full(SIZE, 2.0))
    assert inodes(spool) == before
    assert (reader.get_nowait() == 2).all()


@pytest.mark.parametrize("limits", [{}, {"max_bytes": 1 << 30}, {"maxsize": 1}], ids=str)
@pytest.mark.parametrize(
    "sizes", [(50, SIZE), (SIZE, 3 * SIZE), (100_000, 50_000), (50, 600, 2000, SIZE)], ids=str
)
def test_sizes_in_turn_keep_to_a_few_files(
    spool: Path, sizes: tuple[int, ...], limits: dict[str, int]
) -> None:
    with SpoolWriter(spool, limits=Limits(**limits)) as writer, SpoolReader(spool) as reader:
        for _ in range(50):
            for size in sizes:
                writer.put(np.ones(size))
                reader.get()
        assert len(inodes(spool)) <= 4 * len(sizes)


@pytest.mark.parametrize("when", ["waiting", "got", "received"])
@pytest.mark.parametrize("size", [50, SIZE])
def test_file_with_another_name_is_not_written_again(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, size: int, when: str
) -> None:
    mine = spool.parent / "mine.npy"
    traffic(writer, reader, np.ones(size))
    seq = writer.put(np.full(size, 7.0))
    item = spool / "items" / f"{seq:020d}.npy"
    inode = item.stat().st_ino
    if when == "waiting":
        os.link(item, mine)
        assert (reader.get() == 7).all()
    elif when == "received":
        with reader.receive() as received:
            assert (received.array == 7).all()
            os.link(item, mine)
        del received
    else:
        array = reader.get()
        (file,) = [file for file in (spool / "free").iterdir() if file.stat().st_ino == inode]
        os.link(file, mine)
        assert (array == 7).all()
        del array
    traffic(writer, reader, np.ones(size))
    assert (np.load(mine) == 7).all()
    assert mine.stat().st_nlink == 1


def test_map_made_by_name_changes_when_the_file_is_written_again(
    writer: SpoolWriter, reader: SpoolReader, spool: Path
) -> None:
    """As `docs/format.md` has it: what another program may do with the file of an item that waits."""
    seq = writer.put(np.full(SIZE, 1.0))
    seen = np.load(spool / "items" / f"{seq:020d}.npy", mmap_mode="r")
    assert (reader.get() == 1).all()
    assert (seen == 1).all()
    traffic(writer, reader, np.full(SIZE, 99.0))
    assert not (seen == 1).any()


def link(file: Path) -> None:
    os.link(file, file.parents[2] / f"linked-{file.name}")


def shorten(file: Path) -> None:
    os.truncate(file, 100)


def replace(file: Path) -> None:
    other = file.with_suffix(".other")
    other.write_bytes(file.read_bytes())
    other.chmod(0o600)
    other.rename(file)


@pytest.mark.parametrize("size", [50, SIZE])
@pytest.mark.parametrize("harm", [link, shorten, replace, Path.unlink])
def test_consumed_file_that_was_tampered_with_is_not_written(
    spool: Path, writer: SpoolWriter, reader: SpoolReader, harm: Callable[[Path], None], size: int
) -> None:
    traffic(writer, reader, np.ones(size))
    for file in list((spool / "free").iterdir()):
        harm(file)
    linked = {file: file.read_bytes() for file in spool.parent.glob("linked-*")}
    assert bool(linked) == (harm is link)
    traffic(writer, reader, np.zeros(size))
    assert all(file.read_bytes() == before for file, before in linked.items())
    assert stat(spool).failed == 0


def test_recycled_bytes_are_what_a_backlog_left_and_soon_within_the_limit(
    spool: Path, spend: Callable[[float], None]
) -> None:
    with SpoolWriter(spool, recycle_bytes=8 * PAGE) as writer, SpoolReader(spool) as reader:
        for _ in range(20):
            writer.put(pages(2))
        for left in range(19, -1, -1):
            reader.get_nowait()
            assert stat(spool).free_bytes <= (20 - left) * 2 * PAGE
        assert stat(spool).free_bytes >= 36 * PAGE
        for _ in range(60):
            before = stat(spool).free_bytes
            spend(1.1)
            with pytest.raises(Empty):
                reader.get_nowait()
            assert 8 * PAGE <= stat(spool).free_bytes <= before
        assert stat(spool).free_bytes == 8 * PAGE
        assert sum(file.stat().st_size for file in (spool / "free").iterdir()) <= 10 * PAGE


def test_nothing_is_recycled_when_the_limit_is_zero(spool: Path) -> None:
    with SpoolWriter(spool, recycle_bytes=0) as writer, SpoolReader(spool) as reader:
        for size in (1, 9) * 5:
            writer.put(pages(size))
            reader.get_nowait()
        with pytest.raises(Empty):
            reader.get_nowait()
        assert list((spool / "free").iterdir()) == []


def test_what_was_shown_when_the_limit_became_zero_is_not_recycled(
    writer: SpoolWriter, reader: SpoolReader, spool: Path
) -> None:
    writer.put(pages(9))
    shown = reader.get()
    set_limits(spool, recycle_bytes=0)
    del shown
    with pytest.raises(Empty):
        reader.get_nowait()
    assert list((spool / "free").iterdir()) == []


def test_the_index_grows_with_a_backlog_and_with_nothing_else(
    spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And is not built again for that."""

    def size() -> int:
        return (spool / "index").stat().st_size

    with SpoolWriter(spool, recycle_bytes=0) as writer, SpoolReader(spool) as reader:
        first = size()
        for _ in range(300):
            writer.put(np.zeros(3))
            reader.get()
        assert size() == first
        writer.put_many([np.zeros(3)] * 300)
        assert size() > first
        assert len(reader.get_many(500)) == 300
    assert caplog.messages == []


@pytest.mark.parametrize("known", [True, False], ids=["in the table", "after its loss"])
def test_file_that_must_survive_power_loss_is_not_written_again(spool: Path, known: bool) -> None:
    """Its old name may come back, with whatever bytes the file then has."""
    with SpoolWriter(spool, durability="fsync") as writer, SpoolReader(spool) as reader:
        writer.put(np.ones(SIZE))
        if not known:
            (spool / "index").unlink()
        assert (reader.get() == 1).all()
        with pytest.raises(Empty):
            reader.get(block=False)  # the step after it finds that nobody puts the item back
        assert list((spool / "free").iterdir()) == []


@pytest.mark.parametrize("harm", [link, shorten])
def test_small_file_not_mapped_yet_that_was_tampered_with_is_not_written(
    spool: Path, writer: SpoolWriter, reader: SpoolReader, harm: Callable[[Path], None]
) -> None:
    writer.put(np.full(50, 7.0))
    reader.get()
    (file,) = (spool / "free").iterdir()
    harm(file)
    writer.put(np.ones(50))
    assert (reader.get() == 1).all()
    for linked in spool.parent.glob("linked-*"):
        assert (np.load(linked) == 7).all()
        linked.unlink()


def mapped(spool: Path) -> int:
    """How many files of items this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(spool) in line and ".npy" in line for line in lines)


@pytest.mark.parametrize("call", ["put", "get", "receive", "wait"])
def test_mapping_not_used_for_some_seconds_goes_at_the_next_call_of_any_session(
    spool: Path, tmp_path: Path, spend: Callable[[float], None], call: str
) -> None:
    """Else a session that is idle would keep the memory of its files, removed ones too, from whoever needs it."""
    other = tmp_path / "other"
    with (
        SpoolWriter(spool) as idle,
        SpoolReader(spool) as reader,
        SpoolWriter(other) as writer,
        SpoolReader(other) as busy,
    ):
        traffic(idle, reader, np.ones(SIZE), 4)
        idle.put(np.ones(SIZE))
        held = reader.get()
        assert mapped(spool) >= 4
        writer.put(np.ones(SIZE))
        assert mapped(spool) >= 4
        spend(6)
        if call == "put":
            writer.put(np.ones(SIZE))
        elif call == "get":
            busy.get_nowait()
        elif call == "receive":
            busy.receive()
        else:
            busy.get()
            with pytest.raises(Empty):
                busy.get(timeout=0.01)
        assert mapped(spool) == 1, "what the array shows"
        assert (held == 1).all()
        traffic(idle, reader, np.ones(SIZE), 4)
        assert mapped(spool) >= 4


def test_mapping_that_is_used_stays(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, spend: Callable[[float], None]
) -> None:
    traffic(writer, reader, np.ones(SIZE))
    before = mapped(spool)
    for _ in range(8):
        spend(1.5)
        traffic(writer, reader, np.ones(SIZE), 2)
        assert mapped(spool) == before


def test_closed_session_keeps_no_mapping(spool: Path) -> None:
    writer, reader = SpoolWriter(spool), SpoolReader(spool)
    traffic(writer, reader, np.ones(SIZE))
    for side in (writer, reader):
        before = mapped(spool)
        side.close()
        assert mapped(spool) < before
    assert mapped(spool) == 0


def test_mappings_of_files_that_are_no_more_go_within_a_second(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, spend: Callable[[float], None]
) -> None:
    traffic(writer, reader, np.ones(SIZE), 4)
    for file in (spool / "free").iterdir():
        link(file)  # so that it is not written again
    traffic(writer, reader, np.ones(SIZE), 4)
    before = mapped(spool)
    spend(1.5)
    with pytest.raises(Empty):
        reader.get_nowait()
    assert mapped(spool) <= before - 4


def test_a_burst_leaves_no_more_mappings_than_are_kept(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recycling, "_MOST_MAPPED", 8)
    recycling.keeper.sweep()
    writer.put_many([np.ones(SIZE)] * 20)
    for _ in range(20):
        reader.get_nowait()
    assert mapped(spool) <= 9


def test_small_files_seen_once_are_not_remembered_for_ever() -> None:
    mappings = recycling.Mappings(writable=False)
    assert not any(mappings.wants(number) for number in range(3000))
    assert len(mappings._seen) <= 1024


def test_file_exchanged_as_it_is_opened_is_not_written(
    spool: Path, tmp_path: Path, writer: SpoolWriter, reader: SpoolReader
) -> None:
    writer.put(np.ones(SIZE))
    reader.get()
    with pytest.raises(Empty):
        reader.get_nowait()
    (file,) = (spool / "free").iterdir()
    foreign = tmp_path / "foreign"
    foreign.write_bytes(before := file.read_bytes())
    foreign.chmod(0o600)

    def exchange(event: Event) -> None:
        if event.name == "open_at" and event.args[0] == file.name:
            file.unlink()
            os.link(foreign, file)

    with Injector(exchange):
        writer.put(np.zeros(SIZE))
    assert foreign.read_bytes() == before
    assert (reader.get() == 0).all()


def test_put_with_no_file_to_write_again_takes_the_lock_once(writer: SpoolWriter) -> None:
    with Injector() as calls:
        writer.put(np.ones(SIZE))
    assert calls.met.count("lock") == 1


def test_files_of_sizes_that_nobody_puts_any_more_do_not_stay_reserved(
    writer: SpoolWriter, reader: SpoolReader, spool: Path
) -> None:
    for size in range(1, 13):
        for _ in range(3):
            writer.put(pages(size))
        reader.get_many(3)
        with pytest.raises(Empty):
            reader.get_nowait()
        writer.put(pages(size))  # into one of the three, and reserves another
        reader.get()
        assert len(peek_table(spool).of("reserved")) <= 9
    assert peek_table(spool).of("reserved")
