"""The tree holds what its authors wrote, and nothing that was built, downloaded or left behind."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = """
    .ci .gitignore CHANGELOG.md CONTRIBUTING.md LICENSE Makefile README.md
    benchmarks docs examples pyproject.toml spoolipc tests
""".split()
MADE = re.compile(
    r"(^|/)(build|dist|__pycache__|\.venv[^/]*|\.\w+_cache|\.hypothesis|[^/]*\.egg-info)/"
    r"|\.(whl|egg|zip|tar|tgz|gz|bz2|xz|zst|deb|so|o|a|py[co]|log|prof|trace|orig|rej|bak|swp|tmp)$"
    r"|~$|(^|/)(\.DS_Store|\.coverage|nohup\.out|core)$"
)


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Every file that git keeps."""
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return listed.stdout.split("\0")[:-1]


def test_the_top_of_the_tree_holds_what_it_should(tracked: list[str]) -> None:
    assert sorted({name.split("/")[0] for name in tracked}) == sorted(TOP)


def test_no_file_that_was_built_or_downloaded_is_kept(tracked: list[str]) -> None:
    assert [name for name in tracked if MADE.search(name)] == []


@pytest.mark.parametrize(
    "name",
    ["x-1.0-py3-none-any.whl", "docs/a.tar.gz", "build/lib/x.py", "spoolipc/__pycache__/a.py", "run.log"],
)
def test_such_a_file_would_be_seen(name: str) -> None:
    assert MADE.search(name)
