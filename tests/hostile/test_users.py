"""Several users of one machine: who may open whose spool, groups that share one, and root who looks after all."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from support.damage import PARTS, USERS, item, picture, refused
from support.faults import Event, Injector, at, forked
from support.users import OTHER_USER, as_user, give_away, needs_root, peer_as

from spoolipc import (
    LimitMismatch,
    NoSuchItem,
    NotASpool,
    Queue,
    ReentrantCall,
    SpoolError,
    SpoolReader,
    SpoolWriter,
    UnsafeSpool,
    failed_drop,
    failed_list,
    failed_retry,
    failed_show,
    fsck,
    gc,
    stat,
)

LARGE = 100_000


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory that other users can reach: pytest's own are closed to them."""
    with TemporaryDirectory() as place:
        os.chmod(place, 0o711)
        yield Path(place)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Where a spool can be made that belongs to the group of the directory above."""
    place = tmp_path / "shared"
    place.mkdir()
    os.chown(place, OTHER_USER, OTHER_USER)
    place.chmod(0o2771)
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


@pytest.mark.damaged
class TestOtherUsers:
    pytestmark = needs_root

    def test_a_spool_of_another_user_is_refused(self, path: Path) -> None:
        give_away(path)
        refused(path, UnsafeSpool, "belongs to another user; use a path of your own", only=USERS)

    @pytest.mark.parametrize("part", PARTS)
    def test_a_part_that_belongs_to_another_user_is_refused(self, path: Path, part: str) -> None:
        os.chown(path / part, OTHER_USER, OTHER_USER)
        refused(path, UnsafeSpool, "belongs to another user")

    def test_a_spool_of_another_user_is_closed_to_us(self, path: Path) -> None:
        give_away(path)
        before = picture(path)

        def work() -> None:
            for call in (SpoolReader, SpoolWriter):
                with pytest.raises(UnsafeSpool, match=r"closed to you; .* mode=0o770"):
                    call(path)

        as_user(OTHER_USER + 1, OTHER_USER + 1, work)
        assert picture(path) == before

    def test_an_empty_directory_of_another_user_is_not_made_a_spool(self, tmp_path: Path) -> None:
        place = tmp_path / "spool"
        place.mkdir()
        os.chown(place, OTHER_USER, OTHER_USER)
        place.chmod(0o777)

        def work() -> None:
            with pytest.raises(
                UnsafeSpool, match=f"another user; give a path of your own, such as {place}/spool"
            ):
                SpoolWriter(place)
            SpoolWriter(place / "spool").close()

        as_user(OTHER_USER + 1, OTHER_USER + 1, work)
        assert os.listdir(place) == ["spool"]

    @pytest.mark.parametrize("umask", [0, 0o777])
    @pytest.mark.parametrize("mode", [0o700, 0o770])
    def test_no_umask_keeps_a_user_from_his_own_spool(self, tmp_path: Path, umask: int, mode: int) -> None:
        tmp_path.chmod(0o777)

        def user() -> None:
            os.umask(umask)
            with (
                SpoolWriter(tmp_path / "spool", mode=mode) as writer,
                SpoolReader(tmp_path / "spool") as reader,
            ):
                writer.put_many([np.zeros(LARGE)] * 3)
                reader.receive().reject("no")
                reader.get()
                (tmp_path / "spool" / "tmp").rmdir()
            assert fsck(tmp_path / "spool", repair=True).clean
            with SpoolReader(tmp_path / "spool") as reader:
                assert len(reader.get()) == LARGE

        as_user(OTHER_USER, OTHER_USER, user)
        assert fsck(tmp_path / "spool").problems == ()

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


GROUP, FIRST, SECOND, THIRD = 20000, 20001, 20002, 20003
"""A group that is nobody's primary one, and three users in it."""


def as_member(work: Callable[[], object], user: int) -> None:
    as_user(user, user, work, [GROUP])


class TestGroups:
    pytestmark = needs_root

    @pytest.fixture
    def shared(self, shared: Path) -> Path:
        os.chown(shared.parent, 0, GROUP)
        shared.parent.chmod(0o2775)
        return shared

    @pytest.mark.parametrize("made", ["below a directory of the group", "by hand"])
    def test_a_spool_is_shared_with_a_group_that_is_nobodys_primary_one(
        self, shared: Path, made: str
    ) -> None:
        if made == "by hand":
            shared.parent.chmod(0o755)
            shared.mkdir()
            os.chown(shared, FIRST, GROUP)
            shared.chmod(0o755)

        def first() -> None:
            with SpoolWriter(shared, mode=0o770) as writer, SpoolReader(shared, mode=0o770) as reader:
                for number in range(4):
                    writer.put(np.full(LARGE, number))
                writer.put(np.full(10, 4))
                assert numbers(reader, 1) == [0]
                reader.receive().nack(reason="for a history")

        def second() -> None:
            with SpoolReader(shared, mode=0o770) as reader, SpoolWriter(shared, mode=0o770) as writer:
                assert numbers(reader, 4) == [1, 2, 3, 4]
                with writer.loan(LARGE) as lent:
                    lent[...] = 5
                writer.put(np.full(LARGE, 6))
                reader.receive().reject("no")
                writer.shutdown()

        def third() -> None:
            with SpoolReader(shared, mode=0o770) as reader:
                assert numbers(reader, 1) == [6]

        def outsider() -> None:
            with pytest.raises(SpoolError):
                SpoolReader(shared, mode=0o770)

        as_member(first, FIRST)
        as_member(second, SECOND)
        as_user(OTHER_USER, OTHER_USER, outsider)
        as_member(third, THIRD)
        assert fsck(shared).problems == ()
        for folder, folders, files in os.walk(shared):
            for place in (Path(folder), *(Path(folder, name) for name in (*folders, *files))):
                assert place.stat().st_gid == GROUP, place

    def test_what_a_member_pickles_opens_the_shared_spool_again(self, shared: Path) -> None:
        def member() -> None:
            with SpoolWriter(shared, mode=0o770) as writer, SpoolReader(shared, mode=0o770) as reader:
                with pickle.loads(pickle.dumps(writer)) as again:
                    again.put(np.full(10, 5))
                with pickle.loads(pickle.dumps(reader)) as again:
                    assert numbers(again, 1) == [5]
            queue = Queue(path=shared, mode=0o770)
            again = pickle.loads(pickle.dumps(queue))
            again.put(7)
            assert queue.get() == 7
            again.close()
            queue.close()

        as_member(lambda: SpoolWriter(shared, mode=0o770).close(), FIRST)
        as_member(member, SECOND)

    def test_what_a_member_has_in_flight_stays_his_until_he_crashes(self, shared: Path) -> None:
        with peer_as(shared, FIRST, [GROUP]) as owner, peer_as(shared, SECOND, [GROUP]) as member:
            owner.run("SpoolWriter(path, mode=0o770).put_many([np.full(9, n) for n in (1, 2)])")
            member.run("reader = SpoolReader(path, mode=0o770); item = reader.receive()")
            owner.run("reader = SpoolReader(path, mode=0o770)")
            assert owner.ask("int(reader.get_nowait()[0])") == 2
            assert owner.ask("spoolipc.gc(path).requeued_items") == 0
            member.kill()
            assert owner.ask("int(reader.get(timeout=5)[0])") == 1

    @pytest.mark.damaged
    @pytest.mark.parametrize("part", PARTS)
    def test_what_a_member_closes_to_the_others_stops_none_of_them(self, shared: Path, part: str) -> None:
        large = f"np.full({LARGE}, n)"
        with peer_as(shared, FIRST, [GROUP]) as owner, peer_as(shared, SECOND, [GROUP]) as member:
            owner.run("writer = SpoolWriter(path, mode=0o770)")
            member.run("reader = SpoolReader(path, mode=0o770); writer = SpoolWriter(path, mode=0o770)")
            member.run(f"writer.put_many([{large} for n in range(5)])")
            member.run("kept, item = reader.get(), reader.receive(); reader.receive().reject('no')")
            member.run("reader.receive().nack(reason='for a history')")
            member.run("open(path + '/tmp/00000000000000ff-1.npy', 'x').close()")
            owner.run(f"writer.put_many([{large} for n in (7, 8)])")
            own = f"os.scandir(path + '/{part}') if file.stat().st_uid == {SECOND}"
            assert member.ask(f"len([os.chmod(file, 0o600) for file in {own}])") > 0
            member.run("del kept; reader.qsize()")
            owner.run("reader = SpoolReader(path, mode=0o770)")
            got = owner.ask("[int(each[0]) for each in reader.get_many(9, timeout=5)]")
            assert got == ([7, 8] if part == "items" else [3, 4, 7, 8])
            owner.run(f"writer.put_many([{large} for n in (9, 10)])")
            owner.run(
                "spoolipc.gc(path), spoolipc.stat(path), spoolipc.fsck(path), os.unlink(path + '/index')"
            )
            letters = dict(owner.ask("[(each.seq, each.reason) for each in spoolipc.failed_list(path)]"))
            closed = f"damaged: closed to user {FIRST}: it belongs to user {SECOND} and has mode 600"
            assert letters == {
                3: "no" if part != "failed" else "unknown: its history is lost",
                **({4: closed, 5: closed} if part == "items" else {}),
            }
            got = owner.ask("[int(each[0]) for each in reader.get_many(9, timeout=5)]")
            assert got == ([9, 10] if part == "items" else [1, 9, 10])  # one was in flight, by the old index

    @pytest.mark.parametrize(("mode", "other"), [(0o770, None), (None, 0o770)])
    def test_started_together_they_leave_a_spool_that_can_be_opened_whatever_mode_each_wants(
        self, tmp_path: Path, mode: int | None, other: int | None
    ) -> None:
        for number in itertools.count(1):
            path = tmp_path / str(number)

            def meanwhile(_: Event, path: Path = path) -> None:
                with contextlib.suppress(ReentrantCall):  # within the lock nobody else gets on
                    open_it(path, other)

            with Injector(at(number, meanwhile)) as injector:
                open_it(path, mode)
            kept = json.loads((path / "spool.json").read_text())["mode"]
            with SpoolWriter(path, mode=kept) as writer:
                writer.put(np.zeros(3))
            assert fsck(path).problems == ()
            for place in (path, *(path / part for part in PARTS)):
                assert place.stat().st_mode & 0o777 == kept
            if number > len(injector.met):
                return


def open_it(path: Path, mode: int | None) -> None:
    with contextlib.suppress(LimitMismatch):  # where the other was first, and wanted another
        SpoolReader(path, mode=mode).close()


class TestRoot:
    pytestmark = needs_root

    @pytest.fixture(params=["", "in a directory closed to its owner"])
    def theirs(self, spool: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
        """A user's spool, left by a crash; whatever is done, all in it belongs to that user."""
        spool.mkdir()
        os.chown(spool, FIRST, FIRST)
        with peer_as(spool, FIRST) as peer:
            peer.run("writer, reader = SpoolWriter(path), SpoolReader(path)")
            peer.run("writer.put_many([np.full(20000, n) for n in range(6)])")
            peer.run("reader.receive().reject('no'); reader.receive().reject('no'); item = reader.receive()")
            peer.run("os.mknod(path + '/tmp/00000000000000ff-1.npy', 0o600)")
            peer.kill()
        if request.param:
            spool.parent.chmod(0o700)
        yield spool
        for folder, folders, files in os.walk(spool):
            for place in (Path(folder), *(Path(folder, name) for name in (*folders, *files))):
                assert (place.stat().st_uid, place.stat().st_gid) == (FIRST, FIRST), place
        spool.parent.chmod(0o711)
        with peer_as(spool, FIRST) as peer:
            peer.run("writer, reader = SpoolWriter(path), SpoolReader(path)")
            peer.run("writer.put(np.full(20000, 9))")
            assert peer.ask("reader.get_many(9)[-1].tolist()[0]") == 9
            peer.run("spoolipc.failed_drop(path); assert spoolipc.fsck(path).problems == ()")

    def test_looks_at_a_users_spool_and_changes_nothing(self, theirs: Path) -> None:
        before = picture(theirs)
        assert (stat(theirs).depth, stat(theirs).in_flight, stat(theirs).failed) == (3, 1, 2)
        assert [letter.reason for letter in failed_list(theirs)] == ["no", "no"]
        assert failed_show(theirs, 1).damage == ""
        assert fsck(theirs).problems == ()
        assert gc(theirs, dry_run=True).requeued_items == 1
        assert picture(theirs) == before

    def test_looks_after_a_users_spool_for_its_owner(self, theirs: Path) -> None:
        done = gc(theirs)
        assert (done.requeued_items, done.temporary_files) == (1, 1)
        assert list(failed_retry(theirs, [1]).seqs.values()) == [7]
        assert failed_drop(theirs) == [2]
        (theirs / "index").unlink()
        assert gc(theirs).index_rebuilt
        assert stat(theirs).depth == 5

    def test_repairs_a_users_spool_for_its_owner(self, theirs: Path) -> None:
        (theirs / item(4)).write_bytes(b"")
        (theirs / "index").unlink()
        (theirs / "failed" / f"{2:020d}.jsonl").unlink()
        (theirs / "tmp" / "00000000000000ff-1.npy").unlink()
        (theirs / "tmp").rmdir()
        theirs.chmod(0o777)
        found = fsck(theirs, repair=True)
        assert found.clean
        assert {problem.kind for problem in found.problems} == {"mode", "directory", "index", "item"}
        assert stat(theirs).failed == 3

    def test_does_not_open_it_as_a_reader_or_writer(self, theirs: Path) -> None:
        refused(theirs, UnsafeSpool, "belongs to another user; use a path of your own", only=USERS)
        assert stat(theirs).depth == 3

    @pytest.mark.damaged
    def test_touches_nothing_of_its_own_that_a_user_has_linked_into_a_spool(
        self, theirs: Path, tmp_path: Path
    ) -> None:
        mine = tmp_path / "mine"
        mine.write_bytes(b"root's own")
        mine.chmod(0o4755)
        os.link(mine, theirs / "items" / f"{7:020d}.npy")
        fsck(theirs, repair=True)
        gc(theirs)
        status = mine.stat()
        assert (status.st_uid, status.st_mode & 0o7777, mine.read_bytes()) == (0, 0o4755, b"root's own")
        for place in theirs.rglob(f"{7:020d}.npy"):
            place.unlink()
        mine.unlink()
        fsck(theirs, repair=True)

    def test_is_itself_again_afterwards(self, theirs: Path, tmp_path: Path) -> None:
        stat(theirs)
        with pytest.raises(NoSuchItem):
            failed_show(theirs, 99)
        with pytest.raises(NotASpool):
            stat(tmp_path / "none")
        (tmp_path / "made").touch()
        assert (tmp_path / "made").stat().st_uid == 0


@pytest.mark.parametrize("mode", [0o2770, 0o770])
def test_a_spool_whose_group_an_orchestrator_changed_is_told_one_remedy_which_helps(
    path: Path, mode: int
) -> None:
    for folder, _, files in os.walk(path):
        os.chmod(folder, mode)
        for name in files:
            os.chmod(Path(folder, name), 0o660)
    refused(path, UnsafeSpool, f"is open to others \\(mode {mode:o}\\); run: chmod -R go= {path}")
    subprocess.run(["chmod", "-R", "go=", path], check=True)
    assert fsck(path).problems == ()
    with SpoolReader(path) as reader:
        assert numbers(reader, 3) == [1, 2, 3]
