"""The index lock: what becomes of it when its file is removed, and how much a step does under it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from audit import party_of

from spoolipc import SpoolReader, SpoolWriter
from spoolipc import words as W


def forget_tending(face: SpoolWriter | SpoolReader) -> None:
    """Make the next step tend the spool, as it would after a second."""
    party_of(face).index.words[W.TENDED] = 0


def test_a_removed_lock_file_parts_old_and_new_parties_only_until_the_next_tending(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path / "s") as old, SpoolReader(tmp_path / "s") as reader:
        old.put(np.array(1))
        os.unlink(tmp_path / "s" / "index.lock")
        with SpoolWriter(tmp_path / "s") as new:
            for face in (old, reader, new):
                forget_tending(face)
                party_of(face).run(lambda party: None)
            forget_tending(reader)
            assert reader.get(timeout=5) == 1
            forget_tending(reader)
            old.put(np.array(2))
            new.put(np.array(3))
            assert [int(reader.get(timeout=5)) for _ in range(2)] == [2, 3]
            forget_tending(reader)
            old._sink.party.run(lambda party: party.lock.renewed(party.layout.root, 0o600))
            inodes = {os.fstat(party_of(face).lock.fd).st_ino for face in (old, reader, new)}
            assert inodes == {os.stat(tmp_path / "s" / "index.lock").st_ino}


def test_a_damaged_next_number_is_never_given_out(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path / "s") as writer, SpoolReader(tmp_path / "s") as reader:
        writer.put(np.array(1))
        writer.put(np.array(2))
        writer._sink.party.index.words[W.NEXT_SEQ] = 1
        assert writer.put(np.array(3)) == 3
        assert [int(reader.get(timeout=5)) for _ in range(3)] == [1, 2, 3]


def test_many_files_of_a_dead_reader_are_put_back_in_several_steps(tmp_path: Path) -> None:
    count = 600
    with SpoolWriter(tmp_path / "s") as writer, SpoolReader(tmp_path / "s") as reader:
        writer.put_many([np.array(number) for number in range(count)])
        dying = SpoolReader(tmp_path / "s")
        for _ in range(count):
            dying.receive(block=False)
        os.close(dying._source.party._alive)  # its lock is free now: it is dead
        dying._source.party._held.remove(dying._source.party._alive)
        forget_tending(reader)
        words = reader._source.party.index.words
        first = reader.receive(timeout=5)
        assert first.attempt == 2
        assert 0 < words[W.RETURNED_COUNT] < count - 1, "all of it was put back in one step"
        rest = [reader.receive(timeout=5) for _ in range(count - 1)]
        assert [int(item.array) for item in [first, *rest]] == list(range(count))
