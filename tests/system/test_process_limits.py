"""What a process may have at most, descriptors and address space, is the program's: a session takes little of it,
closes all it had, and what it keeps for speed gives way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[[str], None]
BEGIN = """
import errno, gc, os, resource, sys
from pathlib import Path
import numpy as np
from spoolipc import Empty, LimitMismatch, SpoolReader, SpoolWriter, StorageError

def limit(kind, most):
    resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))

def fill(path, count, nbytes):
    with SpoolWriter(path) as writer:
        for number in range(count):
            writer.put(np.full(nbytes // 8, number, "f8"))
    return path

def descriptors():
    return len(os.listdir("/proc/self/fd")) - 1

def mapped():
    return sum(base in line and ".npy" in line for line in Path("/proc/self/maps").read_text().splitlines())

def address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")

base = sys.argv[1]
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a program in a process of its own, whose limits it may lower. `base` is a directory of its own."""

    def run(program: str) -> None:
        (tmp_path / "base").mkdir()
        command = [sys.executable, "-W", "error", "-c", BEGIN + program, str(tmp_path / "base")]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert ran.returncode == 0, ran.stdout + ran.stderr

    return run


def test_a_reader_with_64_descriptors_gets_100_arrays_and_holds_them(run: Run) -> None:
    run("""
fill(f"{base}/spool", 100, 32 << 10)
limit(resource.RLIMIT_NOFILE, 64)
with SpoolReader(f"{base}/spool") as reader:
    before = descriptors()
    held = [reader.get_nowait() for _ in range(100)]
    assert descriptors() == before
    assert [int(array[-1]) for array in held] == list(range(100))
""")


def test_a_process_reads_a_backlog_of_many_spools_with_1024_descriptors(run: Run) -> None:
    run("""
paths = [fill(f"{base}/{number}", 150, 20 << 10) for number in range(10)]
limit(resource.RLIMIT_NOFILE, 1024)
readers = [SpoolReader(path) for path in paths]
for reader in readers:
    for number in range(150):
        assert (reader.get_nowait() == number).all()
assert 700 <= mapped() <= 1024, "bounded for all together"
""")


def test_thousands_of_arrays_are_held_and_64_spools_open_with_1024_descriptors(run: Run) -> None:
    run("""
limit(resource.RLIMIT_NOFILE, 1024)
readers = [SpoolReader(f"{base}/{number}") for number in range(64)]
held = []
for reader in readers:
    with SpoolWriter(reader.path) as writer:
        writer.put_many([np.full(2100, len(held) + number, "f8") for number in range(40)])
        held += reader.get_many(40)
assert len(held) == 2560
assert all(array[0] == array[-1] == number for number, array in enumerate(held))
""")


@pytest.mark.parametrize("copy", [False, True])
def test_kept_mappings_leave_address_space_to_the_program(run: Run, copy: bool) -> None:
    """Of a backlog larger than the limit each array comes through, and the program has room for its own."""
    run(f"""
size = 8 << 20
fill(f"{{base}}/spool", 24, size)
with SpoolReader(f"{{base}}/spool") as reader:
    limit(resource.RLIMIT_AS, address_space() + 15 * size)
    for number in range(24):
        assert reader.get_nowait(copy={copy})[-1] == number
        np.empty(size, "u1")[:] = 1
    assert mapped() > 2
""")


def test_kept_mappings_go_where_another_cannot_be_made(run: Run) -> None:
    """Those of another spool too, and for whatever is to be mapped: an item, an index, a loan."""
    run("""
size = 2 << 20
fill(f"{base}/spool", 24, size)
fill(f"{base}/other", 4, size)
def tight():  # mappings kept, and hardly any address space left
    limit(resource.RLIMIT_AS, most)
    for _ in range(6):
        reader.get_nowait()
    assert mapped() >= 6
    limit(resource.RLIMIT_AS, address_space() + (1 << 20))

most = resource.getrlimit(resource.RLIMIT_AS)[0]
with SpoolReader(f"{base}/spool") as reader, SpoolReader(f"{base}/other") as other:
    tight()
    assert (other.get_nowait() == 0).all()
    with other.receive() as item:
        tight()
        assert (item.array == 1).all()
    tight()
    with SpoolReader(f"{base}/new") as new:
        pass
    writer = SpoolWriter(f"{base}/other")
    tight()
    with writer.loan(size, "u1") as array:
        array[:] = 7
    held = []
    try:
        while True:
            held.append(other.get_nowait())
    except Empty:
        assert (held[-1] == 7).all()
    writer.put_many([np.zeros(size, "u1")] * 2)
    held.append(other.get_nowait())
    limit(resource.RLIMIT_AS, address_space() + (1 << 20))
    try:
        other.get_nowait()
    except StorageError as error:
        assert error.errno == errno.ENOMEM and "ulimit -v" in str(error), error
    held.clear()
    assert (other.get_nowait() == 0).all()
""")


@pytest.mark.parametrize("face", ["SpoolReader", "SpoolWriter"])
def test_a_session_costs_at_most_8_descriptors_and_none_once_closed(run: Run, face: str) -> None:
    """Nor does a collection have to come first, or an open that fails leave one."""
    run(f"""
gc.disable()
fill(f"{{base}}/spool", 3, 32 << 10)
SpoolReader(f"{{base}}/spool", maxsize=6).close()
before = descriptors()
sessions = [{face}(f"{{base}}/spool") for _ in range(4)]
assert descriptors() - before <= 4 * 8
for session in sessions:
    session.qsize()
    session.close()
with SpoolReader(f"{{base}}/spool") as reader:
    held = reader.get()
assert descriptors() == before
sessions = [{face}(f"{{base}}/spool") for _ in range(4)]
del session, sessions
assert descriptors() == before, "dropped without a close"
try:
    {face}(f"{{base}}/spool", maxsize=7)
except LimitMismatch:
    pass
assert descriptors() == before
""")


def test_an_open_that_finds_no_descriptor_left_says_so_and_leaks_none(run: Run) -> None:
    run("""
gc.disable()
fill(f"{base}/spool", 1, 32 << 10)
before = descriptors()
failed = []
for more in range(12):
    limit(resource.RLIMIT_NOFILE, before + more)
    try:
        SpoolReader(f"{base}/spool").close()
    except StorageError as error:
        assert (error.errno, error.filename[:len(base)]) == (errno.EMFILE, base), error
        assert "ulimit -n" in str(error)
        failed.append(error)  # and with it whatever was made
    limit(resource.RLIMIT_NOFILE, 1000)
    assert descriptors() == before, more
assert 8 <= len(failed) < 12
""")


def test_a_session_that_found_no_descriptor_left_goes_on_when_there_is_one(run: Run) -> None:
    run("""
path = fill(f"{base}/spool", 6, 32 << 10)
small = np.arange(5)
def refused(call):
    taken = []
    try:
        while True:
            taken.append(os.open("/", os.O_RDONLY))
    except OSError:
        pass
    try:
        return call()
    except StorageError as error:
        assert error.errno == errno.EMFILE
    finally:
        for fd in taken:
            os.close(fd)

with SpoolReader(path) as reader, SpoolWriter(path) as writer:
    limit(resource.RLIMIT_NOFILE, 64)
    for number in range(6):
        for _ in range(2):
            refused(reader.get_nowait) is None or sys.exit("it was got")
        with reader.receive(block=False) as item:
            refused(lambda: item.array) is None or sys.exit("it was loaded")
            assert (item.array == number).all()
    try:
        refused(lambda: reader.get(timeout=0.05))
    except Empty:
        pass
    for array in (small, np.zeros(9000)) * 2:
        refused(lambda: writer.put(array))
        assert writer.put(array)
        while not (reader.get() == array).all():
            pass
    refused(writer.close)
    SpoolWriter(path).close()  # which finds what could not be left
    assert len(os.listdir(f"{path}/alive")) == 1, "only the reader's is left"
    closed = []
    refused(lambda: closed.append(reader.close()))
    assert closed, "a reader needs none to leave"
""")


def test_a_put_larger_than_files_may_be_says_which_limit_and_the_writer_goes_on(run: Run) -> None:
    run("""
with SpoolWriter(f"{base}/spool") as writer, SpoolReader(f"{base}/spool") as reader:
    limit(resource.RLIMIT_FSIZE, 1 << 20)
    for put in (writer.put, lambda array: writer.loan(array.shape, array.dtype)):
        try:
            put(np.zeros(2 << 20, "u1"))
        except StorageError as error:
            assert error.errno == errno.EFBIG and "ulimit -f" in str(error), error
        else:
            raise AssertionError
    writer.put(np.ones(1000))
    assert len(reader.get_nowait()) == 1000 and not os.listdir(f"{base}/spool/tmp")
""")
