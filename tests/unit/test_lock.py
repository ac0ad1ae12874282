"""The index lock: how it is waited for, and what a thread that has it may do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults import Event, Injector

from spoolipc import LockTimeout, ReentrantCall
from spoolipc.directory import fs
from spoolipc.directory.lock import IndexLock, put_off


@pytest.fixture
def locks(tmp_path: Path) -> Iterator[tuple[IndexLock, IndexLock]]:
    """The lock as two sessions have it."""
    fds = [fs.open_directory(tmp_path) for _ in range(2)]
    one, other = (IndexLock(fd, str(tmp_path), lambda: "the other") for fd in fds)
    yield one, other
    for fd in fds:
        fs.close(fd)


def test_who_waits_looks_again_at_once_before_he_sleeps(locks: tuple[IndexLock, IndexLock]) -> None:
    def let_go(_: Event) -> None:
        if calls.met.count("sleep") == 3:
            locks[0].release()

    with locks[0].mutex, locks[1].mutex:
        locks[0].take()
        with Injector(let_go) as calls:
            locks[1].take()
    assert [name for name in calls.met if name != "lock"] == ["yield_core"] * 20 + ["sleep"] * 3


def test_who_waits_too_long_is_told_who_has_it(locks: tuple[IndexLock, IndexLock]) -> None:
    with locks[0].held(), locks[1].mutex, pytest.raises(LockTimeout, match="held by the other"):
        locks[1].take(1e-3)


def test_lock_that_another_holds_is_not_free(locks: tuple[IndexLock, IndexLock]) -> None:
    assert locks[1].is_free()
    with locks[0].held():
        assert not locks[1].is_free()
        assert not locks[0].is_free()
    assert locks[1].is_free()


def test_within_a_step_none_is_begun_and_what_was_put_off_is_done_after_it(
    locks: tuple[IndexLock, IndexLock],
) -> None:
    done: list[int] = []
    with locks[0].held():
        assert put_off(done.append, 1)
        with pytest.raises(ReentrantCall), locks[1].held():
            pass
        assert done == []
    assert done == [1]
    assert not put_off(done.append, 2)
