"""Programs under strace: what the kernel sees of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

TESTS: Final = Path(__file__).parents[1]


def strace(
    place: Path, program: str, *options: str, args: tuple[object, ...] = ()
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a program with these arguments after the path of its spool; what it ended with, and the lines of the log."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log, source = place / "log", place / "program.py"
    source.write_text(program)
    command = ["strace", "-f", "-qq", "-s", "200", "-e", "signal=none", "-o", str(log), *options]
    done = subprocess.run(
        [*command, sys.executable, "-W", "error", str(source), str(place / "spool"), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
        env={"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "PATH": "/usr/bin:/bin"},
    )
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    return done, log.read_text(errors="replace").splitlines()
