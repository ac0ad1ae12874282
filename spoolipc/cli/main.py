"""The command line: parses, calls one public function, prints what it returned (`text.py`)."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from .. import __version__
from ..admin import failed_drop, failed_list, failed_retry, fsck, gc, purge, remove, set_limits, stat
from ..connect import connect, shown
from ..directory.temporary import remove_temporary
from ..errors import (
    NetworkFileSystem,
    NoSuchItem,
    NotASpool,
    SpoolError,
    UnknownVersion,
    UnsupportedOperation,
)
from ..forward import forward
from . import text

DONE, PROBLEM, WRONG_USE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
_SUMMARY = """\
Look after a spool: a directory through which processes hand NumPy arrays to
each other.

Every command may run at any time, also while readers and writers use the
spool."""
_EPILOG = """\
exit codes: 0 done, 1 found a problem, 2 wrong use, 130 interrupted
'%(prog)s COMMAND --help' says more, with examples"""
_GC = """\
Requeue and remove what crashed processes left: half-written files, items in
flight at crashed readers (they are redelivered), files nobody needs, stale
tokens. A damaged index is built again. Work of living processes is never
touched, and names that are not the spool's are left alone.

The bytes freed are disk blocks; of a file that another process still has
mapped they come back when it lets go.

With --temporary, the spools of Queue() are removed that nobody uses any more:
those of killed processes."""
_GC_EXAMPLES = """\
examples:
  %(prog)s /dev/shm/frames              tidy up
  %(prog)s /dev/shm/frames --dry-run    only say what would be done
  %(prog)s /dev/shm/frames --json | jq .bytes_freed
  %(prog)s --temporary                  what killed processes left of Queue()

exit codes: 0 done, also where a damaged index was built again, which the report
says; 1 it could not be done, or not all of it; 2 no spool"""
_STAT = """\
Show what is in a spool: items waiting and in flight, dead letters,
files kept to be written again, who has it open, its limits, and how old the
first item is. Changes nothing, and needs no repair to run."""
_STAT_EXAMPLES = """\
examples:
  %(prog)s /dev/shm/frames
  %(prog)s /dev/shm/frames --json | jq .depth
  watch -n1 %(prog)s /dev/shm/frames

exit codes: 0 all is well, 1 the index is damaged or its lock stuck, 2 no spool"""
_PURGE = """\
Remove the items that wait, for good: to start again with an empty spool. What
crashed readers had in flight goes too. What live readers have in flight stays,
and so do dead letters. Whoever has the spool open goes on using it."""
_PURGE_EXAMPLES = """\
examples:
  %(prog)s /dev/shm/frames
  %(prog)s /dev/shm/frames && spoolipc failed drop /dev/shm/frames"""
_RM = """\
Delete a spool: its items, its dead letters, its directory. Refused while anybody
has it open, and where it holds names that are not the spool's."""
_RM_EXAMPLES = """\
examples:
  %(prog)s /dev/shm/frames
  %(prog)s /dev/shm/frames && echo gone

exit codes: 0 done, 1 it is in use, 2 no spool"""
_SET = """\
Change limits of a spool, for all who have it open and all to come; without any,
show them. Nothing is removed: where more waits than a new maxsize, puts wait
until less does.

Limits: maxsize (items waiting), max_bytes (of items waiting or in flight),
recycle_bytes (of consumed files kept to be written again), max_attempts
(deliveries before an item is a dead letter); 0 is none."""
_SET_EXAMPLES = """\
examples:
  %(prog)s /dev/shm/frames
  %(prog)s /dev/shm/frames maxsize=100 max_bytes=2000000000"""
_FSCK = """\
Check every file of a spool and its index against each other: damaged items,
items the index does not know, files that are missing or of no use, lists that
contradict themselves, wrong modes, links and other planted things. Without
--repair it changes nothing. A spool on servers has no files to check.

With --repair, damaged items move to failed/ with the reason, modes are closed,
missing directories made, files of no item removed. Where the index contradicts
itself, an item or a limit it is built again from the items; what live readers
have in flight stays theirs. Nothing is lost silently."""
_FSCK_EXAMPLES = """\
examples:
  %(prog)s /data/spool                  look
  %(prog)s /data/spool --repair && start-readers

exit codes: 0 clean, or clean now; 1 problems are left; 2 not the directory of
a spool"""
_FORWARD = """\
Move the items of one spool to another, each a directory's or a server's, each
item once, whatever crashes when: an item is acknowledged at its source when the
destination has it, and the destination remembers which it has. Runs until the
source has ended, and waits, which it says, while the destination is full or an
end is away. Ctrl-C and SIGTERM end it when what is on its way has arrived.

With --keep the items are copied and stay at the source, in flight or not, for
its readers; begun again, it goes on after the last that was copied."""
_FORWARD_EXAMPLES = """\
examples:
  %(prog)s /dev/shm/frames nats://host:4222/frames
  %(prog)s /data/spool nats://a,b,c/frames?replicas=3 --rate 50e6
  %(prog)s nats://host/frames /data/spool --durability fsync
  %(prog)s /data/spool /mnt/other/spool --keep --until-empty

exit codes: 0 the source has ended, 1 it could not go on, 2 no spool, 130 and 143
ended by Ctrl-C and SIGTERM"""
_FAILED = """\
Dead letters: items that were rejected, failed in every attempt, or were
damaged. They lie in failed/, each a plain .npy with its history beside it, and
take space until they are retried or dropped."""
_FAILED_EXAMPLES = """\
examples:
  %(prog)s list /data/spool
  %(prog)s show /data/spool 17         arrays, metadata, every failure
  %(prog)s retry /data/spool 17 18     requeue at the end
  %(prog)s drop /data/spool            remove all dead letters for good"""
_BENCH = """\
Measure how fast arrays pass between two processes here, one way and round
trip, every byte read: spoolipc, multiprocessing.Queue, and the limit, a ring in
shared memory that is only copied into and read from. Takes a few minutes, and
memory for some 30 arrays of 54 MB. Best done when nothing else runs.

DIR is where the spools are made and removed again: a disk, to measure that."""
_BENCH_EXAMPLES = """\
examples:
  %(prog)s --quick
  %(prog)s /data --json > bench.json

exit codes: 0 done, 1 a carrier could not be measured, 2 wrong use"""
Answer: TypeAlias = tuple[Any, list[str], int]
"""What a command returns: a value, the same as lines for people, and its exit code."""
_PLACE = "the spool's directory, or its URL on servers"
_AS_IT_IS = argparse.RawDescriptionHelpFormatter
_LIMITS = ("maxsize", "max_bytes", "recycle_bytes", "max_attempts")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a name may be of any bytes
        options = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], Answer] = options.command
        value, lines, code = command(options)
        _print(options, value, lines)
        return code
    except KeyboardInterrupt:
        return _complain(KeyboardInterrupt("interrupted"), INTERRUPTED)
    except (NotASpool, NetworkFileSystem, UnknownVersion, UnsupportedOperation, NoSuchItem) as error:
        return _complain(error, WRONG_USE)
    except (SpoolError, OSError) as error:
        return _complain(error, PROBLEM)
    except ValueError as error:
        return _complain(error, WRONG_USE)


def _complain(error: BaseException, code: int) -> int:
    if sys.stderr is not None:
        print(f"spoolipc: {text.one_line(error)}", file=sys.stderr)
    return code


class _Log(logging.Handler):
    """What the log says while a command is at work, printed as errors are, above its bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if sys.stderr is not None:
            with suppress(OSError):  # nobody reads it
                tqdm.write(f"spoolipc: {text.printable(record.getMessage())}", file=sys.stderr)

    def __enter__(self) -> None:
        logging.getLogger("spoolipc").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("spoolipc").removeHandler(self)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "spoolipc", description=_SUMMARY, epilog=_EPILOG, formatter_class=_AS_IT_IS
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    one = _command(commands, "gc", _run_gc, "remove what crashed processes left", _GC, _GC_EXAMPLES, "")
    where = one.add_mutually_exclusive_group(required=True)
    where.add_argument("--temporary", action="store_true", help="all temporary spools, those of Queue()")
    where.add_argument("path", metavar="DIR", type=_directory, nargs="?", help=_PLACE)
    one.add_argument("--dry-run", action="store_true", help="only say what would be done")
    _command(commands, "stat", _run_stat, "show what is in a spool", _STAT, _STAT_EXAMPLES)
    _command(commands, "purge", _run_purge, "remove the items that wait", _PURGE, _PURGE_EXAMPLES)
    _command(commands, "rm", _run_rm, "delete a spool", _RM, _RM_EXAMPLES)
    one = _command(commands, "set", _run_set, "change the limits of a spool", _SET, _SET_EXAMPLES)
    what = "what they are to be"
    one.add_argument("limits", metavar="NAME=NUMBER", type=_limit, nargs="*", default=[], help=what)
    about, place = "check files and index against each other", "the spool's directory"
    one = _command(commands, "fsck", _run_fsck, about, _FSCK, _FSCK_EXAMPLES, place)
    one.add_argument("--repair", action="store_true", help="put right what can be, losing nothing silently")
    one = _command(
        commands, "bench", _run_bench, "measure how fast arrays pass here", _BENCH, _BENCH_EXAMPLES, ""
    )
    one.add_argument("path", metavar="DIR", nargs="?", help="where to make the spools (default: /dev/shm)")
    one.add_argument("--quick", action="store_true", help="fewer arrays and rounds")
    one = _command(
        commands, "forward", _run_forward, "move items to another spool", _FORWARD, _FORWARD_EXAMPLES
    )
    one.add_argument(
        "destination", metavar="TO", type=_directory, help="the directory or URL of the one that gets them"
    )
    one.add_argument("--rate", type=float, metavar="BYTES", help="most bytes a second")
    one.add_argument(
        "--max-bytes", type=_nbytes, metavar="BYTES", default=64 << 20, help="most on their way at once"
    )
    one.add_argument("--until-empty", action="store_true", help="end when nothing waits")
    one.add_argument("--keep", action="store_true", help="copy the items, and leave them at the source")
    one.add_argument("--durability", choices=("none", "fsync"), default="none", help="of the destination")
    failed = _described(
        commands, "failed", "list, show, retry or drop dead letters", _FAILED, _FAILED_EXAMPLES
    )
    actions = failed.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, run, what in (
        ("list", _run_list, "one line for each dead letter: number, size, attempts, the reason"),
        ("show", _run_show, "all that is known of dead letters: arrays, metadata, every failure"),
        ("retry", _run_retry, "requeue dead letters at the end, as new items"),
        ("drop", _run_drop, "remove dead letters and their histories for good"),
    ):
        example = f"example:\n  %(prog)s /data/spool{'' if name == 'list' else ' 17'}"
        one = _command(actions, name, run, what, what[0].upper() + what[1:] + ".", example)
        what = "their numbers; none for all"
        one.add_argument("seqs", metavar="SEQ", type=_seq, nargs="*", default=[], help=what)
    return parser


def _directory(text: str) -> str:
    try:
        shared = connect(text).crosses_processes
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not shared:
        raise argparse.ArgumentTypeError(
            f"{text} is in the memory of one process, which alone can look after it"
        )
    return text


def _seq(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of an item")
    return int(text)


def _limit(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if name not in _LIMITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER, NAME one of {', '.join(_LIMITS)}")
    if not (value.isascii() and value.isdigit()):
        raise argparse.ArgumentTypeError(f"{name} can be 0, which is none, or more, not {value!r}")
    return name, int(value)


def _nbytes(text: str) -> int:
    try:
        return int(text) if text.isdigit() else int(float(text))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, as 64000000 or 64e6") from None


def _described(commands: Any, name: str, help: str, about: str, examples: str) -> argparse.ArgumentParser:
    said = {"help": help, "description": about, "epilog": examples, "formatter_class": _AS_IT_IS}
    parser: argparse.ArgumentParser = commands.add_parser(name, **said)
    return parser


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], Answer],
    help: str,
    about: str,
    examples: str,
    place: str = _PLACE,
) -> argparse.ArgumentParser:
    parser = _described(commands, name, help, about, examples)
    if place:
        parser.add_argument("path", metavar="DIR", type=_directory, help=place)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(command=run)
    return parser


def _print(options: argparse.Namespace, value: Any, lines: list[str]) -> None:
    if sys.stdout is None:
        return  # it was closed: the exit code says how it went
    said = json.dumps(_plain(value), indent=2) if options.json else "\n".join(map(text.printable, lines))
    try:
        print(said, flush=True)
    except OSError as error:
        # Nothing more can be written, not at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # then whoever read our output has enough
            raise OSError(error.errno, f"what was done cannot be printed: {error.strerror}") from error


def _plain(value: Any) -> Any:
    """What a report holds, as JSON has it."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        said = dataclasses.asdict(value)
        if hasattr(value, "clean"):
            said["clean"] = value.clean
        return said
    return value


def _bar(what: str, unit: str) -> Any:
    """A bar, on a terminal, from the first second on."""
    from tqdm import tqdm

    off = True if sys.stderr is None else None
    return tqdm(desc=what, unit=unit, unit_scale=True, delay=1.0, disable=off, leave=False)


def _run_gc(options: argparse.Namespace) -> Answer:
    if options.temporary:
        removed = remove_temporary(dry_run=options.dry_run)
        return removed, removed or ["no temporary spool that nobody uses"], DONE
    with _bar("gc", " names") as bar:
        done = gc(options.path, dry_run=options.dry_run, progress=lambda seen, _: bar.update(seen - bar.n))
    return done, text.gc_lines(done), PROBLEM if done.not_removed else DONE


def _run_stat(options: argparse.Namespace) -> Answer:
    found = stat(options.path)
    return found, text.stat_lines(found), PROBLEM if found.index_damage or found.stuck_on else DONE


def _run_purge(options: argparse.Namespace) -> Answer:
    count = purge(options.path)
    return count, [f"removed {text.count(count, 'item')}"], DONE


def _run_rm(options: argparse.Namespace) -> Answer:
    remove(options.path)
    return None, [f"removed {shown(options.path)}"], DONE


def _run_set(options: argparse.Namespace) -> Answer:
    asked = dict(options.limits)
    limits = set_limits(options.path, **asked) if asked else stat(options.path).limits
    return limits, [text.limits_line(limits)], DONE


def _run_fsck(options: argparse.Namespace) -> Answer:
    with _bar("fsck", " names") as bar:
        found = fsck(options.path, repair=options.repair, progress=lambda seen, _: bar.update(seen - bar.n))
    return found, text.fsck_lines(found), DONE if found.clean else PROBLEM


def _run_forward(options: argparse.Namespace) -> Answer:
    stop, got = threading.Event(), list[int]()

    def end(signum: int, _: object) -> None:
        got.append(signum)
        stop.set()
        signal.signal(signum, before[signal.Signals(signum)])  # another one ends it at once

    before = {signum: signal.signal(signum, end) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _bar("forward", "B") as bar, _Log(logging.WARNING):
            count = forward(
                options.path,
                options.destination,
                max_bytes=options.max_bytes,
                rate=options.rate,
                until_empty=options.until_empty,
                keep=options.keep,
                durability=options.durability,
                stop=stop,
                moved=lambda _, nbytes: bar.update(nbytes),
            )
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    said = f"{'copied' if options.keep else 'moved'} {text.count(count, 'item')}"
    return count, [said], 128 + got[0] if got else DONE


def _run_bench(options: argparse.Namespace) -> Answer:
    from .bench import bench

    # What was made is removed on the way out.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        found = bench(options.path, quick=options.quick)
    finally:
        signal.signal(signal.SIGTERM, before)
    return found, text.bench_lines(found["results"]), DONE


def _run_list(options: argparse.Namespace) -> Answer:
    letters = failed_list(options.path, options.seqs or None)
    return letters, text.list_lines(letters) or [text.NO_LETTERS], DONE


def _run_show(options: argparse.Namespace) -> Answer:
    letters = failed_list(options.path, options.seqs or None)
    lines = [line for letter in letters for line in ("", *text.letter_lines(letter))]
    return letters, lines[1:] or [text.NO_LETTERS], DONE


def _run_retry(options: argparse.Namespace) -> Answer:
    done = failed_retry(options.path, options.seqs or None)
    return done, text.retry_lines(done), PROBLEM if done.damaged else DONE


def _run_drop(options: argparse.Namespace) -> Answer:
    gone = failed_drop(options.path, options.seqs or None)
    return gone, [f"dropped {text.count(len(gone), 'dead letter')}"], DONE
