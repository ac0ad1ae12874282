"""The commit: the locked step in which a writer's drafts become items."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from . import changes, spares
from . import words as W
from .errors import Full, ShutDown
from .holds import Hold
from .layout import item_name
from .loans import settle_loans
from .party import Party
from .pool import find_pooled
from .room import room, rounded
from .spares import Spare
from .stock import MOST_SPARES, FileDraft, Stock
from .tend import drop_file


def shut_down(party: Party) -> ShutDown:
    """The error for a put into a spool that was shut down."""
    return ShutDown(f"the spool {party.path} was shut down; SpoolWriter(path, reopen=True) opens it again")


def commit_all(party: Party, stock: Stock, drafts: Sequence[FileDraft], seqs: list[int]) -> bool:
    """The locked step of a put: True when the next draft's file is not there any more."""
    if stock.holds.pending:
        settle_loans(party, stock.holds)
    stock.maps.sweep(party.index.words)
    while len(seqs) < len(drafts):
        try:
            seq = _commit(party, stock, drafts[len(seqs)])
        except (Full, ShutDown, OSError):
            if seqs:
                return (
                    False  # those are put; what stands in the way of the next is told when it is tried again
                )
            raise
        if seq is None:
            return True
        seqs.append(seq)
    return False


def _commit(party: Party, stock: Stock, draft: FileDraft) -> int | None:
    """Commit one draft, in the locked step: None when its file is not there any more."""
    index = party.index
    words = index.words
    if words[W.SHUTDOWN]:
        raise shut_down(party)
    if not room(words, rounded(draft.need)):
        raise Full(f"the spool {party.path} is full")
    loan = party.token if draft.lent else 0
    spare = draft.spare
    if spare is not None:
        if not spares.is_ours(party, spare):
            return None
        seq = _commit_spare(party, stock, draft, spare, loan)
    else:
        seq = _commit_new(party, stock, draft, loan)
    if seq is not None and loan:
        _lend_on(party, stock, draft, seq)
    return seq


def _commit_spare(party: Party, stock: Stock, draft: FileDraft, spare: Spare, loan: int) -> int | None:
    """Make an item of a consumed file that is ours and written, in the locked step, and reserve the next one.

    loan: this party's token when its array was lent. Returns the sequence number, None when the file is not there
    any more. A crash before the rename leaves a reserved file, after it an item.
    """
    index, need = party.index, draft.need
    seq = changes.next_seq(index.words)
    record, head = spare.record, W.bucket(need)
    successor = link = 0
    if len(stock.spares) < MOST_SPARES:
        only_mapped = stock.keeps_to_mapped(need)
        successor, link = find_pooled(index, head, need, spare.size, stock.maps, only_mapped=only_mapped)
    changes.describe(index, record, seq, draft.put_time, _saying(draft), loan, draft.image.end)
    stores = changes.put(index, record, successor, link)
    layout = party.layout
    move = partial(os.rename, spare.name, item_name(seq), src_dir_fd=layout.free, dst_dir_fd=layout.items)
    try:
        index.change(W.ARRIVE, seq, stores, move)
    except FileNotFoundError:
        layout.check_present()
        drop_file(party, record)
        return None
    party.news("items")
    if successor:
        stock.spares.append(spares.spare_of(index, successor))
    elif not index.words[head]:
        stock.lack(need)
    return seq


def _saying(draft: FileDraft) -> int:
    """The flag of an item that has names or metadata, for readers who would look for a plain array first."""
    return 0 if draft.payload.names is None and draft.payload.meta is None else W.SAYING


def _commit_new(party: Party, stock: Stock, draft: FileDraft, loan: int) -> int | None:
    """As `_commit_spare`, for a draft in `tmp/`. A crash before the rename leaves a dead party's temporary file."""
    index = party.index
    seq = changes.next_seq(index.words)
    record = index.new_record()
    flags = _saying(draft) | (W.DURABLE if stock.durable else 0)
    changes.describe(index, record, seq, draft.put_time, flags, loan, draft.image.end)
    stores = changes.put_new(index, record, seq, draft.size)
    layout = party.layout
    move = partial(os.rename, draft.name, item_name(seq), src_dir_fd=layout.tmp, dst_dir_fd=layout.items)
    try:
        index.change(W.ARRIVE, seq, stores, move)
    except FileNotFoundError:
        layout.check_present()
        return None
    party.news("items")
    if loan and draft.status is not None and draft.buffer is not None:
        stock.maps.keep(draft.buffer, draft.status, seq, record)
    return seq


def _lend_on(party: Party, stock: Stock, draft: FileDraft, seq: int) -> None:
    """Remember that whoever filled a lent array may still look at the item's file."""
    index, hold = party.index, draft.hold
    assert hold is not None
    record = draft.spare.record if draft.spare is not None else index.words[W.READY_TAIL]
    if hold.index is not index:
        hold = Hold(index, record, seq, alone=hold.alone)
        stock.holds.add(hold, draft.payload.arrays)
    hold.record, hold.number = record, seq
