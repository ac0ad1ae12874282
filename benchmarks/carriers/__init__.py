"""The carriers that are compared, each used as its own documentation says is fastest."""

from __future__ import annotations

from . import (
    diskcache_deque,
    fasterfifo,
    iceoryx,
    persistqueue_sqlite,
    pipes,
    pysharedmemory,
    rayqueue,
    saveload,
    torchqueue,
    zeromq,
)
from .base import Carrier
from .own import LIMIT, QUEUE, SPOOL

CARRIERS: tuple[Carrier, ...] = (
    LIMIT,
    SPOOL,
    QUEUE,
    pipes.SIMPLE_QUEUE,
    pipes.PIPE,
    saveload.CARRIER,
    zeromq.CARRIER,
    fasterfifo.CARRIER,
    torchqueue.CARRIER,
    iceoryx.CARRIER,
    pysharedmemory.CARRIER,
    diskcache_deque.CARRIER,
    persistqueue_sqlite.CARRIER,
    rayqueue.CARRIER,
)

__all__ = ["CARRIERS", "Carrier"]
