"""The commands of `docs/distributed.md` and of the compose file make a cluster, each on a host of its own."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support.peer import Peer

from nats_engine import network
from nats_engine.server import PROGRAM
from nats_engine.traffic import made
from spoolipc import SpoolReader, stat

ROOT = Path(__file__).parents[2]
URL = "nats://a,b,c/frames?replicas=3"


def commands(name: str) -> list[str]:
    """What starts a server with, after its name, in that file."""
    return re.findall(r"^ +(?:nats-server|command:) (-n \w .*)$", (ROOT / name).read_text(), re.MULTILINE)


@pytest.mark.fault
@pytest.mark.skipif(not network.possible(), reason="network namespaces need root, unshare and ip")
@pytest.mark.parametrize(
    "name",
    [
        "docs/distributed.md",
        pytest.param("examples/cluster/docker-compose.yml", marks=pytest.mark.exhaustive),
    ],
)
def test_commands_make_a_cluster_that_outlasts_the_loss_of_a_server(tmp_path: Path, name: str) -> None:
    with Peer(tmp_path, *network.IN_NAMESPACES) as peer:
        peer.run(f"from nats_engine import test_nats_recipe as recipe; recipe.follow({commands(name)!r})")


def test_page_has_the_urls_that_are_tried() -> None:
    assert URL in (ROOT / "docs/distributed.md").read_text()


def follow(lines: list[str]) -> None:
    """Start the servers as these lines do, and lose one."""
    places = network.connect()
    assert [line.split()[1] for line in lines] == ["a", "b", "c"]
    hosts = "".join(f"{host} {name}\n" for name, (host, _) in zip("abc", places, strict=True))
    Path("/run/hosts").write_text(hosts)
    subprocess.run(["mount", "--bind", "/run/hosts", "/etc/hosts"], check=True)
    own_files = ("sh", "-c", 'mount -t tmpfs none /var/lib && exec "$@"', "sh")
    servers = [
        subprocess.Popen([*prefix, *own_files, PROGRAM, *shlex.split(line)], stderr=subprocess.DEVNULL)
        for line, (_, prefix) in zip(lines, places, strict=True)
    ]
    with made(URL) as writer, SpoolReader(URL) as reader:
        for number, lost in enumerate([None, servers[0]]):
            if lost is not None:
                lost.kill()
                lost.wait()
            writer.put(np.full(300_000, number))
            assert (reader.get() == number).all()
        assert stat(URL).depth == 0
    for server in servers[1:]:
        server.terminate()
        server.wait()
