"""Nothing planted in a spool is followed or written through, and no spool is used that others can reach."""

from __future__ import annotations

import os
import shutil
import stat as status
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.damage import PARTS, item, picture, refused
from support.peer import Peer
from support.users import needs_root

from spoolipc import (
    Empty,
    LimitMismatch,
    NotASpool,
    ShutDown,
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
SECRET = b"what nobody may write to or hand out" * 3000


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file outside, which is the same afterwards."""
    place = tmp_path / "victim"
    place.write_bytes(SECRET)
    place.chmod(0o640)
    yield place
    assert place.read_bytes() == SECRET
    assert place.stat().st_mode & 0o777 == 0o640


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A directory outside that nothing enters."""
    place = tmp_path / "elsewhere"
    place.mkdir(0o700)
    yield place
    assert os.listdir(place) == []


def clear(place: Path) -> None:
    """Remove a name with all below it."""
    if place.is_dir() and not place.is_symlink():
        for inner in place.iterdir():
            clear(inner)
        place.rmdir()
    else:
        place.unlink(missing_ok=True)


ZERO = os.makedev(1, 5)
"""A device: a read of it never ends."""
PLANTS: dict[str, Callable[[Path, Path], None]] = {
    "symlink": lambda place, victim: place.symlink_to(victim),
    "dangling symlink": lambda place, victim: place.symlink_to(victim.parent / "none"),
    "hard link": lambda place, victim: os.link(victim, place),
    "fifo": lambda place, victim: os.mkfifo(place, 0o600),
    "directory": lambda place, victim: place.mkdir(0o700),
    "socket": lambda place, victim: os.mknod(place, 0o600 | status.S_IFSOCK),
    "device": lambda place, victim: os.mknod(place, 0o600 | status.S_IFCHR, ZERO),
}
KINDS = [pytest.param(kind, marks=needs_root) if kind == "device" else kind for kind in PLANTS]


def plant(path: Path, name: str, kind: str, victim: Path) -> None:
    clear(path / name)
    PLANTS[kind](path / name, victim)


def numbers(reader: SpoolReader, count: int) -> list[int]:
    return [int(reader.get(timeout=5)[0]) for _ in range(count)]


@pytest.mark.damaged
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["get", "receive", "peek", "verify", "another process", "rebuild"])
def test_what_is_planted_at_an_items_name_costs_that_item_only(
    path: Path, victim: Path, kind: str, way: str
) -> None:
    plant(path, item(1), kind, victim)
    if way == "rebuild":
        (path / "index").unlink()
    if way == "another process":
        with Peer(path) as peer:
            peer.run("reader = SpoolReader(path)")
            assert peer.ask("[int(reader.get(timeout=5)[0]) for _ in range(2)]") == [2, 3]
    else:
        with SpoolReader(path, verify=way == "verify") as reader:
            if way == "peek":
                assert reader.peek(timeout=5).seq == 2
            if way == "receive":
                with pytest.raises(SpoolError), reader.receive(timeout=5) as one:
                    one.array  # noqa: B018
            assert numbers(reader, 2) == [2, 3]
            with pytest.raises(Empty):
                reader.get_nowait()
    assert [letter.seq for letter in failed_list(path)] == [1]
    assert stat(path).failed == 1
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        for _ in range(3):
            writer.put(np.full(LARGE, 5))
            assert numbers(reader, 1) == [5]


@pytest.mark.damaged
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["index", "spool.json", *PARTS])
def test_what_is_planted_at_a_name_of_the_spools_own_is_refused(
    path: Path, victim: Path, elsewhere: Path, name: str, kind: str
) -> None:
    if (kind == "directory" and name in PARTS) or (kind, name) == ("hard link", "index"):
        return  # that is what stands there, or is replaced
    plant(path, name, kind, elsewhere if name in PARTS and "symlink" in kind else victim)
    refused(path, SpoolError, str(path))
    before = picture(path)
    fsck(path)
    assert picture(path) == before


def test_a_hard_link_planted_at_the_index_is_replaced_and_not_written_through(
    path: Path, victim: Path
) -> None:
    plant(path, "index", "hard link", victim)
    assert stat(path).index_damage
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.put(np.full(LARGE, 4))
        assert numbers(reader, 4) == [1, 2, 3, 4]


@pytest.mark.damaged
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["index.new", "spool.json.new"])
def test_what_is_planted_at_the_name_of_a_replacement_is_not_written_through(
    path: Path, victim: Path, name: str, kind: str
) -> None:
    plant(path, name, kind, victim)
    (path / "index").unlink()
    if kind == "directory":
        with pytest.raises(SpoolError, match=str(path)):
            SpoolWriter(path, maxsize=100)
        (path / name).rmdir()
    with SpoolWriter(path, maxsize=100), SpoolReader(path) as reader:
        assert numbers(reader, 3) == [1, 2, 3]


@pytest.mark.damaged
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_planted_at_the_shutdown_marker_is_refused(path: Path, victim: Path, kind: str) -> None:
    plant(path, "shutdown", kind, victim)
    with SpoolWriter(path) as writer:
        with pytest.raises(UnsafeSpool, match="shutdown"):
            writer.shutdown()
        if kind == "hard link":  # as in a backup: it says that the spool was shut down
            with pytest.raises(ShutDown):
                writer.put(np.full(LARGE, 4))
            return
        writer.put(np.full(LARGE, 4))
    (path / "index").unlink()
    with pytest.raises(UnsafeSpool, match="shutdown"):
        SpoolReader(path)


@pytest.mark.damaged
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_planted_at_the_file_of_a_waiting_session_is_not_written_and_hangs_nobody(
    path: Path, victim: Path, kind: str
) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        assert numbers(reader, 3) == [1, 2, 3]
        for token in os.listdir(path / "alive"):
            plant(path / "alive", token, kind, victim)
        late = threading.Timer(0.05, lambda: writer.put(np.full(LARGE, 4)))
        late.start()
        assert numbers(reader, 1) == [4]
        late.join()
        writer.shutdown()


@pytest.mark.damaged
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_planted_in_free_is_never_written(path: Path, victim: Path, kind: str) -> None:
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        assert numbers(reader, 3) == [1, 2, 3]
        for number in range(4):
            writer.put(np.full(LARGE, number))
            assert numbers(reader, 1) == [number]
        pooled = os.listdir(path / "free")
        assert pooled
        for name in pooled:
            plant(path / "free", name, kind, victim)
        for number in range(4):
            writer.put(np.full(LARGE, 10 + number))
        with SpoolWriter(path) as other:
            other.put(np.full(LARGE, 20))
        assert int(reader.get_many(10, timeout=5)[-1][0]) == 20


@pytest.mark.damaged
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_planted_in_tmp_or_alive_stops_nobody(path: Path, victim: Path, kind: str) -> None:
    for name in ("tmp/00000000000000ff-1.npy", "tmp/x", "alive/00000000000000ff", "alive/x"):
        plant(path, name, kind, victim)
    with SpoolWriter(path) as writer, SpoolReader(path) as reader:
        writer.put(np.full(LARGE, 4))
        assert numbers(reader, 4) == [1, 2, 3, 4]
    stat(path)
    gc(path)
    fsck(path)


@pytest.mark.damaged
@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo"])
def test_what_is_planted_at_a_history_is_not_written_through(path: Path, victim: Path, kind: str) -> None:
    plant(path, f"failed/{1:020d}.jsonl", kind, victim)
    with SpoolReader(path) as reader:
        reader.receive(timeout=5).nack(reason="no")
        reader.receive(timeout=5).reject("no")
        assert numbers(reader, 2) == [2, 3]
    assert failed_list(path)[0].history == ()


def test_a_spool_that_is_a_symlink_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(NotASpool, match="symbolic link"):
        SpoolReader(tmp_path / "link")


@pytest.mark.parametrize("name", [".", *PARTS])
@pytest.mark.parametrize("mode", [0o777, 0o750, 0o701, 0o770])
def test_a_spool_open_to_others_is_refused_with_the_remedy(path: Path, name: str, mode: int) -> None:
    place = path / name
    place.chmod(mode)
    refused(path, UnsafeSpool, f"{place}: .*{mode:o}.*; run: chmod -R go= {path}$")
    subprocess.run(["chmod", "-R", "go=", path], check=True)
    with SpoolReader(path) as reader:
        assert numbers(reader, 3) == [1, 2, 3]


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
@pytest.mark.parametrize("mode", [0o700, 0o770])
def test_everything_made_has_the_mode_asked_for_whatever_the_umask(
    spool: Path, umask: int, mode: int
) -> None:
    old = os.umask(umask)
    try:
        with (
            SpoolWriter(spool, mode=mode, preallocate=(2, 8 * LARGE)) as writer,
            SpoolReader(spool, max_attempts=2) as reader,
        ):
            for size in (10, LARGE):
                for _ in range(3):
                    writer.put(np.zeros(size))
                    reader.get(timeout=5)
            with writer.loan(LARGE) as lent:
                lent[...] = 1
            reader.receive(timeout=5).reject("no")
            writer.put(np.zeros(LARGE))
            writer.put(np.zeros(10))
            (spool / "index").unlink()
            assert writer.qsize() == 2
            writer.shutdown()
            seen = {
                str(Path(folder, name).relative_to(spool)): Path(folder, name).lstat()
                for folder, folders, files in os.walk(spool)
                for name in (*folders, *files)
            }
    finally:
        os.umask(old)
    assert spool.stat().st_mode & 0o777 == mode
    assert {"spool.json", "index", "shutdown", *PARTS} <= set(seen)
    assert {Path(name).parts[0] for name in seen if "/" in name} >= {"alive", "failed", "items"}
    for name, found in seen.items():
        assert found.st_mode & 0o777 == (mode if status.S_ISDIR(found.st_mode) else mode & 0o666), name


def test_sharing_with_a_group_must_be_asked_for_when_the_spool_is_made(path: Path) -> None:
    with pytest.raises(LimitMismatch, match="mode"):
        SpoolWriter(path, mode=0o770)
    for mode in (0o777, 0o755, 0o600, 0o070, 0o1770):
        with pytest.raises(ValueError, match="mode must be"):
            SpoolWriter(path.parent / "other", mode=mode)
    assert not (path.parent / "other").exists()


NO_MOUNTS = (
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0
)
REFUSED = """
import sys; from pathlib import Path
from spoolipc import NetworkFileSystem, SpoolWriter; from support.damage import refused
path, table, *kinds = sys.argv[1:]
for kind in kinds:
    rows = "21 1 0:1 / / rw - ext4 /dev/root rw", f"22 21 0:2 / {path} rw shared:1 - {kind} server:/export rw"
    Path(table).write_text("\\n".join(rows) + "\\n")
    refused(Path(path), NetworkFileSystem, f"lies on a network file system .{kind}.*NATS")
    SpoolWriter(path + "-beside").close()  # the parent is local
"""


@pytest.mark.fault
@pytest.mark.skipif(NO_MOUNTS, reason="mounting over the mount table needs root and unshare")
def test_a_network_file_system_is_refused_and_the_remedy_named(path: Path, tmp_path: Path) -> None:
    (tmp_path / "mountinfo").touch()
    script = 'mount --bind "$0" /proc/$$/mountinfo && exec "$@"'
    table, kinds = str(tmp_path / "mountinfo"), ["nfs", "nfs4", "cifs", "9p", "fuse.sshfs"]
    command = [
        "unshare",
        "-m",
        "sh",
        "-c",
        script,
        table,
        sys.executable,
        "-c",
        REFUSED,
        str(path),
        table,
        *kinds,
    ]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
