"""What spoolipc is meant to reach, as ratios within one run, and whether a run reached it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .machine import show_bytes, show_seconds

Run = dict[str, Any]
LIMIT, OURS, QUEUE = "limit", "spoolipc", "multiprocessing.Queue"


@dataclass(frozen=True)
class Target:
    """One demand. `met` is None when the run did not measure it."""

    work: str
    target: str
    measured: str = "not measured"
    met: bool | None = None


def targets(run: Run) -> list[Target]:
    """The whole table for one run, as `benchmarks.__main__` wrote it."""
    return [*_transfers(run), *_loans(run), *_delivery(run), *_others(run)]


def table(found: list[Target]) -> str:
    """Markdown."""
    marks = {True: "met", False: "**missed**", None: "-"}
    lines = ["| work | target | measured | |", "|---|---|---|---|"]
    return "\n".join(
        lines + [f"| {one.work} | {one.target} | {one.measured} | {marks[one.met]} |" for one in found]
    )


def median(run: Run, carrier: str, kind: str, nbytes: int, place: str = "memory") -> float | None:
    """Seconds per message of one carrier, None when it was not measured."""
    for row in run.get("transfers", []):
        if (row["carrier"], row["kind"], row["nbytes"], row["place"]) == (carrier, kind, nbytes, place):
            return statistics.median(row["seconds"]) if row["seconds"] else None
    return None


def _transfers(run: Run) -> Iterator[Target]:
    def ratio(over: str, kind: str, nbytes: int, under: str = OURS) -> float | None:
        above, below = median(run, over, kind, nbytes), median(run, under, kind, nbytes)
        return above / below if above and below else None

    def at_least(work: str, target: str, least: float, found: float | None) -> Target:
        if found is None:
            return Target(work, target)
        return Target(work, target, f"{found:.2f}" if found < 10 else f"{found:.0f}", found >= least)

    big, one, kb64, kb = 54_000_000, 1_000_000, 64_000, 1_000
    yield at_least("54 MB one way", "0.9 of the limit", 0.9, ratio(LIMIT, "one way", big))
    yield at_least("54 MB one way", f"30x {QUEUE}", 30, ratio(QUEUE, "one way", big))
    yield at_least("54 MB round trip", f"60x {QUEUE}", 60, ratio(QUEUE, "round trip", big))
    yield at_least("1 MB one way", "0.5 of the limit", 0.5, ratio(LIMIT, "one way", one))
    yield at_least("1 MB one way", f"25x {QUEUE}", 25, ratio(QUEUE, "one way", one))
    peers = {row["carrier"] for row in run.get("transfers", [])} - {LIMIT, OURS}
    times = {peer: median(run, peer, "one way", one) for peer in peers}
    known = {peer: seconds for peer, seconds in times.items() if seconds is not None}
    ours = median(run, OURS, "one way", one)
    if known and ours is not None:
        best = min(known, key=known.__getitem__)
        measured = f"{show_seconds(ours)}; {best} takes {show_seconds(known[best])}"
        yield Target("1 MB one way", "ahead of every peer", measured, ours < known[best])
    else:
        yield Target("1 MB one way", "ahead of every peer")
    yield at_least("64 KB one way", f"2x {QUEUE}", 2, ratio(QUEUE, "one way", kb64))
    yield at_least("1 KB round trip", f"2x {QUEUE}", 2, ratio(QUEUE, "round trip", kb))
    yield at_least("1 KB one way", f"0.5 of {QUEUE}", 0.5, ratio(QUEUE, "one way", kb))
    batch = next(
        (row for row in run.get("variants", []) if row["carrier"] == "64 a call" and row["nbytes"] == kb),
        None,
    )
    queue = median(run, QUEUE, "one way", kb)
    found = queue / statistics.median(batch["seconds"]) if batch and batch["seconds"] and queue else None
    yield at_least("1 KB one way, 64 a call", f"1x {QUEUE}", 1, found)


def _delivery(run: Run) -> Iterator[Target]:
    """The cost of `receive` and `ack` beside `get`."""
    rows = {
        (row["carrier"], row["nbytes"]): row["seconds"] for row in run.get("variants", []) if row["seconds"]
    }
    for nbytes in sorted({nbytes for _, nbytes in rows}):
        work, target = f"receive and ack, {show_bytes(nbytes)}", "at most 1.3x get"
        plain, acked = rows.get(("put and get", nbytes)), rows.get(("receive and ack", nbytes))
        if plain and acked:
            found = statistics.median(acked) / statistics.median(plain)
            yield Target(work, target, f"{found:.2f}x", found <= 1.3)
        else:
            yield Target(work, target)


def _loans(run: Run) -> Iterator[Target]:
    trips = run.get("loan") or {}
    work, target = "loan, round trip of control work", "under 0.5 ms, whatever the size"
    if not trips:
        yield Target(work, target)
        return
    shown = ", ".join(
        f"{int(nbytes) / 1e6:g} MB {show_seconds(seconds)}" for nbytes, seconds in trips.items()
    )
    yield Target(work, target, shown, max(trips.values()) < 0.5e-3)


def _others(run: Run) -> Iterator[Target]:
    wake = (run.get("wake") or {}).get(OURS)
    shown = f"{show_seconds(wake['median'])}, p99 {show_seconds(wake['p99'])}" if wake else "not measured"
    met = wake["median"] < 150e-6 and wake["p99"] < 1e-3 if wake else None
    yield Target("idle reader woken", "median under 150 us, p99 under 1 ms", shown, met)
    yield from _article(run)
    yield from _backlog(run)
    yield from _crowd(run)
    yield from _memory(run)


def _article(run: Run) -> Iterator[Target]:
    took = {
        (row["carrier"], row["heavy"]): statistics.median(row["seconds"]) for row in run.get("article") or []
    }
    for work, target, most, over, under in (
        ("article, heavy", "at most 1.1x its floor", 1.1, ("spool", True), ("floor", True)),
        ("article, heavy by loan", "at most 1.5x the light run", 1.5, ("loan", True), ("spool", False)),
    ):
        if over in took and under in took:
            found = took[over] / took[under]
            yield Target(
                work, target, f"{found:.2f}x ({took[over]:.2f} s, {took[under]:.2f} s)", found <= most
            )
        else:
            yield Target(work, target)


def _backlog(run: Run) -> Iterator[Target]:
    rows = run.get("backlog") or []
    if len(rows) < 2:
        yield Target("a million waiting", "put and get at most 1.2x the empty spool's")
        return
    few, many = rows[0], rows[-1]
    put, get = many["put"] / few["put"], many["get"] / few["get"]
    work = "a million waiting" if many["waiting"] == 1_000_000 else f"{many['waiting']:,} waiting"
    yield Target(
        work,
        "put and get at most 1.2x the empty spool's",
        f"put {put:.2f}x, get {get:.2f}x ({show_seconds(many['put'])}, {show_seconds(many['get'])})",
        put <= 1.2 and get <= 1.2,
    )


def _crowd(run: Run) -> Iterator[Target]:
    rows = run.get("crowd") or []
    alone = [row for row in rows if row["writers"] == 1]
    crowds = [row for row in rows if row["writers"] > 1]
    work, target = "16 writers, 4 readers, 64 KB", "0.6 of one to one; no wait for the lock over 200 ms"
    if not alone or not crowds:
        yield Target(work, target)
        return
    many, one = (statistics.median(row["per_second"] for row in group) for group in (crowds, alone))
    longest = max(row["longest_lock_wait"] for row in crowds)
    shown = f"{many / one:.2f} ({many:,.0f} of {one:,.0f} a second); longest wait {show_seconds(longest)}"
    yield Target(work, target, shown, many / one >= 0.6 and longest <= 0.2)


def _memory(run: Run) -> Iterator[Target]:
    found = run.get("memory")
    work, target = "memory over 10,000 x 1 MB", "resident memory flat, free/ bounded"
    if not found:
        yield Target(work, target)
        return
    first, last, most = found["first"], found["last"], found["most"]
    grown = max(
        last[f"{side} {kind}"] - first[f"{side} {kind}"]
        for side in ("producer", "consumer")
        for kind in ("resident", "mapped")
    )
    each = max(0, grown) / found["count"]
    shown = f"grown by {each:.0f} bytes a message over {found['count']:,}; free/ at most {most['free files']} files"
    yield Target(work, target, shown, each < 1_000 and most["free files"] <= 32)
