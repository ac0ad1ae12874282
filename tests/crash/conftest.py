"""What the crash tests share."""

from __future__ import annotations

import logging
from contextlib import suppress

import pytest

from spoolipc import Empty, SpoolReader


@pytest.fixture(scope="session", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a process does once, such as to open its inotify, is done."""
    with SpoolReader(tmp_path_factory.mktemp("warm") / "spool") as reader, suppress(Empty):
        reader.get(timeout=0.02)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of faults are logged thousands of times."""
    caplog.set_level(logging.CRITICAL, "spoolipc")
