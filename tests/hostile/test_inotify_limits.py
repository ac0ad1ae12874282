"""Where inotify fails, reports nothing or overflows, waiting goes on by looking, and the log says so once.

Limits are lowered for real, in a user namespace of its own; a file system that reports nothing is one where the
call that adds a watch does nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.peer import Peer
from support.waits import polls, until, until_asleep

from spoolipc import SpoolWriter

LATE = 1.5
"""Seconds within which whoever waits must be woken, whatever happens to the events: about one."""
NO_NAMESPACE = (
    "no user namespace can be made here"
    if shutil.which("unshare") is None
    or subprocess.run(["unshare", "-Ur", "true"], capture_output=True, check=False).returncode
    else ""
)
NO_STRACE = "" if shutil.which("strace") else "strace is not installed"
LOWERED = 'echo 0 > /proc/sys/user/%s && exec "$0" "$@"'
WAYS = {
    "no instance left": (NO_NAMESPACE, ["unshare", "-Ur", "sh", "-c", LOWERED % "max_inotify_instances"]),
    "no watch left": (NO_NAMESPACE, ["unshare", "-Ur", "sh", "-c", LOWERED % "max_inotify_watches"]),
    "nothing is reported": (
        NO_STRACE,
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=inotify_add_watch", "-e",
         "inject=inotify_add_watch:retval=1", "--seccomp-bpf"],
    ),
}  # fmt: skip
WAITER = """
import json, logging, os, sys, time
from spoolipc import Empty, SpoolReader, stat
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("spoolipc").addHandler(Keep())
late = []
with SpoolReader(sys.argv[1]) as reader, SpoolReader(sys.argv[1]) as other:
    try:
        other.get(timeout=1)
    except Empty:
        pass
    print(os.getpid(), flush=True)
    for _ in range(3):
        array = reader.get(timeout=20)
        late.append(time.monotonic() - float(array[0]))
        print("got", flush=True)
    print(json.dumps([late, lines, stat(sys.argv[1]).waiting_mode]), flush=True)
"""


@pytest.mark.fault
@pytest.mark.parametrize("way", list(WAYS))
def test_without_inotify_waiting_polls_and_says_so_once(spool: Path, way: str) -> None:
    reason, command = WAYS[way]
    if reason:
        pytest.skip(reason)
    with (
        SpoolWriter(spool) as writer,
        subprocess.Popen(
            [*command, sys.executable, "-W", "error", "-c", WAITER, str(spool)],
            stdout=subprocess.PIPE,
            text=True,
        ) as waiter,
    ):
        assert waiter.stdout is not None
        pid = int(waiter.stdout.readline())
        for _ in range(3):
            until(polls(pid))
            writer.put(np.full(3, time.monotonic()))
            assert waiter.stdout.readline() == "got\n"
        late, lines, mode = json.loads(waiter.stdout.readline())
    assert waiter.returncode == 0
    assert max(late) < LATE
    assert mode == "polling"
    assert len([line for line in lines if "polling" in line]) == 1, lines


IDLE = """
import threading
idle = [SpoolReader(path) for _ in range(2)]
for reader in idle:
    try:
        reader.get(timeout=0.1)
    except Empty:
        pass
"""
WAIT = """
waiting = SpoolReader(path)
def get():
    global woken
    waiting.get(timeout=30)
    woken = time.monotonic()
thread = threading.Thread(target=get)
thread.start()
"""


def watched(pid: int, path: Path) -> list[Path]:
    """What a process has inotify report of the spool at `path`."""
    watches = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        for inode in re.findall(r"inotify wd:\w+ ino:(\w+)", Path(f"/proc/{pid}/fdinfo/{name}").read_text()):
            watches.add(int(inode, 16))
    return [place for place in path.rglob("*") if place.stat().st_ino in watches]


def test_overflow_of_the_queue_of_events_delays_nobody_by_more_than_a_second(spool: Path) -> None:
    """The queue is filled with what does not concern the one who waits, and so has no room for what does."""
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with SpoolWriter(spool) as writer, Peer(spool) as peer, contextlib.ExitStack() as ends:
        peer.run(IDLE)
        files = []
        for place in watched(peer.pid, spool):
            files += [place] if place.is_file() else [*place.iterdir(), place / "other"]
        assert len(files) > 1  # written to in turn, as equal events in a row are merged into one
        descriptors = []
        for file in files:
            if not file.exists():
                ends.callback(file.unlink)
            descriptors.append(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
            ends.callback(os.close, descriptors[-1])

        def strike(times: int) -> None:
            for step in range(times):
                fd = descriptors[step % len(descriptors)]
                os.pwrite(fd, os.pread(fd, 1, 0) or b"\0", 0)

        strike(len(descriptors))  # nobody is waiting now: this is passed on to nobody
        peer.run(WAIT)
        until_asleep(peer.pid, peer.ask("thread.native_id"))
        peer.stop()
        strike(most + 1000)
        put = time.monotonic()
        writer.put(np.zeros(3))
        peer.go()
        peer.run("thread.join()")
        assert peer.ask("woken") - put < LATE
        peer.run("for reader in (*idle, waiting): reader.close()")
