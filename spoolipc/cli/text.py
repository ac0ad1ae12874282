"""What the command line says to people: reports as lines, which `printable` makes fit for a terminal."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from itertools import groupby
from typing import Any, Final

import numpy as np

from ..directory.check import FsckReport
from ..message import DeadLetter, GcReport, Limits, Retried, SpoolStat

NO_LETTERS: Final = "no dead letters"
_UNITS: Final = ("KB", "MB", "GB", "TB")
_GC_LINES: Final = (
    ("temporary_files", "half-written file", "of crashed writers removed"),
    ("requeued_items", "item", "of crashed readers requeued, to be redelivered"),
    ("dead_lettered_items", "item", "of crashed readers moved to failed/ after the last attempt"),
    ("abandoned_files", "consumed file", "of crashed processes removed"),
    ("orphaned_files", "file", "of no item removed from free/"),
    ("orphaned_histories", "history", "of no item removed from failed/"),
    ("orphaned_pieces", "piece", "of no item removed"),
    ("crashed_sessions", "crashed session", "forgotten"),
    ("half_written", "half-written replacement", "of index or spool.json removed"),
    ("discarded_items", "item", "removed from a spool that was shut down at once"),
    ("pooled_files", "consumed file", "removed that nobody is there to write again"),
)


def size(number: int) -> str:
    """Bytes as people read them: 999 B, 1.0 KB (1,000 bytes), 54.0 MB."""
    if number < 1000:
        return f"{number} B"
    value, rank = number / 1000, 0
    while value >= 999.95 and rank < len(_UNITS) - 1:
        value, rank = value / 1000, rank + 1
    return f"{value:.1f} {_UNITS[rank]}"


def printable(text: str) -> str:
    """A text from a file or a file's name, with what a terminal would obey written as escapes, in one
    line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def duration(seconds: float) -> str:
    """Seconds as people read them: 0.2 s, 4 min 10 s, 3 h 5 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    for upper, lower, first, second in ((3600, 60, "min", "s"), (86400, 3600, "h", "min")):
        if seconds < upper:
            rest = seconds % lower
            return f"{int(seconds // lower)} {first} {int(rest if second == 's' else rest // 60)} {second}"
    return f"{int(seconds // 86400)} d {int(seconds % 86400 // 3600)} h"


def count(number: int, noun: str) -> str:
    """A number and its noun: 1 item, 2,000 items."""
    if number == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {plural}"


def one_line(error: BaseException) -> str:
    """An error as one line that begins with the path it is about, where it knows one."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return printable(" ".join(text.split()))


def gc_lines(done: GcReport) -> list[str]:
    """What gc did."""
    said = [
        f"  {count(getattr(done, field), noun)} {what}"
        for field, noun, what in _GC_LINES
        if getattr(done, field)
    ]
    if done.index_rebuilt:
        said.insert(0, "  the damaged index built again from the items")
    freed = f"; {size(done.bytes_freed)} {'would be ' * done.dry_run}freed" if done.bytes_freed else ""
    head = "nothing left by crashed processes" if not said else "would be done" if done.dry_run else "done"
    if done.foreign_files:
        is_not = "is a name that is" if done.foreign_files == 1 else "are names that are"
        said.append(f"  left alone: {done.foreign_files:,} {is_not} not the spool's")
    said += [f"  could not be removed: {what}" for what in done.not_removed]
    return [f"{done.path}: {head}{freed}", *said]


def stat_lines(found: SpoolStat) -> list[str]:
    """What is in a spool."""
    limits = found.limits
    most = f" of {limits.maxsize:,}" if limits.maxsize else ""
    room = f" of {size(limits.max_bytes)}" if limits.max_bytes else ""
    age = f", the first put {duration(found.oldest_age)} ago" if found.oldest_age is not None else ""
    medium = "in RAM" if found.in_memory else "on disk"
    pinned = "?" if found.pinned_files is None else f"{found.pinned_files:,}"
    pinned_bytes = "?" if found.pinned_bytes is None else size(found.pinned_bytes)
    live = "?" if found.live_sessions is None else f"{found.live_sessions:,}"
    files = [
        f"  free        {found.free_files:,} files to be written again, {size(found.free_bytes)}",
        f"  pinned      {pinned} files still shown by arrays or being written, {pinned_bytes}",
    ]
    on_servers = found.waiting_mode == "server"
    lines = [
        f"{found.path}: {found.state}, on {found.file_system} ({medium}), waiting by {found.waiting_mode}",
        f"  waiting     {found.depth:,}{most} items{age}",
        f"  delayed     {found.delayed:,}",
        f"  in flight   {found.in_flight:,}",
        f"  bytes       {size(found.bytes)}{room} in items waiting and in flight",
        f"  failed      {found.failed:,}",
        *([] if on_servers else files),
        f"  open in     {live} readers and writers",
        *([] if found.puts is None else [f"  ever        {found.puts:,} put, {found.gets:,} delivered"]),
    ]
    if found.wanted_bytes:
        by = ", ".join(f"process {process} {size(held)}" for process, held in (found.pinned_by or {}).items())
        lacks = f"{size(found.wanted_bytes)} that the file system lacks"
        lines.append(f"  a put waits for {lacks}; pinned by {by or 'nobody'}")
    if found.index_damage:
        remedy = "the next reader, writer or gc repairs it"
        lines.append(f"  the index cannot be used ({found.index_damage}); {remedy}")
    if found.stuck_on:
        lines.append(f"  the index lock is held by {found.stuck_on}, which does not let go; is it stopped?")
    return lines


def limits_line(limits: Limits) -> str:
    """The limits in force, as they can be given again."""
    said = asdict(limits)
    said.pop("mode")  # which cannot be changed
    return " ".join(f"{name}={value}" for name, value in said.items())


def fsck_lines(found: FsckReport) -> list[str]:
    """What is wrong in a spool."""
    checked = f"{count(found.items, 'item')} checked, {size(found.bytes)}"
    if not found.problems:
        return [f"{found.path}: clean; {checked}"]
    left = sum(not problem.repaired for problem in found.problems)
    repaired = len(found.problems) - left
    head = f"{found.path}: {count(len(found.problems), 'problem')}"
    if repaired:
        head += f", {repaired:,} repaired, {left:,} left"
    said = [f"  {'repaired: ' * each.repaired}{each.where} {each.what}" for each in found.problems]
    return [f"{head}; {checked}", *said]


def list_lines(letters: list[DeadLetter]) -> list[str]:
    """One line for each dead letter."""
    rows = [
        (str(letter.seq), size(letter.bytes), count(letter.attempts, "attempt"), letter.reason)
        for letter in letters
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    return [
        f"{seq:>{widths[0]}}  {of:>{widths[1]}}  {tries:{widths[2]}}  {why}" for seq, of, tries, why in rows
    ]


def letter_lines(letter: DeadLetter) -> list[str]:
    """All that is known of a dead letter."""
    of = size(letter.bytes)
    where = f"  file      {letter.path} ({of})" if letter.path else f"  size      {of}"
    lines = [f"item {letter.seq}: {letter.reason}", where]
    if letter.put_time is not None:
        lines.append(f"  put       {_moment(letter.put_time)}")
    if letter.damage:
        lines.append(f"  damaged   {letter.damage}")
    for array in letter.arrays:
        name = f"{array.name!r}: " if array.name is not None else ""
        lines.append(f"  array     {name}{array.dtype} {array.shape}, {size(array.nbytes)}")
    if letter.meta is not None:
        lines.append(f"  meta      {json.dumps(letter.meta)}")
    for failure in letter.history:
        lines.append(f"  attempt {failure.attempt} {_moment(failure.when)}, {failure.who}: {failure.why}")
    return lines


def retry_lines(done: Retried) -> list[str]:
    """What became of dead letters that were retried."""
    lines = [f"requeued {count(len(done.seqs), 'dead letter')}"]
    lines += [f"  {old} as {new}" for old, new in done.seqs.items()]
    lines += [f"  {seq} stays, it cannot be read: {why}" for seq, why in done.damaged.items()]
    return lines


def bench_lines(results: list[dict[str, Any]]) -> list[str]:
    """Median microseconds per array, a line for each kind and size, and the ratio to those of the first carrier."""
    carriers = list(dict.fromkeys(one["carrier"] for one in results))
    lines = [f"| us per array | KB | {' | '.join(carriers)} |", "|---|" + "--:|" * (1 + len(carriers))]
    for (kind, nbytes), row in groupby(results, lambda one: (one["kind"], one["nbytes"])):
        middle = [float(np.median(one["seconds"])) for one in row]
        cells = [f"{seconds * 1e6:,.0f} ({seconds / middle[0]:.2f})" for seconds in middle]
        lines.append(f"| {kind} | {nbytes / 1000:,g} | {' | '.join(cells)} |")
    return lines


def _moment(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "at an impossible time"
