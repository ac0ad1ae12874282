"""An item that fails every time is dead-lettered with its history, and blocks nobody."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.account import check_spool
from support.damage import crash, item
from support.mounts import tmpfs
from support.peer import Peer

from spoolipc import Empty, SpoolReader, SpoolWriter, failed_list, failed_show, gc

LARGE = 5000
CRASHED = "its reader crashed"
"""What the history says of a reader that crashed."""
Pair = tuple[SpoolWriter, SpoolReader]


@pytest.fixture
def pair(spool: Path) -> Iterator[Pair]:
    with SpoolWriter(spool, max_attempts=3) as writer, SpoolReader(spool) as reader:
        yield writer, reader


def work(reader: SpoolReader) -> None:
    """What fails on every item that begins with a zero."""
    with reader.receive(block=False) as item:
        assert item.array[0], "a zero"


def test_poison_item_is_dead_lettered_after_max_attempts_and_the_rest_flows(pair: Pair, spool: Path) -> None:
    writer, reader = pair
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
    letter = failed_show(spool, poison)
    assert (letter.seq, letter.attempts, letter.meta) == (poison, 3, {"from": "camera"})
    assert [failure.attempt for failure in letter.history] == [1, 2, 3]
    for failure in letter.history:
        assert failure.who == f"process {os.getpid()}"
        assert "AssertionError: a zero" in failure.why
        assert began <= failure.when <= time.time()
    assert letter.reason.endswith("that was attempt 3 of 3")
    assert (np.load(letter.path) == np.zeros(LARGE)).all()
    assert list((spool / "items").iterdir()) == []


def test_every_way_to_fail_counts_as_an_attempt(pair: Pair, spool: Path) -> None:
    writer, reader = pair
    seq = writer.put(np.zeros(3))
    with Peer(spool) as peer:
        peer.run("item = SpoolReader(path).receive()")
        peer.kill()
    with SpoolReader(spool) as leaving:
        assert leaving.receive(block=False).attempt == 2
    item = reader.receive(block=False)
    assert item.attempt == 3
    item.extend(0.01)
    with pytest.raises(Empty):
        reader.receive(timeout=0.2)
    history = failed_show(spool, seq).history
    assert [failure.why.split(";")[0] for failure in history] == [
        CRASHED, "its reader left", "its lease ended",
    ]  # fmt: skip
    here = f"process {os.getpid()}"
    assert [failure.who for failure in history] == [f"process {peer.pid}", here, here]


def test_limit_of_attempts_is_five_where_nobody_asked_for_another(spool: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put(np.zeros(3))
        for _ in range(5):
            assert failed_list(spool) == []
            reader.receive(block=False).nack()
        assert [letter.attempts for letter in failed_list(spool)] == [5]


def test_dead_letters_outlive_the_index_and_their_numbers_are_not_given_again(
    pair: Pair, spool: Path
) -> None:
    writer, reader = pair
    seq = writer.put(np.zeros(3))
    reader.receive().reject("on purpose")
    (spool / "index").unlink()
    assert writer.put(np.zeros(3)) > seq
    assert failed_show(spool, seq).reason == "on purpose"
    reader.get()


@pytest.mark.parametrize("reason", ["größe\n\x00\u2028", "x" * 100_000], ids=["odd", "long"])
def test_long_or_odd_reason_is_kept_as_text(pair: Pair, spool: Path, reason: str) -> None:
    writer, reader = pair
    seq = writer.put(np.zeros(3))
    reader.receive().reject(reason)
    assert failed_show(spool, seq).reason == reason[:4096]
    (line,) = (spool / "failed" / f"{seq:020d}.jsonl").read_text().splitlines()
    assert json.loads(line)["attempt"] == 1


def test_torn_line_of_a_history_is_passed_over(pair: Pair, spool: Path) -> None:
    writer, reader = pair
    seq = writer.put(np.zeros(3))
    reader.receive().nack(reason="one")
    with open(spool / "failed" / f"{seq:020d}.jsonl", "a") as file:
        file.write('{"attempt": 2, "wh')
    (spool / "index").unlink()
    item = reader.receive(block=False)
    assert item.attempt == 2
    item.reject("two")
    assert failed_show(spool, seq).history[0].why == "one"


@pytest.mark.damaged  # a directory lies where the history should
def test_history_that_cannot_be_written_keeps_nobody_from_the_items(pair: Pair, spool: Path) -> None:
    writer, reader = pair
    seq = writer.put(np.zeros(LARGE))
    (spool / "failed" / f"{seq:020d}.jsonl").mkdir()
    for attempt in (1, 2, 3):
        item = reader.receive(block=False)
        assert item.attempt == attempt
        item.nack()
    with pytest.raises(Empty):
        reader.receive(block=False)
    letter = failed_show(spool, seq)
    assert (letter.damage, letter.history) == ("", ())
    assert (np.load(letter.path) == 0).all()


@pytest.mark.fault
def test_reader_that_crashes_on_a_full_file_system_blocks_nobody(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "4m") as place:
        path = place / "spool"
        with SpoolWriter(path) as writer:
            for number in range(2):
                writer.put(np.full(LARGE, number))
            with SpoolReader(path) as reader, Peer(path) as peer:
                peer.run("item = SpoolReader(path).receive()")
                with open(place / "filler", "wb") as file, contextlib.suppress(OSError):
                    while True:
                        os.write(file.fileno(), bytes(4096))
                peer.kill()
                item = reader.receive(timeout=20)
                if item.seq == 2:  # crashed sessions were looked for within the last second
                    item.ack()
                    item = reader.receive(timeout=20)
                assert (item.seq, item.attempt) == (1, 2)
                item.nack()
                with reader.receive(block=False) as item:
                    assert (item.array == 0).all()


@pytest.mark.fault
@pytest.mark.damaged
def test_a_dead_letter_that_failed_does_not_take_is_left_aside_and_stops_nobody(
    spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where `failed/` is a file system of its own."""
    with SpoolWriter(spool, max_attempts=1) as writer:
        for number in range(4):
            writer.put(np.array([number]))
    (spool / "failed").rmdir()
    with tmpfs(spool / "failed", "1m") as failed:
        failed.chmod(0o700)
        crash(spool, "reader = SpoolReader(path)\nitem = reader.receive()")
        (spool / item(3)).write_bytes(b"damaged")
        with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
            reader.receive().reject("not wanted")
            writer.put(np.array([4]))
            assert [int(array[0]) for array in reader.get_many(9)] == [3, 4]
            gc(spool)
        aside = sorted(path.name for path in spool.glob("*.npy"))
        assert aside == [f"{number:020d}.failed.npy" for number in (1, 2, 3)]
        assert int(np.load(spool / aside[0])[0]) == 0
        assert all(name in caplog.text for name in aside)
        assert [letter.path for letter in failed_list(spool)] == [str(spool / name) for name in aside]
        check_spool(spool)
