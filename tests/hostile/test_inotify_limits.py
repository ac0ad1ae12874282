"""Where inotify's limits are used up, or its queue overflows, waiting goes on by looking, and the log says so once.

The limits are lowered for real, in a user namespace of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.peer import Peer

from spoolipc import SpoolWriter
from spoolipc import words as W

LATE = 1.0
"""Seconds within which whoever waits must be woken, whatever happens to the events."""
NO_NAMESPACE = (
    "no user namespace can be made here"
    if shutil.which("unshare") is None
    or subprocess.run(["unshare", "-Ur", "true"], capture_output=True, check=False).returncode
    else ""
)
WAITER = """
import json, logging, sys, time
from spoolipc import SpoolReader, stat
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("spoolipc").addHandler(Keep())
with SpoolReader(sys.argv[1]) as reader:
    print("open", flush=True)
    late = []
    for _ in range(3):
        array = reader.get(timeout=20)
        late.append(time.monotonic() - float(array[0]))
        print("got", flush=True)
    print(json.dumps([late, lines, stat(sys.argv[1]).waiting_mode]), flush=True)
"""


def until_it_looks_again_and_again(pid: int) -> None:
    """Wait until a process has gone to sleep some times more."""

    def naps() -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("voluntary_ctxt")).split()[1])

    begun, deadline = naps(), time.monotonic() + 20
    while naps() < begun + 10:
        assert time.monotonic() < deadline
        os.sched_yield()


@pytest.mark.fault
@pytest.mark.skipif(bool(NO_NAMESPACE), reason=NO_NAMESPACE)
@pytest.mark.parametrize("limit", ["max_inotify_instances", "max_inotify_watches"])
def test_used_up_limits_make_waiting_poll_and_say_so_once(tmp_path: Path, limit: str) -> None:
    path = tmp_path / "spool"
    command = f'echo 0 > /proc/sys/user/{limit} && exec "$0" -W error -c "$1" "$2"'
    with (
        SpoolWriter(path) as writer,
        subprocess.Popen(
            ["unshare", "-Ur", "sh", "-c", command, sys.executable, WAITER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
        ) as waiter,
    ):
        assert waiter.stdout is not None
        assert waiter.stdout.readline() == "open\n"
        for _ in range(3):
            until_it_looks_again_and_again(waiter.pid)
            writer.put(np.full(3, time.monotonic()))
            assert waiter.stdout.readline() == "got\n"
        late, lines, mode = json.loads(waiter.stdout.readline())
    assert waiter.returncode == 0
    assert max(late) < LATE
    assert mode == "polling"
    assert len([line for line in lines if "polling" in line]) == 1, lines


WAIT = """
import threading, time
reader, writer = SpoolReader(path), SpoolWriter(path)
woken = {}
def get():
    reader.get(timeout=30)
    woken["items"] = time.monotonic()
threads = [threading.Thread(target=get)]
for thread in threads:
    thread.start()
"""


def test_overflow_of_the_queue_of_events_delays_nobody_by_more_than_a_second(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with SpoolWriter(path) as writer, Peer(path) as peer:
        peer.run(WAIT)
        flags = writer._sink.party.index.words
        deadline = time.monotonic() + 20
        while not any(flags[W.ITEM_FLAGS + k] > 1 for k in range(8)):
            assert time.monotonic() < deadline
            os.sched_yield()
        watched = [k for k in range(8) if flags[W.ITEM_FLAGS + k] > 1]
        peer.stop()
        bell = path / "bell" / f"items-{watched[0]}"
        # Two files in turn, as equal events in a row are merged into one.
        names = [bell / "ring", bell / "other"]
        descriptors = [os.open(name, os.O_WRONLY | os.O_CREAT, 0o600) for name in names]
        try:
            for step in range(most + 1000):
                os.pwrite(descriptors[step % 2], b"\0", 0)
        finally:
            for fd in descriptors:
                os.close(fd)
            names[1].unlink()
        peer.go()
        put = time.monotonic()
        writer.put(np.zeros(3))
        peer.run("threads[0].join()")
        assert peer.ask('woken["items"]') - put < LATE
        peer.run("reader.close(); writer.close()")
