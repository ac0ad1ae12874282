"""ray: arrays in its object store, their references through ray.util.queue; small ones in the message itself."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

from ..pair import Array, Read, Receiver, Sender
from .base import Carrier

INLINE = 100_000
"""Bytes up to which Ray itself passes an argument in the message."""
STORE = 3_000_000_000
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


class RayLink:
    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        import ray
        from ray.util.queue import Queue

        if not ray.is_initialized():
            connect(ray, num_cpus=2, object_store_memory=STORE, include_dashboard=False)
        self.address = ray.get_runtime_context().gcs_address
        self._queue = Queue(maxsize=window, actor_options={"num_cpus": 0})
        self.handle = pickle.dumps(self._queue)

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "handle": self.handle}

    def sender(self) -> Sender:
        return RayEnd(self)

    def receiver(self) -> Receiver:
        return RayEnd(self)

    def close(self) -> None:
        self._queue.shutdown(force=True)


def connect(ray: Any, **options: Any) -> None:
    ray.init(namespace="spoolipc-bench", log_to_driver=False, logging_level="ERROR", **options)


def stop() -> None:
    """End Ray's daemons, if this process started them."""
    import ray

    ray.shutdown()


class RayEnd:
    def __init__(self, link: RayLink) -> None:
        import ray

        self._ray: Any = ray
        if not ray.is_initialized():
            connect(ray, address=link.address)
        self._queue: Any = pickle.loads(link.handle)

    def send(self, array: Array) -> None:
        self._queue.put([self._ray.put(array)] if array.nbytes > INLINE else array)

    def receive(self, read: Read) -> None:
        got = self._queue.get()
        read(self._ray.get(got[0]) if isinstance(got, list) else got)

    def close(self) -> None:
        self._ray.shutdown()


CARRIER = Carrier(
    "ray",
    "https://docs.ray.io/en/latest/ray-core/objects/serialization.html#numpy-arrays",
    "ray.put, the reference through ray.util.queue.Queue, and ray.get of a view; under 100 KB the array itself",
    RayLink,
    module="ray",
    package="ray",
    apart=True,
    stop=stop,
)
