"""Threads may share a writer and a reader: every item arrives once and whole, and each thread's in its order."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from spoolipc import ShutDown, SpoolReader, SpoolWriter

THREADS = 8
"""On each side."""
ITEMS = 150
"""Of each thread."""
LARGE = 5000


def test_threads_that_share_a_writer_and_a_reader_put_and_get_as_processes_would(spool: Path) -> None:
    """Each way to put, and each to get; half of the items are given out as views, which are looked at again later."""

    def numbered(thread: int, number: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.full(LARGE if number % 2 else 10, thread * ITEMS + number, dtype=float)

    with (
        SpoolWriter(spool, maxsize=20) as writer,
        SpoolReader(spool) as reader,
        ThreadPoolExecutor(2 * THREADS) as threads,
    ):

        def putting(thread: int) -> None:
            for number in range(ITEMS):
                array = numbered(thread, number)
                if thread % 3 == 0:
                    writer.put(array)
                elif thread % 3 == 1:
                    writer.put_many([array])
                else:
                    with writer.loan(array.shape, array.dtype) as lent:
                        lent[:] = array

        def getting(thread: int) -> list[float]:
            found: list[float] = []
            kept = []
            with contextlib.suppress(ShutDown):
                while True:
                    if thread % 3 == 0:
                        array = reader.get()
                    elif thread % 3 == 1:
                        (array,) = reader.get_many(1)
                    else:
                        with reader.receive() as item:
                            array = item.array
                        del item
                    found.append(array[0])
                    kept.append(array)
                    if len(kept) > thread:
                        view = kept.pop(0)
                        assert (view == found[-1 - len(kept)]).all()
            return found

        getters = [threads.submit(getting, thread) for thread in range(THREADS)]
        try:
            list(threads.map(putting, range(THREADS)))
        finally:
            writer.shutdown()
        found = [getter.result(60) for getter in getters]
    assert sorted(value for each in found for value in each) == list(range(THREADS * ITEMS))
    for each in found:
        for thread in range(THREADS):
            mine = [value for value in each if value // ITEMS == thread]
            assert mine == sorted(mine)
