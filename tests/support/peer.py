"""Another process, which runs the lines of Python it is given."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

import spoolipc

FORKSERVER: Final = multiprocessing.get_context("forkserver")
"""Forks processes that have imported all that they may need, and have nothing else of the tests."""
FORKSERVER.set_forkserver_preload(["spoolipc." + name for name in "testing cli.main mp workers nats".split()])
_SERVE: Final = "import os, sys, support.peer as peer; peer.serve(int(sys.argv[1]), sys.argv[2], os.environ)"


def serve(asked: Connection | int, path: str, environment: Mapping[str, str]) -> None:
    """Run what is asked for until nobody can ask any more. asked: or its descriptor."""
    if isinstance(asked, int):
        asked = Connection(asked)
    os.environ.update(environment)
    warnings.simplefilter("error")
    space = {name: getattr(spoolipc, name) for name in dir(spoolipc)}
    space |= {"__name__": "__main__", "np": np, "path": path, "sys": sys, "time": time}
    while True:
        try:
            mode, code = json.loads(asked.recv_bytes())
        except EOFError:
            return
        value = eval(compile(code, "<asked>", "eval" if mode == "ask" else "exec"), space)
        asked.send_bytes(json.dumps(value).encode())


class Peer:
    """A process of its own that knows `path`, numpy as `np` and everything spoolipc exports. prefix: starts it."""

    def __init__(self, path: Path, *prefix: str) -> None:
        self._asked, asked = multiprocessing.Pipe()
        if prefix:
            command = [*prefix, sys.executable, "-c", _SERVE, str(asked.fileno()), str(path)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            self._process: Any = subprocess.Popen(command, pass_fds=[asked.fileno()], env=environment)
            self._wait: Callable[[float], object] = self._process.wait
        else:
            self._process = FORKSERVER.Process(target=serve, args=(asked, str(path), {**os.environ}))
            self._process.start()
            self._wait = self._process.join
        self.pid: int = self._process.pid
        asked.close()

    def run(self, code: str) -> None:
        """Run statements there."""
        self.start("run", code)
        self.answer()

    def ask(self, code: str) -> Any:
        """The value of an expression there, as JSON can say it."""
        self.start("ask", code)
        return self.answer()

    def start(self, mode: str, code: str) -> None:
        """Begin `run` or `ask` and do not wait for it: `answer` does."""
        self._asked.send_bytes(json.dumps([mode, code]).encode())

    def answer(self) -> Any:
        """What came of the code begun last."""
        try:
            return json.loads(self._asked.recv_bytes())
        except EOFError:
            raise AssertionError("the peer died of an error, printed above") from None

    def kill(self) -> None:
        """End it as a crash does, and see it gone."""
        self._process.kill()
        self._wait(20)

    def stop(self) -> None:
        """Stop it, alive but hung; `go` lets it go on."""
        os.kill(self.pid, signal.SIGSTOP)
        self.until_stopped()

    def until_stopped(self) -> None:
        """Wait until it has stopped, by itself or by `stop`."""
        deadline = time.monotonic() + 20
        tasks = list(Path(f"/proc/{self.pid}/task").iterdir())
        while any(" T " not in Path(task, "stat").read_text() for task in tasks):
            assert time.monotonic() < deadline, "it did not stop"
            os.sched_yield()

    def go(self) -> None:
        """Let it go on after `stop`."""
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._asked.close()
