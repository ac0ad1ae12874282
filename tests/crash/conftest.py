"""What the crash tests share."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of faults are logged thousands of times."""
    caplog.set_level(logging.CRITICAL, "spoolipc")
