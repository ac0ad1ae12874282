"""Backups, copies and moves of a spool that is in use."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
from support.arrays import drained
from support.peer import Peer

from spoolipc import SpoolReader, SpoolWriter, failed_list, fsck, gc, stat

SIZE = 20_000


def test_a_backup_by_hard_links_keeps_what_it_had_and_the_spool_goes_on(spool: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader, SpoolReader(spool) as holder:
        writer.put_many([np.full(SIZE, n) for n in range(7)])
        reader.get()
        reader.receive().reject("no")
        item = holder.receive()
        subprocess.run(["cp", "-al", spool, backup], check=True)
        assert stat(spool).depth == 4
        writer.put(np.full(SIZE, 7))
        assert drained(reader) == [3, 4, 5, 6, 7]
        for number in range(8, 14):
            writer.put(np.full(SIZE, number))
            assert drained(reader) == [number]
        late = threading.Timer(
            0.1, lambda: writer.put(np.full(SIZE, 14))
        )  # to a session that the backup has linked
        late.start()
        assert int(reader.get(timeout=20)[0]) == 14
        late.join()
        item.ack()
        assert failed_list(spool)[0].reason == "no"
        writer.shutdown()
    with SpoolReader(spool) as reader:
        assert reader.qsize() == 0
    gc(spool)
    with SpoolReader(backup) as reader:
        assert drained(reader) == [2, 3, 4, 5, 6]
    assert failed_list(backup)[0].reason == "no"
    shutil.rmtree(backup)
    assert fsck(spool).problems == ()


def test_a_backup_of_a_spool_that_was_shut_down_keeps_nobody_from_it(spool: Path, tmp_path: Path) -> None:
    with SpoolWriter(spool) as writer:
        writer.put_many([np.full(SIZE, n) for n in range(3)])
        writer.shutdown()
    subprocess.run(["cp", "-al", spool, tmp_path / "backup"], check=True)
    for path in (spool, tmp_path / "backup"):
        with SpoolReader(path) as reader:
            assert [int(array[0]) for array in reader] == [0, 1, 2]
    shutil.rmtree(tmp_path / "backup")


def test_a_copy_of_a_spool_in_use_holds_whole_items_once_it_is_repaired(spool: Path, tmp_path: Path) -> None:
    with Peer(spool) as peer:
        peer.run(
            "writer, reader = SpoolWriter(path, checksum=True), SpoolReader(path)\n"
            "writer.put_many([np.zeros(20000)] * 20)"
        )
        peer.run("import threading; ended = threading.Event(); ring = lambda n: reader.get()")
        traffic = "while not ended.is_set():\n for n in range(5): writer.put(np.full(20000, n))\n reader.get_many(5)"
        peer.run(f"def traffic():\n {traffic!s}".replace("\n ", "\n  ").replace("  while", " while"))
        peer.run("thread = threading.Thread(target=traffic); thread.start()")
        found = 0
        for number in range(10):
            copy = tmp_path / f"copy{number}"
            subprocess.run(["cp", "-a", spool, copy], check=False, stderr=subprocess.DEVNULL)
            left = {problem.kind for problem in fsck(copy, repair=True).problems if not problem.repaired}
            assert left <= {"orphan"}  # a file in free/, which costs space only
            with SpoolReader(copy) as reader:
                found += len(drained(reader))
            shutil.rmtree(copy)
        peer.run("ended.set(); thread.join()")
    assert found


def test_who_has_a_spool_open_goes_on_where_it_was_moved_to(spool: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
        writer.put(np.full(SIZE, 1))
        spool.rename(moved)
        assert drained(reader) == [1]
        late = threading.Timer(0.1, lambda: writer.put(np.full(SIZE, 2)))
        late.start()
        assert int(reader.get(timeout=20)[0]) == 2
        late.join()
        with SpoolReader(moved) as newcomer:
            writer.put(np.full(SIZE, 3))
            assert int(newcomer.get(timeout=20)[0]) == 3
    assert fsck(moved).problems == ()
    assert not os.path.lexists(spool)
