"""A real server for the tests: started, stopped and started again on the same port, its data in a directory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

PROGRAM = Path(sys.executable).with_name("nats-server")


def free_port() -> int:
    """One on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


class Server:
    """A server that runs. port: on which it listens. config: more lines of its configuration. host: its address, and
    prefix: the command that runs another where that address is."""

    def __init__(
        self, place: Path, config: str = "", host: str = "127.0.0.1", prefix: tuple[str, ...] = ()
    ) -> None:
        self.host, self._prefix = host, prefix
        self.port = free_port()
        self._file = place / f"nats-{self.port}.conf"
        store = f'jetstream {{ store_dir: "{place / "store"}" }}' if "jetstream" not in config else ""
        self._file.write_text(f"listen: {self.address}\n{store}\n{config}\n")
        self._log = place / f"nats-{self.port}.log"
        self.start()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it serves."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, str(PROGRAM), "-c", str(self._file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection((self.host, self.port)).close()
                return
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def stop(self, kill: bool = False) -> None:
        """Stop it, or kill it, and wait until it has ended."""
        (self._process.kill if kill else self._process.terminate)()
        self.go()
        self._process.wait(30)

    def hang(self) -> None:
        """Let it be there and do nothing; `go` lets it go on."""
        os.kill(self._process.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{self._process.pid}/task")
        while any(" T " not in Path(task, "stat").read_text() for task in tasks.iterdir()):
            os.sched_yield()

    def go(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def log(self) -> str:
        """What it has written of itself."""
        return self._log.read_text()

    def url(self, name: str) -> str:
        return f"nats://{self.address}/{name}"


class Cluster:
    """Three servers that know each other. places: for each its host and prefix, as a server takes them."""

    def __init__(
        self, place: Path, places: Sequence[tuple[str, tuple[str, ...]]] = 3 * [("127.0.0.1", ())]
    ) -> None:
        routes = [f"{host}:{free_port()}" for host, _ in places]
        known = ", ".join(f"nats://{route}" for route in routes)
        self.servers: list[Server] = []
        for number, (route, (host, prefix)) in enumerate(zip(routes, places, strict=True)):
            (own := place / f"n{number}").mkdir()
            cluster = f"cluster {{ name: c, listen: {route}, routes: [{known}] }}"
            self.servers.append(Server(own, f"server_name: n{number}\n{cluster}", host, prefix))

    def url(self, name: str) -> str:
        hosts = ",".join(server.address for server in self.servers)
        return f"nats://{hosts}/{name}?replicas=3"

    def stop(self) -> None:
        for server in self.servers:
            server.stop()


class SlowLine:
    """A way to a server that takes so many bytes a second, and holds few."""

    def __init__(self, server: Server, rate: float) -> None:
        self._server, self._rate = server, rate
        self._listening = socket.create_server(("127.0.0.1", 0))

        self._ends: list[socket.socket] = []
        self._closed = threading.Event()

    def url(self, name: str) -> str:
        return f"nats://127.0.0.1:{self._listening.getsockname()[1]}/{name}"

    def __enter__(self) -> Self:
        for end in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            self._listening.setsockopt(socket.SOL_SOCKET, end, 1 << 16)
        threading.Thread(target=self._accept).start()
        return self

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                ends = self._listening.accept()[0], socket.create_connection(("127.0.0.1", self._server.port))
                self._ends += ends
                for source, sink in (ends, ends[::-1]):
                    threading.Thread(target=self._carry, args=(source, sink)).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._closed.wait(len(data) / self._rate)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for each in (self._listening, *self._ends):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
