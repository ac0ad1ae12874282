"""The forwarder moves each item once, whoever is killed when."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import nats
import numpy as np
import pytest
from support.forwards import drained, fill
from support.peer import FORKSERVER
from support.waits import until

from nats_engine.server import Server, free_port
from spoolipc import (
    NotASpool,
    Queue,
    SpoolInUse,
    SpoolReader,
    SpoolWriter,
    failed_list,
    forward,
    purge,
    stat,
)
from spoolipc.cli.main import main
from spoolipc.message import NOW, Message
from spoolipc.nats.access import Guarded
from spoolipc.nats.link import PATIENCE, Link
from spoolipc.nats.producer import NatsProducer


@pytest.fixture
def place(server: Server, tmp_path: Path) -> Callable[[str, str], str]:
    """The path of a directory, or the URL of a spool on a server."""
    return lambda where, name: str(tmp_path / name) if where == "directory" else server.url(name)


@pytest.mark.parametrize(
    ("kills", "count", "taken"),
    [
        (8, 400, True),
        *(pytest.param(50, 1000, taken, marks=pytest.mark.exhaustive) for taken in (False, True)),
    ],
)
@pytest.mark.parametrize("to", ["directory", "server"])
@pytest.mark.parametrize("origin", ["directory", "server"])
def test_forwarder_killed_at_random_loses_and_doubles_nothing(
    place: Callable[[str, str], str], origin: str, to: str, kills: int, count: int, taken: bool
) -> None:
    """Whether or not what has arrived is taken meanwhile. A server takes some seconds to see that one is dead."""
    source = place(origin, f"from-{origin}-{to}-{taken}-{kills}")
    destination = place(to, f"to-{origin}-{to}-{taken}-{kills}")
    ids = fill(source, count)
    dice = random.Random(kills)
    found: list[str] = []
    for _ in range(kills):
        process = FORKSERVER.Process(target=forward, args=(source, destination), kwargs={"rate": 3e6})
        process.start()
        process.join(dice.uniform(0.05, 0.8))
        process.kill()
        process.join()
        if taken and dice.random() < 0.5:
            with suppress(NotASpool):
                stat(destination)
                found += drained(destination)
    deadline = time.monotonic() + 120
    while stat(source).depth + stat(source).in_flight:
        forward(source, destination, until_empty=True)
        assert time.monotonic() < deadline
    found += drained(destination)
    assert sorted(found) == ids


def test_item_that_was_put_and_not_acknowledged_is_not_put_again(server: Server, tmp_path: Path) -> None:
    """Also when the server's window for duplicates has passed."""
    source, destination = str(tmp_path / "source"), server.url("once")
    ids = fill(source, 5)
    with SpoolWriter(destination) as writer, SpoolReader(source) as reader:
        claimed = reader._consumer.claim(3, None, NOW)
        messages = [reader._consumer.load(each) for each in claimed]
        consumer: Any = reader._consumer
        producer: Any = writer._producer
        assert producer.put_forwarded(consumer.name(), messages, NOW) == 3
        assert producer.put_forwarded(consumer.name(), messages, NOW) == 3
        assert list(producer.forwarded(consumer.name()).put) == ids[:3]
        assert purge(destination) == 3  # and with it what the window for duplicates would go by
    assert forward(source, destination, until_empty=True) == 2
    assert drained(destination) == ids[3:]


def test_two_forwarders_of_one_source_do_not_both_go_on(server: Server) -> None:
    destination = server.url("two")
    with SpoolWriter(destination) as one, SpoolWriter(destination) as two:
        first, second = (Message((np.zeros(3),), id=f"{number:032x}") for number in (1, 2))
        read = two._producer._forwarded  # type: ignore[attr-defined]
        before = two._producer.do(read("there"))  # type: ignore[attr-defined]
        one._producer.put_forwarded("there", [first], NOW)  # type: ignore[attr-defined]
        two._producer._records["there"] = before  # type: ignore[attr-defined]
        with pytest.raises(SpoolInUse, match="another process forwards"):
            two._producer.put_forwarded("there", [second], NOW)  # type: ignore[attr-defined]
    assert stat(destination).depth == 1


def test_forwarder_waits_for_room_and_for_servers_that_come_back(tmp_path: Path) -> None:
    """Stopped while nothing is stored: a server alone that is ended amid a batch may keep a part of it."""
    server = Server(tmp_path)
    try:
        source, destination = str(tmp_path / "source"), server.url("waits")
        ids = fill(source, 5)
        SpoolWriter(destination, maxsize=2).close()

        def is_filled(count: int) -> bool:
            return stat(destination).depth == count

        process = FORKSERVER.Process(target=partial(forward, source, destination, until_empty=True))
        process.start()
        found: list[str] = []
        with SpoolReader(destination) as reader:
            for left in reversed(range(5)):
                found.append(reader.take(timeout=60).id)
                until(partial(is_filled, min(2, left)))
                server.stop()
                server.start()
        process.join(60)
        assert (process.exitcode, found) == (0, ids)
    finally:
        server.stop()


def check_one_by_one(destination: str) -> None:
    """Put three forwarded items, one at a time: each arrives once."""
    ids = [f"{number:032x}" for number in range(1, 4)]
    with SpoolWriter(destination) as writer, SpoolReader(destination) as reader:
        producer: Any = writer._producer
        for number in ids:
            assert producer.put_forwarded("there", [Message((np.zeros(3),), id=number)], NOW) == 1
        assert [reader.take(timeout=20).id for _ in ids] == ids
        assert reader.empty()


def test_record_that_was_removed_by_a_request_that_was_not_answered_is_no_fault(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server began again amid it."""
    real, lost = Link.answers, list[str]()

    async def answers(self: Any, requests: Any) -> Any:
        requests = list(requests)
        found = await real(self, requests)
        if "MSG.DELETE" in requests[0].subject and len(lost) < 1:
            lost.append(requests[0].subject)
            return ["the connection is lost"]
        return found

    monkeypatch.setattr(Link, "answers", answers)
    check_one_by_one(server.url("removed"))
    assert len(lost) == 1


def test_batch_that_a_server_has_a_part_of_is_sent_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began again when the first messages were sent."""
    real, lost = Link.send, list[str]()

    async def send(self: Any, subject: str, payload: Any = b"", reply: str = "", headers: Any = None) -> None:
        if headers and headers.get("Nats-Batch-Sequence") == "1" and len(lost) < 1:
            lost.append(subject)
            return
        await real(self, subject, payload, reply, headers)

    monkeypatch.setattr(Link, "send", send)
    check_one_by_one(server.url("part"))
    assert len(lost) == 1


def test_spool_on_servers_is_not_forwarded_to_itself_by_another_name_of_its_server(server: Server) -> None:
    url = server.url("itself")
    fill(url, 3)
    with pytest.raises(ValueError, match=r"both source and destination, as .* is the same spool"):
        forward(url, url.replace("127.0.0.1", "localhost"), until_empty=True)
    assert stat(url).depth == 3


@pytest.mark.parametrize(("first", "second"), [("server", "server"), ("directory", "server")])
def test_item_that_comes_round_is_another_one(
    place: Callable[[str, str], str], first: str, second: str
) -> None:
    one, other = place(first, f"round-{first}"), place(second, f"trip-{first}")
    ids = fill(one, 12)
    for origin, to in [(one, other), (other, one)] * 2:
        assert forward(origin, to, until_empty=True) == 12
        assert (stat(origin).depth, stat(to).depth) == (0, 12)
    assert drained(one) == ids


def test_what_is_claimed_on_servers_and_not_put_goes_back_without_an_attempt(
    server: Server, tmp_path: Path
) -> None:
    url = server.url("unclaimed")
    ids = fill(url, 6)
    stop = threading.Event()
    for number in range(2):
        stop.clear()
        assert forward(url, tmp_path / "to", moved=lambda _, __: stop.set(), stop=stop, max_bytes=1) == 1
        assert stat(url).depth == 5 - number
    with SpoolReader(url) as reader:
        found = [reader.receive() for _ in range(4)]
        assert [(each.id, each.attempt) for each in found] == [(each, 1) for each in ids[2:]]


def test_forwarder_that_is_to_stop_while_its_source_hangs_ends_without_giving_back(tmp_path: Path) -> None:
    own, destination = Server(tmp_path), tmp_path / "to"
    try:
        fill(own.url("hung"), 3)
        SpoolWriter(destination, maxsize=1).close()
        stop = threading.Event()
        running = threading.Thread(target=forward, args=(own.url("hung"), destination), kwargs={"stop": stop})
        running.start()
        until(lambda: destination.exists() and stat(destination).depth == 1)
        until(lambda: stat(own.url("hung")).in_flight == 2)
        own.hang()
        stop.set()
        running.join(PATIENCE - 5)
        assert not running.is_alive()
    finally:
        own.go()
        own.stop()


def test_servers_whose_disk_is_full_are_waited_for(tmp_path: Path) -> None:
    config = f'jetstream {{ store_dir: "{tmp_path}/small", max_file_store: 20MB }}'
    own = Server(tmp_path, config)
    try:
        url, source = own.url("small"), tmp_path / "source"
        with SpoolWriter(source) as writer:
            for number in range(50):
                writer.put(np.full(100_000, number))
        stop = threading.Event()
        running = threading.Thread(target=forward, args=(source, url), kwargs={"stop": stop})
        running.start()
        try:
            with SpoolReader(url) as reader:
                for number in range(50):
                    assert (reader.get(timeout=100) == number).all()
        finally:
            stop.set()
            running.join()
        assert (stat(source).depth, stat(source).failed) == (0, 0)
    finally:
        own.stop()


def test_item_that_cannot_be_read_is_a_dead_letter_of_the_source(server: Server, tmp_path: Path) -> None:
    source, destination = str(tmp_path / "source"), server.url("unreadable")
    ids = fill(source, 3)
    (tmp_path / "source" / "items" / f"{2:020d}.npy").write_bytes(b"broken")
    assert forward(source, destination, until_empty=True, max_bytes=1) == 2
    assert drained(destination) == [ids[0], ids[2]]
    assert len(failed_list(source)) == 1


def test_command_moves_items_and_says_how_many(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, destination = str(tmp_path / "source"), server.url("command")
    fill(source, 3)
    assert main(["forward", source, destination, "--until-empty", "--rate", "1e9"]) == 0
    assert "moved 3 items" in capsys.readouterr().out
    assert stat(destination).depth == 3
    assert main(["forward", str(tmp_path / "none"), destination]) == 2


@pytest.mark.parametrize("away", ["source", "destination"])
def test_command_waits_for_servers_that_do_not_answer_when_it_begins_and_says_so(
    tmp_path: Path, away: str
) -> None:
    """Their name may be mistyped, or they may be away."""
    here, there = str(tmp_path / "here"), f"nats://127.0.0.1:{free_port()}/there"
    fill(here, 1)
    ends = (there, here) if away == "source" else (here, there)
    command = [sys.executable, "-m", "spoolipc", "forward", *ends]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            process.terminate()
            _, rest = process.communicate(timeout=60)
        finally:
            process.kill()
    assert said.startswith(f"spoolipc: {there}: cannot connect: ")
    assert said.endswith("; forwarding waits for it\n")
    assert (process.returncode, rest) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize(
    ("origin", "to"), [("server", "directory"), ("directory", "server"), ("server", "server")]
)
def test_kept_items_are_copied_once_and_stay(place: Callable[[str, str], str], origin: str, to: str) -> None:
    source, destination = place(origin, f"kept-{origin}-{to}"), place(to, f"copies-{origin}-{to}")
    ids = fill(source, 30)
    with SpoolReader(source) as reader:
        held = reader.receive(timeout=20)
        assert forward(source, destination, keep=True, until_empty=True, max_bytes=1000) == 30
        held.ack()
    assert drained(destination) == ids
    assert forward(source, destination, keep=True, until_empty=True) == 0
    assert drained(source) == ids[1:]


def test_several_arrays_values_and_metadata_pass_through_a_server(
    place: Callable[[str, str], str], tmp_path: Path
) -> None:
    first, server, last = place("directory", "first"), place("server", "between"), place("directory", "last")
    with SpoolWriter(first) as writer:
        writer.put(
            {"a": np.asfortranarray(np.ones((2, 3), "f4")), "b": np.arange(200_000)}, meta={"n": [1, None]}
        )
    with closing(Queue(path=first)) as queue:
        queue.put(("text", np.arange(3)))
    for source, destination in ((first, server), (server, last)):
        assert forward(source, destination, until_empty=True) == 2
    with SpoolReader(last) as reader:
        item = reader.take(timeout=20)
        assert item.meta == {"n": [1, None]}
        assert [(name, each.dtype, each.sum()) for name, each in item.arrays.items()] == [
            ("a", np.dtype("f4"), 6),
            ("b", np.dtype("i8"), 19999900000),
        ]
        assert item.arrays["a"].flags.f_contiguous
    with closing(Queue(path=last)) as queue:
        text, array = queue.get(timeout=20)
        assert (text, array.tolist()) == ("text", [0, 1, 2])


@pytest.mark.parametrize("small", [True, False])
def test_pieces_of_an_earlier_try_do_no_harm(server: Server, tmp_path: Path, small: bool) -> None:
    """Whoever sent them died before the item was one, or lost the connection."""
    source, destination = str(tmp_path / "source"), server.url(f"stray-{small}")
    ids = fill(source, 11)
    SpoolWriter(destination).close()
    number = ids[0 if small else 10]

    async def send() -> None:
        client = await nats.connect(server.url("").rstrip("/"))
        for _ in range(3):
            await client.jetstream().publish(f"spoolipc.stray-{small}.chunk.{number}", b"of an earlier try")
        await client.close()

    asyncio.run(send())
    assert forward(source, destination, until_empty=True) == 11
    assert drained(destination) == ids


def test_bytes_at_once_and_pieces_at_once_are_bounded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So memory is: what is on its way is in the source's files, and in as many pieces as are not acknowledged."""
    source, destination = str(tmp_path / "source"), server.url("bounded")
    with SpoolWriter(source) as writer:
        for _ in range(12):
            writer.put(np.zeros(5_000_000, "u1"))
    on_the_way, most, groups = dict[str, int](), 0, []
    publish, hear, put = Guarded.publish, Link._hear, NatsProducer.put_forwarded

    async def sent(self: Any, subject: str, payload: Any, reply: str, *rest: Any, **options: Any) -> None:
        nonlocal most
        if reply:
            on_the_way[reply] = len(payload)
            most = max(most, sum(on_the_way.values()))
        await publish(self, subject, payload, reply, *rest, **options)

    async def heard(self: Any, msg: Any) -> None:
        on_the_way.pop(msg.subject, None)
        await hear(self, msg)

    def grouped(self: Any, source: str, messages: Any, *rest: Any) -> int:
        groups.append(sum(message.nbytes for message in messages))
        return put(self, source, messages, *rest)

    monkeypatch.setattr(Guarded, "publish", sent)
    monkeypatch.setattr(Link, "_hear", heard)
    monkeypatch.setattr(NatsProducer, "put_forwarded", grouped)
    assert forward(source, destination, until_empty=True, max_bytes=11_000_000) == 12
    assert max(groups) < 11_000_000
    assert 8 << 20 < most <= 16 << 20


def test_servers_that_are_away_at_any_time_are_waited_for_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When it begins, and later, at either end; and nobody is asked more often than every so many seconds."""
    (tmp_path / "other").mkdir()
    one, other = Server(tmp_path), Server(tmp_path / "other")
    try:
        source, destination = one.url("away"), other.url("away")
        ids = fill(source, 4)
        other.stop()
        stop = threading.Event()
        waits: list[float] = []
        real = stop.wait
        stop.wait = lambda timeout=None: waits.append(timeout or 0) or real(min(timeout or 0, 0.3))  # type: ignore
        thread = threading.Thread(target=forward, args=(source, destination), kwargs={"stop": stop})
        thread.start()
        until(lambda: "waits for it" in caplog.text)
        until(lambda: len(waits) > 3)
        assert waits == sorted(waits)
        other.start()
        with SpoolReader(destination) as reader:
            found = [reader.take(timeout=60).id for _ in ids]
            one.stop()
            until(lambda: len(told(caplog)) >= 2, 60)
            one.start()
            with SpoolWriter(source) as writer:
                writer.put(np.zeros(3))
            assert reader.get(timeout=60).shape == (3,)
        until(lambda: caplog.text.count("goes on") == 2)
        one.stop()
        until(lambda: len(told(caplog)) >= 3, 60)  # another outage, though nothing came since
        one.start()
        until(lambda: caplog.text.count("goes on") == 3)
        stop.set()
        thread.join(60)
        assert not thread.is_alive()
        assert sorted(found) == ids
        said = told(caplog)
        assert len(said) == 3, said
        assert [str(each.port) in line for each, line in zip((other, one, one), said, strict=True)] == [
            True
        ] * 3
    finally:
        one.stop()
        other.stop()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "waits for it" in record.getMessage()]
