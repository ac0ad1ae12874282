"""Spools as a source of tensors: `SpoolDataset`, for the DataLoader of PyTorch. Needs the extra `torch`.

Putting needs nothing from here: `SpoolWriter.put` takes a tensor in host memory, and `torch.from_numpy(loan.array)` is
one over the memory of a loan.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import IterableDataset

from .engine import End
from .errors import Empty, ShutDown, UnsupportedArray
from .item import Item
from .message import Array, duration, one_of, whole
from .queue import SpoolReader

_IDLE: Final = 1.0
"""Seconds without an item after which what was given out is acknowledged: two workers that wait for each other's items
would otherwise do so for ever."""


class SpoolDataset(IterableDataset[Any]):
    """The items of a spool as tensors, for `torch.utils.data.DataLoader`.

    path: the spool. With several workers each opens it for itself, and each item goes to one of them.
    transform: called in the worker with the tensor of an item, or with the dict of its tensors; what it returns is
    given out. Without it that is the tensor or the dict.
    end: when an epoch ends, as for `SpoolReader`.
    unacked: how many of the items given out last are not acknowledged yet. 0: each is acknowledged before it is given
    out, and what a crash or the end of the loop finds in a worker or on the way to the loop is lost. With batch_size x
    (prefetch_factor + 1) an item is acknowledged after its batch was handed to the loop, and a crashed worker's items
    go to others, those of batches that the loop has seen as well. Where no item comes for a second, and at the end, all
    are acknowledged.
    lease: seconds after which an item that is not acknowledged goes to another reader; None when its worker ends.

    A tensor is over the pages of the item's file, and a page is copied when it is first written, so that no operation
    in place is seen by anybody else. Raises UnsupportedArray, in the worker, for a dtype that torch has not; the item
    is requeued, and a dead letter when its attempts are used up.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        *,
        end: End = "writers",
        unacked: int = 0,
        lease: float | None = None,
    ) -> None:
        one_of("end", end, "shutdown", "writers")  # here, and not in every worker
        self._path = os.fspath(path)
        self._transform = transform
        self._end = end
        self._unacked = whole("unacked", unacked)
        self._lease = None if lease is None else duration("lease", lease, positive=True)

    def __iter__(self) -> Iterator[Any]:
        with SpoolReader(self._path, lease=self._lease, end=self._end) as reader:
            yield from self._samples(reader)

    def _samples(self, reader: SpoolReader) -> Iterator[Any]:
        given: deque[Item] = deque()
        while True:
            try:
                item = reader.receive(timeout=_IDLE if given else None, copy="on-write")
            except (Empty, ShutDown) as error:
                while given:
                    given.popleft().ack()
                if isinstance(error, ShutDown):
                    return
                continue
            try:
                sample = self._sample(item)
            except BaseException as error:
                item.nack(reason=f"{type(error).__name__}: {error}")
                raise
            given.append(item)
            del item
            while len(given) > self._unacked:
                given.popleft().ack()
            yield sample
            del sample  # not held while waiting for the next

    def _sample(self, item: Item) -> Any:
        arrays = item.arrays
        tensors: Any = {name: _tensor(item, array) for name, array in arrays.items()}
        if list(tensors) == [""]:
            tensors = tensors[""]
        return tensors if self._transform is None else self._transform(tensors)


def _tensor(item: Item, array: Array) -> torch.Tensor:
    """A tensor over the same memory, where torch can have one."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        what = f"item {item.seq} is an array of {array.dtype}, which torch has not; put it as another dtype"
        raise UnsupportedArray(what) from error
