"""What the log of Python is told: nothing of what is as it should be."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

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
