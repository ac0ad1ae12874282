"""A system call that fails, with any error it can give, is a clear error that names the path, or no matter.

Every call of every scenario is made to fail once. Nothing is lost or doubled by it, no descriptor leaks, the lock is
free, and the same objects go on working.
"""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
from support.faults import at, fail, partly
from support.scenarios import SCENARIOS, Run

ERRORS = {
    "open_at": "EIO ENOSPC EDQUOT EMFILE EACCES",
    "replace_descriptor": "EIO EMFILE",
    "stat_at": "EIO EACCES",
    "fstat": "EIO",
    "statvfs": "EIO",
    "rename": "EIO ENOSPC EDQUOT EACCES",
    "unlink": "EIO EACCES",
    "mkdir": "EIO ENOSPC EDQUOT EACCES",
    "fchmod": "EIO EACCES",
    "read": "EIO EINTR",
    "pread": "EIO EINTR",
    "write": "EIO ENOSPC EDQUOT EINTR",
    "pwrite": "EIO ENOSPC EDQUOT EINTR",
    "truncate": "EIO EACCES EINTR",
    "allocate": "EIO ENOSPC EDQUOT EINTR",
    "sync": "EIO ENOSPC EDQUOT",
    "list_names": "EIO EMFILE EACCES",
    "scan": "EIO EMFILE EACCES",
    "map_file": "ENOMEM EACCES",
    "mapped_size": "EIO",
    "save": "EIO ENOSPC EDQUOT",
    "lock": "ENOLCK EINTR EIO",
    "unlock": "ENOLCK EINTR EIO",
    "make_parents": "EIO ENOSPC EDQUOT EACCES",
    "read_text": "EIO EACCES",
    "poll": "EINTR ENOMEM",
    "watch_open": "EMFILE ENOMEM",
    "watch_add": "ENOSPC ENOMEM",
}
"""The calls that may fail, and with what. Not `close`, whose descriptor the kernel frees in any case."""
WRITES = ("save", "write", "pwrite")


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_failing_call_is_a_clear_error_or_no_matter(tmp_path: Path, name: str) -> None:
    path = tmp_path / "spool"
    with Run(path, name) as run:
        met = run.with_fault()
    del run
    for number, call in enumerate(met, 1):
        for error in ERRORS.get(call, "").split():
            fault = fail(getattr(errno, error))
            if call in WRITES and error in ("ENOSPC", "EDQUOT"):
                fault = partly(0.6, fault)
            gc.collect()
            before = os.listdir("/proc/self/fd")
            try:
                with Run(path, name) as run:
                    run.with_fault(at(number, fault))
                    assert not run.error or str(path) in run.error, f"the path is not named: {run.error}"
                del run
                gc.collect()
                assert len(os.listdir("/proc/self/fd")) == len(before), "descriptors leaked"
            except BaseException as failure:
                failure.add_note(f"{name}: {error} at call {number}, {call}")
                raise
