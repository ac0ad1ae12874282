"""Every example runs, says what happened, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ARTICLE = "article.py"
BARE = ("queue_before.py", "queue_after.py")
"""Programs that take no arguments: they differ in one line, and are as short as can be."""


def command(name: str, *args: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / name), *args]


def run(temporary: Path, name: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TMPDIR": str(temporary)}
    return subprocess.run(
        command(name, *args), env=environment, capture_output=True, text=True, check=False, timeout=50
    )


def test_article_measures_both_carriers_and_the_floor(tmp_path: Path) -> None:
    ran = run(tmp_path, ARTICLE, "--workers=1", "--rounds=2", f"--dir={tmp_path}", "--floor")
    assert ran.returncode == 0, ran.stderr
    for row in (
        "| multiprocessing.Queue |",
        "| spoolipc |",
        "| spoolipc.Queue |",
        "| drop-in / spool |",
        "| floor |",
        "| queue / spool |",
        "| spool / floor |",
    ):
        assert row in ran.stdout
    assert f"the spool is made in {tmp_path}, which is " in ran.stdout
    assert "spoolipc, array: 100%" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_article_refuses_a_place_too_small_with_the_numbers() -> None:
    ran = run(Path("/proc"), ARTICLE, "--dir=/proc", "--workers=2", "--rounds=2")
    assert ran.returncode == 1
    assert "/proc has 0.00 GB free, and 0.32 GB may be waiting" in ran.stderr


@pytest.mark.parametrize(("carrier", "number"), [("spool", signal.SIGINT), ("queue", signal.SIGTERM)])
def test_article_interrupted_leaves_no_process_and_no_file(
    tmp_path: Path, carrier: str, number: signal.Signals
) -> None:
    words = command(ARTICLE, "--workers=2", "--rounds=100000", f"--dir={tmp_path}", "--carriers", carrier)
    # In a process group of its own, so that the signal reaches the workers too, as Ctrl-C does.
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, process_group=0) as process:
        assert process.stderr is not None
        text = ""
        while not re.search(r"[1-9]\d*/200000", text):
            letter = process.stderr.read(1)
            assert letter, text
            text += letter
        os.killpg(process.pid, number)
        rest = process.stderr.read()  # ends when the last worker has ended: they hold this pipe too
    assert process.returncode == 1
    assert "interrupted: the workers are stopped" in rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


EACH = """
import contextlib, io, json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            said.write(f"ended with {ended.code}")
    print(json.dumps(said.getvalue()))
"""


def each_said(commands: list[list[str]]) -> list[str]:
    """What each of these said and ended with, all run in one process."""
    command = [sys.executable, "-W", "error", "-c", EACH, json.dumps(commands)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_help_of_each_is_worth_reading() -> None:
    there = sorted(str(path) for path in EXAMPLES.glob("*.py") if path.name not in BARE)
    said = each_said([[name, "--help"] for name in there])
    lines = dict(zip(there, (len(text.splitlines()) for text in said), strict=True))
    assert min(lines.values()) > 9, lines


def test_numbers_that_show_nothing_are_refused() -> None:
    refused = {
        (ARTICLE, "--workers=0"): "--workers and --rounds must be at least 1",
        ("async_server.py", "--clients=0"): "must be at least 1",
        ("camera_pipeline.py", "--consumers=0"): "--consumers at least 1",
        ("resume_after_crash.py", "--items=0"): "must be at least 1",
        ("worker_pool.py", "--workers=1"): "must be at least 2",
    }
    said = each_said([[str(EXAMPLES / name), args] for name, args in refused])
    for text, expected in zip(said, refused.values(), strict=True):
        assert expected in text
        assert text.endswith("ended with 2")


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("async_server.py", ["--clients=1", "--requests=1", "--workers=1"]),
        ("camera_pipeline.py", ["--frames=0", "--consumers=1"]),
        ("resume_after_crash.py", ["--items=1", "--dies-after=1"]),
        ("preprocessing_pool.py", ["--images=32", "--workers=1"]),
        ("three_stages.py", ["--frames=1", "--pause=0"]),
        ("vectorised_environment.py", ["--environments=1", "--steps=1"]),
        ("worker_pool.py", ["--images=2", "--workers=2"]),
    ],
)
def test_smallest_numbers_will_do(tmp_path: Path, name: str, args: list[str]) -> None:
    ran = run(tmp_path, name, *args)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "True" in ran.stdout
    assert list(tmp_path.iterdir()) == []


SHOWN: dict[str, tuple[list[str], list[str]]] = {
    "async_server.py": (
        ["--clients=3", "--requests=4"],
        ["2 workers did 12 images", "the loop was held up for ", "12 requests answered, each right: True"],
    ),
    "camera_pipeline.py": (
        ["--frames=60", "--consumers=2"],
        ["60 frames taken, each seen exactly once: True", *2 * ["in order: True"]],
    ),
    "preprocessing_pool.py": (
        ["--images=64"],
        ["64 images in", "of the second half 32 of 32 were told apart: True"],
    ),
    "resume_after_crash.py": (
        ["--items=10", "--dies-after=4"],
        [
            "first consumer ended with -9, it had handled 4: 0 1 2 3",
            "second consumer ended with 0, it handled 6: 4 5 6 7 8 9",
            "every item handled exactly once, in order: True",
        ],
    ),
    "three_stages.py": (
        ["--frames=12"],
        [
            "12 frames went through three stages",
            "frames waited before the slow stage, of 4 allowed",
            "every frame arrived once, in order: True\nthe means are right: True",
        ],
    ),
    "vectorised_environment.py": (
        ["--environments=2", "--steps=20"],
        ["40 steps of 2 environments", "the player kept every ball in the field: True"],
    ),
    "worker_pool.py": (
        ["--images=12", "--workers=2"],
        [
            "the first worker ended with -9, others did again: [1]",
            "every image but the black one was done exactly once: True",
            "dead letter: image 5, 3 attempts",
            *3 * [": ValueError: image 5 is black"],
        ],
    ),
}
"""What each is run with, and says, as often as it stands here."""


@pytest.mark.parametrize("name", SHOWN)
def test_each_says_that_it_went_as_it_should(tmp_path: Path, name: str) -> None:
    args, said = SHOWN[name]
    ran = run(tmp_path, name, *args)
    assert ran.returncode == 0, ran.stderr
    assert {line: ran.stdout.count(line) for line in said} == {line: said.count(line) for line in said}
    assert list(tmp_path.iterdir()) == []


def test_programs_before_and_after_the_move_differ_in_one_line_and_do_the_same(tmp_path: Path) -> None:
    before, after = BARE
    texts = [(EXAMPLES / name).read_text().splitlines() for name in (before, after)]
    changed = [pair for pair in zip(*texts, strict=True) if pair[0] != pair[1]]
    assert changed == [("from multiprocessing import Queue", "from spoolipc import Queue")]
    for name in (before, after):
        ran = run(tmp_path, name, "--frames=10")
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.startswith("10 frames of 6 MB there and grey ones back in ")
        assert ran.stdout.endswith("sum 45\n")
    assert list(tmp_path.iterdir()) == []
