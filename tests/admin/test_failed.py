"""Dead letters can be looked at, retried and dropped, and none is lost or doubled by a crash in between."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.damage import cut, item_name, link_out, picture, pipe
from support.faults import Event, Injector

from spoolipc import (
    NoSuchItem,
    ShutDown,
    SpoolReader,
    SpoolWriter,
    StorageError,
    failed_drop,
    failed_list,
    failed_retry,
    failed_show,
    fsck,
    stat,
)
from spoolipc.directory import fs


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


def test_who_drops_a_dead_letter_lets_nobody_retry_it_meanwhile(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, tried = fs.unlink, list[str]()

    def watched(name: str, *, dir_fd: int) -> None:
        if name.endswith(".npy"):
            tried.append(name)
            other = os.open(path / "items", os.O_RDONLY)
            try:
                with pytest.raises(BlockingIOError):
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(other)
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(fs, "unlink", watched)
    assert failed_drop(path, [2]) == [2]
    assert tried == [item_name(2)]


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


def test_one_that_is_gone_by_then_is_said_without_the_password_of_its_url(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spoolipc.admin.failed_list", lambda path, seqs: [])
    with pytest.raises(NoSuchItem, match="@host/frames: has no dead letter 7") as caught:
        failed_show("nats://me:hidden@host/frames", 7)
    assert "hidden" not in str(caught.value)


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


@pytest.mark.parametrize("work", [failed_list, failed_retry, failed_drop])
def test_a_number_that_is_not_there_is_told_and_nothing_is_done(
    path: Path, work: Callable[[Path, list[int]], object]
) -> None:
    with pytest.raises(NoSuchItem, match="has no dead letter 4"):
        work(path, [1, 4, 7])
    assert seqs(path) == [1, 2, 3]


def test_a_spool_that_was_shut_down_takes_none_back(path: Path) -> None:
    with SpoolWriter(path) as writer:
        writer.shutdown()
    with pytest.raises(ShutDown, match="reopen=True"):
        failed_retry(path)
    assert seqs(path) == [1, 2, 3]
    assert stat(path).depth == 1


@pytest.mark.parametrize("moment", ["before", "after"])
def test_one_that_somebody_drops_as_it_is_read_is_not_retried(path: Path, moment: str) -> None:
    def act(event: Event, _: object = None) -> None:
        if event.name == "open_at" and event.args[0] == item_name(2):
            assert failed_drop(path, [2]) == [2]

    with Injector(act) if moment == "before" else Injector(after=act):
        done = failed_retry(path)
    assert (done.seqs, done.damaged) == ({1: 5, 3: 6}, {})
    assert seqs(path) == []
    assert stat(path).failed == 0


def test_one_that_somebody_else_drops_meanwhile_is_dropped_once(path: Path) -> None:
    listed: list[list[int]] = []

    def act(event: Event, _: object) -> None:
        if event.name == "list_names" and not listed:
            listed.append([])
            listed.append(failed_drop(path, [2]))

    with Injector(after=act):
        assert failed_drop(path) == [1, 3]
    assert listed == [[], [2]]
    assert stat(path).failed == 0


def test_a_directory_planted_at_its_name_is_refused_and_stays(path: Path) -> None:
    planted = path / "failed" / item_name(2)
    planted.unlink()
    planted.mkdir()
    with pytest.raises(StorageError, match="is a directory, which spoolipc did not make"):
        failed_drop(path, [2])
    assert seqs(path) == [1, 2, 3]
    planted.rmdir()
    assert fsck(path, repair=True).problems


def test_a_history_is_not_taken_for_lost_where_a_process_is_out_of_descriptors(path: Path) -> None:
    def out(event: Event) -> None:
        if event.name == "open_at" and str(event.args[0]).endswith(".jsonl"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with Injector(out), pytest.raises(StorageError, match="Too many open files"):
        failed_list(path)
