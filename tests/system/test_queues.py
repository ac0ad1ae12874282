"""`Queue` and `JoinableQueue` pass between processes of every start method, end with the last of them, and take what
`multiprocessing.Queue` takes, or say what not."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import queues
from support.account import check_spool
from support.calls import Call
from support.peer import Peer
from support.queues import Job, Point
from support.waits import until, until_asleep

import spoolipc
from spoolipc import (
    Empty,
    Full,
    JoinableQueue,
    LimitMismatch,
    Queue,
    RemoteError,
    ShutDown,
    SpoolClosed,
    SpoolGone,
    SpoolReader,
    SpoolWriter,
    UnsupportedItem,
    UnsupportedOperation,
    failed_list,
    mp,
    remove_temporary,
)
from spoolipc.directory import fs, temporary
from spoolipc.message import Message

METHODS = ("fork", "spawn", "forkserver")


@pytest.fixture(params=METHODS)
def context(request: pytest.FixtureRequest) -> Any:
    return multiprocessing.get_context(request.param)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the temporary spools of a test are made, and see none left."""
    made = tmp_path / "temporary"
    made.mkdir()
    monkeypatch.setattr(temporary, "IN_MEMORY", made)
    monkeypatch.setenv("TMPDIR", str(made))
    yield made
    until(lambda: remove_temporary() or not left(made))


def left(place: Path) -> list[str]:
    return [name for name in os.listdir(place) if name.startswith(temporary.PREFIX)]


HERE = """
import os, pathlib
from spoolipc.directory import temporary
temporary.IN_MEMORY = pathlib.Path(os.environ["TMPDIR"])
"""
"""Makes the temporary spools of a program in the test's own place."""


def run(program: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", program, *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(Path(queues.__file__).parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


class TestPassing:
    def test_it_passes_as_an_argument_and_carries_arrays_and_values_both_ways(self, context: Any) -> None:
        tasks, answers = Queue(5), Queue()
        process = context.Process(target=queues.answer, args=(tasks, answers))
        process.start()
        for task in (np.arange(100_000), (1, {"a": [None]}), "text"):
            tasks.put(task)
        assert (answers.get(timeout=60) == np.arange(0, 200_000, 2)).all()
        assert [answers.get(timeout=60), answers.get(timeout=60)] == ["(1, {'a': [None]})", "'text'"]
        tasks.put(None)
        process.join(60)
        assert process.exitcode == 0

    def test_its_bound_methods_pass(self, context: Any) -> None:
        queue = Queue(writable=True)
        process = context.Process(target=queue.put, args=(np.zeros(30_000),))
        process.start()
        array = queue.get(timeout=60)
        array += 1
        assert array.sum() == 30_000
        process.join(60)
        assert process.exitcode == 0

    def test_it_passes_to_the_initializer_of_a_pool(self, context: Any) -> None:
        queue = Queue()
        with context.Pool(2, queues.initialize, (queue,)) as pool:
            assert pool.map(queues.put_in_pool, range(6)) == list(range(6))
        assert sorted(int(queue.get()[0]) for _ in range(6)) == list(range(6))

    def test_it_passes_to_an_executor_with_its_initializer_and_with_a_task(self, context: Any) -> None:
        queue = Queue()
        with ProcessPoolExecutor(2, context, queues.initialize, (queue,)) as executor:
            assert list(executor.map(queues.put_in_pool, range(6))) == list(range(6))
            assert executor.submit(queues.put_given, queue, 6).result(60) == queue.path
        assert sorted(int(np.ravel(queue.get())[0]) for _ in range(7)) == list(range(7))

    def test_types_and_switches_go_along(self, context: Any) -> None:
        queue = Queue(types=[Point, Job])
        process = context.Process(target=queue.put, args=(Job(1, Point(2, np.ones(5000))),))
        process.start()
        job = queue.get(timeout=60)
        process.join(60)
        assert (type(job), job.number, type(job.frame), job.frame.y.sum()) == (Job, 1, Point, 5000)
        again = pickle.loads(pickle.dumps(queue))
        again.put(Point(1, 2))
        assert queue.get() == Point(1, 2)
        again.close()

    def test_a_queue_that_others_removed_says_so(self) -> None:
        queue = Queue()
        sent = pickle.dumps(queue)
        queue.close()
        with pytest.raises(SpoolGone, match="keep the queue until others have it"):
            pickle.loads(sent)
        with pytest.raises(SpoolClosed, match="is closed"):
            pickle.dumps(queue)


class TestTheEndOfATemporarySpool:
    def test_it_is_made_in_memory_where_that_has_room_and_says_where(
        self, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "spoolipc")
        on_disk = tmp_path / "disk"
        on_disk.mkdir()
        monkeypatch.setenv("TMPDIR", str(on_disk))
        first = Queue(3)
        monkeypatch.setattr(temporary, "ENOUGH", 1 << 60)
        second = Queue()
        assert (Path(first.path).parent, Path(second.path).parent) == (place, on_disk)
        for queue in (first, second):
            assert queue.path in repr(queue)
            assert "temporary" in repr(queue)
            assert f"made a temporary spool: {queue.path}" in caplog.text
            assert os.stat(queue.path).st_mode & 0o777 == 0o700
            queue.put(1)
            assert queue.get() == 1
        second.close()
        assert left(on_disk) == []

    def test_it_goes_with_a_close_or_with_the_last_reference(self, place: Path) -> None:
        queue = Queue()
        queue.put(np.ones(50_000))
        array = queue.get()
        queue.close()
        queue.close()
        assert left(place) == []
        assert array.sum() == 50_000
        queue = Queue()
        assert len(left(place)) == 1
        del queue
        assert left(place) == []

    def test_it_goes_though_a_thread_is_in_a_call_when_the_queue_is_closed(self, place: Path) -> None:
        queue = Queue()
        getting = Call(queue.get)
        getting.until_asleep()
        queue.close()
        assert isinstance(getting.error(), SpoolClosed)
        until(lambda: left(place) == [])

    def test_it_goes_though_a_signal_handler_closes_the_queue_amid_a_call(self, place: Path) -> None:
        queue = Queue()
        before = signal.signal(signal.SIGUSR1, lambda *_: queue.close())

        def interrupt() -> None:
            until_asleep(os.getpid())
            os.kill(os.getpid(), signal.SIGUSR1)

        try:
            closing = Call(interrupt)
            with pytest.raises(SpoolClosed):
                queue.get()
            closing.result()
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert left(place) == []

    def test_it_goes_with_its_process_though_a_daemon_thread_is_in_a_call(self, place: Path) -> None:
        ran = run(
            f"{HERE}\nfrom support.calls import Call; import spoolipc\n"
            "queue = spoolipc.Queue(); Call(queue.get).until_asleep()"
        )
        assert (ran.returncode, left(place)) == (0, []), ran.stderr

    def test_it_goes_with_its_process_whatever_was_imported_first(self, place: Path) -> None:
        for first in ("", "import multiprocessing.util", "import weakref; weakref.finalize(weakref, print)"):
            ran = run(
                f"{first}\n{HERE}\nimport spoolipc\nqueue = spoolipc.Queue(); queue.put(1)\nprint(queue.path)"
            )
            assert ran.returncode == 0, ran.stderr
            assert str(place) in ran.stdout
            assert left(place) == []

    def test_what_a_killed_process_left_goes_with_the_next_queue_of_any_program(self, place: Path) -> None:
        program = (
            f"{HERE}\nimport spoolipc, signal\nqueue = spoolipc.Queue(); os.kill(os.getpid(), signal.SIGKILL)"
        )
        for remove in (
            "import spoolipc; spoolipc.Queue().close()",
            "import spoolipc; spoolipc.remove_temporary()",
            "from spoolipc.cli.main import main; import sys; sys.argv[1:] = ['gc', '--temporary']; main()",
        ):
            assert run(program).returncode == -signal.SIGKILL
            (name,) = left(place)
            with_it = run(HERE + remove)
            assert with_it.returncode == 0, with_it.stderr
            assert left(place) == []
        assert name in with_it.stdout

    def test_one_that_was_killed_takes_it_from_nobody(self, context: Any) -> None:
        queue = Queue()
        process = context.Process(target=queues.be_killed, args=(queue,))
        process.start()
        assert queue.get(timeout=60) == process.pid
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert remove_temporary() == []
        queue.put("still here")
        assert queue.get() == "still here"

    def test_a_forked_child_uses_it_before_it_touches_it(self, place: Path) -> None:
        queue = Queue()
        queue.put(np.full(20_000, 3))
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0 if queue.get().sum() == 60_000 else 1)
        os.close(reading)
        queue.close()
        del queue
        assert remove_temporary() == []
        os.close(writing)
        assert os.waitpid(child, 0)[1] == 0
        assert len(remove_temporary()) == 1
        assert left(place) == []

    @pytest.mark.parametrize("method", METHODS)
    def test_who_starts_a_process_may_end_before_that_has_it(self, spool: Path, method: str) -> None:
        ran = run(
            f"{HERE}\nimport sys; from support.queues import *; start_and_leave(*sys.argv[1:])", method, spool
        )
        assert ran.returncode == 0, ran.stderr
        queue = Queue(path=spool)
        array, path = queue.get(timeout=60)
        assert (array == 7).all()
        until(lambda: not os.path.exists(path) or remove_temporary())

    @pytest.mark.parametrize("place_of_it", ["before it is opened", "before it is locked"])
    def test_one_removed_while_it_is_made_is_made_anew(
        self, place: Path, place_of_it: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        removed: list[str] = []
        name = "open_directory" if place_of_it == "before it is opened" else "lock_shared"
        real = getattr(fs, name)

        def call(*args: Any) -> Any:
            if not removed and left(place):
                removed.append("under way")
                removed[:] = remove_temporary()
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(fs, name, call)
            queue = Queue()
        queue.put(1)
        assert len(removed) == 1
        assert queue.path not in removed
        assert queue.get() == 1
        queue.close()

    def test_what_others_planted_stays(self, place: Path, tmp_path: Path) -> None:
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "file").touch()
        (place / f"{temporary.PREFIX}link").symlink_to(precious)
        (place / f"{temporary.PREFIX}file").touch()
        inside = place / f"{temporary.PREFIX}inside"
        inside.mkdir()
        (inside / "link").symlink_to(precious)
        assert remove_temporary() == [str(inside)]
        assert (precious / "file").exists()
        for name in left(place):
            (place / name).unlink()

    def test_a_hundred_of_them_are_put_to_and_got_from_with_1024_descriptors(self) -> None:
        ran = run(
            HERE + "import resource, numpy as np, os, spoolipc\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n"
            "queues = [spoolipc.Queue() for _ in range(100)]\n"
            "for n, queue in enumerate(queues): queue.put(n); queue.put(np.full(9000, n))\n"
            "for n, queue in enumerate(queues): assert queue.get() == n and queue.get()[5] == n\n"
            "try: queues[0].get(timeout=0.01)\n"
            "except spoolipc.Empty: print(len(os.listdir('/proc/self/fd')))\n"
        )
        assert ran.returncode == 0, ran.stderr
        assert int(ran.stdout) <= 920

    def test_importing_the_package_imports_no_multiprocessing(self) -> None:
        ran = run("import sys, spoolipc; assert 'multiprocessing.util' not in sys.modules; spoolipc.Queue")
        assert ran.returncode == 0, ran.stderr


class TestItems:
    def test_what_is_put_before_a_sudden_end_is_there(self, context: Any) -> None:
        queue = Queue()
        process = context.Process(target=queues.put_and_vanish, args=(queue, np.ones(200_000), "end"))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        assert queue.get_nowait().sum() == 200_000
        assert queue.get_nowait() == "end"

    def test_what_is_done_to_an_object_after_its_put_changes_nothing(self) -> None:
        queue, array, items = Queue(), np.zeros(10_000), [1]
        queue.put(array)
        queue.put(items)
        array += 1
        items.append(2)
        assert not queue.get().any()
        assert queue.get() == [1]

    @pytest.mark.parametrize("size", [10, 100_000])
    @pytest.mark.parametrize("wrap", [lambda a: a, lambda a: {"frame": (a, 1)}])
    def test_arrays_are_writable_where_that_was_asked_for(self, size: int, wrap: Any) -> None:
        for writable in (False, True):
            queue = Queue(writable=writable)
            queue.put(wrap(np.zeros(size)))
            got = queue.get()
            array = got if isinstance(got, np.ndarray) else got["frame"][0]
            assert array.flags.writeable is writable
            if writable:
                array[:] = 1
            queue.put(wrap(np.full(size, 2.0)))
            assert queue.get() is not None
            assert array.sum() == (size if writable else 0)

    def test_arrays_inside_of_others_are_views_of_the_file(self) -> None:
        queue = Queue()
        queue.put([np.zeros(100_000), {"b": np.ones(100_000)}])
        first, second = queue.get()
        assert not first.flags.owndata
        assert not second["b"].flags.owndata
        assert np.may_share_memory(first.base, second["b"].base) or first.base is second["b"].base

    def test_anything_else_is_refused_with_its_place_and_put_nowhere(self) -> None:
        queue = Queue()
        with pytest.raises(
            TypeError, match=r'^item\["frame"\]\.frame is a object.*Queue\(allow_pickle=True\)'
        ):
            Queue(types=[Job]).put({"frame": Job(1, object())})
        for wrong in (object(), {1, 2.5, object}, np.array([None]), [lambda: 0]):
            with pytest.raises(UnsupportedItem):
                queue.put(wrong)
        assert queue.empty()

    def test_what_a_writer_puts_is_got_and_a_reader_leaves_a_value_where_it_is(self, spool: Path) -> None:
        queue = Queue(path=spool)
        with SpoolWriter(spool) as writer, SpoolReader(spool) as reader:
            writer.put(np.arange(3))
            writer.put({"a": np.ones(2), "b": np.zeros(9000)}, meta=1)
            assert queue.get().tolist() == [0, 1, 2]
            assert {name: array.size for name, array in queue.get().items()} == {"a": 2, "b": 9000}
            queue.put(np.arange(4))
            assert reader.get().tolist() == [0, 1, 2, 3]
            queue.put((1, np.ones(9000)))
            for get in (reader.get, reader.take, lambda: reader.get(copy=True), lambda: reader.get_many(5)):
                with pytest.raises(UnsupportedItem, match="get it from a Queue"):
                    get()
            with reader.receive() as item:
                with pytest.raises(UnsupportedItem):
                    _ = item.array
                item.nack()
            number, array = queue.get()
            assert (number, array.sum()) == (1, 9000)

    def test_exceptions_are_raised_again_with_what_was_told_of_them(self) -> None:
        queue = Queue()
        try:
            _ = os.environ["NO_SUCH"]
        except KeyError as error:
            queue.put(error)
        got = queue.get()
        assert (type(got), got.args, type(got.__cause__)) == (KeyError, ("NO_SUCH",), RemoteError)
        assert 'os.environ["NO_SUCH"]' in got.__cause__.traceback

    def test_a_frame_that_nobody_packed_costs_that_item_only(self, spool: Path) -> None:
        queue = Queue(path=spool)
        for frame in (b'{"array":7}', b"[" * 100_000, b"\xff", b"{"):
            with SpoolWriter(spool) as writer:
                writer._producer.put([Message((np.frombuffer(frame, np.uint8),), ())], None)
        queue.put("good")
        assert queue.get() == "good"
        with pytest.raises(Empty):
            queue.get_nowait()
        assert all("damaged: its frame" in letter.reason for letter in failed_list(spool))
        assert len(failed_list(spool)) == 4

    def test_a_class_that_this_reader_was_not_told_of_is_told_and_nothing_is_blocked(
        self, spool: Path
    ) -> None:
        there, here = Queue(path=spool, types=[Point]), Queue(path=spool)
        there.put(Point(1, 2))
        there.put("next")
        with pytest.raises(UnsupportedItem, match=r"Queue\(types=\[Point\]\)"):
            here.get()
        assert here.get() == "next"
        (letter,) = failed_list(spool)
        spoolipc.failed_retry(spool, [letter.seq])
        assert there.get() == Point(1, 2)

    def test_no_other_item_has_an_attempt_where_another_process_sets_a_bad_one_aside_first(
        self, spool: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        queue, other = Queue(path=spool), Queue(path=spool)
        with SpoolWriter(spool) as writer:
            writer._producer.put([Message((np.frombuffer(b"{", np.uint8),), ())], None)
        for number in range(3):
            queue.put(np.full(1, number))
        put_back, first = mp._put_back, list[Any]()

        def then_another(*taken: Any) -> None:
            put_back(*taken)
            if not first:
                first.append(None)
                first[0] = other.get()

        monkeypatch.setattr(mp, "_put_back", then_another)
        got = queue.get()
        assert [*first, got] == [0, 1]
        with SpoolReader(spool) as reader:
            item = reader.receive(block=False)
            assert (item.array.tolist(), item.attempt) == ([2], 1)
            item.ack()
        (letter,) = failed_list(spool)
        assert (letter.seq, letter.attempts) == (1, 1)

    def test_an_interrupted_get_leaves_the_item_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        queue = Queue()
        queue.put((1, 2))
        with monkeypatch.context() as patch:
            patch.setattr(queue._values, "unpack", lambda arrays: os.kill(os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                queue.get()
        assert queue.get_nowait() == (1, 2)


class TestPickle:
    def test_any_object_travels_where_that_was_asked_for_its_buffers_beside_the_pickle(self) -> None:
        queue = Queue(allow_pickle=True)
        value = {"path": Path("/a"), "frame": np.arange(50_000.0), "type": Job, "small": np.arange(3)}
        queue.put(value)
        (file,) = (Path(queue.path) / "items").iterdir()
        with open(file, "rb") as opened:
            frame, beside = np.load(opened), np.load(opened)
        assert frame[0] == 0x80
        assert frame.nbytes < 2000
        assert beside.nbytes == 400_000
        got = queue.get()
        assert (got["path"], got["type"], got["small"].tolist()) == (Path("/a"), Job, [0, 1, 2])
        assert (got["frame"] == value["frame"]).all()
        assert not got["frame"].flags.owndata
        for each in (np.array([None, 1]), np.asfortranarray(np.ones((200, 90))), [np.ones(500)] * 1500):
            queue.put(each)
            found = queue.get()
            assert type(found) is type(each)
            assert np.array_equal(found, each)

    def test_nothing_is_unpickled_where_that_was_not_asked_for(self, spool: Path) -> None:
        with_pickle, without = Queue(path=spool, allow_pickle=True), Queue(path=spool)
        with_pickle.put(Path("/a"))
        with_pickle.put(np.ones(3))
        with pytest.raises(UnsupportedItem, match="allow_pickle=True"):
            without.get()
        assert without.get().tolist() == [1, 1, 1]
        assert "pickled" in failed_list(spool)[0].reason

    def test_what_cannot_be_unpickled_is_a_dead_letter_and_blocks_nobody(self, spool: Path) -> None:
        queue = Queue(path=spool, allow_pickle=True)
        queue.put(queues.Unpicklable())
        queue.put(2)
        with pytest.raises(LookupError, match="not here"):
            queue.get()
        assert queue.get() == 2
        assert failed_list(spool)[0].reason == "LookupError: not here"

    def test_it_is_refused_where_others_could_write(self, spool: Path) -> None:
        with pytest.raises(ValueError, match="private directory"):
            Queue(path=spool, allow_pickle=True, mode=0o770)
        with pytest.raises(ValueError, match="directory of this machine"):
            Queue(path="nats://host/frames", allow_pickle=True)
        Queue(path=spool, mode=0o770).close()
        with pytest.raises(LimitMismatch, match="mode=0o770"):
            Queue(path=spool, allow_pickle=True)


class TestEnds:
    def test_shutdown_ends_it_for_all_when_it_is_empty(self, context: Any) -> None:
        queue = Queue()
        queue.put(1)
        process = context.Process(target=queue.shutdown)
        process.start()
        process.join(60)
        with pytest.raises(ShutDown):
            queue.put(2)
        assert queue.get() == 1
        with pytest.raises(ShutDown):
            queue.get()

    def test_shutdown_at_once_removes_what_waits_and_ends_a_join(self) -> None:
        queue = JoinableQueue()
        queue.put(1)
        joining = threading.Thread(target=queue.join)
        joining.start()
        queue.shutdown(immediate=True)
        with pytest.raises(ShutDown):
            queue.get()
        joining.join(20)
        assert not joining.is_alive()

    def test_joining_before_draining_does_not_hang(self, context: Any) -> None:
        queue = Queue()
        process = context.Process(target=queue.put, args=(np.ones(3_000_000),))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        queue.join_thread()
        queue.cancel_join_thread()
        assert queue.get().sum() == 3_000_000

    def test_a_closed_one_says_so_and_the_others_go_on(self, spool: Path) -> None:
        queue, other = Queue(path=spool), JoinableQueue(path=spool)
        queue.put(1)
        queue.close()
        for call in (queue.get, lambda: queue.put(1), queue.qsize, queue.empty, queue.full, queue.shutdown):
            with pytest.raises(ValueError, match="is closed"):
                call()
        assert other.get() == 1
        other.close()
        check_spool(spool)

    @pytest.mark.parametrize("call", ["queue.get()", "(queue.put(1), queue.put(2))"])
    def test_ctrl_c_ends_a_wait_and_the_spool_goes(self, place: Path, call: str) -> None:
        program = f"{HERE}\nimport spoolipc, sys\nqueue = spoolipc.Queue(1)\nprint(1, flush=True)\n{call}"
        process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        until_asleep(process.pid)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=20)[1]
        assert error.rstrip().endswith("KeyboardInterrupt"), error
        assert left(place) == []

    def test_one_killed_while_it_waits_for_an_item_takes_none_and_stops_nobody(self, spool: Path) -> None:
        queue = Queue(path=spool)
        with Peer(spool) as peer:
            peer.run("queue = Queue(path=path)")
            peer.start("run", "queue.get()")
            until_asleep(peer.pid)
            peer.kill()
        queue.put("mine")
        assert queue.get(timeout=20) == "mine"


class TestJoinable:
    def test_a_dead_letter_is_no_unfinished_task(self, spool: Path) -> None:
        queue = JoinableQueue(path=spool)
        other = Queue(path=spool, types=[Point])
        other.put(Point(1, 2))
        with pytest.raises(UnsupportedItem):
            queue.get()
        queue.join()


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({"maxsize": "5"}, ValueError, "maxsize must be a whole number"),
            ({"maxsize": 2.5}, ValueError, "maxsize must be a whole number"),
            ({"path": ""}, ValueError, "path is empty"),
            ({"path": "memory://x"}, UnsupportedOperation, "passes between processes"),
            ({"path": "ftp://x"}, ValueError, "no URL that is known"),
            ({"types": [int]}, TypeError, "types must be dataclasses"),
            ({"types": Point}, TypeError, r"types must be a list of classes, as \[Frame\], not"),
            ({"allow_pickle": 1}, ValueError, "allow_pickle must be True or False"),
            ({"writable": "yes"}, ValueError, "writable must be True or False"),
            ({"mode": 770}, ValueError, "write 0o770"),
        ],
    )
    def test_wrong_ones_are_refused_and_leave_nothing(
        self, place: Path, options: Any, error: type[Exception], said: str
    ) -> None:
        with pytest.raises(error, match=said):
            Queue(**options)
        assert left(place) == []

    def test_block_and_timeout_are_taken_as_multiprocessing_takes_them(self) -> None:
        queue: Any = Queue(1, ctx=multiprocessing.get_context("spawn"))
        waits: list[Any] = [(False,), (0,), (None, 5), (True, 0), (True, -1), (1, 0.001)]
        queue.put(1, 1)
        for wait in waits:
            with pytest.raises(Full):
                queue.put(2, *wait)
        assert queue.full()
        assert queue.get(0) == 1
        for wait in waits:
            with pytest.raises(Empty):
                queue.get(*wait)
        calls: list[Any] = [lambda: queue.get(True, "x"), lambda: queue.put(1, True, "x")]
        for call in calls:
            with pytest.raises(ValueError, match="timeout must be a non-negative number of seconds, not 'x'"):
                call()

    def test_a_negative_maxsize_is_no_limit(self) -> None:
        assert Queue(-1).maxsize == 0

    def test_a_path_keeps_the_limit_that_it_has(self, spool: Path) -> None:
        Queue(2, path=spool).close()
        queue = Queue(path=spool)
        assert queue.maxsize == 2
        assert "temporary" not in repr(queue)
        with pytest.raises(LimitMismatch):
            Queue(3, path=spool)
