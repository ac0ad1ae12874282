"""The getting side of the directory engine.

`get` is one locked step: the file of the first item is moved out of `items/`. A crash before the move leaves
the item waiting; after it the item is gone, as with any queue. `claim` and `ack` are two steps with the work
between them: a crash before the second gives the item to another reader.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from . import changes, claiming, steadyget, taking
from . import words as W
from .claiming import Claim, expired
from .contents import read_contents
from .engine import Contents, Delivery, Payload
from .errors import BadItem, Empty, ShutDown
from .hands import Hands, release_pending
from .holds import Hold
from .index import exists
from .layout import item_name
from .newfile import SMALL
from .party import Party
from .taking import ended, look_ahead
from .tend import drop_file, is_due, return_item
from .waiting import wait


class DirectorySource(Hands):
    """A reader's party in a spool directory. asked: limits, None for what is there."""

    @property
    def path(self) -> str:
        """The spool's directory, absolute."""
        return self.party.path

    @property
    def maxsize(self) -> int:
        """Most items waiting, 0 for no limit."""
        return self.party.look()[W.MAXSIZE]

    def get(self, limit: int, *, sure: bool = True) -> list[Payload]:
        """Take up to `limit` items off the spool for good. Raises Empty, ShutDown."""
        if self.verify:
            return self._get_verified(limit)
        got = [Payload((array,), None, None) for array in steadyget.get_again(self, limit)]
        if not got and not sure:
            self._expect_something()
        if len(got) < limit:
            with self.party, contextlib.suppress(*(Empty, ShutDown) if got else ()):
                self.party.run(taking.take, self, limit, look_ahead(self, limit - len(got)), got)
        return got

    def _expect_something(self) -> None:
        """Raise Empty when a look without the lock sees no reason for a step."""
        words = self.party.look()
        waiting = words[W.READY] or words[W.RETURNED] or words[W.SHUTDOWN]
        if not waiting and not is_due(words[W.TENDED], words[W.NEXT_DUE]):
            raise Empty(f"no item waits in {self.party.path}")

    def _get_verified(self, limit: int) -> list[Payload]:
        """Claim, read every byte without the lock, acknowledge; a damaged item is given up and another claimed."""
        while True:
            sound: list[Delivery] = []
            got: list[Payload] = []
            claimed = self.claim(limit, None)
            try:
                for delivery in claimed:
                    with contextlib.suppress(BadItem):  # in failed/ now, and logged
                        got.append(self.load(delivery))
                        sound.append(delivery)
                self.ack(sound)
            except BaseException:
                self.party.run(claiming.put_down, claimed)
                raise
            if got:
                return got

    def claim(self, limit: int, lease: float | None, *, sure: bool = True) -> list[Delivery]:
        """Take up to `limit` items in hand, for `lease` seconds or as long as this party lives.

        Raises Empty, ShutDown.
        """
        due = claiming.due_in(lease) if lease is not None else 0
        taken: list[Delivery] = []
        try:
            if limit == 1:
                steadyget.claim_again(self, due, taken)
            if not taken:
                if not sure:
                    self._expect_something()
                self.party.run(claiming.claim, self, limit, due, taken)
        except BaseException:
            if taken:
                self.party.run(claiming.put_down, taken)
            raise
        return taken

    def load(self, delivery: Delivery) -> Payload:
        """The contents of an item in hand; its arrays are read-only views. Raises BadItem, having given the item up."""
        claim: Claim = delivery.handle
        index = self.party.index
        if claim.index is not index:
            raise expired(self.party, claim.seq)
        row = W.ROW.unpack_from(index.map, claim.record * W.WORD)
        array = None
        if row[W.SEQ] == claim.seq and not row[W.FLAGS] and not self.verify:
            with self.party:
                array = steadyget.open_again(self, row)
        if array is not None:
            claim.single = True
            if row[W.END] > SMALL:
                claim.hold = claim.hold or Hold(index, claim.record, claim.seq)
                self.holds.add(claim.hold, (array,))
            return Payload((array,), None, None)
        try:
            with self.party:
                opened = self.open_item(index.words, claim.record, claim.seq)
        except BadItem as error:
            self.party.run(claiming.reject, self, delivery, f"damaged: {error}")
            raise
        claim.single = opened.single
        if opened.held:
            claim.hold = claim.hold or Hold(index, claim.record, claim.seq)
            self.holds.add(claim.hold, opened.payload.arrays)
        return opened.payload

    def contents(self, delivery: Delivery) -> Contents:
        """What an item in hand, or one peeked at, says of itself; its arrays are not mapped.

        Raises BadItem, having given the item up, and LeaseExpired when it is elsewhere now.
        """
        claim: Claim = delivery.handle
        name = item_name(delivery.seq)
        items = self.party.layout.items
        with self.party:
            try:
                said = read_contents(items, name, claim.end)
            except FileNotFoundError:
                self.party.layout.check_present()
                raise expired(self.party, delivery.seq) from None
            except BadItem as error:
                step = claiming.give_up_peeked if claim.peeked else claiming.reject
                self.party.run(step, self, delivery, f"damaged: {error}")
                raise
            if claim.peeked and not exists(items, delivery.seq):
                # Somebody has got it, and its file may have been written again while it was read.
                raise expired(self.party, delivery.seq)
            return said

    def peek(self) -> Delivery:
        """The next item, left where it is. Raises Empty, ShutDown."""
        return self.party.run(claiming.peek, self)

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Take items in hand off the spool for good. Raises LeaseExpired for one not in hand any more."""
        if len(deliveries) != 1 or not steadyget.ack_again(self, deliveries[0]):
            self.party.run(claiming.ack, self, list(deliveries))

    def nack(self, delivery: Delivery, delay: float, why: str) -> None:
        """Give an item back, to be delivered again after `delay` seconds."""
        self.party.run(claiming.nack, self, delivery, delay, why)

    def reject(self, delivery: Delivery, why: str) -> None:
        """Give an item up: it becomes a dead letter in `failed/`."""
        self.party.run(claiming.reject, self, delivery, why)

    def extend(self, delivery: Delivery, lease: float) -> None:
        """Keep an item in hand for `lease` seconds from now."""
        self.party.run(claiming.extend, self, delivery, lease)

    def wait_items(self, deadline: float | None) -> bool:
        """Wait until there may be an item; False when the deadline (monotonic seconds) is past."""
        if self.holds.pending:
            self.party.run(release_pending, self)
        own = self.own

        def look(words: memoryview[int]) -> bool:
            if words[W.RETURNED] or words[W.READY]:
                return True
            return ended(words, own)

        return wait(self.party, "items", look, deadline, self.maps)

    def qsize(self) -> int:
        """How many items wait."""
        return self.party.qsize()

    def close(self) -> None:
        """Leave: what is in hand is given back; files that are still looked at lose their names."""
        self.party.close(self._leave)
        self._forget()

    def _leave(self, party: Party) -> None:
        release_pending(party, self)
        words = party.index.words
        for record in reversed(changes.away(party.index)):
            if words[record + W.OWNER] == party.token:
                if words[record + W.STATE] == W.CLAIMED:
                    return_item(party, record, "its reader left", 0)
                elif words[record + W.STATE] == W.HELD:
                    drop_file(party, record)
