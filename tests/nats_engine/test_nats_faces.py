"""Every face on a spool of a server: asyncio, the queues of `multiprocessing`, `imap`, `get(out=)`, `gc`."""

from __future__ import annotations

import asyncio
import gc as collector
import multiprocessing
import re
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats
import numpy as np
import pytest
from contract.test_async_faces import Faces

from nats_engine.server import Server
from nats_engine.test_nats_engine import OnServer
from spoolipc import (
    Empty,
    JoinableQueue,
    Queue,
    ShutDown,
    SpoolReader,
    SpoolWriter,
    UnsupportedItem,
    failed_list,
    gc,
    imap,
    stat,
)
from spoolipc.aio import AsyncSpoolReader, AsyncSpoolWriter
from spoolipc.cli.main import main
from spoolipc.engine import Engine
from spoolipc.nats import link
from spoolipc.nats import spool as spools
from spoolipc.testing import EngineSuite

LARGE = 300_000
"""Float64 that are three messages."""


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    name = request.node.name
    return server.url(re.sub(r"[^a-z0-9]+", "-", f"{name[-100:]}{len(name)}"))


class TestAsyncFacesOnServer(OnServer, EngineSuite):
    """The faces for asyncio pass the suite of engines."""

    def engine(self, place: str) -> Engine:
        return Faces(super().engine(place)._where.path)  # type: ignore[attr-defined]


# asyncio


@pytest.mark.parametrize("size", [10, LARGE])
def test_cancelled_get_and_receive_leave_the_item_as_if_never_delivered(url: str, size: int) -> None:
    async def run() -> None:
        async with AsyncSpoolReader(url) as reader, AsyncSpoolWriter(url) as writer:
            for number in range(3):
                await writer.put(np.full(size, number))
            for seconds in (0.0, 1e-4, 1e-3, 3e-3, 1e-2):
                getting = asyncio.create_task(reader.get())
                await asyncio.wait([getting], timeout=seconds)
                if not getting.cancel():
                    await writer.put(getting.result())
                await asyncio.wait([getting])
            items = [await reader.receive() for _ in range(3)]
            assert [item.attempt for item in items] == [1, 1, 1]
            assert sorted(int(item.array[0]) for item in items) == [0, 1, 2]
            for item in items:
                await item.ack()

    asyncio.run(run())
    assert (stat(url).depth, stat(url).in_flight) == (0, 0)


def test_loop_goes_on_while_calls_wait_for_a_server_that_comes_back(tmp_path: Path) -> None:
    server = Server(tmp_path)

    async def run() -> None:
        async with (
            AsyncSpoolReader(server.url("away")) as reader,
            AsyncSpoolWriter(server.url("away")) as writer,
        ):
            server.stop()
            getting = asyncio.create_task(reader.get())
            putting = asyncio.create_task(writer.put(np.ones(LARGE)))
            done, _ = await asyncio.wait([getting, putting], timeout=5.0)  # longer than a request waits
            assert not done
            longest, last = 0.0, time.monotonic()
            await asyncio.to_thread(server.start)
            while not getting.done():
                await asyncio.sleep(0.005)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            assert longest < 2.0, "a call of the network was made on the loop"
            assert (getting.result() == 1).all()
            await putting
            with pytest.raises(Empty):
                await reader.get(block=False)

    try:
        asyncio.run(run())
    finally:
        server.stop()


def test_many_tasks_wait_without_threads(url: str) -> None:
    async def run() -> list[Any]:
        async with AsyncSpoolReader(url) as reader, AsyncSpoolWriter(url) as writer:
            getting = [asyncio.create_task(reader.get()) for _ in range(50)]
            while (await asyncio.wait(getting, timeout=0.5))[0]:
                pass
            assert threading.active_count() < 45
            await writer.put_many([np.full(3, number) for number in range(50)])
            return [array[0] for array in await asyncio.gather(*getting)]

    assert sorted(asyncio.run(run())) == list(range(50))


# get(out=)


@pytest.mark.parametrize("size", [10, LARGE])
def test_array_is_filled_and_what_does_not_fit_stays_the_next_with_no_attempt_counted(
    url: str, size: int
) -> None:
    with SpoolWriter(url, max_attempts=2) as writer, SpoolReader(url) as reader:
        writer.put_many([np.full(size, 1.0), np.full(size, 2.0)])
        for _ in range(3):
            with pytest.raises(ValueError, match="out one of"):
                reader.get(out=np.empty(size + 1))
        out = np.empty(size)
        assert reader.get(out=out) is out
        assert (out == 1).all()
        item = reader.receive(timeout=20)
        assert (item.attempt, item.array[0]) == (1, 2)
        item.ack()
        assert stat(url).in_flight == 0
    assert failed_list(url) == []


# Queues


def worked(queue: JoinableQueue, answers: Queue) -> None:
    """Double what comes, in another process."""
    while (found := queue.get()) is not None:
        answers.put({"twice": found["number"] * 2, "array": found["array"] * 2})
        queue.task_done()
    queue.task_done()


@pytest.fixture(params=["spawn", "fork"])
def start(request: pytest.FixtureRequest) -> Any:
    return multiprocessing.get_context(request.param)


def test_queue_passes_between_processes_of_every_start_method(server: Server, start: Any) -> None:
    method = start.get_start_method()
    queue = JoinableQueue(path=server.url(f"tasks-{method}"), maxsize=5)
    answers = Queue(path=server.url(f"answers-{method}"))
    processes = [start.Process(target=worked, args=(queue, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    for number in range(10):
        queue.put({"number": number, "array": np.full(LARGE if number == 3 else 10, number)})
    for _ in processes:
        queue.put(None)
    queue.join()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    found = sorted((answers.get(timeout=20) for _ in range(10)), key=lambda answer: answer["twice"])
    assert [answer["twice"] for answer in found] == list(range(0, 20, 2))
    assert all((answer["array"] == answer["twice"]).all() for answer in found)
    assert (queue.qsize(), queue.empty(), queue.full(), queue.maxsize) == (0, True, False, 5)
    for each in (queue, answers):
        each.shutdown()
        with pytest.raises(ShutDown):
            each.get(timeout=20)
        each.close()
        with pytest.raises(ValueError, match="is closed"):
            each.put(1)


def test_join_waits_for_every_task_and_too_many_are_an_error(url: str) -> None:
    with ThreadPoolExecutor() as threads:
        queue, other = JoinableQueue(path=url), JoinableQueue(path=url)
        queue.join()
        for number in range(3):
            queue.put(number)
        joining = threads.submit(queue.join)
        assert [other.get() for _ in range(3)] == [0, 1, 2]
        for _ in range(3):
            assert not joining.done()
            other.task_done()
        joining.result(20)
        with pytest.raises(ValueError, match="too many times"):
            queue.task_done()
        queue.put(3)
        queue.get()  # and its process dies, so that nobody says that it is done
        other.close()
        queue.close()
        again = JoinableQueue(path=url)
        again.join()
        again.close()


@dataclass
class Point:
    x: int


def test_value_that_cannot_be_made_again_is_a_dead_letter(url: str) -> None:
    queue, plain = Queue(path=url, types=[Point]), Queue(path=url)
    queue.put(Point(1))
    queue.put(7)
    with pytest.raises(UnsupportedItem):
        plain.get(timeout=20)
    assert plain.get(timeout=20) == 7
    queue.close()
    plain.close()
    (letter,) = failed_list(url)
    assert (letter.attempts, "UnsupportedItem" in letter.reason) == (1, True)


@pytest.mark.timeout(60)
def test_queue_that_is_collected_in_the_thread_of_the_client_leaves_its_spool(url: str) -> None:
    done, kept = threading.Event(), Queue(path=url)
    cycle: list[Any] = [Queue(path=url)]
    cycle.append(cycle)
    assert stat(url).live_sessions == 4
    collector.disable()
    try:
        del cycle
        client = link.loop()._loop
        client.call_soon_threadsafe(collector.collect)
        client.call_soon_threadsafe(done.set)
        assert done.wait(20), "it waits for itself"
    finally:
        collector.enable()
    assert stat(url).live_sessions == 2
    kept.close()


def test_pickles_are_not_taken_from_servers(url: str) -> None:
    with pytest.raises(ValueError, match="a directory of this machine"):
        Queue(path=url, allow_pickle=True)


def doubled(array: Any) -> Any:
    return array * 2


def test_imap_takes_its_items_from_a_server(url: str) -> None:
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put_many([np.full(10, number) for number in range(6)])
        writer.shutdown()
        assert [found[0] for found in imap(doubled, reader, processes=2)] == [0, 2, 4, 6, 8, 10]


# Looking after it


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are orphaned at once."""
    monkeypatch.setattr("spoolipc.nats.spool.ORPHANED", -1e6)


@pytest.mark.usefixtures("soon")
def test_gc_removes_what_crashed_sessions_left(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put_many([np.arange(LARGE)] * 2)
        reader.receive().nack()
        item = reader.receive(timeout=20)
        spool = reader._consumer.spool  # type: ignore[attr-defined]

        async def crash(*_: Any) -> None:
            raise InterruptedError

        with monkeypatch.context() as patch:
            patch.setattr(spool, "forget", crash)
            with pytest.raises(InterruptedError):
                item.ack()
        for dry_run in (True, False):
            report = gc(url, dry_run=dry_run)
            assert (report.orphaned_pieces, report.orphaned_histories) == (3, 1)
        assert main(["gc", url]) == 0
        assert "nothing left by crashed processes" in capsys.readouterr().out
        assert (reader.get(timeout=20) == np.arange(LARGE)).all()
    assert stat(url).bytes == 0


def test_reader_that_dies_amid_a_dead_letter_loses_no_item(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spools, "ACK_WAIT", 2.0)
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put(np.arange(LARGE))
        item = reader.receive()
        spool = reader._consumer.spool  # type: ignore[attr-defined]
        noted = spool.note

        async def crash(subject: str, *rest: Any, **given: Any) -> int:
            if subject.startswith("dead."):
                raise InterruptedError
            return int(await noted(subject, *rest, **given))

        monkeypatch.setattr(spool, "note", crash)
        with pytest.raises(InterruptedError):
            item.reject("no good")
        reader._consumer.held.clear()  # type: ignore[attr-defined]
        with SpoolReader(url) as other, pytest.raises(Empty):
            other.get(timeout=5)  # the server redelivers it after two
        (letter,) = failed_list(url)
        assert (letter.reason, letter.damage, letter.arrays[0].shape) == ("no good", "", (LARGE,))


# Memory


def test_memory_stays_the_same_however_many_large_items_pass(url: str) -> None:
    """Of the client: what a few items need is what many need."""
    array = np.ones(1_000_000)
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:

        def peak_after(count: int) -> int:
            for number in range(count):
                array[0] = number
                writer.put(array)
                found = reader.get(timeout=20)
                assert (found[0], found[-1]) == (number, 1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        before = peak_after(10)
        assert peak_after(60) - before < 4 * array.nbytes


def test_arrays_that_are_kept_never_change_and_memory_is_used_again_when_none_is(url: str) -> None:
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:

        def passed(number: int) -> Any:
            writer.put(np.full(LARGE, float(number)))
            return reader.get(timeout=20)

        def address(array: Any) -> int:
            return int(array.__array_interface__["data"][0])

        parts = [passed(number)[number::2].reshape(-1, 1).T for number in range(5)]  # views of views
        assert all((part == number).all() for number, part in enumerate(parts))
        assert len({address(part) // 4096 for part in parts}) == 5
        used = {address(parts.pop())}
        for number in range(5):
            found = passed(number)
            used.add(address(found))
            del found
        assert len(used) <= 3
        assert all((part == number).all() for number, part in enumerate(parts))


# Interrupts


@pytest.mark.parametrize("size", [10, LARGE])
def test_item_got_by_a_call_that_is_interrupted_waits_as_if_never_delivered(
    url: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put_many([np.full(size, 1.0), np.full(size, 2.0)])
        client = link.loop()
        run = client.run

        def interrupted(work: Any) -> Any:
            run(work)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(client, "run", interrupted)
            with pytest.raises(KeyboardInterrupt):
                reader.get(timeout=20)
        assert reader.qsize() == 2
        item = reader.receive(timeout=20)
        assert (item.attempt, item.array[0]) == (1, 1)


def test_dead_letter_is_not_put_back(url: str) -> None:
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put(np.ones(3))
        item = reader.receive()
        item.reject("no good")
        consumer: Any = reader._consumer
        consumer.do(consumer._put_back([item._delivery.handle.held]))
        assert (reader.qsize(), stat(url).failed) == (0, 1)


# Notes that somebody else wrote

PLANTED = {
    "control": b"{",
    "control ": b'{"state": "shut", "writers": "x", "asked": []}',
    "tasks": b"many",
    "failed.x": b"{}",
    "failed.7": b"[]",
    "dead.x.y.z": b"",
    "dead.7.y.z": b"x",
    "session.x.y": b"",
}


@pytest.mark.parametrize("subject", PLANTED)
def test_planted_note_stops_nobody(server: Server, url: str, subject: str) -> None:
    with SpoolWriter(url, max_attempts=3) as writer, SpoolReader(url) as reader:
        writer.put_many([np.ones(3)] * 2)

        async def plant() -> None:
            client = await nats.connect(server.url("").rstrip("/"))
            name = f"spoolipc.{url.rpartition('/')[2]}"
            assert b"error" not in (await client.request(f"{name}.{subject.strip()}", PLANTED[subject])).data
            await client.publish(f"{name}.news.control")
            await client.close()

        asyncio.run(plant())
        reader.receive().nack()
        item = reader.receive(timeout=20)
        assert item.attempt == 2
        item.reject("no good")
        writer.put(np.ones(3))
        assert reader.qsize() == 2
        assert [len(array) for array in reader.get_many(9)] == [3, 3]
        queue = JoinableQueue(path=url)
        queue.put(1)
        assert queue.get() == 1
        queue.task_done()
        queue.join()
        queue.close()
        found = stat(url)
        assert (found.depth, found.in_flight) == (0, 0)
        assert "no good" in [letter.reason for letter in failed_list(url)]
        gc(url)
        with SpoolWriter(url) as other:
            other.shutdown()
        with pytest.raises(ShutDown):
            reader.get(timeout=20)
