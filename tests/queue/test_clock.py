"""The wall clock may jump a day either way: it is told in messages and decides nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.peer import Peer

from spoolipc import Empty, SpoolReader, SpoolWriter, fsck, gc

DAY = 86_400.0
Jump = Callable[[float], None]
pytestmark = pytest.mark.parametrize("days", [-1, 1])


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Jump:
    """Set the wall clock of this process so many seconds off; the monotonic one is as it was."""
    now, now_ns = time.time, time.time_ns

    def set_off(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: now() + seconds)
        monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(seconds * 1e9))

    return set_off


def test_order_is_that_of_the_puts(spool: Path, jump: Jump, days: int) -> None:
    real = time.time()
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        for value in range(6):
            jump(days * value * DAY)
            writer.put(np.full(3, value))
        with reader.receive() as item:
            assert item.array[0] == 0
        assert abs(reader.peek().put_time - real - days * DAY) < 600  # the package's clock did jump
        (spool / "index").unlink()  # what is built again has the files' times, and goes by their numbers
        for value in range(1, 6):
            os.utime(spool / "items" / f"{value + 1:020d}.npy", (DAY * (9 - value), DAY * (9 - value)))
        assert [int(reader.get_nowait()[0]) for _ in range(5)] == list(range(1, 6))


def test_leases_delays_and_timeouts_neither_end_early_nor_never(spool: Path, jump: Jump, days: int) -> None:
    with (
        SpoolWriter(spool) as writer,
        SpoolReader(spool, lease=0.5) as leasing,
        SpoolReader(spool, lease=30) as reader,
    ):
        for value in range(3):
            writer.put(np.full(3, value))
        begun = time.monotonic()
        held = leasing.receive()
        reader.receive().nack(delay=0.25)
        extended = reader.receive()
        jump(days * DAY)
        extended.extend(60)
        for value, least in ((1, 0.25), (0, 0.5)):
            again = reader.receive(timeout=20)
            assert time.monotonic() - begun >= least
            assert (again.array[0], again.attempt) == (value, 2)
            again.ack()
        begun = time.monotonic()
        with pytest.raises(Empty):
            reader.get(timeout=0.2)
        assert time.monotonic() - begun >= 0.2
        extended.ack()
        assert not held.settled


@pytest.mark.usefixtures("look_often")
def test_sessions_of_another_time_keep_what_they_have(spool: Path, jump: Jump, days: int) -> None:
    with SpoolWriter(spool) as writer, Peer(spool) as peer:
        for value in range(2):
            writer.put(np.full(3, value))
        peer.run("item = SpoolReader(path).receive()")
        jump(days * DAY)
        gc(spool)
        assert fsck(spool).problems == ()
        with SpoolReader(spool) as reader:
            assert int(reader.get_nowait()[0]) == 1
            with pytest.raises(Empty):
                reader.get_nowait()
            peer.kill()
            assert int(reader.get(timeout=20)[0]) == 0
