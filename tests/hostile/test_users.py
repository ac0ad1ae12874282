"""Several users of one machine: who may open whose spool, groups that share one, and root who looks after all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.damage import PARTS, USERS, picture, refused
from support.users import OTHER_USER, as_user, forked, give_away, needs_root, reachable

from spoolipc import (
    Limits,
    NotASpool,
    SpoolError,
    SpoolReader,
    SpoolWriter,
    UnsafeSpool,
    failed_list,
    fsck,
    gc,
    stat,
)

LARGE = 100_000


@pytest.fixture
def path(spool: Path) -> Path:
    """A spool where items 1 to 3 wait."""
    with SpoolWriter(spool) as writer:
        for number in range(1, 4):
            writer.put(np.full(LARGE, number))
    return spool


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Where a spool can be made that belongs to the group of the directory above."""
    place = tmp_path / "shared"
    place.mkdir()
    os.chown(place, OTHER_USER, OTHER_USER)
    place.chmod(0o2771)
    reachable(place / "spool")
    return place / "spool"


def numbers(reader: SpoolReader, count: int) -> list[int]:
    return [int(reader.get(timeout=5)[0]) for _ in range(count)]


def say_mode(path: Path, mode: int) -> None:
    """Have spool.json say another mode, as its owner may."""
    said = json.loads((path / "spool.json").read_text())
    (path / "spool.json").write_text(json.dumps(said | {"mode": mode}))


@pytest.mark.damaged
@pytest.mark.parametrize("mode", [0o777, 0o755, 0o1700, 0o750, 0o600, 0])
def test_no_mode_but_0700_and_0770_is_taken_from_the_file(path: Path, mode: int) -> None:
    say_mode(path, mode)
    for place in (path, *(path / part for part in PARTS)):
        place.chmod(mode | 0o700)
    refused(path, NotASpool, "spool.json lacks a limit or has a bad one")


@pytest.mark.parametrize("limit", ["maxsize", "max_bytes", "recycle_bytes", "max_attempts"])
@pytest.mark.parametrize("number", [2**63, 2**64, 10**30])
def test_a_limit_too_large_for_the_table_is_refused_before_it_is_written(
    tmp_path: Path, limit: str, number: int
) -> None:
    with pytest.raises(ValueError, match=limit):
        SpoolWriter(tmp_path / "spool", limits=Limits(**{limit: number}))
    assert not (tmp_path / "spool").exists()
    SpoolWriter(tmp_path / "spool", limits=Limits(**{limit: 2**63 - 1})).close()
    SpoolReader(tmp_path / "spool").close()


@pytest.mark.damaged
class TestOtherUsers:
    pytestmark = needs_root

    def test_a_spool_of_another_user_is_refused(self, path: Path) -> None:
        give_away(path)
        refused(path, UnsafeSpool, "belongs to another user; use a path of your own")

    @pytest.mark.parametrize("part", PARTS)
    def test_a_part_that_belongs_to_another_user_is_refused(self, path: Path, part: str) -> None:
        os.chown(path / part, OTHER_USER, OTHER_USER)
        refused(path, UnsafeSpool, "belongs to another user")

    def test_a_spool_of_another_user_is_closed_to_us(self, path: Path) -> None:
        reachable(path)
        give_away(path)
        before = picture(path)

        def work() -> None:
            for call in (SpoolReader, SpoolWriter):
                with pytest.raises(SpoolError, match=f"Errno {errno.EACCES}"):
                    call(path)

        as_user(OTHER_USER + 1, OTHER_USER + 1, work)
        assert picture(path) == before

    def test_an_empty_directory_of_another_user_is_not_made_a_spool(self, tmp_path: Path) -> None:
        place = tmp_path / "spool"
        place.mkdir()
        reachable(place)
        os.chown(place, OTHER_USER, OTHER_USER)
        place.chmod(0o777)

        def work() -> None:
            with pytest.raises(UnsafeSpool, match="another user"):
                SpoolWriter(place)

        as_user(OTHER_USER + 1, OTHER_USER + 1, work)
        assert os.listdir(place) == []

    def test_a_shared_spool_of_another_user_is_used_only_by_who_asks_for_it(self, shared: Path) -> None:
        def owner() -> None:
            with SpoolWriter(shared, mode=0o770) as writer:
                writer.put(np.zeros(LARGE))

        def member() -> None:
            refused(
                shared,
                UnsafeSpool,
                "belongs to another user; if you share it, ask for mode=0o770",
                only=USERS,
            )
            assert stat(shared).depth == 1
            assert fsck(shared).clean
            assert gc(shared).foreign_files == 0
            assert failed_list(shared) == []
            SpoolReader(shared, mode=0o770).close()

        as_user(OTHER_USER, OTHER_USER, owner)
        as_user(OTHER_USER + 1, OTHER_USER, member)
        refused(shared, UnsafeSpool, "if you share it", only=USERS)

    def test_a_forked_child_goes_on_with_a_shared_spool_of_another_user(self, shared: Path) -> None:
        def member() -> None:
            with SpoolReader(shared, mode=0o770) as reader, SpoolWriter(shared, mode=0o770) as writer:
                forked(lambda: writer.put(np.full(10, 5)))
                assert numbers(reader, 1) == [5]

        as_user(OTHER_USER, OTHER_USER, SpoolWriter(shared, mode=0o770).close)
        as_user(OTHER_USER + 1, OTHER_USER, member)

    def test_a_group_shares_a_spool_made_for_it_and_nobody_else_does(self, shared: Path) -> None:
        def first() -> None:
            os.umask(0o077)
            with SpoolWriter(shared, mode=0o770) as writer, SpoolReader(shared) as reader:
                for number in range(3):
                    writer.put(np.full(LARGE, number))
                    writer.put(np.full(10, number))
                assert numbers(reader, 2) == [0, 0]

        def member() -> None:
            os.umask(0o077)
            with SpoolWriter(shared, mode=0o770) as writer, SpoolReader(shared, mode=0o770) as reader:
                assert numbers(reader, 2) == [1, 1]
                writer.put(np.full(LARGE, 7))
                reader.receive(timeout=5).nack()
                reader.receive(timeout=5).reject("no")
                writer.put(np.full(10, 8))

        def owner() -> None:
            with SpoolReader(shared) as reader, SpoolWriter(shared) as writer:
                assert numbers(reader, 3) == [2, 7, 8]
                writer.put(np.full(LARGE, 9))
                assert numbers(reader, 1) == [9]
            assert stat(shared).failed == 1

        def outsider() -> None:
            with pytest.raises(SpoolError):
                SpoolReader(shared, mode=0o770)

        as_user(OTHER_USER, OTHER_USER, first)
        as_user(OTHER_USER + 1, OTHER_USER, member)
        as_user(OTHER_USER, OTHER_USER, owner)
        as_user(OTHER_USER + 2, OTHER_USER + 2, outsider)
