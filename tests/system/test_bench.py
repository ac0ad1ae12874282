"""The benchmarks measure what they say: every array arrives whole, every figure is there. No test looks at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from spoolipc.bench import BenchResult, bench
from spoolipc.benchlinks import QueueLink, RingLink, SpoolLink
from spoolipc.benchpair import WINDOW, MakeLink, Measured, Pair, compare

from spoolipc import cli

ROOT = Path(__file__).parent.parent
TINY = 8_000


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the package of the peers importable, here and in spawned processes."""
    monkeypatch.syspath_prepend(str(ROOT))


def test_bench_measures_all_three_both_ways(tmp_path: Path) -> None:
    result = bench(tmp_path, sizes=(TINY,), rounds=2, seconds=0.001)
    assert len(result.results) == 3 * 2
    assert not [one for one in result.results if one.error]
    assert all(len(one.seconds) == 2 and min(one.seconds) > 0 for one in result.results)
    assert result.machine["numpy"] == np.__version__
    assert json.loads(json.dumps(result.as_dict()))["results"][0]["nbytes"] == TINY
    assert not list(tmp_path.iterdir()), "it left something behind"


def test_bench_table_has_a_row_for_each_kind_and_size() -> None:
    found = [
        Measured(carrier, "", kind, 1_000_000, (scale * 1e-3,))
        for kind in ("one way", "round trip")
        for carrier, scale in (("limit", 1), ("spoolipc", 2), ("multiprocessing.Queue", 50))
    ]
    lines = BenchResult({}, tuple(found)).table().splitlines()
    assert len(lines) == 2 + 2
    assert lines[2].startswith("| one way | 1 MB | 1 ms | 2 ms | 50 ms | 0.50 | 25.00 |")


def test_bench_refuses_an_array_of_nothing() -> None:
    with pytest.raises(ValueError, match="one float64"):
        bench(sizes=(4,))


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_prints_what_bench_returns(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    found = BenchResult({"cpu": "?"}, (Measured("spoolipc", "", "one way", 1_000, (1e-6,)),))

    def stand_in(directory: str, *, quick: bool) -> BenchResult:
        asked.append((directory, quick))
        return found

    monkeypatch.setattr("spoolipc.bench.bench", stand_in)
    assert cli.main(["bench", "/data", "--quick", *(["--json"] if as_json else [])]) == 0
    assert asked == [("/data", True)]
    said = capsys.readouterr().out
    assert json.loads(said)["machine"] == {"cpu": "?"} if as_json else said == found.table() + "\n"


@pytest.mark.parametrize("make", [RingLink, QueueLink, SpoolLink])
@pytest.mark.parametrize("nbytes", [1_000, 200_000])
def test_arrays_arrive_whole_and_in_order(make: MakeLink, nbytes: int, tmp_path: Path) -> None:
    link = make(tmp_path, nbytes, WINDOW)
    pass_and_compare(link, nbytes)


def pass_and_compare(link: Any, nbytes: int) -> None:
    """Send a window of different arrays and compare each with what arrives."""
    receiver, sender = link.receiver(), link.sender()
    rng = np.random.default_rng(1)
    sent = [rng.random(nbytes // 8) for _ in range(WINDOW // 2)]
    got: list[Any] = []
    for _ in range(2):
        for array in sent:
            sender.send(array)
        for _ in sent:
            receiver.receive(lambda array: got.append(array.copy()))
    assert len(got) == 2 * len(sent)
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


@pytest.mark.usefixtures("benchmarks")
def test_every_peer_says_how_it_is_used_and_whether_it_is_here() -> None:
    from benchmarks.carriers import CARRIERS

    assert len({one.name for one in CARRIERS}) == len(CARRIERS) >= 14
    for one in CARRIERS:
        assert one.usage
        assert one.url
        assert one.missing() is None or one.package in (one.missing() or "")


@pytest.mark.usefixtures("benchmarks")
def test_every_peer_installed_carries_arrays_whole(tmp_path: Path) -> None:
    from benchmarks.carriers import CARRIERS

    here = {(one.name, "memory"): one.make for one in CARRIERS if not one.missing() and not one.apart}
    found = compare(here, TINY, tmp_path, rounds=1, seconds=0.001)
    assert {one.carrier: one.error for one in found if one.error} == {}
    assert len(found) == 2 * len(here)


@pytest.mark.usefixtures("benchmarks")
def test_a_run_fills_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import __main__ as program
    from benchmarks import report

    out = tmp_path / "run.json"
    asked = "--only limit spoolipc multiprocessing.Queue --parts transfers variants --rounds 1".split()
    sizes = ["--quick", "--sizes", "1000", "--seconds", "0.001", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *asked, *sizes])
    program.main()
    assert "1 KB round trip" in capsys.readouterr().out
    run = json.loads(out.read_text())
    assert "failed" not in run
    document = report.fill((ROOT / "docs" / "performance.md").read_text(), run)
    assert "| **spoolipc** |" in document
    assert document.count("<!-- end -->") == (ROOT / "docs" / "performance.md").read_text().count(
        "<!-- end -->"
    )
    assert report.fill(document, run) == document


@pytest.mark.usefixtures("benchmarks")
def test_the_small_measures_have_their_figures(tmp_path: Path) -> None:
    from benchmarks.backlog import backlog
    from benchmarks.crowd import crowd
    from benchmarks.memory import memory
    from benchmarks.wake import wake

    assert wake(tmp_path, 3)["spoolipc"]["count"] == 3
    rows = backlog(tmp_path, (0, 100), 10)
    assert [row["waiting"] for row in rows] == [0, 100]
    found = crowd(tmp_path, 3, 2, TINY, 60, 8)
    assert found["per_second"] > 0
    assert found["longest_lock_wait"] >= 0
    assert memory(tmp_path, 20, 100_000)["last"]["producer resident"] > 0
