"""stat says what is in a spool, changes nothing, and works where nothing else does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from dying import die, picture, poke

from spoolipc import NotASpool, SpoolReader, SpoolStat, SpoolWriter, mounts, stat
from spoolipc import words as W
from spoolipc.status import oldest_age

BIG = np.arange(100_000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "spool"
    SpoolWriter(place, maxsize=10, max_bytes=10**9).close()
    return place


def test_an_empty_spool(path: Path) -> None:
    found = stat(path)
    assert found.path == str(path)
    assert found.state == "open"
    assert (found.depth, found.delayed, found.in_flight, found.bytes, found.failed) == (0, 0, 0, 0, 0)
    assert (found.free_files, found.free_bytes, found.held_files, found.held_bytes) == (0, 0, 0, 0)
    assert (found.puts, found.gets, found.live_parties, found.oldest_age) == (0, 0, 0, None)
    assert (found.limits.maxsize, found.limits.max_bytes) == (10, 10**9)
    assert (found.index_damage, found.stuck_on) == ("", "")


def test_every_state_of_an_item_is_counted(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in range(6):
            writer.put(BIG)
        view = reader.get()
        reader.get()
        item, delayed, unwanted = (reader.receive() for _ in range(3))
        delayed.nack(delay=1000)
        unwanted.reject("unwanted")
        reader.qsize()
        found = stat(path)
        size = 6 * os.path.getsize(path / "items" / f"{6:020d}.npy") // 6
        assert (found.depth, found.delayed, found.in_flight, found.failed) == (1, 1, 1, 1)
        assert found.bytes == 3 * size
        assert found.free_files + (found.held_files or 0) == 2
        assert found.held_bytes is not None
        assert found.free_bytes + found.held_bytes == 2 * size
        assert (found.puts, found.gets, found.live_parties) == (6, 2, 2)
        assert found.oldest_age is not None
        assert 0 <= found.oldest_age < 60
        assert view.size == BIG.size
        item.ack()


def test_it_changes_nothing_and_does_not_count_itself(path: Path) -> None:
    with SpoolWriter(path) as writer:
        writer.put(BIG)
        before, parties = picture(path), os.listdir(path / "alive")
        assert stat(path).live_parties == 1
        assert stat(path).live_parties == 1
        assert picture(path) == before
        assert os.listdir(path / "alive") == parties


def test_the_dead_are_not_counted_among_the_living(path: Path) -> None:
    die(path, "writer = SpoolWriter(path)")
    assert len(os.listdir(path / "alive")) == 1
    assert stat(path).live_parties == 0


def test_the_states_of_shutdown(path: Path) -> None:
    with SpoolWriter(path) as writer:
        writer.shutdown()
        assert stat(path).state == "draining"
        writer.shutdown(immediate=True)
        assert stat(path).state == "discarded"


def test_the_oldest_item_is_the_first_of_either_queue() -> None:
    words = memoryview(bytearray((W.HEADER + 2 * W.RECORD) * W.WORD)).cast("Q")
    assert oldest_age(words, 10**12) is None
    words[W.READY], words[W.RETURNED] = W.HEADER, W.HEADER + W.RECORD
    words[W.HEADER + W.PUT_TIME] = 10**12 - 4 * 10**9
    words[W.HEADER + W.RECORD + W.PUT_TIME] = 10**12 - 7 * 10**9
    assert oldest_age(words, 10**12) == 7.0
    assert oldest_age(words, 1) == 0.0


@pytest.mark.parametrize("damage", ["deleted", "zeros"])
def test_a_damaged_index_is_told_and_not_repaired(path: Path, damage: str) -> None:
    with SpoolWriter(path) as writer:
        for _ in range(2):
            writer.put(BIG)
        writer.shutdown()
    if damage == "deleted":
        (path / "index").unlink()
    else:
        (path / "index").write_bytes(bytes(10**5))
    before = picture(path)
    found = stat(path)
    assert found.index_damage
    assert (found.depth, found.failed, found.state, found.limits.maxsize) == (2, 0, "draining", 10)
    assert found.bytes > 2 * BIG.nbytes
    assert picture(path) == before


def test_damaged_links_do_not_break_it(path: Path) -> None:
    with SpoolWriter(path) as writer:
        writer.put(BIG)
    for value in (2**64 - 1, 7, W.HEADER):
        poke(path, {W.AWAY: value, W.READY: value})
        assert stat(path).depth == 1


def test_a_stopped_holder_of_the_lock_is_named(path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom spoolipc import SpoolWriter\nwriter = SpoolWriter(sys.argv[1])\n"
        "def stop(party):\n    print(os.getpid(), flush=True)\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "writer._sink.party.run(stop)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            pid = int(holder.stdout.readline())
            os.waitid(os.P_PID, pid, os.WSTOPPED)
            begin = time.monotonic()
            found = stat(path)
            assert time.monotonic() - begin < 5
            assert found.stuck_on == f"process {pid}"
            assert (found.live_parties, found.held_files, found.depth) == (None, None, 0)
        finally:
            os.kill(holder.pid, signal.SIGCONT)
    assert stat(path).stuck_on == ""


def test_the_file_system_and_the_way_of_waiting_are_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = stat(path)
    assert found.file_system == mounts.file_system(path)
    assert found.in_memory == (found.file_system in ("tmpfs", "ramfs"))
    assert found.waiting_mode in ("inotify", "polling")
    monkeypatch.setenv("SPOOLIPC_WATCH", "polling")
    assert stat(path).waiting_mode == "polling"


def test_it_can_be_written_as_json(path: Path) -> None:
    found = stat(path)
    assert isinstance(found, SpoolStat)
    assert json.loads(json.dumps(asdict(found)))["limits"]["maxsize"] == 10


def test_a_path_that_is_no_spool_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(NotASpool):
            stat(place)
    assert not list(tmp_path.iterdir())
