"""What `put` returned with `durability="fsync"` outlives the loss of power, whatever the file system kept.

A run is recorded: every change of a name and every fsync, with the contents of every file at that moment. Then, for
each of these moments, trees are built that a file system may have kept. What was synced is there: a file's contents
as of its last fsync, a directory's names as of its last. What was not may be there or not, name by name (so that of
a rename one half may be kept); contents never synced may be whole, cut off, zeros or nothing.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from support.faults import Event, Injector

from spoolipc import Empty, SpoolReader, SpoolWriter, failed_list, fsck, gc
from spoolipc.directory import fs, journal

Mode = Literal["least", "zeros", "most", "some"]
Names = dict[str, int]
SMALL = np.arange(300)
LARGE = np.arange(5_000)


@dataclass
class State:
    """What was there at one moment. Files and directories go by their inode number.

    synced, now: names of each directory as of its last fsync, and now. pending: changes of names since then, in
    order; a removal has no inode. kept, bytes: contents of each file as of its last fsync, None before the first,
    and now. returned: what the puts that had returned by then put. taken: what the gets that had begun took.
    """

    synced: dict[int, Names]
    now: dict[int, Names]
    pending: list[tuple[int, str, int | None]]
    kept: dict[int, bytes | None]
    bytes: dict[int, bytes]
    returned: list[int]
    taken: list[int]


@dataclass
class Recorder:
    """Takes note of the engine's calls that change names or sync, below `base`, which is synced itself."""

    base: Path
    states: list[State] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    synced: dict[int, Names] = field(default_factory=dict)
    now: dict[int, Names] = field(default_factory=dict)
    pending: list[tuple[int, str, int | None]] = field(default_factory=list)
    kept: dict[int, bytes | None] = field(default_factory=dict)
    _looks: dict[int, int] = field(default_factory=dict)
    _created = False

    def __post_init__(self) -> None:
        self.root = os.stat(self.base).st_ino
        self.synced[self.root], self.now[self.root] = {}, {}
        self._note()

    def before(self, event: Event) -> None:
        self._created = False
        if event.name == "open_at" and event.args[1] & os.O_CREAT:
            parent, entry = _parent(event.args[0], event.options.get("dir_fd"))
            self._created = parent in self.now and entry not in self.now[parent]

    def after(self, event: Event, result: Any) -> None:
        done = {
            "sync": lambda: self._sync(event.args[0]),
            "rename": lambda: self._rename(*event.args, **event.options),
            "unlink": lambda: self._unlink(*event.args, **event.options),
            "mkdir": lambda: self._mkdir(*event.args[:1], **event.options),
            "make_parents": lambda: self._make_parents(*event.args),
            "open_at": lambda: self._open(event.args[0], event.options.get("dir_fd"), result),
        }.get(event.name, lambda: False)()
        if done:
            self._note()

    def _rename(self, old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> bool:
        (source, old), (target, new) = _parent(old, src_dir_fd), _parent(new, dst_dir_fd)
        inode = self.now[source][old]
        self._change(source, old, None)
        self._change(target, new, inode)
        return True

    def _unlink(self, name: str, *, dir_fd: int) -> bool:
        self._change(*_parent(name, dir_fd), None)
        return True

    def _mkdir(self, name: str | Path, mode: int = 0, *, dir_fd: int | None = None) -> bool:
        inode = os.stat(name, dir_fd=dir_fd).st_ino
        self.synced[inode], self.now[inode] = {}, {}
        self._change(*_parent(name, dir_fd), inode)
        return True

    def _make_parents(self, path: Path) -> bool:
        places = [place for place in reversed(path.parents) if self.base in place.parents]
        new = [place for place in places if place.stat().st_ino not in self.now]
        for place in new:
            self._mkdir(place)
        return bool(new)

    def _open(self, name: str, dir_fd: int | None, fd: int) -> bool:
        if not self._created:
            return False
        inode = os.fstat(fd).st_ino
        self._looks[inode] = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        self.kept[inode] = None
        self._change(*_parent(name, dir_fd), inode)
        return True

    def _change(self, parent: int, name: str, inode: int | None) -> None:
        self.pending.append((parent, name, inode))
        _apply(self.now[parent], name, inode)

    def _sync(self, fd: int) -> bool:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            if status.st_ino not in self.now:
                return False
            self.synced[status.st_ino] = dict(self.now[status.st_ino])
            self.pending = [change for change in self.pending if change[0] != status.st_ino]
        elif status.st_ino in self.kept:
            self.kept[status.st_ino] = self._contents(status.st_ino)
        return True

    def _contents(self, inode: int) -> bytes:
        fd = self._looks[inode]
        return os.pread(fd, os.fstat(fd).st_size, 0)

    def _note(self) -> None:
        self.states.append(
            State(
                {inode: dict(names) for inode, names in self.synced.items()},
                {inode: dict(names) for inode, names in self.now.items()},
                list(self.pending),
                dict(self.kept),
                {inode: self._contents(inode) for inode in self._looks},
                list(self.returned),
                list(self.taken),
            )
        )

    def put(self, value: int, put: Callable[[], object]) -> None:
        """Note that a put of an array that begins with `value` has returned."""
        put()
        self.returned.append(value)
        self._note()

    def take(self, value: int, take: Callable[[], object]) -> None:
        """Note that `value` is being taken."""
        self.taken.append(value)
        take()
        self._note()

    def close(self) -> None:
        """End the recording, which must have seen every change: the names it knows are those that are there."""
        for fd in self._looks.values():
            os.close(fd)
        found: dict[int, Names] = {}
        for folder, folders, files in os.walk(self.base):
            inodes = {name: os.lstat(Path(folder, name)).st_ino for name in folders + files}
            found[os.stat(folder).st_ino] = inodes
        assert found == self.now


def _parent(path: str | os.PathLike[str], fd: int | None) -> tuple[int, str]:
    """The inode of the directory that a name is in, and the name."""
    folder, name = os.path.split(os.fspath(path))
    place = f"/proc/self/fd/{fd}/{folder}" if fd is not None else folder or "."
    return os.stat(place).st_ino, name


def _apply(names: Names, name: str, inode: int | None) -> None:
    if inode is None:
        names.pop(name, None)
    else:
        names[name] = inode


def build(state: State, root: int, place: Path, mode: Mode, rng: random.Random) -> None:
    """Make at `place` a tree that a file system may have kept of `state`."""
    names = {inode: dict(entries) for inode, entries in state.synced.items()}
    if mode == "most":
        names = state.now
    elif mode == "some":
        for parent, name, inode in state.pending:
            if rng.random() < 0.5:
                _apply(names[parent], name, inode)

    def contents(inode: int) -> bytes:
        now, kept = state.bytes[inode], state.kept[inode]
        if mode == "most":
            return now
        lost = [b"", bytes(len(now)), now[: rng.randrange(len(now) + 1)], now]
        if kept is not None:
            return kept if mode != "some" else rng.choice([kept, now])
        return rng.choice(lost) if mode == "some" else lost[mode == "zeros"]

    def fill(folder: Path, inode: int) -> None:
        folder.mkdir(mode=0o700)
        for name, child in names[inode].items():
            if child in state.now:
                fill(folder / name, child)
            else:
                (folder / name).write_bytes(contents(child))
                (folder / name).chmod(0o600)

    fill(place, root)


def waiting(path: Path) -> Iterator[Any]:
    """What a fresh reader gets."""
    with SpoolReader(path) as reader:
        while True:
            try:
                yield reader.get_nowait()
            except Empty:
                return


def whole(value: int) -> np.ndarray[Any, Any]:
    """What was put as `value`: the first element of what is put tells what it is."""
    return value + (SMALL if value % 2 else LARGE)


def work(recorder: Recorder, path: Path) -> None:
    """Puts of every kind, small and large, and gets of every kind."""

    def lend(value: int) -> None:
        with writer.loan(LARGE.shape, LARGE.dtype) as array:
            array[:] = whole(value)

    with SpoolWriter(path, durability="fsync", max_attempts=0) as writer, SpoolReader(path) as reader:
        for value in (1, 2):
            recorder.put(value, lambda value=value: writer.put(whole(value)))  # type: ignore[misc]
        recorder.put(4, lambda: lend(4))
        recorder.take(1, reader.get)
        recorder.put(3, lambda: writer.put(whole(3)))
        recorder.take(2, lambda: reader.receive().ack())
        reader.receive().nack(reason="not now")
        both = [whole(5), whole(6)]
        recorder.returned += [5, 6] if writer.put_many(both) else []
        recorder.put(8, lambda: writer.put(whole(8), meta={"last": True}))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("mode", ["least", "zeros", "most", "some"])
def test_what_a_synced_put_returned_is_whole_after_power_loss_at_any_moment(
    tmp_path: Path, mode: Mode
) -> None:
    base, tree = tmp_path / "base", tmp_path / "tree"
    base.mkdir()
    recorder = Recorder(base)
    with Injector(recorder.before, recorder.after):
        work(recorder, base / "new" / "spool")
    recorder.close()
    assert recorder.returned == [1, 2, 4, 3, 5, 6, 8]
    rng = random.Random(20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "boot_words", lambda: (1, 2))
        patch.setattr(fs, "sync", lambda _: None)  # these trees need not last
        before: tuple[object, ...] = ()
        for state in recorder.states:
            now = (state.synced, state.kept, state.returned, state.taken)
            if mode in ("least", "zeros") and now == before:
                continue  # the same tree, and the same promised of it
            before = now
            for _ in range(2 if mode == "some" else 1):
                build(state, recorder.root, tree, mode, rng)
                spool = tree / "new" / "spool"
                if rng.random() < 0.2:
                    (spool / "index").unlink(missing_ok=True)
                found = []
                for array in waiting(spool):
                    found.append(int(array[0]))
                    assert np.array_equal(array, whole(found[-1]))
                assert len(set(found)) == len(found)
                assert set(found) >= set(state.returned) - set(state.taken)
                assert failed_list(spool) == []
                gc(spool)
                assert fsck(spool).problems == ()
                with SpoolWriter(spool) as writer:
                    writer.put_nowait(SMALL)
                shutil.rmtree(tree)
