"""What the log of Python is told: nothing of what is as it should be, and one line for each thing that is not."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from support.damage import item

from spoolipc import SpoolReader, SpoolWriter, fsck, gc, purge, remove, set_limits, stat


def test_life_of_a_spool_without_a_fault_logs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "spool"
    with caplog.at_level(logging.DEBUG, "spoolipc"):
        for _ in range(2):
            with SpoolReader(path) as reader, SpoolWriter(path, fresh=True, maxsize=5) as writer:
                writer.put_many([np.zeros(3), np.zeros(9000), np.zeros(3)])
                reader.get()
                reader.receive().ack()
                writer.shutdown()
            for look in (stat, gc, fsck, purge):
                look(path)
            set_limits(path, maxsize=6)
            remove(path)
    assert caplog.messages == []


def test_each_fault_is_told_in_one_line_that_is_true(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, unverified: None
) -> None:
    path = tmp_path / "spool"
    with SpoolWriter(path) as writer, SpoolReader(path) as reader, caplog.at_level(logging.DEBUG, "spoolipc"):
        writer.put_many([np.full(3, float(number)) for number in range(4)])
        (path / item(1)).write_bytes(b"rubbish")
        (path / item(2)).unlink()
        assert reader.get()[0] == 2
        assert caplog.messages == [
            f"{path}: item 1 is now in failed/: damaged: {caplog.messages[0].rpartition('damaged: ')[2]}",
            f"{path}: item 2 has no file any more: damaged: its file is missing",
        ]
        caplog.clear()
        (path / "index").unlink()
        assert reader.get()[0] == 3
        assert caplog.messages == [
            f"{path}: the index was deleted, linked or truncated; built it again with 1 items, locked for 0.0 s"
        ]
