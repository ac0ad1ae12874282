"""imap gives the result of every item, in memory that does not grow, whatever its workers die of."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.mounts import tmpfs

import spoolipc
from spoolipc import Full, RemoteError, WorkerDied, imap
from spoolipc.message import Ack

LARGE = 40_000


def double(array: Any) -> Any:
    return array * 2


def arrays(count: int, size: int = LARGE) -> list[Any]:
    return [np.full(size, float(number)) for number in range(count)]


def numbers(results: Any) -> list[float]:
    return [float(result[0]) for result in results]


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("spoolipc.directory.temporary.ENOUGH", 2**60)
    yield
    assert not multiprocessing.active_children()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [10, LARGE])
def test_results_come_in_order_or_as_they_are_done(size: int) -> None:
    assert numbers(imap(double, arrays(20, size), 2)) == [number * 2 for number in range(20)]
    assert sorted(numbers(imap(double, arrays(20, size), 2, ordered=False))) == [n * 2 for n in range(20)]


def test_one_type_in_the_place_of_a_list_is_named() -> None:
    with pytest.raises(TypeError, match=r"types must be a list of classes, as \[Frame\], not <class"):
        imap(double, arrays(1), types=RemoteError)  # type: ignore[arg-type]


def tell(item: Any) -> Any:
    return {"item": item, "process": os.getpid(), "writable": item["a"].flags.writeable}


def test_whatever_a_queue_takes_goes_in_and_comes_out() -> None:
    found = list(imap(tell, [{"a": np.arange(3), "n": number, "t": (1, None)} for number in range(8)], 2))
    assert [one["item"]["n"] for one in found] == list(range(8))
    assert {one["process"] for one in found}.isdisjoint({os.getpid()})
    assert all(one["item"]["t"] == (1, None) and not one["writable"] for one in found)


def test_generator_is_read_no_further_than_two_items_a_worker_ahead() -> None:
    read = 0

    def endless() -> Iterator[Any]:
        nonlocal read
        while True:
            read += 1
            yield np.full(LARGE, float(read))

    with imap(double, endless(), 2) as results:
        for taken in range(1, 50):
            assert next(results)[0] == taken * 2
            assert read - taken <= 4
    assert next(results, None) is None


def fail(array: Any) -> Any:
    if array[0] == 1:
        raise KeyError("one", 1)
    if array[0] == 3:
        return object()
    return array


@pytest.mark.parametrize("ordered", [True, False])
def test_exception_comes_in_the_place_of_its_result_and_iteration_goes_on(ordered: bool) -> None:
    found: list[Any] = []
    results = imap(fail, arrays(6), 2, ordered)
    while len(found) < 6:
        try:
            found.append(float(next(results)[0]))
        except Exception as error:
            found.append(error)
    assert next(results, None) is None
    if not ordered:
        found.sort(key=lambda one: float(one.__notes__[0].split()[3]) if isinstance(one, Exception) else one)
    assert found[:1] + found[2:3] + found[4:] == [0, 2, 4, 5]
    assert (type(found[1]), found[1].args) == (KeyError, ("one", 1))
    assert found[1].__notes__ == ["raised for item 1 of imap"]
    assert isinstance(found[1].__cause__, RemoteError)
    assert "in fail" in str(found[1].__cause__)
    assert "does not travel" in str(found[3])


def die_once(item: Any) -> Any:
    where, array = item
    marker = Path(where, f"{array[0]}")
    if array[0] % 3 == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return array * 2


def test_worker_that_dies_is_replaced_and_its_item_done_again(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spoolipc.workers._MOST_DEATHS", 1)
    marks = tmp_path_factory.mktemp("marks")
    assert numbers(imap(die_once, [(str(marks), a) for a in arrays(8)], 1)) == [n * 2 for n in range(8)]
    assert len(list(marks.iterdir())) == 3


def test_result_that_comes_twice_is_given_once(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path_factory.mktemp("marks") / "died"

    def acknowledge() -> Ack:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Ack()

    monkeypatch.setattr("spoolipc.workers.Ack", acknowledge)
    monkeypatch.setattr("multiprocessing.Process", multiprocessing.get_context("fork").Process)
    assert sorted(numbers(imap(double, arrays(6), 1, ordered=False))) == [n * 2 for n in range(6)]
    assert mark.exists()


def test_workers_that_cannot_begin_are_not_started_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spoolipc.workers._work", os._exit)
    results = imap(double, arrays(2), 2)
    with pytest.raises(WorkerDied, match="before they begin, with exit code"):
        next(results)
    assert next(results, None) is None


def poison(array: Any) -> Any:
    if array[0] == 2:
        os._exit(3)
    return array


def test_item_that_ends_every_worker_is_given_up_and_the_others_are_done() -> None:
    found: list[Any] = []
    results = imap(poison, arrays(5), 2)
    for _ in range(5):
        try:
            found.append(float(next(results)[0]))
        except WorkerDied as error:
            found.append(error.__notes__[0])
    assert found == [0, 1, "raised for item 2 of imap", 3, 4]
    assert next(results, None) is None


@pytest.mark.parametrize("ordered", [True, False])
def test_what_the_generator_raises_comes_after_the_results_before_it(ordered: bool) -> None:
    def broken() -> Iterator[Any]:
        yield from arrays(3)
        raise OSError("the camera is gone")

    results = imap(double, broken(), 1, ordered)
    assert sorted(float(next(results)[0]) for _ in range(3)) == [0, 2, 4]
    with pytest.raises(OSError, match="camera"):
        next(results)
    assert next(results, None) is None


def outcomes(results: Any, count: int) -> list[Any]:
    """The results, and in the place of one the name of what was raised and what it says."""
    found: list[Any] = []
    for _ in range(count):
        try:
            found.append(next(results))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    assert next(results, None) is None
    return found


def strange(number: Any) -> Any:
    if number == 1:
        return iter(())
    if number == 2:
        return [np.ones(2)] * 1024
    if number == 3:
        raise ValueError([np.ones(2)] * 1024)
    if number == 4:
        raise StopIteration
    return number


def test_what_cannot_travel_is_told_in_the_place_of_its_result() -> None:
    found = outcomes(imap(strange, [0, object(), 1, 2, 3, 4, 5], 1), 7)
    assert (found[0], found[6]) == (0, 5)
    assert [name for name, _ in found[1:6]] == [
        "UnsupportedItem",
        "UnsupportedItem",
        "TooLarge",
        "TooLarge",
        "RuntimeError",
    ]
    assert found[1][1].startswith("item is a object, which does not travel without pickle")
    assert found[2][1].startswith("result is a tuple_iterator, which does not travel without pickle")
    assert "imap(function, arrays, allow_pickle=True)" in found[2][1]
    assert "raised StopIteration for item 5" in found[5][1]


def die_late(number: Any) -> Any:
    if number < 2:
        time.sleep(1.2)  # longer than between two looks at the workers
        os._exit(3)
    return number


def test_items_that_end_their_workers_are_given_up_one_by_one() -> None:
    found = outcomes(imap(die_late, range(4), 1), 4)
    assert [name for name, _ in found[:2]] == ["WorkerDied", "WorkerDied"]
    assert found[2:] == [2, 3]


def slow(item: Any) -> Any:
    where, number = item
    marker = Path(where, "died")
    if number == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    return os.getpid()


def test_worker_is_replaced_while_another_is_at_work(tmp_path_factory: pytest.TempPathFactory) -> None:
    where = str(tmp_path_factory.mktemp("marks"))
    done = list(imap(slow, [(where, number) for number in range(40)], 2))
    assert len(done) == 40
    assert len(set(done)) == 3
    assert min(done.count(process) for process in set(done[-10:])) >= 3


def test_threads_may_share_the_results() -> None:
    results = imap(double, arrays(30, 10), 2)
    with ThreadPool(3) as threads:
        found = threads.map(lambda _: numbers(results), range(3))
    assert sorted(number for some in found for number in some) == [number * 2 for number in range(30)]


def test_abandoned_and_closed_iterators_leave_nothing() -> None:
    results = imap(double, arrays(5), 2)
    view = next(results)
    results.close()
    results.close()
    assert next(results, None) is None
    assert (view == 0).all()
    next(imap(double, arrays(5), 1))


@pytest.mark.parametrize(
    ("wrong", "said"), [({"processes": 0}, "processes must be"), ({"ordered": 1}, "ordered must be")]
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        imap(double, [], **wrong)
    with pytest.raises(TypeError, match="function must be callable, not 3"):
        imap(3, [])  # type: ignore[arg-type]


SCRIPT = """
import sys, time, numpy as np, spoolipc

def slow(array):
    time.sleep(0.01)
    return array

if __name__ == "__main__":
    for result in spoolipc.imap(slow, (np.zeros(40_000) for _ in range(10**9)), 2):
        print("one", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed_program_leaves_no_process_and_no_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    command = [sys.executable, "-c", f"import spoolipc.directory.temporary as t; t.ENOUGH = 2**60\n{SCRIPT}"]
    with subprocess.Popen(
        command,
        env=os.environ | {"TMPDIR": str(place)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"one\n"
        assert len(list(place.iterdir())) == 2
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as Ctrl-C does
        else:
            process.send_signal(number)
        _, said = process.communicate()  # ends when the last worker has ended: they hold these pipes too
    assert b"Process-" not in said  # no worker was interrupted
    assert process.returncode in (-number, 130, 1)
    monkeypatch.setenv("TMPDIR", str(place))
    spoolipc.remove_temporary()
    place.rmdir()  # it is empty


@pytest.mark.fault
@pytest.mark.parametrize("lacks", ["an item", "a result"])
def test_place_without_room_for_the_items_and_results_of_all_workers_is_named(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    monkeypatch.setattr("spoolipc.workers._PATIENCE", 0.1)
    with tmpfs(tmp_path_factory.mktemp("small") / "place", "3m") as place:
        monkeypatch.setenv("TMPDIR", str(place))
        results = imap(double, arrays(8, 100_000), 2)
        foreign = place / "foreign"
        foreign.write_bytes(bytes(2_500_000 if lacks == "an item" else 0))
        with pytest.raises(Full, match=f"^{place} has no room .* fewer processes"):
            numbers(results)
        assert list(place.iterdir()) == [foreign]
