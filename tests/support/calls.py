"""A call made in a thread of its own, of which it can be known that it sleeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from support.waits import until

STILL = 0.02
"""Seconds without a single step after which a thread that is off the processor is said to sleep."""


class Call:
    """`call(*args)` begun in another thread."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self._future: Future[Any] = Future()
        self._thread = threading.Thread(target=self._run, args=(call, args), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            self._future.set_result(call(*args))
        except BaseException as error:
            self._future.set_exception(error)

    @property
    def done(self) -> bool:
        return self._future.done()

    def until_asleep(self) -> None:
        """Wait until the call waits for others and takes no step by itself. Fails when it ends instead."""
        self.until_asleep_or_done()
        assert not self.done, f"it did not wait: {self._future}"

    def until_asleep_or_done(self) -> None:
        until(lambda: self.done or self._sleeps())

    def _sleeps(self) -> bool:
        before = self._steps()
        time.sleep(STILL)
        return before == self._steps() and before[0].split()[1] == "S"

    def _steps(self) -> list[str]:
        """State and count of steps of the thread, as the kernel says; nothing of a thread that has ended."""
        try:
            said = Path(f"/proc/self/task/{self._thread.native_id}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return ["State: X"]
        return [line for line in said.splitlines() if line.startswith(("State", "voluntary_ctxt"))]

    def result(self) -> Any:
        return self._future.result(20)

    def error(self) -> BaseException | None:
        return self._future.exception(20)
