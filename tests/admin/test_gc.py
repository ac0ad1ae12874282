"""gc requeues and removes what crashed sessions left, however much, and nothing else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.account import check_spool
from support.damage import crash, item_name, killed_at, picture
from support.faults import Event, Injector
from support.peek import peek_table, poke

from spoolipc import GcReport, SpoolReader, SpoolWriter, failed_show, fsck, gc, stat

BIG = np.arange(100_000)
MANY = 1_500
HALF_WRITTEN = "lent = writer.loan(100_000, float); lent.__enter__()[:] = 1"
"""A put that never comes to its commit."""


@pytest.fixture
def path(spool: Path) -> Path:
    SpoolWriter(spool).close()
    return spool


def counts(report: GcReport) -> dict[str, Any]:
    """What gc did, without what it did not do."""
    beside = ("path", "bytes_freed", "dry_run")
    return {name: value for name, value in asdict(report).items() if value and name not in beside}


def files(path: Path, part: str) -> list[str]:
    return sorted(os.listdir(path / part))


def test_a_tidy_spool_is_left_as_it_is(path: Path) -> None:
    with SpoolWriter(path) as writer:
        writer.put(BIG)
    before = picture(path)
    assert gc(path) == GcReport(str(path), False)
    assert set(picture(path)) == set(before)


def test_items_of_a_crashed_reader_are_redelivered_in_order_however_many(path: Path) -> None:
    with SpoolWriter(path) as writer:
        writer.put_many([np.full(2, number) for number in range(702)])
    crash(path, "reader = SpoolReader(path); items = [reader.receive() for _ in range(700)]")
    assert counts(gc(path)) == {"requeued_items": 700, "crashed_sessions": 1}
    assert peek_table(path).redelivered == tuple(range(1, 701))
    with SpoolReader(path) as reader:
        items = [reader.receive(timeout=5) for _ in range(702)]
        assert [int(one.array[0]) for one in items] == list(range(702))
        assert [one.attempt for one in items] == [2] * 700 + [1] * 2
        for one in items:
            one.ack()


def test_a_table_built_again_amid_it_leaves_what_had_crashed_owning_nothing(path: Path) -> None:
    """The records found before stand for other files now, or none."""
    with SpoolWriter(path) as writer:
        writer.put_many([np.full(2, number) for number in range(20)])
    crash(path, "reader = SpoolReader(path); kept = [reader.receive() for _ in range(8)]; kept.pop(2).ack()")
    crashed = files(path, "alive")

    def lose(event: Event) -> None:
        if event.name == "stat_at" and event.args[0] in crashed:
            (path / "index").unlink(missing_ok=True)

    with Injector(lose):
        assert counts(gc(path)) == {"crashed_sessions": 1}
    assert peek_table(path).queue == tuple(number for number in range(1, 21) if number != 3)
    assert fsck(path).problems == ()


def test_an_item_whose_every_reader_crashed_is_dead_lettered(spool: Path) -> None:
    with SpoolWriter(spool, max_attempts=1) as writer:
        writer.put(BIG)
    crash(spool, "reader = SpoolReader(path); item = reader.receive()")
    expected = {"dead_lettered_items": 1, "crashed_sessions": 1}
    assert counts(gc(spool, dry_run=True)) == expected
    assert counts(gc(spool)) == expected
    assert failed_show(spool, 1).attempts == 1


def test_files_that_crashed_sessions_pinned_or_reserved_or_staged_are_removed(path: Path) -> None:
    crash(path, f"writer = SpoolWriter(path); {HALF_WRITTEN}")
    assert len(files(path, "tmp")) == 1
    report = gc(path)
    assert counts(report) == {"temporary_files": 1, "crashed_sessions": 1}
    assert report.bytes_freed > BIG.nbytes
    assert not files(path, "tmp")
    assert not files(path, "alive")
    crash(
        path,
        "writer, reader = SpoolWriter(path), SpoolReader(path); big = np.arange(100_000)\n"
        "for _ in range(4): writer.put(big)\n"
        "for _ in range(2): reader.get()\n"
        "kept = [reader.get(), reader.get()]\n"
        f"reader.qsize(); writer.put(big); {HALF_WRITTEN}",
    )
    owned = len(peek_table(path).of("pinned", "reserved"))
    free = len(files(path, "free"))
    report = gc(path)
    assert counts(report)["abandoned_files"] == owned >= 2
    assert len(files(path, "free")) == free - owned
    assert report.bytes_freed >= 2 * BIG.nbytes


def test_what_was_staged_stays_with_its_session_while_nobody_can_note_that_it_was_not_put(path: Path) -> None:
    """However much that is, it is said once."""
    crash(path, f"writer = SpoolWriter(path); {HALF_WRITTEN}")
    for number in range(MANY):
        (path / "tmp" / f"{number + 1:016x}-0.npy").touch()

    def unreadable(event: Event) -> None:
        if event.name == "open_at" and event.args[0] == "sources.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Injector(unreadable):
        report = gc(path)
    assert counts(report) == {"not_removed": ("tmp: sources.json cannot be read or written",)}
    assert len(files(path, "tmp")) == MANY + 1
    assert counts(gc(path)) == {"temporary_files": MANY + 1, "crashed_sessions": 1}


def test_orphans_are_removed_and_pooled_and_pinned_files_and_histories_in_use_stay(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in range(6):
            writer.put(BIG)
        for _ in range(3):
            reader.get()
        pinned = reader.get()
        reader.receive().reject("unwanted")
        reader.receive().nack()
        kept = files(path, "free") + files(path, "failed")
        for number in (10**6, 2**63 + 5):  # that of an item, that of a file preallocated
            (path / "free" / item_name(number)).write_bytes(bytes(8192))
        (path / "failed" / "00000000000000000099.jsonl").write_text("{}\n")
        assert counts(gc(path)) == {"orphaned_files": 2, "orphaned_histories": 1}
        assert files(path, "free") + files(path, "failed") == kept
        assert (pinned == BIG).all()


def test_what_waits_in_a_discarded_spool_is_removed(path: Path) -> None:
    with SpoolWriter(path) as writer:
        for _ in range(100):
            writer.put(np.arange(3))
    (path / "shutdown").write_bytes(b"discarded")  # as if who shut it down had crashed there
    (path / "shutdown").chmod(0o600)
    poke(path, "shutdown", 2)
    assert counts(gc(path, dry_run=True)) == {"discarded_items": 100}
    assert counts(gc(path)) == {"discarded_items": 100}
    assert not files(path, "items")


@pytest.mark.parametrize("size", [None, 0, 1000, 10**5])
def test_a_damaged_index_is_built_again(
    path: Path, size: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    with SpoolWriter(path) as writer:
        writer.put(BIG)
    (path / "index").unlink() if size is None else (path / "index").write_bytes(bytes(size))
    before = picture(path)
    assert gc(path, dry_run=True).index_rebuilt
    assert picture(path) == before
    assert [gc(path).index_rebuilt for _ in range(2)] == [True, False]
    assert "built it again with 1 items" in caplog.text
    assert peek_table(path).queue == (1,)


def test_a_dry_run_without_an_index_counts_every_file_of_free(path: Path) -> None:
    """As building the index again removes them."""
    (path / "free" / item_name(7)).write_bytes(bytes(5000))
    (path / "index").unlink()
    assert counts(gc(path, dry_run=True)) == {"index_rebuilt": True, "orphaned_files": 1}
    assert counts(gc(path)) == {"index_rebuilt": True}
    assert not files(path, "free")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_transition_left_half_done_is_no_damage_and_is_finished_or_undone(
    path: Path, after: bool, fresh: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """fresh: it uses a record for the first time."""
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        if not fresh:
            writer.put(np.arange(3))
            reader.get()

    def put() -> None:
        with SpoolWriter(path) as writer:
            writer.put(np.arange(3))

    assert killed_at(1, put, after)
    assert not peek_table(path).clean
    before = picture(path)
    assert fsck(path).clean
    gc(path, dry_run=True)
    assert picture(path) == before
    gc(path)
    check_spool(path)
    assert len(files(path, "items")) == after
    assert "built it again" not in caplog.text


def leave_everything(path: Path) -> None:
    """A spool with leftovers of every kind."""
    with SpoolWriter(path) as writer:
        for _ in range(6):
            writer.put(BIG)
    crash(path, "reader = SpoolReader(path); mine = [reader.get(), reader.receive(), reader.receive()]")
    # Not by a second session, whose housekeeping would begin with what the first left.
    (path / "tmp" / "00000000000000ff-0.npy").write_bytes(bytes(5000))
    (path / "alive" / "00000000000000ff").write_bytes(b"1\n")
    (path / "free" / item_name(10**6)).write_bytes(bytes(5000))
    (path / "failed" / "00000000000000000099.jsonl").write_text("{}\n")
    for name in ("index.new", "spool.json.new"):
        (path / name).write_bytes(b"half")
    for name in ("tmp/foreign", "README", "alive/foreign"):
        (path / name).touch()
    (path / "free" / item_name(10**6 + 1)).symlink_to("/etc/passwd")


FOREIGN_FILES = {"foreign_files": 4}
EVERYTHING = FOREIGN_FILES | {
    "temporary_files": 1,
    "requeued_items": 2,
    "abandoned_files": 1,
    "orphaned_files": 1,
    "orphaned_histories": 1,
    "crashed_sessions": 2,
    "half_written": 2,
}


@pytest.mark.damaged
def test_a_dry_run_says_what_would_be_done_and_foreign_files_are_left_alone(path: Path) -> None:
    leave_everything(path)
    before, sessions = picture(path), files(path, "alive")
    foreseen = gc(path, dry_run=True)
    assert counts(foreseen) == EVERYTHING
    assert (picture(path), files(path, "alive")) == (before, sessions)
    done = gc(path)
    assert counts(done) == EVERYTHING
    assert done.bytes_freed == foreseen.bytes_freed
    assert counts(gc(path)) == FOREIGN_FILES
    assert (path / "README").exists()
    assert (path / "free" / item_name(10**6 + 1)).is_symlink()
    assert not list(path.glob("*.new"))


def test_work_of_live_sessions_is_not_touched(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for number in range(-2, 4):
            writer.put(BIG + number)
        for _ in range(2):
            reader.get()
        view, taken = reader.get(), reader.receive()
        pooled = stat(path).free_files
        assert pooled
        assert counts(gc(path)) == {}
        assert stat(path).free_files == pooled
        with writer.loan(BIG.shape, BIG.dtype) as loan:
            loan[:] = 7
            assert counts(gc(path)) == {}
        with writer.loan(10 * BIG.size, BIG.dtype) as loan:  # of a size for which no consumed file is there
            assert os.listdir(path / "tmp")
            assert counts(gc(path)) == {}
            loan[:] = 8
        assert counts(gc(path)) == {}
        assert (view == BIG).all()
        assert (taken.array == BIG + 1).all()
        taken.ack()
        assert int(reader.get()[0]) == 2


def test_leftovers_by_the_thousand_are_removed_with_progress_and_flat_memory(path: Path) -> None:
    for number in range(MANY):
        for name in (
            f"tmp/{number + 1:016x}-0.npy",
            f"alive/{number + 1:016x}",
            f"free/{item_name(10**6 + number)}",
            f"failed/{10**6 + number:020d}.jsonl",
        ):
            os.close(os.open(path / name, os.O_CREAT, 0o600))
    said: list[tuple[int, int | None]] = []
    tracemalloc.start()
    try:
        report = gc(path, progress=lambda done, total: said.append((done, total)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    kinds = ("temporary_files", "crashed_sessions", "orphaned_files", "orphaned_histories")
    assert counts(report) == dict.fromkeys(kinds, MANY)
    assert peak < 4_000_000
    assert said == sorted(said, key=lambda one: one[0])
    assert said[-1][0] >= 4 * MANY
    assert {total for _, total in said} == {None}
    assert len(said) > 3 * MANY // 256  # names of three parts, some at a time
    assert [files(path, part) for part in ("tmp", "free", "failed", "alive")] == [[], [], [], []]


def test_several_at_once_share_the_work(path: Path) -> None:
    for number in range(1000):
        (path / "tmp" / f"00000000000000ff-{number}.npy").touch()
        (path / "free" / item_name(10**6 + number)).touch()
    program = "import sys, spoolipc; r = spoolipc.gc(sys.argv[1]); print(r.temporary_files, r.orphaned_files)"
    command = [sys.executable, "-c", program, str(path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [list(map(int, process.communicate()[0].split())) for process in running]
    assert [sum(column) for column in zip(*said, strict=True)] == [1000, 1000]
    assert counts(gc(path)) == {}


def test_during_traffic_nothing_live_is_removed_and_fsck_finds_nothing(path: Path) -> None:
    end = threading.Event()

    def traffic() -> None:
        kept = np.zeros(0)
        with SpoolWriter(path) as writer, SpoolReader(path) as reader:
            while not end.is_set():
                for size in (1000, 5000, 40_000):
                    writer.put(np.full(size, size))
                with reader.receive() as item:
                    assert (kept == len(kept)).all()
                    kept = item.array
                for array in reader.get_many(2):
                    assert (array == len(array)).all()

    with ThreadPoolExecutor() as aside:
        running = [aside.submit(traffic) for _ in range(3)]
        for _ in range(20):
            assert counts(gc(path)) == {}
            assert fsck(path).problems == ()
        end.set()
        for one in running:
            one.result()
    found = stat(path)
    assert found.gets is not None
    assert found.puts == found.gets + found.depth
