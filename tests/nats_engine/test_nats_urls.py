"""URLs, secrets, and servers that cannot be had."""

from __future__ import annotations

import pickle
import re
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nats_engine.server import Server
from spoolipc import (
    LimitMismatch,
    NoSuchItem,
    NotASpool,
    Queue,
    ServerUnreachable,
    SpoolInUse,
    SpoolReader,
    SpoolWriter,
    StorageError,
    UnsupportedOperation,
    failed_list,
    failed_retry,
    fsck,
    purge,
    remove,
    set_limits,
    stat,
)
from spoolipc.cli.main import main
from spoolipc.connect import connect
from spoolipc.nats.link import Link

SECRET = "hunter2-and-more"


@pytest.mark.parametrize(
    "url",
    [
        "nats://",
        "nats://host",
        "nats://host/",
        "nats:///name",
        "nats://host/a.b",
        "nats://host/a*",
        "nats://host/a/b",
        "nats://host/a b",
        "nats://host/größe",
        "nats://host/" + "a" * 129,
        "nats://ho st/a",
        "nats://host:port/a",
        "nats://host,/a",
        "nats://host/a?replicas=2",
        "nats://host/a?storage=tape",
        "nats://host/a?what=1",
        "nats://host/a#b",
        "nats://host/a?replicas=3#b",
        "nats://host/a?replicas=3&replicas=3",
        "nats://host:99999/a",
        "nats://host,[::1]:0/a",
    ],
)
def test_wrong_url_is_a_clear_error(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL is|is no name|known are|is no port"):
        connect(url)


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("nats://host/" + "a" * 300, "1 to 128 letters"),
        ("nats://host:99999/a", "99999 is no port: 1 to 65535"),
        ("nats://host/a?storage=file&storage=memory", "each once"),
        ("http://host/a", r"nats://HOST\[:PORT\]/NAME, tls://HOST\[:PORT\]/NAME"),
    ],
)
def test_wrong_url_is_told_what_is_right(url: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        connect(url)
    assert connect("nats://a,b:4223,[::1]:65535/frames?replicas=3&storage=memory")


@pytest.mark.parametrize("open_one", [SpoolWriter, SpoolReader, partial(Queue, 0)])
def test_mode_of_a_directory_is_refused_on_servers(server: Server, open_one: Any) -> None:
    url = server.url("mode")
    with pytest.raises(ValueError, match="mode is of a directory"):
        open_one(path=url, mode=0o770)
    with pytest.raises(NotASpool):
        stat(url)


@pytest.mark.parametrize(
    "names", [["dead"], ["item", "chunk", "failed"], ["x", "x-items", "x-notes", "x-dead"]]
)
def test_name_of_a_spool_may_be_any_word_that_its_streams_have(server: Server, names: list[str]) -> None:
    """What one spool has, in pieces and as dead letters, is that of no other."""
    large = np.arange(300_000.0)
    for name in names:
        with SpoolWriter(server.url(name), max_attempts=1) as writer:
            writer.put_many([large, np.array([len(name)]), large])
    for name in names:
        url = server.url(name)
        with SpoolReader(url) as reader:
            reader.receive().reject("rejected")
            reader.receive().nack(reason="failed")
            dead = [each.seq for each in failed_list(url)]
            assert list(failed_retry(url).seqs) == dead
            assert stat(url).in_flight == 0
            assert np.array_equal(reader.get(), large)
            assert np.array_equal(reader.get(), large)
            assert reader.get()[0] == len(name)
    assert [stat(server.url(name)).failed for name in names] == [0] * len(names)
    for name in names:
        remove(server.url(name))


def test_url_without_its_secrets_is_the_path() -> None:
    for url in (f"nats://me:{SECRET}@one:4222,two/name?replicas=3", f"tls://{SECRET}@one/name"):
        path = connect(url)._where.path  # type: ignore[attr-defined]
        assert SECRET not in path + repr(vars(connect(url)))
        assert path.split("://")[1] in ("one:4222,two/name?replicas=3", "one/name")
    with pytest.raises(ValueError, match="is no name") as caught:
        connect(f"nats://me:{SECRET}@host/a.b")
    assert SECRET not in str(caught.value)


WRONG = [f"{start}me:{SECRET}@host/name" for start in ("nat://", "NATS://", "nats:/", "nats:")]
URL = f"nats://me:{SECRET}@127.0.0.1:1/name"


@pytest.mark.parametrize(
    "act",
    [
        *(partial(connect, url) for url in WRONG),
        *(partial(connect, f"{url}/more?what=1") for url in (*WRONG, URL)),
        partial(fsck, URL),
        partial(Queue, path=URL, allow_pickle=True),
        *(partial(main, [word, URL]) for word in ("fsck", "bench")),
        *(partial(main, [word, url]) for word in ("stat", "gc", "fsck", "bench") for url in WRONG),
        *(partial(main, ["forward", *ends]) for url in WRONG for ends in ((url, "there"), ("here", url))),
    ],
)
def test_message_tells_no_secret(
    act: Callable[[], object],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = act()
    except (ValueError, UnsupportedOperation, SystemExit) as error:
        code = str(error)
    assert code
    assert "hunter" not in f"{code}{capsys.readouterr()}"


def test_server_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spoolipc.nats.link._CONNECTING", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for call in (SpoolWriter, stat):
        with pytest.raises(ServerUnreachable, match=f"127.0.0.1:{port}/name: cannot connect"):
            call(f"nats://127.0.0.1:{port}/name")


@pytest.mark.parametrize(
    ("version", "what"), [("2.11.9", "version 2.11; 2.12 or later"), ("1.4.1", "version 1.4")]
)
def test_older_server_is_an_error_that_names_the_version_needed(version: str, what: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with listening.accept()[0] as peer:
                told = f'{{"server_id":"x","version":"{version}","max_payload":1048576,"headers":true}}'
                peer.sendall(f"INFO {told}\r\n".encode())
                while data := peer.recv(4096):
                    if b"PING" in data:
                        peer.sendall(b"PONG\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UnsupportedOperation, match=what):
            SpoolWriter(f"nats://127.0.0.1:{listening.getsockname()[1]}/name")
        thread.join(20)


@pytest.mark.parametrize("call", [SpoolWriter, SpoolReader, stat])
def test_server_without_jetstream_is_an_error_at_once_that_says_how_to_start_it(
    tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(Link, "check", lambda self, began, why: asked.append(why))
    server = Server(tmp_path, "# no jetstream")
    try:
        with pytest.raises(ServerUnreachable, match=r"no JetStream answers; start .* nats-server -js"):
            call(server.url("name"))
        assert not asked, "it was asked again"
    finally:
        server.stop()


def test_without_the_client_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "nats" or "spoolipc.nats" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nats", None)  # as if it were not there
    with pytest.raises(UnsupportedOperation, match=r"pip install nats-py"):
        connect("nats://host/name")


def test_what_only_a_directory_has_is_refused_with_one_sentence(server: Server) -> None:
    url = server.url("only-a-directory")
    with SpoolWriter(url) as writer:
        writer.put(np.zeros(3))
        calls: list[Any] = [
            lambda: writer.loan(3),
            lambda: SpoolWriter(url, preallocate=(1, 100)),
            lambda: fsck(url),
        ]
        for call in calls:
            with pytest.raises(UnsupportedOperation):
                call()
        with pytest.raises(ValueError, match="replicas"):
            SpoolWriter(url, durability="fsync")
        assert pickle.loads(pickle.dumps(writer)).qsize() == 1


def test_errors_say_what_to_do_and_who_is_there(server: Server) -> None:
    url = server.url("says")
    with SpoolWriter(url, maxsize=2) as writer, SpoolReader(url) as reader:
        with pytest.raises(LimitMismatch, match=rf"or change it \(spoolipc set {url} maxsize=3\)"):
            SpoolWriter(url, maxsize=3)
        with pytest.raises(NoSuchItem, match="has no dead letter 7; spoolipc failed list tells those it has"):
            failed_list(url, [7])
        with pytest.raises(SpoolInUse, match=r"is in use: it has another writer$"):
            SpoolWriter(url, fresh=True)
        writer.put(np.zeros(3))
        item = reader.receive(timeout=20)
        writer.close()
        with pytest.raises(SpoolInUse, match=r"is in use: items in flight at readers: 1$"):
            SpoolWriter(url, fresh=True)
        item.ack()
    with pytest.raises(StorageError, match="replicas in the URL needs as many servers: leave it out"):
        SpoolWriter(f"{server.url('three')}?replicas=3")


def test_command_line_takes_urls(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    url = server.url("command-line")
    assert main(["stat", url]) == 2
    assert "there is no spool here" in capsys.readouterr().err
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put_many([np.ones(3)] * 3)
        reader.receive().reject("no good")
        assert main(["stat", url]) == 0
        assert main(["failed", "list", url]) == 0
        assert main(["failed", "show", url, "1"]) == 0
        told = capsys.readouterr().out
        assert "no good" in told
        assert "jetstream" in told
        assert not re.search("free|pinned", told), "it has no files"
        assert "  size      " in told
        assert "  file  " not in told
        assert main(["failed", "retry", url]) == 0
        assert reader.qsize() == 3
        assert main(["set", url, "maxsize=7"]) == 0
        assert writer.maxsize == 7
        assert main(["purge", url]) == 0
        assert reader.empty()
        assert main(["gc", url]) == 0
        assert main(["fsck", url]) == 2
        capsys.readouterr()
        assert main(["rm", url]) == 1
        assert "2 sessions have it open" in capsys.readouterr().err
        reader.close()
        assert main(["rm", url]) == 1
        assert "1 session has it open" in capsys.readouterr().err
    assert set_limits(url, maxsize=5).maxsize == 5
    assert purge(url) == 0
    remove(url)
    with pytest.raises(NotASpool):
        stat(url)
