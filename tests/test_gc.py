"""gc puts back and removes what the dead left, however much, and nothing else."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from dying import check, die, picture, poke

import spoolipc
from spoolipc import GcReport, NotASpool, SpoolReader, SpoolWriter, gc, sweep
from spoolipc import words as W
from spoolipc.layout import item_name
from spoolipc.rebuild import DONATED

BIG = np.arange(100_000)
MANY = 5_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "spool"
    SpoolWriter(place).close()
    return place


def counts(report: GcReport) -> dict[str, int]:
    """What gc did, without what it did not do."""
    said = {field.name: getattr(report, field.name) for field in fields(report)}
    return {
        name: value
        for name, value in said.items()
        if value and name not in ("path", "bytes_freed", "dry_run")
    }


def files(path: Path, part: str) -> list[str]:
    return sorted(os.listdir(path / part))


def test_a_tidy_spool_is_left_as_it_is(path: Path) -> None:
    with SpoolWriter(path) as writer:
        writer.put(BIG)
    before = picture(path)
    assert gc(path) == GcReport(str(path), False)
    assert set(picture(path)) == set(before)


def test_files_of_a_writer_killed_before_its_commit_are_removed(path: Path) -> None:
    die(path, "writer = SpoolWriter(path); draft = prepare(writer, big)")
    assert len(files(path, "tmp")) == 1
    report = gc(path)
    assert counts(report) == {"temporary_files": 1, "stale_parties": 1}
    assert report.bytes_freed > BIG.nbytes
    assert not files(path, "tmp")
    assert not files(path, "alive")


def test_items_in_a_killed_readers_hands_are_delivered_again(path: Path) -> None:
    with SpoolWriter(path) as writer:
        for number in range(5):
            writer.put(BIG + number)
        die(path, "reader = SpoolReader(path); items = [reader.receive() for _ in range(3)]")
        assert counts(gc(path)) == {"returned_items": 3, "stale_parties": 1}
        with SpoolReader(path) as reader:
            items = [reader.receive(timeout=5) for _ in range(5)]
            assert [item.attempt for item in items] == [2, 2, 2, 1, 1]
            assert [int(item.array[0]) for item in items] == list(range(5))
            for item in items:
                item.ack()
    check(path)


def test_an_item_whose_reader_died_every_time_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    with SpoolWriter(path, max_attempts=1) as writer:
        writer.put(BIG)
    die(path, "reader = SpoolReader(path); item = reader.receive()")
    assert counts(gc(path, dry_run=True)) == {"given_up_items": 1, "stale_parties": 1}
    assert counts(gc(path)) == {"given_up_items": 1, "stale_parties": 1}
    assert spoolipc.failed_show(path, 1).attempts == 1
    check(path)


def test_files_a_killed_reader_looked_at_and_a_killed_writer_had_taken_are_removed(path: Path) -> None:
    die(
        path,
        "writer, reader = SpoolWriter(path), SpoolReader(path)\n"
        "for _ in range(4): writer.put(big)\n"
        "for _ in range(2): reader.get()\n"
        "kept = [reader.get(), reader.get()]\n"
        "reader.qsize(); spare = writer.put(big); draft = prepare(writer, big)",
    )
    free = len(files(path, "free"))
    report = gc(path)
    assert report.abandoned_files >= 2
    assert len(files(path, "free")) == free - report.abandoned_files
    assert report.bytes_freed >= 2 * BIG.nbytes
    check(path)


def test_orphans_in_free_are_removed_and_pooled_files_stay(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in range(3):
            writer.put(BIG)
        for _ in range(3):
            reader.get()
        writer.put(BIG)
        held = reader.get()
        kept = files(path, "free")
        for number in (10**6, DONATED + 5):
            (path / "free" / item_name(number)).write_bytes(bytes(8192))
        assert counts(gc(path)) == {"orphaned_files": 2}
        assert files(path, "free") == kept
        assert (held == BIG).all()
    check(path)


def test_histories_of_items_that_are_no_more_are_removed(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in range(2):
            writer.put(BIG)
        reader.receive().reject("unwanted")
        reader.receive().nack()
        (path / "failed" / "00000000000000000099.jsonl").write_text("{}\n")
        assert counts(gc(path)) == {"orphaned_histories": 1}
        assert files(path, "failed") == [
            "00000000000000000001.jsonl",
            "00000000000000000001.npy",
            "00000000000000000002.jsonl",
        ]


def test_half_written_replacements_are_removed(path: Path) -> None:
    for name in ("index.new", "spool.json.new"):
        (path / name).write_bytes(b"half")
    assert counts(gc(path)) == {"half_written": 2}
    assert not list(path.glob("*.new"))


def test_what_waits_in_a_discarded_spool_is_removed(path: Path) -> None:
    with SpoolWriter(path) as writer:
        for _ in range(100):
            writer.put(np.arange(3))
    die(
        path,
        "from spoolipc import shutdown, words as W\n"
        "SpoolWriter(path)._sink.party.run(shutdown.set_state, W.DISCARDED)",
    )
    assert counts(gc(path, dry_run=True)) == {"discarded_items": 100, "stale_parties": 1}
    assert counts(gc(path)) == {"discarded_items": 100, "stale_parties": 1}
    assert not files(path, "items")
    check(path)


@pytest.mark.parametrize("damage", ["deleted", "zeros", "truncated"])
def test_a_damaged_index_is_built_again(path: Path, damage: str) -> None:
    with SpoolWriter(path) as writer:
        writer.put(BIG)
    index = path / "index"
    if damage == "deleted":
        index.unlink()
    else:
        index.write_bytes(bytes(1000 if damage == "truncated" else index.stat().st_size))
    before = picture(path)
    assert gc(path, dry_run=True).index_rebuilt
    assert picture(path) == before
    assert gc(path).index_rebuilt
    assert not gc(path).index_rebuilt
    with SpoolReader(path) as reader:
        assert (reader.get(timeout=5) == BIG).all()


def test_a_change_left_unfinished_is_finished_or_undone(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in range(2):
            writer.put(BIG)
        reader.get()
    poke(path, {W.MARK: W.LEAVE, W.SUBJECT: 2, W.STORES: 1, W.JOURNAL: W.READY, W.JOURNAL + 1: 0})
    gc(path, dry_run=True)
    gc(path)
    check(path)


def leave_everything(path: Path) -> None:
    """A spool with leftovers of every kind."""
    with SpoolWriter(path) as writer:
        for _ in range(6):
            writer.put(BIG)
    die(path, "reader = SpoolReader(path); mine = [reader.get(), reader.receive(), reader.receive()]")
    # Not a second opening, which would tend what the first left.
    (path / "tmp" / "00000000000000ff-0.npy").write_bytes(bytes(5000))
    (path / "alive" / "00000000000000ff").write_bytes(b"1\n")
    (path / "free" / item_name(10**6)).write_bytes(bytes(5000))
    (path / "failed" / "00000000000000000099.jsonl").write_text("{}\n")
    (path / "index.new").write_bytes(b"half")
    (path / "tmp" / "stranger").write_bytes(b"")
    (path / "README").write_bytes(b"")
    (path / "alive" / "stranger").write_bytes(b"")
    (path / "free" / item_name(10**6 + 1)).symlink_to("/etc/passwd")


EVERYTHING = {
    "temporary_files": 1,
    "returned_items": 2,
    "abandoned_files": 1,
    "orphaned_files": 1,
    "orphaned_histories": 1,
    "stale_parties": 2,
    "half_written": 1,
    "strangers": 4,
}


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(path: Path) -> None:
    leave_everything(path)
    before, parties = picture(path), files(path, "alive")
    foreseen = gc(path, dry_run=True)
    assert counts(foreseen) == EVERYTHING
    assert picture(path) == before
    assert files(path, "alive") == parties
    done = gc(path)
    assert counts(done) == EVERYTHING
    assert done.bytes_freed == foreseen.bytes_freed


def test_strangers_are_counted_and_left_alone(path: Path) -> None:
    leave_everything(path)
    gc(path)
    assert counts(gc(path)) == {"strangers": 4}
    assert (path / "README").exists()
    assert (path / "free" / item_name(10**6 + 1)).is_symlink()
    assert Path("/etc/passwd").exists()


def test_work_of_the_living_is_not_touched(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for number in range(4):
            writer.put(BIG + number)
        view = reader.get()
        item = reader.receive()
        with writer.loan((50_000,), np.float64) as loan:
            loan[:] = 7
            assert counts(gc(path)) == {}
        assert counts(gc(path)) == {}
        assert (view == BIG).all()
        assert (item.array == BIG + 1).all()
        item.ack()
        assert int(reader.get()[0]) == 2
    check(path)


def test_leftovers_by_the_thousand_are_removed_in_batches_with_flat_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_FREE_BATCH", 1024)
    for number in range(MANY):
        os.close(os.open(path / "tmp" / f"{number + 1:016x}-0.npy", os.O_CREAT))
        os.close(os.open(path / "alive" / f"{number + 1:016x}", os.O_CREAT))
        os.close(os.open(path / "free" / item_name(10**6 + number), os.O_CREAT))
        os.close(os.open(path / "failed" / f"{10**6 + number:020d}.jsonl", os.O_CREAT))
    said: list[int] = []

    def progress(done: int, total: int | None) -> None:
        assert total is None
        said.append(done)

    tracemalloc.start()
    try:
        report = gc(path, progress=progress)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert counts(report) == {
        "temporary_files": MANY,
        "stale_parties": MANY,
        "orphaned_files": MANY,
        "orphaned_histories": MANY,
    }
    assert peak < 4_000_000
    assert said == sorted(said)
    assert said[-1] >= 4 * MANY
    assert len(said) > 4 * MANY // 1024
    assert [files(path, part) for part in ("tmp", "free", "failed", "alive")] == [[], [], [], []]


def test_many_claims_are_put_back_in_short_steps(path: Path) -> None:
    with SpoolWriter(path) as writer:
        for _ in range(2000):
            writer.put(np.arange(2))
    die(path, "reader = SpoolReader(path); items = [reader.receive() for _ in range(2000)]")
    assert gc(path).returned_items == 2000
    with SpoolReader(path) as reader:
        assert [reader.receive(timeout=5).seq for _ in range(2000)] == list(range(1, 2001))
    check(path)


def test_two_at_once_share_the_work(path: Path) -> None:
    for number in range(3000):
        (path / "tmp" / f"00000000000000ff-{number}.npy").touch()
        (path / "free" / item_name(10**6 + number)).touch()
    program = "import sys, spoolipc; r = spoolipc.gc(sys.argv[1]); print(r.temporary_files, r.orphaned_files)"
    command = [sys.executable, "-c", program, str(path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [list(map(int, process.communicate()[0].split())) for process in running]
    assert [sum(column) for column in zip(*said, strict=True)] == [3000, 3000]
    assert counts(gc(path)) == {}


def test_killed_at_any_removal_it_leaves_the_rest_to_the_next(path: Path, tmp_path: Path) -> None:
    leave_everything(path)
    for place in itertools.count(1):
        copy = tmp_path / f"copy-{place}"
        shutil.copytree(path, copy, symlinks=True)
        killed = killed_at(place, copy)
        done = counts(gc(copy))
        assert killed or done == {"strangers": 4}
        assert counts(gc(copy)) == {"strangers": 4}
        with SpoolReader(copy) as reader:
            assert [reader.receive(timeout=5).seq for _ in range(5)] == [2, 3, 4, 5, 6]
        if not killed:
            break
    assert place > 8


def killed_at(place: int, path: Path) -> bool:
    """Run gc in a process that kills itself instead of its nth unlinking or renaming; whether it came to that."""
    child = os.fork()
    if not child:
        try:
            left = itertools.count(place - 1, -1)

            def deadly(call: Callable[..., None]) -> Callable[..., None]:
                def called(*args: object, **kwargs: object) -> None:
                    if not next(left):
                        os.kill(os.getpid(), signal.SIGKILL)
                    call(*args, **kwargs)

                return called

            os.unlink, os.rename = deadly(os.unlink), deadly(os.rename)
            gc(path)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.fixture
def traffic(path: Path) -> Iterator[list[int]]:
    """Two writers and two readers at work in other threads; what the readers got, by the end."""
    got: list[int] = []
    errors: list[BaseException] = []
    end = threading.Event()

    def write(start: int) -> None:
        try:
            with SpoolWriter(path) as writer:
                number = start
                while not end.is_set():
                    while writer.qsize() > 20 and not end.is_set():
                        os.sched_yield()
                    writer.put(np.full(5000, number))
                    number += 2
        except BaseException as error:
            errors.append(error)

    def read() -> None:
        try:
            with SpoolReader(path) as reader:
                for array in reader:
                    assert (array == array[0]).all()
                    got.append(int(array[0]))
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(start,)) for start in (0, 1)]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in writers + readers:
        thread.start()
    yield got
    end.set()
    for thread in writers:
        thread.join()
    with SpoolWriter(path) as writer:
        writer.shutdown()
    for thread in readers:
        thread.join()
    assert not errors
    for start in (0, 1):
        mine = sorted(number for number in got if number % 2 == start)
        assert mine == list(range(start, start + 2 * len(mine), 2))


def test_during_traffic_nothing_is_lost_and_nothing_live_removed(path: Path, traffic: list[int]) -> None:
    while len(traffic) < 100:
        os.sched_yield()
    for _ in range(20):
        assert counts(gc(path)) == {}


def test_a_path_that_is_no_spool_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(NotASpool):
            gc(place)
        with pytest.raises(NotASpool):
            gc(place, dry_run=True)
    assert not list(tmp_path.iterdir())
