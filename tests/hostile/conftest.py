"""What the tests of other users and of planted files begin with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spoolipc import SpoolWriter

LARGE = 100_000


@pytest.fixture
def path(spool: Path) -> Path:
    """A spool where items 1 to 3 wait."""
    with SpoolWriter(spool) as writer:
        for number in range(1, 4):
            writer.put(np.full(LARGE, number))
    return spool
