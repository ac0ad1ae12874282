"""fsck finds every damage made to a spool, names it, and repairs it without losing an item silently."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dying import check, die, picture, poke, words_of

from spoolipc import (
    Empty,
    FsckReport,
    NotASpool,
    SpoolReader,
    SpoolWriter,
    failed_show,
    fsck,
    inspection,
    stat,
)
from spoolipc import words as W
from spoolipc.layout import PARTS, item_name
from spoolipc.ledger import index_problems

BIG = np.arange(10_000)
COUNT = 5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A spool with five items waiting, one consumed file in the pool and one dead letter."""
    place = tmp_path / "spool"
    with SpoolWriter(place) as writer, SpoolReader(place) as reader:
        for number in range(-2, COUNT):
            writer.put(BIG + number)
        reader.get()
        reader.receive().reject("unwanted")
    assert fsck(place).problems == ()
    return place


def item(number: int) -> str:
    return f"items/{item_name(number)}"


def found(report: FsckReport) -> set[tuple[str, str]]:
    return {(problem.kind, problem.where) for problem in report.problems}


def repaired(path: Path) -> FsckReport:
    """Repair, which must leave nothing, and hold the index against the directories."""
    report = fsck(path, repair=True)
    assert report.clean, report.problems
    check(path)
    return report


def rest(path: Path) -> list[int]:
    """What can still be got, by the number each array begins with."""
    got = []
    with SpoolReader(path) as reader:
        while True:
            try:
                got.append(int(reader.get_nowait()[0]))
            except Empty:
                return got


def test_a_sound_spool_is_clean_and_stays_as_it_is(path: Path) -> None:
    before = picture(path)
    report = fsck(path)
    assert report.clean
    assert (report.items, report.problems) == (COUNT, ())
    assert report.bytes == stat(path).bytes
    assert picture(path) == before
    assert rest(path) == list(range(COUNT))


def cut(place: Path) -> None:
    place.write_bytes(place.read_bytes()[:1000])


def blank(place: Path) -> None:
    place.write_bytes(b"")


def scramble(place: Path) -> None:
    place.write_bytes(np.random.default_rng(1).bytes(50_000))


def spoil_footer(place: Path) -> None:
    data = bytearray(place.read_bytes())
    data[data.index(b"SPOOLFTR") + 20] ^= 1
    place.write_bytes(data)


def link_out(place: Path) -> None:
    place.unlink()
    place.symlink_to("/etc/passwd")


def pipe(place: Path) -> None:
    place.unlink()
    os.mkfifo(place)


@pytest.mark.parametrize("which", [3, 5, 7], ids=["first", "middle", "last"])
@pytest.mark.parametrize("damage", [cut, blank, scramble, spoil_footer, link_out, pipe])
def test_a_damaged_item_is_moved_aside_with_its_reason(
    path: Path, damage: Callable[[Path], None], which: int
) -> None:
    damage(path / item(which))
    before = picture(path)
    report = fsck(path)
    assert not report.clean
    assert {where for _, where in found(report)} == {item(which)}
    assert picture(path) == before
    repaired(path)
    assert failed_show(path, which).damage
    assert failed_show(path, which).reason
    assert stat(path).failed == 2
    assert rest(path) == [number for number in range(COUNT) if number + 3 != which]


def test_damaged_items_among_those_given_back_are_moved_aside(path: Path) -> None:
    with SpoolReader(path) as reader:
        items = [reader.receive() for _ in range(4)]
        for one in items:
            one.nack()
    cut(path / item(4))
    cut(path / item(6))
    repaired(path)
    assert rest(path) == [0, 2, 4]


def test_a_damaged_item_in_a_living_readers_hands_is_left_to_it(path: Path) -> None:
    with SpoolReader(path) as reader:
        held = reader.receive()
        cut(path / item(held.seq))
        report = fsck(path, repair=True)
        assert ("item", item(held.seq)) in found(report)
        assert not report.clean
        held.nack()
    repaired(path)


def test_a_missing_item_is_taken_off(path: Path) -> None:
    (path / item(5)).unlink()
    assert found(fsck(path)) == {("missing", item(5))}
    repaired(path)
    assert rest(path) == [0, 1, 3, 4]
    assert stat(path).failed == 1


def test_an_item_unknown_to_the_index_is_adopted(path: Path) -> None:
    data = (path / item(5)).read_bytes()
    (path / item(20)).write_bytes(data)
    os.chmod(path / item(20), 0o600)
    assert found(fsck(path)) == {("unknown", item(20))}
    repaired(path)
    assert rest(path) == [*range(COUNT), 2]


def test_an_unknown_item_that_is_damaged_ends_in_failed(path: Path) -> None:
    (path / item(20)).write_bytes(b"rubbish")
    os.chmod(path / item(20), 0o600)
    repaired(path)
    assert failed_show(path, 20).damage
    assert rest(path) == list(range(COUNT))


def test_very_many_problems_are_counted_and_all_repaired(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_MOST_OF_A_KIND", 2)
    with SpoolWriter(path) as writer:
        for number in range(COUNT, 30):
            writer.put(BIG + number)
    for seq in range(4, 12):
        cut(path / item(seq))
    for seq in range(12, 20):
        (path / item(seq)).unlink()
    assert {problem.what for problem in fsck(path).problems if problem.where == "."} == {
        "6 more of this kind"
    }
    repaired(path)
    assert rest(path) == [0, *range(17, 30)]
    assert stat(path).failed == 9


def test_orphans_are_removed(path: Path) -> None:
    orphans = [path / "free" / item_name(10**6), path / "failed" / f"{10**6:020d}.jsonl"]
    for orphan in orphans:
        orphan.write_bytes(b"{}")
        orphan.chmod(0o600)
    assert found(fsck(path)) == {("orphan", str(orphan.relative_to(path))) for orphan in orphans}
    repaired(path)
    assert not any(orphan.exists() for orphan in orphans)


def test_a_missing_or_changed_file_of_the_pool_is_forgotten(path: Path) -> None:
    (pooled,) = (path / "free").iterdir()
    cut(pooled)
    assert found(fsck(path)) == {("size", f"free/{pooled.name}")}
    repaired(path)
    assert stat(path).free_files == 0


def test_a_missing_file_of_the_pool_is_forgotten(path: Path) -> None:
    with SpoolReader(path) as reader:
        for _ in range(3):
            reader.get()
    pooled = sorted((path / "free").iterdir())[1]
    before = stat(path).free_files
    pooled.unlink()
    assert found(fsck(path)) == {("missing", f"free/{pooled.name}")}
    repaired(path)
    assert stat(path).free_files == before - 1


def test_an_item_of_another_size_is_measured_again(path: Path) -> None:
    with open(path / item(5), "ab") as file:
        file.write(bytes(4096))
    assert found(fsck(path)) == {("size", item(5))}
    repaired(path)
    assert rest(path) == list(range(COUNT))


def test_modes_are_closed(path: Path) -> None:
    names = [
        ".",
        "items",
        "spool.json",
        "index",
        item(3),
        "alive/00000000000000ff",
        "tmp/00000000000000ff-1.npy",
    ]
    for name in names[-2:]:
        (path / name).touch()
    for name in names:
        (path / name).chmod(0o777 if (path / name).is_dir() else 0o644)
    assert {(kind, where) for kind, where in found(fsck(path)) if kind != "mode"} == set()
    report = repaired(path)
    assert {where for _, where in found(report)} == set(names)
    assert (path / item(3)).stat().st_mode & 0o777 == 0o600
    assert path.stat().st_mode & 0o777 == 0o700
    assert rest(path) == list(range(COUNT))


@pytest.mark.parametrize("part", ["tmp", "free", "alive", "bell"])
def test_a_missing_directory_is_made(path: Path, part: str) -> None:
    for place in sorted((path / part).rglob("*"), reverse=True):
        place.rmdir() if place.is_dir() else place.unlink()
    (path / part).rmdir()
    assert found(fsck(path)) == {("directory", part)}
    repaired(path)
    assert rest(path) == list(range(COUNT))


def test_a_lost_bell_is_made(path: Path) -> None:
    (path / "bell" / "items-3" / "ring").unlink()
    assert found(fsck(path)) == {("directory", "bell")}
    repaired(path)


def test_a_replaced_directory_is_named_and_not_entered(path: Path, tmp_path: Path) -> None:
    (path / "tmp").rmdir()
    (path / "tmp").symlink_to(tmp_path)
    report = fsck(path, repair=True)
    assert found(report) == {("planted", "tmp")}
    assert not report.clean
    assert report.items == 0


@pytest.mark.parametrize("plant", ["symlink", "hard link"])
def test_a_planted_index_is_replaced(path: Path, tmp_path: Path, plant: str) -> None:
    target = tmp_path / "target"
    if plant == "symlink":
        target.write_bytes((path / "index").read_bytes())
        (path / "index").unlink()
        (path / "index").symlink_to(target)
    else:
        os.link(path / "index", target)
    before = target.read_bytes()
    assert not fsck(path).clean
    report = repaired(path)
    assert report.problems[0].where == "index"
    assert target.read_bytes() == before
    assert rest(path) == list(range(COUNT))


@pytest.mark.parametrize("plant", ["symlink", "hard link"])
def test_a_planted_lock_is_replaced_when_nobody_can_hold_it(path: Path, tmp_path: Path, plant: str) -> None:
    lock = path / "index.lock"
    with SpoolWriter(path):
        if plant == "symlink":
            lock.rename(tmp_path / "lock")
            lock.symlink_to(tmp_path / "lock")
        else:
            os.link(lock, tmp_path / "lock")
        assert not fsck(path, repair=True).clean
    repaired(path)
    assert rest(path) == list(range(COUNT))


def test_a_hostile_history_is_not_believed(path: Path) -> None:
    history = path / "failed" / f"{2:020d}.jsonl"
    for attempt in ("1e999", "-1", str(10**30), "[]", "NaN"):
        history.write_text(f'{{"attempt": {attempt}, "when": 1, "who": "me", "why": "so"}}\n')
        assert failed_show(path, 2).attempts == 0
        (path / "failed" / f"{3:020d}.jsonl").write_bytes(history.read_bytes())
        (path / "failed" / f"{3:020d}.jsonl").chmod(0o600)
        (path / "index").unlink()
        repaired(path)
    assert rest(path) == list(range(COUNT))


def test_strangers_are_named_and_left_alone(path: Path) -> None:
    names = [
        "README",
        "items/1.npy",
        f"items/{item_name(10**19)}",
        "free/x",
        "failed/y",
        "tmp/z",
        "alive/1",
        "bell/w",
    ]
    for name in names:
        (path / name).touch()
    report = fsck(path, repair=True)
    assert found(report) == {("stranger", name) for name in names}
    assert not report.clean
    assert all((path / name).exists() for name in names)


def test_a_linked_item_is_named_and_left_alone(path: Path, tmp_path: Path) -> None:
    os.link(path / item(4), tmp_path / "mine.npy")
    report = fsck(path, repair=True)
    assert found(report) == {("link", item(4))}
    assert rest(path) == list(range(COUNT))
    assert int(np.load(tmp_path / "mine.npy")[0]) == 1


def test_a_dead_letter_without_a_reason_gets_one(path: Path) -> None:
    history = path / "failed" / f"{2:020d}.jsonl"
    for said in (None, b"torn{"):
        if said is None:
            history.unlink()
        else:
            history.write_bytes(said)
        assert found(fsck(path)) == {("failed", f"failed/{item_name(2)}")}
        repaired(path)
        assert failed_show(path, 2).reason == "unknown: its history was lost"


def test_an_index_that_contradicts_the_directory_is_corrected(path: Path) -> None:
    poke(path, {W.MAXSIZE: 7, W.FAILED_COUNT: 9})
    (path / "shutdown").write_bytes(b"draining")
    (path / "shutdown").chmod(0o600)
    report = fsck(path)
    assert [problem.kind for problem in report.problems] == ["limits"] * 3
    repaired(path)
    assert stat(path).state == "draining"
    assert (stat(path).failed, stat(path).limits.maxsize) == (1, 0)


@pytest.mark.parametrize("damage", ["deleted", "zeros", "truncated", "random"])
def test_a_ruined_index_is_built_again(path: Path, damage: str) -> None:
    index = path / "index"
    size = index.stat().st_size
    if damage == "deleted":
        index.unlink()
    else:
        ruin = {"zeros": bytes(size), "truncated": bytes(100), "random": np.random.default_rng(2).bytes(size)}
        index.write_bytes(ruin[damage])
    assert found(fsck(path)) == {("index", "index")}
    repaired(path)
    assert rest(path) == list(range(COUNT))


def records(words: list[int], state: int) -> list[int]:
    return [r for r in range(W.HEADER, words[W.EDGE], W.RECORD) if words[r + W.STATE] == state]


def damages(words: list[int]) -> dict[str, dict[int, int]]:
    """Stores that each damage the index of the spool above."""
    first, second, third = records(words, W.WAITING)[:3]
    (pooled,) = records(words, W.POOLED)
    return {
        "head of nothing": {W.READY: 0},
        "head astray": {W.READY: 2**63},
        "head into the header": {W.READY: W.MAGIC},
        "no end": {third + W.NEXT: first},
        "short cut": {first + W.NEXT: third},
        "cut off": {second + W.NEXT: 0},
        "wrong tail": {W.READY_TAIL: first},
        "wrong count": {W.READY_COUNT: 3},
        "wrong state": {second + W.STATE: W.NOTHING},
        "impossible state": {second + W.STATE: 77},
        "claimed by nobody": {second + W.STATE: W.CLAIMED},
        "bytes": {W.ITEM_BYTES: 1},
        "bytes in the pool": {W.POOL_BYTES: 1},
        "count of the pool": {W.POOL_COUNT: 0},
        "in flight": {W.IN_FLIGHT: 4},
        "delayed": {W.DELAYED_COUNT: 1},
        "wrong bucket": {W.bucket(words[pooled + W.BYTES]): 0, W.BUCKETS + 1: pooled},
        "lost from the pool": {W.bucket(words[pooled + W.BYTES]): 0},
        "two records of one file": {second + W.FILE: words[third + W.FILE]},
        "another number": {second + W.SEQ: 1000},
        "numbers begin again": {W.NEXT_SEQ: 1},
        "unused record in use": {W.UNUSED: second},
        "returned twice": {W.RETURNED: second, W.RETURNED_TAIL: second, W.RETURNED_COUNT: 1},
        "away": {W.AWAY: third},
    }


def blank_words() -> list[int]:
    """The words of an index with three items waiting and one file in the pool, as far as `damages` looks at them."""
    header = [0] * W.HEADER
    header[W.EDGE] = W.HEADER + 4 * W.RECORD
    states = (W.WAITING, W.WAITING, W.WAITING, W.POOLED)
    return header + [word for state in states for word in [state] + [0] * (W.RECORD - 1)]


NAMES = list(damages(blank_words()))


@pytest.mark.parametrize("name", NAMES)
def test_an_index_that_contradicts_itself_is_built_again(path: Path, name: str) -> None:
    stores = damages(words_of(path))[name]
    poke(path, stores)
    before = picture(path)
    report = fsck(path)
    assert "index" in {problem.kind for problem in report.problems}
    assert picture(path) == before
    repaired(path)
    assert rest(path) == list(range(COUNT))


@pytest.mark.parametrize("name", NAMES)
def test_readers_and_writers_survive_an_index_that_contradicts_itself(path: Path, name: str) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        poke(path, damages(words_of(path))[name])
        for number in (100, 101):
            writer.put(BIG + number)
        repaired(path)
        got = [int(reader.get(timeout=5)[0]) for _ in range(COUNT + 2)]
        assert sorted(got) == [*range(COUNT), 100, 101]


def test_a_change_left_unfinished_is_no_damage(path: Path) -> None:
    """What the next step finishes or undoes by itself."""
    words = words_of(path)
    poke(
        path,
        {W.MARK: W.MEMORY, W.STORES: 1, W.JOURNAL: W.READY_COUNT, W.JOURNAL + 1: words[W.READY_COUNT]},
    )
    poke(path, {W.READY_COUNT: 77})
    assert fsck(path).clean
    poke(path, {W.MARK: W.ARRIVE, W.SUBJECT: 99, W.STORES: 1, W.JOURNAL: W.READY, W.JOURNAL + 1: 0})
    poke(path, {W.READY_COUNT: words[W.READY_COUNT]})
    assert fsck(path).clean
    repaired(path)


def test_an_index_never_used_has_no_problems() -> None:
    words = memoryview(bytearray(W.HEADER * W.WORD)).cast("Q")
    words[W.EDGE], words[W.NEXT_SEQ] = W.HEADER, 1
    assert index_problems(words) == []


def test_what_the_dead_left_is_no_problem_of_fsck(path: Path) -> None:
    die(
        path,
        "reader = SpoolReader(path); one = reader.receive(); writer = SpoolWriter(path); draft = prepare(writer, big)",
    )
    assert fsck(path).clean


def test_during_traffic_it_finds_nothing(path: Path) -> None:
    end = threading.Event()
    errors: list[BaseException] = []

    def work(size: int) -> None:
        try:
            with SpoolWriter(path) as writer, SpoolReader(path) as reader:
                kept = None
                while not end.is_set():
                    writer.put(np.zeros(size))
                    reader.get(timeout=5)
                    with reader.receive(timeout=5) as one:
                        kept = one.array
                    writer.put(np.zeros(2 * size))
                del kept
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(size,)) for size in (1000, 3000, 20_000)]
    for thread in threads:
        thread.start()
    reports = [fsck(path) for _ in range(20)]
    end.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert [report.problems for report in reports] == [()] * 20


def test_a_path_that_is_no_spool_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(NotASpool):
            fsck(place, repair=True)
    for part in PARTS:
        assert not (tmp_path / part).exists()
