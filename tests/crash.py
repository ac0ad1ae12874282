"""The driver of the crash tests: a child does one change of a spool's state and meets a fault in it.

A scenario is a generator over a `Stage`: what it does before its `yield` prepares the spool, what comes after
is the change under test. The driver runs it in a forked, warm child and makes one fault happen at one place:

    kill     SIGKILL at a system call, which is then not executed (strace -p PID -e inject=...)
    error    a system call fails with a given error (strace again)
    store    SIGKILL before the Nth store to the index, where no system call tells
    signal   KeyboardInterrupt at the Nth place where Python can deliver a signal in the package's code

for every place of that kind, as a first run without a fault lists them. Calls are named as strace counts
them: `renameat#2` is the second call of renameat. As "before the next call" is "after this one", and the exit
of the child is the last call, every state that a crash can leave behind is seen. The child says what it does
in memory shared with the driver, without a system call; another process then holds the spool against that.

By hand, all places or some: `python tests/crash.py SCENARIO kill [rename#2]`.
"""

from __future__ import annotations

import contextlib
import copy
import dis
import functools
import gc
import json
import mmap
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from audit import audit
from filelock import lock_descriptor
from spoolipc.layout import Limits, item_name, item_number
from spoolipc.sink import DirectorySink, Durability
from spoolipc.source import DirectorySource
from spoolipc.tend import tend

import spoolipc
from spoolipc import BadItem, Empty, ShutDown, SpoolClosed, SpoolReader, SpoolWriter, index
from spoolipc import words as W
from spoolipc.engine import Delivery, Payload

Scenario = Callable[["Stage"], Iterator[None]]
SCENARIOS: dict[str, Scenario] = {}
ALONE: set[str] = set()
MODES = ("kill", "error", "store", "signal")
PACKAGE = os.path.dirname(spoolipc.__file__)
PLACE = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
WAITING_CALLS = "poll,restart_syscall"
"""Where the child waits for strace to attach: these calls are not counted."""
ERRORS = {
    "openat": "EIO ENOSPC EDQUOT EMFILE EACCES",
    "write": "EIO ENOSPC EDQUOT EINTR",
    "pread64": "EIO EINTR",
    "pwrite64": "EIO ENOSPC EDQUOT EINTR",
    "read": "EIO EINTR",
    "renameat": "EIO ENOSPC EDQUOT EACCES",
    "renameat2": "EIO ENOSPC EDQUOT EACCES",
    "rename": "EIO ENOSPC EDQUOT EACCES",
    "unlinkat": "EIO EACCES",
    "unlink": "EIO EACCES",
    "mkdirat": "EIO ENOSPC EDQUOT EACCES",
    "mkdir": "EIO ENOSPC EDQUOT EACCES",
    "fallocate": "EIO ENOSPC EDQUOT EINTR",
    "ftruncate": "EIO EACCES EINTR",
    "fsync": "EIO ENOSPC EDQUOT",
    "flock": "ENOLCK EINTR",
    "newfstatat": "EIO EACCES",
    "fstat": "EIO",
    "fstatfs": "EIO",
    "getdents64": "EIO",
    "lseek": "EIO",
    "fchmod": "EIO EACCES",
    "fchmodat": "EIO EACCES",
    "mmap": "ENOMEM EACCES",
}
"""The calls that may fail, and with what. Not close, whose descriptor the kernel frees in any case and strace
would not, nor fcntl, after whose failure fdopen leaves numpy's descriptor open."""
END_CALL = "getppid"
"""By this call the child marks where the change under test ends."""
PATIENCE = 15.0
"""Seconds after which a child counts as hung."""
MOST = 1.0
"""Seconds that no call may take after a crash."""


def arrays(value: int, kind: str) -> dict[str, Any]:
    """The arrays of the item `value`: "small", "large" (given out as a view) or "several"."""
    small, large = np.full(8, value, "i8"), np.full((100, 80), value, "f8")
    kinds: dict[str, dict[str, Any]] = {
        "small": {"": small},
        "large": {"": large},
        "several": {"a": small, "b": large},
    }
    return kinds[kind]


def value_of(payload: Payload) -> int:
    """Which item this is, having made sure that it is whole."""
    value = int(payload.arrays[0].flat[0])
    kind = "small" if payload.arrays[0].nbytes < 1000 else "large"
    expected = arrays(value, kind if payload.names is None else "several")
    assert len(expected) == len(payload.arrays)
    for array, wanted in zip(payload.arrays, expected.values(), strict=True):
        assert array.dtype == wanted.dtype
        assert array.shape == wanted.shape
        assert np.array_equal(array, wanted), f"item {value} is torn"
    return value


class Log:
    """Lines in memory shared with children: written without a system call, kept when the writer is killed."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1 << 18)

    def say(self, *words: object) -> None:
        line = " ".join(map(str, words)).replace("\n", "\v").encode() + b"\n"
        end = int.from_bytes(self._memory[:8], "little")
        self._memory[8 + end : 8 + end + len(line)] = line
        self._memory[:8] = (end + len(line)).to_bytes(8, "little")

    def lines(self) -> list[str]:
        end = int.from_bytes(self._memory[:8], "little")
        return [line.replace("\v", "\n") for line in self._memory[8 : 8 + end].decode().split("\n")[:-1]]

    def close(self) -> None:
        self._memory.close()


class Stage:
    """What a scenario acts with: every change goes into the log before ("?") and after ("!")."""

    def __init__(self, path: str, log: Log) -> None:
        self.path = path
        self.log = log
        self.writers: list[SpoolWriter] = []
        self.readers: list[SpoolReader] = []
        self.sources: list[DirectorySource] = []
        self.last = 0

    def writer(self, durability: Durability = "none", **limits: int) -> SpoolWriter:
        self.writers.append(SpoolWriter(self.path, durability=durability, **limits))  # type: ignore[arg-type]
        return self.writers[-1]

    def reader(self) -> SpoolReader:
        self.readers.append(SpoolReader(self.path))
        return self.readers[-1]

    def source(self) -> DirectorySource:
        self.sources.append(DirectorySource(self.path, Limits()))
        return self.sources[-1]

    def put(self, writer: SpoolWriter, kind: str = "small") -> None:
        self.last += 1
        given = arrays(self.last, kind)
        self.log.say("put?", self.last)
        seq = writer.put(given if kind == "several" else given[""], block=False)
        self.log.say("put!", self.last, seq)

    def get(self, reader: SpoolReader) -> Any:
        self.log.say("get?")
        try:
            got = reader.get_nowait()
        except Empty:
            self.log.say("empty!")
            return None
        payload = (
            Payload(tuple(got.values()), tuple(got), None)
            if isinstance(got, dict)
            else Payload((got,), None, None)
        )
        self.log.say("get!", value_of(payload))
        return got

    def claim(self, source: DirectorySource, lease: float | None = None) -> Delivery | None:
        self.log.say("claim?")
        try:
            (delivery,) = source.claim(1, lease)
        except Empty:
            self.log.say("empty!")
            return None
        self.log.say("claim!", delivery.seq, delivery.attempt)
        return delivery

    def ack(self, source: DirectorySource, delivery: Delivery) -> None:
        self.log.say("ack?", delivery.seq)
        source.ack([delivery])
        self.log.say("ack!", delivery.seq)

    def nack(self, source: DirectorySource, delivery: Delivery, delay: float = 0.0) -> None:
        source.nack(delivery, delay, "not now")
        if not delay:
            self.log.say("nack!", delivery.seq)

    def reject(self, source: DirectorySource, delivery: Delivery) -> None:
        self.log.say("reject?", delivery.seq)
        source.reject(delivery, "not wanted")
        self.log.say("reject!", delivery.seq)

    def shutdown(self, writer: SpoolWriter, immediate: bool) -> None:
        self.log.say("shutdown?", int(immediate))
        writer.shutdown(immediate)
        self.log.say("shutdown!", int(immediate))

    def spoil(self, value: int) -> None:
        """Damage the file of an item that waits."""
        os.truncate(os.path.join(self.path, "items", item_name(value)), 100)
        self.log.say("spoil", value)

    def elsewhere(self, act: Callable[[Stage], None]) -> None:
        """Let another process do something and die of it."""
        pid = os.fork()
        if not pid:
            try:
                stage = Stage(self.path, self.log)
                stage.last = self.last
                act(stage)
            except BaseException:
                self.log.say("broke", traceback.format_exc())
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)

    def go_on(self) -> None:
        """After a fault that did not kill: the same objects work."""
        for writer in self.writers:
            with contextlib.suppress(ShutDown, SpoolClosed):
                self.put(writer)
        with contextlib.suppress(ShutDown, SpoolClosed):
            for reader in self.readers:
                self.get(reader)
            for source in self.sources:
                delivery = self.claim(source)
                if delivery is not None:
                    with contextlib.suppress(BadItem):
                        value_of(source.load(delivery))
                        self.ack(source, delivery)

    def close(self) -> None:
        parties: list[Any] = [*self.writers, *self.readers, *self.sources]
        for party in parties:
            party.close()
        self.writers, self.readers, self.sources = [], [], []


def scenario(act: Scenario) -> Scenario:
    """Register a scenario under the name of its function."""
    SCENARIOS[act.__name__] = act
    return act


def repair(act: Scenario) -> Scenario:
    """A scenario that must be alone: anybody else who opens the spool would do its work."""
    ALONE.add(act.__name__)
    return scenario(act)


# What may have become of each item, read from the log


@dataclass
class Item:
    """fates: what may have become of it. tries: how often it may have been delivered. seq: 0 if not known.

    held: in somebody's hands when last heard of, and so perhaps not to be had.
    """

    fates: set[str]
    seq: int = 0
    tries: set[int] = field(default_factory=lambda: {0})
    spoiled: bool = False
    held: bool = False


class Account:
    """What the log allows: `items` by value, and whether the spool was shut down."""

    def __init__(self) -> None:
        self.items: dict[int, Item] = {}
        self.shut: set[str] = {"open"}
        self._before: dict[int, Item] = {}
        self._lenient = False  # what raised may have been done in part

    def _possible(self) -> list[int]:
        """The items that the next get may find: all up to the first that surely waits."""
        found = []
        for value in sorted(self.items, key=lambda value: (not self.items[value].seq, self.items[value].seq)):
            item = self.items[value]
            if "waiting" in item.fates and not item.spoiled and not item.held:
                found.append(value)
                if item.fates == {"waiting"}:
                    break
        return found

    def _delivered(self, value: int) -> Item:
        """This very item was delivered: those before it cannot wait any more."""
        self.items = self._before
        for earlier in self._possible():
            if earlier == value or self.items[value].held:
                break
            assert self.items[earlier].fates != {"waiting"}, f"{value} was delivered before {earlier}"
            self.items[earlier].fates -= {"waiting"}
        item = self.items[value]
        assert "waiting" in item.fates, f"{value} was delivered, after {item.fates}"
        return item

    def _value(self, seq: int) -> int:
        """The item of a sequence number; an unknown one is of a put that has not returned."""
        for value, item in self.items.items():
            if item.seq == seq:
                return value
        unknown = (v for v, item in self.items.items() if not item.seq and item.fates != {"absent"})
        value = next(unknown, 0)
        assert value, f"{seq} was never put"
        self.items[value].seq = seq
        return value

    def read(self, line: str) -> None:
        verb, *said = line.split()
        value = int(said[0]) if said and said[0].isdigit() else 0
        if verb in ("claim!", "ack?", "ack!", "nack!", "reject?", "reject!", "doomed"):
            value = self._value(value)
        if verb.endswith("?"):
            self._before = copy.deepcopy(self.items)
            self._lenient = verb in ("shutdown?", "drop?", "retry?")
        if verb == "put?":
            self._before[value] = Item({"absent"})
            self.items[value] = Item({"waiting", "absent"})
        elif verb == "put!":
            self.items[value] = Item({"waiting"}, int(said[1]))
        elif verb == "get?":
            for value in self._possible():
                self.items[value].fates.add("gone")
        elif verb == "get!":
            self._delivered(value).fates = {"gone"}
        elif verb == "claim?":
            for value in self._possible():
                self.items[value].tries |= {tried + 1 for tried in self.items[value].tries}
        elif verb == "claim!":
            item = self._delivered(value)
            assert int(said[1]) - 1 in item.tries, f"attempt {said[1]} of {value} after {item.tries}"
            item.fates, item.tries, item.held = {"waiting"}, {int(said[1])}, True
        elif verb == "nack!":
            self.items[value].held = False
        elif verb == "ack?":
            self.items[value].fates.add("gone")
        elif verb == "ack!":
            self.items[value].fates = {"gone"}
        elif verb == "reject?":
            self.items[value].fates.add("failed")
        elif verb in ("reject!", "doomed"):
            self.items[value].fates = {"failed"}
        elif verb == "retry?":
            item = self.items[value]
            item.seq, item.fates, item.tries, item.held = 0, item.fates | {"waiting"}, item.tries | {0}, False
        elif verb == "retry!":
            self.items[value] = Item({"waiting"}, int(said[1]))
        elif verb == "drop?":
            self.items[value].fates.add("gone")
        elif verb == "drop!":
            self.items[value].fates = {"gone"}
        elif verb == "spoil":
            self.items[value].spoiled = True
            self.items[value].fates = {"failed"}
        elif verb == "empty!":
            self.items = self._before
            for value in self._possible():
                assert self.items[value].fates != {"waiting"}, f"{value} waits, but the spool was empty"
                self.items[value].fates -= {"waiting"}
        elif verb == "shutdown?":
            if value:
                for item in self.items.values():
                    item.fates.add("gone")
            self.shut = {"open", "shut"}
        elif verb == "shutdown!":
            if value:
                for item in self.items.values():
                    item.fates -= {"waiting"}
            self.shut = {"shut"}
        elif verb == "raised" and "durable" in line:
            self.items[max(self.items)].fates = {"waiting"}
        elif verb == "raised" and not self._lenient:
            self.items = self._before
        elif verb == "broke":
            raise AssertionError(line)
        if verb.endswith("!") or verb in ("spoil", "doomed"):
            self._before = copy.deepcopy(self.items)


# What must hold after the fault


def verify(path: str, log: list[str], bystander: DirectorySource | None) -> None:
    """Hold the spool against the log, as another process that has it open already or opens it now."""
    account = Account()
    for line in log:
        account.read(line)
    if os.path.isdir(os.path.join(path, "items")):
        for name in sorted(os.listdir(os.path.join(path, "items"))):
            number = item_number(name)
            if number is None or not account.items[account._value(number)].spoiled:
                np.load(os.path.join(path, "items", name))
    source = bystander or promptly(DirectorySource, path, Limits())
    promptly(source.party.run, tend, force=True)
    audit(source.party, orphans=True)
    try:
        shut = check_shutdown(path, account)
        _check_items(source, account, path)
    finally:
        source.close()
    _check_it_works_on(path, shut, unwritten=any(line.startswith("injected") for line in log))


def promptly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Do a call and see that it did not wait."""
    begun = time.monotonic()
    try:
        return call(*args, **kwargs)
    finally:
        took = time.monotonic() - begun
        assert took < MOST, f"{call} took {took:.1f} s after a crash"


def check_shutdown(path: str, account: Account) -> bool:
    with SpoolWriter(path) as writer:
        try:
            writer._sink.admit(Payload((np.zeros(1),), None, None))
        except ShutDown:
            assert "shut" in account.shut
            return True
        assert "open" in account.shut
        return False


def _check_items(source: DirectorySource, account: Account, path: str) -> None:
    found: dict[int, str] = {}
    order = []
    while True:
        try:
            (delivery,) = promptly(source.claim, 1, None)
        except (Empty, ShutDown):
            break
        try:
            value = value_of(promptly(source.load, delivery))
        except BadItem:
            continue
        assert account.items[value].seq in (0, delivery.seq)
        assert value not in found, f"{value} was delivered twice"
        found[value] = "waiting"
        order.append(delivery.seq)
        tries = account.items[value].tries
        assert delivery.attempt - 1 in tries, f"attempt {delivery.attempt} of {value} after {tries}"
        promptly(source.ack, [delivery])
    assert order == sorted(order), f"delivered in the order {order}"
    for name in os.listdir(os.path.join(path, "failed")):
        number = item_number(name)
        if number is not None:
            value = account._value(number)
            assert value not in found, f"{value} was delivered and failed"
            found[value] = "failed"
    for value, item in account.items.items():
        fate = found.pop(value, "gone")
        allowed = item.fates | ({"gone"} if "absent" in item.fates else set())
        assert fate in allowed, f"{value} is {fate}, not one of {item.fates}"
    assert not found, f"{found} were never put"
    audit(source.party, orphans=True)


def _check_it_works_on(path: str, shut: bool, *, unwritten: bool) -> None:
    with promptly(SpoolWriter, path, reopen=shut) as writer, promptly(SpoolReader, path) as reader:
        for kind in ("small", "large"):
            promptly(writer.put, arrays(77, kind)[""], block=False)
            got = promptly(reader.get_nowait)
            assert value_of(Payload((got,), None, None)) == 77
            del got
        promptly(reader._source.qsize)
        audit(writer._sink.party, orphans=True)
        assert os.listdir(os.path.join(path, "tmp")) == []
        assert os.listdir(os.path.join(path, "items")) == []
    spoolipc.gc(path)
    assert os.listdir(os.path.join(path, "alive")) == []
    problems = spoolipc.fsck(path).problems
    if unwritten:  # a reason that could not be written is in the log
        problems = tuple(problem for problem in problems if "has no reason" not in problem.what)
    assert not problems, problems
    strangers = set(os.listdir(path)) - {
        *("spool.json", "index", "index.lock", "shutdown"),
        *("alive", "bell", "failed", "free", "items", "tmp"),
    }
    assert strangers <= {"index.new", "spool.json.new"}, strangers


# The faults


class Tripwire:
    """The index's words, with every store reported first."""

    def __init__(self, words: memoryview[int], store: Callable[[], None]) -> None:
        self._words = words
        self._store = store

    def __getitem__(self, at: Any) -> Any:
        return self._words[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        self._store()
        self._words[at] = value

    def __len__(self) -> int:
        return len(self._words)


def kill_at_store(count: int, log: Log) -> Callable[[], None]:
    """Be killed before the store of that number to any index, 0 for none; returns what ends that."""
    met = 0

    def store() -> None:
        nonlocal met
        met += 1
        if met == count:
            log.say("hit")
            os.kill(os.getpid(), signal.SIGKILL)

    def wire(self: Any) -> Tripwire:
        return Tripwire(self.__dict__["words"], store)

    def lay(self: Any, words: memoryview[int]) -> None:
        self.__dict__["words"] = words

    index.Index.words = property(wire, lay)  # type: ignore[assignment]
    return lambda: log.say("met", met)


DELIVERING = {
    dis.opmap[name] for name in ("RESUME", "CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD") if name in dis.opmap
}
"""After these instructions the interpreter looks for signals."""


def interrupt_at(count: int, log: Log) -> Callable[[], None]:
    """Raise KeyboardInterrupt at that one of the places where Python delivers signals, 0 for none.

    Returns what ends that.
    """
    met = 0
    before: dict[FrameType, int] = {}

    def step(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal met
        if event == "opcode":
            previous = before.get(frame)
            before[frame] = frame.f_code.co_code[frame.f_lasti]
            if previous in DELIVERING:
                met += 1
                if met == count:
                    log.say("hit", f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
                    raise KeyboardInterrupt
        elif event == "return":
            before.pop(frame, None)
        return step

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        before[frame] = dis.opmap["RESUME"]
        return step

    def end() -> None:
        sys.settrace(None)
        before.clear()
        log.say("met", met)

    sys.settrace(call)
    return end


# A run


@dataclass
class Outcome:
    """What became of one run.

    hit: whether the fault came to happen. met: the places that a run without a fault met.
    """

    hit: bool
    log: list[str]
    met: list[str]


def run(name: str, mode: str, place: str = "") -> Outcome:
    """Run a scenario with one fault in a child, and verify what it left; AssertionError says what is wrong.

    place: where, as `Outcome.met` of a run without a place lists them.
    """
    base = tempfile.mkdtemp(prefix="spoolipc-crash-", dir=PLACE)
    log = Log()
    try:
        return _Run(name, mode, place, base, log).outcome()
    except BaseException as failure:
        failure.add_note(f"{name} {mode} {place}: {json.dumps(log.lines(), indent=1)}")
        raise
    finally:
        log.close()
        shutil.rmtree(base, ignore_errors=True)


class _Run:
    def __init__(self, name: str, mode: str, place: str, base: str, log: Log) -> None:
        self.name, self.mode, self.place, self.log = name, mode, place, log
        self.path = os.path.join(base, "spool")
        self.trace = os.path.join(base, "strace")

    def outcome(self) -> Outcome:
        ready, tell_ready = os.pipe()
        go, tell_go = os.pipe()
        gc.collect()
        pid = os.fork()
        if not pid:
            os.close(ready)
            os.close(tell_go)
            self._child(tell_ready, go)
        os.close(tell_ready)
        os.close(go)
        bystander = None
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, ready)
                stack.callback(os.close, tell_go)
                if not os.read(ready, 1):
                    raise AssertionError("the scenario could not be prepared")
                alone = self.name in ALONE or zlib.crc32(self.place.encode()) % 2
                if not alone and os.path.exists(os.path.join(self.path, "spool.json")):
                    bystander = DirectorySource(self.path, Limits())
                if self.mode in ("kill", "error"):
                    stack.enter_context(self._attached(pid))
                os.write(tell_go, b"g")
                status = _wait(pid)
            hit, met = self._judge(status)  # says in the log what was injected
            lines = self.log.lines()
            if not (hit and self.mode in ("kill", "store")):
                assert status == 0, f"the child ended with {status}"
                assert "end" in lines
                assert "nameless" not in lines, "the error does not name the path"
            verify(self.path, lines, bystander)
            return Outcome(hit, lines, met)
        finally:
            if bystander is not None:
                bystander.close()

    def _judge(self, status: int) -> tuple[bool, list[str]]:
        """Whether the fault happened, and which places there were."""
        if self.mode in ("kill", "error"):
            calls = Path(self.trace).read_text(errors="replace").splitlines()
            injected = [line for line in calls if "(INJECTED)" in line]
            if injected:
                self.log.say("injected", injected[0])
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            return killed or bool(injected), [] if self.place else self._places(calls)
        lines = [line.split() for line in self.log.lines()]
        met = max([int(words[1]) for words in lines if words[0] == "met"], default=0)
        hit = any(words[0] == "hit" for words in lines)
        return hit, [str(count) for count in range(1, met + 1)]

    def _places(self, calls: list[str]) -> list[str]:
        """What a fault can be injected in: the system calls of a trace, numbered among those of the same name."""
        counts: dict[str, int] = {}
        places = []
        for line in calls:
            call = line.partition("(")[0]
            if call == END_CALL:
                break
            if call.isidentifier() and call not in WAITING_CALLS.split(","):
                counts[call] = counts.get(call, 0) + 1
                places.append(f"{call}#{counts[call]}")
        if self.mode == "kill":
            return [*places, "exit_group#1"]
        return [f"{place}={error}" for place in places for error in ERRORS[place.partition("#")[0]].split()]

    @contextlib.contextmanager
    def _attached(self, pid: int) -> Iterator[None]:
        """Have strace inject the fault in a process that waits in `poll`."""
        calls = ",".join(["?" + call for call in ERRORS] + [END_CALL])
        if self.mode == "kill":
            calls = f"!{WAITING_CALLS}"
        command = ["strace", "-o", self.trace, "-p", str(pid)]
        if self.place:
            call, count, error = re.fullmatch(r"(\w+)#(\d+)(?:=(\w+))?", self.place).groups()  # type: ignore[union-attr]
            fault = f"error={error}" if error else "signal=SIGKILL"
            command += ["-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={count}"]
        else:
            command += ["-e", f"trace={calls}"]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        with tracer, tracer.stderr:
            said = tracer.stderr.readline()
            if "attached" not in said:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise RuntimeError(f"strace: {said}{tracer.stderr.read()}")
            yield
            tracer.stderr.read()

    def _child(self, tell_ready: int, go: int) -> None:
        status = 1
        log = self.log
        try:
            sys.unraisablehook = lambda _: None
            before = _open_files()
            stage = Stage(self.path, log)
            steps = SCENARIOS[self.name](stage)
            next(steps)
            poll = select.poll()
            poll.register(go, select.POLLIN)
            gc.collect()
            os.write(tell_ready, b"r")
            poll.poll()
            disarm: Callable[[], None] = lambda: None  # noqa: E731
            if self.mode == "store":
                disarm = kill_at_store(int(self.place or 0), log)
            elif self.mode == "signal":
                disarm = interrupt_at(int(self.place or 0), log)
            try:
                for _ in steps:
                    pass
            except spoolipc.SpoolError as error:
                disarm()
                log.say("raised", type(error).__name__, error)
                log.say("named" if self.path in str(error) else "nameless")
                del error
            except KeyboardInterrupt:
                disarm()
                log.say("interrupted")
            disarm()
            del steps
            os.getppid()  # END_CALL
            if self.mode in ("error", "signal"):
                assert _lock_is_free(self.path), "the lock was kept"
                log.say("goes on")
                stage.go_on()
                stage.close()
                gc.collect()
                # A signal between a call that opens and the assignment of what it returns does lose that.
                leaked = 0 if self.mode == "signal" else _open_files() - before
                assert not leaked, f"{leaked} descriptors leaked"
            log.say("end")
            status = 0
        except BaseException:
            log.say("broke", traceback.format_exc())
        os._exit(status)


def _wait(pid: int) -> int:
    """The status of a child at its end."""
    fd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(PATIENCE * 1000):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError("the child hung")
    finally:
        os.close(fd)
    return os.waitpid(pid, 0)[1]


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _lock_is_free(path: str) -> bool:
    """Whether nobody holds the index lock, not even this process."""
    try:
        fd = os.open(os.path.join(path, "index.lock"), os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        return lock_descriptor(fd, blocking=False)
    finally:
        os.close(fd)


@dataclass
class Report:
    """Many runs of one scenario in one mode: how often the fault happened, how often the place was not met
    again, and what went wrong."""

    faults: int = 0
    missed: int = 0
    failures: list[str] = field(default_factory=list)


def run_all(name: str, mode: str, places: list[str]) -> Report:
    """Run a scenario once for each place; stops after some failures."""
    _warm()
    report = Report()
    for place in places:
        try:
            outcome = run(name, mode, place)
        except Exception as failure:
            report.failures.append("".join(traceback.format_exception(failure)))
            if len(report.failures) >= 5:
                break
        else:
            report.faults += outcome.hit
            report.missed += not outcome.hit
    return report


def places_of(name: str, mode: str) -> list[str]:
    """Where a scenario can meet a fault."""
    _warm()
    return run(name, mode).met


@functools.cache
def _warm() -> None:
    """Do what is done only once in a process, so that later runs meet the same places."""
    with tempfile.TemporaryDirectory(dir=PLACE) as base, SpoolWriter(os.path.join(base, "s"), maxsize=9) as w:
        w.put(arrays(1, "large")[""])
    run("open_new", "")
    gc.collect()
    gc.freeze()  # what is here now need not be looked at by every collection to come


class Crew:
    """Warm processes that run scenarios side by side."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool = ProcessPoolExecutor(size, get_context("spawn"))

    def run_all(self, name: str, mode: str) -> Report:
        """Run a scenario with the fault at every place."""
        places = self._pool.submit(places_of, name, mode).result()
        parts = [places[first :: self.size] for first in range(self.size)]
        total = Report()
        for future in [self._pool.submit(run_all, name, mode, part) for part in parts]:
            report = future.result()
            total.faults += report.faults
            total.missed += report.missed
            total.failures += report.failures
        return total

    def close(self) -> None:
        self._pool.shutdown()


# The scenarios: one for every change of state


@scenario
def put_small(stage: Stage) -> Iterator[None]:
    writer = stage.writer()
    stage.put(writer)
    yield
    stage.put(writer)
    stage.put(writer)


@scenario
def put_large(stage: Stage) -> Iterator[None]:
    writer = stage.writer()
    stage.put(writer)
    yield
    stage.put(writer, "large")


@scenario
def put_several(stage: Stage) -> Iterator[None]:
    writer = stage.writer()
    yield
    stage.put(writer, "several")


@scenario
def put_fsync(stage: Stage) -> Iterator[None]:
    writer = stage.writer("fsync")
    yield
    stage.put(writer)
    stage.put(writer, "large")


def consumed(stage: Stage, count: int) -> SpoolWriter:
    """A writer whose spool has `count` consumed files to be written again, and one item that waits."""
    writer, reader = stage.writer(), stage.reader()
    for _ in range(count):
        stage.put(writer, "large")
    for _ in range(count):
        stage.get(reader)
    stage.get(reader)
    reader.close()
    stage.readers.remove(reader)
    stage.put(writer)
    return writer


@scenario
def put_recycled(stage: Stage) -> Iterator[None]:
    writer = consumed(stage, 1)
    yield
    stage.put(writer, "large")


@scenario
def put_recycled_and_reserve(stage: Stage) -> Iterator[None]:
    writer = consumed(stage, 3)
    stage.put(writer, "large")
    yield
    stage.put(writer, "large")
    stage.put(writer, "several")


def steady(stage: Stage, kind: str) -> tuple[SpoolWriter, SpoolReader]:
    """A writer and a reader for whom every file has come round: both go the short way from now on."""
    writer, reader = stage.writer(), stage.reader()
    for _ in range(12):
        stage.put(writer, kind)
        stage.put(writer, kind)
        stage.get(reader)
        stage.get(reader)
    stock = writer._sink
    assert stock.plan is not None
    assert any(stock.maps.kept(spare.birth) for spare in stock.spares)
    return writer, reader


@scenario
def put_again_small(stage: Stage) -> Iterator[None]:
    writer, reader = steady(stage, "small")
    reader.close()
    stage.readers.remove(reader)
    yield
    stage.put(writer)
    stage.put(writer)


@scenario
def put_again_large(stage: Stage) -> Iterator[None]:
    writer, reader = steady(stage, "large")
    reader.close()
    stage.readers.remove(reader)
    yield
    stage.put(writer, "large")
    stage.put(writer, "large")


@scenario
def get_again_small(stage: Stage) -> Iterator[None]:
    writer, reader = steady(stage, "small")
    for _ in range(3):
        stage.put(writer)
    yield
    stage.get(reader)
    stage.get(reader)


@scenario
def get_again_large(stage: Stage) -> Iterator[None]:
    writer, reader = steady(stage, "large")
    stage.put(writer, "large")
    stage.put(writer, "large")
    yield
    view = stage.get(reader)
    del view  # pooled by the next get
    stage.get(reader)


@scenario
def receive_again(stage: Stage) -> Iterator[None]:
    writer, _ = steady(stage, "small")
    source = stage.source()
    for round_ in range(4):
        stage.put(writer)
        stage.put(writer)
        if round_ == 3:
            yield
        for _ in range(2):
            delivery = stage.claim(source)
            assert delivery is not None
            value_of(source.load(delivery))
            stage.ack(source, delivery)


@scenario
def receive_again_large(stage: Stage) -> Iterator[None]:
    writer, _ = steady(stage, "large")
    source = stage.source()
    for round_ in range(4):
        stage.put(writer, "large")
        stage.put(writer, "large")
        if round_ == 3:
            yield
        for _ in range(2):
            delivery = stage.claim(source)
            assert delivery is not None
            payload = source.load(delivery)
            value_of(payload)
            stage.ack(source, delivery)
            del payload, delivery


@scenario
def put_checksummed(stage: Stage) -> Iterator[None]:
    writer = SpoolWriter(stage.path, checksum=True)
    stage.writers.append(writer)
    yield
    stage.put(writer)
    stage.put(writer, "large")


@scenario
def make_files_ahead(stage: Stage) -> Iterator[None]:
    stage.put(stage.writer())
    yield
    stage.writers.append(SpoolWriter(stage.path, preallocate=(3, 64_000)))


@scenario
def get_verified(stage: Stage) -> Iterator[None]:
    writer, reader = stage.writer(), SpoolReader(stage.path, verify=True)
    stage.readers.append(reader)
    for _ in range(3):
        stage.put(writer, "large")
    stage.spoil(1)
    yield
    stage.log.say("claim?")
    stage.get(reader)


@scenario
def peek_at_a_damaged_one(stage: Stage) -> Iterator[None]:
    writer, source = stage.writer(), DirectorySource(stage.path, Limits())
    for _ in range(3):
        stage.put(writer, "large")
    stage.spoil(1)
    yield
    with contextlib.closing(source), contextlib.suppress(BadItem):
        source.contents(source.peek())


@scenario
def nack_for_the_last_time(stage: Stage) -> Iterator[None]:
    writer = stage.writer(max_attempts=1)
    stage.put(writer)
    stage.put(writer)
    source = stage.source()
    delivery = stage.claim(source)
    assert delivery is not None
    stage.log.say("doomed", delivery.seq)  # however it comes back
    yield
    source.nack(delivery, 0.0, "not now")


@scenario
def reopen(stage: Stage) -> Iterator[None]:
    writer = stage.writer()
    stage.put(writer)
    stage.shutdown(writer, False)
    writer.close()
    stage.writers.remove(writer)
    yield
    stage.log.say("shutdown?", 0)  # it may or may not be open now
    stage.writers.append(SpoolWriter(stage.path, reopen=True))


@scenario
def repair_by_fsck(stage: Stage) -> Iterator[None]:
    writer = stage.writer()
    for _ in range(3):
        stage.put(writer, "large")
    stage.spoil(1)
    yield
    spoolipc.fsck(stage.path, repair=True)


@scenario
def put_a_batch(stage: Stage) -> Iterator[None]:
    writer = stage.writer()
    stage.last = 3
    yield
    for value in (1, 2, 3):
        stage.log.say("put?", value)
    seqs = writer.put_many([arrays(value, "small")[""] for value in (1, 2, 3)], block=False)
    for value, seq in zip((1, 2, 3), seqs, strict=True):
        stage.log.say("put!", value, seq)


@scenario
def get_a_batch(stage: Stage) -> Iterator[None]:
    writer, reader = stage.writer(), stage.reader()
    for _ in range(4):
        stage.put(writer, "large")
    yield
    for _ in range(3):
        stage.log.say("get?")
    for array in reader.get_many(3, block=False):
        stage.log.say("get!", value_of(Payload((array,), None, None)))


@scenario
def lend_and_commit(stage: Stage) -> Iterator[None]:
    writer = consumed(stage, 1)
    yield
    for _ in range(2):
        stage.last += 1
        with writer.loan((100, 80), "f8", block=False) as array:
            array[...] = stage.last
            stage.log.say("put?", stage.last)
        stage.log.say("put!", stage.last, stage.last)
        del array


@scenario
def put_and_grow_the_index(stage: Stage) -> Iterator[None]:
    index.FIRST_RECORDS = 3
    writer = stage.writer()
    for _ in range(3):
        stage.put(writer)
    yield
    stage.put(writer)


@scenario
def get_small(stage: Stage) -> Iterator[None]:
    writer, reader = stage.writer(), stage.reader()
    for _ in range(3):
        stage.put(writer)
    yield
    stage.get(reader)
    stage.get(reader)


@scenario
def get_large(stage: Stage) -> Iterator[None]:
    writer, reader = stage.writer(), stage.reader()
    for _ in range(3):
        stage.put(writer, "large")
    yield
    view = stage.get(reader)
    stage.get(reader)
    del view


@scenario
def get_damaged(stage: Stage) -> Iterator[None]:
    writer, reader = stage.writer(), stage.reader()
    for _ in range(3):
        stage.put(writer, "large")
    stage.spoil(1)
    yield
    stage.get(reader)


@scenario
def let_go_of_views(stage: Stage) -> Iterator[None]:
    writer, reader = stage.writer(), stage.reader()
    for _ in range(3):
        stage.put(writer, "large")
    views = [stage.get(reader), stage.get(reader)]
    yield
    views.clear()
    stage.get(reader)
    stage.get(reader)


def claimed(
    stage: Stage, kind: str = "small", lease: float | None = None
) -> tuple[DirectorySource, Delivery]:
    """A reader with the first of three items in hand."""
    writer, source = stage.writer(), stage.source()
    for _ in range(3):
        stage.put(writer, kind)
    delivery = stage.claim(source, lease)
    assert delivery is not None
    return source, delivery


@scenario
def claim_and_load(stage: Stage) -> Iterator[None]:
    writer, source = stage.writer(), stage.source()
    for _ in range(3):
        stage.put(writer, "large")
    yield
    for _ in range(2):
        delivery = stage.claim(source)
        assert delivery is not None
        value_of(source.load(delivery))


@scenario
def claim_damaged(stage: Stage) -> Iterator[None]:
    source, delivery = claimed(stage, "large")
    stage.spoil(1)
    yield
    with contextlib.suppress(BadItem):
        source.load(delivery)


@scenario
def ack_unread(stage: Stage) -> Iterator[None]:
    source, delivery = claimed(stage)
    yield
    stage.ack(source, delivery)


@scenario
def ack_large(stage: Stage) -> Iterator[None]:
    source, delivery = claimed(stage, "large")
    value_of(source.load(delivery))
    yield
    stage.ack(source, delivery)


@scenario
def ack_while_looked_at(stage: Stage) -> Iterator[None]:
    source, delivery = claimed(stage, "large")
    payload = source.load(delivery)
    yield
    stage.ack(source, delivery)
    del payload


@scenario
def ack_redelivered(stage: Stage) -> Iterator[None]:
    source, delivery = claimed(stage)
    stage.nack(source, delivery)
    again = stage.claim(source)
    assert again is not None
    yield
    stage.ack(source, again)


@scenario
def nack(stage: Stage) -> Iterator[None]:
    source, delivery = claimed(stage)
    yield
    stage.nack(source, delivery)


@scenario
def nack_for_later(stage: Stage) -> Iterator[None]:
    source, delivery = claimed(stage)
    yield
    stage.nack(source, delivery, delay=1e-6)


@scenario
def reject(stage: Stage) -> Iterator[None]:
    source, delivery = claimed(stage)
    yield
    stage.reject(source, delivery)


def _with_a_dead_letter(stage: Stage) -> None:
    source, delivery = claimed(stage, "large")
    stage.reject(source, delivery)


@scenario
def retry_a_dead_letter(stage: Stage) -> Iterator[None]:
    _with_a_dead_letter(stage)
    yield
    stage.log.say("retry?", 1)
    done = spoolipc.failed_retry(stage.path)
    stage.log.say("retry!", 1, done.seqs[1])


@scenario
def drop_a_dead_letter(stage: Stage) -> Iterator[None]:
    _with_a_dead_letter(stage)
    yield
    stage.log.say("drop?", 1)
    spoolipc.failed_drop(stage.path)
    stage.log.say("drop!", 1)


@scenario
def receive_and_acknowledge(stage: Stage) -> Iterator[None]:
    writer, reader = stage.writer(), stage.reader()
    for _ in range(3):
        stage.put(writer, "large")
    yield
    for _ in range(2):
        stage.log.say("claim?")
        with reader.receive(block=False) as item:
            stage.log.say("claim!", item.seq, item.attempt)
            assert value_of(Payload((item.array,), None, None)) == item.seq
            stage.log.say("ack?", item.seq)
        stage.log.say("ack!", item.seq)
        del item


@scenario
def extend(stage: Stage) -> Iterator[None]:
    source, delivery = claimed(stage, lease=100.0)
    yield
    source.extend(delivery, 1e-6)


@repair
def lease_ends(stage: Stage) -> Iterator[None]:
    source, _ = claimed(stage, lease=1e-6)
    yield
    source.party.run(tend, force=True)


@scenario
def open_new(stage: Stage) -> Iterator[None]:
    yield
    writer = stage.writer(maxsize=100)
    stage.put(writer)


@scenario
def open_shared(stage: Stage) -> Iterator[None]:
    yield
    stage.writer(mode=0o770)


@scenario
def open_existing(stage: Stage) -> Iterator[None]:
    stage.put(stage.writer())
    yield
    stage.source()


@scenario
def open_and_decide_limits(stage: Stage) -> Iterator[None]:
    stage.put(stage.writer())
    yield
    stage.writer(maxsize=7, max_attempts=3)


@scenario
def close_writer(stage: Stage) -> Iterator[None]:
    writer = consumed(stage, 3)
    stage.put(writer, "large")
    yield
    writer.close()
    stage.writers.remove(writer)


@scenario
def close_reader(stage: Stage) -> Iterator[None]:
    source, _ = claimed(stage, "large")
    second = stage.claim(source)
    assert second is not None
    payload = source.load(second)
    stage.ack(source, second)
    yield
    source.close()
    stage.sources.remove(source)
    del payload


@scenario
def shutdown(stage: Stage) -> Iterator[None]:
    writer = stage.writer()
    for _ in range(2):
        stage.put(writer)
    yield
    stage.shutdown(writer, immediate=False)


@scenario
def shutdown_immediately(stage: Stage) -> Iterator[None]:
    writer = stage.writer()
    for _ in range(2):
        stage.put(writer)
    yield
    stage.shutdown(writer, immediate=True)


def _leave_much(stage: Stage) -> None:
    """Die with an item in hand, a file half written, one reserved and one looked at."""
    writer, source = stage.writer(), stage.source()
    stage.claim(source)
    second = stage.claim(source)
    assert second is not None
    payload = source.load(second)
    stage.ack(source, second)
    assert payload
    sink: DirectorySink = writer._sink
    sink.prepare(Payload((np.zeros(7000),), None, None))
    sink.prepare(Payload((np.zeros(100_000),), None, None))


@repair
def tend_the_dead(stage: Stage) -> Iterator[None]:
    writer = consumed(stage, 1)
    for _ in range(3):
        stage.put(writer, "large")
    stage.elsewhere(_leave_much)
    yield
    writer._sink.party.run(tend, force=True)


@repair
def collect_garbage(stage: Stage) -> Iterator[None]:
    writer = consumed(stage, 1)
    for _ in range(3):
        stage.put(writer, "large")
    stage.elsewhere(_leave_much)
    for name in (
        "free/00000000000000000900.npy",
        "failed/00000000000000000900.jsonl",
        "alive/00000000deadbeef",
    ):
        Path(stage.path, name).touch(mode=0o600)
    yield
    spoolipc.gc(stage.path)


def _die_after_the_rename(act: Callable[[Stage], object]) -> Callable[[Stage], None]:
    """Do something, and be killed between the move of a file and the stores that go with it."""

    def die(stage: Stage) -> None:
        rename = os.rename

        def killing(*names: Any, **directories: Any) -> None:
            rename(*names, **directories)
            os.kill(os.getpid(), signal.SIGKILL)

        os.rename = killing
        act(stage)

    return die


@repair
def finish_a_put_that_died(stage: Stage) -> Iterator[None]:
    writer = stage.writer()
    stage.put(writer)
    stage.elsewhere(_die_after_the_rename(lambda stage: stage.put(stage.writer())))
    stage.last = 2
    yield
    stage.put(writer)


@repair
def finish_a_get_that_died(stage: Stage) -> Iterator[None]:
    writer = stage.writer()
    for _ in range(3):
        stage.put(writer, "large")
    stage.elsewhere(_die_after_the_rename(lambda stage: stage.get(stage.reader())))
    yield
    stage.put(writer)


@repair
def tend_the_poisoned(stage: Stage) -> Iterator[None]:
    writer = stage.writer(max_attempts=1)
    for _ in range(3):
        stage.put(writer)

    def die(stage: Stage) -> None:
        delivery = stage.claim(stage.source())
        assert delivery is not None
        stage.log.say("doomed", delivery.seq)

    stage.elsewhere(die)
    yield
    writer._sink.party.run(tend, force=True)


def _with_items(stage: Stage) -> SpoolWriter:
    writer = consumed(stage, 2)
    for _ in range(3):
        stage.put(writer, "large")
    return writer


@repair
def rebuild_a_deleted_index(stage: Stage) -> Iterator[None]:
    writer = _with_items(stage)
    os.unlink(os.path.join(stage.path, "index"))
    yield
    stage.put(writer, "large")


@repair
def rebuild_a_zeroed_index(stage: Stage) -> Iterator[None]:
    writer = _with_items(stage)
    place = Path(stage.path, "index")
    with place.open("r+b") as file:
        file.write(bytes(place.stat().st_size))
    yield
    stage.put(writer, "large")


@scenario
def tend_a_pool_too_large(stage: Stage) -> Iterator[None]:
    """What a backlog left in the pool is unlinked by the tending."""
    writer = consumed(stage, 3)
    party = writer._sink.party
    yield
    party.index.words[W.RECYCLE_BYTES], party.index.words[W.PEAK_BYTES] = 1, 0
    party.run(tend, force=True)


@scenario
def unlink_for_space(stage: Stage) -> Iterator[None]:
    writer = consumed(stage, 3)
    yield
    from spoolipc.tend import evict

    from spoolipc import pool

    def evict_all(party: Any) -> None:
        while True:
            record, link = pool.any_pooled(party.index)
            if not record:
                return
            evict(party, record, link)

    writer._sink.party.run(evict_all)


def main(arguments: list[str]) -> int:
    name, mode, *places = arguments
    report = run_all(name, mode, places or places_of(name, mode))
    print(*report.failures, f"{report.faults} faults, {report.missed} missed", sep="\n")
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
