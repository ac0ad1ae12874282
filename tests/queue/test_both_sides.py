"""Both sides of a spool through one session: its descriptors, its waits, its unfinished tasks."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from support.peek import poke
from support.peer import Peer
from support.waits import until, until_asleep

from spoolipc import Limits, SpoolReader, SpoolWriter, fsck
from spoolipc.directory.pair import DirectoryPair
from spoolipc.message import NOW, Message

ITEM = Message((np.arange(10.0),))
LARGE = Message((np.ones(100_000),))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def both(spool: Path) -> Iterator[DirectoryPair]:
    with closing(DirectoryPair(spool, Limits())) as pair:
        yield pair


def test_both_sides_have_eight_descriptors_and_none_after_the_close(spool: Path) -> None:
    with closing(DirectoryPair(spool, Limits())) as pair:  # what is opened once in a process
        pair.consumer.qsize()
    before = descriptors()
    pair = DirectoryPair(spool, Limits())
    for _ in range(3):
        pair.producer.put([ITEM, LARGE], None)
        held = pair.consumer.take(2, NOW)
    assert descriptors() - before == 8
    pair.close()
    assert descriptors() == before
    assert (held[1].arrays[0] == 1).all()


@pytest.mark.usefixtures("no_look")
@pytest.mark.parametrize("kind", ["items", "space"])
def test_each_side_is_woken_for_what_it_waits_for(spool: Path, kind: str) -> None:
    with closing(DirectoryPair(spool, Limits(maxsize=1))) as pair, Peer(spool) as peer:
        for _ in range(3):  # whatever it waited for last
            pair.producer.put([ITEM], None)
            pair.consumer.take(1, None)
        waits = {
            "items": lambda: pair.consumer.take(1, None),
            "space": lambda: pair.producer.put([ITEM, ITEM], None),
        }
        thread = threading.Thread(target=waits[kind])
        thread.start()
        assert thread.native_id is not None
        until_asleep(os.getpid(), thread.native_id)
        peer.run("SpoolWriter(path).put(np.ones(3))" if kind == "items" else "SpoolReader(path).get()")
        thread.join(20)
        assert not thread.is_alive()


def test_what_is_in_flight_waits_again_when_both_leave(both: DirectoryPair, spool: Path) -> None:
    both.producer.put([ITEM, LARGE, LARGE], None)
    held = both.consumer.claim(2, None, NOW), both.consumer.take(1, NOW)
    both.producer.put([LARGE], None)
    both.close()
    assert fsck(spool).problems == ()
    with SpoolReader(spool) as reader:
        assert [reader.get_nowait().size for _ in range(3)] == [10, 100_000, 100_000]
    assert held


def test_a_forked_child_uses_both_sides_and_leaves_the_parents_alone(both: DirectoryPair) -> None:
    both.producer.put([LARGE], None)
    held = both.consumer.claim(1, None, NOW)
    child = os.fork()
    if not child:
        try:
            both.producer.put([ITEM], None)
            got = both.consumer.take(1, None)[0].arrays[0]
            both.close()
            os._exit(0 if got.size == 10 else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    both.producer.put([ITEM], None)
    assert both.consumer.take(1, NOW)[0].arrays[0].size == 10
    assert held


def test_a_task_is_unfinished_from_its_put_until_it_is_said_to_be_done(both: DirectoryPair) -> None:
    assert both.join(NOW)
    assert not both.task_done()
    both.producer.put([ITEM, ITEM], None)
    assert not both.join(NOW)
    both.consumer.take(2, NOW)
    assert not both.join(NOW)
    assert both.task_done()
    assert not both.join(NOW)
    assert both.task_done()
    assert both.join(NOW)
    assert not both.task_done()


@pytest.mark.usefixtures("no_look")
def test_who_joins_is_woken_by_the_last_task_done_of_another_process(
    both: DirectoryPair, spool: Path
) -> None:
    both.producer.put([ITEM, ITEM], None)
    with Peer(spool) as peer:
        peer.run("from spoolipc.directory.pair import DirectoryPair")
        peer.run("pair = DirectoryPair(path, Limits()); pair.consumer.take(2, 0.0)")
        joining = threading.Thread(target=both.join, args=(None,))
        joining.start()
        assert joining.native_id is not None
        until_asleep(os.getpid(), joining.native_id)
        assert peer.ask("pair.task_done()")
        assert joining.is_alive()
        assert peer.ask("pair.task_done()")
        until(lambda: not joining.is_alive())


def test_tasks_that_a_crash_left_are_forgotten_when_nobody_has_the_spool_open(spool: Path) -> None:
    with Peer(spool) as peer:
        peer.run("from spoolipc.directory.pair import DirectoryPair")
        peer.run("pair = DirectoryPair(path, Limits())")
        with SpoolWriter(spool) as writer:
            writer.put(np.ones(3))
            writer.put(np.ones(3))
        peer.run("pair.consumer.take(1, 0.0)")
        with closing(DirectoryPair(spool, Limits())) as beside:
            beside.consumer.take(1, NOW)
            assert beside.task_done()
            assert not beside.join(NOW), "the peer has one in work"
        peer.kill()
    with closing(DirectoryPair(spool, Limits())) as pair:
        assert pair.join(NOW)


@pytest.mark.damaged
def test_tasks_in_work_are_not_forgotten_with_a_damaged_index(
    both: DirectoryPair, spool: Path, unverified: None
) -> None:
    both.producer.put([ITEM] * 5, None)
    both.consumer.take(3, NOW)
    both.task_done()
    poke(spool, "queue_tail", 12345)
    both.producer.put([ITEM], None)
    both.consumer.take(3, NOW)
    assert [both.task_done() for _ in range(6)] == [True] * 5 + [False]
    assert both.join(NOW)
