"""A bad item file costs that one item: it ends in failed/ with its reason, and the next one comes."""

from __future__ import annotations

import logging
import os
import pickle
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.peer import Peer

from spoolipc import BadItem, Empty, SpoolReader, SpoolWriter, failed_list, footer, fsck, gc, stat
from spoolipc.layout import item_name

SIZES = (10, 100_000)
"""Floats in an item: copied out when small, mapped when large."""
GOOD = 7.0
MEBIBYTE = 2**20
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where many spools are made, for speed."""


def block(text: str, data: bytes = b"", *, version: int = 1) -> bytes:
    """An NPY block with this header text, its data at a multiple of 64 bytes."""
    width = 2 if version == 1 else 4
    start = 8 + width
    raw = text.encode("utf-8")
    raw += b" " * (-(start + len(raw) + 1) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(raw).to_bytes(width, "little") + raw + data


def described(shape: str, descr: str = "'<f8'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


def with_footer(body: bytes, **said: Any) -> bytes:
    """Such bytes, with a footer that vouches for them."""
    return body + footer.pack(len(body), 0, **said)


def trap(victim: Path) -> bytes:
    """A pickle that makes the file `victim` when it is loaded."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (victim,)

    return pickle.dumps([Trap()])


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


HARMS: dict[str, Callable[[bytes, Path], bytes]] = {
    "truncated in its header": lambda data, _: data[:70],
    "truncated in its data": lambda data, _: data[: 128 + 40],
    "truncated in its footer": lambda data, _: data[: data.rindex(footer.MAGIC) + 20],
    "empty": lambda data, _: b"",
    "one byte": lambda data, _: data[:1],
    "zeros": lambda data, _: bytes(len(data)),
    "random bytes": lambda data, _: random.Random(1).randbytes(len(data)),
    "wrong magic": lambda data, _: b"\x93NUMPX" + data[6:],
    "unknown NPY version": lambda data, _: data[:6] + b"\x09" + data[7:],
    "header of 10 MB": lambda data, _: with_footer(
        block(described("(1,)") + " " * (10 * MEBIBYTE), bytes(8), version=2)
    ),
    "header said to be of 4 GB": lambda data, _: b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + data[12:],
    "shape of 2^60": lambda data, _: with_footer(block(described(f"({2**60},)"), bytes(80))),
    "bytes of 2^60": lambda data, _: with_footer(block(described(f"({2**60},)", "'|u1'"), bytes(80))),
    "shape that overflows": lambda data, _: with_footer(block(described(f"({2**40}, {2**40})"), bytes(80))),
    "shape of nothing by 2^62": lambda data, _: with_footer(block(described(f"(0, {2**62}, {2**62})"))),
    "negative shape": lambda data, _: with_footer(block(described("(-1,)"), bytes(80))),
    "shape of booleans": lambda data, _: with_footer(block(described("(True,)"), bytes(8))),
    "shape larger than the file": lambda data, _: with_footer(block(described("(11,)"), bytes(80))),
    "element of 2^31 bytes": lambda data, _: with_footer(block(described("(1,)", "'|S2147483647'"))),
    "pickle inside": lambda data, victim: with_footer(block(described("(1,)", "'|O'"), trap(victim))),
    "pickle in a field": lambda data, victim: with_footer(
        block(described("(1,)", "[('a', '<f8'), ('b', '|O')]"), trap(victim))
    ),
    "bare pickle": lambda data, victim: trap(victim),
    "code in the header": lambda data, victim: with_footer(
        block(f"open({str(victim)!r}, 'w') or {described('(1,)')}", bytes(8))
    ),
    "code in the shape": lambda data, victim: with_footer(
        block(described(f"(open({str(victim)!r}, 'w').fileno(),)"), bytes(8))
    ),
    "nested literal bomb": lambda data, _: with_footer(block("(" * 9000 + ")" * 900)),
    "nested list bomb": lambda data, _: with_footer(block("[" * 95 + "1," * 3000 + "]" * 95)),
    "footer of very many names": lambda data, _: with_footer(
        data[: data.rindex(footer.MAGIC)], names=[f"{n:x}" for n in range(100_000)]
    ),
    "chain of signs": lambda data, _: with_footer(block("-" * 9000 + "1")),
    "nested dtype bomb": lambda data, _: with_footer(
        block(described("(1,)", "[('a'," * 90 + "'<f8'" + ")]" * 90), bytes(8))
    ),
    "header that is no literal": lambda data, _: with_footer(block("{'descr'")),
    "header that is no dict": lambda data, _: with_footer(block("[1, 2]")),
    "header that is no text": lambda data, _: data[:10] + b"\x00\xff" * 40 + data[90:],
    "no footer": lambda data, _: data[: data.rindex(footer.MAGIC)],
    "footer of another magic": lambda data, _: flipped(data, data.rindex(footer.MAGIC)),
    "footer with a flipped bit": lambda data, _: flipped(data, data.rindex(footer.MAGIC) + 20),
    "footer of another offset": lambda data, _: data[: data.rindex(footer.MAGIC)] + footer.pack(64, 0),
    "footer with more names than arrays": lambda data, _: with_footer(
        block(described("(1,)"), bytes(8)), names=["a", "b"]
    ),
}


def harm(path: Path, seq: int, how: str, victim: Path) -> None:
    """Put another file in the place of a waiting item's."""
    place = path / "items" / item_name(seq)
    data = HARMS[how](place.read_bytes(), victim)
    place.unlink()
    place.write_bytes(data)
    place.chmod(0o600)


def get(reader: SpoolReader) -> list[Any]:
    return [reader.get(timeout=5)]


def get_many(reader: SpoolReader) -> list[Any]:
    return list(reader.get_many(8, timeout=5))


def receive(reader: SpoolReader) -> list[Any]:
    """Work through items; what is damaged says so when its arrays are asked for."""
    bad = reader.receive(timeout=5)
    with pytest.raises(BadItem):
        bad.array  # noqa: B018
    assert bad.settled
    with reader.receive(timeout=5) as item:
        return [item.array]


def peek(reader: SpoolReader) -> list[Any]:
    assert reader.peek(timeout=5).seq in (1, 2)
    return [reader.get(timeout=5)]


TAKERS = ((get, 10), (get_many, 100_000), (receive, 100_000), (peek, 10))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that code in an item would make."""
    return tmp_path / "victim"


@pytest.mark.parametrize(("take", "count"), TAKERS)
@pytest.mark.parametrize("how", HARMS)
def test_a_bad_file_costs_that_item_only(
    path: Path,
    victim: Path,
    how: str,
    take: Callable[[SpoolReader], list[Any]],
    count: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        bad = writer.put(np.zeros(count))
        writer.put(np.full(count, GOOD))
        harm(path, bad, how, victim)
        with caplog.at_level(logging.WARNING, "spoolipc"):
            (array,) = take(reader)
            assert np.array_equal(array, np.full(count, GOOD))
            with pytest.raises(Empty):
                reader.get_nowait()
        (letter,) = failed_list(path)
        assert letter.seq == bad
        assert letter.reason.startswith("damaged: ")
        assert stat(path).failed == 1
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1
        assert f"item {bad} is now in failed/: damaged: " in said[0]
        assert not victim.exists()
        writer.put(np.zeros(count))  # and everything goes on
        assert not reader.get(timeout=5).any()
    assert fsck(path).problems == ()


def test_bad_files_cost_their_items_only_in_another_process(path: Path, victim: Path) -> None:
    with SpoolWriter(path) as writer, Peer(path) as peer:
        peer.run("reader = SpoolReader(path)")
        for how in HARMS:
            writer.put(np.ones(100))
            bad = writer.put(np.zeros(100))
            writer.put(np.full(100, GOOD))
            harm(path, bad, how, victim)
            assert peer.ask("[float(reader.get(timeout=5)[0]) for _ in range(2)]") == [1.0, GOOD]
            assert failed_list(path)[-1].seq == bad
    assert stat(path).failed == len(HARMS)
    assert not victim.exists()


def test_many_bad_files_in_a_row_keep_nothing_back(path: Path, victim: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for number, how in enumerate(HARMS):
            harm(path, writer.put(np.zeros(1000)), how, victim)
            writer.put(np.full(1000, number))
        got = [int(array[0]) for array in reader.get_many(1000, timeout=5)]
        while len(got) < len(HARMS):
            got.append(int(reader.get(timeout=5)[0]))
        assert got == list(range(len(HARMS)))
    assert stat(path).failed == len(HARMS)


GREEDY = (
    "header of 10 MB",
    "header said to be of 4 GB",
    "shape of 2^60",
    "bytes of 2^60",
    "element of 2^31 bytes",
    "nested literal bomb",
    "nested list bomb",
    "footer of very many names",
)
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


@pytest.mark.parametrize("face", ["SpoolReader(path)", "SpoolReader(path, verify=True)"])
def test_memory_stays_bounded_whatever_a_file_claims(path: Path, victim: Path, face: str) -> None:
    with SpoolWriter(path) as writer, Peer(path) as peer:
        peer.run(f"{MEASURE}\nreader = {face}")
        for how in ("wrong magic", *GREEDY):  # the first so that all is loaded
            harm(path, writer.put(np.zeros(10)), how, victim)
            writer.put(np.full(10, GOOD))
            got, allocated, grown = peer.ask("measured()")
            assert got == GOOD
            most = (
                40 if how == "footer of very many names" else 6
            ) * MEBIBYTE  # Python's own cost of 1 MiB of JSON
            assert how == "wrong magic" or max(allocated, grown) < most, (how, allocated, grown)
    assert stat(path).failed == 1 + len(GREEDY)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("taker", [get, get_many, receive])
def test_every_flipped_bit_of_a_checked_item_is_found(
    path: Path, count: int, taker: Callable[[SpoolReader], list[Any]]
) -> None:
    rng = random.Random(count)
    with SpoolWriter(path, checksum=True) as writer, SpoolReader(path, verify=True) as reader:
        for done in range(12):
            bad = writer.put(np.full(count, 1.5))
            writer.put(np.full(count, GOOD))
            place = path / "items" / item_name(bad)
            data = bytearray(place.read_bytes())
            end = data.rindex(footer.MAGIC)
            at = rng.randrange(128, end + footer.SIZE - 4)  # the last four bytes mean nothing
            data[at] ^= 1 << rng.randrange(8)
            place.write_bytes(data)
            (array,) = taker(reader)
            assert np.array_equal(array, np.full(count, GOOD))
            assert stat(path).failed == done + 1


def test_a_file_that_vanished_costs_that_item_only(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for number in range(3):
            writer.put(np.full(10, number))
        (path / "items" / item_name(2)).unlink()
        assert [reader.get(timeout=5)[0] for _ in range(2)] == [0, 2]
        with pytest.raises(Empty):
            reader.get_nowait()
    gc(path)  # its history
    assert fsck(path).problems == ()


def test_a_file_truncated_in_a_readers_hands_costs_that_item_only(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        bad = writer.put(np.zeros(100_000))
        writer.put(np.full(10, GOOD))
        item = reader.receive(timeout=5)
        os.truncate(path / "items" / item_name(bad), 5000)
        with pytest.raises(BadItem, match="data"):
            item.array  # noqa: B018
        assert reader.get(timeout=5)[0] == GOOD
        assert failed_list(path)[0].seq == bad


def survives(change: Callable[[bytes], bytes], count: int, *, checksum: bool) -> None:
    """With the first item's file changed, it is delivered or quarantined, and the second one comes."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = Path(folder) / "spool"
        with (
            SpoolWriter(path, checksum=checksum) as writer,
            SpoolReader(path, verify=checksum) as reader,
        ):
            original = np.arange(count, dtype=float)
            bad = writer.put(original, meta={"number": 1})
            writer.put(np.full(3, GOOD))
            place = path / "items" / item_name(bad)
            data = change(place.read_bytes())
            place.unlink()
            place.write_bytes(data)
            got = [reader.get(timeout=5)]
            if len(os.listdir(path / "failed")) == 0:
                assert isinstance(got[0], np.ndarray)
                if checksum:
                    assert got[0].tobytes() == original.tobytes()
                got.append(reader.get(timeout=5))
            else:
                (letter,) = failed_list(path)
                assert letter.reason.startswith("damaged: ")
            assert np.array_equal(got[-1], np.full(3, GOOD))
            with pytest.raises(Empty):
                reader.get_nowait()


quick = settings(max_examples=60, deadline=None)


@quick
@given(
    data=st.binary(max_size=400),
    begins=st.sampled_from([b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x76\x00{'descr'"]),
)
def test_random_bytes_are_quarantined(data: bytes, begins: bytes) -> None:
    survives(lambda _: begins + data, 10, checksum=False)


@quick
@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(["header", "data", "footer"]),
            st.integers(0, 127),
            st.binary(min_size=1, max_size=6),
        ),
        min_size=1,
        max_size=4,
    ),
    cut=st.none() | st.integers(0, 500),
    count=st.sampled_from([10, 3000]),
    checksum=st.booleans(),
)
def test_a_mutated_item_is_delivered_or_quarantined(
    edits: list[tuple[str, int, bytes]], cut: int | None, count: int, checksum: bool
) -> None:
    def change(data: bytes) -> bytes:
        starts = {"header": 0, "data": 128, "footer": data.rindex(footer.MAGIC)}
        changed = bytearray(data)
        for part, at, text in edits:
            at = min(starts[part] + at, len(changed))
            changed[at : at + len(text)] = text
        return bytes(changed if cut is None else changed[:-cut])

    survives(change, count, checksum=checksum)


KEYS = st.sampled_from(["descr", "fortran_order", "shape", "other", ""])
LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.text(max_size=6)
    | st.sampled_from(["<f8", "|u1", ">M8[ns]", "|O", "<U3", "|V0", "|S0", "O", "i4,f8"]),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@quick
@given(
    header=LITERALS
    | st.fixed_dictionaries(
        {
            "descr": st.sampled_from(["<f8", "|u1", "|O", "<M8[ns]", [("a", "<f4", (2,))]]) | LITERALS,
            "fortran_order": st.booleans() | LITERALS,
            "shape": st.lists(st.integers(0, 12), max_size=3).map(tuple) | LITERALS,
        }
    ),
    count=st.integers(0, 40),
    version=st.sampled_from([1, 2, 3]),
)
def test_a_hostile_header_with_a_true_footer_is_delivered_or_quarantined(
    header: Any, count: int, version: int
) -> None:
    text = repr(header).encode("latin-1", "backslashreplace").decode("latin-1")
    data = with_footer(block(text, bytes(8 * count), version=version))
    survives(lambda _: data, 10, checksum=False)
