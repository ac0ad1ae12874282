"""Other ways to use spoolipc, as carriers of their own: batches, receive and ack, a checksum, power-safe puts."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from spoolipc import SpoolReader, SpoolWriter

from .carriers.own import SpoolLink
from .pair import Array, MakeLink, Read, Receiver, Sender

BATCH = 64


class BatchLink(SpoolLink):
    """64 messages a call. One `send` is one message to the harness, so its seconds are those of 64."""

    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        super().__init__(folder, nbytes, window * BATCH)

    def sender(self) -> Sender:
        return BatchSender(SpoolWriter(self._path, maxsize=self._window))

    def receiver(self) -> Receiver:
        return BatchReceiver(SpoolReader(self._path, maxsize=self._window))


class BatchSender:
    def __init__(self, writer: SpoolWriter) -> None:
        self._writer = writer
        self.close = writer.close

    def send(self, array: Array) -> None:
        self._writer.put_many([array] * BATCH)


class BatchReceiver:
    def __init__(self, reader: SpoolReader) -> None:
        self._reader = reader
        self._got: deque[Array] = deque()
        self.close = reader.close

    def receive(self, read: Read) -> None:
        for _ in range(BATCH):
            if not self._got:
                self._got.extend(self._reader.get_many(BATCH))
            read(self._got.popleft())


class AckLink(SpoolLink):
    """Each item is received, read, and then acknowledged."""

    def receiver(self) -> Receiver:
        return AckReceiver(SpoolReader(self._path, maxsize=self._window))


class AckReceiver:
    def __init__(self, reader: SpoolReader) -> None:
        self._reader = reader
        self.close = reader.close

    def receive(self, read: Read) -> None:
        with self._reader.receive() as item:
            read(item.array)


class LoanLink(SpoolLink):
    """The producer copies into an array lent to it, in place of put."""

    def sender(self) -> Sender:
        return LoanSender(SpoolWriter(self._path, maxsize=self._window))


class LoanSender:
    def __init__(self, writer: SpoolWriter) -> None:
        self._writer = writer
        self.close = writer.close

    def send(self, array: Array) -> None:
        with self._writer.loan(array.shape, array.dtype) as lent:
            lent[...] = array


class ChecksumLink(SpoolLink):
    """Every item carries a checksum, which the reader verifies."""

    def sender(self) -> Sender:
        return PutSender(SpoolWriter(self._path, maxsize=self._window, checksum=True))

    def receiver(self) -> Receiver:
        return GetReceiver(SpoolReader(self._path, maxsize=self._window, verify=True))


class DurableLink(SpoolLink):
    """Every put is on the disk before it returns."""

    def sender(self) -> Sender:
        return PutSender(SpoolWriter(self._path, maxsize=self._window, durability="fsync"))


class PutSender:
    def __init__(self, writer: SpoolWriter) -> None:
        self._writer = writer
        self.close = writer.close

    def send(self, array: Array) -> None:
        self._writer.put(array)


class GetReceiver:
    def __init__(self, reader: SpoolReader) -> None:
        self._reader = reader
        self.close = reader.close

    def receive(self, read: Read) -> None:
        read(self._reader.get())


VARIANTS: dict[str, MakeLink] = {
    "put and get": SpoolLink,
    "64 a call": BatchLink,
    "receive and ack": AckLink,
    "loan, copied into": LoanLink,
    "checksum, verified": ChecksumLink,
}
