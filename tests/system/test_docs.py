"""The documents say what is true: the reference is current, the tutorial runs, and no link leads nowhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import spoolipc

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def test_reference_is_current() -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_reference_holds_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    names = [name for name in dir(spoolipc) if not name.startswith("_")]
    assert [name for name in names if not re.search(rf"`{name}\b", text)] == []


def test_reference_holds_the_commands_and_what_an_engine_is() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    for command in ("gc DIR", "stat DIR", "fsck DIR", "set DIR", "bench", "failed retry DIR [SEQ ...]"):
        assert f"### `spoolipc {command}" in text
    for name in ("engine.Watchable", "engine.Consumer", "testing"):
        assert f"### `spoolipc.{name}`" in text


def test_what_the_tutorial_shows_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)
    program = tmp_path / "tutorial.py"
    program.write_text("\n".join(blocks).replace("/dev/shm/", f"{tmp_path}/"))
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(program)], capture_output=True, text=True, check=False, timeout=50
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "(480, 640) 0",
        "(480, 640) 1",
        "(480, 640) 2",
        "nobody is watching",
        "[0, 1, 2, 3, 4]",
        "attempt 2 of an image of camera 3",
        "64",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    there = [link for link in links if "://" not in link]
    assert [link for link in there if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_is_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, str(page), "exec")
