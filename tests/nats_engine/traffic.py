"""Items of all kinds, put and received while something happens, and an exact account of them at the end."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, Self

import numpy as np

from spoolipc import Empty, ServerUnreachable, SpoolReader, SpoolWriter, StorageError, stat
from spoolipc.message import Message
from spoolipc.nats import spool as spools

_LARGE, _MIDDLE = 300_000, 150_000
"""Float64 that are four messages, and three."""
PATIENCE: Final = 120.0


def made(url: str) -> SpoolWriter:
    """A writer of a spool that has no limit of attempts, as soon as the servers have found together."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return SpoolWriter(url, max_attempts=0, maxsize=40)
        except (ServerUnreachable, StorageError):
            assert time.monotonic() < deadline


class Traffic:
    """A writer and a reader at work. url: of a spool that is there. prefix: 8 digits of the items' ids."""

    def __init__(self, url: str, prefix: str) -> None:
        self._url, self._prefix = url, prefix
        self._put: list[str] = []
        self._acknowledged: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._ending = threading.Event()
        self._threads = ThreadPoolExecutor()

    def __enter__(self) -> Self:
        self.writer = made(self._url)
        self._reader = SpoolReader(self._url)
        self._running = [self._threads.submit(each) for each in (self._write, self._read)]
        return self

    def _write(self) -> None:
        number = 0
        while not self._ending.is_set():
            sizes = [_LARGE] if number % 20 == 0 else [10, _MIDDLE, 10] if number % 20 == 10 else [10]
            messages = [
                Message((np.full(size, float(number + k)),), id=f"{self._prefix}{number + k:024x}")
                for k, size in enumerate(sizes)
            ]
            self.writer._producer.put(messages, None)
            number += len(sizes)
            self._put += [message.id for message in messages]
            self._tell()

    def _read(self) -> None:
        with self._reader as reader:
            while not self._ending.is_set() or self._acknowledged.total() < len(self._put):
                with suppress(Empty, ServerUnreachable):
                    item = reader.receive(timeout=1)
                    own = item.id.startswith(self._prefix)  # of a put that was given up it is not
                    assert not own or (item.array == int(item.id[8:], 16)).all()
                    item.ack()
                    self._acknowledged[item.id] += own
                    self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def until(self, more: int) -> None:
        """Wait until so many more were put, and as many acknowledged."""
        puts, acknowledged = len(self._put) + more, len(self._acknowledged) + more
        with self._changed:
            done = self._changed.wait_for(
                lambda: len(self._put) >= puts and len(self._acknowledged) >= acknowledged, PATIENCE
            )
        for each in self._running:
            if each.done():
                each.result()
        assert done, f"stuck: {len(self._put)} put, {len(self._acknowledged)} acknowledged"

    def __exit__(self, kind: object, *_: object) -> None:
        self._ending.set()
        try:
            for each in self._running:
                each.result(PATIENCE)
        finally:
            self.writer.close()
        if kind is None:
            assert +self._acknowledged == Counter(set(self._put)), "lost or doubled"
            deadline = time.monotonic() + PATIENCE
            while (left := self._left()) != (0, 0, 0, 0):  # a leader that was cut off may answer still
                assert time.monotonic() < deadline, left

    def _left(self) -> tuple[int, ...]:
        spools.ORPHANED = -1e6  # type: ignore[misc]  # pieces that came late
        made(self._url).close()
        try:
            found = stat(self._url)
        except ServerUnreachable:  # they choose who leads
            return ()
        return found.depth, found.in_flight, found.failed, found.bytes
