"""Lent arrays after their commit: the writer that filled one may still look at it.

Its file carries the writer's token in LOAN until the array and every view of it are gone. A reader that is
done with such a file does not pool it but passes it into the writer's hands (HELD), and the writer pools it
when it can.
"""

from __future__ import annotations

from . import changes, pool
from . import words as W
from .holds import Holds
from .party import Party
from .tend import drop_file


def settle_loans(party: Party, holds: Holds) -> None:
    """Files whose lent array is gone may be written again, in the locked step."""
    index = party.index
    while holds.pending:
        hold = holds.pending.popleft()
        words, record = index.words, hold.record
        if hold.index is not index or words[record + W.FILE] != hold.number:
            continue
        if words[record + W.LOAN] == party.token:
            # A child forked meanwhile may look at it for ever: such a file is unlinked when it is consumed.
            flags = words[record + W.FLAGS] | (0 if hold.alone else W.DURABLE)
            index.change(W.MEMORY, 0, {record + W.LOAN: 0, record + W.FLAGS: flags})
        elif words[record + W.STATE] == W.HELD and words[record + W.OWNER] == party.token:
            release(party, record, hold.alone)


def release(party: Party, record: int, alone: bool) -> bool:
    """A file in our hands that no array of ours looks at goes to the pool, or into the hands of the writer that lent
    it; unlinked when the pool is full, or a fork may look at it (not `alone`). True when it was kept."""
    index = party.index
    words = index.words
    never_again = not alone or words[record + W.FLAGS] & W.DURABLE
    if never_again or not pool.may_pool(words, words[record + W.BYTES]):
        drop_file(party, record)
        return False
    if words[record + W.LOAN]:
        index.change(W.MEMORY, 0, {record + W.OWNER: words[record + W.LOAN], record + W.LOAN: 0})
    else:
        index.change(W.MEMORY, 0, changes.release(index, record))
    return True


def abandon_loans(party: Party) -> None:
    """On leaving: files passed into our hands lose their names, as somebody may still look at them."""
    words = party.index.words
    for record in changes.away(party.index):
        if words[record + W.OWNER] == party.token and words[record + W.STATE] == W.HELD:
            drop_file(party, record)
