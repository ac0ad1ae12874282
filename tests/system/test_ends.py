"""However an interpreter ends, it ends: no error, no hang, no lock let go under a thread, no descriptor used again."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from support.account import check_spool

from spoolipc import Empty, SpoolReader, gc, stat

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


@pytest.mark.parametrize("when", ["late.append(look)", "last = Last()"], ids=["exit handler", "finalizer"])
def test_lock_is_kept_to_the_end_for_a_daemon_thread_within_a_step(spool: Path, when: str) -> None:
    program = """
inside = threading.Event()
apart = {"inside": inside, "wait": threading.Event().wait}
exec("def rename(*args, **kwargs): inside.set(); wait()", apart)  # keeps nothing of this module
writer, fs.rename = SpoolWriter(path), apart.pop("rename")
threading.Thread(target=writer.put, args=(array,), daemon=True).start()
inside.wait()
fd = os.open(path + "/items", os.O_RDONLY)
def look(write=os.write, lock=fs.lock, fd=fd):
    write(1, b"free" if lock(fd, blocking=False) else b"held")
class Last:
    def __del__(self, writer=writer, look=look):
        writer.close()
        look()
"""
    assert ended(spool, program + when) == "held"
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


HUNDREDS = """
import contextlib, itertools, signal, time
from spoolipc import LeaseExpired, SpoolClosed
path, log, count = sys.argv[1:]
fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def say(what, value):
    os.write(fd, f"{what} {value:.0f}\\n".encode())

def put(value):
    say("begun", value)
    writer.put(np.full(values_of[int(value) % 2], value))
    say("put", value)

def putting():
    for number in numbers:
        put(first + number)
        done["putting"] = number

def getting():
    for number in itertools.count(1):
        item = reader.receive()
        array = item.array
        assert (array == array[0]).all()
        say("seen", array[0])
        item.ack()
        say("acked", array[0])
        held[number % 7] = array
        done["getting"] = number

def working(work):
    with contextlib.suppress(SpoolClosed, LeaseExpired):  # some ends close both sides
        work()

def leave():
    reader.close()
    writer.close()

def leave_in_a_thread():
    thread = threading.Thread(target=lambda: (leave(), sys.exit(3)))
    thread.start()
    thread.join()

def die(by):
    os.kill(os.getpid(), by)
    time.sleep(60)

def hold():
    global lent, inside
    lent = writer.loan(5000)
    inside = reader.items()
    held[9] = next(inside)

ENDS = {
    "at the end of the program": lambda: None,
    "sys.exit": lambda: sys.exit(5),
    "os._exit": lambda: os._exit(6),
    "closed": leave,
    "closed in a thread": leave_in_a_thread,
    "closed by a handler": lambda: atexit.register(leave),
    "closed by the last handler": lambda: late.append(leave),
    "put by the last handler": lambda: late.append(lambda: put(first)),
    "with a loan and an iterator": hold,
    "killed": lambda: die(signal.SIGKILL),
    "terminated": lambda: die(signal.SIGTERM),
}
CODES = {"sys.exit": 5, "os._exit": 6, "killed": -9, "terminated": -15}
values_of = (3, 5000)
for number, how in zip(range(int(count)), itertools.cycle(ENDS)):
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == CODES.get(how, 0), (how, code)
        continue
    signal.alarm(60)
    first, numbers, held, done = 1e6 * (number + 1), itertools.count(1), {}, {}
    writer, reader = SpoolWriter(path, maxsize=20), SpoolReader(path)
    for work in (putting, getting) * 2:
        threading.Thread(target=working, args=(work,), daemon=True).start()
    while len(done) < 2:
        time.sleep(0.0002)
    ENDS[how]()
    break
"""


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_hundreds_of_exits_amid_the_work_of_daemon_threads_lose_and_double_nothing(spool: Path) -> None:
    """Each child falls out of the loop, and its interpreter ends as one does that was started for it."""
    SpoolReader(spool).close()
    log = spool.parent / "log"
    command = [sys.executable, "-c", START + HUNDREDS, str(spool), str(log), "220"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    said: dict[str, Counter[float]] = {}
    for line in log.read_text().splitlines():
        what, value = line.split()
        said.setdefault(what, Counter())[float(value)] += 1
    rest = Counter[float]()
    gc(spool)
    with SpoolReader(spool) as reader, suppress(Empty):
        while True:
            array = reader.get_nowait()
            assert (array == array[0]).all()
            rest[float(array[0])] += 1
    assert max((said["acked"] + rest).values()) == 1  # nothing that was acknowledged comes again
    assert set(said["put"]) <= set(said["seen"]) | set(rest)
    assert set(said["seen"]) | set(rest) <= set(said["begun"])
    check_spool(spool)
