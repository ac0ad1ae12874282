"""What the processes of tests do with the queues they are given."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import Any, NamedTuple

import numpy as np

import spoolipc


class Point(NamedTuple):
    x: int
    y: Any


@dataclasses.dataclass
class Job:
    number: int
    frame: Any


def answer(tasks: Any, answers: Any) -> None:
    """Answer each array with its double, each other task with its repr, until None comes."""
    while (task := tasks.get(timeout=60)) is not None:
        answers.put(task * 2 if isinstance(task, np.ndarray) else repr(task))


def put_and_vanish(queue: Any, *items: Any) -> None:
    """Put, and end without any clean-up."""
    for item in items:
        queue.put(item)
    os._exit(0)


def be_killed(queue: Any) -> None:
    """Say that the queue is open here, and end as a crash does."""
    queue.put(os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)


_queue: Any = None


def initialize(queue: Any) -> None:
    """As the initializer of a pool: the queue is for all its tasks."""
    global _queue
    _queue = queue


def put_in_pool(number: int) -> int:
    _queue.put(np.full(1000, number))
    return number


def put_given(queue: Any, number: int) -> str:
    queue.put(number)
    return str(queue.path)


def start_and_leave(method: str, path: str) -> None:
    """Make a queue, hand it to a process and end at once; it puts what it got into the spool at `path`."""
    import multiprocessing

    queue = spoolipc.Queue()
    queue.put(np.full(5000, 7))
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=forward, args=(queue, path))
    process.start()
    queue.close()
    os._exit(0)


def forward(queue: Any, path: str) -> None:
    spoolipc.Queue(path=path).put((queue.get(timeout=60), queue.path))


class Unpicklable:
    """Is pickled, and not unpickled."""

    def __reduce__(self) -> Any:
        return refuse, ()


def refuse() -> None:
    raise LookupError("not here")
