"""In continuous integration no test may be skipped unnoticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPING = """
import pytest

@pytest.mark.skipif(True, reason="strace is missing")
def test_by_mark():
    pass

def test_by_call():
    pytest.skip("not root")

@pytest.mark.xfail(reason="known")
def test_known():
    assert False

def test_fine():
    pass
"""
SKIPPING_MODULE = 'import pytest\npytest.skip("no mount here", allow_module_level=True)\n'


def run_pytest(directory: Path, ci: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pytest under the project's `conftest.py` on the tests written in `directory`."""
    shutil.copy(Path(__file__).parents[1] / "conftest.py", directory)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:hypothesispytest",
            "-rA",
            *options,
            ".",
        ],
        cwd=directory,
        env=os.environ | {"CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_skip_is_a_failure_in_ci_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SKIPPING)
    (tmp_path / "test_module.py").write_text(SKIPPING_MODULE)
    run = run_pytest(tmp_path, "true", "--continue-on-collection-errors")
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert "1 failed, 1 passed, 1 xfailed, 2 errors" in run.stdout
    for words in ("ERROR test_it.py::test_by_mark", "strace is missing", "FAILED test_it.py::test_by_call"):
        assert words in run.stdout
    assert "no mount here" in run.stdout


def test_a_skip_is_a_skip_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SKIPPING)
    run = run_pytest(tmp_path, "")
    assert run.returncode == 0
    assert "2 skipped" in run.stdout
