"""Metadata goes with its item, is read without the arrays, and lies in the item's file."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spoolipc import SpoolReader, SpoolWriter
from spoolipc.directory import fs

LARGE = 200_000
VALUES: list[Any] = [
    *(None, True, 0, -1.5, 10**30, "", "größe 長さ \x00 \U0001f600", [], {}, list(range(1000))),
    {"camera": 3, "": None, "größe": [1, [2, {"deep": []}]]},
]


@pytest.mark.parametrize("lost", [False, True], ids=["", "table lost"])
@pytest.mark.parametrize("size", [1, LARGE])
@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_any_json_value_comes_back(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, value: Any, size: int, lost: bool
) -> None:
    for _ in range(2):  # the second into a file that was consumed
        writer.put(np.zeros(size), meta=value)
        if lost:
            (spool / "index").unlink()
        assert reader.peek().meta == value
        with reader.receive(block=False) as item:
            assert item.meta == value
            assert len(item.array) == size
            assert item.meta == value


def test_metadata_is_read_without_mapping_the_file(
    writer: SpoolWriter, reader: SpoolReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = fs.map_file, list[Any]()

    def counted(*args: Any, **kwargs: Any) -> mmap.mmap:
        made.append(args)
        return real(*args, **kwargs)

    writer.put({"a": np.zeros(LARGE), "b": np.zeros(3)}, meta={"camera": 3})
    monkeypatch.setattr(fs, "map_file", counted)
    assert reader.peek().meta == {"camera": 3}
    with reader.receive() as item:
        assert item.meta == {"camera": 3}
        assert item.put_time
        assert not made
        assert item.arrays["a"].shape == (LARGE,)
        assert len(made) == 1  # for all arrays


def test_time_of_the_put_is_found_again_when_the_table_is_lost(
    writer: SpoolWriter, reader: SpoolReader, spool: Path
) -> None:
    for number in range(
        6
    ):  # the later ones into a consumed file, whose modification time says something else
        if number > 2:
            writer.put(np.zeros(LARGE))
            reader.get()
        writer.put(np.zeros(LARGE))
        before = reader.peek().put_time
        (spool / "index").unlink()
        assert reader.peek().put_time == before
        with reader.receive(block=False) as item:
            assert item.put_time == before


@pytest.mark.parametrize("bad", [float("nan"), {1: 2}, np.longdouble(1)], ids=str)
def test_what_is_no_json_is_refused_before_anything_is_put(
    writer: SpoolWriter, reader: SpoolReader, spool: Path, bad: Any
) -> None:
    for size in (3, LARGE):
        with pytest.raises((TypeError, ValueError)):
            writer.put(np.zeros(size), meta=bad)
        with pytest.raises((TypeError, ValueError)), writer.loan(size, meta=bad):
            pytest.fail("the loan was given")
        with pytest.raises((TypeError, ValueError)):
            writer.put_many([np.zeros(size)] * 2, metas=[1, bad])
    for part in ("items", "tmp"):
        assert list((spool / part).iterdir()) == []
    writer.put(np.zeros(1))
    assert reader.get_nowait() == 0
