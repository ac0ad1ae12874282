"""Each kind of credentials, right and wrong: a wrong one is told at once, says what to set, and no secret is told."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.waits import until

from nats_engine.credentials import Operator, certificate, nkey, tls
from nats_engine.server import Server
from spoolipc import (
    AccessDenied,
    SpoolReader,
    SpoolWriter,
    UnsupportedOperation,
    forward,
    set_limits,
    stat,
)
from spoolipc.cli.main import main
from spoolipc.connect import connect

SECRET = "hunter2-and-more"
# With TLS the client leaves its first writer unclosed.
CONNECTED = "Client connection created"
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning"),
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <function StreamWriter:pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that says nothing of servers."""
    for word in [word for word in os.environ if word.startswith("NATS_")]:
        monkeypatch.delenv(word)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Server]]:
    """To be filled with servers, which are stopped."""
    made: list[Server] = []
    yield made
    for server in made:
        server.stop()


def works(url: str) -> None:
    """What is put is got, by who has the same rights."""
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put(np.ones(3))
        assert (reader.get(timeout=20) == 1).all()


def denied(url: str, what: str, server: Server | None = None) -> str:
    """Everything that a refusal tells. server: which tells of each connection, of which there is to be one."""
    if server is not None:
        until(lambda: server.log().count(CONNECTED))  # that which saw that it serves
        before = server.log().count(CONNECTED)
    with pytest.raises(AccessDenied, match=what) as caught:
        SpoolWriter(url)
    if server is not None:
        assert server.log().count(CONNECTED) == before + 1
    return "".join(traceback.format_exception(caught.value)) + repr(caught.value.__context__)


# Users, passwords, tokens


@pytest.mark.parametrize(
    ("config", "given", "wrong", "words"),
    [
        (
            "user: me, password: {}",
            f"me:{SECRET}@",
            "me:hunter3@",
            {"NATS_USER": "me", "NATS_PASSWORD": SECRET},
        ),
        ("token: {}", f"{SECRET}@", "hunter3@", {"NATS_TOKEN": SECRET}),
    ],
    ids=["user", "token"],
)
def test_user_and_token_of_url_or_environment(
    tmp_path: Path,
    servers: list[Server],
    monkeypatch: pytest.MonkeyPatch,
    config: str,
    given: str,
    wrong: str,
    words: dict[str, str],
) -> None:
    servers.append(server := Server(tmp_path, f"debug: true\nauthorization {{ {config.format(SECRET)} }}"))
    url = server.url("name")
    told = denied(url, "put USER:PASSWORD@ or TOKEN@ into the URL, or set NATS_USER and", server)
    told += denied(url.replace("//", f"//{wrong}"), r"the servers refuse the .* in the URL", server)
    for word in words:
        monkeypatch.setenv(word, "hunter3")
    told += denied(url, f"the servers refuse {' and '.join(words)}$", server)
    works(url.replace("//", f"//{given}"))  # which comes before the environment
    for word, value in words.items():
        monkeypatch.setenv(word, value)
    works(url)
    assert "hunter" not in told


def test_half_of_a_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_PASSWORD", SECRET)
    with pytest.raises(AccessDenied, match="belong together; NATS_USER is not set") as caught:
        SpoolWriter("nats://127.0.0.1:1/name")
    assert SECRET not in str(caught.value)


def test_password_may_have_any_characters(tmp_path: Path, servers: list[Server]) -> None:
    servers.append(server := Server(tmp_path, 'authorization { user: "a b", password: "p@/:#?%s" }'))
    works(server.url("name").replace("//", "//a%20b:p%40%2F%3A%23%3F%25s@"))


def test_user_who_may_not_do_it_is_told_what(tmp_path: Path, servers: list[Server]) -> None:
    users = '{user: me, password: pw, permissions: {publish: "nothing.>", subscribe: ">"}}'
    servers.append(server := Server(tmp_path, f"authorization {{ users: [{users}] }}"))
    told = denied(server.url("name").replace("//", "//me:pw@"), "do not allow it to this user")
    assert "permissions violation for publish" in told


# Files


def test_nkey_of_the_environment(
    tmp_path: Path, servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, key = nkey(tmp_path)
    servers.append(server := Server(tmp_path, f"debug: true\nauthorization {{ users: [{{nkey: {key}}}] }}"))
    url = server.url("name")
    monkeypatch.setenv("NATS_NKEY", str(nkey(tmp_path, "other")[0]))
    told = denied(url, "the servers refuse NATS_NKEY", server)
    monkeypatch.setenv("NATS_NKEY", str(file))
    works(url)
    file.write_text("SUNOSUCHKEY")
    told += denied(url, r"NATS_NKEY cannot be used \(")
    assert file.read_text() not in told


def test_credentials_file_of_the_environment(
    tmp_path: Path, servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = Operator()
    servers.append(server := Server(tmp_path, f"debug: true\n{operator.config}"))
    url, file = server.url("name"), operator.credentials(tmp_path / "user.creds")
    monkeypatch.setenv("NATS_CREDS", str(Operator().credentials(tmp_path / "other.creds")))
    told = denied(url, "the servers refuse NATS_CREDS", server)
    monkeypatch.setenv("NATS_CREDS", str(file))
    monkeypatch.setenv("NATS_TOKEN", "and another way, which comes later")
    works(url)
    secret = file.read_text().splitlines()[5]
    assert secret.startswith("SU")
    file.write_text(file.read_text().replace(secret, secret[:-5]))
    told += denied(url, r"NATS_CREDS cannot be used \(")
    assert secret[:-5] not in told


@pytest.mark.parametrize("word", ["NATS_CREDS", "NATS_NKEY", "NATS_CA", "NATS_CERT"])
def test_file_that_is_not_there_or_something_else_is_told(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setenv(word, str(tmp_path / "file"))
    denied(server.url("name"), f"{word}.*No such file")
    (tmp_path / "file").write_text("something else")
    denied(server.url("name"), f"{word}.*names")


def test_without_nkeys_the_error_says_what_to_install(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATS_NKEY", str(nkey(tmp_path)[0]))
    monkeypatch.setattr("spoolipc.nats.access.find_spec", lambda _: None)
    with pytest.raises(UnsupportedOperation, match=r"NATS_NKEY needs nkeys, .* pip install nkeys"):
        SpoolWriter(server.url("name"))


# TLS


@pytest.mark.parametrize("scheme", ["nats", "tls"])
def test_server_of_an_authority_that_is_named(
    tmp_path: Path, servers: list[Server], monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    servers.append(server := Server(tmp_path, "debug: true\n" + tls(tmp_path)))
    url = server.url("name").replace("nats:", f"{scheme}:")
    denied(url, "certificate is not trusted .*; NATS_CA names", server)
    monkeypatch.setenv("NATS_CA", str(certificate(tmp_path, "stranger")))
    denied(url, "certificate is not trusted .*; NATS_CA names", server)
    monkeypatch.setenv("NATS_CA", str(tmp_path / "ca.pem"))
    works(url)
    denied(url.replace("127.0.0.1", "localhost"), r"not trusted \(.*not valid for 'localhost'", server)


def test_server_that_asks_for_a_certificate(
    tmp_path: Path, servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers.append(server := Server(tmp_path, tls(tmp_path, f'ca_file: "{tmp_path}/ca.pem", verify: true')))
    monkeypatch.setenv("NATS_CA", str(tmp_path / "ca.pem"))
    url = server.url("name")
    denied(url, "NATS_CERT and NATS_KEY name a certificate")
    certificate(tmp_path, "stranger")
    for name in ("stranger", "me"):
        made = certificate(tmp_path, name, "ca" if name == "me" else "")
        monkeypatch.setenv("NATS_CERT", str(made))
        monkeypatch.setenv("NATS_KEY", str(made.with_suffix(".key")))
        if name == "me":
            works(url)
        else:
            denied(url, "no TLS with the server")


def test_key_that_wants_a_password_asks_nobody_for_it(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = certificate(tmp_path, "me")
    locked = made.with_suffix(".locked")
    files = ["-in", str(made.with_suffix(".key")), "-out", str(locked)]
    command = ["openssl", "ec", *files, "-aes256", "-passout", "pass:pw"]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("NATS_CERT", str(made))
    monkeypatch.setenv("NATS_KEY", str(locked))
    denied(server.url("name"), "NATS_CERT or NATS_KEY names no file that can be used")


def test_nothing_is_sent_in_plain_where_tls_was_asked_for(tmp_path: Path, servers: list[Server]) -> None:
    """Nor when the server comes back without it."""
    servers.append(server := Server(tmp_path, f"authorization {{ user: me, password: {SECRET} }}"))
    url = server.url("name").replace("nats://", f"tls://me:{SECRET}@")
    denied(url, "the server does not offer TLS, .* nothing was sent")
    assert "JetStream connection" not in server.log()


def test_secret_is_not_sent_in_plain_when_the_server_comes_back_without_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path, f"authorization {{ user: me, password: {SECRET} }}\n" + tls(tmp_path))
    monkeypatch.setenv("NATS_CA", str(tmp_path / "ca.pem"))
    heard: list[bytes] = []
    with SpoolWriter(server.url("name").replace("//", f"//me:{SECRET}@")) as writer:
        writer.put(np.ones(3))
        server.stop()
        heard = listen_instead(server.port)
        with pytest.raises(ConnectionError):
            writer.put(np.ones(3), timeout=3.0)
    assert heard == [b""]  # somebody came, and said nothing


def listen_instead(port: int) -> list[bytes]:
    """Be a server without TLS once: what it hears."""
    import socket

    listening = socket.create_server(("127.0.0.1", port))
    heard: list[bytes] = []

    def serve() -> None:
        with listening, listening.accept()[0] as peer:
            peer.sendall(
                b'INFO {"server_id":"x","version":"2.12.0","max_payload":1048576,"headers":true}\r\n'
            )
            heard.append(peer.recv(4096))

    threading.Thread(target=serve, daemon=True).start()
    return heard


# What is told


def test_no_secret_is_told_anywhere(
    tmp_path: Path,
    servers: list[Server],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("spoolipc.nats.link._CONNECTING", 1.0)
    servers.append(server := Server(tmp_path, f"authorization {{ user: me, password: {SECRET} }}"))
    url = server.url("name").replace("//", f"//me:{SECRET}@")
    told: list[Any] = []
    with SpoolWriter(url) as writer, SpoolReader(url) as reader:
        writer.put(np.ones(3))
        item = reader.receive(timeout=20)
        told += [repr(each) for each in (writer, reader, item, connect(url), stat(url))]
        told += [writer.path, pickle.dumps(writer), pickle.dumps(reader)]
        told += [repr(vars(each)) for each in (writer, reader, connect(url), connect(url).admin())]
        item.reject(SECRET[:3])
        for arguments in (["stat"], ["failed", "show"], ["purge"], ["set"]):
            assert main([*arguments, url, "--json"]) == 0
            assert main([*arguments, url]) == 0
        server.stop(kill=True)
        for call in (lambda: writer.put(np.ones(3), timeout=0.1), lambda: stat(url), lambda: set_limits(url)):
            with pytest.raises(ConnectionError) as caught:
                call()
            told += traceback.format_exception(caught.value)
        server.start()
    for wrong in (
        f"{url}/x",
        f"{url}?token={SECRET}",
        f"{url}?{SECRET}",
        f"natz://me:{SECRET}@host/x",
        f"nats:{SECRET}@x",
    ):
        with pytest.raises(ValueError, match=r"known|is no name") as refused:
            connect(wrong)
        told += traceback.format_exception(refused.value)
    told += [caplog.text, *capsys.readouterr()]
    assert SECRET not in "\n".join(map(str, told))


def test_forwarder_is_told_at_once_and_shows_no_secret(tmp_path: Path, servers: list[Server]) -> None:
    servers.append(server := Server(tmp_path, f"authorization {{ token: {SECRET} }}"))
    with SpoolWriter(tmp_path / "source") as writer:
        writer.put(np.ones(3))
    url = server.url("name")
    with pytest.raises(AccessDenied, match="the servers refuse the token in the URL"):
        forward(tmp_path / "source", url.replace("//", "//hunter3@"))
    command = [
        sys.executable,
        "-m",
        "spoolipc",
        "forward",
        str(tmp_path / "source"),
        url,
        "--until-empty",
        "--json",
    ]
    for secret, code in (("hunter3", 1), (SECRET, 0)):
        done = subprocess.run(
            command, env=os.environ | {"NATS_TOKEN": secret}, capture_output=True, text=True, check=False
        )
        assert (done.returncode, "NATS_TOKEN" in done.stderr) == (code, code == 1), done.stderr
        assert "hunter" not in done.stdout + done.stderr
    assert json.loads(done.stdout) == 1
