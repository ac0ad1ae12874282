"""The command line says what the functions return, in text or JSON, and its exit code says how it went."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dying import die, picture, poke

import spoolipc
from spoolipc import SpoolReader, SpoolWriter, cli, report
from spoolipc import words as W
from spoolipc.layout import item_name

COMMANDS = ["gc", "stat", "fsck", "failed list", "failed show", "failed retry", "failed drop"]
Out = pytest.CaptureFixture[str]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A spool with items 1 and 2 rejected, item 3 waiting."""
    place = tmp_path / "spool"
    with SpoolWriter(place, maxsize=100) as writer, SpoolReader(place) as reader:
        for number in range(1, 4):
            writer.put(
                {"image": np.full((100, 100), number), "mask": np.ones(3, bool)}, meta={"camera": number}
            )
        reader.receive().reject("too dark")
        reader.receive().reject("too\x1b[31m red\n")
    return place


def run(command: str, *arguments: object) -> int:
    return cli.main([*command.split(), *map(str, arguments)])


def json_of(out: Out, command: str, *arguments: object) -> Any:
    assert run(command, *arguments, "--json") in (0, 1)
    said = out.readouterr()
    assert not said.err
    return json.loads(said.out)


def test_stat_in_text(path: Path, capsys: Out) -> None:
    assert run("stat", path) == 0
    said = capsys.readouterr()
    assert not said.err
    assert re.search(r"waiting +1 of 100 items, the first put \d+\.\d s ago", said.out)
    assert re.search(r"bytes +81\.9 KB", said.out)
    assert re.search(r"failed +2", said.out)
    assert re.search(r"open in +0 readers", said.out)


def test_stat_in_json(path: Path, capsys: Out) -> None:
    said = json_of(capsys, "stat", path)
    assert (said["depth"], said["failed"], said["limits"]["maxsize"]) == (1, 2, 100)


def test_stat_tells_of_a_damaged_index_by_its_exit_code(path: Path, capsys: Out) -> None:
    (path / "index").unlink()
    assert run("stat", path) == 1
    assert "the index is missing" in capsys.readouterr().out


def test_gc_in_text_and_json(path: Path, capsys: Out) -> None:
    assert run("gc", path) == 0
    assert capsys.readouterr().out == f"{path}: nothing left by the dead\n"
    die(
        path,
        "reader, writer = SpoolReader(path), SpoolWriter(path); one = reader.receive()\n"
        "draft = prepare(writer, np.zeros(10**6))",
    )
    (path / "README").touch()
    before = picture(path)
    foreseen = json_of(capsys, "gc", path, "--dry-run")
    assert picture(path) == before
    assert foreseen["dry_run"]
    assert (foreseen["returned_items"], foreseen["temporary_files"], foreseen["stale_parties"]) == (1, 1, 2)
    assert run("gc", path, "--dry-run") == 0
    assert "8.0 MB would be freed" in capsys.readouterr().out
    assert run("gc", path) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"{path}: done; 8.0 MB freed",
        "  1 half-written file of dead writers removed",
        "  1 item taken back from dead readers, to be delivered again",
        "  2 dead processes forgotten",
        "  left alone: 1 is a name that is not the spool's",
    ]
    assert not said.err


def test_fsck_says_what_is_wrong_and_what_is_left(path: Path, capsys: Out) -> None:
    assert run("fsck", path) == 0
    assert capsys.readouterr().out == f"{path}: clean; 1 item checked, 81.9 KB\n"
    (path / "items" / item_name(3)).write_bytes(b"rubbish")
    (path / "README").touch()
    assert run("fsck", path) == 1
    assert f"items/{item_name(3)} " in capsys.readouterr().out
    assert run("fsck", path, "--repair") == 1
    said = capsys.readouterr().out
    assert "2 problems, 1 repaired, 1 left" in said
    assert f"repaired: items/{item_name(3)}" in said
    (path / "README").unlink()
    assert json_of(capsys, "fsck", path)["clean"]
    assert run("failed list", path) == 0
    assert "damaged" in capsys.readouterr().out


def test_fsck_repairs_to_exit_code_zero(path: Path, capsys: Out) -> None:
    poke(path, {W.READY_COUNT: 9})
    assert run("fsck", path) == 1
    assert run("fsck", path, "--repair") == 0
    assert run("fsck", path) == 0


def test_dead_letters_are_listed_without_what_a_terminal_would_obey(path: Path, capsys: Out) -> None:
    assert run("failed list", path) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1  81.9 KB  1 attempt  too dark",
        "2  81.9 KB  1 attempt  too\\x1b[31m red\\n",
    ]
    assert [letter["reason"] for letter in json_of(capsys, "failed list", path)] == [
        "too dark",
        "too\x1b[31m red\n",
    ]


def test_a_dead_letter_is_shown(path: Path, capsys: Out) -> None:
    assert run("failed show", path, 1) == 0
    said = capsys.readouterr().out
    for part in (
        "item 1: too dark",
        "'image': int64 (100, 100), 80.0 KB",
        "'mask': bool (3,), 3 B",
        '{"camera": 1}',
    ):
        assert part in said
    assert run("failed show", path) == 0
    assert capsys.readouterr().out.count("\nitem ") == 1
    assert json_of(capsys, "failed show", path, 2)[0]["meta"] == {"camera": 2}


def test_dead_letters_are_retried_and_dropped(path: Path, capsys: Out) -> None:
    assert run("failed retry", path, 2) == 0
    assert capsys.readouterr().out == "put back 1 dead letter\n  2 as 4\n"
    assert json_of(capsys, "failed drop", path) == [1]
    assert run("failed list", path) == 0
    assert capsys.readouterr().out == "no dead letters\n"
    with SpoolReader(path) as reader:
        assert [reader.receive(timeout=5).seq for _ in range(2)] == [3, 4]


def test_one_that_cannot_be_read_makes_retry_a_problem(path: Path, capsys: Out) -> None:
    (path / "failed" / item_name(1)).write_bytes(b"")
    assert run("failed retry", path) == 1
    assert capsys.readouterr().out.splitlines() == [
        "put back 1 dead letter",
        "  2 as 4",
        "  1 stays, it cannot be read: the file is empty",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_is_no_spool_is_wrong_use_in_one_line(command: str, tmp_path: Path, capsys: Out) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        assert run(command, place) == 2
        said = capsys.readouterr()
        assert not said.out
        assert re.fullmatch(rf"spoolipc: {re.escape(str(place))}: [^\n]+\n", said.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["failed show", "failed retry", "failed drop"])
def test_a_number_that_is_no_dead_letter_is_wrong_use(command: str, path: Path, capsys: Out) -> None:
    assert run(command, path, 3) == 2
    assert "has no dead letter 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", ["", "gc", "frobnicate x", "gc x --nonsense", "failed show x seven", "failed"]
)
def test_wrong_use_says_what_is_expected(arguments: str, capsys: Out) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments.split())
    assert ended.value.code == 2
    assert "usage: spoolipc" in capsys.readouterr().err


def test_a_spool_open_to_others_is_a_problem(path: Path, capsys: Out) -> None:
    path.chmod(0o755)
    assert run("stat", path) == 1
    assert "is open to others" in capsys.readouterr().err
    assert run("fsck", path, "--repair") == 0
    assert run("stat", path) == 0


@pytest.mark.parametrize("command", ["", "failed", *COMMANDS])
def test_help_of_every_command_is_worth_reading(
    command: str, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        run(command, "--help")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) >= 10
    assert max(map(len, said.splitlines())) <= 80
    if command:
        assert "example" in said


def test_the_version_is_told(capsys: Out) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"spoolipc \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_an_interrupt_ends_it_quietly(path: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "stat", interrupted)
    assert run("stat", path) == 130
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "spoolipc", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_it_runs_as_a_module_and_ends_quietly_when_its_reader_has_enough(path: Path) -> None:
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


def test_a_real_interrupt_exits_with_130(path: Path) -> None:
    """While it waits for the index lock, which a stopped process holds."""
    holder_program = (
        "import os, signal, sys\nfrom spoolipc import SpoolWriter\nwriter = SpoolWriter(sys.argv[1])\n"
        "def stop(party):\n    print(flush=True)\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "writer._sink.party.run(stop)\n"
    )
    command = [sys.executable, "-c", holder_program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            os.waitid(os.P_PID, holder.pid, os.WSTOPPED)
            with start("gc", path) as process:
                while "index.lock" not in open_files(process.pid):
                    os.sched_yield()
                process.send_signal(signal.SIGINT)
                _, err = process.communicate()
            assert (process.returncode, err) == (130, "")
        finally:
            holder.send_signal(signal.SIGCONT)


def open_files(pid: int) -> set[str]:
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.add(os.path.basename(os.readlink(f"/proc/{pid}/fd/{name}")))
        except OSError:
            continue
    return found


def test_everything_it_does_a_program_can_do() -> None:
    names = {"gc", "stat", "fsck", "failed_list", "failed_show", "failed_retry", "failed_drop"}
    assert names <= set(spoolipc.__all__)
    assert all(callable(getattr(spoolipc, name)) for name in names)


def test_sizes_durations_and_counts_are_readable() -> None:
    assert [report.size(n) for n in (0, 999, 1000, 54_000_000, 999_949, 999_950, 10**15 * 5)] == [
        "0 B", "999 B", "1.0 KB", "54.0 MB", "999.9 KB", "1.0 MB", "5000.0 TB",
    ]  # fmt: skip
    assert [report.duration(s) for s in (0.04, 59.94, 250, 3600, 11_100, 187_200)] == [
        "0.0 s", "59.9 s", "4 min 10 s", "1 h 0 min", "3 h 5 min", "2 d 4 h",
    ]  # fmt: skip
    assert [report.count(n, w) for n, w in ((1, "item"), (2000, "item"), (2, "history"), (3, "dead process"))] == [
        "1 item", "2,000 items", "2 histories", "3 dead processes",
    ]  # fmt: skip
