"""An item that fails every time is set aside with its history, and blocks nobody."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from audit import audit
from support.peer import Peer

from spoolipc import (
    Empty,
    LimitMismatch,
    ShutDown,
    SpoolReader,
    SpoolWriter,
    failed_list,
    failed_retry,
    failed_show,
    history,
)

LARGE = 5000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def writer(path: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(path, max_attempts=3) as writer:
        yield writer


@pytest.fixture
def reader(writer: SpoolWriter, path: Path) -> Iterator[SpoolReader]:
    with SpoolReader(path) as reader:
        yield reader
        audit(reader._source.party)


def work(reader: SpoolReader) -> None:
    """What fails on every item that begins with a zero."""
    with reader.receive(block=False) as item:
        assert item.array[0], "a zero"


def test_poison_item_is_set_aside_after_max_attempts_and_the_rest_flows(
    writer: SpoolWriter, reader: SpoolReader, path: Path
) -> None:
    began = time.time()
    poison = writer.put(np.zeros(LARGE), meta={"from": "camera"})
    for number in (1, 2):
        writer.put(np.full(LARGE, number))
    for _ in range(3):
        with pytest.raises(AssertionError):
            work(reader)
    work(reader)
    work(reader)
    with pytest.raises(Empty):
        work(reader)
    letter = failed_show(path, poison)
    assert (letter.seq, letter.attempts, letter.meta) == (poison, 3, {"from": "camera"})
    assert [failure.attempt for failure in letter.history] == [1, 2, 3]
    for failure in letter.history:
        assert failure.who == f"process {os.getpid()}"
        assert "AssertionError: a zero" in failure.why
        assert began <= failure.when <= time.time()
    assert letter.reason.endswith("that was attempt 3 of 3")
    assert (np.load(letter.path) == np.zeros(LARGE)).all()
    assert list((path / "items").iterdir()) == []


def test_every_way_to_fail_counts_as_an_attempt(
    writer: SpoolWriter, reader: SpoolReader, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seq = writer.put(np.zeros(3))
    with Peer(path) as peer:
        peer.run("item = SpoolReader(path).receive()")
        peer.kill()
    with SpoolReader(path) as one, one.receive(block=False) as item:
        assert item.attempt == 2
        one.close()
        item._settled = "left with its reader"
    item = reader.receive(block=False)
    assert item.attempt == 3
    item.extend(0.001)
    real = time.monotonic_ns
    monkeypatch.setattr(time, "monotonic_ns", lambda: real() + 10**9)
    with pytest.raises(Empty):
        reader.receive(block=False)
    letter = failed_show(path, seq)
    assert [failure.why.split(";")[0] for failure in letter.history] == [
        "its reader died",
        "its reader left",
        "its lease ended",
    ]
    assert [failure.who for failure in letter.history] == [
        f"process {peer.pid}",
        f"process {os.getpid()}",
        f"process {os.getpid()}",
    ]


def test_delay_of_the_last_attempt_means_nothing(
    writer: SpoolWriter, reader: SpoolReader, path: Path
) -> None:
    seq = writer.put(np.zeros(3))
    for _ in range(2):
        reader.receive(block=False).nack()
    reader.receive(block=False).nack(delay=60, reason="later")
    assert failed_show(path, seq).reason == "later; that was attempt 3 of 3"


def test_no_limit_means_no_dead_letter(path: Path) -> None:
    with SpoolWriter(path, max_attempts=0) as writer, SpoolReader(path) as reader:
        writer.put(np.zeros(3))
        for attempt in range(1, 31):
            item = reader.receive(block=False)
            assert item.attempt == attempt
            item.nack()
        assert failed_list(path) == []


def test_default_is_five_attempts(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        seq = writer.put(np.zeros(3))
        for _ in range(5):
            reader.receive(block=False).nack()
        with pytest.raises(Empty):
            reader.receive(block=False)
        assert failed_show(path, seq).attempts == 5


def test_who_asks_for_another_limit_is_refused(writer: SpoolWriter, path: Path) -> None:
    with pytest.raises(LimitMismatch, match="max_attempts=3"):
        SpoolReader(path, max_attempts=4)


def test_rejected_item_is_set_aside_at_once_with_its_reason(
    writer: SpoolWriter, reader: SpoolReader, path: Path
) -> None:
    seq = writer.put({"a": np.zeros(3), "b": np.ones(LARGE)}, meta=[1])
    reader.receive().nack(reason="first")
    reader.receive().reject("not a frame")
    letter = failed_show(path, seq)
    assert [(failure.attempt, failure.why) for failure in letter.history] == [
        (1, "first"),
        (2, "not a frame"),
    ]
    assert [array.name for array in letter.arrays] == ["a", "b"]
    with pytest.raises(Empty):
        reader.receive(block=False)


def test_retried_item_starts_afresh(writer: SpoolWriter, reader: SpoolReader, path: Path) -> None:
    seq = writer.put(np.full(LARGE, 4.0), meta="m")
    reader.receive().reject("on purpose")
    ((old, new),) = failed_retry(path, [seq]).seqs.items()
    assert old == seq
    with reader.receive(block=False) as item:
        assert (item.seq, item.attempt, item.meta) == (new, 1, "m")
        assert (item.array == 4).all()
    assert list((path / "failed").iterdir()) == []


def test_dead_letters_outlive_the_index_and_their_numbers_are_not_given_again(
    writer: SpoolWriter, reader: SpoolReader, path: Path
) -> None:
    seq = writer.put(np.zeros(3))
    reader.receive().reject("on purpose")
    (path / "index").unlink()
    assert writer.put(np.zeros(3)) > seq
    assert failed_show(path, seq).reason == "on purpose"
    reader.get()


def test_last_item_given_up_ends_a_spool_that_was_shut_down(
    writer: SpoolWriter, reader: SpoolReader, path: Path
) -> None:
    writer.put(np.zeros(3))
    with SpoolReader(path) as other:
        item = other.receive()
        writer.shutdown()
        with pytest.raises(Empty):
            reader.receive(block=False)
        item.reject("on purpose")
        with pytest.raises(ShutDown):
            reader.receive()


def test_long_or_odd_reasons_are_kept_as_text(writer: SpoolWriter, reader: SpoolReader, path: Path) -> None:
    for reason in ("größe\n\x00\u2028", "x" * 100_000):
        seq = writer.put(np.zeros(3))
        reader.receive().reject(reason)
        assert failed_show(path, seq).reason == reason[:4096]
        (line,) = (path / "failed" / f"{seq:020d}.jsonl").read_text().splitlines()
        assert json.loads(line)["attempt"] == 1


def test_torn_line_of_a_history_is_passed_over(writer: SpoolWriter, reader: SpoolReader, path: Path) -> None:
    seq = writer.put(np.zeros(3))
    reader.receive().nack(reason="one")
    with open(path / "failed" / f"{seq:020d}.jsonl", "a") as file:
        file.write('{"attempt": 2, "wh')
    (path / "index").unlink()
    item = reader.receive(block=False)
    assert item.attempt == 2
    assert [failure.why for failure in history.read(reader._source.party.layout, seq)] == ["one"]
    item.reject("two")


def test_history_that_cannot_be_written_keeps_nobody_from_the_items(
    writer: SpoolWriter, reader: SpoolReader, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def full(fd: int, data: bytes) -> int:
        if b'"attempt"' in data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    seq = writer.put(np.zeros(LARGE))
    for attempt in (1, 2, 3):
        item = reader.receive(block=False)
        assert item.attempt == attempt
        item.nack()
    with pytest.raises(Empty):
        reader.receive(block=False)
    letter = failed_show(path, seq)
    assert not letter.damage
    assert (path / "failed" / f"{seq:020d}.npy").exists()


@pytest.mark.fault
def test_reader_that_dies_on_a_full_file_system_blocks_nobody(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], check=True)
    try:
        path = place / "spool"
        with SpoolWriter(path) as writer, SpoolReader(path) as reader:
            for number in range(2):
                writer.put(np.full(LARGE, number))
            with Peer(path) as peer:
                peer.run("item = SpoolReader(path).receive()")
                with open(place / "filler", "wb") as file, contextlib.suppress(OSError):
                    while True:
                        os.write(file.fileno(), bytes(4096))
                peer.kill()
            item = reader.receive(timeout=20)
            if item.seq == 2:  # the dead were looked for within the last second
                item.ack()
                item = reader.receive(timeout=20)
            assert (item.seq, item.attempt) == (1, 2)
            item.nack()
            with reader.receive(block=False) as item:
                assert (item.array == 0).all()
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_damaged_item_got_is_a_dead_letter_too(writer: SpoolWriter, reader: SpoolReader, path: Path) -> None:
    seq = writer.put(np.zeros(LARGE))
    writer.put(np.ones(LARGE))
    file = path / "items" / f"{seq:020d}.npy"
    os.truncate(file, 5000)
    assert reader.get()[0] == 1
    letter = failed_show(path, seq)
    assert letter.damage
    assert "damaged" in letter.reason
