"""spoolipc, multiprocessing.Queue and the limit, as `spoolipc bench` measures them."""

from __future__ import annotations

from spoolipc.benchlinks import QueueLink, RingLink, SpoolLink

from .base import Carrier

LIMIT = Carrier(
    "limit",
    "https://docs.python.org/3/library/multiprocessing.shared_memory.html",
    "a ring of slots in one SharedMemory, kept mapped; two semaphores; the reader reads the slot itself",
    RingLink,
)
SPOOL = Carrier("spoolipc", "docs/performance.md", "put, and get of a view", SpoolLink, stored=True)
QUEUE = Carrier(
    "multiprocessing.Queue",
    "https://docs.python.org/3/library/multiprocessing.html#multiprocessing.Queue",
    "Queue(maxsize), put and get of the array",
    QueueLink,
)
