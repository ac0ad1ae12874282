"""The benchmarks measure what they say: every array arrives whole, every figure is there. No test looks at a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.waits import until

from benchmarks import __main__ as everything
from benchmarks import compare as trees
from benchmarks import measures, report
from benchmarks.backlog import backlog
from benchmarks.carriers import CARRIERS
from benchmarks.carriers.own import QueueLink, RingLink, SpoolLink
from benchmarks.crowd import crowd
from benchmarks.memory import memory
from benchmarks.pair import WINDOW, MakeLink, Pair, compare
from benchmarks.wake import wake
from spoolipc.cli import bench as cli_bench
from spoolipc.cli import main as cli
from spoolipc.cli import text

ROOT = Path(__file__).parents[2]
TINY = 8_000


def test_the_command_measures_all_three_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_bench, "SIZES", (10**6,))
    assert cli.main(["bench", str(tmp_path), "--quick", "--json"]) == 0
    assert not list(tmp_path.iterdir()), "it left something behind"
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["numpy"] == np.__version__
    assert [(one["kind"], one["carrier"], one["nbytes"]) for one in found["results"]] == [
        (kind, carrier, 10**6) for kind in ("one way", "round trip") for carrier in cli_bench.CARRIERS
    ]
    assert all(len(one["seconds"]) == 2 and min(one["seconds"]) > 0 for one in found["results"])
    monkeypatch.setattr(cli_bench, "bench", lambda *_, **options: found)
    assert cli.main(["bench", "--quick"]) == 0
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["| one way", "1,000"], ["| round trip", "1,000"]]


def children(pid: int) -> list[str]:
    return [
        child
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]


def semaphores(pid: int) -> list[Path]:
    """Files of named semaphores that a process has mapped."""
    return [
        Path(line.split()[-1])
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "/sem." in line
    ]


def imports(pid: str) -> bool:
    """Whether a process that was started to measure has begun to import what it needs."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        is_one = b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()  # and not just forked
        return is_one and "/numpy/" in Path(f"/proc/{pid}/maps").read_text()
    return False


@pytest.mark.parametrize(
    ("number", "amid"),
    [(signal.SIGINT, "the start"), (signal.SIGINT, "an import"), (signal.SIGTERM, "a measurement")],
)
def test_the_command_stopped_by_a_signal_leaves_nothing_and_says_one_line(
    number: signal.Signals, amid: str, tmp_path: Path
) -> None:
    """Ctrl-C reaches the processes that it started as well, while they start and while they measure."""
    command = [sys.executable, "-m", "spoolipc", "bench", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        # The first child is the one that looks after the semaphores.
        until(lambda: len(children(process.pid)) > (6 if amid == "a measurement" else 1))
        if amid == "an import":
            until(lambda: any(map(imports, children(process.pid))))
        elif amid == "a measurement":
            until(lambda: list(tmp_path.glob("*/spoolipc.*/items/*")))
        left = semaphores(process.pid)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=50)
    said = (130, "spoolipc: interrupted\n") if number == signal.SIGINT else (143, "")
    assert (process.returncode, out, err) == (said[0], "", said[1])
    assert [path for path in left if path.exists()] == []
    assert not list(tmp_path.iterdir()), "it left something behind"


def test_the_command_refuses_what_is_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "nothing", tmp_path / "file"):
        assert cli.main(["bench", str(place)]) == 2
        assert (
            capsys.readouterr().err == f"spoolipc: {place}: is not a directory that spools can be made in\n"
        )


class FalseRing(cli_bench.Ring):
    """Changes what it carries."""

    def put(self, array: Any) -> None:
        super().put(array + 1)


def test_the_command_ends_with_the_reason_when_an_array_arrives_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_bench, "SIZES", (TINY,))
    monkeypatch.setattr(cli_bench, "CARRIERS", {"false": lambda path, nbytes: (FalseRing(nbytes),) * 2})
    assert cli.main(["bench", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "spoolipc: an array could not be passed: a damaged array arrived\n"
    assert not list(tmp_path.iterdir()), "it left something behind"


def test_the_table_shows_medians_and_ratios_to_the_spool() -> None:
    each = zip(cli_bench.CARRIERS, (2e-3, 50e-3, 1e-3), strict=True)
    rows = [
        {"carrier": name, "kind": "one way", "nbytes": 10**6, "seconds": [2 * s, s, 0.0]} for name, s in each
    ]
    assert text.bench_lines(rows)[2:] == [
        "| one way | 1,000 | 2,000 (1.00) | 50,000 (25.00) | 1,000 (0.50) |"
    ]


@pytest.mark.parametrize("make", [RingLink, QueueLink, SpoolLink])
@pytest.mark.parametrize("nbytes", [1_000, 200_000])
def test_arrays_arrive_whole_and_in_order(make: MakeLink, nbytes: int, tmp_path: Path) -> None:
    link = make(tmp_path, nbytes, WINDOW)
    receiver, sender = link.receiver(), link.sender()
    rng = np.random.default_rng(1)
    sent = [rng.random(nbytes // 8) for _ in range(WINDOW // 2)]
    got: list[Any] = []
    for _ in range(2):
        for array in sent:
            sender.send(array)
        for _ in sent:
            receiver.receive(lambda array: got.append(array.copy()))
    for expected, array in zip(sent * 2, got, strict=True):
        np.testing.assert_array_equal(array, expected)
    sender.close()
    receiver.close()
    link.close()


class DeafLink(SpoolLink):
    """A carrier whose receiver cannot be opened."""

    def receiver(self) -> Any:
        raise OSError("no ears")


def test_a_carrier_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    links: dict[tuple[str, str], MakeLink] = {("deaf", ""): DeafLink, ("spoolipc", ""): SpoolLink}
    found = compare(links, TINY, tmp_path, rounds=1, seconds=0.001, kinds=["one way"])
    deaf, spool = sorted(found, key=lambda one: one.carrier)
    assert deaf.error is not None
    assert "no ears" in deaf.error
    assert spool.error is None
    assert len(spool.seconds) == 1


class FalseLink(SpoolLink):
    """A carrier that changes what it carries."""

    def sender(self) -> Any:
        inner = super().sender()
        send = inner.send
        inner.send = lambda array: send(array + 1)  # type: ignore[method-assign]
        return inner


def test_a_damaged_array_is_noticed(tmp_path: Path) -> None:
    pair = Pair(FalseLink, TINY, tmp_path)
    try:
        with pytest.raises(RuntimeError, match="a damaged array arrived"):
            pair.measure("one way", 1, 0)
    finally:
        pair.close()


def test_every_peer_says_how_it_is_used_and_whether_it_is_here() -> None:
    assert len({one.name for one in CARRIERS}) == len(CARRIERS) >= 14
    for one in CARRIERS:
        assert one.usage
        assert one.url
        assert one.missing() is None or one.package in (one.missing() or "")


@pytest.mark.exhaustive
def test_every_peer_installed_carries_arrays_whole(tmp_path: Path) -> None:
    here = {(one.name, "memory"): one.make for one in CARRIERS if not one.missing() and not one.apart}
    found = compare(here, TINY, tmp_path, rounds=1, seconds=0.001)
    assert {one.carrier: one.error for one in found if one.error} == {}
    assert len(found) == 2 * len(here)


@pytest.mark.exhaustive
def test_a_run_fills_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.json"
    asked = "--only limit spoolipc multiprocessing.Queue --parts transfers variants --rounds 1".split()
    sizes = ["--quick", "--sizes", "1000", "--seconds", "0.001", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *asked, *sizes])
    everything.main()
    assert "1 KB round trip" in capsys.readouterr().out
    run = json.loads(out.read_text())
    assert "failed" not in run
    before = (ROOT / "docs" / "performance.md").read_text()
    document = report.fill(before, run)
    assert "| **spoolipc** |" in document
    assert document.count("<!-- end -->") == before.count("<!-- end -->")
    assert report.fill(document, run) == document


@pytest.mark.exhaustive
def test_the_small_measures_have_their_figures(tmp_path: Path) -> None:
    assert wake(tmp_path, 3)["spoolipc"]["count"] == 3
    rows = backlog(tmp_path, (0, 100), 10)
    assert [row["waiting"] for row in rows] == [0, 100]
    found = crowd(tmp_path, 3, 2, TINY, 60, 8)
    assert found["per_second"] > 0
    assert found["longest_lock_wait"] > 0
    assert memory(tmp_path, 20, 100_000)["last"]["producer resident"] > 0


@pytest.mark.exhaustive
def test_every_measurement_has_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"BATCH": 0.001, "WAKES": 3, "WRITERS": 2, "READERS": 2, "EACH": 9}
    for name, value in few.items():
        monkeypatch.setattr(measures, name, value)
    for number, name in enumerate(measures.NAMES):
        if "54 MB" not in name:
            with measures.measurement(name, str(tmp_path / str(number))) as batch:
                assert min(batch()) > 0


@pytest.mark.exhaustive
def test_two_trees_are_compared_by_the_same_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "STARTS", 1)
    names = [measures.NAMES[0], measures.WAKE]
    rows = trees.compare((ROOT, ROOT), names, rounds=2)
    assert [row["name"] for row in rows if "error" in row or row["ratio"] <= 0] == []
    assert [row["name"] for row in rows] == [*names, f"{measures.WAKE}, p99"]
    assert all(len(row["rounds"][0]) == 2 for row in rows if "rounds" in row)


def test_a_tree_that_fails_is_named_and_no_other_is_measured_in_its_place(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    (broken / "spoolipc").mkdir(parents=True)
    (broken / "spoolipc" / "__init__.py").write_text("SpoolReader = SpoolWriter = None\n")
    name = measures.NAMES[0]
    (row,) = trees.compare((ROOT, broken), [name], rounds=1)
    assert row["error"].startswith(f"{broken}: TypeError")
    (row,) = trees.compare((ROOT, tmp_path), [name], rounds=1)
    assert f"{tmp_path} was to be measured, not" in row["error"]
    assert "failed" in trees.table([row])
