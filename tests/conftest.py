"""What holds for every test: in continuous integration (`CI` set), a skipped test is a failed one."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from spoolipc import SpoolReader, SpoolWriter
from spoolipc.directory import fs

# What each of the processes that tests start would do again: compile the package, spin in idle threads of OpenBLAS.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Whoever starts the tests in the background may have SIGINT ignored; children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

NO_SKIPS = os.environ.get("CI", "").lower() not in ("", "0", "false")


def forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure that says why it was skipped; an expected failure (xfail) is none."""
    if not NO_SKIPS or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"no test may be skipped when CI is set: {reason}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    forbid_skip(report)
    return report


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that damages the table on purpose: it is not checked after every commit."""
    monkeypatch.setattr("spoolipc.directory.journal.VERIFY", False)


@pytest.fixture
def spool(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Where a test makes its spool; the spool is checked afterwards, unless the test is marked `damaged`."""
    from support.account import check_spool  # not for who borrows this file for its hooks

    path = tmp_path / "spool"
    yield path
    if (path / "index").exists() and request.node.get_closest_marker("damaged") is None:
        check_spool(path)


@pytest.fixture
def writer(spool: Path) -> Iterator[SpoolWriter]:
    """A writer of the test's spool."""
    with SpoolWriter(spool) as writer:
        yield writer


@pytest.fixture
def reader(spool: Path) -> Iterator[SpoolReader]:
    """A reader of the test's spool."""
    with SpoolReader(spool) as reader:
        yield reader


@pytest.fixture
def no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody who waits looks unasked, within the time that a test has."""
    from support.waits import look_every

    look_every(1000.0, monkeypatch.setitem, monkeypatch.setattr)


@pytest.fixture
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits looks unasked all the time: a test of what only a look finds need not wait for seconds."""
    from support.waits import OFTEN, look_every

    look_every(OFTEN, monkeypatch.setitem, monkeypatch.setattr)


@pytest.fixture
def spend(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the clock that leases, delays and housekeeping go by go on by so many seconds."""
    real, ahead = time.monotonic_ns, [0]
    for module in (time, fs):
        monkeypatch.setattr(module, "monotonic_ns", lambda: real() + ahead[0])

    def pass_by(seconds: float) -> None:
        ahead[0] += int(seconds * 1e9)

    return pass_by
