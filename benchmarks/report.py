"""Fill the tables and draw the plots of docs/performance.md from the JSON of a run.

A table goes between `<!-- NAME -->` and `<!-- end -->`; everything else in the document is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .__main__ import RESULTS
from .machine import show_bytes, show_seconds
from .targets import LIMIT, OURS, QUEUE, Run, table, targets

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
PLOTS = DOCUMENT.parent / "performance"


def markdown(rows: Iterable[Sequence[str]], head: Sequence[str]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def spread(seconds: Sequence[float]) -> str:
    """The median, and how far the rounds lie from it."""
    if not seconds:
        return "-"
    middle = statistics.median(seconds)
    away = max(middle - min(seconds), max(seconds) - middle) / middle
    return f"{show_seconds(middle)} ±{away:.0%}"


def sizes(rows: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({row["nbytes"] for row in rows})


def by_size(rows: Sequence[dict[str, Any]], kind: str) -> str:
    """One line a carrier, fastest at the largest size first."""
    rows = [row for row in rows if row["kind"] == kind]
    columns = sizes(rows)
    took = {(row["carrier"], row["nbytes"]): row["seconds"] for row in rows}

    def last(name: str) -> float:
        seconds = took.get((name, columns[-1]))
        return statistics.median(seconds) if seconds else float("inf")

    names = sorted(dict.fromkeys(row["carrier"] for row in rows), key=last)
    lines = []
    for name in names:
        cells = [spread(took.get((name, nbytes), ())) for nbytes in columns]
        lines.append([f"**{name}**" if name in (OURS, LIMIT) else name, *cells])
    return markdown(lines, ["time per message", *map(show_bytes, columns)])


def machine(run: Run) -> str:
    lines = [[key, value] for key, value in run["machine"].items()]
    lines += [[name, one["version"]] for name, one in run["carriers"].items() if one["version"]]
    lines += [["measured on", run["date"]], ["command", f"`{run['command']}`"]]
    return markdown(lines, ["", ""]).replace("--:", "---")


def carriers(run: Run) -> str:
    lines = [
        [f"[{name}]({one['url']})" if "://" in one["url"] else name, one["usage"]]
        for name, one in run["carriers"].items()
    ]
    lines += [[name, f"left out: {why}"] for name, why in run["left_out"].items()]
    return markdown(lines, ["carrier", "used as"]).replace("--:", "---")


def variants(run: Run) -> str:
    rows = run["variants"]
    took = {(row["carrier"], row["nbytes"]): row["seconds"] for row in rows}
    names = list(dict.fromkeys(row["carrier"] for row in rows))
    lines = [[name, *(spread(took.get((name, size), ())) for size in sizes(rows))] for name in names]
    return markdown(lines, ["time per message, one way", *map(show_bytes, sizes(rows))])


def others(run: Run) -> str:
    """The parts that have a figure or two each."""
    lines: list[list[str]] = []
    for name, one in (run.get("wake") or {}).items():
        lines.append(
            [
                f"sleeping reader woken, {name}",
                f"{show_seconds(one['median'])}, p99 {show_seconds(one['p99'])}",
            ]
        )
    for nbytes, seconds in (run.get("loan") or {}).items():
        lines.append([f"round trip by loans, untouched, {show_bytes(int(nbytes))}", show_seconds(seconds)])
    for row in run.get("backlog") or []:
        took = f"put {show_seconds(row['put'])}, get {show_seconds(row['get'])}"
        lines.append([f"1 KB with {row['waiting']:,} waiting", took])
    for writers in (1, 16):
        found = [row for row in run.get("crowd") or [] if row["writers"] == writers]
        if found:
            each = statistics.median(row["per_second"] for row in found)
            longest = max(row["longest_lock_wait"] for row in found)
            who = f"{writers} to {found[0]['readers']}, 64 KB"
            lines.append(
                [who, f"{each:,.0f} messages a second, longest wait for the lock {show_seconds(longest)}"]
            )
    return markdown(lines, ["", "measured"]).replace("--:", "---")


def article(run: Run) -> str:
    rows = run["article"]
    took = {(row["title"], row["heavy"]): statistics.median(row["seconds"]) for row in rows}
    lines = [
        [title, f"{took[title, False]:.2f}", f"{took[title, True]:.2f}"]
        for title in dict.fromkeys(row["title"] for row in rows)
    ]
    return markdown(lines, ["seconds", "the number 1", "54 MB array"])


TABLES = {
    "machine": machine,
    "targets": lambda run: table(targets(run)),
    "carriers": carriers,
    "one way": lambda run: by_size(run["transfers"], "one way"),
    "round trip": lambda run: by_size(run["transfers"], "round trip"),
    "disk": lambda run: by_size(run["disk"], "one way"),
    "variants": variants,
    "others": others,
    "article": article,
}


def fill(text: str, run: Run) -> str:
    """The document with every table that the run has figures for."""
    for name, make in TABLES.items():
        try:
            made = make(run)
        except (KeyError, IndexError):
            continue
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)  # type: ignore[misc]
    return text


def draw(run: Run, folder: Path) -> list[Path]:
    """Time per message against size for each kind, and the article's experiment as bars. Returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "spoolipc", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for kind in ("one way", "round trip"):
        rows = [row for row in run.get("transfers") or [] if row["kind"] == kind]
        if rows:
            made.append(save(pyplot, lines(pyplot, rows, kind), folder / f"{kind.replace(' ', '-')}.svg"))
    if run.get("article"):
        made.append(save(pyplot, bars(pyplot, run["article"]), folder / "article.svg"))
    return made


def save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return path


STYLES = {
    LIMIT: {
        "color": "black",
        "linestyle": "--",
        "linewidth": 2.0,
        "label": "limit: warmed SharedMemory ring",
    },
    OURS: {"color": "#d62728", "linewidth": 2.8, "zorder": 5},
    QUEUE: {"color": "#1f77b4", "linewidth": 1.8},
}


def lines(pyplot: Any, rows: list[dict[str, Any]], kind: str) -> Any:
    figure, axes = pyplot.subplots(figsize=(8.5, 5.5))
    hues = pyplot.get_cmap("tab20").colors
    colors = iter([hues[k] for k in (2, 4, 8, 10, 12, 14, 16, 18, 3, 5, 9, 11, 15, 17, 19)])
    for name in dict.fromkeys(row["carrier"] for row in rows):
        points = sorted(
            (row["nbytes"], row["seconds"]) for row in rows if row["carrier"] == name and row["seconds"]
        )
        if points:
            x = [nbytes for nbytes, _ in points]
            middle = [statistics.median(seconds) for _, seconds in points]
            errors = [[m - min(s), max(s) - m] for m, (_, s) in zip(middle, points, strict=True)]
            style: dict[str, Any] = {"color": next(colors), "linewidth": 1.2, "label": name} | STYLES.get(
                name, {}
            )
            axes.errorbar(
                x,
                middle,
                yerr=list(zip(*errors, strict=True)),
                marker="o",
                markersize=3,
                elinewidth=0.8,
                **style,
            )
    axes.set(xscale="log", yscale="log", xlabel="size of the array", ylabel="time per message")
    axes.set_xticks(sizes(rows), [show_bytes(nbytes) for nbytes in sizes(rows)], minor=False)
    axes.xaxis.set_minor_locator(pyplot.NullLocator())
    ticks = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    axes.set_yticks(ticks, [show_seconds(tick) for tick in ticks])
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.set_title(f"float64 arrays between two processes, {kind}; every byte read; lower is better")
    return figure


def bars(pyplot: Any, rows: list[dict[str, Any]]) -> Any:
    figure, axes = pyplot.subplots(figsize=(8.5, 3.2))
    titles = list(dict.fromkeys(row["title"] for row in rows))
    took = {(row["title"], row["heavy"]): statistics.median(row["seconds"]) for row in rows}
    for heavy, offset, color, label in (
        (False, -0.2, "#9ecae1", "the number 1"),
        (True, 0.2, "#d62728", "54 MB array"),
    ):
        drawn = axes.barh(
            [place + offset for place in range(len(titles))],
            [took[title, heavy] for title in titles],
            height=0.38,
            color=color,
            label=label,
        )
        axes.bar_label(drawn, fmt="%.2f s", padding=3)
    axes.set_yticks(range(len(titles)), titles)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds for all rounds; lower is better")
    axes.legend(frameon=False)
    axes.set_title(f"the article's experiment: {rows[0]['workers']} workers, one object a round")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "json", nargs="?", type=Path, default=RESULTS / "latest.json", help="a run (default: latest)"
    )
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--plots", type=Path, default=PLOTS)
    options = parser.parse_args()
    run: Run = json.loads(options.json.read_text())
    options.document.write_text(fill(options.document.read_text(), run))
    for path in [options.document, *draw(run, options.plots)]:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
