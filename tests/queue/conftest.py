"""A writer and a reader of the spool of a test, and a clock that can be moved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spoolipc import SpoolReader, SpoolWriter


@pytest.fixture
def writer(spool: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(spool) as writer:
        yield writer


@pytest.fixture
def reader(spool: Path) -> Iterator[SpoolReader]:
    with SpoolReader(spool) as reader:
        yield reader


@pytest.fixture
def spend(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the clock that leases, delays and housekeeping go by go on by so many seconds."""
    real, ahead = time.monotonic_ns, [0]
    monkeypatch.setattr(time, "monotonic_ns", lambda: real() + ahead[0])

    def pass_by(seconds: float) -> None:
        ahead[0] += int(seconds * 1e9)

    return pass_by
