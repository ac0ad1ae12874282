"""The index may be lost, torn or overwritten at any time: no item is lost with it, and none is delivered twice."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dying import check, picture, poke, words_of
from hypothesis import given, settings
from hypothesis import strategies as st
from support.peer import Peer

from spoolipc import (
    Empty,
    NotASpool,
    SpoolError,
    SpoolReader,
    SpoolWriter,
    UnknownVersion,
    failed_list,
    fsck,
    gc,
    stat,
)
from spoolipc import words as W
from spoolipc.layout import item_number

LAST = 9
WAITING = list(range(4, LAST + 1))
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where many spools are made, for speed."""


def array(number: int) -> np.ndarray[Any, Any]:
    """Small ones and large ones in turn."""
    return np.full(20_000 if number % 2 else 10, number)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A spool of nine items: 1 and 2 were delivered, 3 is a dead letter, the others wait."""
    place = tmp_path / "spool"
    fill(place)
    return place


def fill(place: Path) -> None:
    with SpoolWriter(place) as writer, SpoolReader(place) as reader:
        for number in range(1, LAST + 1):
            assert writer.put(array(number)) == number
        for _ in range(2):
            reader.get(timeout=5)
        reader.receive(timeout=5).reject("no")


def overwrite(path: Path, data: bytes) -> None:
    """Other bytes in the very same file, which others have mapped."""
    with open(path / "index", "r+b") as file:
        file.write(data)


def size(path: Path) -> int:
    return (path / "index").stat().st_size


def replace_by_garbage(path: Path) -> None:
    (path / "garbage").write_bytes(random.Random(2).randbytes(size(path)))
    (path / "garbage").rename(path / "index")
    (path / "index").chmod(0o600)


HARMS: dict[str, Callable[[Path], None]] = {
    "deleted": lambda path: (path / "index").unlink(),
    "truncated to nothing": lambda path: os.truncate(path / "index", 0),
    "truncated to a byte": lambda path: os.truncate(path / "index", 1),
    "truncated to a page": lambda path: os.truncate(path / "index", 4096),
    "truncated to its header": lambda path: os.truncate(path / "index", W.HEADER * W.WORD),
    "truncated to half": lambda path: os.truncate(path / "index", size(path) // 2),
    "short of a word": lambda path: os.truncate(path / "index", size(path) - 8),
    "zero-filled": lambda path: overwrite(path, bytes(size(path))),
    "zero-filled at first": lambda path: overwrite(path, bytes(4096)),
    "random": lambda path: overwrite(path, random.Random(1).randbytes(size(path))),
    "replaced by random bytes": replace_by_garbage,
    "without its magic": lambda path: poke(path, {W.MAGIC: 0}),
    "of another capacity": lambda path: poke(path, {W.CAPACITY: 2**40}),
    "with a torn journal": lambda path: poke(path, {W.STORES: 2**63, W.MARK: W.MEMORY}),
    "with an unknown mark": lambda path: poke(path, {W.MARK: 2**63}),
}
OTHER_BOOT: dict[str, Callable[[Path], None]] = {
    "of another boot": lambda path: poke(path, {W.BOOT: 1, W.BOOT + 1: 2}),
}


def drained(reader: SpoolReader) -> list[int]:
    got: list[int] = []
    while True:
        try:
            found = reader.get_nowait()
        except Empty:
            return got
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, array(int(found[0])))
        got.append(int(found[0]))


@pytest.mark.parametrize("how", [*HARMS, *OTHER_BOOT])
def test_a_damaged_index_is_built_again_when_the_spool_is_opened(path: Path, how: str) -> None:
    (HARMS | OTHER_BOOT)[how](path)
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        assert writer.put(array(LAST + 1)) == LAST + 1
        assert drained(reader) == [*WAITING, LAST + 1]
        assert stat(path).failed == 1
        assert [letter.seq for letter in failed_list(path)] == [3]
    check(path)


@pytest.mark.parametrize("how", HARMS)
def test_a_damaged_index_is_built_again_while_it_is_mapped(path: Path, how: str) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader, SpoolReader(path) as other:
        assert int(reader.get(timeout=5)[0]) == WAITING[0]
        HARMS[how](path)
        assert writer.put(array(LAST + 1)) == LAST + 1
        assert reader.peek(timeout=5).seq == WAITING[1]
        assert drained(other) == [*WAITING[1:], LAST + 1]
        HARMS[how](path)
        assert reader.qsize() == 0
        assert drained(reader) == []
        assert writer.put(array(LAST + 2)) == LAST + 2
        assert drained(reader) == [LAST + 2]
    check(path)


@pytest.mark.parametrize("how", HARMS)
def test_what_a_reader_had_in_hand_is_delivered_again(path: Path, how: str) -> None:
    with SpoolReader(path) as reader, SpoolReader(path) as other:
        item = reader.receive(timeout=5)
        seen = item.array
        HARMS[how](path)
        assert drained(other) == WAITING
        with pytest.raises(SpoolError):
            item.ack()
        assert np.array_equal(seen, array(WAITING[0]))
    check(path)


def test_a_damaged_index_is_built_again_under_another_process(path: Path) -> None:
    with Peer(path) as peer, SpoolWriter(path) as writer:
        peer.run("writer, reader = SpoolWriter(path), SpoolReader(path)")
        expected = list(WAITING)
        for number, how in enumerate(HARMS, LAST + 1):
            HARMS[how](path)
            if number % 2:
                assert writer.put(array(number)) == number
            else:
                assert peer.ask(f"writer.put(np.full(10, {number}))") == number
            expected.append(number)
            assert peer.ask("int(reader.get(timeout=5)[0])") == expected.pop(0)
        peer.run("writer.close(); reader.close()")
    with SpoolReader(path) as reader:
        assert drained(reader) == expected
    check(path)


@pytest.mark.parametrize("how", HARMS)
def test_a_sleeping_reader_wakes_though_the_index_is_damaged(path: Path, how: str) -> None:
    with SpoolReader(path) as reader:
        drained(reader)
    with Peer(path) as peer:
        peer.run("reader = SpoolReader(path)")
        peer.start("ask", "int(reader.get(timeout=20)[0])")
        while not any(words_of(path)[W.ITEM_FLAGS : W.ITEM_FLAGS + 8]):
            os.sched_yield()
        HARMS[how](path)
        with SpoolWriter(path) as writer:
            writer.put(array(LAST + 1))
        assert peer.answer() == LAST + 1


@pytest.mark.parametrize("how", ["truncated to nothing", "zero-filled"])
def test_a_reader_outlives_an_index_that_is_damaged_while_it_sleeps(path: Path, how: str) -> None:
    """Nobody else repairs it: the sleeper itself looks at the clock, finds it and goes on."""
    with SpoolReader(path) as reader:
        drained(reader)
    with Peer(path) as peer:
        peer.run("reader = SpoolReader(path)")
        peer.run(
            "def outlive():\n"
            "    try:\n"
            "        reader.get(timeout=1.5)\n"
            "    except Empty:\n"
            "        return 'empty'"
        )
        peer.start("ask", "outlive()")
        while not any(words_of(path)[W.ITEM_FLAGS : W.ITEM_FLAGS + 8]):
            os.sched_yield()
        HARMS[how](path)
        assert peer.answer() == "empty"


@pytest.mark.parametrize("call", [stat, failed_list, gc, fsck])
@pytest.mark.parametrize("how", [*HARMS, *OTHER_BOOT])
def test_the_tools_cope_with_a_damaged_index(path: Path, how: str, call: Callable[[Path], object]) -> None:
    (HARMS | OTHER_BOOT)[how](path)
    call(path)
    assert fsck(path, repair=True).clean
    with SpoolReader(path) as reader:
        assert drained(reader) == WAITING


@pytest.mark.parametrize("how", HARMS)
def test_no_number_of_a_file_that_is_there_is_given_again(path: Path, how: str) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in WAITING:
            reader.receive(timeout=5).reject("no")
        HARMS[how](path)
        there = {number for name in os.listdir(path / "failed") if (number := item_number(name))}
        assert writer.put(array(0)) not in there
        assert len(failed_list(path)) == len(there) == stat(path).failed == len(WAITING) + 1


def test_an_unknown_version_is_an_error_and_nothing_is_changed(path: Path) -> None:
    poke(path, {W.VERSION: 99})
    before = picture(path)
    calls: list[Callable[[Path], Any]] = [SpoolReader, SpoolWriter, stat, fsck, gc]
    for call in calls:
        with pytest.raises(UnknownVersion, match="version 99"):
            call(path)
        assert picture(path) == before
    with pytest.raises(UnknownVersion):
        fsck(path, repair=True)
    assert picture(path) == before
    poke(path, {W.VERSION: W.VERSION_VALUE})
    with SpoolReader(path) as reader:
        assert drained(reader) == WAITING


def test_an_unknown_version_found_while_mapped_is_an_error_and_nothing_is_changed(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        reader.get(timeout=5)
        before = sorted(os.listdir(path / "items"))
        poke(path, {W.VERSION: 99})
        index = (path / "index").read_bytes()
        for call in (lambda: writer.put(array(1)), lambda: reader.get(timeout=5)):
            with pytest.raises(UnknownVersion):
                call()
        assert sorted(os.listdir(path / "items")) == before
        assert (path / "index").read_bytes() == index
        poke(path, {W.VERSION: W.VERSION_VALUE})
        assert drained(reader) == WAITING[1:]


def test_a_spool_of_an_unknown_format_is_an_error_and_nothing_is_changed(path: Path) -> None:
    text = (path / "spool.json").read_text()
    (path / "spool.json").write_text(text.replace('"format": 1', '"format": 2'))
    before = picture(path)
    calls: list[Callable[[Path], Any]] = [SpoolReader, SpoolWriter, stat, gc]
    for call in calls:
        with pytest.raises(UnknownVersion, match="format 2"):
            call(path)
    assert picture(path) == before


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b"\xff\xfe", b"{}", b'{"format": 1}', b"[" * 60_000, bytes(80)]
)
def test_a_damaged_spool_json_is_a_clear_error(path: Path, text: bytes) -> None:
    (path / "spool.json").write_bytes(text)
    before = picture(path)
    calls: list[Callable[[Path], Any]] = [SpoolReader, SpoolWriter, stat, gc, failed_list]
    for call in calls:
        with pytest.raises(NotASpool, match=r"spool\.json"):
            call(path)
    assert picture(path) == before


def test_a_missing_spool_json_is_a_clear_error_to_those_who_do_not_create(path: Path) -> None:
    (path / "spool.json").unlink()
    calls: list[Callable[[Path], Any]] = [stat, gc, fsck, failed_list]
    for call in calls:
        with pytest.raises(NotASpool, match=r"spool\.json"):
            call(path)
    with SpoolReader(path) as reader:  # it is made again around the items
        assert drained(reader) == WAITING


def test_another_spools_index_costs_no_item(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with SpoolWriter(other) as writer:
        writer.put(array(1))
        writer.put(array(2))
    shutil.copy(other / "index", tmp_path / "foreign")
    os.replace(tmp_path / "foreign", path / "index")
    assert fsck(path, repair=True).clean
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        assert writer.put(array(LAST + 1)) == LAST + 1
        assert drained(reader) == [*WAITING, LAST + 1]
    check(path)


@pytest.mark.parametrize("state", [W.DRAINING, W.DISCARDED, 77])
def test_a_shutdown_that_only_the_index_knows_costs_no_item(path: Path, state: int) -> None:
    with SpoolReader(path) as reader:
        poke(path, {W.SHUTDOWN: state, W.TENDED: 0})
        got = []
        with contextlib.suppress(SpoolError):
            got.append(int(reader.get(timeout=5)[0]))
        gc(path)
        assert fsck(path, repair=True).clean
        assert got + drained(reader) == WAITING
    check(path)


def test_another_spools_index_lets_no_put_overwrite_an_item(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with SpoolWriter(other) as writer:
        for number in range(WAITING[1]):
            writer.put(array(number))
    with SpoolReader(path) as reader:
        shutil.copy(other / "index", tmp_path / "foreign")
        os.replace(tmp_path / "foreign", path / "index")
        with SpoolWriter(path) as writer:
            assert writer.put(array(LAST + 1)) == LAST + 1
        assert drained(reader) == [*WAITING, LAST + 1]


POSITIONS = st.sampled_from(range(W.MARK, 64)) | st.integers(W.MARK, W.HEADER + 12 * W.RECORD - 1)
VALUES = (
    st.integers(0, 2**64 - 1)
    | st.integers(0, 12)
    | st.integers(0, 12).map(lambda number: W.HEADER + number * W.RECORD)
    | st.sampled_from([2**64 - 1, 2**63, 2**32, W.HEADER - 1])
)


@settings(max_examples=60, deadline=None)
@given(values=st.dictionaries(POSITIONS, VALUES, min_size=1, max_size=6), mapped=st.booleans())
def test_random_words_in_the_index_cost_no_item(values: dict[int, int], mapped: bool) -> None:
    """At most a clear error, until fsck: then every item is delivered once, or a dead letter."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        place = Path(folder) / "spool"
        fill(place)
        got: list[int] = []
        put = list(WAITING)
        if not mapped:
            poke(place, values)

        def attempt(call: Callable[[], object]) -> None:
            with contextlib.suppress(SpoolError):
                call()

        def work() -> None:
            with SpoolWriter(place) as writer, SpoolReader(place) as reader:
                if mapped:
                    poke(place, values)
                for number in (20, 21):
                    with contextlib.suppress(SpoolError):
                        writer.put(array(number), block=False)
                        put.append(number)
                for _ in range(3):
                    attempt(lambda: got.append(int(reader.get_nowait()[0])))
                attempt(lambda: reader.receive(block=False).nack())

        attempt(work)
        attempt(lambda: gc(place))
        attempt(lambda: stat(place))
        fsck(place, repair=True)
        assert fsck(place).problems == ()
        with SpoolWriter(place, reopen=True), SpoolReader(place) as reader:
            got += drained(reader)
        letters = failed_list(place)  # one that seemed to be at its last attempt is kept there
        kept = [int(np.load(letter.path)[0]) for letter in letters]
        assert sorted(got + kept) == sorted([3, *put])
        assert stat(place).failed == len(letters)
