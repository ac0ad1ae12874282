"""Odd places: containers with namespaces of their own, file systems that are read-only, paths that are strange."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.damage import crash, picture
from support.mounts import overlay, tmpfs
from support.peek import poke
from support.peer import Peer
from support.users import give_away

from spoolipc import (
    LeaseExpired,
    NotASpool,
    SpoolReader,
    SpoolWriter,
    StorageError,
    UnsupportedOperation,
    failed_drop,
    failed_list,
    failed_retry,
    failed_show,
    fsck,
    gc,
    remove,
    stat,
)
from spoolipc.cli.main import main

LARGE = 20_000
needs_mounts = [pytest.mark.fault, pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")]
needs_namespaces = [
    pytest.mark.fault,
    pytest.mark.skipif(
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-mT", "true"], capture_output=True, check=False).returncode != 0,
        reason="namespaces need root and unshare",
    ),
]


def container(path: Path, setup: str = "true", *options: str) -> Peer:
    """A process in namespaces of its own, mounts among them, after a line of shell was run there."""
    return Peer(path, "unshare", "-m", *options, "sh", "-c", f'{setup} && exec "$@"', "sh")


def of_boot(tmp_path: Path, number: int) -> str:
    """Lets a container have a boot id of its own."""
    place = tmp_path / f"boot{number}"
    place.write_text(f"00000000-0000-4000-8000-{number:012d}\n")
    return f"mount --bind {place} /proc/sys/kernel/random/boot_id"


WITHOUT_SYS = "mount -t proc -o subset=pid proc /proc"
WITHOUT_PROC = "mount -t tmpfs none /proc"


class TestContainers:
    pytestmark = needs_namespaces

    @pytest.mark.parametrize("kind", ["boot id", "no /proc/sys", "no /proc"])
    def test_those_with_another_boot_id_or_none_share_one_index(
        self, spool: Path, tmp_path: Path, kind: str
    ) -> None:
        setups = {
            "boot id": (of_boot(tmp_path, 1), of_boot(tmp_path, 2)),
            "no /proc/sys": (WITHOUT_SYS, WITHOUT_SYS),
            "no /proc": (WITHOUT_PROC, "true"),
        }[kind]
        with container(spool, setups[0]) as one, container(spool, setups[1]) as other:
            one.run("writer, reader = SpoolWriter(path), SpoolReader(path)")
            one.run(f"writer.put_many([np.full({LARGE}, n) for n in range(5)])")
            one.run("item = reader.receive(); reader.receive().nack(delay=3600)")
            inode = (spool / "index").stat().st_ino
            other.run("reader, writer = SpoolReader(path), SpoolWriter(path)")
            assert other.ask("int(reader.get_nowait()[0])") == 2
            for peer in (one, other):
                assert peer.ask("(stat(path).index_damage, stat(path).in_flight, stat(path).delayed)") == [
                    "",
                    1,
                    1,
                ]
                assert peer.ask("len(fsck(path).problems)") == 0
                peer.run("gc(path)")
                peer.run("SpoolReader(path).close()")
                assert peer.ask("int(reader.get_nowait()[0])") in (3, 4)
            one.run("item.ack()")
            assert (spool / "index").stat().st_ino == inode
            assert stat(spool).delayed == 1
            assert fsck(spool).problems == ()
        SpoolReader(spool).close()  # builds it again where the boot id is not ours

    @pytest.mark.parametrize("kind", ["boot id", "no /proc/sys"])
    def test_one_that_finds_nobody_there_builds_the_index_again_and_loses_no_item(
        self, spool: Path, tmp_path: Path, kind: str
    ) -> None:
        setup = of_boot(tmp_path, 1) if kind == "boot id" else WITHOUT_SYS
        with SpoolWriter(spool) as writer:
            writer.put_many([np.full(LARGE, n) for n in range(3)])
        for number in range(3):
            found = (spool / "index").stat().st_ino
            with container(spool, setup) as one:
                one.run("reader = SpoolReader(path)")
                is_known = kind == "boot id" and number > 0  # built in a container with this boot id
                assert ((spool / "index").stat().st_ino == found) == is_known
                assert one.ask("int(reader.get_nowait()[0])") == number
                one.run("reader.close()")
        SpoolReader(spool).close()
        assert stat(spool).depth == 0

    @pytest.mark.parametrize("seconds", [-60, 86400])
    def test_one_in_a_time_namespace_ends_no_lease_or_delay_early_or_late(
        self, spool: Path, seconds: int
    ) -> None:
        clocks = ("-T", "--monotonic", str(seconds), "--boottime", str(seconds))
        with container(spool, "true", *clocks) as other, SpoolWriter(spool) as writer:
            writer.put_many([np.full(LARGE, n) for n in range(6)])
            with SpoolReader(spool, lease=3600) as mine:
                kept = mine.receive()
                mine.receive().nack(delay=3600)
                other.run("reader = SpoolReader(path, lease=3600); item = reader.receive(); gc(path)")
                assert other.ask("int(item.array[0])") == 2
                other.run("reader.receive().nack(delay=3600)")
                gc(spool)
                assert int(mine.get_nowait()[0]) == 4
                assert (stat(spool).in_flight, stat(spool).delayed) == (2, 2)
                kept.ack()
                other.run("item.ack(); short = SpoolReader(path, lease=0.3); item = short.receive()")
                began = time.monotonic()
                late = mine.receive(timeout=20)
                assert int(late.array[0]) == 5
                assert time.monotonic() - began < 10
                late.nack()
            other.run("reader.close(); reader = SpoolReader(path, lease=3600)")
            assert other.ask("int((last := reader.receive(timeout=20)).array[0])") == 5
            with SpoolReader(spool, lease=0.3) as short:
                writer.put(np.full(LARGE, 6))
                lost = short.receive()
                assert other.ask("int((more := reader.receive(timeout=20)).array[0])") == 6
                with pytest.raises(LeaseExpired):
                    lost.ack()

    @pytest.mark.parametrize(
        "options",
        [("-p", "-f", "--kill-child", "--mount-proc"), ("-i", "-u", "-n", "-C"), ("-r",)],
        ids=" ".join,
    )
    def test_those_with_namespaces_of_their_own_share_a_spool(
        self, spool: Path, options: tuple[str, ...]
    ) -> None:
        with container(spool, "true", *options) as other, SpoolReader(spool) as reader:
            other.run("writer = SpoolWriter(path, maxsize=3); reader = SpoolReader(path)")
            other.run(f"writer.put_many([np.full({LARGE}, n) for n in range(3)])")
            assert int(reader.get()[0]) == 0
            other.run("item = reader.receive()")
            gc(spool)
            assert stat(spool).live_sessions == 3
            assert int(reader.get(timeout=5)[0]) == 2
            other.kill()
            assert int(reader.get(timeout=20)[0]) == 1

    def test_one_that_does_not_know_the_owner_is_refused_and_changes_nothing(self, spool: Path) -> None:
        SpoolWriter(spool).close()
        before = picture(spool)
        give_away(spool)
        with container(spool, "true", "-r") as other:
            for call in ("SpoolReader(path)", "SpoolWriter(path)", "stat(path)", "gc(path)"):
                other.run(f"try:\n {call}\nexcept SpoolError as error:\n said = str(error)")
                assert str(spool) in other.ask("said")
        give_away(spool, 0, 0)
        assert picture(spool) == before


class TestReadOnly:
    pytestmark = needs_mounts

    @pytest.fixture(params=["", "no index", "another boot"])
    def frozen(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
        """A spool on a file system that was made read-only after a crash."""
        with tmpfs(tmp_path / "disk", "64m") as disk:
            path = disk / "spool"
            crash(
                path,
                "writer, reader = SpoolWriter(path), SpoolReader(path); writer.put_many([np.zeros(20000)] * 4);"
                " reader.receive().reject('no'); item = reader.receive()",
            )
            if request.param == "no index":
                (path / "index").unlink()
            if request.param == "another boot":
                poke(path, "boot", 1)
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            yield path

    def test_it_can_be_looked_at(self, frozen: Path) -> None:
        found = stat(frozen)
        assert (found.depth + found.in_flight, found.failed) == (3, 1)
        assert [letter.reason for letter in failed_list(frozen)] == ["no"]
        assert failed_show(frozen, 1).damage == ""
        assert {problem.kind for problem in fsck(frozen).problems} <= {"index", "unknown", "orphan"}
        gc(frozen, dry_run=True)
        for command in ("stat", "fsck", "failed list"):
            assert main([*command.split(), str(frozen)]) in (0, 1)

    def test_all_else_is_a_clear_error(self, frozen: Path) -> None:
        calls: list[Callable[[Path], object]] = [SpoolReader, SpoolWriter, gc, failed_drop, failed_retry]
        for call in calls:
            with pytest.raises(StorageError, match=f"{frozen}: {os.strerror(errno.EROFS)}"):
                call(frozen)


class TestOverlay:
    """A spool in the lower layer of an overlay file system, as one that lies in a container's image: a file there keeps
    its device and inode when it is copied up, and who has it mapped goes on to see the copy below."""

    pytestmark = pytest.mark.fault

    @pytest.mark.parametrize("size", [100, 5000, 200_000])
    @pytest.mark.parametrize(
        "take",
        [
            "found = float(reader.get_nowait().mean())",
            "with reader.receive() as item: found = float(item.array.mean())",
        ],
        ids=["get", "receive"],
    )
    def test_items_of_the_lower_layer_and_later_ones_come_as_they_were_put(
        self, tmp_path: Path, size: int, take: str
    ) -> None:
        lower = tmp_path / "lower"
        with SpoolWriter(lower / "spool", checksum=True) as writer, SpoolReader(lower / "spool") as reader:
            writer.put_many([np.full(size, -number - 1.0) for number in range(6)])
            reader.get_many(2)
        expected = [-number - 1.0 for number in range(2, 6)]
        with overlay(tmp_path / "merged", lower) as merged, Peer(merged / "spool") as peer:
            peer.run("reader = SpoolReader(path, verify=False)")
            with SpoolWriter(merged / "spool", checksum=True) as writer:
                for number in range(40):
                    writer.put(np.full(size, float(number)))
                    expected.append(float(number))
                    peer.run(take)
                    assert peer.ask("found") == expected.pop(0)


class TestPaths:
    @pytest.mark.parametrize("name", ["sp\udcff ool", b"sp\xff ool", "a\\134b", "\u00e4 \n", "-v"])
    def test_any_name_is_a_path(self, tmp_path: Path, name: str | bytes) -> None:
        path = (
            os.fsdecode(tmp_path) + "/" + name
            if isinstance(name, str)
            else os.fsencode(tmp_path) + b"/" + name
        )
        with SpoolWriter(path) as writer, SpoolReader(path) as reader:  # type: ignore[arg-type]  # bytes work too
            writer.put_many([np.zeros(LARGE)] * 4)
            reader.receive().reject("no")
            assert len(reader.get()) == LARGE
            assert os.fsencode(reader.path) == os.fsencode(path)
            assert writer.full() is False
        look: list[Callable[..., object]] = [stat, gc, failed_list, failed_retry, failed_drop]
        for call in look:
            call(path)
        assert fsck(path).problems == ()  # type: ignore[arg-type]
        with SpoolReader(path) as reader:  # type: ignore[arg-type]
            assert reader.qsize() == 3

    def test_a_tilde_stands_for_itself_and_is_named_where_no_spool_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        for call in (stat, fsck, gc):
            with pytest.raises(NotASpool, match="/~/spool: there is no spool here; '~' was not expanded"):
                call("~/spool")
        assert os.listdir(tmp_path) == []
        SpoolWriter("~/spool").close()
        assert stat(tmp_path / "~" / "spool").depth == 0

    def test_a_relative_path_where_the_working_directory_was_removed_is_named_with_the_remedy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        for call in (SpoolWriter, SpoolReader, stat, gc, fsck, remove):
            with pytest.raises(NotASpool, match=r"^spool: is relative to .* give an absolute path"):
                call("spool")
        SpoolWriter(tmp_path / "spool").close()

    @pytest.mark.parametrize("inner", ["inner", "items/inner", "free/a/b"])
    @pytest.mark.parametrize("made", [False, True])
    def test_no_spool_is_made_inside_another(self, tmp_path: Path, inner: str, made: bool) -> None:
        outer = tmp_path / "outer"
        SpoolWriter(outer).close()
        if made:
            (outer / inner).mkdir(parents=True)
        before = sorted(outer.rglob("*"))
        for face in (SpoolWriter, SpoolReader):
            with pytest.raises(
                NotASpool, match=f"^{outer / inner}: is inside the spool {outer}; give a path outside of it"
            ):
                face(outer / inner)
        assert sorted(outer.rglob("*")) == before

    @pytest.mark.parametrize("call", [gc, fsck])
    def test_what_is_in_memory_has_no_files_to_look_after(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[str], object]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UnsupportedOperation, match="memory://x: is in the memory of this process"):
            call("memory://x")
        with pytest.raises(ValueError, match=r"'redis://x' is no URL that is known"):
            call("redis://x")

    @pytest.mark.fault
    @needs_namespaces[1]
    def test_a_mount_point_of_any_name_anywhere_keeps_nobody_from_a_spool(self, tmp_path: Path) -> None:
        names = r"'a b\377' '\134040' 'c\t\303\244\303'"
        mount = f'place="{tmp_path}/$(printf "$name")"; mkdir "$place" && mount -t tmpfs none "$place"'
        with container(tmp_path, f"for name in {names}; do {mount}; done") as other:
            other.run("import pathlib; places = [pathlib.Path(path), *pathlib.Path(path).iterdir()]")
            assert other.ask("len(places)") == 4
            other.run("for place in places: SpoolWriter(place / 'spool').put(np.zeros(9))")
            assert other.ask("[stat(place / 'spool').file_system for place in places][1:]") == ["tmpfs"] * 3
            assert other.ask("[stat(place / 'spool').depth for place in places]") == [1] * 4

    @pytest.mark.fault
    @needs_namespaces[1]
    def test_spool_is_not_forwarded_to_itself_by_another_mount(self, tmp_path: Path) -> None:
        (mounted := tmp_path / "mounted").mkdir()
        with container(
            tmp_path, f"mkdir {tmp_path}/source && mount --bind {tmp_path}/source {mounted}"
        ) as other:
            other.run("SpoolWriter(path + '/source').put(np.zeros(9))")
            other.run(
                "import spoolipc\n"
                "try: spoolipc.forward(path + '/source', path + '/mounted', until_empty=True)\n"
                "except ValueError as error: said = str(error)"
            )
            what = f"{tmp_path}/source is both source and destination, as {mounted} is the same spool"
            assert other.ask("said") == what
            assert other.ask("stat(path + '/source').depth") == 1
