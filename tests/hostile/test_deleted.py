"""A spool deleted while in use is a clear error in every party: none hangs, and none makes it again."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spoolipc import NotASpool, SpoolGone, SpoolReader, SpoolWriter, failed_retry, fsck, gc, stat

SMALL, LARGE = np.arange(3), np.arange(10_000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.mark.parametrize("array", [SMALL, LARGE], ids=["small", "large"])
def test_every_call_says_so(path: Path, array: Any) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in range(3):
            writer.put(array)
        got = reader.get()
        item = reader.receive()
        shutil.rmtree(path)
        calls: list[Callable[[], object]] = [
            lambda: writer.put(array),
            lambda: writer.put_many([array, array]),
            lambda: writer.loan(array.shape, array.dtype).__enter__(),
            reader.get,
            reader.get_nowait,
            lambda: reader.get(timeout=5.0),
            reader.receive,
            item.ack,
            item.nack,
            writer.shutdown,
        ]
        for call in calls:
            with pytest.raises(SpoolGone, match=str(path)) as caught:
                call()
            assert isinstance(caught.value, FileNotFoundError)
        assert np.array_equal(got, array)  # views outlive their file
    assert not path.exists()


@pytest.mark.parametrize("side", ["items", "space"])
def test_who_waits_is_told_within_seconds(path: Path, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        SpoolWriter(path, maxsize=1) as writer,
        SpoolReader(path) as reader,
        ThreadPoolExecutor(1) as threads,
    ):
        if side == "space":
            writer.put(SMALL)
        waits = threading.Event()
        looked = reader._source if side == "items" else writer._sink
        sleep = looked.party.bells.wait

        def wait(*arguments: Any) -> bool:
            waits.set()
            return sleep(*arguments)

        monkeypatch.setattr(looked.party.bells, "wait", wait)
        waiting = threads.submit(reader.get if side == "items" else lambda: writer.put(SMALL))
        assert waits.wait(20)
        shutil.rmtree(path)
        with pytest.raises(SpoolGone):
            waiting.result(20)
    assert not path.exists()


def test_tools_say_that_there_is_none(path: Path) -> None:
    SpoolWriter(path).close()
    shutil.rmtree(path)
    tools: list[Callable[[Path], object]] = [stat, gc, fsck, failed_retry]
    for tool in tools:
        with pytest.raises(NotASpool, match=str(path)):
            tool(path)
    assert not path.exists()


def test_another_spool_at_the_same_path_is_not_taken_for_the_old(path: Path) -> None:
    with SpoolWriter(path) as old:
        old.put(SMALL)
        shutil.rmtree(path)
        with SpoolWriter(path) as new, SpoolReader(path) as reader:
            new.put(LARGE)
            with pytest.raises(SpoolGone):
                old.put(SMALL)
            assert np.array_equal(reader.get_nowait(), LARGE)
            assert reader.empty()
