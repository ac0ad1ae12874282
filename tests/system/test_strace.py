"""`spoolipc.directory.fs` is the only door to the system: what strace sees the engine do, the injector has numbered.

What `support.faults` makes happen at that door, strace makes happen in the kernel, once for each kind of fault.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.account import check_spool
from support.strace import strace

from spoolipc import SpoolReader, fsck, gc

pytestmark = pytest.mark.fault
ROUND = """
import contextlib, os, sys
import numpy as np
import spoolipc
from spoolipc import SpoolReader, SpoolWriter

path, small, large = sys.argv[1], np.arange(9), np.arange(9000)


def round_of():
    with SpoolWriter(path, max_attempts=2) as writer, SpoolReader(path) as reader:
        for array in (small, large) * 3:
            writer.put(array, meta=1)
        writer.put_many([small, large])
        with writer.loan(9000, "i8") as array:
            array[:] = large
        for _ in range(3):
            reader.get()
        with reader.receive() as item:
            item.meta, item.array
        reader.receive().nack()
        reader.receive().reject("not wanted")
        with contextlib.suppress(spoolipc.Empty):
            while True:
                reader.get_nowait()
        with contextlib.suppress(spoolipc.Empty):
            reader.get(timeout=0.3)
    with SpoolWriter(path, durability="fsync", checksum=True) as writer:
        writer.put(large)
    with SpoolReader(path, verify=True) as reader:
        reader.peek(), reader.get()
    spoolipc.failed_retry(path)
    spoolipc.gc(path), spoolipc.stat(path), spoolipc.fsck(path, repair=True)
    with SpoolWriter(path) as writer:
        writer.shutdown(immediate=True)
    with SpoolWriter(path, reopen=True):
        pass
    spoolipc.failed_list(path)
"""
SEEN = (
    ROUND
    + """
from support.faults import Injector


def say(*words):
    with contextlib.suppress(OSError):
        os.stat("/" + " ".join(words))


SpoolWriter(path, mode=0o770).close()
round_of()  # what Python does once, such as to import, is done
with Injector(lambda event: say("call", event.name), lambda event, _: say("done", event.name)):
    round_of()
say("end")
"""
)
ONE = {
    "open_at": "openat",
    "close": "close",
    "stat_at": "newfstatat",
    "fstat": "fstat newfstatat",
    "statvfs": "fstatfs",
    "rename": "renameat renameat2",
    "unlink": "unlinkat",
    "mkdir": "mkdir mkdirat",
    "chmod": "fchmodat",
    "fchmod": "fchmod",
    "fchown": "fchown",
    "read": "read",
    "pread": "pread64",
    "write": "write",
    "pwrite": "pwrite64",
    "truncate": "ftruncate",
    "allocate": "fallocate",
    "sync": "fsync",
    "seek": "lseek",
    "lock": "flock",
    "unlock": "flock",
    "poll": "poll",
    "yield_core": "sched_yield",
    "watch_add": "inotify_add_watch",
}
"""The names at the door that are one call of the kernel; of the others, all up to their end is theirs."""
PYTHON = {"futex", "brk", "madvise", "munmap", "getrandom", "getpid", "gettid", "rt_sigreturn"} | {
    "setfsuid",
    "setfsgid",
    "geteuid",
    "getegid",
}
LATER = {"close", "getdents64", "lseek", "mmap", "mremap", "prlimit64"}
"""What ends a mapping or reads on in a listing, when Python sees fit, and memory."""
LINE = re.compile(r'(\d+) +(\w+)\((?:.*"/(call|done|end)(?: (\w+))?")?(.*)')


def outside(lines: list[str]) -> Iterator[str]:
    """The calls of the kernel that belong to no call at the door."""
    inside, begun, left = "", False, 0
    for line in lines:
        match = LINE.match(line)
        if match is None:
            continue
        _, call, mark, name, _ = match.groups()
        if mark == "end":
            return
        if mark:
            begun = True
            inside, left = (name, 1) if mark == "call" else ("", 0)
        elif begun and inside in ONE and left and call in ONE[inside].split():
            left = 0
        elif begun and call not in PYTHON | LATER and (not inside or inside in ONE):
            yield line


def test_every_call_of_the_kernel_is_one_at_the_door(tmp_path: Path) -> None:
    done, lines = strace(tmp_path, SEEN)
    assert done.returncode == 0, done.stderr
    assert sum('"/call' in line for line in lines) > 500
    assert list(outside(lines)) == []
    names = {match[4] for match in map(LINE.match, lines) if match and match[3] == "call"}
    missed = {"replace_descriptor", "sleep", "watch_open", "mkdir", "chmod", "fchown", "make_parents"} - names
    assert {*ONE, "save", "map_file", "scan", "list_names"} - names <= missed


@pytest.mark.parametrize("call", ["renameat", "unlinkat", "flock", "openat", "fsync", "pwrite64"])
@pytest.mark.parametrize("when", [3, 40])
def test_a_process_killed_in_the_kernel_costs_nothing(tmp_path: Path, call: str, when: int) -> None:
    spool = f"{tmp_path}/spool"
    filled = "with SpoolWriter(path) as writer:\n    writer.put_many([small] * 5)\n"
    inject = ["-e", f"inject={call}:signal=SIGKILL:when={when}", "-e", f"trace={call}"]
    done, _ = strace(tmp_path, ROUND + filled + "round_of()\n", *inject)
    assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    with SpoolReader(spool) as reader:
        while reader.qsize():
            array = reader.get_nowait()
            assert np.array_equal(array, np.arange(len(array)))
    gc(spool)
    check_spool(Path(spool))


@pytest.mark.parametrize(("call", "when"), [("renameat", 4), ("flock", 3), ("newfstatat", 4), ("fsync", 1)])
def test_a_call_that_fails_in_the_kernel_is_an_error_that_names_the_path(
    tmp_path: Path, call: str, when: int
) -> None:
    inject = ["-P", str(tmp_path / "spool" / "items"), "-e", f"inject={call}:error=EIO:when={when}"]
    done, _ = strace(tmp_path, ROUND + "round_of()\n", *inject)
    assert done.returncode == 1
    assert "StorageError" in done.stderr
    assert str(tmp_path / "spool") in done.stderr.splitlines()[-1]
    gc(tmp_path / "spool")
    assert fsck(tmp_path / "spool").problems == ()
