"""A process that is stopped while it holds the lock hangs nobody for ever, and loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.damage import stop_in_step
from support.peer import Peer
from support.waits import is_locked, polls, until

from spoolipc import Full, LockTimeout, SpoolReader, SpoolWriter, stat
from spoolipc.directory.lock import IndexLock


@pytest.fixture
def peer(spool: Path) -> Iterator[Peer]:
    """A process with a writer of its own."""
    with Peer(spool) as peer:
        peer.run("writer = SpoolWriter(path)")
        yield peer


def test_others_are_told_who_holds_the_lock_and_it_finishes_when_it_goes_on(
    spool: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IndexLock.take, "__defaults__", (2.0,))  # of seconds

    def opening(side: type[SpoolReader] | type[SpoolWriter]) -> None:
        side(spool).close()

    with (
        SpoolWriter(spool) as writer,
        SpoolReader(spool) as reader,
        SpoolReader(spool) as other,
        ThreadPoolExecutor(6) as aside,
    ):
        stop_in_step(peer)
        assert is_locked(spool)
        attempts: list[Callable[[], object]] = [
            lambda: writer.put(np.full(3, 2), block=False),
            lambda: reader.get(block=False),
            lambda: other.receive(block=False),
            lambda: opening(SpoolReader),
            lambda: opening(SpoolWriter),
        ]
        waiting = [aside.submit(attempt) for attempt in attempts]
        assert str(peer.pid) in stat(spool).stuck_on
        assert writer.qsize() == reader.qsize() == 0  # a look needs no lock
        for attempt in waiting:
            with pytest.raises(LockTimeout, match=f"process {peer.pid} .*alive/") as caught:
                attempt.result(60)
            assert isinstance(caught.value, TimeoutError)
        assert list((spool / "tmp").iterdir()) == []  # nor was what could not be put left behind
        peer.go()
        peer.answer()
        writer.put(np.full(3, 2))
        assert [int(reader.get_nowait()[0]) for _ in range(2)] == [1, 2]
        peer.run("writer.close()")


@pytest.mark.parametrize("end", ["goes on", "killed"])
def test_others_wait_for_it_and_go_on_as_soon_as_it_goes_on_or_is_killed(
    spool: Path, peer: Peer, end: str
) -> None:
    with Peer(spool) as other:
        other.run("reader = SpoolReader(path); writer = SpoolWriter(path)")
        stop_in_step(peer)
        other.start("ask", "[int(reader.get_nowait()[0]), writer.put(np.full(3, 2))]")
        until(polls(other.pid))
        assert is_locked(spool)
        if end == "killed":
            peer.kill()
        else:
            peer.go()
        assert other.answer() == [1, 2]  # its file was in items/ when it stopped
        assert other.ask("int(reader.get_nowait()[0])") == 2
        other.run("reader.close(); writer.close()")
        if end == "goes on":
            peer.answer()
            peer.run("writer.close()")


def test_a_stopped_process_that_holds_no_lock_is_no_matter(spool: Path, peer: Peer) -> None:
    with SpoolWriter(spool, maxsize=2) as writer, SpoolReader(spool) as reader:
        peer.stop()
        for value in range(2):
            writer.put_nowait(np.full(3, value))
        with pytest.raises(Full):
            writer.put_nowait(np.full(3, 2))
        assert [int(reader.get_nowait()[0]) for _ in range(2)] == [0, 1]
        peer.go()
        peer.run("writer.close()")
