"""The forwarder moves each item once, whoever is killed when."""

from __future__ import annotations

import multiprocessing
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nats_engine.server import Server
from spoolipc import (
    SpoolInUse,
    SpoolReader,
    SpoolWriter,
    UnsupportedOperation,
    failed_list,
    forward,
    purge,
    stat,
)
from spoolipc.cli.main import main
from spoolipc.message import NOW, Message

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["spoolipc.forward", "spoolipc.directory", "spoolipc.nats"])


def array_of(number: int) -> Any:
    """Every tenth is larger than a message."""
    return np.full((200_000 if number % 10 == 0 else 10), number)


def fill(place: str, count: int) -> list[str]:
    """Put so many items, which may be received as often as forwarders die; returns their ids."""
    ids = [f"{number:032x}" for number in range(1, count + 1)]
    with SpoolWriter(place, max_attempts=0) as writer:
        for number, each in enumerate(ids):
            writer._producer.put([Message((array_of(number),), None, {"number": number}, id=each)], None)
    return ids


def drained(place: str) -> list[str]:
    """The ids of what waits, each with the array and metadata that it was put with."""
    ids = []
    with SpoolReader(place) as reader:
        while not reader.empty():
            item = reader.take(timeout=20)
            assert (item.array == array_of(item.meta["number"])).all()
            ids.append(item.id)
    return ids


@pytest.mark.parametrize(
    ("kills", "count"), [(8, 400), pytest.param(50, 2000, marks=pytest.mark.exhaustive)], ids=str
)
@pytest.mark.parametrize("where", ["directory", "server"])
def test_forwarder_killed_at_random_loses_and_doubles_nothing(
    server: Server, tmp_path: Path, where: str, kills: int, count: int
) -> None:
    source = str(tmp_path / "source") if where == "directory" else server.url(f"killed-from-{kills}")
    destination = server.url(f"killed-{where}-{kills}")
    ids = fill(source, count)
    dice = random.Random(kills)
    for _ in range(kills):
        process = PROCESSES.Process(target=forward, args=(source, destination), kwargs={"rate": 3e6})
        process.start()
        process.join(dice.uniform(0.05, 0.8))
        process.kill()
        process.join()
    if where == "server":  # which takes some seconds to see that the last one is dead
        deadline = time.monotonic() + 30
        while stat(source).depth + stat(source).in_flight:
            forward(source, destination, until_empty=True)
            assert time.monotonic() < deadline
    else:
        forward(source, destination, until_empty=True)
    found = drained(destination)
    assert sorted(found) == ids
    assert where == "server" or found == ids
    assert stat(source).depth + stat(source).in_flight == 0


def test_item_that_was_put_and_not_acknowledged_is_not_put_again(server: Server, tmp_path: Path) -> None:
    """Also when the server's window for duplicates has passed."""
    source, destination = str(tmp_path / "source"), server.url("once")
    ids = fill(source, 5)
    with SpoolWriter(destination) as writer, SpoolReader(source) as reader:
        messages = [reader._consumer.load(each) for each in reader._consumer.claim(3, None, NOW)]
        assert writer._producer.put_forwarded(reader.path, messages, NOW) == 3  # type: ignore[attr-defined]
        assert writer._producer.put_forwarded(reader.path, messages, NOW) == 3  # type: ignore[attr-defined]
        assert purge(destination) == 3
    with SpoolWriter(destination) as writer:
        for (
            each
        ) in messages:  # put by others with other contents: the window for duplicates is not what decides
            assert each.id in writer._producer.forwarded(source)  # type: ignore[attr-defined]
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


def test_directory_is_refused_as_a_destination(tmp_path: Path) -> None:
    fill(str(tmp_path / "source"), 1)
    with pytest.raises(UnsupportedOperation, match="which items it has from where"):
        forward(tmp_path / "source", tmp_path / "destination")
