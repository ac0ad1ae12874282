"""An error says first what it is about, once, then what is the matter; and its traceback shows who called."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from support.damage import item

import spoolipc
from spoolipc import (
    BadItem,
    Empty,
    Full,
    LeaseExpired,
    LimitMismatch,
    LockTimeout,
    NoSuchItem,
    NotASpool,
    ShutDown,
    SpoolClosed,
    SpoolError,
    SpoolGone,
    SpoolInUse,
    SpoolReader,
    SpoolWriter,
    TooLarge,
    UnknownVersion,
)
from spoolipc.directory.doorbell import Doorbell
from spoolipc.directory.lock import IndexLock

SMALL = np.zeros(3)


class Spool:
    """A spool with a writer and a reader, in a directory or in memory."""

    def __init__(self, path: str, stack: ExitStack) -> None:
        self.path = path
        self.writer = stack.enter_context(SpoolWriter(path, maxsize=2, max_bytes=100_000))
        self.reader = stack.enter_context(SpoolReader(path))

    def put(self) -> None:
        self.writer.put(SMALL, block=False)


@pytest.fixture(params=["directory", "memory"])
def spool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Spool]:
    path = str(tmp_path / "spool") if request.param == "directory" else f"memory://{tmp_path}"
    with ExitStack() as stack:
        yield Spool(path, stack)


def full_of_items(spool: Spool) -> None:
    for _ in range(3):
        spool.put()


def full_of_bytes(spool: Spool) -> None:
    for _ in range(2):
        spool.writer.put(np.zeros(8000), block=False)


def empty(spool: Spool) -> None:
    spool.reader.get(timeout=0)


def nothing_to_receive(spool: Spool) -> None:
    spool.reader.receive(block=False)


def nothing_to_look_at(spool: Spool) -> None:
    spool.reader.peek(block=False)


def too_large(spool: Spool) -> None:
    spool.writer.put(np.zeros(100_000))


def put_after_the_end(spool: Spool) -> None:
    spool.writer.shutdown()
    spool.put()


def get_after_the_end(spool: Spool) -> None:
    spool.writer.shutdown()
    spool.reader.get()


def closed_writer(spool: Spool) -> None:
    spool.writer.close()
    spool.put()


def closed_reader(spool: Spool) -> None:
    spool.reader.close()
    spool.reader.get()


def other_limit(spool: Spool) -> None:
    SpoolReader(spool.path, maxsize=3)


def no_dead_letter(spool: Spool) -> None:
    spoolipc.failed_show(spool.path, 3)


def in_use(spool: Spool) -> None:
    SpoolWriter(spool.path, fresh=True)


def lost(spool: Spool) -> None:
    spool.put()
    received = spool.reader.receive()
    spool.reader.close()
    received.ack()


CASES: dict[Callable[[Spool], None], tuple[type[SpoolError], str]] = {
    full_of_items: (Full, "full: 2 items wait, maxsize=2"),
    full_of_bytes: (Full, r"full: \d+ bytes taken, max_bytes=100000, \d+ needed"),
    empty: (Empty, "no item waits"),
    nothing_to_receive: (Empty, "no item waits"),
    nothing_to_look_at: (Empty, "no item waits"),
    too_large: (TooLarge, r"an item of \d+ bytes can never fit: max_bytes is 100000.*"),
    put_after_the_end: (ShutDown, r"was shut down; SpoolWriter\(path, reopen=True\) opens it again.*"),
    get_after_the_end: (
        ShutDown,
        "was shut down and has no more items; a writer begins again with fresh=True",
    ),
    closed_writer: (SpoolClosed, "this writer was closed; open a new one"),
    closed_reader: (SpoolClosed, "this reader was closed; open a new one"),
    other_limit: (LimitMismatch, "has maxsize=2, not 3; leave maxsize out to take what is there.*"),
    no_dead_letter: (NoSuchItem, "has no dead letter 3; .*"),
    in_use: (SpoolInUse, "is in use: .*"),
    lost: (SpoolError, ".*"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_error_begins_with_the_path_and_says_which_limit_or_object(
    case: Callable[[Spool], None], spool: Spool
) -> None:
    kind, said = CASES[case]
    with pytest.raises(kind) as caught:
        case(spool)
    assert re.fullmatch(re.escape(spool.path) + ": " + said, str(caught.value))


def refuse_a_new_spool(path: Path) -> None:
    path.mkdir()
    (path / "notes").touch()
    SpoolReader(path)


def look_at_nothing(path: Path) -> None:
    spoolipc.stat(path)


def read_where_there_is_none(path: Path) -> None:
    SpoolReader(path, create=False)


def write_where_there_is_none(path: Path) -> None:
    path.mkdir()
    SpoolWriter(path, create=False)


def use_a_deleted_one(path: Path) -> None:
    with SpoolWriter(path) as writer:
        shutil.rmtree(path)
        writer.put(SMALL)


def read_a_damaged_item(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.put(SMALL)
        received = reader.receive()
        (path / item(1)).write_bytes(b"rubbish")
        received.array.sum()


def read_an_item_of_a_later_release(path: Path) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.put(SMALL)
        file = path / item(1)
        file.write_bytes(file.read_bytes().replace(b"SPOOLFTR\x02", b"SPOOLFTR\x09"))
        reader.get()


FILES: dict[Callable[[Path], None], tuple[type[SpoolError], str]] = {
    refuse_a_new_spool: (NotASpool, "is not empty .*"),
    look_at_nothing: (NotASpool, r"there is no spool here; SpoolWriter\(path\) makes one"),
    read_where_there_is_none: (NotASpool, r"there is no spool here; SpoolWriter\(path\) makes one"),
    write_where_there_is_none: (NotASpool, r"is not a spool: .*; SpoolWriter\(path\) makes one"),
    use_a_deleted_one: (SpoolGone, "the spool was deleted while in use; .*"),
    read_a_damaged_item: (BadItem, "item 1 is damaged, and now a dead letter: .*"),
    read_an_item_of_a_later_release: (UnknownVersion, ".* version 9.*"),
}


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.__name__)
def test_error_of_a_file_begins_with_the_path_and_not_with_a_number(
    case: Callable[[Path], None], tmp_path: Path
) -> None:
    kind, said = FILES[case]
    with pytest.raises(kind) as caught:
        case(tmp_path / "spool")
    assert re.fullmatch(re.escape(f"{tmp_path}/spool") + ": " + said, str(caught.value))


@pytest.mark.parametrize("case", [full_of_items, empty, nothing_to_receive, get_after_the_end])
def test_traceback_shows_the_caller_and_our_call_and_not_how_it_was_found_out(
    case: Callable[[Spool], None], tmp_path: Path
) -> None:
    with ExitStack() as stack, pytest.raises((Empty, Full, ShutDown)) as caught:
        case(Spool(str(tmp_path / "spool"), stack))
    package = Path(spoolipc.__file__).parent
    frames = [Path(frame.filename) for frame in traceback.extract_tb(caught.tb)]
    ours = [str(frame.relative_to(package)) for frame in frames if frame.is_relative_to(package)]
    assert ours in (["queue.py", "directory/session.py"], ["queue.py", "directory/consumer.py"])
    assert "During handling" not in "".join(traceback.format_exception(caught.value))


def test_lost_item_is_told_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    with SpoolWriter(path) as writer, SpoolReader(path, lease=0.01) as reader:
        writer.put(SMALL)
        received = reader.receive()
        SpoolReader(path).receive().ack()
        with pytest.raises(
            LeaseExpired, match=re.escape(f"{path}: item 1 is not in flight at this reader any more")
        ):
            received.ack()


def hold_the_lock(path: Path) -> int:
    """Take the index lock as another process would; close the descriptor to let go."""
    fd = os.open(path / "items", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


@pytest.mark.parametrize("call", [SpoolReader, spoolipc.gc, spoolipc.fsck], ids=lambda call: call.__name__)
def test_a_lock_that_is_not_let_go_of_is_that_of_a_spool_named_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[Path], object]
) -> None:
    spool = tmp_path / "spool"
    SpoolWriter(spool).close()
    take = IndexLock.take
    monkeypatch.setattr(IndexLock, "take", lambda lock, patience=0.0: take(lock, 0.0))
    fd = hold_the_lock(spool)
    try:
        with pytest.raises(LockTimeout, match=rf"^{re.escape(str(spool))}: the index lock was not free"):
            call(spool)
    finally:
        os.close(fd)


@pytest.mark.parametrize("call", ["get", "receive", "put"])
def test_what_interrupts_a_wait_is_not_said_to_be_about_an_empty_or_full_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with SpoolWriter(tmp_path / "spool", maxsize=1) as writer, SpoolReader(writer.path) as reader:
        if call == "put":
            writer.put(SMALL)
        calls: dict[str, Callable[[], object]] = {
            "get": reader.get,
            "receive": reader.receive,
            "put": lambda: writer.put(SMALL),
        }
        monkeypatch.setattr(Doorbell, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            calls[call]()
        assert caught.value.__context__ is None
