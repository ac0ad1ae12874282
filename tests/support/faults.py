"""Faults at the engine's one door to the system, `spoolipc.directory.fs`: in this process, without root, at every call.

An `Injector` numbers what passes in its block: each call of a name in `fs.CALLS` and, where asked for, each store to
the words of a table. A hook sees each of them, and may kill the process, fail or interrupt the call, end a write half
way, let another session act, or take note of it.

What a crash after a call leaves is what one before the next event leaves: between two events the package changes
nothing outside its own process but the bytes of files that nobody sees yet.
"""

from __future__ import annotations

import ctypes
import dis
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple, Self

from spoolipc.directory import fs
from spoolipc.directory.journal import Journal

STORE: Final = "store"
PATIENCE: Final = 30
"""Seconds after which a child counts as hung."""


LOOKS: Final = frozenset(
    "close stat_at fstat statvfs read pread seek sync list_names scan map_file lock lock_shared unlock nearest"
    " read_text poll sleep yield_core watch_open watch_add replace".split()
)
"""The calls that change nothing that a process leaves behind; nor does an open that makes nothing."""


class Event(NamedTuple):
    """One call, or one store. number: from 1."""

    number: int
    name: str
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


def is_look(event: Event) -> bool:
    """Whether a call changes nothing that a process leaves behind."""
    return event.name in LOOKS or (event.name == "open_at" and not event.args[1] & os.O_CREAT)


Hook = Callable[[Event], object]
After = Callable[[Event, Any], object]


class Injector:
    """In its `with` block, `before` sees each event before it happens and `after` sees each call and its result.

    stores: number the stores to tables too. met: the names of the events so far.
    """

    def __init__(
        self, before: Hook = lambda _: None, after: After = lambda *_: None, *, stores: bool = False
    ) -> None:
        self.met: list[str] = []
        self._before, self._after, self._stores = before, after, stores
        self._real = {name: getattr(fs, name) for name in fs.CALLS}
        self._is_idle = True

    def __enter__(self) -> Self:
        for name, real in self._real.items():
            setattr(fs, name, self._wrapped(name, real))
        if self._stores:
            wires: dict[int, Any] = {}

            def wire(journal: Any) -> Any:
                words = journal.__dict__["words"]
                if words.readonly:
                    return words
                return wires.setdefault(id(words), tripwire(words, lambda: self._meet(STORE)))

            def lay(journal: Any, words: memoryview[int]) -> None:
                journal.__dict__["words"] = words

            setattr(Journal, "words", property(wire, lay))  # noqa: B010
        self._is_idle = False
        return self

    def __exit__(self, *_: object) -> None:
        self._is_idle = True  # a wrapper may live on, in a finalizer
        for name, real in self._real.items():
            setattr(fs, name, real)
        if self._stores:
            delattr(Journal, "words")

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self._is_idle:
                return real(*args, **options)
            event = self._meet(name, args, options)
            result = real(*args, **options)
            self._call(lambda: self._after(event, result))
            return result

        return call

    def _meet(self, name: str, args: tuple[Any, ...] = (), options: dict[str, Any] | None = None) -> Event:
        event = Event(len(self.met) + 1, name, args, options or {})
        if not self._is_idle:
            self.met.append(name)
            self._call(lambda: self._before(event))
        return event

    def _call(self, hook: Callable[[], object]) -> None:
        self._is_idle = True  # what a hook itself does is no event
        try:
            hook()
        finally:
            self._is_idle = False


def tripwire(words: memoryview[int], store: Callable[[], object]) -> Any:
    """A table's words as the package uses them, with `store` called before each store."""

    class Tripwire(ctypes.c_uint64 * len(words)):  # type: ignore[misc]  # its buffer is theirs, for numpy
        def __getitem__(self, at: Any) -> Any:
            return words[at]

        def __setitem__(self, at: Any, value: Any) -> None:
            store()
            words[at] = value

    return Tripwire.from_buffer(words)


# Hooks


def at(number: int, act: Hook) -> Hook:
    """Do `act` at the event of that number only."""
    return lambda event: act(event) if event.number == number else None


def kill(_: object = None) -> None:
    """End this process as a crash does."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(_: object = None, __: object = None) -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


def fail(error: int) -> Hook:
    """Fail a call as the kernel would."""

    def act(event: Event) -> None:
        named = [name for name in event.args[:1] if not isinstance(name, int) and event.name != "sync"]
        raise OSError(error, os.strerror(error), *(os.fspath(name) for name in named if _is_path(name)))

    return act


def _is_path(name: object) -> bool:
    return isinstance(name, (str, bytes, os.PathLike))


def partly(part: float, then: Hook) -> Hook:
    """Do a `write`, `pwrite` or `save` up to that part of its bytes, then `then`."""

    def act(event: Event) -> None:
        if event.name == "save":
            fs.save(*event.args, **event.options)
            fd = event.args[0]
            os.ftruncate(fd, int(os.fstat(fd).st_size * part))
        elif event.name in ("write", "pwrite"):
            fd, data, *place = event.args
            getattr(fs, event.name)(fd, bytes(data)[: int(len(data) * part)], *place)
        then(event)

    return act


# Processes


class Forked:
    """A forked child that does `work`."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(PATIENCE)
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def ended(self) -> int:
        """Wait for its end; returns 0, 1 where it raised, as it has printed, or the signal that ended it, negative."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def forked(work: Callable[[], object], meanwhile: Callable[[], object] = lambda: None) -> int:
    """Do `work` in a forked child, and `meanwhile` here; returns 0, or -SIGKILL where it was killed. Fails when it
    raised, or hung."""
    child = Forked(work)
    try:
        meanwhile()
    finally:
        ended = child.ended()
    assert ended in (0, -signal.SIGKILL), f"the child ended with {ended}"
    return ended


# Signals, wherever Python delivers them

_DELIVERING: Final = {
    dis.opmap[name] for name in ("RESUME", "CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD") if name in dis.opmap
}
"""After these instructions the interpreter looks for signals."""


@functools.cache
def _handlers(code: CodeType) -> list[tuple[int, int, int]]:
    entries = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]
    return [(entry.start, entry.end, entry.target) for entry in entries]


def _handler(code: CodeType, place: int) -> int:
    """Where an exception raised at that place of the code is handled: that of a signal, at the instruction before."""
    return next((target for start, end, target in _handlers(code) if start <= place < end), -1)


@functools.cache
def _begin(code: CodeType) -> int:
    """Where the instruction RESUME stands."""
    return next(place.offset for place in dis.get_instructions(code) if place.opname == "RESUME")


@contextmanager
def interrupted_at(
    number: int, package: str, act: Callable[[], object] = interrupt
) -> Iterator[Callable[[], int]]:
    """Do `act` at that one of the places where a signal can arrive in the package's code, 0 for none.

    Yields how many there were so far.
    """
    met = 0
    previous: dict[FrameType, int] = {}  # where in its code each frame was

    def step(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal met
        if event == "opcode":
            code, last = frame.f_code, previous.get(frame, 0)
            previous[frame] = frame.f_lasti
            if code.co_code[last] in _DELIVERING and _handler(code, last) == _handler(code, frame.f_lasti):
                met += 1
                if met == number:
                    act()
        elif event == "return":
            previous.pop(frame, None)
        return step

    def call(frame: FrameType, _: str, __: Any) -> Any:
        if not frame.f_code.co_filename.startswith(package):
            return None
        frame.f_trace_opcodes = True
        previous[frame] = _begin(frame.f_code)
        return step

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield lambda: met
    finally:
        sys.settrace(before)
