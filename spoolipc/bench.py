"""How fast arrays pass here: spoolipc beside multiprocessing.Queue and the limit, a warmed SharedMemory ring.

Every carrier does the same work in the same layout: two spawned processes, one producing and one consuming,
at most eight messages in flight. The producer hands over an array it has; the consumer reads every byte
of it, in place where the carrier allows that, and checks the sum. Measured is the steady state: messages before and
after the timed ones keep the window full. Carriers take turns within each round.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any, Literal, Protocol

import filelock
import numpy as np
import watchdog.version

from .engine import Array
from .reader import SpoolReader
from .writer import SpoolWriter

WINDOW = 8
SIZES = (1_000, 16_000, 64_000, 1_000_000, 8_000_000, 54_000_000)
QUICK_SIZES = (1_000, 64_000, 1_000_000, 54_000_000)
SHM = Path("/dev/shm")
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


@dataclass(frozen=True)
class BenchResult:
    """What `bench` measured, the machine, and the versions in use."""

    machine: dict[str, str]
    results: tuple[Measured, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Times per message, one row for each kind and size, with spoolipc's ratio to each of the others."""
        names = list(dict.fromkeys(one.carrier for one in self.results))
        others = [name for name in names if name != "spoolipc"]
        head = ["", "size", *names, *(f"{name} / spoolipc" for name in others)]
        lines = [_row(head), _row(["---", *["--:"] * (len(head) - 1)])]
        for kind, nbytes in dict.fromkeys((one.kind, one.nbytes) for one in self.results):
            here = {one.carrier: one for one in self.results if (one.kind, one.nbytes) == (kind, nbytes)}
            times = [show_seconds(here[name].median) if name in here else "" for name in names]
            ours = here["spoolipc"].median
            ratios = [f"{here[name].median / ours:.2f}" if name in here else "" for name in others]
            lines.append(_row([kind, show_bytes(nbytes), *times, *ratios]))
        failed = [
            f"{one.carrier}, {show_bytes(one.nbytes)}: {one.error}" for one in self.results if one.error
        ]
        return "\n".join(lines + failed)


def bench(
    directory: str | os.PathLike[str] | None = None,
    *,
    sizes: Sequence[int] | None = None,
    rounds: int | None = None,
    seconds: float | None = None,
    quick: bool = False,
) -> BenchResult:
    """Measure spoolipc, multiprocessing.Queue and the limit, one way and round trip.

    directory: where the spools are made, and removed again; by default /dev/shm where there is one.
    sizes: bytes of the float64 arrays. rounds: times that the carriers take turns. seconds: time that one turn
    should last. quick: fewer sizes, shorter and fewer rounds, wherever these are not given.

    Raises ValueError for a size under 8 bytes, OSError when the directory cannot be written. A carrier that
    fails is reported with its error in the result.
    """
    sizes = tuple(sizes or (QUICK_SIZES if quick else SIZES))
    if min(sizes) < 8:
        raise ValueError(f"the smallest array is one float64 of 8 bytes, not {min(sizes)}")
    if directory is None:
        directory = SHM if os.access(SHM, os.W_OK) else tempfile.gettempdir()
    links: dict[str, MakeLink] = {
        "limit": RingLink,
        "spoolipc": SpoolLink,
        "multiprocessing.Queue": QueueLink,
    }
    results: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="spoolipc-bench-", dir=directory) as scratch:
        for nbytes in sizes:
            with_place = {
                (name, "memory" if name != "spoolipc" else "spool"): make for name, make in links.items()
            }
            results += compare(
                with_place,
                nbytes,
                Path(scratch),
                rounds=rounds or (3 if quick else 5),
                seconds=seconds or (0.05 if quick else 0.2),
            )
    return BenchResult(machine(), tuple(results))


MakeLink = Callable[[Path, int, int], Link]
"""Makes a link in the parent: a scratch directory of its own, bytes of each array, messages in flight."""


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
        if took < 0.05:
            took = self.measure(kind, 2 * WINDOW, WINDOW)
        least, edge = (WINDOW, WINDOW) if took < 0.05 else (3, 2)
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


class RingLink:
    """The limit: slots in a SharedMemory that both sides keep mapped.

    The producer copies into a slot, and the consumer reads it where it is.
    """

    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        size = nbytes // 8 * 8
        if shutil.disk_usage(SHM).free < size * window:
            raise OSError(f"{SHM} has no room for {size * window} bytes")
        self._shape = (window, size // 8)
        self._memory = SharedMemory(create=True, size=size * window)
        self._free: Semaphore = SPAWN.Semaphore(window)
        self._filled: Semaphore = SPAWN.Semaphore(0)

    def sender(self) -> Sender:
        return _RingEnd(self._memory.name, self._shape, self._free, self._filled)

    def receiver(self) -> Receiver:
        return _RingEnd(self._memory.name, self._shape, self._filled, self._free)

    def close(self) -> None:
        self._memory.close()
        self._memory.unlink()


class _RingEnd:
    """One end of the ring: waits on one semaphore, posts the other."""

    def __init__(self, name: str, shape: tuple[int, int], wait: Semaphore, post: Semaphore) -> None:
        self._memory = SharedMemory(name)
        slots: Array = np.ndarray(shape, np.float64, self._memory.buf)
        self._slots = list(slots)
        self._wait, self._post = wait, post
        self._next = 0

    def _turn(self) -> Array:
        slot: Array = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        return slot

    def send(self, array: Array) -> None:
        self._wait.acquire()
        np.copyto(self._turn(), array)
        self._post.release()

    def receive(self, read: Read) -> None:
        self._wait.acquire()
        read(self._turn())
        self._post.release()

    def close(self) -> None:
        self._slots.clear()
        self._memory.close()


class QueueLink:
    """multiprocessing.Queue, as it comes."""

    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        self._queue = SPAWN.Queue(window)

    def sender(self) -> Sender:
        return _QueueEnd(self._queue)

    def receiver(self) -> Receiver:
        return _QueueEnd(self._queue)

    def close(self) -> None:
        self._queue.close()


class _QueueEnd:
    def __init__(self, queue: Any) -> None:
        self.send = queue.put
        self._get = queue.get
        self._queue = queue

    def receive(self, read: Read) -> None:
        read(self._get())

    def close(self) -> None:
        self._queue.close()


class SpoolLink:
    """spoolipc: put, and get of a view."""

    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        self._path = folder / "spool"
        self._window = window

    def sender(self) -> Sender:
        return _SpoolSender(SpoolWriter(self._path, maxsize=self._window))

    def receiver(self) -> Receiver:
        return _SpoolReceiver(SpoolReader(self._path, maxsize=self._window))

    def close(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


class _SpoolSender:
    def __init__(self, writer: SpoolWriter) -> None:
        self._put = writer.put
        self.close = writer.close

    def send(self, array: Array) -> None:
        self._put(array)


class _SpoolReceiver:
    def __init__(self, reader: SpoolReader) -> None:
        self._get = reader.get
        self.close = reader.close

    def receive(self, read: Read) -> None:
        read(self._get())


def machine() -> dict[str, str]:
    """The machine and the versions that a result belongs to."""
    models = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((line.split()[1] for line in _lines("/proc/meminfo")), "0")
    return {
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(memory) / 2**20:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "filelock": filelock.__version__,
        "watchdog": ".".join(map(str, (watchdog.version.VERSION_INFO))),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def show_seconds(seconds: float) -> str:
    """A time with its unit, to three figures."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us" if seconds == seconds else "-"


def show_bytes(nbytes: int) -> str:
    """A size with its unit."""
    for unit, scale in (("MB", 1_000_000), ("KB", 1_000)):
        if nbytes >= scale:
            return f"{nbytes / scale:g} {unit}"
    return f"{nbytes} B"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
