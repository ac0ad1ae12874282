"""A process that is stopped while it holds the index lock hangs nobody for ever, and loses nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from audit import audit
from support.peer import Peer

from spoolipc import Full, LockTimeout, SpoolReader, SpoolWriter, lock, stat

HOLD = "import os, signal; writer._sink.party.run(lambda party: os.kill(os.getpid(), signal.SIGSTOP))"
"""Stop in a locked step."""
STOP_AFTER_THE_RENAME = """
import os, signal
rename = os.rename
def stopping(*names, **directories):
    rename(*names, **directories)
    os.kill(os.getpid(), signal.SIGSTOP)
os.rename = stopping
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def peer(path: Path) -> Iterator[Peer]:
    """A process with a writer of its own."""
    with Peer(path) as peer:
        peer.run("writer = SpoolWriter(path)")
        yield peer


def stopped(peer: Peer, code: str) -> None:
    """Have a process stop itself, and see it stopped."""
    peer.start("run", code)
    _, status = os.waitpid(peer.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


def test_others_are_told_who_holds_the_lock(path: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.put(np.full(3, 1))
        stopped(peer, HOLD)
        monkeypatch.setattr(lock, "TIMEOUT", 0.2)
        attempts: list[Callable[[], object]] = [
            lambda: writer.put(np.full(3, 2), block=False),
            reader.get_nowait,
            lambda: SpoolReader(path),
            lambda: SpoolWriter(path, maxsize=7),
        ]
        for attempt in attempts:
            begun = time.monotonic()
            with pytest.raises(LockTimeout, match=f"process {peer.pid} .*alive/") as caught:
                attempt()
            assert isinstance(caught.value, TimeoutError)
            assert time.monotonic() - begun < 5.0
        assert writer.qsize() == reader.qsize() == 1  # a look needs no lock
        assert str(peer.pid) in stat(path).stuck_on
        monkeypatch.undo()
        peer.go()
        peer.answer()
        writer.put(np.full(3, 2))
        assert [int(reader.get_nowait()[0]) for _ in range(2)] == [1, 2]
        audit(writer._sink.party)
        peer.run("writer.close()")


def test_others_wait_for_one_that_goes_on_in_time(
    path: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SpoolWriter(path) as writer:
        stopped(peer, HOLD)
        sleep, naps = time.sleep, []

        def nap(seconds: float) -> None:
            naps.append(seconds)
            if len(naps) == 20:
                peer.go()
            sleep(seconds)

        monkeypatch.setattr(time, "sleep", nap)
        writer.put(np.full(3, 1))
        assert len(naps) >= 20
        assert max(naps) <= 1e-3  # nobody who lets go is waited for much longer
        peer.answer()
        peer.run("writer.close()")


def test_one_stopped_inside_its_change_and_killed_is_repaired_at_once(
    path: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        peer.run(STOP_AFTER_THE_RENAME)
        stopped(peer, "writer.put(np.full(3, 1))")
        monkeypatch.setattr(lock, "TIMEOUT", 0.2)
        with pytest.raises(LockTimeout):
            reader.get_nowait()
        monkeypatch.undo()
        peer.kill()
        assert int(reader.get_nowait()[0]) == 1  # its file was in items/ when it died
        writer.put(np.full(3, 2))
        assert int(reader.get_nowait()[0]) == 2
        audit(writer._sink.party)


def test_one_stopped_inside_its_change_finishes_it_when_it_goes_on(
    path: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        peer.run(STOP_AFTER_THE_RENAME)
        stopped(peer, "writer.put(np.full(3, 1))")
        monkeypatch.setattr(lock, "TIMEOUT", 0.2)
        with pytest.raises(LockTimeout):
            writer.put_nowait(np.full(3, 2))
        assert list(path.joinpath("tmp").iterdir()) == []  # nor was what could not be put left behind
        monkeypatch.undo()
        peer.go()
        peer.answer()
        writer.put(np.full(3, 2))
        assert [int(reader.get_nowait()[0]) for _ in range(2)] == [1, 2]
        audit(writer._sink.party)


def test_a_stopped_process_that_holds_no_lock_is_no_matter(path: Path, peer: Peer) -> None:
    with SpoolWriter(path, maxsize=2) as writer, SpoolReader(path) as reader:
        stopped(peer, "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
        for value in range(2):
            writer.put_nowait(np.full(3, value))
        with pytest.raises(Full):
            writer.put_nowait(np.full(3, 2))
        assert [int(reader.get_nowait()[0]) for _ in range(2)] == [0, 1]
        peer.go()
        peer.answer()
