"""The index may be lost, truncated or overwritten at any time: no item is lost with it, and none is delivered twice."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.account import names_in
from support.damage import item_name, picture, refused
from support.faults import Injector, fail, forked
from support.peek import COUNTS, HEADER_BYTES, POSITIONS, RECORDS, poke
from support.peer import Peer
from support.waits import LOOK_OFTEN, start_waiting, until

from spoolipc import (
    Empty,
    NotASpool,
    SpoolError,
    SpoolReader,
    SpoolWriter,
    StorageError,
    UnknownVersion,
    failed_list,
    fsck,
    gc,
    stat,
)

LAST = 9
WAITING = list(range(4, LAST + 1))
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Where many spools are made, for speed."""


def array(number: int) -> np.ndarray[Any, Any]:
    """Small ones and large ones in turn."""
    return np.full(20_000 if number % 2 else 10, number)


@pytest.fixture
def path(spool: Path) -> Path:
    """A spool of nine items: 1 and 2 were delivered, 3 is a dead letter, the others wait."""
    fill(spool)
    return spool


def fill(place: Path) -> None:
    with SpoolWriter(place) as writer, SpoolReader(place) as reader:
        for number in range(1, LAST + 1):
            assert writer.put(array(number)) == number
        for _ in range(2):
            reader.get(timeout=5)
        reader.receive(timeout=5).reject("no")


def size(path: Path) -> int:
    return (path / "index").stat().st_size


def truncate(path: Path, left: int) -> None:
    os.truncate(path / "index", left)


def overwrite(path: Path, data: bytes) -> None:
    """Other bytes in the very same file, which others have mapped."""
    with open(path / "index", "r+b") as file:
        file.write(data)


def replace(path: Path, data: bytes) -> None:
    """Another file in its place."""
    (path / "other").write_bytes(data)
    (path / "other").chmod(0o600)
    (path / "other").rename(path / "index")


HARMS: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: (path / "index").unlink(),
    "truncated to nothing": lambda path: truncate(path, 0),
    "truncated to a byte": lambda path: truncate(path, 1),
    "truncated to a page": lambda path: truncate(path, 4096),
    "truncated to its header": lambda path: truncate(path, HEADER_BYTES),
    "truncated to half": lambda path: truncate(path, size(path) // 2),
    "short of a word": lambda path: truncate(path, size(path) - 8),
    "zero-filled": lambda path: overwrite(path, bytes(size(path))),
    "zero-filled at first": lambda path: overwrite(path, bytes(4096)),
    "random": lambda path: overwrite(path, random.Random(1).randbytes(size(path))),
    "replaced by random bytes": lambda path: replace(path, random.Random(2).randbytes(size(path))),
    "without its magic": lambda path: poke(path, "magic", 0),
    "of another capacity": lambda path: poke(path, "capacity", 2**40),
    "with a torn journal": lambda path: (poke(path, "journal_length", 2**63), poke(path, "transition", 1)),
    "with a journal that leads astray": lambda path: (
        poke(path, "journal_length", 1),
        poke(path, "journal", 2**40),
        poke(path, "transition", 1),
    ),
    "with an unknown transition": lambda path: poke(path, "transition", 2**63),
}
NUMBERED = HARMS | {"with another next number": lambda path: poke(path, "next_seq", 5)}
"""What is noticed at the latest when a number is given."""
OUTSIDE = HARMS | {"of another boot": lambda path: poke(path, "boot", 1)}
"""What may be found on opening: a boot ends with all who have it mapped."""


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


def look(path: Path) -> None:
    """What finds the index as it is, and leaves it so."""
    before = picture(path)
    for call in (stat, failed_list, fsck):
        call(path)
    assert picture(path) == before


def repair(path: Path) -> None:
    assert fsck(path, repair=True).clean


def test_an_index_is_built_again_by_a_process_that_may_use_little_memory(path: Path) -> None:
    overwrite(path, bytes(4096))

    def work() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20),) * 2)
        SpoolReader(path).close()

    assert forked(work) == 0


@pytest.mark.parametrize("call", [look, gc, repair])
@pytest.mark.parametrize("how", OUTSIDE)
def test_a_damaged_index_stops_no_tool_and_is_built_again_when_the_spool_is_opened(
    path: Path, how: str, call: Callable[[Path], object]
) -> None:
    OUTSIDE[how](path)
    call(path)
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        assert writer.put(array(LAST + 1)) == LAST + 1
        assert drained(reader) == [*WAITING, LAST + 1]
        assert stat(path).failed == 1
        assert [letter.seq for letter in failed_list(path)] == [3]


@pytest.mark.parametrize("how", HARMS)
def test_a_damaged_index_is_built_again_while_it_is_mapped_by_several(path: Path, how: str) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader, Peer(path) as peer:
        peer.run("writer, reader = SpoolWriter(path), SpoolReader(path)")
        assert int(reader.get(timeout=5)[0]) == WAITING[0]
        HARMS[how](path)
        assert writer.put(array(LAST + 1)) == LAST + 1
        assert reader.peek(timeout=5).seq == WAITING[1]
        expected = [*WAITING[1:], LAST + 1]
        assert peer.ask(f"[int(reader.get(timeout=5)[0]) for _ in range({len(expected)})]") == expected
        HARMS[how](path)
        assert peer.ask("reader.qsize()") == 0
        assert drained(reader) == []
        assert peer.ask(f"writer.put(np.full(10, {LAST + 2}))") == LAST + 2
        assert int(reader.get_nowait()[0]) == LAST + 2
        peer.run("writer.close(); reader.close()")


@pytest.mark.parametrize("how", HARMS)
def test_what_was_in_flight_is_delivered_again_unless_it_can_still_be_acknowledged(
    path: Path, how: str
) -> None:
    with SpoolReader(path) as reader, SpoolReader(path) as other:
        mine = reader.receive(timeout=5)
        seen = mine.array
        HARMS[how](path)
        got = drained(other)
        if got == WAITING:
            with pytest.raises(SpoolError):
                mine.ack()
        else:  # new: its record could still be read
            assert got == WAITING[1:]
            mine.ack()
        assert np.array_equal(seen, array(WAITING[0]))


WAITED_THROUGH = pytest.mark.parametrize(
    "how", ["truncated to nothing", "truncated to a page", "zero-filled", "deleted"]
)


@WAITED_THROUGH
def test_reader_that_waits_survives_and_gets_the_next_item(spool: Path, how: str) -> None:
    with SpoolWriter(spool) as writer, Peer(spool) as peer:
        peer.run(f"{LOOK_OFTEN}; reader = SpoolReader(path)")
        start_waiting(peer, "int(reader.get(timeout=20)[0])")
        HARMS[how](spool)
        until(lambda: not stat(spool).index_damage)  # by itself it looks, and repairs what it finds
        writer.put(np.full(3, 5))
        assert peer.answer() == 5
        peer.run("reader.close()")


@WAITED_THROUGH
def test_writer_that_waits_survives_and_puts_when_there_is_room(spool: Path, how: str) -> None:
    with SpoolReader(spool, maxsize=1) as reader, Peer(spool) as peer:
        peer.run("writer = SpoolWriter(path); writer.put(np.full(3, 1))")
        start_waiting(peer, "writer.put(np.full(3, 2), timeout=20)")
        HARMS[how](spool)
        assert int(reader.get(timeout=20)[0]) == 1
        assert peer.answer() == 2
        assert int(reader.get(timeout=20)[0]) == 2
        peer.run("writer.close()")


def test_an_index_of_another_boot_has_no_say_about_times(path: Path) -> None:
    with SpoolReader(path) as reader:
        reader.receive(timeout=5).nack(delay=1000)
    poke(path, "boot", 1)
    with SpoolReader(path) as reader:
        assert drained(reader) == WAITING


@pytest.mark.parametrize("how", NUMBERED)
def test_no_number_of_a_file_that_is_there_is_given_again(path: Path, how: str) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in WAITING:
            reader.receive(timeout=5).reject("no")
        NUMBERED[how](path)
        there = names_in(path, "failed")
        assert item_name(writer.put(array(0))) not in there
        assert len(failed_list(path)) == len(there) == stat(path).failed == len(WAITING) + 1


def test_the_number_of_an_item_that_was_delivered_is_not_given_again_while_its_file_is_there(
    path: Path,
) -> None:
    with SpoolReader(path) as reader:
        assert drained(reader) == WAITING
        (path / "index").unlink()
        with SpoolWriter(path) as writer:
            assert writer.put(array(0)) == LAST + 1


def test_an_unknown_version_is_an_error_and_nothing_is_changed(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        known = poke(path, "version", 99)
        refused(path, UnknownVersion, "version 99", fsck, lambda place: fsck(place, repair=True))
        before = picture(path)
        for call in (lambda: writer.put(array(1)), lambda: reader.get(timeout=5)):
            with pytest.raises(UnknownVersion):
                call()
        assert picture(path) == before
        poke(path, "version", known)
        assert drained(reader) == WAITING


@pytest.mark.damaged
@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b"\xff\xfe", b"{}", b'{"format": 2}', b"[" * 60_000, bytes(80), None]
)
def test_a_spool_json_that_is_damaged_or_of_an_unknown_format_is_a_clear_error(
    path: Path, text: bytes | None
) -> None:
    place = path / "spool.json"
    place.write_bytes(place.read_bytes().replace(b'"format": ', b'"format": 9') if text is None else text)
    error, said = (UnknownVersion, "format 9") if text is None else (NotASpool, r"spool\.json")
    refused(path, error, said, failed_list)


def test_a_missing_spool_json_is_a_clear_error_and_repaired(path: Path) -> None:
    (path / "spool.json").unlink()
    calls: list[Callable[[Path], Any]] = [stat, gc, failed_list, SpoolWriter, SpoolReader]
    for call in calls:
        with pytest.raises(NotASpool, match=r"spool\.json; run: spoolipc fsck --repair"):
            call(path)
    assert fsck(path, repair=True).clean
    with SpoolReader(path) as reader:
        assert drained(reader) == WAITING


@pytest.mark.parametrize("count", [2, WAITING[1]])
@pytest.mark.parametrize("in_use", [False, True])
def test_another_spools_index_costs_no_item(path: Path, tmp_path: Path, count: int, in_use: bool) -> None:
    """Without a repair it must be seen to be another one: the next number it gives is that of an item here."""
    other = tmp_path / "other"
    with SpoolWriter(other) as writer:
        for number in range(count):
            writer.put(array(number))
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(SpoolReader(path)) if in_use else None
        shutil.copy(other / "index", tmp_path / "foreign")
        os.replace(tmp_path / "foreign", path / "index")
        if not in_use or count == 2:
            assert fsck(path, repair=True).clean
        writer = stack.enter_context(SpoolWriter(path))
        assert writer.put(array(LAST + 1)) == LAST + 1
        assert drained(reader or stack.enter_context(SpoolReader(path))) == [*WAITING, LAST + 1]


@pytest.mark.parametrize("state", [1, 2, 77])
def test_a_shutdown_that_only_the_index_knows_costs_no_item(path: Path, state: int) -> None:
    with SpoolReader(path) as reader:
        poke(path, "shutdown", state)
        poke(path, "housekeeping_time", 0)
        got = []
        with contextlib.suppress(SpoolError):
            got.append(int(reader.get(timeout=5)[0]))
        gc(path)
        assert fsck(path, repair=True).clean
        assert got + drained(reader) == WAITING


VALUES = (
    st.integers(0, 2**64 - 1)
    | st.integers(0, 12)
    | st.sampled_from(RECORDS)
    | st.sampled_from([2**64 - 1, 2**63, 2**32, RECORDS[0] - 1])
)


@pytest.mark.usefixtures("unverified")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(
        st.sampled_from(COUNTS) | st.sampled_from(POSITIONS), VALUES, min_size=1, max_size=6
    ),
    mapped=st.booleans(),
)
def test_random_words_in_the_index_cost_no_item(values: dict[int, int], mapped: bool) -> None:
    """At most a clear error, until fsck: then every item is delivered once, or a dead letter."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        place = Path(folder) / "spool"
        fill(place)
        got: list[int] = []
        put = list(WAITING)

        def scribble() -> None:
            for position, value in values.items():
                poke(place, position, value)

        def attempt(call: Callable[[], object]) -> None:
            with contextlib.suppress(SpoolError):
                call()

        def work() -> None:
            with SpoolWriter(place) as writer, SpoolReader(place) as reader:
                if mapped:
                    scribble()
                for number in (20, 21):
                    with contextlib.suppress(SpoolError):
                        writer.put(array(number), block=False)
                        put.append(number)
                for _ in range(3):
                    attempt(lambda: got.append(int(reader.get_nowait()[0])))
                attempt(lambda: reader.receive(block=False).nack())

        if not mapped:
            scribble()
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


def test_an_index_that_cannot_be_built_again_now_is_left_as_it_is(path: Path) -> None:
    """It still tells which numbers were given."""
    poke(path, "boot", 1)
    before = (path / "index").read_bytes()
    with (
        Injector(lambda event: event.name == "allocate" and fail(errno.EIO)(event)),
        pytest.raises(StorageError),
    ):
        SpoolReader(path)
    assert (path / "index").read_bytes() == before
    with SpoolWriter(path) as writer:
        assert writer.put(array(LAST + 1)) == LAST + 1


def test_an_index_and_a_spool_json_that_are_both_lost_are_a_clear_error(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        overwrite(path, bytes(size(path)))
        (path / "spool.json").rename(path.parent / "kept")
        for call in (lambda: writer.put(array(20)), reader.get_nowait):
            with pytest.raises(SpoolError):
                call()
        (path.parent / "kept").rename(path / "spool.json")
        assert drained(reader) == WAITING


def test_qsize_empty_and_full_follow_an_index_that_another_process_built_again(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        maxsize = writer.maxsize
        before = reader.qsize()
        (path / "index").unlink()
        with Peer(path) as peer:
            peer.run(f"with SpoolReader(path) as reader: reader.get_many({before})")
            assert reader.qsize() == writer.qsize() == 0
            assert reader.empty()
            peer.run("set_limits(path, maxsize=1)\nimport os\nos.unlink(path + '/index')")
            peer.run("with SpoolWriter(path) as writer: writer.put(np.zeros(3))")
            assert writer.full()
            assert not reader.empty()
            assert maxsize != writer.maxsize == 1
