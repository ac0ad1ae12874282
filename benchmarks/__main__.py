"""Measure spoolipc beside its peers and write the results as JSON.

Every size is measured with all carriers side by side, taking turns; then the other parts, one after another.
The machine should be idle. `python -m benchmarks.report` makes the tables and plots of docs/performance.md from
the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import targets
from .article import article
from .backlog import backlog
from .carriers import CARRIERS, Carrier
from .carriers.own import SHM
from .crowd import crowd
from .loan import loan
from .machine import QUICK_SIZES, SIZES, machine, show_bytes
from .memory import memory
from .pair import Measured, compare
from .variants import BATCH, VARIANTS, DurableLink
from .wake import wake

RESULTS = Path(__file__).parent / "results"
DISK_SIZES = (64_000, 1_000_000, 54_000_000)
VARIANT_SIZES = (1_000, 1_000_000, 54_000_000)


def transfers(options: argparse.Namespace, chosen: Sequence[Carrier]) -> list[dict[str, Any]]:
    """Every carrier at every size, on /dev/shm or in whatever memory the carrier uses."""
    rows: list[Measured] = []
    for nbytes in tqdm(options.sizes, desc="in memory", unit="size"):
        for apart in (False, True):
            links = {(one.name, "memory"): one.make for one in chosen if one.apart is apart}
            with tempfile.TemporaryDirectory(prefix="spoolipc-bench-", dir=SHM) as scratch:
                rows += compare(links, nbytes, Path(scratch), rounds=options.rounds, seconds=options.seconds)
    for one in chosen:
        one.stop()
    return [asdict(row) for row in rows]


def on_disk(options: argparse.Namespace, chosen: Sequence[Carrier]) -> list[dict[str, Any]]:
    """The carriers that keep files, on the disk of --disk; spoolipc also with every put synced."""
    links = {(one.name, "disk"): one.make for one in chosen if one.stored}
    if ("spoolipc", "disk") in links:
        links["spoolipc, fsync", "disk"] = DurableLink
    rows: list[Measured] = []
    for nbytes in tqdm([size for size in DISK_SIZES if size in options.sizes], desc="on disk", unit="size"):
        with tempfile.TemporaryDirectory(prefix="spoolipc-bench-", dir=options.disk) as scratch:
            rows += compare(
                links,
                nbytes,
                Path(scratch),
                rounds=min(3, options.rounds),
                seconds=options.seconds,
                kinds=["one way"],
            )
    return [asdict(row) for row in rows]


def variants(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Other ways to use spoolipc, one way; seconds are those of one message."""
    rows = []
    for nbytes in tqdm(
        [size for size in VARIANT_SIZES if size in options.sizes], desc="variants", unit="size"
    ):
        links = {("put and get", "memory"): CARRIERS[1].make}
        links = {
            (name, "memory"): link
            for name, link in VARIANTS.items()
            if name != "64 a call" or nbytes <= 64_000
        }
        with tempfile.TemporaryDirectory(prefix="spoolipc-bench-", dir=SHM) as scratch:
            found = compare(
                links,
                nbytes,
                Path(scratch),
                rounds=options.rounds,
                seconds=options.seconds,
                kinds=["one way"],
            )
        for one in found:
            each = BATCH if one.carrier == "64 a call" else 1
            rows.append({**asdict(one), "seconds": [seconds / each for seconds in one.seconds]})
    return rows


def crowds(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """One to one and 16 to 4, in turns."""
    total, rounds = (1_600, 1) if options.quick else (8_000, 3)
    rows = []
    for _ in range(rounds):
        rows.append(crowd(scratch, 1, 1, 64_000, total, 64))
        rows.append(crowd(scratch, 16, 4, 64_000, total, 64))
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts asked for, and save after each."""
    asked = [one for one in CARRIERS if options.only is None or one.name in options.only]
    missing = {one.name: why for one in asked if (why := one.missing())}
    if options.quick and options.only is None:
        missing |= {one.name: "--quick, and it takes long to start" for one in asked if one.apart}
    chosen = [one for one in asked if one.name not in missing]
    for name, why in missing.items():
        print(f"left out: {name} ({why})", flush=True)
    quick = options.quick
    found: dict[str, Any] = {
        "machine": machine(),
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "quick": quick,
        "window": 8,
        "rounds": options.rounds,
        "carriers": {
            one.name: {"version": one.version(), "url": one.url, "usage": one.usage} for one in chosen
        },
        "left_out": missing,
    }
    with tempfile.TemporaryDirectory(prefix="spoolipc-bench-", dir=SHM) as folder:
        scratch = Path(folder)
        million = options.backlog or (20_000 if quick else 1_000_000)
        parts: dict[str, Callable[[], Any]] = {
            "transfers": lambda: transfers(options, chosen),
            "disk": lambda: on_disk(options, chosen),
            "variants": lambda: variants(options),
            "loan": lambda: loan(scratch, (64_000, 1_000_000, 54_000_000), 100 if quick else 1_000),
            "wake": lambda: wake(scratch, 200 if quick else 1_000),
            "crowd": lambda: crowds(options, scratch),
            "memory": lambda: memory(scratch, 2_000 if quick else 10_000),
            "article": lambda: article(scratch, 8 if quick else 16, 2 if quick else 30, 1 if quick else 3),
            "backlog": lambda: backlog(scratch, (0, 1_000, million), 1_000 if quick else 4_000),
        }
        for name, measure in parts.items():
            if name in options.parts:
                print(f"{name} ...", file=sys.stderr, flush=True)
                began = time.monotonic()
                try:
                    found[name] = measure()
                except Exception as error:
                    found.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
                    print(f"{name} failed: {error}", flush=True)
                found.setdefault("took", {})[name] = round(time.monotonic() - began, 1)
                save(found, options.out)
    return found


def save(found: dict[str, Any], out: Path) -> None:
    """Write the results, times to four figures."""
    out.parent.mkdir(parents=True, exist_ok=True)

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, dict):
            return {key: short(inner) for key, inner in value.items()}
        return [short(inner) for inner in value] if isinstance(value, list | tuple) else value

    out.write_text(json.dumps(short(found), indent=1) + "\n")


PARTS = ("transfers", "disk", "variants", "loan", "wake", "crowd", "memory", "article", "backlog")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer sizes and rounds; under two minutes")
    add(
        "--only",
        nargs="+",
        metavar="CARRIER",
        choices=[one.name for one in CARRIERS],
        help="some carriers only",
    )
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="some parts only")
    add("--sizes", nargs="+", type=lambda text: int(float(text)), metavar="BYTES", help="sizes of the arrays")
    add("--rounds", type=int, help="turns of each carrier at each size (default 5; quick: 3)")
    add("--seconds", type=float, help="how long a turn should last (default 0.12; quick: 0.03)")
    add("--backlog", type=int, metavar="ITEMS", help="items waiting (default 1,000,000; quick: 20,000)")
    add("--disk", type=Path, default=tempfile.gettempdir(), help="a directory on a disk (default: TMPDIR)")
    add("--out", type=Path, help="the JSON file (default: benchmarks/results/latest.json; quick: quick.json)")
    options = parser.parse_args(arguments)
    options.sizes = options.sizes or list(QUICK_SIZES if options.quick else SIZES)
    options.rounds = options.rounds or (3 if options.quick else 5)
    options.seconds = options.seconds or (0.03 if options.quick else 0.12)
    options.out = options.out or RESULTS / ("quick.json" if options.quick else "latest.json")
    return options


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = run(options)
    for row in found.get("transfers", []) + found.get("disk", []):
        if row["error"]:
            print(f"failed: {row['carrier']}, {row['place']}, {show_bytes(row['nbytes'])}: {row['error']}")
    print()
    print(targets.table(targets.targets(json.loads(options.out.read_text()))))
    print(f"\nresults in {options.out}; took {sum(found.get('took', {}).values()):.0f} s")


if __name__ == "__main__":
    main()
