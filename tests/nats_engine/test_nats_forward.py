"""The forwarder moves each item once, whoever is killed when."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.forwards import drained, fill

from nats_engine.server import Server
from spoolipc import (
    NotASpool,
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

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["spoolipc.forward", "spoolipc.directory", "spoolipc.nats"])


@pytest.fixture
def place(server: Server, tmp_path: Path) -> Callable[[str, str], str]:
    """The path of a directory, or the URL of a spool on a server."""
    return lambda where, name: str(tmp_path / name) if where == "directory" else server.url(name)


@pytest.mark.parametrize(
    ("kills", "count", "taken"),
    [
        (8, 400, True),
        *(pytest.param(50, 2000, taken, marks=pytest.mark.exhaustive) for taken in (False, True)),
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
        process = PROCESSES.Process(target=forward, args=(source, destination), kwargs={"rate": 3e6})
        process.start()
        process.join(dice.uniform(0.05, 0.8))
        process.kill()
        process.join()
        if taken and dice.random() < 0.5:
            with suppress(NotASpool):
                stat(destination)
                found += drained(destination)
    deadline = time.monotonic() + 30
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

        async def as_before(source: str) -> Any:
            return before

        one._producer.put_forwarded("there", [first], NOW)  # type: ignore[attr-defined]
        two._producer._forwarded = as_before  # type: ignore[attr-defined]
        with pytest.raises(SpoolInUse, match="another process forwards"):
            two._producer.put_forwarded("there", [second], NOW)  # type: ignore[attr-defined]
    assert stat(destination).depth == 1


def test_forwarder_waits_for_room_and_for_servers_that_come_back(tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        source, destination = str(tmp_path / "source"), server.url("waits")
        ids = fill(source, 5)
        SpoolWriter(destination, maxsize=2).close()
        process = PROCESSES.Process(target=partial(forward, source, destination, until_empty=True))
        process.start()
        found: list[str] = []
        with SpoolReader(destination) as reader:
            for _ in ids:
                found.append(reader.take(timeout=60).id)
                server.stop()
                server.start()
        process.join(60)
        assert (process.exitcode, found) == (0, ids)
    finally:
        server.stop()


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
