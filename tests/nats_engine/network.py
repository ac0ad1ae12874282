"""Hosts on one machine, each in a network namespace of its own, and a line to each that can be cut.

For a process that has network and mount namespaces of its own: it is the client, and all goes with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Final

HOSTS: Final = {"client": "10.9.0.1", "n0": "10.9.0.2", "n1": "10.9.0.3", "n2": "10.9.0.4"}
SERVERS: Final = [host for host in HOSTS if host != "client"]
IN_NAMESPACES: Final = (
    *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
    *("sh", "-c", 'PATH=$PATH:/usr/sbin:/sbin; mount -t tmpfs none /run && exec "$@"', "sh"),
)
"""Starts such a process."""


def possible() -> bool:
    return (
        os.geteuid() == 0
        and shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is not None
        and subprocess.run(["unshare", "-nm", "true"], capture_output=True, check=False).returncode == 0
    )


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def connect() -> list[tuple[str, tuple[str, ...]]]:
    """Make the hosts, on one bridge; returns for each server its address and the command that runs it there."""
    _ip("netns", "add", "hub")
    _ip("-n", "hub", "link", "add", "bridge", "up", "type", "bridge")
    for host, address in HOSTS.items():
        there, inside = ([], []) if host == "client" else (["netns", host], ["-n", host])
        if there:
            _ip("netns", "add", host)
        _ip("link", "add", "eth0", *there, "type", "veth", "peer", "name", host, "netns", "hub")
        _ip(*inside, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip(*inside, "link", "set", device, "up")
        _ip("-n", "hub", "link", "set", host, "up")
        heal(host)
    return [(HOSTS[host], ("ip", "netns", "exec", host)) for host in SERVERS]


def cut(host: str) -> None:
    """From now on what it sends, or what is sent to it, goes nowhere, and nobody is told."""
    _ip("-n", "hub", "link", "set", host, "nomaster")


def heal(host: str) -> None:
    _ip("-n", "hub", "link", "set", host, "master", "bridge")


def part(host: str, others: list[str], verb: str = "add") -> None:
    """Let it and these hosts reach each other no more, but all else; `del` lets them again."""
    for one, other in [(host, each) for each in others] + [(each, host) for each in others]:
        _ip("-n", one, "route", verb, "blackhole", HOSTS[other])
