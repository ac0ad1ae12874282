"""Dead letters can be looked at, put back and dropped, and none is lost or doubled by a crash in between."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dying import check, picture

from spoolipc import (
    Empty,
    NoSuchItem,
    NotASpool,
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
def path(tmp_path: Path) -> Path:
    """A spool with items 1 to 3 rejected and item 4 waiting."""
    place = tmp_path / "spool"
    with SpoolWriter(place) as writer, SpoolReader(place) as reader:
        for number in range(1, 4):
            writer.put(np.full(5000, number), meta={"number": number})
            reader.receive(timeout=5).reject(f"reason {number}")
        writer.put(np.full(5000, 4), meta={"number": 4})
    return place


def test_a_list_tells_why_each_is_there(path: Path) -> None:
    before = picture(path)
    letters = failed_list(path)
    assert [letter.seq for letter in letters] == [1, 2, 3]
    assert [letter.reason for letter in letters] == ["reason 1", "reason 2", "reason 3"]
    assert [letter.attempts for letter in letters] == [1, 1, 1]
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


def test_every_attempt_is_in_the_history(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    with SpoolWriter(path, max_attempts=3) as writer, SpoolReader(path) as reader:
        writer.put(np.zeros(3))
        for number in range(3):
            reader.receive(timeout=5).nack(reason=f"try {number + 1}")
    letter = failed_show(path, 1)
    assert letter.attempts == 3
    assert [failure.attempt for failure in letter.history] == [1, 2, 3]
    assert letter.history[0].why == "try 1"


def test_a_retried_one_comes_last_as_a_new_put(path: Path) -> None:
    done = failed_retry(path, [2])
    assert done.seqs == {2: 5}
    assert not done.damaged
    assert stat(path).failed == 2
    with SpoolReader(path) as reader:
        items = [reader.receive(timeout=5) for _ in range(2)]
        assert [item.seq for item in items] == [4, 5]
        assert [item.attempt for item in items] == [1, 1]
        assert [item.meta for item in items] == [{"number": 4}, {"number": 2}]
        assert (items[1].array == 2).all()
        for item in items:
            item.ack()
    assert [letter.seq for letter in failed_list(path)] == [1, 3]
    assert sorted(os.listdir(path / "failed")) == [
        f"{number:020d}.{end}" for number in (1, 3) for end in ("jsonl", "npy")
    ]
    check(path)


def test_all_are_retried_in_order_when_none_is_named(path: Path) -> None:
    assert failed_retry(path).seqs == {1: 5, 2: 6, 3: 7}
    with SpoolReader(path) as reader:
        assert [int(reader.get(timeout=5)[0]) for _ in range(4)] == [4, 1, 2, 3]
    assert failed_retry(path).seqs == {}
    check(path)


def test_a_retried_one_reaches_a_reader_that_had_found_the_spool_empty(path: Path) -> None:
    with SpoolReader(path) as reader:
        reader.get(timeout=5)
        with pytest.raises(Empty):
            reader.get_nowait()
        failed_retry(path, [1])
        assert int(reader.get(timeout=5)[0]) == 1


def test_a_retry_that_fails_again_is_a_dead_letter_under_its_new_number(path: Path) -> None:
    failed_retry(path, [1])
    with SpoolReader(path) as reader:
        reader.get(timeout=5)
        reader.receive(timeout=5).reject("again")
    assert failed_show(path, 5).reason == "again"
    assert failed_show(path, 5).attempts == 1
    check(path)


def test_one_that_cannot_be_read_stays_with_the_reason(path: Path) -> None:
    place = path / "failed" / f"{2:020d}.npy"
    place.write_bytes(place.read_bytes()[:500])
    letter = failed_show(path, 2)
    assert letter.damage
    assert letter.arrays == ()
    done = failed_retry(path)
    assert done.seqs == {1: 5, 3: 6}
    assert list(done.damaged) == [2]
    assert [letter.seq for letter in failed_list(path)] == [2]


@pytest.mark.parametrize("kind", ["symlink", "fifo", "empty"])
def test_what_is_planted_is_not_followed(path: Path, kind: str) -> None:
    place = path / "failed" / f"{2:020d}.npy"
    place.unlink()
    if kind == "symlink":
        place.symlink_to(path / "spool.json")
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.touch()
    assert failed_show(path, 2).damage
    assert list(failed_retry(path, [2]).damaged) == [2]
    assert failed_drop(path, [2]) == [2]
    assert (path / "spool.json").exists()
    check(path)


def test_dropped_ones_are_gone_for_good(path: Path) -> None:
    assert failed_drop(path, [3, 1]) == [1, 3]
    assert [letter.seq for letter in failed_list(path)] == [2]
    assert stat(path).failed == 1
    assert failed_drop(path) == [2]
    assert os.listdir(path / "failed") == []
    assert stat(path).failed == 0
    check(path)


def test_a_number_that_is_no_dead_letter_is_refused_before_anything_is_done(path: Path) -> None:
    for call in (failed_retry, failed_drop):
        with pytest.raises(NoSuchItem, match="no dead letter 4"):
            call(path, [1, 4])
    with pytest.raises(LookupError):
        failed_show(path, 4)
    assert len(failed_list(path)) == 3


def test_a_spool_that_takes_no_puts_takes_no_retries(path: Path) -> None:
    with SpoolWriter(path) as writer:
        writer.shutdown()
    with pytest.raises(ShutDown):
        failed_retry(path)
    assert len(failed_list(path)) == 3
    assert failed_drop(path) == [1, 2, 3]


def test_a_lost_history_is_said_to_be_lost(path: Path) -> None:
    (path / "failed" / f"{1:020d}.jsonl").write_bytes(b"\xff{torn")
    letter = failed_show(path, 1)
    assert letter.reason.startswith("unknown")
    assert letter.history == ()


def test_a_path_that_is_no_spool_is_refused(tmp_path: Path) -> None:
    calls: list[Callable[[Path], Any]] = [failed_list, failed_retry, failed_drop]
    for call in calls:
        with pytest.raises(NotASpool):
            call(tmp_path)


@pytest.mark.parametrize("call", [failed_retry, failed_drop])
@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_rename_or_removal_loses_and_doubles_nothing(
    path: Path, tmp_path: Path, call: Callable[[Path], Any], after: bool
) -> None:
    for place in itertools.count(1):
        copy = tmp_path / f"copy-{place}"
        shutil.copytree(path, copy)
        killed = killed_at(place, after, call, copy)
        with SpoolReader(copy) as reader:
            numbers = [letter.meta["number"] for letter in failed_list(copy)]
            assert stat(copy).failed == len(numbers)
            while True:
                try:
                    numbers.append(int(reader.get_nowait()[0]))
                except Empty:
                    break
        if call is failed_retry:
            assert sorted(numbers) == [1, 2, 3, 4]
        else:
            assert set(numbers) >= {4}
            assert len(numbers) == len(set(numbers))
        gc(copy)
        check(copy)
        if not killed:
            break
    assert place > 6


def killed_at(place: int, after: bool, call: Callable[[Path], Any], path: Path) -> bool:
    """Make `call` in a process that kills itself at its nth unlinking or renaming; whether it came to that."""
    child = os.fork()
    if not child:
        try:
            left = itertools.count(place - 1, -1)

            def deadly(real: Callable[..., None]) -> Callable[..., None]:
                def called(*args: object, **kwargs: object) -> None:
                    last = not next(left)
                    if last and not after:
                        os.kill(os.getpid(), signal.SIGKILL)
                    real(*args, **kwargs)
                    if last:
                        os.kill(os.getpid(), signal.SIGKILL)

                return called

            os.unlink, os.rename = deadly(os.unlink), deadly(os.rename)
            call(path)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
