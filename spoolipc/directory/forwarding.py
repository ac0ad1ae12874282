"""A writer's and a reader's session as the two ends of a forwarder, to and from other spools."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial

from ..engine import Known, retry
from ..errors import BadItem, UnknownVersion
from ..format import item as items
from ..message import Deadline, Delivery, Message
from . import fs, sources, transitions
from .consumer import DirectoryConsumer
from .itemfile import ItemFile
from .layout import item_name, item_number
from .producer import DirectoryProducer, need_of
from .session import operation
from .staging import Staged
from .table import LAST_SEQ, NEVER_AGAIN


class DirectoryDestination(DirectoryProducer):
    """A writer's session that can put items forwarded from elsewhere. Keeps `spoolipc.engine.Destination`."""

    _forwards = False

    @operation
    def forwarded(self, source: str) -> Known:
        """What came last from the spool of that name. Raises SpoolInUse while another process forwards from there."""
        # Whether an item was put is told by the file it was staged in, whose name nobody else may ever use.
        self._staging.recycles, self._staging.flags = False, NEVER_AGAIN
        self._forwards = True
        return self.session.step(sources.begin, self.session, source)

    @operation
    def put_forwarded(
        self, source: str, messages: Sequence[Message], until: Deadline, done: Collection[str] = ()
    ) -> int:
        """Put the first of these messages, as many as there is room for, and note that they came from that source."""
        staged: list[Staged] = []
        seqs: list[int] = []
        numbers = {message.id: message.seq for message in messages}

        def commit(staged: list[Staged], seqs: list[int]) -> tuple[bool, int, int]:
            """A crash before the first rename leaves files that were noted and are struck out, as do those after."""
            files = {(each := one.id.hex()): (numbers[each], one.name) for one in staged}
            sources.record(self.session, source, done, files, self._durable)
            return self._commit_all(staged, seqs)

        try:
            retry(
                lambda: self._put_some(messages, staged, seqs, commit),
                partial(self._wait_for_room, need_of(messages[0])),
                until,
            )
            return len(seqs)
        finally:
            if staged and self._are_struck_out():
                for left in staged:
                    self._staging.unstage(left)

    def _are_struck_out(self) -> bool:
        """Note that what is staged was not put; false where that cannot be, and the files must stay."""
        return self.session.step(sources.settle, self.session, [self.session.token])

    def leave(self) -> tuple[bool, int, int]:
        """As of any producer; where what is staged cannot be struck out, it is left as by a crash. A step."""
        if self._forwards and not sources.settle(self.session, (self.session.token,))[0]:
            return False, 0, 0
        return super().leave()


class DirectorySource(DirectoryConsumer):
    """A reader's session whose items can be forwarded elsewhere. Keeps `spoolipc.engine.Source`."""

    @operation
    def name(self) -> str:
        """The name of the spool, which no other has."""
        return self.session.step(sources.own_name, self.session)

    @operation
    def unclaim(self, deliveries: Sequence[Delivery]) -> None:
        """Let items in flight here wait again, as if they had not been delivered."""
        self.session.step(self._unclaim, deliveries)

    def _unclaim(self, deliveries: Sequence[Delivery]) -> tuple[None, int, int]:
        """A step."""
        journal, count = self.session.journal, 0
        for delivery in deliveries:
            if record := self._find(delivery):
                journal.commit(transitions.requeue(journal.words, record, 0, counted=1))
                self.given.pop(delivery.handle.given, None)
                count += 1
        return None, count, 0

    def browse(self, after: int) -> Iterator[Message]:
        """The items that wait or are in flight, from the one after that number on, copied where they are."""
        names = fs.list_names(self.session.directories.items)
        numbers = sorted(number for number in map(item_number, names) if number and after < number < LAST_SEQ)
        for number in numbers:
            with suppress(BadItem, UnknownVersion):
                if message := self._copied(number):
                    yield message

    @operation
    def _copied(self, number: int) -> Message | None:
        """A copy of an item, None for one that is not there any more. Raises BadItem, UnknownVersion."""
        directory, name = self.session.directories.items, item_name(number)
        try:
            with ItemFile(directory, name) as file:
                whole = bytes(file.map()) if file.size else b""
                # As no number is given twice, what is there still was there all the time.
                fs.stat_at(name, dir_fd=directory)
        except FileNotFoundError:
            return None
        blocks, tail = items.parse(whole, len(whole))
        return items.message(whole, blocks, tail, (number, 0, len(whole)), copy=False)
