"""Spawned processes that start together, and what each returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from typing import Any

from .pair import SPAWN

TIMEOUT = 300.0
Job = tuple[Callable[..., Any], tuple[Any, ...]]


class Crew:
    """Runs jobs in a process each. A job is called with `gate` first, and waits at it once, when it is ready.

    Raises RuntimeError in `results` when a job failed, TimeoutError when one says nothing.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._gate = SPAWN.Barrier(len(jobs))  # kept until the processes have opened it
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        for job, arguments in jobs:
            ours, theirs = SPAWN.Pipe(duplex=False)
            process = SPAWN.Process(target=_run, args=(theirs, self._gate, job, arguments), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def results(self, which: Sequence[int] | None = None) -> list[Any]:
        """What the jobs returned, of all or of those numbered, waiting for them."""
        pipes = [self._pipes[number] for number in which or range(len(self._pipes))]
        got: dict[Connection, Any] = {}
        while len(got) < len(pipes):
            ready = wait([pipe for pipe in self._pipes if pipe not in got and pipe in pipes], TIMEOUT)
            if not ready:
                raise TimeoutError(f"no result in {TIMEOUT:g} s")
            for pipe in self._pipes:
                if pipe in ready:
                    try:
                        done, value = pipe.recv()
                    except EOFError:
                        raise RuntimeError("a process ended early") from None
                    if not done:
                        raise RuntimeError(value)
                    got[pipe] = value
        return [got[pipe] for pipe in pipes]

    def close(self) -> None:
        """End what still runs."""
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()


def together(*jobs: Job) -> list[Any]:
    """Run jobs side by side, and return what each returned."""
    crew = Crew(jobs)
    try:
        return crew.results()
    finally:
        crew.close()


def _run(pipe: Connection, gate: Barrier, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send((True, job(gate, *arguments)))
    except Exception as error:
        gate.abort()
        pipe.send((False, f"{type(error).__name__}: {error}"))
