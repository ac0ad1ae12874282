"""However an interpreter ends, it ends: no error, no hang, no lock let go under a thread, no descriptor used again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.account import check_spool

from spoolipc import SpoolReader, stat

START = """
import atexit, gc, os, sys, threading
late = []
atexit.register(lambda: [do() for do in late])  # the first registered is the last to run
import numpy as np
import spoolipc
from spoolipc import SpoolReader, SpoolWriter
from spoolipc.directory import fs
path = sys.argv[1]
array = np.zeros(5000)
"""


def ended(spool: Path, program: str) -> str:
    """What a program prints that begins with START and comes to its end without an error."""
    command = [sys.executable, "-W", "error", "-c", START + program, str(spool)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    SpoolReader(spool).close()  # as after any crash, the next to come finishes what a step left
    return done.stdout.strip()


def test_put_in_an_exit_handler_that_was_registered_first(spool: Path) -> None:
    ended(spool, "writer = SpoolWriter(path)\nlate.append(lambda: writer.put(array))")
    with SpoolReader(spool) as reader:
        assert (reader.get_nowait() == 0).all()


def test_lock_is_kept_to_the_end_for_a_daemon_thread_within_a_step(spool: Path) -> None:
    program = """
inside, real = threading.Event(), fs.rename
def rename(*args, **kwargs):
    inside.set()
    threading.Event().wait()
writer = SpoolWriter(path)
fs.rename = rename
threading.Thread(target=writer.put, args=(array,), daemon=True).start()
inside.wait()
fd = os.open(path + "/items", os.O_RDONLY)
late.append(lambda: print("free" if fs.lock(fd) else "held"))
"""
    assert ended(spool, program) == "held"
    check_spool(spool)


HOLDING = """
def arrays():
    with SpoolReader(path) as reader:
        yield from reader

def items():
    with SpoolReader(path) as reader:
        for item in reader.items():
            yield item.array

def lent():
    with SpoolWriter(path) as writer, writer.loan(5000) as array:
        yield array

def received():
    with SpoolReader(path) as reader, reader.receive() as item:
        yield item.array

class Closing:
    def __init__(self):
        self.reader, self.me = SpoolReader(path), self
        self.array = self.reader.get()
    def __del__(self):
        self.reader.close()

def closing():
    yield Closing()

with SpoolWriter(path) as writer:
    for _ in range(3):
        writer.put(array)
"""
HOLDERS = ["arrays", "items", "lent", "received", "closing"]


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_generator_that_holds_a_session_at_the_end(spool: Path, holder: str) -> None:
    ended(spool, f"{HOLDING}\nheld = {holder}()\nfirst = next(held)")
    check_spool(spool)


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_session_found_in_garbage_uses_no_descriptor_that_was_closed(spool: Path, holder: str) -> None:
    """The numbers are given out again at once, as the test of each call sees."""
    program = f"""{HOLDING}
gc.disable()
held = {holder}()
box = [held, next(held)]
box.append(box)
real = fs.close
def close(fd):
    real(fd)
    os.open(os.devnull, os.O_RDONLY)
fs.close = close
def checked(real):
    def call(fd, *args, **kwargs):
        assert os.readlink(f"/proc/self/fd/{{fd}}") != os.devnull, "a number used again"
        return real(fd, *args, **kwargs)
    return call
for name in ("lock", "unlock", "fstat", "statvfs"):
    setattr(fs, name, checked(getattr(fs, name)))
del held, box
gc.collect()
fs.close = real
"""
    ended(spool, program)
    check_spool(spool)


def test_everything_but_close_raises_SpoolClosed_at_the_end(spool: Path) -> None:
    program = """
class Last:
    def __del__(self, writer=SpoolWriter(path), reader=SpoolReader(path), write=os.write):
        for act in (lambda: writer.put(array), reader.get, reader.receive, writer.shutdown):
            try:
                act()
            except ValueError as error:
                write(1, type(error).__name__.encode() + b" ")
        reader.close()
        writer.close()
last = Last()
"""
    assert ended(spool, program) == "SpoolClosed " * 3 + "SpoolClosed"


def test_a_thread_that_stopped_for_good_within_a_step_hangs_nobody_at_the_end(spool: Path) -> None:
    program = f"""{HOLDING}
inside, real = threading.Event(), fs.rename
def rename(*args, **kwargs):
    inside.set()
    threading.Event().wait()
held = lent()
first = next(held)
writer = held.gi_frame.f_locals["writer"]
fs.rename = rename
threading.Thread(target=writer.put, args=(array,), daemon=True).start()
inside.wait()
fs.rename = real
"""
    ended(spool, program)
    assert stat(spool).depth == 3
