"""What holds for every test: in continuous integration (`CI` set), a skipped test is a failed one."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

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
