"""A spool deleted while in use is a clear error in every session: none hangs, and none makes it again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.peer import Peer
from support.waits import start_waiting

from spoolipc import SpoolGone, SpoolReader, SpoolWriter

SMALL, LARGE = np.arange(3), np.arange(10_000)


@pytest.mark.parametrize("array", [SMALL, LARGE], ids=["small", "large"])
def test_every_call_says_so(spool: Path, array: Any) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        for _ in range(3):
            writer.put(array)
        got = reader.get()
        item = reader.receive()
        shutil.rmtree(spool)
        calls: list[Callable[[], object]] = [
            lambda: writer.put(array),
            lambda: writer.put_many([array, array]),
            lambda: writer.loan(array.shape, array.dtype).__enter__(),
            reader.get,
            reader.get_nowait,
            lambda: reader.get(timeout=5.0),
            reader.receive,
            item.ack,
            item.nack,
            writer.shutdown,
        ]
        for call in calls:
            with pytest.raises(SpoolGone, match=str(spool)) as caught:
                call()
            assert isinstance(caught.value, FileNotFoundError)
        assert np.array_equal(got, array)  # views outlive their file
    assert not spool.exists()


@pytest.mark.parametrize("call", ["reader.get()", "writer.put(np.zeros(3))"])
def test_who_waits_is_told_and_nothing_is_said_about_how_it_waits(spool: Path, call: str) -> None:
    with Peer(spool) as peer:
        peer.run(
            "import logging\nlines = []\nkeep = logging.Handler()\nkeep.emit = lines.append\n"
            "logging.getLogger('spoolipc').addHandler(keep)\n"
            "writer, reader = SpoolWriter(path, maxsize=1), SpoolReader(path)\n"
            f"def end():\n try: {call}\n except SpoolGone: return True"
        )
        if "put" in call:
            peer.run(call)
        start_waiting(peer, "end()")
        shutil.rmtree(spool)
        assert peer.answer()
        assert peer.ask("len(lines)") == 0
    assert not spool.exists()


def test_another_spool_at_the_same_path_is_not_taken_for_the_old(spool: Path) -> None:
    with SpoolWriter(spool) as old:
        old.put(SMALL)
        shutil.rmtree(spool)
        with SpoolWriter(spool) as new, SpoolReader(spool) as reader:
            new.put(LARGE)
            with pytest.raises(SpoolGone):
                old.put(SMALL)
            assert np.array_equal(reader.get_nowait(), LARGE)
            assert reader.empty()


def test_a_part_removed_is_made_again_for_who_waits(spool: Path) -> None:
    """Who waits for the lock on a directory that was removed is alone with it."""
    with SpoolWriter(spool) as writer, Peer(spool) as peer:
        peer.run("reader = SpoolReader(path)")
        start_waiting(peer, "int(reader.get(timeout=60)[1])")
        (spool / "items").rmdir()
        writer.put(SMALL)
        assert peer.answer() == 1


def test_a_reader_of_a_spool_made_again_at_the_path_is_woken_while_the_old_one_is_open(spool: Path) -> None:
    with Peer(spool) as peer, Peer(spool) as other:
        peer.run("old = SpoolReader(path)\ntry: old.get(timeout=0.01)\nexcept Empty: pass")
        shutil.rmtree(spool)
        peer.run("new = SpoolReader(path)")
        other.run("writer = SpoolWriter(path)")
        peer.run("from spoolipc.directory import doorbell, session")
        peer.run("session.EVERY = doorbell.LOOK_EVERY['items'] = 1000")  # it does not look unasked
        start_waiting(peer, "len(new.get(timeout=500))")
        other.run("writer.put(np.zeros(3))")
        assert peer.answer() == 3
