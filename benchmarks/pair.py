"""Two processes that pass arrays to each other, and the time a message takes; by any carrier.

Every carrier does the same work in the same layout: two spawned processes, one producing and one consuming, at most
eight messages in flight. The producer hands over an array it has; the consumer reads every byte of it, in place where
the carrier allows that, and checks the sum. Measured is the steady state: messages before and after the timed ones
keep the window full. Carriers take turns within each round.
"""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

Array = np.ndarray[Any, Any]
WINDOW = 8
TIMEOUT = 120.0
"""Seconds after which a carrier that says nothing is given up."""
SPAWN = multiprocessing.get_context("spawn")
Kind = Literal["one way", "round trip"]
KINDS: tuple[Kind, ...] = ("one way", "round trip")
Read = Callable[[Array], object]


class Sender(Protocol):
    """The producing end of a link, in its own process."""

    def send(self, array: Array) -> None:
        """Hand over an array, waiting while the window is full."""

    def close(self) -> None:
        """Leave."""


class Receiver(Protocol):
    """The consuming end of a link, in its own process."""

    def receive(self, read: Read) -> None:
        """Wait for the next array, call `read` on it while it is valid, and let go of it."""

    def close(self) -> None:
        """Leave."""


class Link(Protocol):
    """One direction between two processes. Made in the parent and passed to both as an argument."""

    def sender(self) -> Sender:
        """Open the producing end in this process."""

    def receiver(self) -> Receiver:
        """Open the consuming end in this process."""

    def close(self) -> None:
        """Remove what is left, in the parent, when both processes have ended."""


MakeLink = Callable[[Path, int, int], Link]
"""Makes a link in the parent: a scratch directory of its own, bytes of each array, messages in flight."""


@dataclass(frozen=True)
class Measured:
    """One carrier at one size: `seconds` per message, one figure a round; `error` when it could not be measured.

    place: the kind of storage, where a carrier has a choice. nbytes: bytes of the float64 array.
    """

    carrier: str
    place: str
    kind: Kind
    nbytes: int
    seconds: tuple[float, ...] = ()
    error: str | None = None

    @property
    def median(self) -> float:
        """The middle of the rounds, in seconds per message; nan when there are none."""
        return statistics.median(self.seconds) if self.seconds else float("nan")


def compare(
    links: dict[tuple[str, str], MakeLink],
    nbytes: int,
    scratch: Path,
    *,
    rounds: int,
    seconds: float,
    kinds: Sequence[Kind] = KINDS,
) -> list[Measured]:
    """Measure carriers side by side at one size; they take turns in every round.

    links: by the name and the place of the carrier. scratch: an existing directory for what they store.
    """
    pairs: dict[tuple[str, str], Pair] = {}
    results: dict[tuple[str, str, Kind], Measured] = {}

    def failed(key: tuple[str, str], error: BaseException) -> None:
        for kind in kinds:
            if not results.get((*key, kind)):
                results[*key, kind] = Measured(*key, kind, nbytes, error=f"{type(error).__name__}: {error}")
        if key in pairs:
            pairs.pop(key).close()

    try:
        for key, make in links.items():
            try:
                pairs[key] = Pair(make, nbytes, scratch)
            except Exception as error:
                failed(key, error)
        for kind in kinds:
            counts: dict[tuple[str, str], tuple[int, int]] = {}
            times: dict[tuple[str, str], list[float]] = {key: [] for key in pairs}
            for number in range(rounds + 1):
                for key, pair in list(pairs.items()):
                    try:
                        if not number:
                            counts[key] = pair.warm_up(kind, seconds)
                        else:
                            times[key].append(pair.measure(kind, *counts[key]))
                    except Exception as error:
                        failed(key, error)
            for key in pairs:
                results[*key, kind] = Measured(*key, kind, nbytes, tuple(times[key]))
    finally:
        for pair in pairs.values():
            pair.close()
    return list(results.values())


_TURNS = ((0.03, WINDOW, WINDOW), (0.1, 4, 2), (float("inf"), 2, 1))
"""For messages that take less than so many seconds: how many to time at least, and to pass before and after them."""


class Pair:
    """A producing and a consuming process, and a link each way between them."""

    def __init__(self, make: MakeLink, nbytes: int, scratch: Path) -> None:
        self._links: list[Link] = []
        self._processes: list[Any] = []
        self._controls: list[Connection] = []
        self._scratch = Path(tempfile.mkdtemp(dir=scratch))
        try:
            for window in (WINDOW, 2):
                folder = self._scratch / str(len(self._links))
                folder.mkdir()
                self._links.append(make(folder, nbytes, window))
            for role in (_produce, _consume):
                ours, theirs = SPAWN.Pipe()
                process = SPAWN.Process(target=_play, args=(role, theirs, *self._links, nbytes), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._controls.append(ours)
            self.finish()
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, int]:
        """The process ids of the producer and the consumer."""
        producer, consumer = (process.pid for process in self._processes)
        return producer, consumer

    def start(self, kind: Kind, count: int, edge: int) -> None:
        """Let both processes begin to pass `count` messages, and `edge` more before and after them."""
        for control in self._controls:
            control.send((kind, count, edge))

    def finish(self) -> float:
        """Seconds per message of what was started. Raises RuntimeError when a process failed, TimeoutError."""
        return sum(self._answers())

    def _answers(self) -> Iterator[float]:
        """What each process answers, whichever is first, so that the failure of one is seen while the other waits."""
        silent = list(self._controls)
        while silent:
            spoken = wait(silent, TIMEOUT)
            if not spoken:
                raise TimeoutError(f"no answer in {TIMEOUT:g} s")
            for control in self._controls:
                if control in spoken:
                    silent.remove(control)
                    try:
                        answer = control.recv()
                    except EOFError:
                        raise RuntimeError("its process ended early") from None
                    if isinstance(answer, str):
                        raise RuntimeError(answer)
                    yield answer

    def measure(self, kind: Kind, count: int, edge: int) -> float:
        """Seconds per message, the mean of `count` one way or the median of as many round trips."""
        self.start(kind, count, edge)
        return self.finish()

    def warm_up(self, kind: Kind, seconds: float) -> tuple[int, int]:
        """Bring the pair to its steady state, and find how many messages to time in a turn of `seconds`, and how many
        to pass before and after them."""
        took = self.measure(kind, 2, 1)
        if took < 0.03:
            took = self.measure(kind, 2 * WINDOW, WINDOW)
        least, edge = next((least, edge) for most, least, edge in _TURNS if took < most)
        return min(max(int(seconds / took), least), 20_000), edge

    def close(self) -> None:
        """End both processes and remove what they stored."""
        for control in self._controls:
            try:
                control.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        for control in self._controls:
            control.close()
        for link in self._links:
            link.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def _play(
    role: Callable[..., Iterator[float]], control: Connection, forth: Link, back: Link, nbytes: int
) -> None:
    """A process of a pair: do as the parent says, until it says nothing more."""
    try:
        for answer in role(iter(control.recv, None), forth, back, nbytes):
            control.send(answer)
    except EOFError:
        return  # the parent is gone
    except Exception as error:
        control.send(f"{type(error).__name__}: {error}")


Orders = Iterator[tuple[Kind, int, int]]


def _produce(orders: Orders, forth: Link, back: Link, nbytes: int) -> Iterator[float]:
    array = source(nbytes)
    read = checker(array)
    sender, receiver = forth.sender(), back.receiver()
    try:
        yield 0.0
        for kind, count, edge in orders:
            if kind == "one way":
                for _ in range(count + 2 * edge):
                    sender.send(array)
                yield 0.0
            else:
                trips = []
                for _ in range(edge + count):
                    began = time.perf_counter()
                    sender.send(array)
                    receiver.receive(read)
                    trips.append(time.perf_counter() - began)
                yield statistics.median(trips[edge:])
    finally:
        sender.close()
        receiver.close()


def _consume(orders: Orders, forth: Link, back: Link, nbytes: int) -> Iterator[float]:
    read = checker(source(nbytes))
    receiver, sender = forth.receiver(), back.sender()

    def echo(array: Array) -> None:
        read(array)
        sender.send(array)

    try:
        yield 0.0
        for kind, count, edge in orders:
            if kind == "one way":
                for _ in range(edge):
                    receiver.receive(read)
                began = time.perf_counter()
                for _ in range(count):
                    receiver.receive(read)
                took = time.perf_counter() - began
                for _ in range(edge):
                    receiver.receive(read)
                yield took / count
            else:
                for _ in range(edge + count):
                    receiver.receive(echo)
                yield 0.0
    finally:
        receiver.close()
        sender.close()


def source(nbytes: int) -> Array:
    """The array that is sent: float64, nearly `nbytes` long, the same in both processes."""
    return np.random.default_rng(nbytes).random(nbytes // 8)


def checker(array: Array) -> Read:
    """A reader of arrays that adds up every byte, 8 at a time.

    It raises ValueError unless the bytes are those of `array`.
    """
    expected, size = np.add.reduce(array.view(np.uint64)), array.size

    def read(received: Array) -> None:
        if received.size != size or np.add.reduce(received.view(np.uint64)) != expected:
            raise ValueError("a damaged array arrived")

    return read
