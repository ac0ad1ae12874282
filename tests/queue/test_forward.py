"""A forwarder between directories: what arrives, what stays, and what it does when it cannot go on."""

from __future__ import annotations

import errno
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.calls import Call
from support.faults import Event, Injector
from support.forwards import drained, fill
from support.mounts import tmpfs
from support.waits import until

from spoolipc import (
    Full,
    NotASpool,
    Queue,
    ShutDown,
    SpoolInUse,
    SpoolReader,
    SpoolWriter,
    StorageError,
    UnsafeSpool,
    UnsupportedOperation,
    failed_list,
    forward,
    gc,
    stat,
)
from spoolipc.cli.main import main
from spoolipc.connect import connect
from spoolipc.directory.forwarding import DirectoryDestination, DirectorySource
from spoolipc.engine import ConsumerOptions, ProducerOptions
from spoolipc.message import NOW, Ack, Message


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "destination"


def names_of(path: Path) -> list[str]:
    return sorted(os.listdir(path / "items"))


# What arrives


def test_every_kind_of_item_arrives_as_it_was_put_and_in_order(source: Path, destination: Path) -> None:
    kinds: list[Any] = [
        np.float32(3.0) * np.ones(()),
        np.zeros((0, 3), "i2"),
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.arange(300_000, dtype="f8"),
        {"image": np.ones((2, 2), "u1"), "depth": np.array([1.5])},
        np.array([("a", 1)], dtype=[("name", "U1"), ("size", "i4")]),
    ]
    with SpoolWriter(source, checksum=True) as writer:
        for number, each in enumerate(kinds):
            writer.put(each, meta={"number": number})
    with SpoolReader(source) as reader:
        ids = [reader.receive() for _ in kinds]
        known = [item.id for item in ids]
        for item in ids:
            item.nack()
    assert forward(source, destination, until_empty=True) == len(kinds)
    with SpoolReader(destination, verify=True) as reader:
        for number, each in enumerate(kinds):
            item = reader.take(block=False)
            assert (item.meta, item.id) == ({"number": number}, known[number])
            for name, array in (each if isinstance(each, dict) else {"": each}).items():
                np.testing.assert_array_equal(item.arrays[name], array, strict=True)
                assert item.arrays[name].flags.f_contiguous == np.asarray(array).flags.f_contiguous


def test_values_of_a_queue_arrive(source: Path, destination: Path) -> None:
    with closing(Queue(path=source)) as queue:
        queue.put(["text", np.arange(3), {"a": None}])
    assert forward(source, destination, until_empty=True) == 1
    with closing(Queue(path=destination)) as queue:
        text, array, rest = queue.get(timeout=5)
    assert (text, array.tolist(), rest) == ("text", [0, 1, 2], {"a": None})


def test_dead_letters_of_the_source_stay_and_a_damaged_item_becomes_one(
    source: Path, destination: Path
) -> None:
    ids = fill(source, 4)
    with SpoolReader(source) as reader:
        reader.receive().reject("bad")
    (source / "items" / f"{3:020d}.npy").write_bytes(b"broken")
    assert forward(source, destination, until_empty=True, max_bytes=1) == 2
    assert drained(destination) == [ids[1], ids[3]]
    assert [letter.seq for letter in failed_list(source)] == [1, 3]
    assert failed_list(destination) == []


def test_items_of_several_sources_arrive_in_one_destination_at_the_same_time(tmp_path: Path) -> None:
    sources, destination = [tmp_path / name for name in "abc"], tmp_path / "destination"
    for place in sources:
        fill(place, 50)
    threads = [
        threading.Thread(
            target=forward, args=(place, destination), kwargs={"until_empty": True, "max_bytes": 20_000}
        )
        for place in sources
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = drained(destination)
    assert len(found) == 150
    assert all(found.count(each) == 3 for each in set(found))


def test_source_is_known_wherever_it_was_moved(source: Path, destination: Path, tmp_path: Path) -> None:
    fill(source, 2)
    with opened(source, destination) as (reader, writer):
        claimed = reader.claim(2, None, NOW)
        messages = [reader.load(each) for each in claimed]
        writer.forwarded(reader.name())
        writer.put_forwarded(reader.name(), messages, NOW)
    source.rename(tmp_path / "moved")
    assert forward(tmp_path / "moved", destination, until_empty=True) == 0
    assert stat(destination).depth == 2


# Refusals


def test_spool_in_memory_is_refused_as_either_end(source: Path) -> None:
    fill(source, 1)
    for one, other in (("memory://a", str(source)), (str(source), "memory://a")):
        with pytest.raises(UnsupportedOperation, match="memory://a: is in the memory of one process"):
            forward(one, other)
    assert stat(source).depth == 1


def test_spool_is_not_forwarded_to_itself(source: Path, tmp_path: Path) -> None:
    fill(source, 1)
    with pytest.raises(ValueError, match="both source and destination"):
        forward(source, tmp_path / "x" / ".." / "source", until_empty=True)
    assert stat(source).depth == 1


def test_source_that_was_never_there_is_an_error_at_once(source: Path, destination: Path) -> None:
    with pytest.raises(NotASpool, match="there is no spool here"):
        forward(source, destination)
    assert not destination.exists()


@pytest.mark.parametrize("what", ["foreign", "file", "source/items", "source/inside"])
@pytest.mark.parametrize("keep", [[], ["--keep"]])
def test_destination_that_can_never_be_one_is_an_error_at_once(
    source: Path, tmp_path: Path, what: str, keep: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fill(source, 1)
    (tmp_path / "foreign").mkdir()
    for each in ("foreign/name", "file"):
        (tmp_path / each).touch()
    assert main(["forward", str(source), str(tmp_path / what), *keep]) == 2
    assert capsys.readouterr().err.startswith(f"spoolipc: {tmp_path / what}")
    assert (stat(source).depth, stat(source).in_flight) == (1, 0)


def test_destination_that_others_may_change_is_an_error_at_once(source: Path, destination: Path) -> None:
    fill(source, 1)
    SpoolWriter(destination).close()
    destination.chmod(0o777)
    with pytest.raises(UnsafeSpool):
        forward(source, destination)


@pytest.mark.parametrize("rate", ["inf", "1e400", "1e308", "1e-320", "1e-12"])
def test_any_positive_rate_is_one(source: Path, destination: Path, rate: str) -> None:
    fill(source, 3)
    stop = Waits()
    assert forward(source, destination, rate=float(rate), until_empty=True, stop=stop) == 3
    assert stop.seconds <= 3 * threading.TIMEOUT_MAX
    assert (stop.seconds > 1) == (float(rate) < 1)


@pytest.mark.parametrize("option", ["--rate=nan", "--rate=-inf", "--max-bytes=inf", "--max-bytes=1e400"])
def test_number_that_is_no_bound_is_wrong_use(
    source: Path, destination: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(source, 1)
    try:
        code = main(["forward", str(source), str(destination), option])
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    assert "must be a" in (said := capsys.readouterr().err) or "is no number of bytes" in said


@pytest.mark.parametrize(
    "options",
    [{"rate": 0}, {"rate": -1.0}, {"rate": float("nan")}, {"max_bytes": 0}, {"keep": 1}, {"end": "never"}],
)
def test_impossible_options_are_refused(source: Path, destination: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        forward(source, destination, **options)


# One forwarder at a time


class opened:
    """Both ends, as a forwarder has them."""

    def __init__(self, source: Path, destination: Path, **options: Any) -> None:
        reader = connect(source).consumer(ConsumerOptions(create=False))
        writer = connect(destination).producer(ProducerOptions(**options))
        assert isinstance(reader, DirectorySource)
        assert isinstance(writer, DirectoryDestination)
        self.ends = reader, writer

    def __enter__(self) -> tuple[DirectorySource, DirectoryDestination]:
        return self.ends

    def __exit__(self, *_: object) -> None:
        for each in self.ends:
            each.close()


def test_second_forwarder_of_a_source_is_refused_while_the_first_lives(
    source: Path, destination: Path
) -> None:
    fill(source, 1)
    with opened(source, destination) as (reader, writer):
        writer.forwarded(reader.name())
        with pytest.raises(SpoolInUse, match=f"process {os.getpid()} forwards to it from the same spool"):
            forward(source, destination, until_empty=True)
        assert forward(source, destination.with_name("other"), until_empty=True) == 1


def test_forwarder_that_was_replaced_puts_nothing_more(source: Path, destination: Path) -> None:
    """Somebody removed its file in alive/, so that it seemed to have crashed."""
    fill(source, 2)
    with opened(source, destination) as (reader, writer):
        writer.forwarded(reader.name())
        claimed = reader.claim(2, None, NOW)
        messages = [reader.load(each) for each in claimed]
        for each in (destination / "alive").iterdir():
            each.unlink()
        with opened(source, destination) as (_, other):
            other.forwarded(reader.name())
            with pytest.raises(SpoolInUse, match="forwards to it from the same spool"):
                writer.put_forwarded(reader.name(), messages, NOW)
    assert os.listdir(destination / "tmp") == []
    assert stat(destination).depth == 0


# What the destination keeps


def test_what_was_put_and_not_acknowledged_is_known_however_much_came_since(
    source: Path, destination: Path
) -> None:
    fill(source, 3)
    with opened(source, destination) as (reader, writer):
        name = reader.name()
        writer.forwarded(name)
        claimed = reader.claim(3, None, NOW)
        first = [reader.load(each) for each in claimed]
        assert writer.put_forwarded(name, first, NOW) == 3
        last: list[str] = []
        for number in range(1, 21):
            ids = [f"{number:016x}{each:016x}" for each in range(1, 65)]
            messages = [Message((np.zeros(1),), id=each, seq=10) for each in ids]
            assert writer.put_forwarded(name, messages, NOW, last) == 64
            last = ids
        known = writer.forwarded(name)
        assert set(known.put) == {message.id for message in first} | set(last)
        assert len(known.acknowledged) == 1024
    assert (destination / "sources.json").stat().st_size < 200_000


def test_damaged_record_is_told_to_the_forwarder_and_stops_nobody_else(
    source: Path, destination: Path
) -> None:
    ids = fill(source, 2)
    forward(source, destination, until_empty=True)
    for text in (b"", b"[]", b'{"name": 1}', b'{"name": "", "sources": {"a": {"known": 5}}}', b"\xff"):
        (destination / "sources.json").write_bytes(text)
        with pytest.raises(StorageError, match=r"sources.json is damaged; .* remove it to go on"):
            forward(source, destination, until_empty=True)
    process = subprocess.run([sys.executable, "-c", CRASH, str(destination)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert len(os.listdir(destination / "tmp")) == 1
    gc(destination)
    assert os.listdir(destination / "tmp") == []
    assert drained(destination) == ids
    (destination / "sources.json").unlink()
    assert forward(source, destination, until_empty=True) == 0


CRASH = """
import os, signal, sys
import numpy as np
from spoolipc import SpoolWriter
from spoolipc.directory import fs
fs.rename = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
SpoolWriter(sys.argv[1]).put(np.zeros(3))
"""


def test_what_was_staged_and_not_put_is_struck_out_when_the_put_ends(source: Path, destination: Path) -> None:
    fill(source, 3)
    SpoolWriter(destination, maxsize=2).close()
    with opened(source, destination) as (reader, writer):
        name = reader.name()
        writer.forwarded(name)
        claimed = reader.claim(3, None, NOW)
        messages = [reader.load(each) for each in claimed]
        assert writer.put_forwarded(name, messages, NOW) == 2
        with pytest.raises(Full):
            writer.put_forwarded(name, messages[2:], NOW)
        assert [*writer.forwarded(name).put] == [message.id for message in messages[:2]]
        assert os.listdir(destination / "tmp") == []


def test_what_was_staged_and_cannot_be_put_any_more_is_removed_at_once(
    source: Path, destination: Path
) -> None:
    ids = fill(source, 2)
    with opened(source, destination) as (reader, writer), SpoolWriter(destination) as other:
        writer.forwarded(reader.name())
        claimed = reader.claim(2, None, NOW)
        messages = [reader.load(each) for each in claimed]

        def end(event: Event, _: Any) -> None:
            if event.name == "open_at" and event.args[0].endswith("-1.npy"):
                other.shutdown()

        with Injector(after=end), pytest.raises(ShutDown):
            writer.put_forwarded(reader.name(), messages, NOW)
        assert os.listdir(destination / "tmp") == []
    with SpoolWriter(destination, reopen=True):
        assert forward(source, destination, until_empty=True) == 2
    assert drained(destination) == ids


def test_what_is_staged_stays_as_after_a_crash_where_nobody_can_strike_it_out(
    source: Path, destination: Path
) -> None:
    """A file that is in `tmp/` no more is one that was put."""
    ids, noted = fill(source, 2), list[None]()

    def broken(event: Event) -> None:
        if event.name == "rename" and event.args[1] == "sources.json":
            noted.append(None)
        elif noted and (event.name == "rename" or event.args[:1] == ("sources.json",)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(source, destination) as (reader, writer):
        writer.forwarded(reader.name())
        claimed = reader.claim(2, None, NOW)
        messages = [reader.load(each) for each in claimed]
        with Injector(broken):
            with pytest.raises(StorageError):
                writer.put_forwarded(reader.name(), messages, NOW)
            writer.close()
    assert len(os.listdir(destination / "tmp")) == 2
    assert forward(source, destination, until_empty=True) == 2
    assert drained(destination) == ids


def test_what_survives_power_loss_is_synced_in_the_order_that_makes_it_so(
    source: Path, destination: Path
) -> None:
    """The files and their names before the record, that before the items, these before they are acknowledged."""
    fill(source, 2)
    met: list[str] = []

    def note(event: Event) -> None:
        if event.name == "sync":
            name = os.path.basename(os.readlink(f"/proc/self/fd/{event.args[0]}"))
            met.append(f"sync {'item' if name.endswith('.npy') else name}")
        elif event.name == "rename":
            met.append(f"rename {'item' if event.args[1].endswith('.npy') else event.args[1]}")

    with opened(source, destination, durability="fsync") as (reader, writer):
        writer.forwarded(reader.name())
        claimed = reader.claim(2, None, NOW)
        messages = [reader.load(each) for each in claimed]
        with Injector(note):
            writer.put_forwarded(reader.name(), messages, NOW)
            reader.settle(claimed, Ack())
    assert met == [
        *("sync item", "sync item", "sync tmp"),
        *("sync sources.json.new", "rename sources.json", "sync destination"),
        *("rename item", "rename item", "sync items"),
        *("rename item", "rename item"),
    ]


# Copying


def test_kept_items_stay_as_they_are_and_are_copied_once(source: Path, destination: Path) -> None:
    ids = fill(source, 70)
    before = names_of(source)
    with SpoolReader(source) as reader:
        held = reader.receive()  # in flight elsewhere: a copy all the same
        assert forward(source, destination, keep=True, until_empty=True) == 70
        held.ack()
    assert drained(destination) == ids
    assert names_of(source) == before[1:]
    assert forward(source, destination, keep=True, until_empty=True) == 0
    with SpoolWriter(source) as writer:
        writer.put(np.zeros(3))
    assert forward(source, destination, keep=True, until_empty=True) == 1
    with SpoolReader(source) as reader:
        rest = [reader.receive() for _ in range(70)]
        assert {item.attempt for item in rest} == {1}


def test_copying_goes_on_with_what_comes_until_the_source_is_shut_down(
    source: Path, destination: Path
) -> None:
    with SpoolWriter(source) as writer, SpoolReader(destination) as reader:
        thread = threading.Thread(target=forward, args=(source, destination), kwargs={"keep": True})
        thread.start()
        for number in range(3):
            writer.put(np.full(3, number))
            assert reader.get(timeout=30)[0] == number
        writer.shutdown()
        thread.join(30)
        assert not thread.is_alive()


def test_copies_are_not_taken_for_what_is_moved_and_what_is_damaged_is_passed_over(
    source: Path, destination: Path
) -> None:
    ids = fill(source, 3)
    (source / "items" / f"{2:020d}.npy").write_bytes(b"broken")
    assert forward(source, destination, keep=True, until_empty=True) == 2
    assert failed_list(source) == []
    assert forward(source, destination, until_empty=True) == 2
    assert drained(destination) == [ids[0], ids[2]] * 2


def test_item_that_is_taken_as_it_is_copied_is_passed_over(source: Path, destination: Path) -> None:
    """Its file is written again with another one."""
    with SpoolWriter(source) as writer, SpoolReader(source) as reader:
        for number in range(3):
            writer.put(np.full(100_000, number))
        name = f"{2:020d}.npy"

        def take(event: Event, _: Any) -> None:
            if event.name == "open_at" and event.args[0] == name and (source / "items" / name).exists():
                for _ in range(2):
                    reader.get()
                for number in (7, 8):
                    writer.put(np.full(100_000, number))

        with Injector(after=take):
            forward(source, destination, keep=True, until_empty=True)
        assert forward(source, destination, keep=True, until_empty=True) == 2
    with SpoolReader(destination) as reader:
        assert [int(reader.get()[0]) for _ in range(reader.qsize())] == [0, 2, 7, 8]


# Bounds


class Waits(threading.Event):
    """An event that is not waited for, but says for how long it would have been."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds += timeout or 0.0
        return self.is_set()


@pytest.mark.parametrize("keep", [False, True])
def test_rate_is_kept_item_by_item(source: Path, destination: Path, keep: bool) -> None:
    with SpoolWriter(source) as writer:
        for _ in range(20):
            writer.put(np.zeros(100_000, "u1"))
    stop = Waits()
    batches: list[int] = []
    options: dict[str, Any] = {"rate": 150_000, "until_empty": True, "keep": keep, "stop": stop}
    forward(source, destination, moved=lambda items, _: batches.append(items), **options)
    assert batches == [1] * 20
    assert 13 < stop.seconds < 300  # each wait is for what is owed so far


@pytest.mark.parametrize("keep", [False, True])
def test_bytes_on_their_way_at_once_are_bounded(
    source: Path, destination: Path, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SpoolWriter(source) as writer:
        for number in range(60):
            writer.put(np.zeros(100_000 if number % 10 else 700_000, "u1"))
    most: list[list[int]] = []
    real = DirectoryDestination.put_forwarded

    def put(self: Any, source: str, messages: Any, *rest: Any) -> int:
        most.append([message.nbytes for message in messages])
        return real(self, source, messages, *rest)

    monkeypatch.setattr(DirectoryDestination, "put_forwarded", put)
    assert forward(source, destination, max_bytes=450_000, until_empty=True, keep=keep) == 60
    assert sum(map(len, most)) == 60
    assert all(sum(sizes) <= 450_000 or len(sizes) == 1 for sizes in most)
    assert max(map(len, most)) == 4


# What is away, and the end


class Running:
    """A forwarder in a thread."""

    def __init__(self, *ends: Path, **options: Any) -> None:
        self.stop = threading.Event()
        self.total: int | None = None
        self.moved: list[None] = []
        self.error: BaseException | None = None

        def run() -> None:
            try:
                self.total = forward(*ends, stop=self.stop, moved=self._note, **options)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run)

    def _note(self, items: int, _: int) -> None:
        self.moved += [None] * items

    def __enter__(self) -> Running:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(60)
        assert not self.thread.is_alive()


def test_source_that_is_away_is_waited_for_and_told_once(
    source: Path, destination: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(source, 3)
    with Running(source, destination) as running, SpoolReader(destination) as reader:
        for _ in range(3):
            reader.get(timeout=30)
        until(lambda: stat(source).in_flight == 0)
        shutil.rmtree(source)
        until(lambda: "waits for it" in caplog.text)
        fill(source, 3)
        for _ in range(3):
            reader.get(timeout=60)
        assert running.error is None
    assert running.total == 6
    said = [record.message for record in caplog.records if "waits for it" in record.message]
    assert len(said) == 1, said
    assert str(source) in said[0]


def test_destination_that_was_removed_is_waited_for_and_not_made_again(
    source: Path, destination: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its disk may come back, and who removed it may want it gone."""
    fill(source, 1)
    pauses: list[float | None] = []
    with Running(source, destination) as running:
        real = running.stop.wait
        running.stop.wait = lambda timeout=None: pauses.append(timeout) or real(timeout)  # type: ignore[method-assign, func-returns-value]
        until(lambda: running.moved)
        shutil.rmtree(destination)
        with SpoolWriter(source) as writer:
            writer.put_many([np.zeros(1000)] * 3)
        until(lambda: len(pauses) > 2)  # it was looked for again
        assert not destination.exists()
        assert stat(source).depth + stat(source).in_flight == 3
        SpoolWriter(destination).close()
        until(lambda: len(running.moved) == 4)
        assert running.error is None
    said = [record.message for record in caplog.records]
    assert [each.startswith(str(destination)) for each in said if "waits for it" in each] == [True]
    assert stat(destination).depth == 3


def test_destination_that_is_full_is_waited_for_and_costs_no_attempts(
    source: Path, destination: Path
) -> None:
    ids = fill(source, 3)
    with SpoolWriter(destination, maxsize=1) as writer:
        writer.put(np.zeros(1))
    for _ in range(3):
        stop = Waits()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stop, "wait", lambda _=None, stop=stop: stop.set() or True)
            patch.setattr(DirectorySource, "unclaim", lambda *_: None)  # as where it is killed
            assert forward(source, destination, stop=stop) == 0
    with SpoolReader(source) as reader:
        item = reader.receive()
        assert item.attempt == 1
        item.nack()
    with Running(source, destination), SpoolReader(destination) as reader:
        assert reader.get(timeout=30).shape == (1,)
        assert [reader.take(timeout=30).id for _ in ids] == ids


@pytest.mark.parametrize("keep", [False, True])
def test_forwarder_that_is_to_stop_while_the_destination_is_full_stops(
    source: Path, destination: Path, keep: bool
) -> None:
    fill(source, 3)
    SpoolWriter(destination, maxsize=1).close()
    with Running(source, destination, keep=keep) as running:
        until(lambda: stat(destination).depth == 1)
    assert (running.total, running.error) == (1, None)
    assert (stat(source).in_flight, stat(source).depth) == (0, 3 if keep else 2)


@pytest.mark.fault
def test_what_has_arrived_makes_room_for_what_follows_on_the_same_disk(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "16m") as disk:
        with SpoolWriter(disk / "source") as writer:
            for _ in range(6):  # as a batch they do not fit twice
                writer.put_nowait(np.ones(2 << 20, "u1"))
        moving = Call(partial(forward, disk / "source", disk / "destination", until_empty=True))
        assert moving.result() == 6


def test_item_that_comes_round_is_another_one(source: Path, destination: Path) -> None:
    ids = fill(source, 5)
    for origin, to in [(source, destination), (destination, source)] * 2:
        assert forward(origin, to, until_empty=True) == 5
        assert (stat(origin).depth, stat(to).depth) == (0, 5)
    with (
        SpoolReader(source) as reader,
        SpoolWriter(source) as writer,
    ):  # once while its first delivery is forwarded
        items = [reader.take() for _ in ids]
        for each in (items[0], *items):
            message = Message(tuple(each.arrays.values()), None, each.meta, id=each.id)
            writer._producer.put([message], None)
    assert forward(source, destination, until_empty=True) == 6
    with SpoolReader(destination) as reader:
        assert [reader.take().id for _ in range(6)] == [ids[0], *ids]


def test_what_is_claimed_and_not_put_goes_back_without_an_attempt(source: Path, destination: Path) -> None:
    ids = fill(source, 10)
    stop = threading.Event()
    for number in range(3):
        stop.clear()
        assert (
            forward(source, destination, moved=lambda _, __: stop.set(), rate=1e9, stop=stop, max_bytes=1)
            == 1
        )
        assert stat(source).depth == 9 - number
    with SpoolReader(destination, end="writers") as reader:
        assert [reader.take().id for _ in range(3)] == ids[:3]
    with SpoolReader(source) as reader:
        found = [reader.receive() for _ in range(7)]
        assert [(each.id, each.attempt) for each in found] == [(each, 1) for each in ids[3:]]


def test_item_that_never_fits_is_a_dead_letter_of_the_source_alone(source: Path, destination: Path) -> None:
    ids = fill(source, 25)  # three of them are large
    SpoolWriter(destination, max_bytes=1_000_000).close()
    assert forward(source, destination, until_empty=True, keep=True) == 22
    assert drained(destination) == [each for number, each in enumerate(ids) if number % 10]
    assert forward(source, destination, until_empty=True) == 22
    assert drained(destination) == [each for number, each in enumerate(ids) if number % 10]
    letters = failed_list(source)
    assert [each.attempts for each in letters] == [1, 1, 1]
    assert all("can never fit: max_bytes is 1000000" in each.reason for each in letters)


def test_order_is_kept_where_the_destination_takes_a_part(source: Path, destination: Path) -> None:
    ids = fill(source, 20)
    SpoolWriter(destination, maxsize=3).close()
    with Running(source, destination), SpoolReader(destination) as reader:
        assert [reader.take(timeout=30).id for _ in ids] == ids
        assert stat(destination).depth == 0


@pytest.mark.parametrize("keep", [[], ["--keep"]])
def test_command_says_once_that_it_waits_and_that_it_goes_on_above_its_bar(
    source: Path, destination: Path, keep: list[str]
) -> None:
    fill(source, 3)
    SpoolWriter(destination, maxsize=1).close()
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "-m", "spoolipc", "forward", str(source), str(destination), *keep]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        with SpoolReader(destination) as reader, SpoolWriter(source) as writer:
            for number in (1, 2):
                while said.count(b"waits for it\r\n") < number:
                    said += os.read(ours, 4096)
                for _ in range(3):
                    reader.get(timeout=60)
                while said.count(b"goes on\r\n") < number:
                    said += os.read(ours, 4096)
                if number == 1:
                    writer.put_many([np.zeros(1000)] * 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"B/s]" in said  # the bar
    lines = [each.rstrip(b"\r").rpartition(b"\r")[2].decode() for each in said.split(b"\n")[:-1]]
    waits = f"spoolipc: {destination}: has no room; forwarding waits for it"
    assert lines == [waits, "spoolipc: forwarding goes on"] * 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("keep", [[], ["--keep"]])
def test_signal_ends_the_command_with_nothing_in_doubt(
    source: Path, destination: Path, signum: signal.Signals, keep: list[str]
) -> None:
    fill(source, 30)
    command = [sys.executable, "-m", "spoolipc", "forward", str(source), str(destination), *keep]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        with SpoolReader(destination) as reader:
            for _ in range(30):
                reader.get(timeout=60)
        process.send_signal(signum)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, errors) == (128 + signum, "")
    assert out == f"{'copied' if keep else 'moved'} 30 items\n"
    assert stat(source).in_flight == 0
    assert stat(source).depth == (30 if keep else 0)


def test_command_moves_items_and_says_how_many(
    source: Path, destination: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(source, 3)
    options = ["--until-empty", "--rate", "1e9", "--max-bytes", "100000", "--durability", "fsync"]
    assert main(["forward", str(source), str(destination), *options]) == 0
    assert capsys.readouterr().out == "moved 3 items\n"
    assert main(["forward", str(source), str(destination), "--until-empty", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == 0
    assert main(["forward", f"{source}-not", str(destination)]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["forward", str(source), "memory://x"])
