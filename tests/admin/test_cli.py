"""The command line says what the functions return, in text or JSON, and its exit code says how it went."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.damage import crash, item, item_name, picture, stop_in_step
from support.peek import peek_table, poke
from support.peer import Peer

import spoolipc
from spoolipc import (
    NotASpool,
    SpoolReader,
    SpoolWriter,
    failed_drop,
    failed_list,
    failed_retry,
    fsck,
    gc,
    purge,
    remove,
    set_limits,
    stat,
)


class Said(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`python -m spoolipc`, run in this process."""

    def run(command: str, *arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["spoolipc", *command.split(), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("spoolipc", run_name="__main__")
        assert isinstance(ended.value.code, int)
        return Said(ended.value.code, *capsys.readouterr())

    return run


def json_of(said: Said) -> Any:
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    return found


@pytest.fixture
def path(spool: Path) -> Path:
    """A spool with items 1 and 2 rejected, item 3 waiting."""
    with SpoolWriter(spool, maxsize=100) as writer, SpoolReader(spool) as reader:
        for number in range(1, 4):
            arrays = {"image": np.full((100, 100), number), "mask": np.ones(3, bool)}
            writer.put(arrays, meta={"camera": number})
        reader.receive().reject("too dark")
        reader.receive().reject("too\x1b[31m red\n")
    return spool


def test_stat_in_text_and_json(path: Path, run: Command) -> None:
    said = run("stat", path)
    assert (said.code, said.err) == (0, "")
    assert re.search(r"waiting +1 of 100 items, the first put \d+\.\d s ago", said.out)
    assert re.search(r"bytes +81\.9 KB", said.out)
    assert re.search(r"failed +2", said.out)
    assert re.search(r"open in +0 readers", said.out)
    found = json_of(run("stat", path, "--json"))
    assert (found["depth"], found["failed"], found["limits"]["maxsize"]) == (1, 2, 100)
    assert (found["pinned_files"], found["live_sessions"]) == (0, 0)


def test_stat_tells_of_a_damaged_index_by_its_exit_code(path: Path, run: Command) -> None:
    (path / "index").unlink()
    said = run("stat", path)
    assert said.code == 1
    assert "the index is missing" in said.out


def test_gc_in_text_and_json(path: Path, run: Command) -> None:
    said = run("gc", path)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith(f"{path}: nothing left")
    crash(
        path,
        "reader, writer = SpoolReader(path), SpoolWriter(path); one = reader.receive()\n"
        "lent = writer.loan(10**6, float); lent.__enter__()",
    )
    (path / "README").touch()
    before = picture(path)
    foreseen = json_of(run("gc", path, "--dry-run", "--json"))
    assert foreseen["dry_run"]
    kinds = ("requeued_items", "temporary_files", "crashed_sessions", "foreign_files")
    assert [foreseen[kind] for kind in kinds] == [1, 1, 2, 1]
    assert "8.0 MB would be freed" in run("gc", path, "--dry-run").out
    assert picture(path) == before
    said = run("gc", path)
    assert (said.code, said.err) == (0, "")
    head, temporary, requeued, crashed, foreign = said.out.splitlines()
    assert head == f"{path}: done; 8.0 MB freed"
    assert temporary.startswith("  1 half-written file ")
    assert requeued.startswith("  1 item ")
    assert crashed.startswith("  2 ")
    assert foreign.startswith("  left alone: 1 ")
    (path / "README").unlink()


def test_purge_removes_what_waits(path: Path, run: Command) -> None:
    assert run("purge", path) == (0, "removed 1 item\n", "")
    assert json_of(run("purge", path, "--json")) == 0
    assert (stat(path).depth, stat(path).failed) == (0, 2)


def test_rm_deletes_the_spool_unless_it_is_in_use(path: Path, run: Command) -> None:
    with SpoolWriter(path):
        said = run("rm", path)
        assert (said.code, said.out) == (1, "")
        assert f"process {os.getpid()} has it open as writer" in said.err
        assert stat(path).depth == 1
    assert run("rm", path) == (0, f"removed {path}\n", "")
    assert not path.exists()
    assert run("rm", path).code == 2


def test_rm_tells_no_password_of_a_url(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spoolipc.cli.main.remove", lambda path: None)
    said = run("rm", "nats://me:hidden@host/frames")
    assert (said.code, said.out) == (0, "removed nats:...@host/frames\n")


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("failed list", "the following arguments are required: DIR\n"),
        ("set", "the following arguments are required: DIR\n"),
        ("set x maxsize=-1", "maxsize can be 0, which is none, or more, not '-1'"),
        ("set x size=1", "'size=1' is not NAME=NUMBER, NAME one of maxsize,"),
        ("forward x y --max-bytes much", "'much' is no number of bytes, as 64000000 or 64e6"),
        ("forward x y --max-bytes 1e999", "'1e999' is no number of bytes"),
        ("forward x y --max-bytes 1e-3", "max_bytes must be a whole number from 1"),
    ],
)
def test_wrong_argument_is_told_and_none_that_may_be_left_out(run: Command, command: str, what: str) -> None:
    said = run(command)
    assert (said.code, said.err.count(what)) == (2, 1), said.err


def test_bytes_may_be_given_with_an_exponent(path: Path, run: Command, tmp_path: Path) -> None:
    SpoolWriter(path).close()
    assert run("forward", path, tmp_path / "to", "--max-bytes", "1e6", "--until-empty").code == 0


def test_set_changes_limits_and_shows_them_as_they_can_be_given_again(path: Path, run: Command) -> None:
    said = run("set", path, "maxsize=7", "max_bytes=2000000000")
    assert said == (0, f"maxsize=7 max_bytes=2000000000 recycle_bytes={1 << 30} max_attempts=5\n", "")
    assert run(f"set {path} {said.out}") == run("set", path) == said
    assert json_of(run("set", path, "--json"))["maxsize"] == stat(path).limits.maxsize == 7
    said = run("set", path, f"maxsize={2**63}")
    assert (said.code, said.out) == (2, "")
    assert re.fullmatch(rf"spoolipc: maxsize must be [^\n]* not {2**63}\n", said.err)
    assert stat(path).limits.maxsize == 7


def test_dead_letters_are_shown_once_each(path: Path, run: Command) -> None:
    assert run("failed show", path, 1, 1, 2).out.count("\nitem ") == 1


def test_fsck_says_what_is_wrong_and_what_is_left(path: Path, run: Command) -> None:
    assert run("fsck", path) == (0, f"{path}: clean; 1 item checked, 81.9 KB\n", "")
    (path / item(3)).write_bytes(b"rubbish")
    (path / "README").touch()
    said = run("fsck", path)
    assert said.code == 1
    assert f"{item(3)} " in said.out
    said = run("fsck", path, "--repair")
    assert said.code == 1
    assert ", 1 left" in said.out
    assert f"repaired: {item(3)}" in said.out
    (path / "README").unlink()
    assert json_of(run("fsck", path, "--json"))["clean"]
    assert "damaged" in run("failed list", path).out


@pytest.mark.parametrize("what", ["table", "mode"])
def test_a_repair_that_leaves_nothing_exits_with_zero(path: Path, run: Command, what: str) -> None:
    if what == "table":
        poke(path, "queue_count", 9)
    else:
        path.chmod(0o755)
        said = run("stat", path)
        assert said.code == 1
        assert "is open to others" in said.err
    assert [run("fsck", path, *more).code for more in ([], ["--repair"], [])] == [1, 0, 0]


def test_dead_letters_are_listed_without_what_a_terminal_would_obey(path: Path, run: Command) -> None:
    said = run("failed list", path)
    assert said.code == 0
    assert said.out.splitlines() == [
        "1  81.9 KB  1 attempt  too dark",
        "2  81.9 KB  1 attempt  too\\x1b[31m red\\n",
    ]
    reasons = [letter["reason"] for letter in json_of(run("failed list", path, "--json"))]
    assert reasons == ["too dark", "too\x1b[31m red\n"]


def test_dead_letters_are_shown(path: Path, run: Command) -> None:
    said = run("failed show", path, 1)
    assert said.code == 0
    for part in (
        "item 1: too dark",
        "'image': int64 (100, 100), 80.0 KB",
        "'mask': bool (3,), 3 B",
        '{"camera": 1}',
    ):
        assert part in said.out
    assert run("failed show", path).out.count("\nitem ") == 1
    assert json_of(run("failed show", path, 2, "--json"))[0]["meta"] == {"camera": 2}


def test_dead_letters_are_retried_and_dropped(path: Path, run: Command) -> None:
    said = run("failed retry", path, 2)
    assert said.code == 0
    assert said.out.endswith(" 1 dead letter\n  2 as 4\n")
    (path / "failed" / item_name(1)).write_bytes(b"")
    said = run("failed retry", path)
    assert said.code == 1
    assert said.out.splitlines()[1:] == ["  1 stays, it cannot be read: the file is empty"]
    assert json_of(run("failed drop", path, "--json")) == [1]
    assert run("failed list", path) == (0, "no dead letters\n", "")
    assert peek_table(path).queue == (3, 4)


COMMANDS = {
    "gc": gc,
    "gc --dry-run": lambda path: gc(path, dry_run=True),
    "stat": stat,
    "purge": purge,
    "set": set_limits,
    "fsck": fsck,
    "fsck --repair": lambda path: fsck(path, repair=True),
    "failed list": failed_list,
    "failed show": lambda path: spoolipc.failed_show(path, 1),
    "failed retry": failed_retry,
    "failed drop": failed_drop,
    "rm": remove,
}
"""Each with the function behind it: everything that the command line does a program can do."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_is_no_spool_is_wrong_use_in_one_line(command: str, tmp_path: Path, run: Command) -> None:
    (tmp_path / "file").touch()
    call: Callable[[Path], object] = COMMANDS[command]
    for place in (tmp_path, tmp_path / "nothing", tmp_path / "file", tmp_path / "file" / "spool"):
        with pytest.raises(NotASpool):
            call(place)
        said = run(command, place)
        assert (said.code, said.out) == (2, "")
        assert re.fullmatch(rf"spoolipc: {re.escape(str(place))}: [^\n]+\n", said.err)
    with pytest.raises(NotASpool, match="file/spool: lies in a file"):
        SpoolWriter(tmp_path / "file" / "spool")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("command", ["failed show", "failed retry", "failed drop"])
def test_a_number_that_is_no_dead_letter_is_wrong_use(command: str, path: Path, run: Command) -> None:
    said = run(command, path, 3)
    assert said.code == 2
    assert "has no dead letter 3" in said.err


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "gc",
        "frobnicate x",
        "gc x --nonsense",
        "failed show x seven",
        "failed",
        "set x mode=7",
        "set x maxsize=-1",
    ],
)
def test_wrong_use_says_what_is_expected(arguments: str, run: Command) -> None:
    said = run(arguments)
    assert said.code == 2
    assert "usage: spoolipc" in said.err


@pytest.mark.parametrize(
    "command", ["", "failed", "gc", "stat", "purge", "set", "fsck", *(c for c in COMMANDS if " " in c)]
)
def test_help_of_every_command_is_worth_reading(
    command: str, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = run(command, "--help")
    assert said.code == 0
    assert len(said.out.splitlines()) >= 10
    assert max(map(len, said.out.splitlines())) <= 80
    if command:
        assert "example" in said.out


def test_the_version_is_told(run: Command) -> None:
    said = run("--version")
    assert said.code == 0
    assert re.fullmatch(r"spoolipc \d+\.\d+\.\d+\S*\n", said.out)


def test_sizes_are_readable(path: Path, run: Command) -> None:
    sizes = {
        0: "0 B",
        999: "999 B",
        1000: "1.0 KB",
        54_000_000: "54.0 MB",
        999_949: "999.9 KB",
        999_950: "1.0 MB",
    }
    sizes |= {54 * 10**9: "54.0 GB", 5 * 10**12: "5.0 TB"}
    for size, text in sizes.items():
        os.truncate(path / "failed" / item_name(1), size)
        assert run("failed list", path, 1).out.startswith(f"1  {text}  1 attempt  ")


def test_ages_and_large_numbers_are_readable(path: Path, run: Command) -> None:
    row = peek_table(path).row(3)
    for seconds, text in (
        (250, r"4 min 1\d s"),
        (3610, "1 h 0 min"),
        (11_130, "3 h 5 min"),
        (187_800, "2 d 4 h"),
        (-1000, r"0\.0 s"),
    ):
        poke(path, "put_time", time.time_ns() - seconds * 10**9, row)
        assert re.search(rf"the first put {text} ago", run("stat", path).out)
    before = poke(path, "queue_count", 1_234_567)
    assert re.search("waiting +1,234,567 of 100 items", run("stat", path).out)
    poke(path, "queue_count", before)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "spoolipc", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_it_ends_quietly_when_its_reader_has_enough(path: Path) -> None:
    with start("stat", path) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert out.startswith(str(path))
    with start("stat", path) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode in (0, -signal.SIGPIPE)


EACH = """
import json, runpy, sys
codes = []
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_module("spoolipc", run_name="__main__")
    except SystemExit as ended:
        codes.append(ended.code)
        print("ended with", ended.code)
sys.exit(max(codes))
"""


def run_each(
    commands: Iterable[str], path: Path, redirected: str, **environment: str
) -> tuple[int, bytes, bytes]:
    """Run commands one after another in a new process; returns their highest exit code, and what they printed."""
    words = json.dumps([["spoolipc", *command.split(), str(path)] for command in commands])
    ran = subprocess.run(
        ["sh", "-c", f'exec "$0" -u -c "$1" "$2" {redirected}', sys.executable, EACH, words],
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )
    return ran.returncode, ran.stdout, ran.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_change_neither_what_is_done_nor_the_exit_code(closed: str, path: Path) -> None:
    code, out, err = run_each(COMMANDS, path, closed)
    assert (code, err, path.exists()) == (0, b"", False)
    said = out.split(b"ended with 0\n")[:-1]
    assert len(list(filter(None, said))) == (0 if ">&-" in closed.split() else len(COMMANDS))


def test_report_that_cannot_be_written_is_told_in_one_line(path: Path) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "spoolipc", "stat", str(path)]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr == "spoolipc: what was done cannot be printed: No space left on device\n"


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("caf\u00e9", "ascii:strict"),
        (os.fsdecode(b"\xff\xfe"), "ascii:strict"),
        (os.fsdecode(b"\xff\xfe"), "utf-8:strict"),
        ("two\nlines", "utf-8:strict"),
        ("\x1b[31m", "utf-8:strict"),
    ],
)
def test_strange_paths_are_printed_in_one_line_and_any_encoding(
    name: str, encoding: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.put_many([np.zeros(3), np.ones(3)])
        reader.receive().reject("on purpose")
    commands = ["failed show", "stat --json", "gc --nonsense", "stat", "gc", "fsck", "rm", "stat"]
    _, out, _ = run_each(commands, path, "2>&1", PYTHONIOENCODING=encoding)
    assert b"Traceback" not in out, out.decode(errors="replace")
    assert b"\x1b" not in out
    said = re.split(rb"ended with \d\n", out)
    assert len(said) == len(commands) + 1
    for each in said[3:-1]:
        assert str(tmp_path).encode() in each.splitlines()[0]
        assert b"two\nlines" not in each


@pytest.mark.parametrize("command", COMMANDS)
def test_url_says_why_it_is_not_for_the_command_line(command: str, run: Command) -> None:
    with SpoolWriter("memory://looked-at"):
        said = run(command, "memory://looked-at")
    assert said.code == 2
    assert said.err.splitlines()[-1].endswith(
        "memory://looked-at is in the memory of one process, which alone can look after it"
    )
    assert "'http://host/frames' is no URL that is known" in run(command, "http://host/frames").err


def test_check_of_a_spool_on_servers_is_wrong_use(run: Command) -> None:
    said = run("fsck", "nats://host/frames")
    assert (said.code, said.out) == (2, "")
    assert said.err == "spoolipc: nats://host/frames: is on a server, which has no files to check\n"


@pytest.mark.parametrize("command", [*COMMANDS, "forward"])
def test_help_says_which_commands_take_a_url(command: str, run: Command) -> None:
    takes_one = bool(
        re.search(r"^ +DIR .*the spool's directory, or its URL", run(command, "--help").out, re.M)
    )
    assert takes_one == (not command.startswith("fsck"))


def test_gc_that_built_a_damaged_index_again_says_so_and_exits_with_zero(path: Path, run: Command) -> None:
    (path / "index").write_bytes(b"rubbish" * 10_000)
    said = run("gc", path)
    assert said.code == 0
    assert "index built again" in said.out


def is_in(path: Path, pid: int) -> bool:
    """Whether a process has something below `path` open."""
    descriptors = Path(f"/proc/{pid}/fd")
    for name in os.listdir(descriptors):
        try:
            if (descriptors / name).readlink().is_relative_to(path):
                return True
        except FileNotFoundError:
            continue
    return False


def test_an_interrupt_ends_it_with_130_and_one_line(path: Path) -> None:
    """While it waits for the lock, which a stopped process holds."""
    with Peer(path) as peer:
        peer.run("writer = SpoolWriter(path)")
        stop_in_step(peer)
        try:
            with start("gc", path) as process:
                while not is_in(path, process.pid):
                    os.sched_yield()
                process.send_signal(signal.SIGINT)
                out, err = process.communicate()
            assert (process.returncode, out, err) == (130, "", "spoolipc: interrupted\n")
        finally:
            peer.go()
        peer.answer()
