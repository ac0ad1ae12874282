"""What is put at a source, and what of it is at a destination: by the ids that items keep wherever they go."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from spoolipc import SpoolReader, SpoolWriter
from spoolipc.message import Message


def arrays_of(number: int) -> tuple[Any, ...]:
    """Every tenth is larger than a message of a server, every seventh has two arrays."""
    first = np.full((200_000 if number % 10 == 0 else 10), number)
    return (first, np.full((2, 3), number, "f4")) if number % 7 == 0 else (first,)


def fill(place: str | os.PathLike[str], count: int) -> list[str]:
    """Put so many items, which may be received as often as forwarders die; returns their ids."""
    ids = [f"{number:032x}" for number in range(1, count + 1)]
    with SpoolWriter(place, max_attempts=0) as writer:
        for number, each in enumerate(ids):
            arrays = arrays_of(number)
            names = ("a", "b") if len(arrays) == 2 else None
            writer._producer.put([Message(arrays, names, {"number": number}, id=each)], None)
    return ids


def drained(place: str | os.PathLike[str]) -> list[str]:
    """The ids of what waits, each with the arrays and the metadata that it was put with."""
    ids = []
    with SpoolReader(place) as reader:
        while not reader.empty():
            item = reader.take(timeout=20)
            expected = arrays_of(item.meta["number"])
            assert len(item.arrays) == len(expected)
            for found, put in zip(item.arrays.values(), expected, strict=True):
                np.testing.assert_array_equal(found, put, strict=True)
            assert item.id == f"{item.meta['number'] + 1:032x}"
            ids.append(item.id)
    return ids
