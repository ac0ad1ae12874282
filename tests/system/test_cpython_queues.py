"""CPython's own tests of queues pass with the class of the queue exchanged, however processes are started."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("cpython_queues.py")
DOCS = Path(__file__).parents[2] / "docs" / "queue.md"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_tests_of_multiprocessing_and_queue_pass(method: str) -> None:
    command = [sys.executable, str(PROGRAM), method]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=170)
    assert ran.returncode == 0, ran.stderr
    done = re.findall(r"^test_(\w+) \(.*\.(\w+?)(?:\.\w+)?\).*\.\.\. ok$", ran.stderr, re.MULTILINE)
    assert {name for name, _ in done} >= {
        "put",
        "get",
        "fork",
        "qsize",
        "task_done",
        "basic",
        "nowait",
        "queue_join",
    }
    assert "skipped" not in ran.stderr


def test_what_is_left_out_is_told_with_its_reason() -> None:
    from cpython_queues import LEFT_OUT

    told = set(re.findall(r"^\| `test_(\w+)` \|", DOCS.read_text(), re.MULTILINE))
    assert told == {name for names in LEFT_OUT.values() for name in names}
