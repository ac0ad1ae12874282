"""The faces for asyncio: cancelled at every await, held up by others, used by many tasks, loops and threads."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import lock_descriptor, unlock_descriptor
from support.locks import lock_file
from support.peer import Peer
from support.waits import until

from spoolipc import Empty, Full, ShutDown, SpoolClosed, SpoolReader, SpoolWriter, memory, stat
from spoolipc.aio import AsyncSpoolReader, AsyncSpoolWriter

Call = Callable[[AsyncSpoolWriter, AsyncSpoolReader], Coroutine[Any, Any, Any]]
BIG = 50_000  # float64, more than is copied on the loop
STEPS = 8  # of a loop, more than any call here takes


@pytest.fixture(params=["directory", "memory"])
def place(request: pytest.FixtureRequest, spool: Path) -> Iterator[str]:
    """A spool of either engine."""
    yield str(spool) if request.param == "directory" else f"memory://{spool}"
    memory.clear(str(spool))


@contextmanager
def locked(path: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock of a spool until the end, or until what this gives is called."""
    fd = os.open(lock_file(path), os.O_RDONLY)
    held = [lock_descriptor(fd)]

    def release() -> None:
        if held:
            held.clear()
            unlock_descriptor(fd)

    try:
        yield release
    finally:
        release()
        os.close(fd)


class Threads(ThreadPoolExecutor):
    """Runs what it is given in a thread: at once, and before `submit` returns, or when it is told to."""

    def __init__(self, at_once: bool, before: Callable[[], None]) -> None:
        super().__init__(1)
        self.at_once, self.before = at_once, before
        self.given: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.given.append((future, lambda: work(*args, **kwargs)))
        if self.at_once:
            self.run()
        return future

    def run(self) -> None:
        """Run all that was given, and what is given from now on at once."""
        self.at_once = True
        self.before()
        while self.given:
            future, work = self.given.pop(0)
            thread = threading.Thread(target=self._run, args=(future, work))
            thread.start()
            thread.join()

    def _run(self, future: Future[Any], work: Callable[[], Any]) -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)


async def cancelled_at(step: int, call: Coroutine[Any, Any, Any], threads: Threads) -> Any:
    """What the call returns when it is cancelled at this step of the loop, None when that ended it."""
    asyncio.get_running_loop().set_default_executor(threads)
    task = asyncio.ensure_future(call)
    for _ in range(step):
        await asyncio.sleep(0)
    task.cancel()
    if threads.given:
        await asyncio.sleep(0)
        assert not task.done(), "it ended before its thread"
        task.cancel()  # twice does no harm
    threads.run()
    with suppress(asyncio.CancelledError):
        return await task
    return None


def numbers(found: Any) -> list[float]:
    """The numbers of the arrays that a call returned."""
    several = found if isinstance(found, list) else [] if found is None else [found]
    return [float(array.flat[0]) for array in several]


async def received(_: AsyncSpoolWriter, reader: AsyncSpoolReader) -> Any:
    async with reader.receive() as item:
        return item.array


async def acknowledged(_: AsyncSpoolWriter, reader: AsyncSpoolReader) -> Any:
    item = await reader.receive()
    array = item.array
    await item.ack()
    return array


async def iterated(_: AsyncSpoolWriter, reader: AsyncSpoolReader) -> Any:
    async for array in reader:
        return array


async def taken(_: AsyncSpoolWriter, reader: AsyncSpoolReader) -> Any:
    return (await reader.take()).array


GETS: dict[str, Call] = {
    "get": lambda _, reader: reader.get(),
    "get-copy": lambda _, reader: reader.get(copy=True),
    "get-out": lambda _, reader: reader.get(out=np.empty(BIG)),
    "get-on-write": lambda _, reader: reader.get(copy="on-write"),
    "get_many": lambda _, reader: reader.get_many(2),
    "take": taken,
    "iterate": iterated,
}
RECEIVES: dict[str, Call] = {"receive": received, "ack": acknowledged}
HOW = pytest.mark.parametrize("at_once", [True, False], ids=["thread-ended", "thread-begins-later"])


@HOW
@pytest.mark.parametrize("where", ["directory", "locked", "memory"])
@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"verify": True, "recycle_bytes": 0}, marks=pytest.mark.exhaustive)],
    ids=["", "verified"],
)
@pytest.mark.parametrize("name", [*GETS, *RECEIVES])
def test_what_a_call_cancelled_at_any_step_had_got_is_still_there(
    spool: Path, name: str, options: dict[str, Any], where: str, at_once: bool
) -> None:
    """In its place and as if never delivered; what was received is requeued."""
    path = f"memory://{spool}" if where == "memory" else str(spool)
    size = (
        3 if where == "locked" and name != "get-out" else BIG
    )  # what is small is done on the loop, but for the lock

    async def run(step: int) -> None:
        put = [float(number) for number in range(3)]
        async with AsyncSpoolReader(path, **options) as reader, AsyncSpoolWriter(path) as writer:
            await writer.put_many([np.full(size, number) for number in put])
            with locked(spool) if where == "locked" else nullcontext(lambda: None) as release:
                call = {**GETS, **RECEIVES}[name](writer, reader)
                found = await cancelled_at(step, call, Threads(at_once, release))
            # Others put, and write over what may be written over.
            await writer.put_many([np.full(size, -1.0)] * 2)
            left = []
            with suppress(Empty):
                while True:
                    async with reader.receive(block=False) as item:
                        left.append((float(item.array.flat[0]), item.attempt))
        assert [*numbers(found), *(number for number, _ in left)] == [*put, -1, -1], step
        if name in GETS:
            assert {attempt for _, attempt in left} == {1}

    for step in range(STEPS):
        asyncio.run(run(step))


def test_item_that_another_task_acknowledges_as_its_block_ends_is_acknowledged(spool: Path) -> None:
    async def main() -> None:
        async with AsyncSpoolReader(spool) as reader, AsyncSpoolWriter(spool) as writer:
            await writer.put(np.zeros(3))
            item = await reader.receive()
            threads = Threads(False, lambda: None)
            asyncio.get_running_loop().set_default_executor(threads)
            with locked(spool):
                ends = [asyncio.ensure_future(end) for end in (item.ack(), item.__aexit__(None, None, None))]
                while len(threads.given) < 2:
                    await asyncio.sleep(0)
            threads.run()
            await asyncio.gather(*ends)
            assert (item.settled, reader.empty()) == (True, True)

    asyncio.run(main())


def test_small_items_of_a_cancelled_get_many_with_large_ones_are_written_over_by_nobody(spool: Path) -> None:
    async def main() -> None:
        async with AsyncSpoolReader(spool) as reader, AsyncSpoolWriter(spool) as writer:
            for size in (3, 3, BIG, 3):
                await writer.put(np.full(size, float(size)))
            threads = Threads(True, lambda: None)
            asyncio.get_running_loop().set_default_executor(threads)
            assert numbers(await reader.get()) == [3]  # whose file goes round
            task = asyncio.ensure_future(reader.get_many(3, copy=True))
            while reader.qsize():
                await asyncio.sleep(0)
            with SpoolWriter(spool) as other:
                for _ in range(3):
                    other.put(np.full(3, -1.0))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert numbers(await reader.get_many(9)) == [3, BIG, 3, -1, -1, -1]

    asyncio.run(main())


@pytest.mark.parametrize("verify", [False, True])
def test_what_is_put_before_a_cancelled_get_is_undone_writes_over_nothing(spool: Path, verify: bool) -> None:
    async def main() -> None:
        async with AsyncSpoolReader(spool, verify=verify) as reader:
            with SpoolWriter(spool) as writer:
                for number in range(3):
                    writer.put(np.full(3, float(number)))
                await reader.get()
                loop, threads = asyncio.get_running_loop(), Threads(True, lambda: None)
                loop.set_default_executor(threads)
                with locked(spool) as release:
                    threads.before = release
                    task = asyncio.ensure_future(reader.get())
                    while reader.qsize() > 1:
                        await asyncio.sleep(0)
                for _ in range(3):
                    writer.put(np.full(3, -1.0))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert numbers(await reader.get_many(9)) == [1, 2, -1, -1, -1]

    asyncio.run(main())


def test_account_of_calls_cancelled_at_any_moment_is_exact(place: str) -> None:
    """Gets lose and double nothing; a cancelled put may be there, once and whole."""
    chance, count = random.Random(0), 300
    got, surely = Counter[float](), set[float]()

    async def produce(writer: AsyncSpoolWriter) -> None:
        for number in range(count):
            array = np.full(chance.choice([3, BIG]), float(number))
            with suppress(TimeoutError):
                async with asyncio.timeout(chance.choice([0, 0.001, 0.01, 5])):
                    await writer.put(array)
                    surely.add(number)
            array[:] = -1

    async def consume(reader: AsyncSpoolReader) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(chance.choice([0, 0.0005, 0.002, 0.02])):
                    for array in await reader.get_many(chance.randrange(1, 4), copy=chance.random() < 0.7):
                        assert (array == array[0]).all()
                        got[float(array[0])] += 1

    async def main() -> None:
        async with AsyncSpoolWriter(place, maxsize=10) as writer, AsyncSpoolReader(place) as reader:
            consuming = [asyncio.ensure_future(consume(reader)) for _ in range(3)]
            await produce(writer)
            await writer.shutdown()
            for ended in await asyncio.gather(*consuming, return_exceptions=True):
                assert isinstance(ended, ShutDown), ended

    asyncio.run(main())
    assert set(got.values()) == {1}
    assert surely <= set(got) <= set(range(count))


PUTS: dict[str, Call] = {
    "put": lambda writer, _: writer.put(np.zeros(BIG)),
    "put_many": lambda writer, _: writer.put_many([np.full(3, float(number)) for number in range(40)]),
}


@HOW
@pytest.mark.parametrize("where", ["directory", "locked", "memory"])
@pytest.mark.parametrize("name", PUTS)
def test_what_a_put_cancelled_at_any_step_puts_is_whole_and_there_once(
    spool: Path, name: str, where: str, at_once: bool
) -> None:
    path = f"memory://{spool}" if where == "memory" else str(spool)

    async def run(step: int) -> None:
        async with AsyncSpoolReader(path) as reader, AsyncSpoolWriter(path) as writer:
            with locked(spool) if where == "locked" else nullcontext(lambda: None) as release:
                await cancelled_at(step, PUTS[name](writer, reader), Threads(at_once, release))
            there = numbers(await reader.get_many(100)) if reader.qsize() else []
            assert there in ([], [float(number) for number in range(1 if name == "put" else 40)])
            assert await writer.put(np.ones(3)) == (await reader.take()).seq

    for step in range(STEPS):
        asyncio.run(run(step))


@HOW
def test_what_a_loop_that_is_closed_amid_a_get_had_got_is_still_there(place: str, at_once: bool) -> None:
    with SpoolWriter(place) as writer:
        reader = AsyncSpoolReader(place)
        for number in range(2):
            writer.put(np.full(BIG, float(number)))
        loop, threads = asyncio.new_event_loop(), Threads(at_once, lambda: None)
        loop.set_default_executor(threads)
        tasks = [loop.create_task(reader.get(copy=True)) for _ in range(4)]  # two of which wait
        loop.call_soon(loop.stop)
        loop.run_forever()  # one step
        loop.close()
        for task in tasks:
            assert not task.done()
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        del task, tasks
        threads.run()
        gc.collect()
        found = numbers([asyncio.run(reader.get()) for _ in range(reader.qsize())])
        assert sorted(found) == [0, 1]
        asyncio.run(reader.close())


def test_cancelled_waiter_leaves_the_next_item_to_others(place: str) -> None:
    async def main() -> None:
        async with AsyncSpoolReader(place) as reader, AsyncSpoolWriter(place) as writer:
            for number in range(20):
                waiting = [asyncio.ensure_future(reader.get()) for _ in range(3)]
                await asyncio.sleep(0.001)
                waiting[number % 3].cancel()
                await writer.put(np.full(3, float(number)))
                done, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                while not (done := {each for each in waiting if each.done() and not each.cancelled()}):
                    await asyncio.wait(rest, return_when=asyncio.FIRST_COMPLETED)
                assert [each.result().flat[0] for each in done] == [number]
                for each in waiting:
                    each.cancel()
                await asyncio.wait(waiting)
            assert reader.empty()

    asyncio.run(main())


@pytest.mark.usefixtures("no_look")
def test_cancelled_waiter_takes_no_wake_up_from_another_reader(spool: Path) -> None:
    async def main() -> None:
        async with AsyncSpoolReader(spool) as first, AsyncSpoolReader(spool) as second:
            with SpoolWriter(spool) as writer:
                for _ in range(5):
                    waiting = [asyncio.ensure_future(reader.get()) for reader in (first, second)]
                    await asyncio.sleep(0.01)
                    waiting[0].cancel()
                    await asyncio.sleep(0)
                    writer.put(np.zeros(3))
                    await asyncio.wait_for(waiting[1], 20)

    asyncio.run(main())


def test_close_waits_for_what_a_cancelled_get_puts_back(spool: Path) -> None:
    async def main() -> None:
        async with AsyncSpoolReader(spool) as reader, AsyncSpoolWriter(spool) as writer:
            await writer.put(np.zeros(3))
            with locked(spool) as release:
                task = asyncio.ensure_future(reader.get())
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                task.cancel()
                closing = asyncio.ensure_future(reader.close())
                await asyncio.sleep(0)
                assert not closing.done()
                release()
            await closing
            assert writer.qsize() == 1

    asyncio.run(main())


def test_held_lock_holds_up_neither_the_loop_nor_a_call_for_long(spool: Path) -> None:
    async def main() -> None:
        async with AsyncSpoolReader(spool) as reader, AsyncSpoolWriter(spool) as writer:
            await writer.put(np.zeros(3))
            with locked(spool) as release:
                calls = [reader.get(), writer.put(np.ones(3)), reader.get(), reader.peek()]
                tasks = [asyncio.ensure_future(call) for call in calls]
                for _ in range(200):
                    await asyncio.sleep(0)
                assert not any(task.done() for task in tasks)
                release()
            await asyncio.wait_for(asyncio.gather(*tasks, writer.put(np.ones(3))), 20)
            assert sorted(numbers([tasks[0].result(), tasks[2].result()])) == [0, 1]

    asyncio.run(main())


def test_calls_that_need_not_wait_leave_the_loop_to_others_between(place: str) -> None:
    async def main() -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        async with AsyncSpoolReader(place) as reader, AsyncSpoolWriter(place) as writer:
            await writer.put_many([np.zeros(3)] * 500)
            counting = asyncio.ensure_future(count())
            for _ in range(500):
                await reader.get()
            assert turns >= 3
            counting.cancel()

    asyncio.run(main())


def descriptors() -> list[str]:
    """What this process has open, by kind."""
    there = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            there.append(os.readlink(f"/proc/self/fd/{name}"))
    return there


def test_hundred_readers_that_wait_have_no_thread_and_one_descriptor_between_them(tmp_path: Path) -> None:
    async def main() -> None:
        readers = [AsyncSpoolReader(tmp_path / str(number)) for number in range(100)]
        writers = [SpoolWriter(reader.path) for reader in readers[::10]]
        before, threads = descriptors(), set(threading.enumerate())
        waiting = [asyncio.ensure_future(reader.get()) for reader in readers]
        await asyncio.sleep(0.05)
        more = [thread.name for thread in set(threading.enumerate()) - threads]
        assert [name for name in more if not name.startswith("asyncio_")] == []  # those take what had to wait
        assert len(descriptors()) == len(before)
        assert sum("inotify" in name for name in before) == 1
        for number, writer in enumerate(writers):
            writer.put(np.full(3, float(number)))
        woken = await asyncio.wait_for(asyncio.gather(*waiting[::10]), 20)
        assert [array.flat[0] for array in woken] == [*range(10)]
        assert sum(task.done() for task in waiting) == 10
        for reader in readers:
            await reader.close()
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, (np.ndarray, SpoolClosed))
        for writer in writers:
            writer.close()

    asyncio.run(main())
    assert not any("inotify" in name for name in descriptors())


def test_loops_of_two_threads_and_a_thread_that_waits_share_a_reader(place: str) -> None:
    got: list[float] = []
    with SpoolWriter(place) as writer:
        reader = AsyncSpoolReader(place)

        async def take() -> None:
            async for array in reader:
                got.append(float(array.flat[0]))

        def wait() -> None:
            for array in reader._reader:
                got.append(float(array.flat[0]))

        threads = [threading.Thread(target=work) for work in (lambda: asyncio.run(take()),) * 2 + (wait,)]
        for thread in threads:
            thread.start()
        for number in range(300):
            writer.put(np.full(3, float(number)))
            if number % 30 == 0:
                until(lambda: not writer.qsize())
        writer.shutdown()
        for thread in threads:
            thread.join()
        asyncio.run(reader.close())
    assert sorted(got) == [*range(300)]


def test_waiting_call_keeps_house_and_gets_what_a_killed_reader_had(spool: Path) -> None:
    async def main() -> None:
        async with AsyncSpoolReader(spool) as reader, AsyncSpoolWriter(spool) as writer:
            await writer.put(np.zeros(3))
            with Peer(spool) as peer:
                peer.run("item = SpoolReader(path).receive()")
                waiting = asyncio.ensure_future(reader.receive())
                await asyncio.sleep(0.01)
                os.kill(peer.pid, signal.SIGKILL)
                item = await asyncio.wait_for(waiting, 20)
            assert item.attempt == 2
            loop = asyncio.get_running_loop()
            began = loop.time()
            await item.nack(delay=0.2)
            assert (await reader.take()).attempt == 3
            assert loop.time() - began >= 0.2

    asyncio.run(main())


def test_writer_that_waits_for_room_is_woken_and_tells_what_was_put(place: str) -> None:
    async def main() -> None:
        async with AsyncSpoolWriter(place, maxsize=2) as writer, AsyncSpoolReader(place) as reader:
            with pytest.raises(Full, match="maxsize=2") as full:
                await writer.put_many([np.zeros(3)] * 5, timeout=0.05)
            assert full.value.seqs == (1, 2)
            assert not await writer.wait(0.01)
            assert await reader.wait()
            several = asyncio.ensure_future(writer.put_many([np.ones(3)] * 5))
            found = [await reader.get() for _ in range(7)]
            assert await several == [3, 4, 5, 6, 7]
            assert numbers(found) == [0, 0, 1, 1, 1, 1, 1]
            assert await writer.wait(0)
            assert not await reader.wait(0.01)
            await writer.shutdown()
            assert await reader.wait()
            with pytest.raises(ShutDown):
                await reader.get()
            with pytest.raises(ShutDown):
                await writer.put(np.zeros(3))

    asyncio.run(main())


@pytest.mark.parametrize(
    "call",
    [
        "put([1, 2])",
        "put(array, 5)",
        "put(array, timeout='x')",
        "put_many([array], metas=[])",
        "get(5)",
        "get(timeout=-1)",
        "get(copy='no')",
        "get(out=[1])",
        "get_many(0)",
        "receive(copy='no')",
        "peek(None)",
    ],
)
def test_wrong_arguments_are_told_as_by_the_blocking_faces(place: str, call: str) -> None:
    told = []
    array = np.zeros(3)

    async def later(side: Any) -> None:
        await eval(f"side.{call}", {"side": side, "array": array})

    with SpoolReader(place) as reader, SpoolWriter(place) as writer:
        blocking = writer if call.startswith("put") else reader
        with pytest.raises((TypeError, ValueError)) as found:
            eval(f"side.{call}", {"side": blocking, "array": array})
        told.append((type(found.value), str(found.value)))
        side = AsyncSpoolWriter(place) if call.startswith("put") else AsyncSpoolReader(place)
        with pytest.raises((TypeError, ValueError)) as found:
            asyncio.run(later(side))
        told.append((type(found.value), str(found.value)))
        asyncio.run(side.close())
    assert told[0] == told[1]


def test_interrupt_ends_a_program_that_waits_and_leaves_what_comes_to_others(spool: Path) -> None:
    program = f"""
import asyncio
from spoolipc.aio import AsyncSpoolReader
async def main():
    async with AsyncSpoolReader({str(spool)!r}) as reader:
        print("waits", flush=True)
        await reader.get()
asyncio.run(main())
"""
    with SpoolWriter(spool) as writer:
        command = [sys.executable, "-W", "error", "-c", program]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=50)
        assert process.returncode == -signal.SIGINT
        assert said.splitlines()[-1] == "KeyboardInterrupt"
        assert stat(spool).live_sessions == 1
        writer.put(np.zeros(3))
        assert writer.qsize() == 1
