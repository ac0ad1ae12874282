"""iceoryx2: slices loaned from the publisher's memory, sent without a copy, and an event to wake the reader."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from ..pair import Array, Read, Receiver, Sender
from .base import Carrier


class IceoryxLink:
    def __init__(self, folder: Path, nbytes: int, window: int) -> None:
        self.name = str(folder)
        self.size, self.window = nbytes // 8 * 8, window

    def sender(self) -> Sender:
        return IceoryxSender(self)

    def receiver(self) -> Receiver:
        return IceoryxReceiver(self)

    def close(self) -> None:
        pass


def services(link: IceoryxLink) -> tuple[Any, Any, Any]:
    """The node, and the services for messages and for events, with the window as the reader's buffer."""
    import iceoryx2 as iox

    iox.set_log_level(iox.LogLevel.Error)
    node = iox.NodeBuilder.new().create(iox.ServiceType.Ipc)
    name = iox.ServiceName.new(link.name)
    messages = (
        node.service_builder(name)
        .publish_subscribe(iox.Slice[ctypes.c_uint8])
        .subscriber_max_buffer_size(link.window)
        .enable_safe_overflow(False)
        .open_or_create()
    )
    return node, messages, node.service_builder(name).event().open_or_create()


class IceoryxSender:
    def __init__(self, link: IceoryxLink) -> None:
        import iceoryx2 as iox

        self._size = link.size
        self._node, messages, events = services(link)
        self._publisher = (
            messages.publisher_builder()
            .initial_max_slice_len(link.size)
            .backpressure_strategy(iox.BackpressureStrategy.RetryUntilDelivered)
            .create()
        )
        self._notifier = events.notifier_builder().create()

    def send(self, array: Array) -> None:
        loaned = self._publisher.loan_slice_uninit(self._size)
        np.copyto(np.frombuffer(loaned.payload().as_memory_view()), array)
        loaned.assume_init().send()
        self._notifier.notify()

    def close(self) -> None:
        self._publisher.delete()
        self._notifier.delete()


class IceoryxReceiver:
    def __init__(self, link: IceoryxLink) -> None:
        self._node, messages, events = services(link)
        self._subscriber = messages.subscriber_builder().buffer_size(link.window).create()
        self._listener = events.listener_builder().create()

    def receive(self, read: Read) -> None:
        sample = self._subscriber.receive()
        while sample is None:
            self._listener.blocking_wait()
            sample = self._subscriber.receive()
        read(np.frombuffer(sample.payload().as_memory_view()))
        sample.delete()

    def close(self) -> None:
        self._subscriber.delete()
        self._listener.delete()


CARRIER = Carrier(
    "iceoryx2",
    "https://github.com/eclipse-iceoryx/iceoryx2/tree/main/examples/python/event_based_communication",
    "loan_slice_uninit, filled in place, RetryUntilDelivered; an event wakes the reader, which reads the sample itself",
    IceoryxLink,
    module="iceoryx2",
    package="iceoryx2",
)
