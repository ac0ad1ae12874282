"""Another process, which runs the lines of Python it is given."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_LOOP = """
import json, sys, time
import numpy as np
from spoolipc import *
from spoolipc import gc, stat
space = dict(globals(), path=sys.argv[1])
for line in sys.stdin:
    mode, code = json.loads(line)
    value = eval(code, space) if mode == "ask" else exec(code, space)
    print(json.dumps(value), flush=True)
"""


class Peer:
    """A process of its own that knows `path`, numpy as `np` and everything spoolipc exports. prefix: starts it."""

    def __init__(self, path: Path, *prefix: str) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-W", "error", "-c", _LOOP, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

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
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([mode, code]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """What came of the code begun last."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the peer died of an error, printed above"
        return json.loads(line)

    def kill(self) -> None:
        """End it as a crash does, and see it gone."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait(20)

    def stop(self) -> None:
        """Stop it, alive but hung; `go` lets it go on."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def go(self) -> None:
        """Let it go on after `stop`."""
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait(20)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
