"""Which file system a path lies on, and whether a memory map of it can be trusted.

A map of a file on a network file system is not coherent between machines, so such places are refused.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .errors import NetworkFileSystem

MOUNTINFO = Path("/proc/self/mountinfo")
NETWORK = frozenset(
    "nfs nfs4 cifs smb3 smbfs ncpfs afs ceph lustre gfs2 ocfs2 glusterfs 9p beegfs gpfs pvfs2 orangefs coda"
    " fuse.sshfs fuse.glusterfs fuse.ceph fuse.s3fs fuse.rclone fuse.gcsfuse fuse.juicefs".split()
)
MEMORY = frozenset({"tmpfs", "ramfs"})


def _unescape(text: str) -> str:
    return text.encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")


def file_system(path: Path) -> str:
    """The type of the file system that holds `path` (or will: its nearest existing parent), e.g. "tmpfs".

    Read from the kernel's mount table; "unknown" where that cannot be read.
    """
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    real = os.path.realpath(place)
    best, kind = "", "unknown"
    try:
        table = MOUNTINFO.read_text(errors="surrogateescape")
    except OSError:
        return kind
    for line in table.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4]
        if "\\" in point:
            point = _unescape(point)
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def refuse_network(path: Path) -> None:
    """Raise NetworkFileSystem when `path` lies on a file system shared between machines."""
    kind = file_system(path)
    if kind in NETWORK:
        raise NetworkFileSystem(
            errno.ENOTSUP,
            f"lies on a network file system ({kind}), where processes on two machines would see different data;"
            " use a local directory such as /dev/shm, or the NATS engine between machines",
            str(path),
        )
