"""fsck finds every damage made to a spool, names it, and repairs it without losing an item silently."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.account import check_spool
from support.arrays import drained
from support.damage import crash, cut, item, item_name, link_out, picture, pipe
from support.faults import Injector, at, forked, kill
from support.peek import peek_table, poke
from support.peer import Peer

from spoolipc import (
    FsckReport,
    SpoolError,
    SpoolReader,
    SpoolWriter,
    failed_list,
    failed_show,
    fsck,
    set_limits,
    stat,
)
from spoolipc.directory import check

BIG = np.zeros(10_000, int)
COUNT = 5
ALL = list(range(COUNT))


@pytest.fixture
def path(spool: Path) -> Path:
    """A spool with items 3 to 7 waiting, one consumed file in the pool and item 2 a dead letter."""
    with Peer(spool) as peer:
        peer.run("last = SpoolReader(path)")  # who empties the pool when it leaves; but it is killed
        with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
            for number in range(-2, COUNT):
                writer.put(BIG + number)
            reader.get()
            reader.receive().reject("unwanted")
        peer.kill()
    assert fsck(spool).problems == ()
    return spool


def found(report: FsckReport) -> set[tuple[str, str]]:
    return {(problem.kind, problem.where) for problem in report.problems}


def repaired(path: Path) -> FsckReport:
    """Repair, which must leave nothing, and hold the table against the directories."""
    report = fsck(path, repair=True)
    assert report.clean, report.problems
    check_spool(path)
    return report


def rest(path: Path) -> list[int]:
    """The numbers of what can still be got."""
    with SpoolReader(path) as reader:
        return drained(reader)


def make(place: Path, data: bytes = b"", mode: int = 0o600) -> None:
    place.write_bytes(data)
    place.chmod(mode)


def test_a_sound_spool_is_clean_and_stays_as_it_is(path: Path) -> None:
    before = picture(path)
    report = fsck(path)
    assert report.clean
    assert (report.items, report.problems) == (COUNT, ())
    assert report.bytes == stat(path).bytes
    assert picture(path) == before
    assert rest(path) == ALL


def test_what_a_crashed_session_left_is_no_problem(path: Path) -> None:
    crash(
        path,
        "reader = SpoolReader(path); one = reader.receive(); writer = SpoolWriter(path)\n"
        "lent = writer.loan(100_000, float); lent.__enter__()",
    )
    assert fsck(path).problems == ()


def spoil_footer(place: Path) -> None:
    data = bytearray(place.read_bytes())
    data[data.index(b"SPOOLFTR") + 20] ^= 1
    place.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "empty": lambda place: place.write_bytes(b""),
    "scrambled": lambda place: place.write_bytes(np.random.default_rng(1).bytes(50_000)),
    "footer": spoil_footer,
    "link": link_out,
    "fifo": pipe,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", [(3,), (5,), (7,), (3, 4, 6)], ids=str)
def test_damaged_items_are_set_aside_with_their_reasons(
    path: Path, damage: str, which: tuple[int, ...]
) -> None:
    if len(which) > 1:  # some of them are to be redelivered
        with SpoolReader(path) as reader:
            for one in [reader.receive() for _ in range(3)]:
                one.nack()
    for seq in which:
        DAMAGES[damage](path / item(seq))
    before = picture(path)
    report = fsck(path)
    assert not report.clean
    assert {where for _, where in found(report)} == {item(seq) for seq in which}
    assert picture(path) == before
    repaired(path)
    for seq in which:
        assert failed_show(path, seq).damage
        assert failed_show(path, seq).reason
    assert stat(path).failed == 1 + len(which)
    assert rest(path) == [number for number in range(COUNT) if number + 3 not in which]


def test_a_damaged_item_in_flight_at_a_live_session_becomes_a_dead_letter_once(path: Path) -> None:
    with SpoolReader(path) as reader:
        held = reader.receive()
        cut(path / item(held.seq))
        assert ("item", item(held.seq)) in found(fsck(path, repair=True))
        held.nack()  # it stayed in flight
    repaired(path)
    assert failed_show(path, 3).damage
    assert rest(path) == list(range(1, COUNT))


POOLED, ORPHAN, HISTORY = f"free/{item_name(1)}", f"free/{item_name(10**6)}", f"failed/{10**6:020d}.jsonl"
DISAGREEMENTS: dict[str, tuple[Callable[[Path], object], set[tuple[str, str]], list[int]]] = {
    "missing": (lambda path: (path / item(5)).unlink(), {("missing", item(5))}, [0, 1, 3, 4]),
    "longer": (lambda path: os.truncate(path / item(5), 10**6), {("size", item(5))}, ALL),
    "unknown": (
        lambda path: make(path / item(20), (path / item(5)).read_bytes()), {("unknown", item(20))}, [*ALL, 2],
    ),
    "unknown and damaged": (
        lambda path: make(path / item(21), b"rubbish"), {("unknown", item(21)), ("item", item(21))}, ALL,
    ),
    "pooled and missing": (lambda path: (path / POOLED).unlink(), {("missing", POOLED)}, ALL),
    "pooled and cut": (lambda path: cut(path / POOLED), {("size", POOLED)}, ALL),
    "orphan": (lambda path: make(path / ORPHAN), {("orphan", ORPHAN)}, ALL),
    "orphaned history": (lambda path: make(path / HISTORY), {("orphan", HISTORY)}, ALL),
}  # fmt: skip


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_a_table_that_knows_other_files_than_the_directories_have_is_built_again(
    path: Path, name: str
) -> None:
    damage, problems, left = DISAGREEMENTS[name]
    damage(path)
    before = picture(path)
    assert found(fsck(path)) == problems
    assert picture(path) == before
    repaired(path)
    assert stat(path).failed == 1 + ("item" in dict(problems))
    assert rest(path) == left


def test_modes_are_closed(path: Path) -> None:
    names = ["alive/00000000000000ff", "tmp/00000000000000ff-1.npy"]
    for name in names:
        make(path / name)
    names += [".", "items", "spool.json", "index", item(3)]
    for name in names:
        (path / name).chmod(0o777 if (path / name).is_dir() else 0o644)
    report = repaired(path)
    assert found(report) == {("mode", name) for name in names}
    assert (path / item(3)).stat().st_mode & 0o777 == 0o600
    assert path.stat().st_mode & 0o777 == 0o700
    assert rest(path) == ALL


@pytest.mark.parametrize("part", ["tmp", "free", "alive", "failed"])
def test_a_missing_directory_is_made(path: Path, part: str) -> None:
    for place in (path / part).iterdir():
        place.unlink()
    (path / part).rmdir()
    assert found(fsck(path)) == {("directory", part)}
    repaired(path)
    assert rest(path) == ALL


@pytest.mark.damaged
def test_a_replaced_directory_is_named_and_not_entered(path: Path, tmp_path: Path) -> None:
    (path / "tmp").rmdir()
    (path / "tmp").symlink_to(tmp_path)
    report = fsck(path, repair=True)
    assert found(report) == {("planted", "tmp")}
    assert not report.clean
    assert report.items == 0


@pytest.mark.parametrize("name", ["index", "index.new", "spool.json.new"])
@pytest.mark.parametrize("kind", ["planted", "link"])
def test_what_is_planted_where_a_file_is_made_anew_is_removed(
    path: Path, tmp_path: Path, name: str, kind: str
) -> None:
    target = tmp_path / "target"
    if name != "index":
        make(path / name)
    if kind == "planted":
        (path / name).rename(target)
        (path / name).symlink_to(target)
    else:
        os.link(path / name, target)
    before = target.read_bytes()
    assert (kind, name) in found(fsck(path))
    repaired(path)
    assert target.read_bytes() == before
    assert rest(path) == ALL


@pytest.mark.damaged
def test_foreign_files_and_linked_items_are_named_and_left_alone(path: Path, tmp_path: Path) -> None:
    names = ["README", "items/1.npy", item(10**19), "free/x", "failed/y", "tmp/z", "alive/1"]
    for name in names:
        (path / name).touch()
    os.link(path / item(4), tmp_path / "mine.npy")
    report = fsck(path, repair=True)
    assert found(report) == {("foreign", name) for name in names} | {("link", item(4))}
    assert not report.clean
    assert all((path / name).exists() for name in names)
    assert rest(path) == ALL
    assert int(np.load(tmp_path / "mine.npy")[0]) == 1


def test_very_many_problems_of_a_kind_are_counted_and_all_repaired(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 200
    monkeypatch.setattr(check, "_MOST_OF_A_KIND", most)
    for number in range(100, 100 + most + 50):
        os.close(os.open(path / item(number), os.O_CREAT, 0o600))
    (path / item(4)).unlink()
    report = fsck(path)
    assert {(p.kind, p.what) for p in report.problems if p.where == "."} == {
        (kind, "50 more of this kind") for kind in ("unknown", "item")
    }
    assert len(report.problems) == 2 * (most + 1) + 1
    assert fsck(path, repair=True).clean
    assert rest(path) == [0, 2, 3, 4]
    assert stat(path).failed == 1 + most + 50


@pytest.mark.parametrize("said", [None, b"torn{"])
def test_a_dead_letter_without_a_reason_is_no_problem(path: Path, said: bytes | None) -> None:
    """A full file system may have had no room for it."""
    history = path / "failed" / f"{2:020d}.jsonl"
    if said is None:
        history.unlink()
    else:
        history.write_bytes(said)
    assert fsck(path).problems == ()
    assert failed_show(path, 2).reason == "unknown: its history is lost"


@pytest.mark.parametrize("attempt", ["1e999", "-1", str(10**30), "[]", "NaN"])
def test_a_hostile_history_is_not_believed(path: Path, attempt: str) -> None:
    for seq in (2, 3):
        line = f'{{"attempt": {attempt}, "when": 1, "who": "me", "why": "so"}}\n'
        make(path / "failed" / f"{seq:020d}.jsonl", line.encode())
    assert failed_show(path, 2).attempts == 0
    (path / "index").unlink()
    repaired(path)
    assert peek_table(path).row(3).attempt == 0
    with SpoolReader(path) as reader:
        reader.receive().nack()
    assert peek_table(path).row(3).attempt == 1


def test_a_table_that_contradicts_the_directory_is_corrected(path: Path) -> None:
    poke(path, "maxsize", 7)
    make(path / "shutdown", b"draining")
    assert [problem.kind for problem in fsck(path).problems] == ["limits"] * 2
    repaired(path)
    assert stat(path).state == "draining"
    assert stat(path).limits.maxsize == 0


STORES: dict[str, list[tuple[str, int | str]]] = {
    "head of nothing": [("queue_head", 0)],
    "head astray": [("queue_head", 2**63)],
    "head into the header": [("queue_head", 7)],
    "no end": [("third.next", "first")],
    "short cut": [("first.next", "third")],
    "cut off": [("second.next", 0)],
    "wrong tail": [("queue_tail", "first")],
    "wrong count": [("queue_count", 3)],
    "wrong state": [("second.state", "nothing")],
    "impossible state": [("second.state", 77)],
    "in flight at nobody": [("second.state", "in_flight")],
    "bytes": [("item_bytes", 1)],
    "bytes in the pool": [("pooled_bytes", 1)],
    "count of the pool": [("pooled", 0)],
    "in flight": [("in_flight", 4)],
    "delayed": [("delayed", 1)],
    "wrong bucket": [("pooled.bucket", 0), ("first_bucket", "pooled")],
    "lost from the pool": [("pooled.bucket", 0)],
    "two records of one file": [("second.seq", 5)],
    "another number": [("second.seq", 1000)],
    "numbers begin again": [("next_seq", 1)],
    "unused record in use": [("unused_head", "second")],
    "queued twice": [
        ("redelivered_head", "second"),
        ("redelivered_tail", "second"),
        ("redelivered_count", 1),
    ],
    "owned by nobody": [("owned_head", "third")],
    "owned without end": [("owned_head", "third"), ("third.next", "third"), ("housekeeping_time", 0)],
}
"""Stores that each damage the table of the spool above. first, second, third: the records of items 3 to 5, and in
place of a value where they stand. pooled: that of the file in the pool."""


def spoil(path: Path, name: str) -> None:
    table = peek_table(path)
    rows = dict(zip(("first", "second", "third"), map(table.row, table.queue), strict=False))
    rows |= dict(zip(("pooled",), table.of("pooled"), strict=True))
    for where, value in STORES[name]:
        row, _, field = where.rpartition(".")
        at = rows[value].at if isinstance(value, str) and value in rows else value
        poke(path, field, at, rows[row] if row else None)


@pytest.mark.parametrize("name", STORES)
def test_a_table_that_contradicts_itself_is_built_again(path: Path, name: str) -> None:
    spoil(path, name)
    before = picture(path)
    assert "index" in {problem.kind for problem in fsck(path).problems}
    assert picture(path) == before
    repaired(path)
    assert rest(path) == ALL


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("name", STORES)
def test_sessions_survive_a_table_that_contradicts_itself(path: Path, name: str) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        spoil(path, name)
        for number in (100, 101):
            writer.put(BIG + number)
        repaired(path)
        got = [int(reader.get(timeout=5)[0]) for _ in range(COUNT + 2)]
        assert sorted(got) == [*range(COUNT), 100, 101]


def test_a_rebuild_keeps_attempts_and_neither_delays_nor_the_order_of_redelivery(path: Path) -> None:
    with SpoolReader(path) as reader:
        items = [reader.receive() for _ in range(3)]
        items[2].nack()
        items[1].nack(delay=1000)
        items[0].nack()
        poke(path, "item_bytes", 1)
        repaired(path)
        again = [reader.receive() for _ in range(COUNT)]
        assert [(one.seq, one.attempt) for one in again] == [(3, 2), (4, 2), (5, 2), (6, 1), (7, 1)]


@pytest.mark.parametrize("name", ["item_bytes", "queue_count", "in_flight", "queue_head"])
def test_a_rebuild_keeps_what_is_in_flight_at_a_live_session(path: Path, name: str) -> None:
    with SpoolReader(path, lease=60) as reader, SpoolReader(path) as other:
        mine = reader.receive()
        view = mine.array
        crash(path, "reader = SpoolReader(path); item = reader.receive()")
        poke(path, name, 2**40)
        repaired(path)
        mine.ack()
        assert [int(array[0]) for array in other.get_many(COUNT, timeout=5)] == list(range(1, COUNT))
        assert (view == BIG).all()


def test_a_rebuild_redelivers_what_is_in_flight_where_its_record_does_not_check(path: Path) -> None:
    with SpoolReader(path) as reader:
        mine = reader.receive()
        poke(path, "seq", 1000, peek_table(path).row(mine.seq))
        repaired(path)
        with pytest.raises(SpoolError):
            mine.ack()
    assert rest(path) == ALL


def test_a_damaged_item_in_a_recycled_file_is_set_aside_while_its_writer_lives(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        for _ in range(3):
            writer.put(np.arange(9000))
            reader.get()
        for _ in range(2):
            seq = writer.put(np.arange(9000))
        with open(spool / item(seq), "r+b") as file:
            file.write(bytes(200))
        assert fsck(spool, repair=True).clean
        assert [letter.seq for letter in failed_list(spool)] == [seq]
        writer.put(np.arange(9000))
        assert len(reader.get_many(5)) == 2


def test_who_comes_after_a_repair_that_was_killed_builds_the_table_again(path: Path) -> None:
    cut(path / item(5))

    def repair() -> None:
        with Injector(after=lambda event, _: kill() if event.name == "rename" else None):  # it is set aside
            fsck(path, repair=True)

    assert forked(repair) == -signal.SIGKILL
    with SpoolReader(path) as reader:
        assert reader.qsize() == COUNT - 1
    assert (stat(path).failed, fsck(path).problems) == (2, ())


@pytest.mark.parametrize("what", ["shutdown", "limits"])
def test_change_that_was_killed_at_any_moment_is_no_damage(spool: Path, what: str) -> None:
    number, unfinished = 1, 0

    def change() -> None:
        with SpoolWriter(spool, reopen=True) as writer, Injector(at(number, kill), stores=True):
            writer.shutdown() if what == "shutdown" else set_limits(spool, maxsize=number)

    while forked(change):
        unfinished += not peek_table(spool).clean
        assert fsck(spool).problems == (), number
        number += 1
    assert unfinished


@pytest.mark.damaged
def test_index_of_another_boot_is_told_and_built_again(spool: Path) -> None:
    SpoolWriter(spool).close()
    poke(spool, "boot", 1)
    (problem,) = fsck(spool).problems
    assert (problem.kind, problem.what) == ("index", "the index is of an earlier boot")
    assert fsck(spool, repair=True).clean
