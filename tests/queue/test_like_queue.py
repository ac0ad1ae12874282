"""put, get and what goes with them mean what they mean for queue.Queue; a closed side says so."""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.calls import Call
from support.peer import Peer

from spoolipc import Empty, Full, NotASpool, ShutDown, SpoolReader, SpoolWriter, remove

LARGE = 5000
"""Of float64: 40 KB, which is given out as a view of the file."""


def test_errors_are_those_of_queue() -> None:
    assert issubclass(ShutDown, getattr(queue, "ShutDown", Exception))
    assert issubclass(Full, queue.Full)
    assert issubclass(Empty, queue.Empty)


def test_timeout_means_nothing_to_who_does_not_wait(spool: Path, reader: SpoolReader) -> None:
    with SpoolWriter(spool, maxsize=1) as writer:
        writer.put(np.zeros(1), False, -1)
        with pytest.raises(queue.Full):
            writer.put(np.zeros(1), False, -1)
        reader.get(False, -1)
        with pytest.raises(queue.Empty):
            reader.get(False, -1)


@pytest.mark.parametrize("size", [10, 40_000])
def test_closing_amid_traffic_of_other_threads_ends_it_with_a_clear_error(spool: Path, size: int) -> None:
    def going_on(step: Callable[[], object], going: threading.Semaphore) -> None:
        while True:
            step()
            going.release()

    for _ in range(10):
        writer, reader, going = SpoolWriter(spool), SpoolReader(spool), threading.Semaphore(0)
        steps = (lambda writer=writer: writer.put(np.zeros(size)), reader.get) * 2
        calls = [Call(going_on, step, going) for step in steps]
        for _ in range(20):
            assert going.acquire(timeout=30)
        writer.close()
        reader.close()
        for call in calls:
            assert isinstance(call.error(), ValueError)
            assert "closed" in str(call.error())
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put(np.ones(3))
        assert sum(int(array.sum()) for array in reader.get_many(100_000)) == 3
    assert list((spool / "tmp").iterdir()) == []


def test_writer_and_reader_can_be_pickled(spool: Path) -> None:
    with SpoolWriter(spool, maxsize=5, durability="fsync") as writer, SpoolReader(spool) as reader:
        other: SpoolWriter = pickle.loads(pickle.dumps(writer))
        another: SpoolReader = pickle.loads(pickle.dumps(reader))
        with other, another, Peer(spool) as peer:
            assert (other.path, another.path, other.maxsize) == (writer.path, reader.path, 5)
            other.put(np.full(LARGE, 1.0))
            peer.run("import pickle")
            peer.run(f"reader, writer = pickle.loads({pickle.dumps((reader, writer))!r})")
            peer.run("writer.put(reader.get(timeout=30) + 1)")
            assert (another.get_nowait() == 2).all()


@pytest.mark.parametrize("face", [SpoolReader, SpoolWriter])
def test_one_that_was_to_make_no_spool_makes_none_where_it_is_unpickled(
    spool: Path, face: type[SpoolReader] | type[SpoolWriter]
) -> None:
    SpoolWriter(spool).close()
    with face(spool, create=False) as opened:
        pickled = pickle.dumps(opened)
    pickle.loads(pickled).close()
    remove(spool)
    with pytest.raises(NotASpool):
        pickle.loads(pickled)
    assert not spool.exists()
