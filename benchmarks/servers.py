"""Spools on servers beside plain clients that move the same bytes: `python -m benchmarks.servers [--quick] [NAME...]`.

All servers run here, one and three of NATS, each with its data in files. A writer puts arrays, and at the same time a
reader in another process gets them into an array each: bytes a second, from the first put to the last get. Everybody is
as fast as could be written: arrays go by 64, or by 8 MB, and plain nats-py publishes pieces of a megabyte ahead of the
acknowledgements, 64 MB of them, and does not wait for its own. A forwarder moves arrays from a directory, in turns with
nats-py that only publishes. NAME leaves all others out; `latency` and `memory` are measured only where they are named.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import server_peers as peers
from spoolipc import SpoolReader, SpoolWriter, forward

SIZES = {1_000: 6_400, 64_000: 1_600, 1_000_000: 200, 54_000_000: 10}
"""Bytes of an array, and how many are moved."""
PROCESSES = multiprocessing.get_context("spawn")


class System(NamedTuple):
    """put(url, size, count) here, get(url, size, count, ready) in another process, on servers that `serve` starts."""

    serve: Callable[[int], Any]
    put: Callable[[str, int, int], None]
    get: Callable[[str, int, int, Any], None]
    nodes: tuple[int, ...]


SYSTEMS = {
    "spoolipc": System(peers.nats_servers, peers.put_spool, peers.get_spool, (1, 3)),
    "nats-py": System(peers.nats_servers, peers.put_plain, peers.get_plain, (1, 3)),
    "redis": System(peers.redis_server, peers.put_redis, peers.get_redis, (1,)),
    "rabbitmq": System(peers.rabbit_server, peers.put_rabbit, peers.get_rabbit, (1,)),
}


def one_way(system: System, url: str, size: int, count: int) -> float:
    """Bytes a second."""
    ready = PROCESSES.Event()
    reader = PROCESSES.Process(target=system.get, args=(url, size, count, ready))
    peers.prepare(system.put, url, size)
    reader.start()
    if not ready.wait(120):
        raise RuntimeError("no reader")
    began = time.perf_counter()
    system.put(url, size, count)
    reader.join()
    took = time.perf_counter() - began
    if reader.exitcode:
        raise RuntimeError("a reader failed")
    return size * count / took


def throughput(names: list[str], scale: float) -> None:
    print("| servers | bytes | " + " | ".join(f"{name}, MB/s" for name in names) + " |")
    print("|---|---|" + "---|" * len(names))
    for nodes in (1, 3):
        found: dict[tuple[int, str], str] = {}
        for name in names:
            system = SYSTEMS[name]
            if nodes not in system.nodes:
                continue
            with system.serve(nodes) as url:
                for size, usual in SIZES.items():
                    try:
                        rates = [one_way(system, url, size, max(4, int(usual * scale))) for _ in range(3)]
                        found[size, name] = f"{float(np.median(rates)) / 1e6:.1f}"
                    except Exception as error:
                        found[size, name] = type(error).__name__
        for size in SIZES:
            figures = " | ".join(found.get((size, name), "") for name in names)
            print(f"| {nodes} | {size:,} | {figures} |", flush=True)


def latency(scale: float) -> None:
    """Milliseconds of a put and of the get after it, the median."""
    print("| servers | bytes | put, ms | get, ms |\n|---|---|---|---|")
    for nodes in (1, 3):
        with peers.nats_servers(nodes) as url:
            for size, count in {1_000: 300, 64_000: 200, 1_000_000: 60, 54_000_000: 12}.items():
                array, puts, gets = np.ones(size, np.uint8), [], []
                place = f"{url.replace('?', f'/latency-{size}?')}"
                with peers.opened(place) as writer, SpoolReader(place) as reader:
                    for _ in range(max(3, int(count * scale))):
                        began = time.perf_counter()
                        writer.put(array)
                        put = time.perf_counter()
                        reader.get()
                        puts.append(put - began)
                        gets.append(time.perf_counter() - put)
                figures = " | ".join(f"{1e3 * float(np.median(each)):.1f}" for each in (puts, gets))
                print(f"| {nodes} | {size:,} | {figures} |", flush=True)


def forwarding(scale: float) -> None:
    """What a forwarder moves from a directory until the last has arrived, beside nats-py that publishes the same: each
    in a process of its own, as memory that was freed before makes the copies of nats-py twice as fast."""
    print("| bytes | forwarder, MB/s | plain publish, MB/s | ratio |\n|---|---|---|---|")
    for size, usual in SIZES.items():
        count, took = max(4, int(usual * scale)), dict[str, list[float]]()
        for turn in range(4):
            with tempfile.TemporaryDirectory(dir="/dev/shm") as place, peers.nats_servers(1) as url:
                source, destination = f"{place}/source", url.replace("?", "/forwarded?")
                peers.opened(destination).close()
                peers.prepare(peers.put_plain, url, size)
                with SpoolWriter(source) as writer:
                    for _ in range(count):
                        writer.put(np.ones(size, np.uint8))
                works = {
                    "forwarder": partial(_forwarded, source, destination),
                    "plain": partial(_published, url, size, count),
                }
                for name in [*works][:: 1 - 2 * (turn % 2)]:  # a server has more to do for who comes first
                    with PROCESSES.Pool(1) as alone:
                        took.setdefault(name, []).append(alone.apply(works[name]))
        rates = [size * count / float(np.median(took[name])) / 1e6 for name in ("forwarder", "plain")]
        print(f"| {size:,} | {rates[0]:.1f} | {rates[1]:.1f} | {rates[0] / rates[1]:.2f} |", flush=True)


def _forwarded(source: str, destination: str) -> float:
    """Seconds until all has arrived."""
    began, arrived = time.perf_counter(), list[float]()
    forward(source, destination, until_empty=True, moved=lambda *_: arrived.append(time.perf_counter()))
    return arrived[-1] - began


def _published(url: str, size: int, count: int) -> float:
    began = time.perf_counter()
    peers.put_plain(url, size, count)
    return time.perf_counter() - began


def _most() -> int:
    """The most memory that this process ever had, in bytes."""
    return next(
        1024 * int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )


def _told(role: str, url: str, count: int, told: Any) -> None:
    """Move so many arrays of 54 MB; tell the most memory after each tenth."""
    array = np.ones(54_000_000, np.uint8)
    after: list[int] = []
    if role == "writer":
        with SpoolWriter(url, maxsize=4) as writer:
            for _ in range(count):
                writer.put(array)
                after.append(_most())
    elif role == "reader":
        with SpoolReader(url) as reader:
            for _ in range(count):
                reader.get()
                after.append(_most())
    else:
        forward(role, url, end="writers", moved=lambda items, _: after.extend([_most()] * items))
    told.put((role, after))


def memory(count: int = 200) -> None:
    """The most memory of writer, reader and forwarder after 10 arrays of 54 MB and after all."""
    print(f"| process | after 10 arrays, MB | after {count}, MB |\n|---|---|---|")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place, peers.nats_servers(1) as url:
        first, second, told = url.replace("?", "/memory?"), url.replace("?", "/forwarded?"), PROCESSES.Queue()
        for url in (first, second):
            peers.opened(url, maxsize=4).close()
        source = f"{place}/source"
        roles = [
            ("writer", first),
            ("reader", first),
            ("writer", source),
            (source, second),
            ("reader", second),
        ]
        SpoolWriter(source, maxsize=4).close()
        working = [PROCESSES.Process(target=_told, args=(*each, count, told)) for each in roles]
        for group in (working[:2], working[2:]):
            for process in group:
                process.start()
            for _ in group:
                role, after = told.get()
                name = "forwarder" if role == source else role
                print(f"| {name} | {after[9] / 1e6:.0f} | {after[-1] / 1e6:.0f} |", flush=True)
            for process in group:
                process.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer arrays")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(SYSTEMS)}, forward, latency, memory"
    )
    given = parser.parse_args()
    scale, names = 0.1 if given.quick else 1.0, given.names or [*SYSTEMS, "forward"]
    print(f"Load of the machine: {os.getloadavg()[0]:.1f}\n")
    if systems := [name for name in SYSTEMS if name in names and peers.installed(name)]:
        throughput(systems, scale)
    for name, work in {"forward": forwarding, "latency": latency}.items():
        if name in names:
            work(scale)
    if "memory" in names:
        memory(20 if given.quick else 200)


if __name__ == "__main__":
    main()
