"""The values that cross every floor: what is put and delivered, limits and deadlines, and what is told of a spool.

Plain values without behaviour; every engine makes and takes them.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from typing_extensions import Buffer


class SupportsDLPack(Protocol):
    """An array of another library, as the Python array API standard has it."""

    def __dlpack__(self) -> Any:
        """A capsule that lends its memory."""


Array: TypeAlias = np.ndarray[Any, Any]
Puttable: TypeAlias = "Array | Buffer | SupportsDLPack"
"""What is put as one array."""
Arrays: TypeAlias = Any
"""An array, or a dict of named arrays: "Any" spares the callers who know which."""
Json: TypeAlias = Any
Copy: TypeAlias = bool | Literal["on-write"]
"""Whose the arrays delivered are: False, the spool's; True, one's own; "on-write", one's own as far as they are
written.
"""
Deadline: TypeAlias = float | None
"""Until when to wait, in seconds of the monotonic clock: None for ever, NOW not at all."""
NOW: Final = 0.0
Progress: TypeAlias = Callable[[int, int | None], None]
"""Told how many names were looked at, and of how many (None: nobody knows)."""


def deadline_of(block: bool, timeout: float | None) -> Deadline:
    """The deadline that `block` and `timeout` ask for. Raises ValueError for what is no such thing."""
    if block is not True and block is not False and not isinstance(block, np.bool):
        raise ValueError(f"block must be True or False, not {_what_was_meant(block)}")
    if not block:
        return NOW
    if timeout is None:
        return None
    if (type(timeout) is not float and type(timeout) is not int) or not timeout >= 0:
        timeout = duration("timeout", timeout)
    return time.monotonic() + timeout


def _what_was_meant(block: Any) -> str:
    if isinstance(block, np.ndarray):
        return (
            "an array; put several with put_many([a, b]), or as one item of named ones: put({'a': a, 'b': b})"
        )
    word = "timeout" if isinstance(block, (int, float, np.number)) else "meta"
    return f"{block!r}; if that is the {word}, write {word}={block!r}"


def duration(name: str, value: Any, *, positive: bool = False) -> float:
    """A number of seconds, of whatever type. Raises ValueError for what is none, and for 0 where `positive`."""
    try:
        seconds = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not (seconds > 0 if positive else seconds >= 0):
        sign = "positive" if positive else "non-negative"
        raise ValueError(f"{name} must be a {sign} number of seconds, not {value!r}")
    return seconds


def whole(name: str, value: Any, least: int = 0) -> int:
    """A whole number, of whatever type. Raises ValueError for what is none, or not from `least` to 2**63 - 1."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not least <= number < 2**63:
        raise ValueError(f"{name} must be a whole number from {least} to 2**63 - 1, not {value!r}")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False. Raises ValueError for anything else."""
    if not isinstance(value, (bool, np.bool)):
        raise ValueError(f"{name} must be True or False, not {value!r}")
    return bool(value)


def one_of(name: str, value: Any, first: str, second: str) -> None:
    """Raise ValueError for what is neither of two words."""
    if value not in (first, second):
        raise ValueError(f'{name} must be "{first}" or "{second}", not {value!r}')


def on_write(copy: Copy) -> bool:
    """Whether "on-write" is what is asked for. Raises ValueError for what is no `Copy`."""
    if isinstance(copy, (bool, np.bool)):
        return False
    if copy != "on-write":
        raise ValueError(f'copy must be True, False or "on-write", not {copy!r}')
    return True


def numbers_of(seqs: Iterable[int]) -> list[int]:
    """Sequence numbers, each once and in order. Raises ValueError for what is no list of such."""
    if not isinstance(seqs, Iterable):
        raise ValueError(f"seqs must be a list of sequence numbers, not {seqs!r}; for one write [{seqs!r}]")
    return sorted({whole("a sequence number", seq) for seq in seqs})


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a spool. None where nobody has asked for one yet; the first who does decides it.

    maxsize: items waiting, 0 for no limit. max_bytes: bytes of items waiting or in flight, each counted as its whole
    file, 0 for no limit.
    recycle_bytes: bytes of consumed files kept to be written again, 0 to keep none; more are kept for some
    seconds where more were waiting. max_attempts: deliveries before an item is a dead letter, 0 for no limit.
    mode: 0o700, or 0o770 to share the spool with the group of its directory; other users of it must ask for 0o770 as
    well. Files have the same without execution. Raises ValueError for another mode, and for one that is not a whole
    number from 0 to 2**63 - 1.
    """

    maxsize: int | None = None
    max_bytes: int | None = None
    recycle_bytes: int | None = None
    max_attempts: int | None = None
    mode: int | None = None

    def __post_init__(self) -> None:
        for name, value in zip(Limits.__slots__, _values(self), strict=True):
            if value is not None:
                object.__setattr__(self, name, whole(name, value))
        if self.mode not in (None, 0o700, 0o770):
            is_decimal = str(self.mode) in ("700", "770")
            how = f"{self.mode}; write 0o{self.mode}" if is_decimal else f"{self.mode:#o}"
            raise ValueError(f"mode must be 0o700, or 0o770 to share the spool with a group, not {how}")


_values: Final = operator.attrgetter(*Limits.__slots__)  # `astuple` copies each, which takes long
DEFAULTS: Final = Limits(maxsize=0, max_bytes=0, recycle_bytes=1 << 30, max_attempts=5, mode=0o700)
"""What is in force where nobody asked."""


def completed(limits: Limits, others: Limits) -> Limits:
    """Limits, and the others where there are none."""
    own = _values(limits)
    if None not in own:
        return limits
    pairs = zip(own, _values(others), strict=True)
    return Limits(*(one if one is not None else other for one, other in pairs))


def differing(limits: Limits, others: Limits) -> dict[str, tuple[int, int]]:
    """The limits that both have and that differ, by name."""
    pairs = zip(Limits.__slots__, _values(limits), _values(others), strict=True)
    return {name: (one, other) for name, one, other in pairs if None not in (one, other) and one != other}


def joined(limits: Limits | None, beside: Limits) -> Limits:
    """The limits given in either way. Raises ValueError for one that is no limit, or that is given twice."""
    if limits is not None and not isinstance(limits, Limits):
        raise ValueError(f"limits must be as Limits(maxsize=5), not {limits!r}")
    given = limits or Limits()
    for name, (one, other) in differing(given, beside).items():
        raise ValueError(f"{name} is given twice: {one!r} in limits and {other!r} beside it")
    return completed(given, beside)


class Message(NamedTuple):
    """One item as it is put and as it is delivered.

    arrays: base ndarrays, in order; delivered ones are read-only unless asked for otherwise. names: one for each, None
    for a single unnamed array, () for a value, whose frame is the first array. meta: any JSON value. put_time: wall
    clock, ns; 0 before it is put. id: 32 hexadecimal digits that stay the item's own when it is moved to another spool;
    "" lets the engine choose. seq, attempt, nbytes: as of the `Delivery`, also of one that was taken at once; 0 before
    it is put.
    """

    arrays: tuple[Array, ...]
    names: tuple[str, ...] | None = None
    meta: Json = None
    put_time: int = 0
    id: str = ""
    seq: int = 0
    attempt: int = 0
    nbytes: int = 0


class ArraySpec(NamedTuple):
    """What an array will be. order: "C" or "F"."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Literal["C", "F"]


class Contents(NamedTuple):
    """What an item says of itself beside its arrays. put_time: wall clock, ns."""

    names: tuple[str, ...] | None
    meta: Json
    put_time: int
    id: str


@dataclass(slots=True, weakref_slot=True)
class Delivery:
    """An item in flight at this session.

    seq: its sequence number. attempt: 1 at its first delivery. put_time: wall clock, ns; 0 when only the contents tell
    it. size: bytes stored. handle: the engine's own, for settling.
    """

    seq: int
    attempt: int
    put_time: int
    size: int
    handle: Any


@dataclass(frozen=True, slots=True)
class Peeked:
    """The next item as it waits. attempt: deliveries so far. put_time: wall clock in seconds. nbytes: bytes
    stored. names: of its arrays, None for a single unnamed one."""

    seq: int
    attempt: int
    put_time: float
    nbytes: int
    names: tuple[str, ...] | None
    meta: Json


class Ack(NamedTuple):
    """Take the item off the spool for good."""


class Nack(NamedTuple):
    """Requeue the item, to be redelivered after `delay` seconds."""

    delay: float
    reason: str


class Reject(NamedTuple):
    """Make the item a dead letter."""

    reason: str


class Extend(NamedTuple):
    """Let the lease end `lease` seconds from now."""

    lease: float


Verdict: TypeAlias = Ack | Nack | Reject | Extend
State = Literal["open", "draining", "discarded"]


@dataclass(frozen=True, slots=True)
class SpoolStat:
    """A spool at one moment. Bytes are those of whole files.

    path: absolute. state: "open"; "draining" after shutdown(); "discarded" after shutdown(immediate=True). depth:
    items that wait to be delivered now. delayed: items requeued that are not due yet. in_flight: items received and
    not settled. bytes: of all these. oldest_age: seconds since the first item to be delivered was put, None when none
    waits. failed: dead letters. puts, gets: items ever put and delivered for good, None if not counted. free_files,
    free_bytes: consumed files kept to be written again. pinned_files, pinned_bytes: consumed files that a
    reader's arrays still show, or that a writer has reserved; pinned_by: these bytes by process id. wanted_bytes: the
    most that a put has been waiting for as the file system lacks it, 0 as a rule. live_sessions: readers and writers
    that have the spool open. limits: as they are in force. file_system: its type, "jetstream" of a server; in_memory:
    whether that is RAM. waiting_mode: how this process would wait, "inotify" or "polling", "condition" in memory,
    "server" where a server is waited for. index_damage: why the index cannot be used, "" as a rule; then only items,
    dead letters and limits are counted, from the directories, and the next reader or writer rebuilds it. stuck_on: the
    process that did not let go of the index lock for a second, "" as a rule; then what needs the lock is None.

    Of a spool in memory or on servers, which has no files, all that is said of them is 0 or "", and so is
    wanted_bytes; its limit recycle_bytes is kept and bounds nothing.
    """

    path: str
    state: State
    depth: int
    delayed: int
    in_flight: int
    bytes: int
    oldest_age: float | None
    failed: int
    puts: int | None
    gets: int | None
    free_files: int
    free_bytes: int
    pinned_files: int | None
    pinned_bytes: int | None
    pinned_by: dict[str, int] | None
    wanted_bytes: int
    live_sessions: int | None
    limits: Limits
    file_system: str
    in_memory: bool
    waiting_mode: Literal["inotify", "polling", "condition", "server"]
    index_damage: str
    stuck_on: str


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed delivery. when: wall clock in seconds. who: the reader's process, where known."""

    attempt: int
    when: float
    who: str
    why: str


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array of an item. name: None unless the item was put as a dict. nbytes: of its data."""

    name: str | None
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An item that was rejected, failed too often or is damaged.

    seq: the number it was put under. path: its file, which np.load reads if it is not damaged. bytes: of the
    file. reason: why it was dead-lettered; attempts: how often it was delivered; history: every failure known,
    oldest first. arrays, meta, put_time (wall clock, seconds): what the file says; none of it when `damage`
    says why it cannot be read.
    """

    seq: int
    path: str
    bytes: int
    reason: str
    attempts: int
    history: tuple[Failure, ...]
    arrays: tuple[StoredArray, ...]
    meta: Json
    put_time: float | None
    damage: str


@dataclass(frozen=True, slots=True)
class Retried:
    """What `failed_retry` did. seqs: the new number of each item requeued, by its old one.
    damaged: why those that cannot be read were left where they are."""

    seqs: dict[int, int]
    damaged: dict[int, str]


@dataclass(frozen=True, slots=True)
class GcReport:
    """What `gc` did, or would do where `dry_run` says so.

    temporary_files: removed from `tmp/`, their writer having crashed. requeued_items: taken back from crashed
    readers, to be delivered again. dead_lettered_items: likewise, but that was their last attempt; they are in
    `failed/`. abandoned_files: consumed files that a crashed reader showed or a crashed writer was writing.
    orphaned_files: in `free/` but unknown to the index. orphaned_histories: in `failed/`, of items that are no
    more. orphaned_pieces: on a server, messages of items that were not put, or not removed, to the end.
    crashed_sessions: removed from `alive/`. half_written: replacements of `index` and `spool.json` never
    finished. discarded_items: items of a spool that was shut down at once, which nobody gets. pooled_files:
    consumed files kept to be written again, where no session is there that would. index_rebuilt: the index was
    damaged. foreign_files: names that are none of the spool's, left alone. not_removed: files that could not be
    removed, each with the reason; all else was done. bytes_freed: disk blocks that the files removed had
    (st_blocks * 512); what another process has open or mapped comes back when it lets go.
    """

    path: str
    dry_run: bool
    temporary_files: int = 0
    requeued_items: int = 0
    dead_lettered_items: int = 0
    abandoned_files: int = 0
    orphaned_files: int = 0
    orphaned_histories: int = 0
    orphaned_pieces: int = 0
    crashed_sessions: int = 0
    half_written: int = 0
    discarded_items: int = 0
    pooled_files: int = 0
    index_rebuilt: bool = False
    foreign_files: int = 0
    not_removed: tuple[str, ...] = ()
    bytes_freed: int = 0
