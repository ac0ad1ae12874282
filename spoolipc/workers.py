"""imap: a function over a stream of large arrays, in several processes.

The items go to the workers through one temporary spool and their results come back through another. An item stays in
flight at its worker until its result is in the spool, so that a worker that dies costs nothing but the time: another
does the item again, and a result that comes twice is dropped.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Semaphore
from typing import Any, Final, Generic, Self, TypeVar

from tqdm import tqdm

from .connect import connect
from .errors import Empty, Full, SpoolClosed, TooLarge, UnsupportedItem, WorkerDied
from .format.values import Values
from .message import Ack, flag, whole
from .mp import Queue

T = TypeVar("T")
R = TypeVar("R")
_GLANCE: Final = 0.5
"""Seconds between two looks at whether the workers, or their parent, are still there."""
_AHEAD: Final = 2
"""Items under way for each worker: the one it works on, and the next."""
_PATIENCE: Final = 10.0
"""Seconds for which all may wait for room: longer than it takes the sessions of a spool to give way to one another."""
_MOST_DEATHS: Final = 5
"""Workers that may die one after another, each in the place of the last, with nothing done."""


def imap(
    function: Callable[[T], R],
    arrays: Iterable[T],
    processes: int | None = None,
    ordered: bool = True,
    progress: bool = False,
    *,
    types: Iterable[type] = (),
    allow_pickle: bool = False,
) -> Results[T, R]:
    """Apply a function to every item, in worker processes; like `multiprocessing.Pool.imap`, for large arrays.

    function: called in the workers; with the start methods spawn and forkserver it is pickled, as for a Pool. Arrays
    come to it as read-only views.
    arrays: arrays, or whatever `spoolipc.Queue` takes. It is read as results are taken, two items a worker ahead, so
    that a stream without end is worked on in bounded memory. These items, and a result of each worker, must have room
    where temporary spools lie (see `Queue`): where they have not, fewer are read ahead, and where nothing can go on,
    Full is raised.
    processes: how many workers; None for as many as there are cores for this process. They are daemons, which have no
    workers of their own, and leave Ctrl-C to their parent.
    ordered: give results in the order of the items, and not as they come.
    progress: draw a bar.
    types, allow_pickle: what else items and results may be, as for `Queue`.

    Returns an iterator over the results, arrays as read-only views; threads may share it. What the function raises is
    raised in the place of its result, with the traceback as its cause and the item's number in a note, and iteration
    can go on; so is what stands in the way of an item or a result, UnsupportedItem or TooLarge. StopIteration is raised
    as RuntimeError, as it would end a loop. What `arrays` raises comes after all results of the items before. A worker
    that dies is replaced and its item done again; WorkerDied is raised in the place of an item whose workers died five
    times. Workers and spools go when the iterator ends, is closed or is left, and with the process.
    """
    if not callable(function):
        raise TypeError(f"function must be callable, not {function!r}")
    count = len(os.sched_getaffinity(0)) if processes is None else whole("processes", processes, 1)
    is_ordered, is_shown = flag("ordered", ordered), flag("progress", progress)
    kinds = (*Values(types).types, UnsupportedItem, TooLarge)
    queues = tuple(Queue(types=kinds, allow_pickle=flag("allow_pickle", allow_pickle)) for _ in range(2))
    return Results(function, arrays, count, is_ordered, is_shown, *queues)


class Results(Generic[T, R], Iterator[R]):
    """What `imap` returns: an iterator over results, and a context manager that closes it."""

    def __init__(
        self,
        function: Callable[[T], R],
        arrays: Iterable[T],
        count: int,
        ordered: bool,
        progress: bool,
        tasks: Queue,
        results: Queue,
    ) -> None:
        self._function, self._arrays = function, iter(arrays)
        self._ordered, self._window = ordered, count * _AHEAD
        self._fed, self._given, self._deaths = 0, 0, 0
        self._is_fed = self._have_died = False
        self._unfed: list[T] = []  # the next item, when there is no room for it
        self._broken: Exception | None = None  # what the items' source raised
        self._waiting: dict[int, int] = {}  # by the number of an item, that of its task
        self._tasks_put = 0
        self._answers: dict[int, tuple[bool, Any]] = {}
        self._turn = threading.Lock()
        self._look_at = time.monotonic() + _GLANCE
        self._stuck_since = 0.0  # monotonic seconds, 0 when something was fed or came since
        total = len(arrays) if isinstance(arrays, Sized) else None
        self._bar = tqdm(total=total, unit="item", disable=not progress)
        self._tasks, self._results = tasks, results
        self._workers: list[BaseProcess] = []
        self._lacking: list[Semaphore] = []  # of each worker, 1 while it waits for room for a result
        self._end = weakref.finalize(
            self, _stop, os.getpid(), self._workers, (self._tasks, self._results), self._bar
        )
        try:
            for _ in range(count):
                self._lacking.append(multiprocessing.Semaphore(0))
                self._workers.append(self._started(self._lacking[-1]))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers and remove the spools; results that were given out stay valid. Harmless when repeated."""
        self._end()

    def __next__(self) -> R:
        with self._turn:
            try:
                number = self._next()
            except BaseException as error:
                was_closed = not self._end.alive and isinstance(error, SpoolClosed)
                self.close()
                if was_closed:  # by another thread
                    raise StopIteration from None
                raise
            if number is None:
                self.close()
                broken, self._broken = self._broken, None
                raise broken or StopIteration
            is_result, found = self._answers.pop(number)
            self._given += 1
            self._bar.update()
        if is_result:
            return found  # type: ignore[no-any-return]
        if isinstance(found, StopIteration):
            raise RuntimeError(f"the function raised StopIteration for item {number} of imap") from found
        found.add_note(f"raised for item {number} of imap")
        raise found

    def _next(self) -> int | None:
        """The number of the item whose answer is to be given, None when all were."""
        while self._end.alive:
            if self._ordered and self._given in self._answers:
                return self._given
            if self._answers and not self._ordered:
                return min(self._answers)
            is_full = self._fed - self._given >= self._window
            if not self._is_fed and not is_full:
                self._feed()
            elif self._given == self._fed:
                return None
            self._collect(_GLANCE if is_full or self._is_fed or self._unfed else 0.0)
        return None

    def _feed(self) -> None:
        try:
            item = self._unfed.pop() if self._unfed else next(self._arrays)
        except StopIteration:
            self._is_fed = True
            return
        except Exception as error:
            self._is_fed, self._broken = True, error
            return
        number = self._fed
        try:
            self._tasks.put((item, number), block=False)
        except Full:
            self._unfed.append(item)
            return
        except (UnsupportedItem, TooLarge) as error:
            self._answers[number] = False, _told(error, "item")
        else:
            self._tasks_put += 1  # the number that the queue gives to what is put
            self._waiting[number] = self._tasks_put
        self._fed += 1
        self._stuck_since = 0.0

    def _answer(self, number: int, is_result: bool, found: Any) -> None:
        if self._waiting.pop(
            number, 0
        ):  # else its worker died after it had said so, and another did it again
            self._answers[number] = is_result, found

    def _collect(self, seconds: float) -> None:
        with suppress(Empty):
            found, number, is_result = self._results.get(timeout=seconds)
            self._stuck_since = 0.0
            if number < 0:
                self._deaths = 0  # a worker has begun
            else:
                self._answer(number, is_result, found)
        if time.monotonic() >= self._look_at:
            self._replace()
            self._see_room()
            self._look_at = time.monotonic() + _GLANCE

    def _replace(self) -> None:
        """Start a worker for each that died, and give up the items that end every worker."""
        for place, worker in enumerate(self._workers):
            if worker.exitcode is None:
                continue
            self._have_died = True
            self._deaths += 1
            if self._deaths > _MOST_DEATHS * len(self._workers):
                what = f"the workers end before they begin, with exit code {worker.exitcode}"
                raise WorkerDied(f'{what}; does the program start them under if __name__ == "__main__"?')
            worker.close()
            self._lacking[place] = multiprocessing.Semaphore(0)
            self._workers[place] = self._started(self._lacking[place])
        if not self._have_died:
            return
        for letter in connect(self._tasks.path).admin().failed_list():
            for number in [number for number, seq in self._waiting.items() if seq == letter.seq]:
                self._answer(number, False, WorkerDied(f"its workers died of it: {letter.reason}"))

    def _see_room(self) -> None:
        """Raise Full when all wait for room that none of them will make: every item is at a worker that has a result,
        or waits while all of them do."""
        lacking = sum(worker.get_value() for worker in self._lacking)
        is_stuck = bool(lacking or self._unfed)
        if is_stuck:
            tasks = connect(self._tasks.path).admin().stat()
            is_stuck = lacking >= (len(self._workers) if tasks.depth else tasks.in_flight)
        if not is_stuck:
            self._stuck_since = 0.0
        elif not self._stuck_since:
            self._stuck_since = time.monotonic()
        elif time.monotonic() - self._stuck_since > _PATIENCE:
            place, count = os.path.dirname(self._tasks.path), len(self._workers)
            what = f"{place} has no room for {_AHEAD} items and a result of each worker, of which there are {count}"
            raise Full(f"{what}; make some there, or give imap fewer processes or smaller items")

    def _started(self, lacking: Semaphore) -> BaseProcess:
        args = self._function, self._tasks, self._results, lacking
        process = multiprocessing.Process(target=_work, args=args, daemon=True)
        process.start()
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _stop(process: int, workers: list[BaseProcess], queues: tuple[Queue, ...], bar: Any) -> None:
    if os.getpid() != process:  # a forked child forgets them
        return
    bar.close()
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join()
        worker.close()
    for queue in queues:  # now, as the last who use them
        queue.close()


def _work(function: Callable[[Any], Any], tasks: Queue, results: Queue, lacking: Semaphore) -> None:
    """What a worker does, until its parent ends it or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends us
    parent = multiprocessing.parent_process()
    assert parent is not None
    consumer = tasks._opened().consumer
    _answer(results, (None, -1, True), lacking)
    while parent.is_alive():
        try:
            (delivery,) = consumer.claim(1, None, time.monotonic() + _GLANCE)
        except Empty:
            continue
        item, number = tasks._value(consumer.load(delivery))
        try:
            answer = function(item), number, True
        except Exception as error:
            answer = error, number, False
        del item
        try:
            _answer(results, answer, lacking)
        except Exception as error:
            _answer(results, (_told(error, "result"), number, False), lacking)
        del answer
        consumer.settle((delivery,), Ack())


def _answer(results: Queue, answer: tuple[Any, int, bool], lacking: Semaphore) -> None:
    """Put an answer, and meanwhile say whether it lacks room."""
    try:
        results.put(answer, block=False)
    except Full:
        lacking.release()
        try:
            results.put(answer)
        finally:
            lacking.acquire()


def _told(error: Exception, what: str) -> Exception:
    """An error of a queue, as one of who is asked for an item or a result and knows of no queue."""
    if not isinstance(error, (UnsupportedItem, TooLarge)):
        return RuntimeError(f"the {what} cannot travel: {type(error).__name__}: {error}")
    text = str(error).replace("item[0]", what, 1).replace("Queue(", "imap(function, arrays, ")
    return type(error)(text)
