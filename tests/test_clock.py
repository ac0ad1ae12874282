"""The wall clock may jump a day either way: it is told in messages and decides nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from audit import audit
from support.peer import Peer

from spoolipc import Empty, SpoolReader, SpoolWriter, fsck, gc, stat
from spoolipc.engine import Delivery
from spoolipc.layout import Limits
from spoolipc.source import DirectorySource

DAY = 86_400.0
Jump = Callable[[float], None]


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Jump:
    """Set the wall clock of this process so many seconds off."""
    now, now_ns = time.time, time.time_ns

    def set_off(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: now() + seconds)
        monkeypatch.setattr(time, "time_ns", lambda: now_ns() + int(seconds * 1e9))

    return set_off


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.mark.parametrize("days", [-1, 1])
def test_order_is_that_of_the_puts(path: Path, jump: Jump, days: int) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for value in range(6):
            jump(days * value * DAY)
            writer.put(np.full(3, value))
        (path / "index").unlink()  # what is built again has the files' times, and goes by their numbers
        for value in range(6):
            os.utime(path / "items" / f"{value + 1:020d}.npy", (DAY * (9 - value), DAY * (9 - value)))
        assert [int(reader.get_nowait()[0]) for _ in range(6)] == list(range(6))


@pytest.mark.parametrize("days", [-1, 1])
def test_leases_delays_and_timeouts_neither_end_early_nor_never(path: Path, jump: Jump, days: int) -> None:
    with SpoolWriter(path) as writer:
        source = DirectorySource(path, Limits())
        for value in range(2):
            writer.put(np.full(3, value))
        leased, delayed = source.claim(1, 0.3)[0], source.claim(1, None)[0]
        source.nack(delayed, 0.3, "later")
        jump(days * DAY)
        with pytest.raises(Empty):
            source.claim(1, None)
        begun = time.monotonic()
        again: list[Delivery] = []
        while len(again) < 2:
            assert source.wait_items(time.monotonic() + 5.0)
            again += source.claim(1, None)
        assert time.monotonic() - begun < 2.0
        assert {delivery.seq for delivery in again} == {leased.seq, delayed.seq}
        assert {delivery.attempt for delivery in again} == {2}
        source.ack(again)
        begun = time.monotonic()
        with SpoolReader(path) as reader, pytest.raises(Empty):
            reader.get(timeout=0.2)
        assert 0.2 <= time.monotonic() - begun < 2.0
        audit(source.party)
        source.close()


@pytest.mark.parametrize("days", [-1, 1])
def test_the_living_of_another_time_keep_what_they_have(path: Path, jump: Jump, days: int) -> None:
    with SpoolWriter(path) as writer, Peer(path) as peer:
        for value in range(2):
            writer.put(np.full(3, value))
        peer.run("block = SpoolReader(path).receive(); item = block.__enter__()")
        jump(days * DAY)
        gc(path)
        assert fsck(path).problems == ()
        with SpoolReader(path) as reader:
            assert int(reader.get_nowait()[0]) == 1
            with pytest.raises(Empty):
                reader.get_nowait()
            peer.kill()
            assert int(reader.get(timeout=5.0)[0]) == 0


@pytest.mark.parametrize("days", [-1, 1])
def test_age_of_the_oldest_item_is_never_negative(path: Path, jump: Jump, days: int) -> None:
    with SpoolWriter(path) as writer:
        writer.put(np.zeros(3))
        jump(days * DAY)
        age = stat(path).oldest_age
        assert age is not None
        assert age >= 0.0
