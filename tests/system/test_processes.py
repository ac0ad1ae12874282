"""Between processes every item arrives once, whole and in its writer's order, and an end is heard by all."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.peer import Peer
from support.waits import start_waiting

from spoolipc import SpoolReader, SpoolWriter

WRITERS = 4
READERS = 4
ITEMS = 1000
"""Of each writer."""
SIZES = (1_000, 3_000, 12_000, 17_000, 40_000, 100_000, 200_000)
"""Bytes of the arrays, about; those below 16 KB are copied, the others views of the file."""
LOOK = 1.0
"""Seconds after which whoever sleeps looks by itself."""
Array = np.ndarray[Any, Any]


def item(writer: int, number: int) -> Array:
    """The item's writer and number, and a content that follows from them."""
    size = SIZES[(number * 5 + writer) % len(SIZES)] // 8 + number % 7
    array = np.arange(size, dtype="u8")
    array += np.uint64(writer << 40 | number << 20)
    array[:2] = writer, number
    return array


def identity(array: Array) -> tuple[int, int] | None:
    """Writer and number of an item, None if its content does not follow from them."""
    writer, number = int(array[0]), int(array[1])
    if writer < WRITERS and number < ITEMS and (array == item(writer, number)).all():
        return writer, number
    return None


def put_all(path: Path, writer: int, pipe: Connection) -> None:
    with SpoolWriter(path, maxsize=50) as spool:
        for number in range(ITEMS):
            spool.put(item(writer, number), timeout=50)
    pipe.send(None)


def get_all(path: Path, me: int, pipe: Connection) -> None:
    """Every reader keeps the last few views and looks at them again later."""
    seen: list[tuple[int, int] | None] = []
    kept: list[Array] = []
    with SpoolReader(path) as spool:
        for array in spool:
            seen.append(identity(array))
            kept.append(array)
            if len(kept) > me:
                assert identity(kept.pop(0)) is not None
    pipe.send(seen)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of threads, from Python 3.12
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_every_item_arrives_once_and_whole_and_each_writers_in_order(spool: Path, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    with SpoolWriter(spool, maxsize=50) as shared, contextlib.ExitStack() as ends:

        def start(work: Callable[[Path, int, Connection], None], number: int) -> Connection:
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(spool, number, theirs))
            process.start()
            theirs.close()
            for end in (ours.close, process.join, process.kill):  # called last to first
                ends.callback(end)
            return ours  # type: ignore[no-any-return]

        def received(pipe: Connection) -> Any:
            assert pipe.poll(100), "the other process says nothing"
            return pipe.recv()

        writers = [start(put_all, writer) for writer in range(WRITERS)]
        readers = [start(get_all, reader) for reader in range(READERS)]
        for pipe in writers:
            received(pipe)
        shared.shutdown()
        seen = [received(pipe) for pipe in readers]
    everything = [one for of_reader in seen for one in of_reader]
    assert None not in everything
    assert sorted(everything) == [(writer, number) for writer in range(WRITERS) for number in range(ITEMS)]
    for of_reader in seen:
        for writer in range(WRITERS):
            numbers = [number for who, number in of_reader if who == writer]
            assert numbers == sorted(numbers)
    for part in ("items", "tmp", "failed"):
        assert list((spool / part).iterdir()) == []


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("side", ["items", "space"])
def test_shutdown_wakes_who_waits_in_other_processes(spool: Path, side: str, immediate: bool) -> None:
    opened, call = {
        "items": ("side = SpoolReader(path)", "side.get()"),
        "space": ("side = SpoolWriter(path)", "side.put(np.zeros(10_000))"),
    }[side]
    with SpoolWriter(spool, maxsize=1) as writer, Peer(spool) as one, Peer(spool) as other:
        if side == "space":
            writer.put(np.zeros(1))
        for peer in (one, other):
            peer.run(f"{opened}\ndef end():\n try: {call}\n except ShutDown: return time.monotonic()")
            start_waiting(peer, "end()")
        began = time.monotonic()
        writer.shutdown(immediate)
        assert max(one.answer(), other.answer()) - began < 0.8 * LOOK
        for peer in (one, other):
            peer.run("side.close()")


def test_processes_that_come_at_once_make_one_spool(spool: Path) -> None:
    with contextlib.ExitStack() as ends:
        peers = [ends.enter_context(Peer(spool)) for _ in range(6)]
        for peer in peers:
            peer.run("pass")
        at = time.monotonic() + 0.05
        for number, peer in enumerate(peers):
            peer.start(
                "run",
                f"while time.monotonic() < {at}: pass\n"
                f"with SpoolWriter(path, maxsize=10) as writer: writer.put(np.array([{number}]))",
            )
        for peer in peers:
            peer.answer()
    with SpoolReader(spool) as reader:
        assert sorted(int(reader.get_nowait()[0]) for _ in peers) == list(range(6))
        assert reader.empty()
