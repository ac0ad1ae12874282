"""Files made ahead: their pages exist before the first put, so that it is as fast as the later ones."""

from __future__ import annotations

import os
import secrets

from . import changes, footer, npy
from . import words as W
from .index import unlink_missing_ok
from .layout import item_name
from .maps import Maps
from .newfile import map_new
from .party import Party
from .rebuild import DONATED
from .room import rounded


def preallocate(party: Party, maps: Maps, count: int, nbytes: int, prefix: str) -> int:
    """Fill the pool up to `count` files that each hold an array of `nbytes` bytes; returns how many were made.

    maps: keeps the files mapped, their pages touched. prefix: begins their names in `tmp/`, until they are
    whole.

    Raises Full when the file system is full, ValueError when the pool may not hold so much.
    """
    if count < 0 or nbytes < 0:
        raise ValueError(f"preallocate takes a count and a number of bytes, not ({count!r}, {nbytes!r})")
    size = rounded(npy.ALIGN * 4 + nbytes + footer.SIZE)
    words = party.look()
    if count * size > words[W.RECYCLE_BYTES]:
        raise ValueError(
            f"preallocate asks for {count} files of {size} bytes, but the spool keeps at most"
            f" recycle_bytes={words[W.RECYCLE_BYTES]}; give a new spool a larger recycle_bytes"
        )
    made = 0
    while words[W.POOL_BYTES] < count * size:
        name = f"{prefix}{made}.npy"
        buffer, status = map_new(party, name, size)
        try:
            birth, record = party.run(_donate, name, size)
        except BaseException:
            unlink_missing_ok(party.layout.tmp, name)
            raise
        maps.keep(buffer, status, birth, record)
        made += 1
        words = party.look()
    return made


def _donate(party: Party, name: str, size: int) -> tuple[int, int]:
    """The locked step: the file goes to `free/` under a number of its own, and into the pool."""
    index, layout = party.index, party.layout
    number = DONATED + secrets.randbits(62)
    record = index.new_record()
    stores = changes.donate(index, record, number, size)
    index.change(
        W.DONATE,
        number,
        stores,
        lambda: os.rename(name, item_name(number), src_dir_fd=layout.tmp, dst_dir_fd=layout.free),
    )
    return number, record
