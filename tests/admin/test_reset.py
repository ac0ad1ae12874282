"""A spool is emptied, given other limits or begun anew, whoever else has it open and whatever crashed."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.damage import crash, killed_at
from support.peer import Peer

from spoolipc import (
    LimitMismatch,
    NotASpool,
    ShutDown,
    SpoolInUse,
    SpoolReader,
    SpoolWriter,
    StorageError,
    purge,
    remove,
    set_limits,
    stat,
)
from spoolipc.directory import DirectoryEngine, housekeeping, reset
from spoolipc.directory.layout import FILES, PARTS
from spoolipc.directory.session import Session
from spoolipc.message import Limits


def leave_in_flight(path: Path) -> None:
    """A writer and a reader crash, with three items waiting and one in flight."""
    crash(path, "writer, reader = SpoolWriter(path), SpoolReader(path)\nfor _ in range(4): writer.put(np.zeros(9))\n"
          "item = reader.receive()")  # fmt: skip


def test_purge_removes_what_a_crashed_reader_had_in_flight(spool: Path) -> None:
    leave_in_flight(spool)
    assert purge(spool) == 4
    assert os.listdir(spool / "items") == []


def test_fresh_writer_is_kept_away_by_no_crashed_session_and_removes_what_it_had(spool: Path) -> None:
    leave_in_flight(spool)
    with SpoolWriter(spool, fresh=True) as writer:
        assert os.listdir(spool / "items") == []
        assert writer.put(np.ones(3)) == 5


def test_purge_ends_beside_a_writer_that_is_as_fast(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, steps = Session.step, 0

    def step(session: Session, work: Callable[..., Any], *args: Any) -> Any:
        nonlocal steps
        done = real(session, work, *args)
        if work is housekeeping.discard_some:
            steps += 1
            writer.put_many([np.zeros(10)] * 200)
        return done

    with SpoolWriter(spool) as writer:
        writer.put_many([np.zeros(10)] * 200)
        monkeypatch.setattr(Session, "step", step)
        assert purge(spool) == 200
        assert writer.qsize() == steps * 200


def test_fresh_writer_names_the_process_that_is_in_its_way(spool: Path) -> None:
    with Peer(spool) as peer:
        peer.run("writer, reader = SpoolWriter(path), SpoolReader(path)")
        with pytest.raises(SpoolInUse, match=f"process {peer.pid} has it open as writer"):
            SpoolWriter(spool, fresh=True)
        peer.run("writer.put(np.zeros(9)); item = reader.receive(); writer.close()")
        with pytest.raises(SpoolInUse, match=f"item 1 is in flight at process {peer.pid}"):
            SpoolWriter(spool, fresh=True)
        assert stat(spool).live_sessions == 1
        peer.run("item.ack()")
        SpoolWriter(spool, fresh=True).close()


def test_removal_killed_at_any_name_is_finished_by_the_next(tmp_path: Path) -> None:
    for place in itertools.count(1):
        path = tmp_path / str(place)
        with SpoolWriter(path) as writer, SpoolReader(path) as reader:
            writer.put_many([np.zeros(3000)] * 3)
            reader.receive().reject("on purpose")
            reader.get()
            writer.shutdown()
        killed = killed_at(place, remove, False, path)
        if path.exists():
            assert sorted(set(os.listdir(path)) - {*PARTS, *FILES}) == []
            if os.listdir(path):
                remove(path)
        assert not path.exists() or os.listdir(path) == []
        if not killed:
            assert place > 10
            break


def test_nothing_is_put_into_a_spool_whose_removal_has_begun(
    spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(_: object) -> list[int]:
        with SpoolWriter(spool) as writer, pytest.raises(ShutDown):
            writer.put(np.zeros(9))
        return []

    SpoolWriter(spool).close()
    monkeypatch.setattr(reset, "failed_numbers", meanwhile)
    remove(spool)
    assert not spool.exists()


def test_spool_that_holds_a_foreign_file_is_not_removed(spool: Path) -> None:
    with SpoolWriter(spool) as writer:
        writer.put(np.zeros(3))
    for name in ("notes", "items/notes"):
        (spool / name).touch(mode=0o600)
        with pytest.raises(StorageError, match=f"'{name}', which is not the spool's"):
            remove(spool)
        assert (stat(spool).depth, stat(spool).state) == (1, "open")
        (spool / name).unlink()
    remove(spool)


def test_directory_that_is_no_spool_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    (tmp_path / "mine").touch()
    for path in (tmp_path, tmp_path / "items"):
        with pytest.raises(NotASpool):
            remove(path)
    assert sorted(os.listdir(tmp_path)) == ["items", "mine"]


def test_mismatch_of_a_limit_names_the_command_that_changes_it(spool: Path) -> None:
    SpoolWriter(spool, maxsize=3).close()
    with pytest.raises(LimitMismatch, match=re.escape(f"spoolipc set {spool} maxsize=4")):
        SpoolWriter(spool, maxsize=4)


def test_mode_of_a_spool_is_not_changed(spool: Path) -> None:
    SpoolWriter(spool).close()
    with pytest.raises(LimitMismatch, match="mode=0o700, not 0o770"):
        DirectoryEngine(spool).set_limits(Limits(mode=0o770, maxsize=3))
    with pytest.raises(LimitMismatch, match="mode=0o700, not 0o770"):
        SpoolWriter(spool, fresh=True, mode=0o770)
    assert stat(spool).limits.maxsize == 0


def test_spool_in_memory_is_looked_after_by_the_same_functions() -> None:
    with pytest.raises(NotASpool, match="memory://looked-after"):
        stat("memory://looked-after")
    with SpoolWriter("memory://looked-after", maxsize=3) as writer:
        writer.put(np.zeros(3))
        assert stat("memory://looked-after").depth == 1
        assert set_limits("memory://looked-after", maxsize=4).maxsize == writer.maxsize == 4
        assert purge("memory://looked-after") == 1
