"""Consumed files that are written again: taken from the pool, given back to it, or unlinked.

All functions are locked steps (`Party.run`). A file is RESERVED while a writer has it: when the writer dies,
the tending unlinks it.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from . import changes, pool
from . import words as W
from .index import Index
from .layout import item_name
from .party import Party
from .tend import drop_file


@dataclass(slots=True, eq=False)
class Spare:
    """A consumed file that this writer may write: record, name and the number in it, size in bytes, birth number."""

    index: Index
    record: int
    name: str
    number: int
    size: int
    birth: int


def swap(party: Party, useless: list[Spare], need: int, most: int, mapped: Container[int]) -> Spare | None:
    """Hand back spares of other sizes and take one of `need` to `most` bytes."""
    give_back(party, useless)
    return reserve(party, need, most, mapped)


def restock(
    party: Party, useless: list[Spare], wanted: list[tuple[int, int]], mapped: Container[int]
) -> list[Spare]:
    """Hand back spares and take one for each (need, most) that the pool has a file for."""
    give_back(party, useless)
    found = (reserve(party, need, most, mapped) for need, most in wanted)
    return [spare for spare in found if spare is not None]


def suffice(spares: Sequence[Spare], wanted: Sequence[tuple[int, int]]) -> bool:
    """Whether there is a spare for each (need, most)."""
    sizes = [spare.size for spare in spares]
    for need, most in wanted:
        fit = next((position for position, size in enumerate(sizes) if need <= size <= most), None)
        if fit is None:
            return False
        del sizes[fit]
    return True


def give_back(party: Party, spares: list[Spare]) -> None:
    """Put spares back into the pool, emptying the list."""
    while spares:
        spare = spares.pop()
        if is_ours(party, spare):
            party.index.change(W.MEMORY, 0, changes.release(party.index, spare.record))


def reserve(party: Party, need: int, most: int, mapped: Container[int]) -> Spare | None:
    """Take a pooled file of `need` to `most` bytes, if there is one."""
    index = party.index
    record, link = pool.find_pooled(index, W.bucket(need), need, most, mapped)
    if not record:
        return None
    index.change(W.MEMORY, 0, changes.reserve(index, record, link, party.token))
    return spare_of(index, record)


def spare_of(index: Index, record: int) -> Spare:
    """A reserved file as its writer knows it."""
    words = index.words
    number = words[record + W.FILE]
    return Spare(index, record, item_name(number), number, words[record + W.BYTES], words[record + W.BIRTH])


def is_ours(party: Party, spare: Spare) -> bool:
    """Whether a spare is still this party's to write: not committed, not lost with the index."""
    words = party.index.words
    return (
        spare.index is party.index
        and words[spare.record + W.STATE] == W.RESERVED
        and words[spare.record + W.OWNER] == party.token
        and words[spare.record + W.FILE] == spare.number
    )


def drop(party: Party, spare: Spare) -> None:
    """Unlink a spare that is not fit to be written."""
    if is_ours(party, spare):
        drop_file(party, spare.record)
