"""The short ways of put, get, receive and ack: they are taken, and what they cannot do is done all the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit import audit, party_of
from test_put_get import DTYPES, filled

from spoolipc import Empty, Full, ShutDown, SpoolReader, SpoolWriter, fsck, stat, steadyget, steadyput
from spoolipc.engine import Array

ROUNDS = 16


class Taken:
    """How often each short way was gone to its end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.put = self.got = self.acked = 0
        ways: tuple[Callable[..., Any], ...] = (steadyput._commit, steadyget._take_one, steadyget._ack)
        commit, take, ack = ways

        def committing(*args: Any) -> Any:
            done = commit(*args)
            self.put += bool(done)
            return done

        def taking(*args: Any) -> Any:
            done = take(*args)
            self.got += bool(done)
            return done

        def acking(*args: Any) -> None:
            ack(*args)
            self.acked += bool(args[-1])

        monkeypatch.setattr(steadyput, "_commit", committing)
        monkeypatch.setattr(steadyget, "_take_one", taking)
        monkeypatch.setattr(steadyget, "_ack", acking)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    return Taken(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def writer(path: Path) -> Iterator[SpoolWriter]:
    with SpoolWriter(path, maxsize=4) as writer:
        yield writer
        audit(party_of(writer))
    assert fsck(path).problems == ()


@pytest.fixture
def reader(path: Path, writer: SpoolWriter) -> Iterator[SpoolReader]:
    with SpoolReader(path) as reader:
        yield reader


def warm(writer: SpoolWriter, reader: SpoolReader, array: Array) -> None:
    for _ in range(ROUNDS):
        writer.put(array)
        writer.put(array)
        reader.get()
        reader.get()


@pytest.mark.parametrize("size", [500, 40_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_time_after_time(
    writer: SpoolWriter, reader: SpoolReader, taken: Taken, dtype: Any, size: int
) -> None:
    array = filled(np.dtype(dtype), size)
    for number in range(ROUNDS):
        array = np.roll(array, 1)
        writer.put(array)
        got = reader.get()
        assert got.dtype == array.dtype
        same = (
            (got == array).all() if array.dtype.names else got.tobytes() == array.tobytes()
        )  # but for padding
        assert same
        assert not got.flags.writeable, number
    if array.dtype.names is None:
        assert taken.got > 2


@pytest.mark.parametrize("size", [50, 5_000])
def test_singly_in_batches_and_by_receive(
    writer: SpoolWriter, reader: SpoolReader, taken: Taken, size: int
) -> None:
    warm(writer, reader, np.zeros(size))
    before = taken.put, taken.got
    writer.put_many([np.full(size, float(number)) for number in range(4)])
    assert [int(array[0]) for array in reader.get_many(4)] == [0, 1, 2, 3]
    writer.put(np.full(size, 4.0))
    with reader.receive() as item:
        assert (item.array == 4).all()
    writer.put(np.full(size, 5.0))
    kept = reader.receive()
    assert (kept.array == 5).all()
    kept.ack()
    assert taken.put > before[0]
    assert taken.got > before[1]
    assert taken.acked >= 1
    warm(writer, reader, np.zeros(size))
    assert (kept.array == 5).all()


def test_a_kind_first_seen_behind_another_array_takes_the_short_way(
    writer: SpoolWriter, reader: SpoolReader, taken: Taken
) -> None:
    array = np.arange(77, dtype="<u4")
    writer.put({"a": np.zeros(8), "b": array})  # whose header is then the same
    assert np.array_equal(reader.get()["b"], array)
    warm(writer, reader, array)
    assert taken.got > 2


def test_another_shape_dtype_or_order_goes_the_general_way(writer: SpoolWriter, reader: SpoolReader) -> None:
    warm(writer, reader, np.zeros((4, 5)))
    others = [
        np.arange(20.0).reshape(5, 4),
        np.arange(20).reshape(4, 5),
        np.asfortranarray(np.arange(20.0).reshape(4, 5)),
        np.arange(40.0).reshape(4, 10)[:, ::2],
        np.zeros((0, 5)),
        np.arange(20.0).reshape(4, 5).astype(">f8"),
    ]
    for other in others:
        writer.put(other)
        got = reader.get()
        assert np.array_equal(got, other)
        assert (got.dtype, got.shape, got.flags.fnc) == (other.dtype, other.shape, other.flags.fnc)


def test_the_limits_of_the_queue_hold(
    path: Path, writer: SpoolWriter, reader: SpoolReader, taken: Taken
) -> None:
    array = np.arange(10)
    warm(writer, reader, array)
    for _ in range(4):
        writer.put_nowait(array)
    with pytest.raises(Full):
        writer.put_nowait(array)
    with pytest.raises(Full) as full:
        writer.put_many([array] * 3, timeout=0)
    assert full.value.seqs == ()
    for _ in range(4):
        reader.get_nowait()
    with pytest.raises(Empty):
        reader.get_nowait()
    writer.put(array)
    writer.shutdown()
    with pytest.raises(ShutDown):
        writer.put(array)
    assert np.array_equal(reader.get(), array)
    with pytest.raises(ShutDown):
        reader.get()


def test_an_item_given_back_comes_before_the_next_one(writer: SpoolWriter, reader: SpoolReader) -> None:
    warm(writer, reader, np.zeros(10))
    for number in range(3):
        writer.put(np.full(10, float(number)))
    reader.receive().nack()
    assert [int(reader.get()[0]) for _ in range(3)] == [0, 1, 2]


def link(file: Path) -> None:
    os.link(file, file.parent.parent.parent / "linked")


def shorten(file: Path) -> None:
    os.truncate(file, 100)


def replace(file: Path) -> None:
    other = file.with_suffix(".other")
    other.write_bytes(file.read_bytes())
    other.chmod(0o600)
    other.rename(file)


@pytest.mark.parametrize("size", [50, 5_000])
@pytest.mark.parametrize("harm", [link, shorten, replace, Path.unlink])
def test_a_consumed_file_that_was_tampered_with_is_not_written(
    path: Path, writer: SpoolWriter, reader: SpoolReader, harm: Callable[[Path], None], size: int
) -> None:
    warm(writer, reader, np.ones(size))
    for spare in list(writer._sink.spares):
        if not (path.parent / "linked").exists():
            harm(path / "free" / spare.name)
    before = (path.parent / "linked").read_bytes() if harm is link else b""
    for number in range(ROUNDS):
        writer.put(np.full(size, float(number)))
        assert (reader.get() == number).all()
    assert harm is not link or (path.parent / "linked").read_bytes() == before
    assert stat(path).failed == 0


def test_a_linked_item_is_delivered_and_its_file_never_written_again(
    path: Path, writer: SpoolWriter, reader: SpoolReader
) -> None:
    warm(writer, reader, np.ones(5_000))
    seq = writer.put(np.full(5_000, 7.0))
    link(path / "items" / f"{seq:020d}.npy")
    assert (reader.get() == 7).all()
    warm(writer, reader, np.ones(5_000))
    assert (np.load(path.parent / "linked") == 7).all()
