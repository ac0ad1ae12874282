"""Servers that go away and come back, connections that are lost, and messages that nobody of this package sent."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import nats
import numpy as np
import pytest
from support.waits import until

from nats_engine.server import Server, SlowLine
from spoolipc import (
    BadItem,
    Empty,
    LeaseExpired,
    ServerUnreachable,
    SpoolReader,
    SpoolWriter,
    StorageError,
    UnsupportedItem,
    failed_list,
    failed_retry,
    gc,
    purge,
    remove,
    set_limits,
    stat,
)
from spoolipc.connect import connect
from spoolipc.engine import ConsumerOptions
from spoolipc.message import Message
from spoolipc.nats import consumer as consuming
from spoolipc.nats import link as linking
from spoolipc.nats import producer as producing
from spoolipc.nats import session
from spoolipc.nats import spool as spools

LARGE = 300_000
"""Float64 that are three messages and more."""


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server that the test may end."""
    server = Server(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    return server.url(f"{request.node.name[:80].replace('[', '-').replace(']', '')}")


def test_looking_after_a_spool_asks_until_the_servers_have_a_leader(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    SpoolWriter(url).close()
    asked: list[str] = []
    answers = linking.Link.answers

    async def silent(link: linking.Link, requests: Any) -> Any:
        asked.append(requests[0].subject)
        return ["it says nothing"] if len(asked) < 5 else await answers(link, requests)

    monkeypatch.setattr(linking, "TRY", 0.2)
    monkeypatch.setattr(linking.Link, "answers", silent)
    assert stat(url).depth == 0
    assert len(set(asked[:5])) == 1


def again(server: Server) -> None:
    server.stop()
    server.start()


def on(server: Server, work: Any) -> Any:
    """What `work` returns, which is given a client of its own."""

    async def run() -> Any:
        client = await nats.connect(server.url("").rstrip("/"))
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


@pytest.mark.parametrize("size", [10, LARGE])
def test_server_restarted_between_every_two_calls_loses_and_doubles_nothing(
    own_server: Server, size: int
) -> None:
    url = own_server.url("restarts")
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        for number in range(3):
            again(own_server)
            writer.put(np.full(size, float(number)))
        again(own_server)
        assert reader.peek(timeout=30).seq
        assert reader.qsize() == 3
        for number in range(3):
            again(own_server)
            item = reader.receive(timeout=30)
            again(own_server)
            assert (item.array == number).all()
            again(own_server)
            item.ack()
        again(own_server)
        with pytest.raises(Empty):
            reader.get(timeout=1)
        assert stat(url).in_flight == 0


def test_calls_that_do_not_wait_end_soon_while_the_server_is_away(own_server: Server) -> None:
    url = own_server.url("soon")
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        own_server.stop()
        for call in (writer.qsize, writer.full, reader.empty, lambda: reader.maxsize):
            began = time.monotonic()
            with pytest.raises(ServerUnreachable) as caught:
                call()
            assert str(caught.value) == f"{url}: no answer from the server: the connection is lost"
            assert time.monotonic() - began < linking.PATIENCE / 3
        own_server.start()


@pytest.mark.parametrize("call", [stat, purge, remove, gc, failed_list, partial(set_limits, maxsize=3)])
def test_looking_after_a_spool_ends_soon_where_servers_do_not_answer(
    url: str, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    SpoolWriter(url).close()
    answers = linking.Link.answers

    async def silent(link: linking.Link, requests: Any) -> Any:
        asked = list(requests)
        return ["it says nothing"] if "API" in asked[0].subject else await answers(link, asked)

    monkeypatch.setattr(linking.Link, "answers", silent)
    monkeypatch.setattr("spoolipc.nats._ASKING", 1.0)
    began = time.monotonic()
    with pytest.raises(ServerUnreachable, match="it says nothing"):
        call(url)
    assert time.monotonic() - began < linking.PATIENCE / 3


def test_server_that_is_killed_keeps_what_was_put(own_server: Server) -> None:
    url = own_server.url("killed")
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put(np.arange(LARGE))
        own_server.stop(kill=True)
        own_server.start()
        assert (reader.get(timeout=30) == np.arange(LARGE)).all()


def test_calls_wait_for_a_server_that_comes_back_and_keep_their_timeout(own_server: Server) -> None:
    url = own_server.url("away")
    with SpoolWriter(url) as writer, SpoolReader(url) as reader, ThreadPoolExecutor() as threads:
        own_server.stop()
        for call in (lambda: writer.put(np.zeros(3), timeout=1.5), lambda: reader.get(timeout=1.5)):
            began = time.monotonic()
            with pytest.raises(ServerUnreachable, match="no answer from the server"):
                call()
            assert 1.5 <= time.monotonic() - began < 15
        waiting = [threads.submit(reader.get), threads.submit(writer.put, np.ones(3))]
        own_server.start()
        assert (waiting[0].result(60) == 1).all()
        assert waiting[1].result(60)


def test_log_says_once_that_a_server_is_waited_for_and_that_it_answers(
    own_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a call has no timeout, as those that settle."""
    url = own_server.url("told")
    with SpoolWriter(url) as writer:
        writer.put(np.zeros(3))
    with SpoolReader(url) as reader, ThreadPoolExecutor() as threads:
        link: Any = reader._consumer.link  # type: ignore[attr-defined]
        check, checks = link.check, []

        def counted(*args: Any) -> None:
            checks.append(args)
            check(*args)

        link.check = counted
        item = reader.receive(timeout=20)
        own_server.stop()
        waiting = threads.submit(item.ack)
        until(lambda: "the connection is lost; it is waited for" in caplog.text)
        checks.clear()
        until(lambda: len(checks) >= 3)
        assert caplog.text.count("it is waited for") == 1
        own_server.start()
        with suppress(LeaseExpired):
            waiting.result(60)
        assert "the server answers again" in caplog.text


def test_session_closed_while_its_server_is_away_leaves_no_task_to_its_loop(own_server: Server) -> None:
    """asyncio prints a line for each that is forgotten."""
    loop = linking.loop()._loop
    before = asyncio.all_tasks(loop)
    with SpoolReader(own_server.url("left")) as reader, SpoolWriter(own_server.url("left")) as writer:
        own_server.stop()
        with pytest.raises(ServerUnreachable):
            reader.get(timeout=0.1)
        clients = [reader._consumer.link, writer._producer.link]  # type: ignore[attr-defined]
    until(lambda: asyncio.all_tasks(loop) <= before)
    assert len(clients) == 2  # and not because nobody knows them any more
    own_server.start()


def test_calls_keep_their_timeout_while_a_server_hangs_and_closing_ends(
    own_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item of one message, of a batch of them, and piece by piece: more than the sockets hold."""
    monkeypatch.setattr(linking, "TRY", 1.0)
    url, sizes = own_server.url("hangs"), (10, 1_900_000, 2_500_000)
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        puts = [partial(writer.put, np.zeros(size), timeout=1.5) for size in sizes]
        writer.put(np.zeros(1))
        item = reader.receive(timeout=20)
        own_server.hang()
        for call in (*puts, partial(reader.get, timeout=1.5)):
            began = time.monotonic()
            with pytest.raises(ServerUnreachable, match="no answer from the server"):
                call()
            assert 1.5 <= time.monotonic() - began < 15
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(writer.put, np.ones(3))
            own_server.go()
            assert waiting.result(60)
        item.ack()
        found: list[tuple[int, ...]] = []
        while (3,) not in found:  # those given up may be there, whole
            found.append(reader.get(timeout=20).shape)
        assert set(found) <= {(3,), *((size,) for size in sizes)}
        assert len(found) == len(set(found))
        own_server.hang()
        began = time.monotonic()
        reader.close()
        assert time.monotonic() - began < 15
        own_server.go()


def test_time_that_a_hung_server_takes_is_that_of_one_try_and_a_moment(
    own_server: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Also where what was begun beside does not end."""
    url, loop, ended = own_server.url("hung"), linking.loop(), asyncio.Event()

    async def beside() -> None:
        await ended.wait()

    def took(call: Any) -> float:
        began = time.monotonic()
        with pytest.raises(ServerUnreachable):
            call()
        return time.monotonic() - began

    with SpoolWriter(url, maxsize=3) as writer, SpoolReader(url) as reader:
        own_server.hang()
        request.addfinalizer(own_server.go)
        assert took(partial(reader.get, timeout=0.1)) < 3.5, "it is asked once, for 2 seconds"
        monkeypatch.setattr(linking, "TRY", 4.0)
        loop.beside(beside)
        assert took(writer.qsize) < 7.5, "it waits 2 seconds before it asks"
        assert took(partial(SpoolWriter, url)) < 6.5, "it tries to connect for 5 seconds, and closes at once"
        loop._loop.call_soon_threadsafe(ended.set)
        answers, times = linking.Link.answers, 0

        async def lost(link: linking.Link, requests: Any) -> Any:
            """The first try is given up when half of its time is over, as where the connection is lost then."""
            nonlocal times
            times += 1
            if times == 1:
                await asyncio.sleep(3)
                return ["the connection is lost"]
            return await answers(link, requests)

        monkeypatch.setattr(linking.Link, "answers", lost)
        assert took(lambda: reader.maxsize) < 5.5, "another try has what is left of 4 seconds"
        assert times > 1
        own_server.go()


@pytest.mark.parametrize("size", [10, LARGE, 2_500_000])
def test_what_a_server_hears_once_more_and_late_changes_nothing(
    server: Server, url: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the network was cut, what was on its way may come after it was sent again another way."""
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        link: Any = writer._producer.link  # type: ignore[attr-defined]
        publish, answers, sent = link.client.publish, link.answers, []
        late: list[tuple[str, bytes, Any]] = []

        async def note(subject: str, data: Any, reply: str = "", headers: Any = None) -> None:
            sent.append((subject, bytes(data), headers))
            await publish(subject, data, reply, headers)

        async def lose(requests: Any) -> Any:
            asked = list(requests)
            found = await answers(asked)
            if late or not asked[0].subject.startswith("spoolipc."):
                return found
            late.extend(sent)
            return ["the connection was lost"]

        monkeypatch.setattr(link.client, "publish", note)
        monkeypatch.setattr(link, "answers", lose)
        writer.put(np.arange(size))
        monkeypatch.undo()

        async def once_more(client: Any) -> None:
            for subject, data, headers in late:
                await client.publish(subject, data, "", headers)
            await client.flush()

        assert late
        on(server, once_more)
        assert (reader.get(timeout=20) == np.arange(size)).all()
        assert reader.empty()
        assert stat(url).failed == 0


@pytest.mark.parametrize("size", [1_900_000, 2_500_000])
def test_slow_line_carries_a_large_item(server: Server, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linking, "TRY", 0.2)  # all that is on its way at once takes longer
    with SlowLine(server, 16e6) as line:
        url = line.url(f"slow-{size}")
        with SpoolWriter(url) as writer, SpoolReader(url) as reader:
            writer.put(np.arange(size), timeout=20)
            assert (reader.get(timeout=20) == np.arange(size)).all()


@pytest.mark.parametrize("heard", [False, True])
def test_item_whose_acknowledgement_is_not_answered_is_returned_once(
    url: str, heard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spools, "ACK_WAIT", 2.0)
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put_many([np.ones(3), np.zeros(3)])
        link: Any = reader._consumer.link  # type: ignore[attr-defined]
        call_all, lost = link.call_all, threading.Event()

        async def lose(requests: Any) -> Any:
            is_ack = requests[0].payload == b"+ACK"
            found = await call_all(requests) if heard or lost.is_set() or not is_ack else []
            if lost.is_set() or not is_ack:
                return found
            lost.set()
            raise ServerUnreachable("no answer")

        link.call_all = lose
        assert [reader.get(timeout=20)[0] for _ in range(2)] == [1, 0]
        assert lost.wait(20)
        with pytest.raises(Empty):
            reader.get(timeout=4)  # a server delivers again after two
        assert (stat(url).in_flight, stat(url).depth) == (0, 0)


def has_at_most(url: str, size: int) -> bool:
    return stat(url).bytes <= size


def test_servers_that_are_full_refuse_an_item_and_keep_nothing_of_it(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server = Server(tmp_path, f'jetstream {{ store_dir: "{tmp_path / "store"}", max_file_store: 11000000 }}')
    request.addfinalizer(server.stop)
    url = server.url("full")
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        for _ in range(4):
            writer.put(np.zeros(LARGE))
        for _ in range(3):
            kept = stat(url).bytes  # the first piece of another fits
            with pytest.raises(StorageError, match="refuses the item: insufficient resources"):
                writer.put(np.zeros(LARGE))
            assert stat(url).bytes == kept
            reader.get(timeout=20)
            until(partial(has_at_most, url, kept - 8 * LARGE))  # it is acknowledged in the moment after
            writer.put(np.zeros(LARGE))


def test_items_put_together_stay_in_order_when_the_first_is_to_be_sent_again(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, planted = producing.NatsProducer._commit, list[str]()

    async def late(self: Any, last: Any, ready: Any) -> Any:
        if not planted:  # a piece of it that comes when all seem to be there
            planted.append(f"{self.spool.name}.chunk.{ready[0].id}")
            piece = linking.Request(f"spoolipc.{planted[0]}", b"late", {"Spool-At": "0"})
            await self.link.answers([piece])
        return await commit(self, last, ready)

    monkeypatch.setattr(producing.NatsProducer, "_commit", late)
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        arrays = [np.arange(LARGE), np.arange(3), np.arange(4)]
        seqs = writer.put_many(arrays)
        assert planted
        assert seqs == sorted(seqs)
        for array in arrays:
            assert (reader.get(timeout=20) == array).all()
    assert stat(url).bytes == 0


def test_writers_that_put_several_at_the_same_time_keep_each_its_order(url: str) -> None:
    def put(writer: SpoolWriter, number: int) -> list[list[int]]:
        return [writer.put_many(np.full(64, number * 1000 + n)) for n in range(20)]

    with SpoolWriter(url) as one, SpoolWriter(url) as two, SpoolReader(url) as reader:
        with ThreadPoolExecutor() as threads:
            seqs = [threads.submit(put, writer, number) for number, writer in enumerate((one, two))]
        found: list[int] = []
        while len(found) < 2 * 20 * 64:
            found += [int(array) for array in reader.get_many(64, timeout=20)]
        for number, each in enumerate(seqs):
            told = [seq for several in each.result() for seq in several]
            assert told == sorted(set(told))
            own = [value for value in found if value // 1000 == number]
            assert own == [number * 1000 + n for n in range(20) for _ in range(64)]
        assert reader.empty()


def test_several_are_got_at_once_by_a_call_that_would_wait(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consuming, "LOOK", 30.0)
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put_many([np.zeros(3)] * 5)
        began = time.monotonic()
        assert len(reader.get_many(9)) == 5
        with ThreadPoolExecutor() as threads:
            waiting = [threads.submit(reader.get_many, 9) for _ in range(3)]
            for _ in waiting:
                writer.put(np.zeros(3))
            assert sum(len(each.result(20)) for each in waiting) == 3
        assert time.monotonic() - began < 15


def test_who_begins_to_wait_hears_of_a_put_though_nobody_heard_of_those_before(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LOOK", 30.0)
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        for _ in range(3):
            writer.put(np.zeros(3))
            reader.get(timeout=20)
        with ThreadPoolExecutor() as threads:
            for _ in range(2):
                waiting = threads.submit(reader.peek, timeout=20)
                until(lambda: reader._consumer.spool.news.event._waiters)  # type: ignore[attr-defined]
                began = time.monotonic()
                writer.put(np.zeros(3))
                waiting.result()
                assert time.monotonic() - began < 10
                reader.get(timeout=20)


def test_item_that_the_servers_are_storing_still_is_sent_until_they_have_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, sent = producing.NatsProducer._sent, []

    async def still_storing(self: Any, messages: Any) -> Any:
        sent.append(messages)
        in_process = {"err_code": 10158, "description": "duplicate message id is in process"}
        return await send(self, messages) if len(sent) > 1 else ([], in_process)

    monkeypatch.setattr(producing.NatsProducer, "_sent", still_storing)
    with SpoolWriter(url) as writer:
        writer.put(np.zeros(3))
        assert (len(sent), stat(url).depth) == (2, 1)


def test_item_put_twice_by_its_id_is_stored_once(url: str) -> None:
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        for size in (10, LARGE):
            message = Message((np.arange(size),), id=f"{size:032x}")
            seqs = [writer._producer.put([message], time.monotonic() + 20)[0] for _ in range(2)]
            assert seqs[0] == seqs[1]
            assert (reader.get(timeout=20) == np.arange(size)).all()
            with pytest.raises(Empty):
                reader.get(block=False)


def test_items_in_pieces_and_whole_ones_are_put_together_in_order(url: str) -> None:
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        for _ in range(2):
            writer.put_many([np.arange(LARGE), np.arange(3), np.arange(LARGE)])
            for size in (LARGE, 3, LARGE):
                assert (reader.get(timeout=20) == np.arange(size)).all()
    assert stat(url).bytes == 0


def test_pieces_of_an_earlier_try_are_removed_before_the_item_is_put(server: Server, url: str) -> None:
    name = url.rpartition("/")[2]
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:

        async def plant(client: Any) -> None:
            for at in range(3):
                await client.request(
                    f"spoolipc.{name}.chunk.{7:032x}", b"x" * 9, headers={"Spool-At": str(at)}
                )

        on(server, plant)
        message = Message((np.arange(3_000_000),), id=f"{7:032x}")
        writer._producer.put([message], time.monotonic() + 20)
        assert (reader.get(timeout=20) == np.arange(3_000_000)).all()
        assert stat(url).bytes == 0


def test_pieces_of_a_writer_that_died_are_removed_and_those_of_items_stay(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = url.rpartition("/")[2]
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put(np.arange(LARGE))
        writer.put(np.arange(LARGE))
        reader.receive(timeout=20).reject("kept")

        async def orphan(client: Any) -> None:
            await client.request(f"spoolipc.{name}.chunk.{'0' * 32}", b"x" * 1000)

        on(server, orphan)
        before = stat(url).bytes
        monkeypatch.setattr("spoolipc.nats.spool.ORPHANED", -1e6)
        SpoolWriter(url).close()
        assert before - 2000 < stat(url).bytes < before
        assert failed_retry(url).damaged == {}
        for _ in range(2):
            assert (reader.get(timeout=20) == np.arange(LARGE)).all()


def test_pieces_of_items_stay_where_more_subjects_are_than_a_server_tells_at_once(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100,000 of them; here it is one."""
    told = linking.Link.api

    async def api(self: Any, what: str, body: Any = None, missing: bool = False) -> dict[str, Any]:
        if "subjects_filter" not in (body or {}):
            return await told(self, what, body, missing)
        offset = body.pop("offset", 0)
        info = await told(self, what, body, missing)
        subjects = sorted((info["state"].get("subjects") or {}).items())
        info["state"]["subjects"] = dict(subjects[offset : offset + 1])
        return info | {"total": len(subjects), "offset": offset}

    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        for number in range(4):
            writer.put(np.full(LARGE, number))
        for _ in range(2):
            reader.receive(timeout=20).reject("kept")
        monkeypatch.setattr(linking.Link, "api", api)
        monkeypatch.setattr("spoolipc.nats.spool.ORPHANED", -1e6)
        assert stat(url).failed == 2
        SpoolWriter(url).close()
        assert len(failed_retry(url).seqs) == 2
        assert sorted(int(reader.get(timeout=20)[0]) for _ in range(4)) == [0, 1, 2, 3]


HOSTILE: dict[str, tuple[bytes, dict[str, str]]] = {
    "nothing": (b"", {}),
    "garbage": (b"\x93NUMPY" + bytes(100), {}),
    "huge claim": (b"x", {"Spool-Size": "1" + "0" * 17}),
    "claim too long": (b"x", {"Spool-Size": "9" * 40}),
    "no number": (b"x", {"Spool-Size": "-3"}),
    "no pieces": (b"SPOOLFTR" + bytes(64), {"Spool-Size": "5000"}),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("call", ["get", "receive", "peek", "meta"])
def test_hostile_message_costs_that_message_only(server: Server, what: str, call: str) -> None:
    name = f"hostile-{what.replace(' ', '-')}-{call}"
    url = server.url(name)
    data, headers = HOSTILE[what]
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:

        async def plant(client: Any) -> None:
            await client.request(f"spoolipc.{name}.item.{'0' * 32}", data, headers=headers or None)

        on(server, plant)
        writer.put(np.ones(3))
        if call == "peek":
            assert reader.peek().seq == 2
        elif call != "get":
            item = reader.receive()
            with pytest.raises(BadItem):
                item.meta if call == "meta" else item.array  # noqa: B018
        assert (reader.get(timeout=20) == 1).all()
    (letter,) = failed_list(url)
    assert (letter.seq, bool(letter.damage)) == (1, True)
    assert list(failed_retry(url).damaged) == [1]


def test_pieces_that_are_missing_or_overlap_cost_that_item_only_and_those_of_nobody_none(
    server: Server, url: str
) -> None:
    name = url.rpartition("/")[2]
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        for number in range(4):
            message = Message((np.full(LARGE, number),), id=f"{number:032x}")
            writer._producer.put([message], time.monotonic() + 20)

        async def spoil(client: Any) -> None:
            api = f"$JS.API.STREAM.PURGE.spoolipc-{name}-items"
            await client.request(api, json.dumps({"filter": f"spoolipc.{name}.chunk.{0:032x}"}).encode())
            await client.request(f"spoolipc.{name}.chunk.{1:032x}", b"more", headers={"Spool-At": "8"})
            for at in ("", "-8", "0", "2400128", "9" * 40, "x"):
                headers = {"Spool-At": at} if at else None
                await client.request(f"spoolipc.{name}.chunk.{2:032x}", b"more", headers=headers)

        on(server, spoil)
        assert [int(reader.get(timeout=20)[0]) for _ in range(2)] == [2, 3]
        assert reader.empty()
    assert ["pieces have" in letter.damage for letter in failed_list(url)] == [True, True]


def test_requeued_item_that_another_thread_of_the_reader_has_at_once_is_its(url: str) -> None:
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put(np.ones(3))
        item, consumer, again = reader.receive(timeout=20), reader._consumer, []
        asked = consumer.link.call  # type: ignore[attr-defined]

        async def call(subject: str, payload: bytes = b"", *rest: Any) -> Any:
            reply = await asked(subject, payload, *rest)
            if payload.startswith(b"-NAK"):
                again.extend(await consumer._claim(1, None, time.monotonic() + 20))  # type: ignore[attr-defined]
            return reply

        consumer.link.call = call  # type: ignore[attr-defined]
        item.nack()
        assert [held.attempt for held in again] == [2]
        assert consumer.held == {1: again[0].handle.held}  # type: ignore[attr-defined]


@pytest.mark.parametrize("there", [0, 1, 2])
def test_pieces_that_servers_do_not_have_yet_are_asked_for_again(url: str, there: int) -> None:
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put(np.arange(LARGE))
        link, answers = reader._consumer.link, []  # type: ignore[attr-defined]
        asked, told, asked_leaders = link.read, link.api, []

        async def read(stream: str, subject: str, *rest: Any) -> Any:
            number = 0
            if ".chunk." in subject:
                answers.append(subject)
            async for msg in asked(stream, subject, *rest):
                number += 1
                if ".chunk." not in subject or len(answers) > 2 or number <= there:
                    yield msg

        async def api(what: str, *rest: Any, **how: Any) -> Any:
            info = await told(what, *rest, **how)
            if "subjects_filter" in (rest[0] if rest else {}) and ".chunk." in rest[0]["subjects_filter"]:
                asked_leaders.append(what)
                if len(asked_leaders) == 1:  # it was cut off before the item came
                    info["state"] |= {"last_seq": 0, "subjects": {}}
            return info

        link.read, link.api = read, api
        assert (reader.get(timeout=20) == np.arange(LARGE)).all()
        assert (len(answers), len(asked_leaders)) == (3, 2)


def test_value_of_a_queue_is_not_taken_by_who_takes_arrays(url: str) -> None:
    """It was forwarded here."""
    value = Message((np.zeros(3, np.uint8),), ())
    with SpoolWriter(url, max_attempts=0) as writer, SpoolReader(url) as reader:
        writer._producer.put([Message((np.ones(3),)), value, Message((np.ones(4),))], time.monotonic() + 20)
        assert [array.size for array in reader.get_many(9)] == [3]
        with pytest.raises(UnsupportedItem, match=r"item 2 .* a value"):
            reader.get(timeout=20)
        assert reader.qsize() == 2
        values = connect(url).consumer(ConsumerOptions(values=True))
        assert () in [message.names for message in values.take(9, time.monotonic() + 20)]
        values.close()


@pytest.mark.parametrize("data", ["{", "[]", '{"attempt": "x", "state": 3, "due": null, "history": 5}'])
def test_bad_note_of_failures_stops_nobody(server: Server, data: str) -> None:
    name = f"bad-note-{len(data)}"
    with SpoolWriter(server.url(name)) as writer, SpoolReader(server.url(name)) as reader:
        writer.put(np.ones(3))
        reader.receive().nack()
        on(server, lambda client: client.request(f"spoolipc.{name}.failed.1", data.encode()))
        assert reader.qsize() in (0, 1)
        item = reader.receive(timeout=20)
        assert item.attempt == 2
        item.ack()
        assert reader.empty()


def test_a_lease_that_ends_is_noted_once_whoever_finds_out(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put(np.zeros(3))
        item = reader.receive()
        consumer: Any = reader._consumer
        noted: list[int] = []
        write = consumer.spool.write_failed

        async def writing(seq: int, note: Any) -> None:
            noted.append(seq)
            await write(seq, note)

        async def look_all() -> None:
            next(iter(consumer.held.values())).due = 0.0
            held = [*consumer.held.values()]
            await asyncio.gather(consumer._expire(), consumer._expire(), consumer._drop(held))

        monkeypatch.setattr(consumer.spool, "write_failed", writing)
        consumer.do(look_all())
        assert noted == [item.seq]
        with pytest.raises(LeaseExpired):
            item.ack()
