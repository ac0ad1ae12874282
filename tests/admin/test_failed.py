"""Dead letters can be looked at, retried and dropped, and none is lost or doubled by a crash in between."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.account import check_spool
from support.damage import cut, item_name, killed_at, link_out, picture, pipe
from support.faults import Injector

from spoolipc import (
    Empty,
    NoSuchItem,
    ShutDown,
    SpoolReader,
    SpoolWriter,
    failed_drop,
    failed_list,
    failed_retry,
    failed_show,
    gc,
    stat,
)


@pytest.fixture
def path(spool: Path) -> Path:
    """A spool with items 1 to 3 rejected and item 4 waiting."""
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        for number in range(1, 4):
            writer.put(np.full(5000, number), meta={"number": number})
            reader.receive(timeout=5).reject(f"reason {number}")
        writer.put(np.full(5000, 4), meta={"number": 4})
    return spool


def seqs(path: Path) -> list[int]:
    return [letter.seq for letter in failed_list(path)]


def test_a_list_tells_why_each_is_there_and_changes_nothing(path: Path) -> None:
    before = picture(path)
    letters = failed_list(path)
    assert [(letter.seq, letter.reason, letter.attempts) for letter in letters] == [
        (number, f"reason {number}", 1) for number in (1, 2, 3)
    ]
    assert all(letter.history[0].who == f"process {os.getpid()}" for letter in letters)
    assert picture(path) == before


def test_one_is_shown_with_its_arrays_and_metadata(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.put({"image": np.zeros((3, 4), "f4"), "mask": np.ones(2, bool)}, meta=[1, None])
        reader.get(timeout=5)
        reader.receive(timeout=5).reject("no")
    letter = failed_show(path, 5)
    assert [(array.name, array.dtype, array.shape, array.nbytes) for array in letter.arrays] == [
        ("image", "float32", (3, 4), 48),
        ("mask", "bool", (2,), 2),
    ]
    assert letter.meta == [1, None]
    assert letter.put_time is not None
    assert np.load(letter.path).shape == (3, 4)
    assert not letter.damage


def test_every_attempt_is_in_the_history(spool: Path) -> None:
    with SpoolWriter(spool, max_attempts=3) as writer, SpoolReader(spool) as reader:
        writer.put(np.zeros(3))
        for number in range(3):
            reader.receive(timeout=5).nack(reason=f"try {number + 1}")
    letter = failed_show(spool, 1)
    assert letter.attempts == 3
    assert [failure.attempt for failure in letter.history] == [1, 2, 3]
    assert letter.history[0].why == "try 1"


def test_a_retried_one_comes_last_as_a_new_put(path: Path) -> None:
    done = failed_retry(path, [2])
    assert (done.seqs, done.damaged) == ({2: 5}, {})
    assert stat(path).failed == 2
    with SpoolReader(path) as reader:
        items = [reader.receive(timeout=5) for _ in range(2)]
        assert [(one.seq, one.attempt, one.meta) for one in items] == [
            (4, 1, {"number": 4}),
            (5, 1, {"number": 2}),
        ]
        assert (items[1].array == 2).all()
        items[0].ack()
        items[1].reject("again")
    assert (failed_show(path, 5).reason, failed_show(path, 5).attempts) == ("again", 1)
    assert sorted(os.listdir(path / "failed")) == [
        f"{number:020d}.{end}" for number in (1, 3, 5) for end in ("jsonl", "npy")
    ]


def test_all_are_retried_in_order_and_reach_a_reader_that_had_found_the_spool_empty(path: Path) -> None:
    with SpoolReader(path) as reader:
        reader.get(timeout=5)
        with pytest.raises(Empty):
            reader.get_nowait()
        assert failed_retry(path).seqs == {1: 5, 2: 6, 3: 7}
        assert [int(reader.get(timeout=5)[0]) for _ in range(3)] == [1, 2, 3]
    assert failed_retry(path).seqs == {}


def test_retried_ones_are_synced(path: Path) -> None:
    with Injector() as injector:
        failed_retry(path)
    assert "sync" in injector.met[len(injector.met) - injector.met[::-1].index("rename") :]


@pytest.mark.parametrize("damage", [cut, link_out, pipe, lambda place: place.write_bytes(b"")])
def test_one_that_cannot_be_read_stays_with_the_reason_until_it_is_dropped(
    path: Path, damage: Callable[[Path], None]
) -> None:
    damage(path / "failed" / item_name(2))
    letter = failed_show(path, 2)
    assert letter.damage
    assert letter.arrays == ()
    done = failed_retry(path)
    assert (done.seqs, list(done.damaged)) == ({1: 5, 3: 6}, [2])
    assert seqs(path) == [2]
    assert failed_drop(path) == [2]
    assert Path("/etc/passwd").exists()


def test_dropped_ones_are_gone_for_good(path: Path) -> None:
    assert failed_drop(path, [3, 1]) == [1, 3]
    assert (seqs(path), stat(path).failed) == ([2], 1)
    assert failed_drop(path) == [2]
    assert os.listdir(path / "failed") == []


def test_a_number_that_is_no_dead_letter_is_refused_before_anything_is_done(path: Path) -> None:
    for call in (failed_retry, failed_drop):
        with pytest.raises(NoSuchItem, match="no dead letter 4"):
            call(path, [1, 4])
    with pytest.raises(LookupError):
        failed_show(path, 4)
    assert seqs(path) == [1, 2, 3]


def test_a_spool_that_takes_no_puts_takes_no_retries(path: Path) -> None:
    with SpoolWriter(path) as writer:
        writer.shutdown()
    with pytest.raises(ShutDown):
        failed_retry(path)
    assert failed_drop(path) == [1, 2, 3]


@pytest.mark.damaged
def test_a_lost_history_is_said_to_be_lost(path: Path) -> None:
    (path / "failed" / f"{1:020d}.jsonl").write_bytes(b"\xff{torn")
    letter = failed_show(path, 1)
    assert letter.reason.startswith("unknown")
    assert letter.history == ()


@pytest.mark.parametrize("call", [failed_retry, failed_drop])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_rename_or_removal_loses_and_doubles_nothing(
    path: Path, tmp_path: Path, call: Callable[[Path], Any], after: bool
) -> None:
    for place in itertools.count(1):
        copy = tmp_path / f"copy-{place}"
        shutil.copytree(path, copy)
        killed = killed_at(place, call, after, copy)
        with SpoolReader(copy) as reader:
            numbers = [letter.meta["number"] for letter in failed_list(copy)]
            assert stat(copy).failed == len(numbers)
            numbers += [int(reader.get_nowait()[0]) for _ in range(reader.qsize())]
            with pytest.raises(Empty):
                reader.get_nowait()
        if call is failed_retry:
            assert sorted(numbers) == [1, 2, 3, 4]
        else:
            assert 4 in numbers
            assert len(numbers) == len(set(numbers))
        gc(copy)
        check_spool(copy)
        if not killed:
            break
    assert place > 6
