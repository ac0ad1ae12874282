"""The getting side.

`take` is one locked step: the file of the first item is moved out of `items/`. A crash before the move leaves the item
waiting; after it the item is gone, as with any queue. `claim` and `settle` are two steps with the work between them: a
crash before the second gives the item to another reader.
"""

from __future__ import annotations

import os
import stat
import time
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from ..engine import retry
from ..errors import BadItem, Empty, LeaseExpired, ShutDown, SpoolError
from ..message import NOW, Ack, Contents, Deadline, Delivery, Extend, Message, Nack, Peeked, Verdict
from . import fs, housekeeping, transitions
from . import table as W
from .housekeeping import at_end, pass_on
from .itemfile import ItemFile
from .layout import item_name
from .lock import forks, put_off
from .pool import linking
from .quarantine import set_aside
from .receiving import AT_ONCE, Opened, Receiver, Taken
from .recycling import SECOND, Pin, keeper
from .session import operation
from .table import Words, active
from .transitions import first

_LONGEST: Final = 1e9  # seconds of a lease or delay
_WAITING: Final = W.together(W.SEQ, W.PUT_TIME, W.ATTEMPT, W.DATA_END, W.BYTES)
_HELD: Final = W.together(W.STATE, W.SEQ, W.OWNER)
_FOUND: Final = W.together(W.STATE, W.SEQ, W.ATTEMPT, W.OWNER)


class Claim:
    """An item in flight here, as the table knows it.

    data_end: where its footer begins, 0 when not known. pin: who shows its file. single: as in Opened. is_acked: its
    acknowledgement has begun. given: under which its reader knows it as given out.
    """

    __slots__ = ("__weakref__", "data_end", "given", "is_acked", "pin", "record", "seq", "single", "table")

    def __init__(self, table: object, record: int, seq: int, data_end: int) -> None:
        self.table = table
        self.record = record
        self.seq = seq
        self.data_end = data_end
        self.pin = Pin(table, record, seq)
        self.is_acked = False
        self.single: bool | None = None
        self.given = 0


class _Given(weakref.ref[Claim]):
    """Tells that nobody has a claim any more."""

    __slots__ = ("attempt", "record", "seq", "table")
    attempt: int
    record: int
    seq: int
    table: object


class DirectoryConsumer(Receiver):
    """A reader's session in a spool directory. Keeps `spoolipc.engine.Consumer` and `Watchable`."""

    # Taking

    def take(self, limit: int, until: Deadline, writable: bool = False, kept: bool = False) -> Taken:
        """Take up to `limit` items off the spool for good; waits only for the first. An error in the midst ends it
        early, an interrupt puts back what was taken. Raises Empty, ShutDown."""
        got = Taken()
        got.places, got.kept = [], kept or limit > AT_ONCE
        some = self._take_verified if self.verify else self._take_some
        try:
            try:
                some(got, limit, until == NOW or self._ends, writable)
            except Empty:
                if until == NOW:
                    raise
            if not got:  # not within the handler: what ends the wait is not about its error
                until = until if self.wait_for_item(until) else NOW
                retry(lambda: some(got, limit, True, writable), self.wait_for_item, until)
        except (Empty, ShutDown) as error:  # nothing was taken
            raise error.with_traceback(None) from None
        except BaseException as error:
            if not got or not fs.is_ordinary(error):
                if got.places:
                    self.put_back(got)
                raise
        return got

    @operation
    def _take_some(self, got: Taken, limit: int, sure: bool, writable: bool) -> None:
        """sure: make sure under the lock that there is nothing; not worth it for a caller that waits next."""
        ended = None
        while ended is None:
            words = self.session.look()
            ahead = self.look_ahead(words, limit - len(got), writable)
            if not (ahead or sure or words[W.READY_HEAD] or words[W.REDELIVERY_HEAD] or words[W.SHUTDOWN]):
                break
            ended = self.session.step(self._take, got, limit, ahead, writable)
        if not got:
            raise self.nothing(bool(ended))

    def _take(
        self, got: Taken, limit: int, ahead: list[Opened], writable: bool
    ) -> tuple[bool | None, int, int]:
        """Take some that are the next; whether nothing can come any more, None where there may be more to take. What
        was taken is kept, whatever error comes later: the next call meets that again. A step."""
        recycler = self.recycler
        items, space = self.begin(1)
        journal = self.session.journal
        words = journal.words
        start, more = len(got), False
        try:
            for _ in range(AT_ONCE):
                record = first(words)
                if not record or words[W.SHUTDOWN] == W.DISCARDED:
                    break
                seq = words[record + W.SEQ]
                if ahead and ahead[-1][0][5:7] == (seq, words[record + W.ATTEMPT] + 1):
                    found, shown, single = ahead.pop()
                else:
                    try:
                        found, shown, single = self.open(words, record, seq, writable)
                    except BadItem as error:
                        self._set_aside(record, f"damaged: {error}")
                        space += 1
                        continue
                pin = None
                if shown is None and got.kept:
                    shown = got
                if shown is not None:  # watched first, so that an interrupt leaves no file pinned for ever
                    pin = Pin(journal.identity, record, seq)
                    recycler.pins.add(pin, shown)
                got.places.append((record, seq))
                self.consume(record, single, pin, got)
                got.append(found)
                if len(got) == limit:
                    break
            else:
                more = True
        except BaseException as error:
            if not fs.is_ordinary(error):
                self._put_back(got.places, start)
                raise
            del got.places[len(got) :]
            if not got:
                raise
        if not got:
            recycler.reclaim()
        space += len(got) - start
        ended = None if more else not got and self.has_ended()
        return ended, items + pass_on(words, space), space

    @operation
    def _take_verified(self, got: Taken, limit: int, sure: bool, writable: bool) -> None:
        """Claim some, read every byte without the lock, acknowledge; a damaged item is dead-lettered."""
        while len(got) < limit:
            claimed: list[Delivery] = []
            try:
                self._claim_some(claimed, limit - len(got), None)
                for delivery in claimed:
                    try:
                        message = self._load(delivery, writable)
                    except BadItem:  # in failed/ now, and logged
                        continue
                    got.places.append((delivery.handle.record, delivery.seq))
                    if got.kept:
                        self.recycler.pins.add(delivery.handle.pin, got)
                    self.session.step(self._ack, [delivery], got)
                    got.append(message)
            except BaseException as error:
                if claimed:
                    self.session.step(self._requeue, claimed)  # what is in flight still
                if not got or not fs.is_ordinary(error):
                    raise
                del got.places[len(got) :]
                return

    @operation
    def put_back(self, taken: list[Message], start: int = 0) -> None:
        """Let what `take` returned, from the item at `start` on, wait again: nobody received it."""
        assert isinstance(taken, Taken)
        places = taken.places[start:]
        del taken.places[start:]
        with suppress(SpoolError, OSError):  # what stands in the way is told to the next to call
            while places:
                self.session.step(self._put_back, places, max(0, len(places) - AT_ONCE))

    def _put_back(self, places: list[tuple[int, int]], start: int) -> tuple[None, int, int]:
        """Undo the taking of items, from that at `start` on, where their files are as they were. A step."""
        journal, words, done = self.session.journal, self.session.journal.words, 0
        if words[W.MARK]:  # an interrupt came amid a transition
            journal.recover()
        for record, seq in reversed(places[start:]):
            state = words[record + W.STATE]
            if words[record + W.SEQ] == seq and state in (W.PINNED, W.POOLED):
                link = linking(words, record) if state == W.POOLED else 0
                journal.commit(transitions.restore(words, record, link, self.verify))
                self.recycler.pins.forget(record, seq)
                done += 1
        del places[start:]
        return None, done, 0

    # Claiming and settling

    @operation
    def claim(self, limit: int, lease: float | None, until: Deadline) -> list[Delivery]:
        """Take up to `limit` items in flight, for `lease` seconds or as long as this session lives."""
        return retry(partial(self._claim_some, [], limit, lease), self.wait_for_item, until)

    def _claim_some(self, taken: list[Delivery], limit: int, lease: float | None) -> list[Delivery]:
        """taken: filled by the step, so that an interrupt leaves nothing in flight unknown."""
        due = _due_in(lease) if lease is not None else 0
        if not 0 <= time.monotonic_ns() - keeper.now < SECOND:
            self.recycler.mappings.sweep(self.session.look())
        try:
            ended = self.session.step(self._claim, min(limit, AT_ONCE), due, taken)
        except BaseException:
            if taken:
                self.session.step(self._requeue, taken)
            raise
        if not taken:
            raise self.nothing(ended)
        return taken

    def _claim(self, limit: int, due: int, taken: list[Delivery]) -> tuple[bool, int, int]:
        """Take items in flight until `due` (monotonic ns, 0: no lease); whether nothing can come any more. A step."""
        items, space = self.begin(1)
        recycler, journal, token = self.recycler, self.session.journal, self.session.token
        words = journal.words
        taken.clear()  # what was taken before the index proved damaged is in flight no more
        while len(taken) < limit:
            record = first(words)
            if not record or words[W.SHUTDOWN] == W.DISCARDED:
                break
            # First, so that whoever requeues it after an interrupt finds it.
            taken.append(self._delivery(record))
            released = recycler.to_release()
            journal.commit(transitions.claim(words, record, token, due, released))
            if released:
                recycler.pins.pending.popleft()
        if not taken:
            recycler.reclaim()
        space += len(taken)
        return not taken and self.has_ended(), items + pass_on(words, 0), space

    def _delivery(self, record: int) -> Delivery:
        """The item at `record`, which is about to be in flight here. A step."""
        journal, dropped = self.session.journal, self.session.dropped
        table = journal.identity
        seq, put_time, before, data_end, size = _WAITING(journal.words, record * W.WORD)
        attempt, handle = before + 1, Claim(table, record, seq, data_end)
        given = _Given(handle, dropped.append)
        given.table, given.record, given.seq, given.attempt = table, record, seq, attempt
        handle.given = number = id(given)
        self.given[number] = given
        return Delivery(seq, attempt, put_time if data_end else 0, size, handle)

    def give_back(self) -> None:
        """Requeue what nobody has any more though it was not settled."""
        while self.session.dropped:
            for seq in self.session.step(self._give_back):
                what = f"item {seq} of {self.path} was dropped unsettled; it is redelivered. Use: with reader.receive()"
                warnings.warn(what, ResourceWarning, stacklevel=1)

    def _give_back(self) -> tuple[list[int], int, int]:
        """Redeliver what nobody has any more; the numbers of the items. A step."""
        dropped, seqs, items, space = self.session.dropped, list[int](), 0, 0
        while dropped and len(seqs) < AT_ONCE:
            given: _Given = dropped[0]
            claim = Claim(given.table, given.record, given.seq, 0)
            record = self._find(Delivery(given.seq, given.attempt, 0, 0, claim))
            if record:
                _, more, room = housekeeping.redeliver(self.session, record, "it was dropped unsettled", 0)
                items, space = items + more, space + room
                seqs.append(given.seq)
            self.given.pop(id(given), None)
            dropped.popleft()
        return seqs, items, space

    def _requeue(self, deliveries: Sequence[Delivery]) -> tuple[None, int, int]:
        """Requeue what a call claimed that was interrupted before anybody had it. A step."""
        journal, done = self.session.journal, 0
        for delivery in deliveries:
            record = self._find(delivery)
            if record:
                journal.commit(transitions.requeue(journal.words, record, 0))
                self.given.pop(delivery.handle.given, None)
                done += 1
        return None, done, 0

    def _load(self, delivery: Delivery, writable: bool = False) -> Message:
        """The whole of an item in flight here. Raises BadItem, having dead-lettered it; LeaseExpired."""
        claim: Claim = delivery.handle
        pin, pins = claim.pin, self.recycler.pins
        words, record = self._look_at(delivery)
        pin.left.append(None)  # from here on, another thread that acknowledges it leaves us the file
        try:
            if claim.is_acked:
                self.session.step(self._record_of, delivery)
            found, shown, claim.single = self.open(words, record, claim.seq, writable)
            if shown is not None:
                pins.add(pin, shown)
            return found
        except FileNotFoundError:  # another thread settled it meanwhile
            self.session.step(self.session.see_itself)
            raise self._expired(claim.seq) from None
        except BadItem as error:
            self.session.step(self._reject, [delivery], f"damaged: {error}")
            what = f"item {claim.seq} is damaged, and now a dead letter: {error}"
            raise BadItem(f"{self.path}: {what}") from error
        finally:
            pin.left.pop()
            if claim.is_acked and not pin.left:
                pins.pending.append(pin)

    load = operation(_load)

    def _look_at(self, delivery: Delivery) -> tuple[Words, int]:
        """The table's words, and where an item in flight here is. Raises LeaseExpired."""
        claim: Claim = delivery.handle
        session, record = self.session, claim.record
        words = session.look()
        ours = W.IN_FLIGHT, claim.seq, session.token
        if claim.table is not session.journal.identity or _HELD(words, record * W.WORD) != ours:
            record = session.step(self._record_of, delivery)
            words = session.look()
        return words, record

    @operation
    def describe(self, delivery: Delivery) -> Contents:
        """What an item in flight here says of itself; its arrays are not mapped. Raises what `load` raises."""
        claim: Claim = delivery.handle
        self._look_at(delivery)
        try:
            with ItemFile(self.session.directories.items, item_name(claim.seq)) as file:
                claim.single = file.status.st_nlink == 1
                return file.contents(claim.data_end)
        except FileNotFoundError:
            self.session.step(self.session.see_itself)
            raise self._expired(claim.seq) from None
        except BadItem as error:
            self.session.step(self._reject, [delivery], f"damaged: {error}")
            what = f"item {claim.seq} is damaged, and now a dead letter: {error}"
            raise BadItem(f"{self.path}: {what}") from error

    @operation
    def settle(self, deliveries: Sequence[Delivery], verdict: Verdict) -> None:
        """Decide what becomes of items in flight here. Raises LeaseExpired for one that is not any more."""
        if isinstance(verdict, Ack):
            self.session.step(self._ack, deliveries)
        elif isinstance(verdict, Nack):
            due = _due_in(verdict.delay) if verdict.delay > 0 else 0
            if not put_off(self.settle, deliveries, verdict):
                self.session.step(self._nack, deliveries, due, verdict.reason)
        elif isinstance(verdict, Extend):
            self.session.step(self._extend, deliveries, _due_in(verdict.lease))
        else:
            self.session.step(self._reject, deliveries, verdict.reason)

    def _find(self, delivery: Delivery) -> int:
        """The record of an item that is still in flight here, 0 when it is not. A step."""
        claim: Claim = delivery.handle
        journal, token = self.session.journal, self.session.token
        words = journal.words
        known: Sequence[int] = ()
        if claim.table is journal.identity:
            known = (claim.record,)
        elif self.kept.get(claim.seq) is claim.table:  # its record is another one in the table built since
            known = active(words)
        for record in known:
            ours = W.IN_FLIGHT, claim.seq, delivery.attempt, token
            if _FOUND(words, record * W.WORD) == ours:
                return record
        return 0

    def _record_of(self, delivery: Delivery) -> tuple[int, int, int]:
        return self._still_ours(delivery), 0, 0

    def _still_ours(self, delivery: Delivery) -> int:
        """The record of an item in flight here. Raises LeaseExpired. A step."""
        record = self._find(delivery)
        if not record:
            raise self._expired(delivery.seq)
        words = self.session.journal.words
        if 0 < words[record + W.DUE] <= fs.monotonic_ns():
            housekeeping.redeliver(self.session, record, "its lease ended", 0)
            raise self._expired(delivery.seq)
        return record

    def _expired(self, seq: int) -> LeaseExpired:
        return LeaseExpired(
            f"{self.path}: item {seq} is not in flight at this reader any more: its lease ended, or it was settled"
            " already; it may have been delivered again"
        )

    def _ack(self, deliveries: Sequence[Delivery], undo: Taken | None = None) -> tuple[None, int, int]:
        """Take items in flight off the spool; `undo` as for `consume`. A step."""
        if self.recycler.pins.pending:
            self.recycler.reclaim()
        words, done = self.session.journal.words, 0
        for delivery in deliveries:
            claim: Claim = delivery.handle
            record, pin = self._still_ours(delivery), claim.pin
            claim.is_acked = True
            pin.table, pin.record = self.session.journal.identity, record
            shown = pin.left or pin.forks != forks.begun
            single = self._is_single(delivery.seq) if claim.single is None else claim.single
            self.consume(record, single, pin if shown else None, undo)
            if shown and not pin.left:
                self.recycler.pins.pending.append(pin)
            self.given.pop(claim.given, None)
            done += 1
        return None, at_end(words) if words[W.SHUTDOWN] or words[W.ENDING] else 0, done

    def _is_single(self, seq: int) -> bool:
        """Whether an item's file is a regular one that has no other name."""
        try:
            status = fs.stat_at(item_name(seq), dir_fd=self.session.directories.items)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_nlink == 1

    def _nack(self, deliveries: Sequence[Delivery], due: int, reason: str) -> tuple[None, int, int]:
        """Requeue items, or dead-letter those whose last attempt that was. A step."""
        items = space = 0
        for delivery in deliveries:
            wake = housekeeping.redeliver(self.session, self._still_ours(delivery), reason, due)
            items, space = items + wake[1], space + wake[2]
            self.given.pop(delivery.handle.given, None)
        return None, items, space

    def _reject(self, deliveries: Sequence[Delivery], reason: str) -> tuple[None, int, int]:
        """Dead-letter items. A step."""
        for delivery in deliveries:
            self._set_aside(self._still_ours(delivery), reason)
            self.given.pop(delivery.handle.given, None)
        return None, pass_on(self.session.journal.words, len(deliveries)), len(deliveries)

    def _set_aside(self, record: int, why: str) -> None:
        """Make a dead letter of an item in flight here, or of the first. A step."""
        journal = self.session.journal
        self.recycler.mappings.forget(journal.words[record + W.FILE])
        set_aside(self.session.directories, journal, record, _who(), why)

    def _extend(self, deliveries: Sequence[Delivery], due: int) -> tuple[None, int, int]:
        for delivery in deliveries:
            record = self._still_ours(delivery)
            self.session.journal.commit(transitions.extend(self.session.journal.words, record, due))
        return None, 0, 0

    # Looking and waiting

    @operation
    def peek(self, until: Deadline) -> Peeked:
        """The next item, left where it is; a damaged one is dead-lettered and passed over. Raises Empty, ShutDown."""
        return retry(self._peek_one, self.wait_for_item, until)

    def _peek_one(self) -> Peeked:
        while True:
            found, ended = self.session.step(self._peek)
            if found is not None:
                return found
            if ended is not None:
                raise self.nothing(ended)

    def _peek(self) -> tuple[tuple[Peeked | None, bool | None], int, int]:
        """The next item; without one, whether nothing can come any more, None where it was damaged and is a dead letter
        now. A step, so that the file is not written again while it is read."""
        items, space = self.begin()
        words = self.session.journal.words
        record = first(words)
        if not record or words[W.SHUTDOWN] == W.DISCARDED:
            return (None, self.has_ended()), items, space
        seq = words[record + W.SEQ]
        try:
            with ItemFile(self.session.directories.items, item_name(seq)) as file:
                said = file.contents(words[record + W.DATA_END])
        except (BadItem, FileNotFoundError) as error:
            is_missing = isinstance(error, FileNotFoundError)
            self._set_aside(record, f"damaged: {'its file is missing' if is_missing else error}")
            return (None, None), items + pass_on(words, 1), space + 1
        attempt, size = words[record + W.ATTEMPT], words[record + W.BYTES]
        return (Peeked(seq, attempt, said.put_time / 1e9, size, said.names, said.meta), None), items, space


def _who() -> str:
    """This process, for the history of a failure."""
    return f"process {os.getpid()}"


def _due_in(seconds: float) -> int:
    """So many seconds from now, in monotonic ns."""
    return fs.monotonic_ns() + int(min(seconds, _LONGEST) * 1e9)
