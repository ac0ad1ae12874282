"""A spool in the lower layer of an overlay file system, as one that lies in a container's image: a file there keeps its
device and inode when it is copied up, and who has it mapped goes on to see the copy below."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.mounts import overlay
from support.peer import Peer

from spoolipc import SpoolReader, SpoolWriter

pytestmark = pytest.mark.fault
WAITING = 6


@pytest.fixture
def size(request: pytest.FixtureRequest) -> int:
    """Of float64."""
    return int(request.param)


@pytest.fixture
def mounted(tmp_path: Path, size: int) -> Iterator[Path]:
    """The spool, mounted, with items below it that were put before."""
    lower = tmp_path / "lower"
    with SpoolWriter(lower / "spool", checksum=True) as writer, SpoolReader(lower / "spool") as reader:
        for number in range(WAITING):
            writer.put(np.full(size, -number - 1.0))
        for _ in range(2):
            reader.get_nowait()
    with overlay(tmp_path / "merged", lower) as merged:
        yield merged / "spool"


@pytest.mark.parametrize("size", [100, 5000, 200_000], indirect=True)
@pytest.mark.parametrize("how", ["get", "receive"])
def test_items_of_the_lower_layer_and_later_ones_come_as_they_were_put(
    mounted: Path, size: int, how: str
) -> None:
    taking = {
        "get": "found = float(reader.get_nowait().mean())",
        "receive": "with reader.receive() as item: found = float(item.array.mean())",
    }
    expected = [-number - 1.0 for number in range(2, WAITING)]
    with SpoolWriter(mounted, checksum=True) as writer, Peer(mounted) as peer:
        peer.run("reader = SpoolReader(path, verify=False)")
        for number in range(40):
            writer.put(np.full(size, float(number)))
            expected.append(float(number))
            peer.run(taking[how])
            assert peer.ask("found") == expected.pop(0)
