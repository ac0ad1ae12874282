"""The documents say what is true: the reference is current, the tutorial runs, and no link leads nowhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.waits import until

import spoolipc
from spoolipc import NotASpool, UnsafeSpool

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    for command in ("gc [DIR]", "stat DIR", "fsck DIR", "set DIR", "bench", "failed retry DIR [SEQ ...]"):
        assert f"### `spoolipc {command}" in text
    for name in ("engine.Watchable", "engine.Consumer", "testing"):
        assert f"### `spoolipc.{name}`" in text


def test_what_the_tutorial_shows_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)
    program = tmp_path / "tutorial.py"
    program.write_text("\n".join(blocks).replace("/dev/shm/", f"{tmp_path}/"))
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, "-W", "error", str(program)],
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.splitlines() == [
            "(480, 640) 0",
            "(480, 640) 1",
            "(480, 640) 2",
            "nobody is watching",
            "the writer has left",
            "[0, 1, 2, 3, 4]",
            "2 images removed",
            "attempt 2 of an image of camera 3",
            "64",
        ]


def test_program_of_the_page_on_asyncio_runs_again_and_again(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "asyncio.md").read_text(), re.DOTALL)
    program = tmp_path / "program.py"
    program.write_text(block.replace("/dev/shm/", f"{tmp_path}/"))
    for _ in range(2):
        command = [sys.executable, "-W", "error", str(program)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.splitlines() == [f"{number} {number}.0" for number in range(10)]


def is_open(path: Path) -> bool:
    """Whether somebody has a spool open there."""
    try:
        return bool(spoolipc.stat(path).live_sessions)
    except (NotASpool, UnsafeSpool):  # none yet, or half made
        return False


@pytest.mark.parametrize(
    ("page", "spool", "said"),
    [
        ("README.md", "frames", [f"{number}.0" for number in range(10)]),
        ("docs/tutorial.md", "tutorial", [f"(480, 640) {number}" for number in range(3)]),
    ],
    ids=["README", "tutorial"],
)
def test_producer_and_consumer_of_a_page_run_again_and_again_in_either_order(
    page: str, spool: str, said: list[str], tmp_path: Path
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[:2]
    programs = [tmp_path / name for name in ("producer.py", "consumer.py")]
    for program, block in zip(programs, blocks, strict=True):
        program.write_text(block.replace("/dev/shm/", f"{tmp_path}/"))
    producer, consumer = ([sys.executable, "-W", "error", str(program)] for program in programs)
    for puts, reader_first in ((1, True), (2, False), (1, False)):  # of the second run, one that nobody read
        for _ in range(0 if reader_first else puts):
            subprocess.run(producer, check=True, timeout=50)
        with subprocess.Popen(consumer, stdout=subprocess.PIPE, text=True) as reading:
            if reader_first:
                until(lambda: is_open(tmp_path / spool))
                subprocess.run(producer, check=True, timeout=50)
            out, _ = reading.communicate(timeout=50)
        assert (reading.returncode, out.splitlines()) == (0, said)


def test_request_and_reply_run_again_and_again_in_either_order(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "delivery.md").read_text().partition("## Request and reply")[2]
    programs = [tmp_path / name for name in ("server.py", "client.py")]
    for program, block in zip(programs, re.findall(r"```python\n(.*?)```", text, re.DOTALL), strict=False):
        program.write_text(block.replace("/dev/shm/", f"{tmp_path}/"))
    commands = [[sys.executable, "-W", "error", str(program)] for program in programs]
    for _ in range(3):
        commands.reverse()
        first = subprocess.Popen(commands[0], stdout=subprocess.PIPE, text=True)
        until(lambda: is_open(tmp_path / "requests"))
        second = subprocess.Popen(commands[1], stdout=subprocess.PIPE, text=True)
        said = [each.communicate(timeout=50)[0] for each in (first, second)]
        assert [first.returncode, second.returncode] == [0, 0]
        assert "".join(said).splitlines() == [
            f"reply to request {number} {2 * number - 2}" for number in (1, 2, 3)
        ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    there = [link for link in links if "://" not in link]
    assert [link for link in there if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_is_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
