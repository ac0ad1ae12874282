"""A real server for the tests: started, stopped and started again on the same port, its data in a directory."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = Path(sys.executable).with_name("nats-server")


def free_port() -> int:
    """One on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


class Server:
    """A server that runs. port: on which it listens. config: more lines of its configuration."""

    def __init__(self, place: Path, config: str = "") -> None:
        self.port = free_port()
        self._file = place / f"nats-{self.port}.conf"
        store = f'jetstream {{ store_dir: "{place / "store"}" }}' if "jetstream" not in config else ""
        self._file.write_text(f"listen: 127.0.0.1:{self.port}\n{store}\n{config}\n")
        self._log = place / f"nats-{self.port}.log"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it serves."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(PROGRAM), "-c", str(self._file)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def stop(self, kill: bool = False) -> None:
        """Stop it, or kill it, and wait until it has ended."""
        (self._process.kill if kill else self._process.terminate)()
        self._process.wait(30)

    def url(self, name: str) -> str:
        return f"nats://127.0.0.1:{self.port}/{name}"


class Cluster:
    """Three servers that know each other."""

    def __init__(self, place: Path) -> None:
        ports = [free_port() for _ in range(3)]
        routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports)
        self.servers: list[Server] = []
        for number, port in enumerate(ports):
            (own := place / f"n{number}").mkdir()
            cluster = f"cluster {{ name: c, listen: 127.0.0.1:{port}, routes: [{routes}] }}"
            self.servers.append(Server(own, f"server_name: n{number}\n{cluster}"))

    def url(self, name: str) -> str:
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.servers)
        return f"nats://{hosts}/{name}?replicas=3"

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
