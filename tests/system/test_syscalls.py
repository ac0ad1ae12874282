"""System calls per put and per get in steady state: what docs/performance.md says they cost, counted by strace."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import median_low

import pytest

pytestmark = pytest.mark.fault

ROUNDS = 20
PROGRAM = """
import contextlib, os, sys
import numpy as np
from spoolipc import SpoolReader, SpoolWriter

path, size, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
array = np.zeros(size, "u1")
batch = [array] * 64


@contextlib.contextmanager
def counted(name):
    with contextlib.suppress(OSError):
        os.stat("/begin " + name)
    yield
    with contextlib.suppress(OSError):
        os.stat("/end " + name)


def lend():
    with writer.loan(size, "u1") as lent:
        lent[0] = 1


def meta():
    with reader.receive() as item:
        item.meta


def receive():
    global item
    item = reader.receive()
    item.array[:0]


def ack():
    global item
    item.ack()
    item = None


with SpoolWriter(path) as writer, SpoolReader(path) as reader:
    pairs = {
        "put": lambda: writer.put(array), "get": reader.get,
        "put again": lambda: writer.put(array), "receive": receive, "ack": ack,
        "put once more": lambda: writer.put(array, meta=1), "receive, look at meta, ack": meta,
        "loan": lend, "get what was lent": reader.get,
        "put_many": lambda: writer.put_many(batch), "get_many": lambda: reader.get_many(64),
    }
    groups = [("put", "get"), ("put again", "receive", "ack"), ("put once more", "receive, look at meta, ack"),
              ("loan", "get what was lent"), ("put_many", "get_many")]
    for group in groups:
        for name in group * 20:
            pairs[name]()
        for _ in range(rounds):
            for name in group:
                with counted(name):
                    pairs[name]()
    for _ in range(rounds):
        with counted("qsize"):
            writer.qsize()
"""
_LINE = re.compile(r"(\d+) +(\w+)\((.*)")
Rounds = dict[str, list[Counter[str]]]
_NOT_OURS = {"futex", "sched_yield", "brk", "madvise", "clock_gettime", "getpid"}


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Rounds]:
    """System calls by name in each round of each operation, by the array's size in bytes."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    return {size: count(tmp_path_factory.mktemp("counts"), size) for size in (1000, 50_000)}


def count(place: Path, size: int) -> Rounds:
    log = place / "log"
    strace = ["strace", "-f", "-qq", "-s", "200", "-e", "signal=none", "-o", str(log)]
    program = [sys.executable, "-W", "error", "-c", PROGRAM, str(place / "spool"), str(size), str(ROUNDS)]
    ran = subprocess.run(strace + program, capture_output=True, text=True, check=False, timeout=150)
    if "ptrace" in ran.stderr:
        pytest.skip(f"strace may not trace here: {ran.stderr.splitlines()[0]}")
    assert ran.returncode == 0, ran.stderr
    found: Rounds = {}
    now: Counter[str] | None = None
    main = ""
    for line in log.read_text().splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        process, call, rest = match.groups()
        mark = re.search(r'"/(begin|end) ([^"]*)"', rest)
        if mark:
            main = process
            now = Counter() if mark[1] == "begin" else None
            if now is not None:
                found.setdefault(mark[2], []).append(now)
        elif now is not None and process == main and call not in _NOT_OURS:
            now[call] += 1
    return found


def each(rounds: list[Counter[str]]) -> dict[str, int]:
    """The median of calls per round: what is done once a second, or once in many rounds, is left out."""
    assert len(rounds) == ROUNDS
    medians = {name: median_low(calls[name] for calls in rounds) for name in sorted(set().union(*rounds))}
    return {name: made for name, made in medians.items() if made}


LOCK = {"flock": 2}
"""Taken and let go."""
LOOKS = {
    "put": 2,
    "put once more": 3,
    "loan": 3,
    "get": 3,
    "get what was lent": 5,
    "receive": 2,
    "look": 1,
    "ack": 1,
}
"""How often a file is looked at: is the index whole, in the step and where something is read before it; is the
item's file the one that is mapped."""

UNMAPPED = {"openat", "pwrite64", "read", "close"}
"""More small files go round in batches than are kept mapped: the others are read and written, once each."""


@pytest.mark.parametrize("size", [1000, 50_000])
class TestEach:
    @pytest.mark.parametrize("name", ["put", "put once more", "loan"])
    def test_put_is_one_lock_and_one_rename(self, counts: dict[int, Rounds], size: int, name: str) -> None:
        assert each(counts[size][name]) == LOCK | {"newfstatat": LOOKS[name], "renameat": 1}

    @pytest.mark.parametrize("name", ["get", "get what was lent"])
    def test_get_is_one_lock_and_one_rename(self, counts: dict[int, Rounds], size: int, name: str) -> None:
        assert each(counts[size][name]) == LOCK | {"newfstatat": LOOKS[name], "renameat": 1}

    def test_receive_and_ack_are_one_lock_each_and_one_rename(
        self, counts: dict[int, Rounds], size: int
    ) -> None:
        assert each(counts[size]["receive"]) == LOCK | {"newfstatat": LOOKS["receive"] + LOOKS["look"]}
        assert each(counts[size]["ack"]) == LOCK | {"newfstatat": LOOKS["ack"], "renameat": 1}

    def test_metadata_is_two_reads_and_no_map(self, counts: dict[int, Rounds], size: int) -> None:
        found = each(counts[size]["receive, look at meta, ack"])
        assert found == {
            "flock": 4,
            "newfstatat": 5,
            "openat": 1,
            "pread64": 2,
            "close": 1,
            "renameat": 1,
        }

    def test_batch_of_64_is_one_lock(self, counts: dict[int, Rounds], size: int) -> None:
        """Two for a put_many of what is given out as views: consumed files are reserved in a step of their own."""
        put, got = each(counts[size]["put_many"]), each(counts[size]["get_many"])
        assert put["flock"] == (2 if size < 16384 else 4)
        assert (got["flock"], put["renameat"], got["renameat"]) == (2, 64, 64)
        assert 64 <= put["newfstatat"] <= 70
        assert 64 <= got["newfstatat"] <= 70
        assert set(put) | set(got) <= {"flock", "newfstatat", "renameat"} | UNMAPPED
        assert all(calls[name] <= 64 for calls in (put, got) for name in UNMAPPED & set(calls))

    def test_nothing_is_rung_when_nobody_waits(self, counts: dict[int, Rounds], size: int) -> None:
        singly = {name: calls for name, calls in counts[size].items() if "many" not in name}
        assert not any("write" in call for calls in singly.values() for call in each(calls))

    def test_qsize_takes_no_lock(self, counts: dict[int, Rounds], size: int) -> None:
        assert each(counts[size]["qsize"]) == {"newfstatat": 1}
