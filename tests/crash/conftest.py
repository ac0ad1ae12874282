"""What the crash tests share."""

from __future__ import annotations

import gc
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from spoolipc import Empty, SpoolReader


@pytest.fixture(scope="session", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a process does once, such as to open its inotify, is done."""
    with SpoolReader(tmp_path_factory.mktemp("warm") / "spool") as reader, suppress(Empty):
        reader.get(timeout=0.02)
    gc.freeze()  # what is here now need not be looked at by every collection to come


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a fault keeps from being settled is dropped."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore:.* was dropped unsettled:ResourceWarning"))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of faults are logged thousands of times."""
    caplog.set_level(logging.CRITICAL, "spoolipc")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where to make thousands of spools: in memory, where there is room."""
    try:
        made = Path(tempfile.mkdtemp(prefix="spoolipc-", dir="/dev/shm"))
    except OSError:
        made = tmp_path
    yield made
    if made != tmp_path:
        shutil.rmtree(made)
