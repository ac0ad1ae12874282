"""CPython's own tests of queues, with the class of the queue exchanged: `python cpython_queues.py METHOD` runs them.

METHOD: how processes are started. `docs/queue.md` lists what is left out, and why.
"""

from __future__ import annotations

import functools
import multiprocessing
import queue
import sys
import unittest
from typing import Any

import test._test_multiprocessing as between_processes
import test.test_queue as between_threads

import spoolipc

TestQueue: Any = between_processes._TestQueue
ProcessesMixin: Any = between_processes.ProcessesMixin
BaseQueueTestMixin: Any = between_threads.BaseQueueTestMixin


class BetweenProcesses(TestQueue, ProcessesMixin, unittest.TestCase):  # type: ignore[misc]
    """Of `multiprocessing`: `_TestQueue`."""

    Queue = staticmethod(functools.partial(spoolipc.Queue, allow_pickle=True))
    JoinableQueue = staticmethod(functools.partial(spoolipc.JoinableQueue, allow_pickle=True))


class Queue(spoolipc.JoinableQueue):
    """Bears the name that the tests know the order of."""

    def __init__(self, maxsize: int = 0) -> None:
        super().__init__(maxsize, allow_pickle=True)


class BetweenThreads(BaseQueueTestMixin, unittest.TestCase):  # type: ignore[misc]
    """Of `queue`: what holds for every queue there."""

    queue = queue
    type2test = Queue


LEFT_OUT = {
    BetweenProcesses: (
        "queue_feeder_donot_stop_onexc",
        "queue_feeder_on_queue_feeder_error",
        "timeout",
        "no_import_lock_contention",
        "closed_queue_empty_exceptions",
        "closed_queue_put_get_exceptions",
    ),
    BetweenThreads: (
        "negative_timeout_raises_exception",
        "shutdown_allowed_transitions",  # these from 3.13 on
        "shutdown_get_task_done_join",
        "shutdown_put_join",
        "shutdown_immediate_put_join",
    ),
}
for place, names in LEFT_OUT.items():
    for name in names:
        setattr(place, f"test_{name}", None)
del place


if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv.pop(1), force=True)
    unittest.main(verbosity=2)
