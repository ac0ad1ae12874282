"""System calls per put and per get in the steady state: what docs/performance.md says they cost, counted by strace."""

from __future__ import annotations

import re
from collections import Counter
from statistics import median_low

import pytest
from support.strace import strace

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


def loan():
    with writer.loan(size, "u1") as lent:
        lent[0] = 1


def look_at_meta():
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
    groups = [
        {"put": lambda: writer.put(array), "get": reader.get},
        {"put for receive": lambda: writer.put(array), "receive, array": receive, "ack": ack},
        {"put, meta": lambda: writer.put(array, meta=1), "receive, meta, ack": look_at_meta},
        {"loan": loan, "get what was lent": reader.get},
        {"put_many": lambda: writer.put_many(batch), "get_many": lambda: reader.get_many(64)},
        {"qsize": writer.qsize},
    ]
    for group in groups:
        for do in [*group.values()] * 20:
            do()
        for name, do in [*group.items()] * rounds:
            with counted(name):
                do()
"""
COUNTS = {
    "put": {"flock": 2, "newfstatat": 2, "renameat": 1},
    "put for receive": {"flock": 2, "newfstatat": 2, "renameat": 1},
    "put, meta": {"flock": 2, "newfstatat": 2, "renameat": 1},
    "loan": {"flock": 2, "lseek": 1, "newfstatat": 2, "renameat": 1},
    "get": {"flock": 2, "lseek": 1, "newfstatat": 2, "renameat": 1},
    "get what was lent": {"flock": 2, "lseek": 1, "newfstatat": 2, "renameat": 1},
    "receive, array": {"flock": 2, "lseek": 1, "newfstatat": 2},
    "ack": {"flock": 2, "newfstatat": 1, "renameat": 1},
    "receive, meta, ack": {
        "flock": 4,
        "lseek": 1,
        "newfstatat": 3,
        "openat": 1,
        "pread64": 2,
        "close": 1,
        "renameat": 1,
    },
    "qsize": {"newfstatat": 1},
}
"""A step takes the lock and releases it, moves one file, and looks: is the table whole, in the step and where something
is read before it; is the item's file the one that is mapped. Nobody waits, so nothing is written to wake anybody."""
UNMAPPED = {"openat", "pwrite64", "read", "close"}
"""More small files go round in batches than are kept mapped: the others are read and written, once each."""
NOT_OURS = {"futex", "sched_yield", "brk", "madvise", "clock_gettime", "getpid"}
LINE = re.compile(r'(\d+) +(\w+)\((?:.*"/(begin|end) ([^"]*)")?')
Rounds = dict[str, list[Counter[str]]]


@pytest.fixture(scope="module", params=[1000, 50_000])
def counted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Rounds]:
    """The array's size in bytes, and the system calls by name in each round of each operation."""
    place = tmp_path_factory.mktemp("counts")
    ran, lines = strace(place, PROGRAM, args=(request.param, ROUNDS))
    assert ran.returncode == 0, ran.stderr
    found: Rounds = {}
    now: Counter[str] | None = None
    main = ""
    for match in filter(None, map(LINE.match, lines)):
        process, call, mark, name = match.groups()
        if mark:
            main, now = process, Counter() if mark == "begin" else None
            if now is not None:
                found.setdefault(name, []).append(now)
        elif now is not None and process == main and call not in NOT_OURS:
            now[call] += 1
    return request.param, found


def each(rounds: list[Counter[str]]) -> dict[str, int]:
    """The median of calls per round: what is done once a second, or once in many rounds, is left out."""
    assert len(rounds) == ROUNDS
    medians = {name: median_low(calls[name] for calls in rounds) for name in set().union(*rounds)}
    return {name: made for name, made in medians.items() if made}


@pytest.mark.parametrize("name", COUNTS)
def test_a_call_costs_the_system_calls_it_is_said_to(counted: tuple[int, Rounds], name: str) -> None:
    assert each(counted[1][name]) == COUNTS[name]


def test_a_batch_of_64_takes_the_lock_once(counted: tuple[int, Rounds]) -> None:
    """Twice for a put_many of what is given out as views: consumed files are reserved in a step of their own."""
    size, rounds = counted
    put, got = each(rounds["put_many"]), each(rounds["get_many"])
    assert (put["flock"], got["flock"]) == (2 if size < 16384 else 4, 2)
    assert (put["renameat"], got["renameat"]) == (64, 64)
    assert 64 <= min(put["newfstatat"], got["newfstatat"]) <= max(put["newfstatat"], got["newfstatat"]) <= 70
    assert set(put) | set(got) <= {"flock", "lseek", "newfstatat", "renameat"} | UNMAPPED
    assert all(calls.get(name, 0) <= 64 for calls in (put, got) for name in UNMAPPED)
