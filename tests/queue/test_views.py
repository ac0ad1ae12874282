"""An array that a reader returned never changes, whatever becomes of its item, file, reader or process."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from support.arrays import Array, inode_of
from support.calls import Call
from support.faults import Event, Injector
from support.peer import Peer

from spoolipc import Item, LeaseExpired, SpoolReader, SpoolWriter
from spoolipc.directory import fs

SIZE = 5000
"""Of float64: 40 KB, which is given out as a view of the file."""
WAYS: list[Callable[[Array], Array]] = [
    lambda a: a,
    lambda a: a[10:],
    lambda a: a[::-2][3:][:5],
    lambda a: a.reshape(50, 100).T[3],
    lambda a: a.view("u1")[8:],
    lambda a: a.view(np.recarray),
    lambda a: np.asarray(memoryview(cast(Any, a))[5:]),
    lambda a: np.frombuffer(a, "f8", 7, 80),
    lambda a: np.lib.stride_tricks.sliding_window_view(a, 9),
    lambda a: np.broadcast_to(a[:1], (3, 1)),
    lambda a: a.view([("a", "f4"), ("b", "i2", (2,))])["b"],
    lambda a: a.view([("a", "f4"), ("b", "i2", (2,))])[17],
    lambda a: a.view([("a", "f4"), ("b", "i2", (2,))])["b"][3],
    lambda a: cast(Array, a.base),
    lambda a: cast(Any, a.base).base,
    lambda a: np.asarray(memoryview(cast(Any, a)).obj)[1:],
]


def full_of(number: float) -> Array:
    return np.full(SIZE, number)


def traffic(writer: SpoolWriter, reader: SpoolReader, rounds: int = 12) -> None:
    """Puts and gets of the same size, so that every file that may be written again is."""
    gc.collect()
    for number in range(rounds):
        for _ in range(3):
            writer.put(full_of(-number))
        for _ in range(3):
            assert (reader.get_nowait() == -number).all()


@pytest.mark.parametrize("keep", WAYS)
def test_any_view_of_a_view_keeps_the_file_as_it_is(
    writer: SpoolWriter, reader: SpoolReader, keep: Callable[[Array], Array]
) -> None:
    writer.put(full_of(7))
    kept = keep(reader.get_nowait())
    before = kept.tobytes()
    traffic(writer, reader)
    assert kept.tobytes() == before


@pytest.mark.parametrize("lent", [False, True], ids=["put", "lent"])
@pytest.mark.parametrize("verify", [False, True], ids=["", "verified"])
def test_array_copied_on_write_is_ones_own_where_it_was_written_and_the_item_s_elsewhere(
    spool: Path, lent: bool, verify: bool
) -> None:
    with SpoolWriter(spool, checksum=True) as writer, SpoolReader(spool, verify=verify) as reader:
        for _ in range(3):
            if lent:
                with writer.loan(SIZE) as array:
                    array[:] = 7
            else:
                array = full_of(7)
                writer.put(array)
            item = reader.receive(copy="on-write")
            inode = next((spool / "items").iterdir()).stat().st_ino
            received = item.array
            assert inode_of(received) == inode  # nothing was copied
            received[: SIZE // 2] = -1
            assert (array == 7).all()
            item.nack()
            got = reader.get(copy="on-write")
            assert (got == 7).all()
            got[SIZE // 2 :] = -2
            for each in (received, got):
                assert each.flags.writeable
            del item
            traffic(writer, reader)
            assert (set(received[: SIZE // 2]), set(received[SIZE // 2 :])) == ({-1.0}, {7.0})
            assert (set(got[: SIZE // 2]), set(got[SIZE // 2 :])) == ({7.0}, {-2.0})


@pytest.mark.parametrize("size", [10, SIZE])
@pytest.mark.parametrize("copy", [True, "on-write"])
def test_every_way_to_get_gives_arrays_that_may_be_written(spool: Path, copy: Any, size: int) -> None:
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put_many([np.zeros(size)] * 7)
        writer.put({"a": np.zeros(size), "b": np.zeros(3)})
        writer.shutdown()
        arrays = [reader.get(copy=copy), *reader.get_many(1, copy=copy), reader.get_nowait(copy=copy)]
        with reader.receive(copy=copy) as item:
            arrays.append(item.array)
        arrays.append(reader.take(copy=copy).array)
        arrays.append(next(iter(reader.arrays(copy=copy))))
        for number, item in enumerate(reader.items(copy=copy)):
            arrays += item.arrays.values()
            item.array if number == 0 else item.arrays  # noqa: B018
        assert len(arrays) == 9
        for array in arrays:
            array += 1
            assert (array == 1).all()
        for call in (reader.get, reader.take, reader.receive, partial(reader.get_many, 1)):
            with pytest.raises(ValueError, match='copy must be True, False or "on-write", not'):
                call(copy=cast(Any, "always"))


def test_view_got_in_another_process_stays_while_this_one_puts(
    spool: Path, writer: SpoolWriter, reader: SpoolReader
) -> None:
    for number in range(10):
        writer.put(full_of(number))
    with Peer(spool) as peer:
        peer.run("reader = SpoolReader(path); views = [reader.get_nowait() for _ in range(10)]")
        traffic(writer, reader)
        found = peer.ask("[float(view[0]) if (view == view[0]).all() else None for view in views]")
        assert found == list(range(10))


def each(*steps: Callable[[], object]) -> None:
    for step in steps:
        step()


EVENTS: dict[str, Callable[[Item, SpoolReader, SpoolWriter, SpoolReader], object]] = {
    "acked": lambda item, reader, writer, other: item.ack(),
    "nacked": lambda item, reader, writer, other: item.nack(),
    "nacked, got by the same": lambda item, reader, writer, other: each(item.nack, reader.get_nowait),
    "nacked, received by the same": lambda item, reader, writer, other: each(item.nack, lambda: use(reader)),
    "nacked, received by another": lambda item, reader, writer, other: each(item.nack, lambda: use(other)),
    "rejected": lambda item, reader, writer, other: item.reject("on purpose"),
    "reader closed": lambda item, reader, writer, other: reader.close(),
    "all closed": lambda item, reader, writer, other: each(reader.close, writer.close, other.close),
    "spool deleted": lambda item, reader, writer, other: shutil.rmtree(writer.path),
    "table lost": lambda item, reader, writer, other: os.unlink(f"{writer.path}/index"),
    "shut down": lambda item, reader, writer, other: writer.shutdown(immediate=True),
}


def use(reader: SpoolReader) -> None:
    """Receive an item, whose second view is then dropped before the first."""
    with reader.receive(block=False) as item:
        assert (item.array == 4).all()


@pytest.mark.parametrize("event", EVENTS)
def test_views_outlive_what_becomes_of_item_reader_and_spool(spool: Path, event: str) -> None:
    """Of items got and of one received, which `event` is done to; afterwards whatever may be written again is."""
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader, SpoolReader(spool) as other:
        writer.put_many([full_of(number) for number in range(5)])
        views = reader.get_many(4)
        item = reader.receive()
        views.append(item.array)
        EVENTS[event](item, reader, writer, other)
        del item
        for number in (5, 6):
            with SpoolWriter(spool, reopen=True) as again, SpoolReader(spool) as another:
                again.put(full_of(number))
                while another.get_nowait()[0] != number:
                    pass  # what was received may have come back
                traffic(again, another)
                if event in ("acked", "rejected", "table lost") or event.startswith("nacked"):
                    traffic(writer, reader)
        for number, view in enumerate(views):
            assert (view == number).all()


def test_base_alone_keeps_the_file_of_named_arrays_the_first_of_which_is_empty(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    writer.put({"none": np.zeros(0), "some": full_of(7), "more": full_of(8)})
    arrays = reader.get_nowait()
    assert isinstance(arrays, dict)
    kept = cast(Array, arrays["more"].base)
    del arrays
    before = kept.tobytes()
    traffic(writer, reader)
    assert kept.tobytes() == before


def test_two_threads_that_ask_one_item_for_its_array_at_once_both_keep_it(
    writer: SpoolWriter, reader: SpoolReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the other where the item's file is opened, when neither has seen that there is an array."""
    writer.put(full_of(7))
    item = reader.receive()
    both = threading.Barrier(2, timeout=20)
    real = fs.stat_at

    def together(*args: Any, **options: Any) -> os.stat_result:
        both.wait()
        return real(*args, **options)

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(fs, "stat_at", together)
        asked = [threads.submit(lambda: item.array) for _ in range(2)]
        found = [one.result(20) for one in asked]
    del asked
    assert found[0] is not found[1]
    item.ack()
    vars(item).clear()
    for _ in range(2):
        kept = found.pop()
        traffic(writer, reader)
        assert (kept == 7).all()


@pytest.mark.parametrize("name", ["stat_at", "map_file"])
def test_item_acknowledged_while_another_thread_asks_for_its_array(
    writer: SpoolWriter, reader: SpoolReader, name: str
) -> None:
    """The array it gets stays as it is, or it gets none."""
    writer.put(full_of(7))
    item = reader.receive()
    acked: list[None] = []

    def act(event: Event) -> None:
        if event.name == name and not acked:
            acked.append(Call(item.ack).result())

    with Injector(act), contextlib.suppress(LeaseExpired):
        kept = item.array
        traffic(writer, reader)
        assert (kept == 7).all()
    assert acked


def test_array_asked_for_while_another_thread_acknowledges_the_item(
    writer: SpoolWriter, reader: SpoolReader
) -> None:
    """Just before the file is moved: whoever asks waits, and then gets none."""
    writer.put(full_of(7))
    item = reader.receive()
    asked: list[Call] = []

    def act(event: Event) -> None:
        if event.name == "rename" and not asked:
            asked.append(Call(lambda: item.array))
            asked[0].until_asleep()

    with Injector(act):
        item.ack()
    assert isinstance(asked[0].error(), LeaseExpired)
