"""The commit: the locked step in which a writer's drafts become items."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from . import changes, spares
from . import words as W
from .errors import Full, ShutDown
from .holds import Hold
from .layout import item_name
from .loans import settle_loans
from .newfile import SMALL
from .party import Party
from .room import room, rounded
from .stock import CHEAP, MOST_SPARES, FileDraft, Stock
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
    layout = party.layout
    seq = changes.next_seq(words)
    flags = W.DURABLE if stock.durable else 0
    spare = draft.spare
    loan = party.token if draft.lent else 0
    successor = link = 0
    if spare is not None:
        if not spares.is_ours(party, spare):
            return None
        if len(stock.spares) < MOST_SPARES:
            need, most = draft.need, draft.size
            successor, link = changes.find_pooled(
                index, need, most, stock.maps, only_mapped=need >= changes.LARGE
            )
        record = spare.record
        changes.describe(words, record, seq, draft.put_time, flags, loan, draft.image.end)
        stores = changes.put(index, record, seq, successor, link)
        source, directory = item_name(spare.number), layout.free
    else:
        record = index.new_record()
        changes.describe(index.words, record, seq, draft.put_time, flags, loan, draft.image.end)
        stores = changes.put_new(index, record, seq, draft.size)
        source, directory = draft.name, layout.tmp
    try:
        index.change(W.ARRIVE, seq, stores, _rename(source, directory, item_name(seq), layout.items))
    except FileNotFoundError:
        layout.check_present()
        if spare is not None:
            drop_file(party, spare.record)
        return None
    party.news("items")
    if loan:
        if draft.status is not None and draft.buffer is not None:
            stock.maps.keep(draft.buffer, draft.status, seq, record)
        hold = draft.hold
        assert hold is not None
        if hold.index is not index:
            hold = Hold(index, record, seq, alone=hold.alone)
            stock.holds.add(hold, draft.payload.arrays)
        hold.record, hold.number = record, seq
    if successor:
        stock.keep(spares.spare_of(index, successor))
    elif spare is not None and draft.need < CHEAP:
        stock.short = min(stock.short + 1, MOST_SPARES if draft.need <= SMALL else 1)
    return seq


def _rename(source: str, directory: int, target: str, items: int) -> Callable[[], None]:
    return lambda: os.rename(source, target, src_dir_fd=directory, dst_dir_fd=items)
