"""The faces check what they are given, say clearly what an engine cannot do, and cost no more than they must."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import spoolipc
from spoolipc import memory
from spoolipc.connect import connect
from spoolipc.errors import (
    AlreadySettled,
    Full,
    LeaseExpired,
    ShutDown,
    TooLarge,
    UnsupportedArray,
    UnsupportedOperation,
)
from spoolipc.message import Limits
from spoolipc.queue import SpoolReader, SpoolWriter

URL = "memory://faces"
ONE = np.zeros(1)
anything: Any = spoolipc
"""Takes any arguments, as far as mypy knows."""


@pytest.fixture(autouse=True)
def _clear() -> Iterator[None]:
    yield
    memory.clear("faces")


@pytest.fixture
def writer() -> Iterator[SpoolWriter]:
    with SpoolWriter(URL) as writer:
        yield writer


@pytest.fixture
def reader() -> Iterator[SpoolReader]:
    with SpoolReader(URL) as reader:
        yield reader


@pytest.mark.parametrize("url", ["redis://host/name", "MEMORY://name", "file:///tmp/spool"])
def test_unknown_scheme_is_refused_and_the_known_ones_named(url: str) -> None:
    with pytest.raises(ValueError, match="memory://"):
        connect(url)


def test_spool_in_memory_needs_a_name() -> None:
    with pytest.raises(ValueError, match="NAME"):
        SpoolWriter("memory://")


class TestLimits:
    @pytest.mark.parametrize("face", [SpoolWriter, SpoolReader])
    def test_are_taken_together_or_one_by_one(self, face: Any) -> None:
        face(URL, limits=Limits(maxsize=3, max_attempts=2), max_bytes=10**6, maxsize=3).close()
        limits = connect(URL).admin().stat().limits
        assert (limits.maxsize, limits.max_bytes, limits.max_attempts) == (3, 10**6, 2)

    @pytest.mark.parametrize("face", [SpoolWriter, SpoolReader])
    def test_one_given_twice_with_two_values_is_refused(self, face: Any) -> None:
        with pytest.raises(ValueError, match="maxsize is given twice: 3 in limits and 0 beside it"):
            face(URL, limits=Limits(maxsize=3), maxsize=0)


class TestArguments:
    def test_what_is_no_array_is_a_type_error(self, writer: SpoolWriter) -> None:
        for thing in ([1, 2], 3.0, None, {1: np.zeros(1)}, {"a": [1]}, np.ma.masked_array([1, 2])):
            with pytest.raises(UnsupportedArray):
                writer.put(thing)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="empty"):
            writer.put({})
        assert writer.empty()

    def test_scalars_and_subclasses_are_arrays(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        writer.put_many([np.float32(3), np.zeros((2, 2)).view(np.matrix)])  # type: ignore[list-item]
        assert [(type(each), each.shape) for each in reader.get_many(2)] == [
            (np.ndarray, ()),
            (np.ndarray, (2, 2)),
        ]

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            (lambda w, r: anything.SpoolWriter(""), "path is empty"),
            (lambda w, r: anything.SpoolWriter(b"memory:/x"), r"memory://NAME.*\./memory:/x"),
            (
                lambda w, r: anything.SpoolWriter(URL, limits=5),
                r"limits must be as Limits\(maxsize=5\), not 5",
            ),
            (lambda w, r: anything.SpoolReader(URL, limits={"maxsize": 5}), "limits must be"),
            (lambda w, r: anything.SpoolWriter(URL, mode=770), "mode must be .*, not 770; write 0o770"),
            (lambda w, r: anything.SpoolWriter(URL, mode=0o777), "mode must be .*, not 0o777"),
            (lambda w, r: anything.SpoolWriter(URL, maxsize=2**63), r"maxsize must be .* to 2\*\*63 - 1"),
            (
                lambda w, r: anything.SpoolWriter(URL, preallocate=5),
                r"preallocate must be \(count, nbytes\).*, not 5",
            ),
            (
                lambda w, r: anything.SpoolWriter(URL, preallocate=("a", "b")),
                "preallocate must be a whole number.*'a'",
            ),
            (
                lambda w, r: anything.SpoolWriter(URL, durability="sometimes"),
                'durability must be "none" or "fsync", not',
            ),
            (lambda w, r: anything.SpoolWriter(URL, checksum="x"), "checksum must be True or False, not 'x'"),
            (lambda w, r: anything.SpoolWriter(URL, reopen=1), "reopen must be True or False, not 1"),
            (lambda w, r: anything.SpoolReader(URL, create="no"), "create must be True or False, not 'no'"),
            (lambda w, r: anything.SpoolReader(URL, verify=3), "verify must be True or False, not 3"),
            (
                lambda w, r: anything.SpoolReader(URL, lease=0),
                "lease must be a positive number of seconds, not 0",
            ),
            (
                lambda w, r: anything.SpoolReader(URL, lease="x"),
                "lease must be a positive number of seconds, not 'x'",
            ),
            (lambda w, r: w.put(ONE, {"id": 1}), r"block must be True or False.*write meta=\{'id': 1\}"),
            (lambda w, r: w.put(ONE, "x"), "write meta='x'"),
            (lambda w, r: w.put(ONE, 5), "block must be True or False.*write timeout=5"),
            (lambda w, r: w.put(ONE, 0.5), "write timeout=0.5"),
            (lambda w, r: w.put(ONE, ONE), r"block must be .* an array; put several with put_many"),
            (lambda w, r: w.put_many([ONE], ONE), "block must be .* an array"),
            (lambda w, r: w.put(ONE, timeout=float("nan")), "timeout must be a non-negative number"),
            (
                lambda w, r: w.put(ONE, timeout="5"),
                "timeout must be a non-negative number of seconds, not '5'",
            ),
            (lambda w, r: w.put(ONE, timeout=np.zeros(2)), "timeout must be"),
            (lambda w, r: w.put({}), "an item needs at least one array"),
            (lambda w, r: w.loan(3, block=5), "block must be True or False"),
            (lambda w, r: r.get(5), "write timeout=5"),
            (lambda w, r: r.get(timeout=-1), "timeout must be a non-negative number of seconds, not -1"),
            (lambda w, r: r.receive(timeout=-1), "timeout"),
            (lambda w, r: r.receive(1), "write timeout=1"),
            (lambda w, r: r.peek(timeout=-1), "timeout"),
            (lambda w, r: r.get_many("x"), "limit must be a whole number from 1 .*, not 'x'"),
            (lambda w, r: r.get_many(1.5), "limit must be a whole number from 1 .*, not 1.5"),
            (lambda w, r: r.get_many(0), "limit must be a whole number from 1 .*, not 0"),
            (lambda w, r: r.get(copy=None), 'copy must be True, False or "on-write", not None'),
            (lambda w, r: r.get(out=np.zeros(1), copy=""), "copy must be True"),
            (lambda w, r: r.get(out=np.zeros(1), copy="on-write"), "leave copy away"),
            (lambda w, r: r.receive(copy=0), "copy must be True"),
            (lambda w, r: w.shutdown("no"), "immediate must be True or False, not 'no'"),
            (lambda w, r: anything.gc(URL, dry_run=1), "dry_run must be True or False, not 1"),
            (lambda w, r: anything.fsck(URL, repair="no"), "repair must be True or False, not 'no'"),
            (lambda w, r: anything.remove_temporary(dry_run="no"), "dry_run must be True or False"),
            (lambda w, r: r.receive().nack(None), "delay must be a non-negative number of seconds, not None"),
            (lambda w, r: r.receive().nack(-1), "delay must be"),
            (lambda w, r: r.receive().nack(float("nan")), "delay must be"),
            (lambda w, r: r.receive().nack(reason=5), "reason must be"),
            (lambda w, r: r.receive().reject(None), "reason must be"),
            (lambda w, r: r.receive().extend(0), "seconds must be"),
            (lambda w, r: r.receive().extend("x"), "seconds must be a positive number of seconds, not 'x'"),
            (
                lambda w, r: connect(URL).admin().failed_retry(cast(Any, 5)),
                r"seqs must be a list.*, not 5.*\[5\]",
            ),
            (
                lambda w, r: connect(URL).admin().failed_drop(cast(Any, "x")),
                "sequence number must be a whole number",
            ),
        ],
    )
    def test_a_wrong_one_is_named_with_what_to_write(
        self, writer: SpoolWriter, reader: SpoolReader, wrong: Callable[..., Any], said: str
    ) -> None:
        writer.put(ONE)
        with pytest.raises((ValueError, TypeError), match=said):
            wrong(writer, reader)
        assert connect(URL).admin().stat().live_sessions == 2
        assert connect(URL).admin().stat().puts == 1

    def test_numbers_of_numpy_are_numbers(self) -> None:
        two, half = np.int64(2), np.float32(0.5)
        limits = anything.Limits(maxsize=np.uint8(3), max_bytes=np.int32(10**6))
        with anything.SpoolWriter(URL, limits=limits, max_attempts=two) as writer:
            assert repr(connect(URL).admin().stat().limits).count("np.") == 0
            writer.put(ONE, np.bool(True), half, meta={"n": two, "f": half, "b": np.bool(False)})
            writer.put(ONE, timeout=two)
        with anything.SpoolReader(URL, lease=half) as reader:
            item = reader.receive(timeout=half)
            assert item.meta == {"n": 2, "f": 0.5, "b": False}
            assert [type(each) for each in item.meta.values()] == [int, float, bool]
            item.extend(two)
            item.nack(np.float16(0))
            assert len(reader.get_many(two, np.bool(False))) == 2

    @pytest.mark.parametrize("name", ["spool", "größe", "\udce9"])
    def test_path_may_be_bytes(self, tmp_path: Path, name: str) -> None:
        place = os.fsencode(tmp_path / name)
        with anything.SpoolWriter(place) as writer:
            writer.put(ONE)
            assert os.fsencode(writer.path) == place
        for look in (anything.stat, anything.gc, anything.fsck, anything.failed_list):
            look(place)
        with anything.SpoolReader(tmp_path / name) as reader:
            assert reader.get(block=False) == ONE

    def test_metas_must_be_one_for_each(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        with pytest.raises(ValueError, match="2 arrays but 1 metas"):
            writer.put_many([np.zeros(1)] * 2, metas=[1])
        writer.put_many([np.zeros(1)] * 2, metas=iter("ab"))
        assert [item.meta for item in (reader.receive(), reader.receive())] == ["a", "b"]

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [(3, float), ((2, 0), "S"), ((), "U"), ([4, 2], "i2"), (2, ("f4", (3,)))],
        ids=repr,
    )
    def test_loan_is_of_what_np_empty_would_make(self, writer: SpoolWriter, shape: Any, dtype: Any) -> None:
        with writer.loan(shape, dtype) as array:
            like: Any = np.empty(shape, dtype)
            assert (array.shape, array.dtype) == (like.shape, like.dtype)
        for bad in (-1, 1.5, (2, -2)):
            with pytest.raises((ValueError, TypeError)), writer.loan(bad):  # type: ignore[arg-type]
                pass


class TestWriter:
    def test_loans_arrive_in_the_order_in_which_they_are_committed(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        loans = [writer.loan(3, meta=number) for number in range(4)]
        with loans[0] as first, loans[1] as second:
            first[:], second[:], loans[2].array[:] = 1, 2, 3
            assert (loans[2].commit(), loans[0].commit(), writer.qsize()) == (1, 2, 2)
            assert not first.flags.writeable
        loans[3].discard()
        loans[3].discard()
        loans[2].discard()
        for loan in loans:
            for use in (loan.commit, lambda loan=loan: loan.array, loan.__enter__):
                with pytest.raises(AlreadySettled):
                    use()
        assert [int(array[0]) for array in reader.get_many(9)] == [3, 1, 2]

    def test_loan_that_finds_no_room_stays_one(self) -> None:
        with SpoolWriter(URL, maxsize=1) as writer, SpoolReader(URL) as reader:
            loan = writer.loan(3)
            loan.array[:] = 7
            writer.put(ONE)
            for wait in ({"block": False}, {"timeout": 0.01}):
                with pytest.raises(Full):
                    loan.commit(**wait)
            reader.get()
            assert loan.commit(block=False) == 2

    def test_loan_given_up_in_its_block_is_not_put(self, writer: SpoolWriter) -> None:
        with writer.loan(3) as array, writer.loan(3) as other:
            array[:] = other[:] = 1
            assert writer.empty()
        loan = writer.loan(3)
        with loan:
            loan.discard()
        assert writer.qsize() == 2

    def test_what_the_engine_cannot_do_is_said(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        for face in (writer, reader):
            with pytest.raises(UnsupportedOperation, match="no other process can open memory://faces"):
                copy.copy(face)
        with pytest.raises(NotImplementedError, match="preallocate"):
            SpoolWriter(URL, preallocate=(1, 8))
        assert connect(URL).admin().stat().live_sessions == 2
        with pytest.raises(ValueError, match="durability"):
            SpoolWriter(URL, durability="fsync")

    def test_errors_of_the_engine_name_the_spool_and_what_to_do(
        self, writer: SpoolWriter, reader: SpoolReader
    ) -> None:
        with pytest.raises(TooLarge, match=f"^{URL}: an item of [0-9]+ bytes can never fit"):
            writer.put(np.broadcast_to(np.zeros(1), (2**50,)))
        writer.put(ONE)
        reader.receive().reject("no use")
        writer.shutdown()
        for call in (partial(writer.put, ONE), partial(connect(URL).admin().failed_retry, None)):
            with pytest.raises(ShutDown, match=f"^{URL}: was shut down; .*reopen=True.*fresh=True"):
                call()


class TestReader:
    def test_iteration_holds_no_array_while_it_waits(self, writer: SpoolWriter) -> None:
        class Reader(SpoolReader):
            def get(self, *args: Any, **more: Any) -> Any:
                assert last is None or last() is None
                return super().get(*args, **more)

        last: weakref.ref[Any] | None = None
        writer.put_many([np.zeros(1)] * 3)
        writer.shutdown()
        with Reader(URL) as reader:
            arrays = iter(reader)
            for _ in range(3):
                last = weakref.ref(next(arrays))
            assert list(arrays) == []

    def test_item_says_what_it_is_and_who_lost_it(self, writer: SpoolWriter) -> None:
        with SpoolReader(URL, lease=1e-6) as reader:
            writer.put({"a": np.zeros(1), "b": np.ones(2)}, meta=[1])
            item = reader.receive()
            assert (item.put_time > 0, item.nbytes > 8) == (True, True)
            assert repr(item) == "Item(seq=1, attempt=1, in flight)"
            with pytest.raises(LeaseExpired):
                item.ack()
            with pytest.raises(AlreadySettled, match="lease ended"):
                item.extend(1)
        with SpoolReader(URL) as reader, reader.receive() as item:
            with pytest.raises(TypeError, match=r"a, b"):
                _ = item.array
            assert [*item.arrays] == ["a", "b"]
            assert item.meta == [1]
            item.reject("no use")
        (letter,) = connect(URL).admin().failed_list()
        assert letter.reason == "no use"

    def test_faces_say_where_they_are(self, writer: SpoolWriter, reader: SpoolReader) -> None:
        assert (repr(writer), repr(reader)) == (
            "SpoolWriter('memory://faces')",
            "SpoolReader('memory://faces')",
        )
        assert (writer.path, writer.maxsize, writer.full(), reader.qsize()) == (URL, 0, False, 0)
