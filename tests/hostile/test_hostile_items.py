"""A bad item file costs that one item: it ends in failed/ with its reason, and the next one comes.

How many ways there are of being bad is shown in tests/unit; here is one for each place where it may be noticed.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.damage import crafted, fields, item
from support.peer import Peer

from spoolipc import BadItem, Empty, SpoolReader, SpoolWriter, UnknownVersion, failed_list, stat

LARGE = 100_000
GOOD = 7.0
MEBIBYTE = 2**20
FOOTER = b"SPOOLFTR"
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where many spools are made, for speed."""


def trap(victim: Path) -> bytes:
    """A pickle that makes the file `victim` when it is loaded."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (victim,)

    return pickle.dumps([Trap()])


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


GREEDY: dict[str, Callable[[bytes, Path], bytes]] = {
    "header of 10 MB": lambda data, _: crafted(fields(shape=(1,)).ljust(10 * MEBIBYTE), bytes(8), 2),
    "header said to be of 4 GB": lambda data, _: b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + data[12:],
    "shape of 2^60": lambda data, _: crafted(fields(shape=(2**60,)), bytes(80)),
    "element of 2^31 bytes": lambda data, _: crafted(fields("|S2147483647", shape=(1,)), b""),
    "nested literal bomb": lambda data, _: crafted("(" * 9000 + ")" * 900, b""),
}
HARMS: dict[str, Callable[[bytes, Path], bytes]] = GREEDY | {
    "truncated in its header": lambda data, _: data[:70],
    "truncated in its data": lambda data, _: data[: 128 + 40],
    "truncated in its footer": lambda data, _: data[: data.rindex(FOOTER) + 20],
    "empty": lambda data, _: b"",
    "one byte": lambda data, _: data[:1],
    "random bytes": lambda data, _: random.Random(1).randbytes(len(data)),
    "shape larger than the file": lambda data, _: crafted(fields(shape=(11,)), bytes(80)),
    "pickle inside": lambda data, victim: crafted(fields("|O", shape=(1,)), trap(victim)),
    "code in the header": lambda data, victim: crafted(
        f"open({str(victim)!r}, 'w') or {fields()}", bytes(16)
    ),
    "no footer": lambda data, _: data[: data.rindex(FOOTER)],
    "footer with a flipped bit": lambda data, _: flipped(data, data.rindex(FOOTER) + 20),
    "footer of another offset": lambda data, _: crafted(fields(), bytes(16), end=512),
}


def harm(path: Path, seq: int, how: str, victim: Path) -> None:
    """Put another file in the place of a waiting item's."""
    place = path / item(seq)
    data = HARMS[how](place.read_bytes(), victim)
    place.unlink()
    place.write_bytes(data)
    place.chmod(0o600)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file that code in an item would make."""
    yield tmp_path / "victim"
    assert not (tmp_path / "victim").exists()


def test_crafted_items_are_good_where_their_header_is(spool: Path) -> None:
    """So that what the others refuse is not their footer."""
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        seq = writer.put(np.zeros(3))
        (spool / item(seq)).write_bytes(crafted(fields(), bytes(16)))
        assert np.array_equal(reader.get(timeout=5), np.zeros(2))


def get(reader: SpoolReader) -> Any:
    return reader.get(timeout=5)


def get_many(reader: SpoolReader) -> Any:
    (array,) = reader.get_many(8, timeout=5)
    return array


def receive(reader: SpoolReader) -> Any:
    """Work through items; what is damaged says so when its arrays are asked for."""
    bad = reader.receive(timeout=5)
    with pytest.raises(BadItem):
        bad.array  # noqa: B018
    assert bad.settled
    with reader.receive(timeout=5) as one:
        return one.array


def peek(reader: SpoolReader) -> Any:
    reader.peek(timeout=5)
    return reader.get(timeout=5)


@pytest.mark.parametrize(("take", "count"), [(get, 10), (get_many, LARGE), (receive, LARGE), (peek, 10)])
@pytest.mark.parametrize("how", HARMS)
def test_a_bad_file_costs_that_item_only(
    spool: Path,
    victim: Path,
    how: str,
    take: Callable[[SpoolReader], Any],
    count: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        bad = writer.put(np.zeros(count))
        writer.put(np.full(count, GOOD))
        harm(spool, bad, how, victim)
        with caplog.at_level(logging.WARNING, "spoolipc"):
            assert np.array_equal(take(reader), np.full(count, GOOD))
            with pytest.raises(Empty):
                reader.get_nowait()
        (letter,) = failed_list(spool)
        assert letter.seq == bad
        assert letter.reason.startswith("damaged: ")
        assert stat(spool).failed == 1
        (said,) = [record.getMessage() for record in caplog.records]
        assert f"item {bad} is now in failed/: damaged: " in said
        writer.put(np.zeros(count))  # and everything goes on
        assert not get(reader).any()


def test_many_bad_files_in_a_row_keep_nothing_back(spool: Path, victim: Path) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        for number, how in enumerate(HARMS):
            harm(spool, writer.put(np.zeros(1000)), how, victim)
            writer.put(np.full(1000, number))
        got = [int(array[0]) for array in reader.get_many(1000, timeout=5)]
        got += [int(reader.get(timeout=5)[0]) for _ in range(len(HARMS) - len(got))]
        assert got == list(range(len(HARMS)))
    assert stat(spool).failed == len(HARMS)


MEASURE = """
import tracemalloc
def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
def measured():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = status("VmRSS")
    tracemalloc.start()
    got = float(reader.get(timeout=5)[0])
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return got, allocated, status("VmHWM") - before
"""


@pytest.mark.parametrize("reader", ["SpoolReader(path)", "SpoolReader(path, verify=True)"])
def test_memory_stays_bounded_whatever_a_file_claims(spool: Path, victim: Path, reader: str) -> None:
    with SpoolWriter(spool) as writer, Peer(spool) as peer:
        peer.run(f"{MEASURE}\nreader = {reader}")
        for how in ("one byte", *GREEDY):  # the first so that all is loaded
            harm(spool, writer.put(np.zeros(10)), how, victim)
            writer.put(np.full(10, GOOD))
            got, allocated, grown = peer.ask("measured()")
            assert got == GOOD
            assert how == "one byte" or max(allocated, grown) < 6 * MEBIBYTE, (how, allocated, grown)
    assert stat(spool).failed == 1 + len(GREEDY)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["header", "data", "footer"]), st.integers(0, 127), st.binary(min_size=1, max_size=6)
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(
    edits=EDITS | st.binary(max_size=400),
    cut=st.none() | st.integers(0, 500),
    count=st.sampled_from([10, 3000]),
    checksum=st.booleans(),
)
def test_a_mutated_item_is_delivered_or_quarantined(
    edits: list[tuple[str, int, bytes]] | bytes, cut: int | None, count: int, checksum: bool
) -> None:
    """edits: bytes at places of a part, or the whole file; cut: so many bytes off its end."""
    with (
        tempfile.TemporaryDirectory(dir=MEMORY) as folder,
        SpoolWriter(path := Path(folder, "spool"), checksum=checksum) as writer,
        SpoolReader(path, verify=checksum) as reader,
    ):
        original = np.arange(count, dtype=float)
        bad = writer.put(original, meta={"number": 1})
        writer.put(np.full(3, GOOD))
        data = bytearray((path / item(bad)).read_bytes())
        starts = {"header": 0, "data": 128, "footer": data.rindex(FOOTER)}
        if isinstance(edits, bytes):
            data[:] = edits
        else:
            for part, at, text in edits:
                at = min(starts[part] + at, len(data))
                data[at : at + len(text)] = text
        (path / item(bad)).unlink()
        (path / item(bad)).write_bytes(data if cut is None else data[:-cut])
        try:
            got = get(reader)
        except UnknownVersion:  # it says that it is of a later release, and stays
            assert (path / item(bad)).exists()
            return
        if letters := failed_list(path):
            assert letters[0].reason.startswith("damaged: ")
        else:
            assert isinstance(got, np.ndarray)
            assert not checksum or got.tobytes() == original.tobytes()
            got = get(reader)
        assert np.array_equal(got, np.full(3, GOOD))
        with pytest.raises(Empty):
            reader.get_nowait()
