"""A system call that fails, with any error it can give, is a clear error that names the path, or no matter.

Every call of every scenario is made to fail once. Nothing is lost or doubled by it, no descriptor leaks, the lock is
free, and the same objects go on working.
"""

from __future__ import annotations

import errno
import gc
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.account import check_spool
from support.faults import Event, Hook, Injector, at, fail, partly
from support.scenarios import CORE, SCENARIOS, Run, arrays, value_of

import spoolipc
from spoolipc import Empty, ShutDown, SpoolError, SpoolReader, SpoolWriter

ERRORS = {
    "open_at": "EIO ENOSPC EMFILE EACCES",
    "stat_at": "EIO",
    "fstat": "EIO",
    "statvfs": "EIO",
    "rename": "EIO ENOSPC EDQUOT EACCES",
    "unlink": "EIO EACCES",
    "mkdir": "EACCES EDQUOT",
    "chmod": "EACCES",
    "fchmod": "EACCES",
    "fchown": "EPERM",
    "read": "EIO EINTR",
    "pread": "EIO EINTR",
    "write": "EIO ENOSPC EDQUOT EINTR",
    "pwrite": "EIO ENOSPC EDQUOT EINTR",
    "truncate": "EIO EINTR",
    "allocate": "EIO ENOSPC EDQUOT EINTR",
    "sync": "EIO ENOSPC",
    "list_names": "EIO EMFILE",
    "scan": "EIO EMFILE",
    "map_file": "ENOMEM EACCES",
    "seek": "EIO",
    "save": "EIO ENOSPC EDQUOT",
    "lock": "ENOLCK EINTR",
    "unlock": "ENOLCK EINTR",
    "make_parents": "EIO ENOSPC",
    "read_text": "EIO EACCES",
    "poll": "EINTR",
    "watch_open": "EMFILE",
    "watch_add": "ENOSPC",
}
"""The calls that may fail, and with what. Not `close`, whose descriptor the kernel frees in any case."""
WRITES = ("save", "write", "pwrite")


def _if_it_is(call: str, fault: Hook) -> Hook:
    """The fault, unless a slow machine has made another call of that number, perhaps a `close`."""
    return lambda event: fault(event) if event.name == call else None


def check(path: Path, name: str, errors: dict[str, list[str]], step: int = 1) -> None:
    """Fail each call of a scenario, or one in `step`, with each of its errors."""
    with Run(path, name) as run:
        met = run.with_fault()
    del run
    for number, call in [*enumerate(met, 1)][::step]:
        for error in errors.get(call, ()):
            fault = fail(getattr(errno, error))
            if call in WRITES and error in ("ENOSPC", "EDQUOT"):
                fault = partly(0.6, fault)
            gc.collect()
            before = len(os.listdir("/proc/self/fd"))
            try:
                with Run(path, name) as run:
                    run.with_fault(at(number, _if_it_is(call, fault)))
                    assert not run.error or str(path) in run.error, f"the path is not named: {run.error}"
                del run
                gc.collect()
                assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"
            except BaseException as failure:
                failure.add_note(f"{name}: {error} at call {number}, {call}")
                raise


@pytest.mark.parametrize("name", CORE)
def test_a_failing_call_is_a_clear_error_or_no_matter(place: Path, name: str) -> None:
    check(place / "spool", name, {call: errors.split()[:1] for call, errors in ERRORS.items()}, 3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SCENARIOS)
def test_any_error_of_any_call_is_a_clear_error_or_no_matter(place: Path, name: str) -> None:
    check(place / "spool", name, {call: errors.split() for call, errors in ERRORS.items()})


def test_a_file_that_can_never_be_removed_keeps_nobody_from_the_spool(place: Path) -> None:
    path = place / "spool"

    def refuse(event: Event) -> None:
        if event.name == "unlink" and str(event.args[0]).endswith(".npy"):
            fail(errno.EIO)(event)

    with SpoolWriter(path) as writer:
        reader = SpoolReader(path)
        writer.put_many([arrays(value, "large") for value in (1, 2)])
        shown = reader.get()
        with Injector(refuse):
            reader.close()  # its file would lose its name
            writer.put(arrays(3, "small"))
            with SpoolReader(path) as other:
                assert list(map(value_of, other.get_many(2))) == [2, 3]
        assert value_of(shown) == 1
    assert spoolipc.gc(path).orphaned_files == 1
    check_spool(path)


def test_items_are_taken_though_the_file_system_has_no_block_for_a_name(place: Path) -> None:
    with SpoolWriter(place / "spool") as writer, SpoolReader(place / "spool") as reader:
        writer.put_many([np.full(5000, number) for number in range(2)])
        received = reader.receive()

        def full(event: Event) -> None:
            if event.name == "rename":
                fail(errno.ENOSPC)(event)

        with Injector(full) as injector:
            received.ack()
            assert (reader.get() == 1).all()
        assert injector.met.count("rename") == 2


KINDS = ("small", "large", "large", "small", "large", "small")
BATCH = [arrays(value, kind) for value, kind in enumerate(KINDS)]


def put_many(writer: SpoolWriter, reader: SpoolReader, told: list[int]) -> None:
    first = 7  # of the sequence numbers: as many were put before
    try:
        told += (seq - first for seq in writer.put_many(BATCH, block=False))
    except SpoolError as error:
        told += (seq - first for seq in error.seqs)
        raise


def got(found: Iterable[Any], told: list[int]) -> None:
    for array in found:
        told.append(value_of(array))


def received(writer: SpoolWriter, reader: SpoolReader, told: list[int]) -> None:
    for item in reader.items():
        value = value_of(item.array)
        item.ack()
        told.append(value)


MANY: dict[str, Callable[[SpoolWriter, SpoolReader, list[int]], None]] = {
    "put_many": put_many,
    "get_many": lambda writer, reader, told: got(reader.get_many(9, block=False), told),
    "get_many, copied": lambda writer, reader, told: got(reader.get_many(9, block=False, copy=True), told),
    "arrays": lambda writer, reader, told: got(reader, told),
    "items": received,
}
LASTING = {
    **dict.fromkeys("list_names scan watch_open".split(), "EMFILE"),
    **dict.fromkeys("write pwrite save allocate rename mkdir watch_add".split(), "ENOSPC"),
    **{"open_at": "EMFILE ENOSPC", "map_file": "ENOMEM"},
}
"""What goes on failing where no descriptor is left, or no block, or no memory."""


def told_of(path: Path, name: str, safe: bool, fault: Hook) -> tuple[list[int], list[str]]:
    """Let a call of many meet a fault; returns what it said that it put or took, and the system calls that it met."""
    told: list[int] = []
    durability: Any = "fsync" if safe else "none"
    with (
        SpoolWriter(path, durability=durability, checksum=safe) as writer,
        SpoolReader(path, verify=safe) as reader,
    ):
        writer.put_many(BATCH)
        assert len(reader.get_many(9)) == len(BATCH)  # whose files are written again
        if name != "put_many":
            writer.put_many(BATCH)
            writer.shutdown()
        with Injector(fault) as injector, suppress(SpoolError):
            MANY[name](writer, reader, told)
    return told, injector.met


def check_account(path: Path, name: str, safe: bool, fault: Hook) -> list[str]:
    """See that what was told of and what is left are the whole, in order; returns the system calls."""
    told, met = told_of(path, name, safe, fault)
    left: list[int] = []
    with SpoolReader(path) as reader, suppress(Empty, ShutDown):
        while True:
            left.append(value_of(reader.get_nowait()))
    unread = [value_of(np.load(letter.path)) for letter in spoolipc.failed_list(path)]
    if name == "put_many":
        assert left == told == list(range(len(told)))
    else:
        assert told + left == [value for value in range(len(BATCH)) if value not in unread]
    spoolipc.gc(path)
    check_spool(path)
    shutil.rmtree(path)
    return met


@pytest.mark.parametrize(
    ("lasting", "safe"),
    [
        pytest.param(True, False, id="from then on"),
        pytest.param(False, False, id="once", marks=pytest.mark.exhaustive),
        pytest.param(True, True, id="from then on, safe", marks=pytest.mark.exhaustive),
        pytest.param(False, True, id="once, safe", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize("name", MANY)
def test_account_of_a_call_of_many_is_exact_whatever_fails(
    place: Path, name: str, lasting: bool, safe: bool
) -> None:
    """lasting: as where no descriptor, block or memory is left. safe: with fsync, and with the checksums verified."""
    errors = LASTING if lasting else ERRORS
    path = place / "spool"
    for number, call in enumerate(check_account(path, name, safe, lambda _: None), 1):
        for error in errors.get(call, "").split():

            def fault(event: Event, number: int = number, error: str = error) -> None:
                is_met = event.number >= number if lasting else event.number == number
                if is_met and error in errors.get(event.name, "").split():
                    fail(getattr(errno, error))(event)

            try:
                check_account(path, name, safe, fault)
            except BaseException as failure:
                failure.add_note(f"{name}: {error} at call {number}, {call}")
                raise
