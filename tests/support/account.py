"""The account of a spool: its table against its directories, made independently of `spoolipc fsck`."""

from __future__ import annotations

import os
from pathlib import Path

from spoolipc import fsck, stat
from support.peek import IN_FREE, IN_ITEMS, peek_table


def names_in(path: Path, part: str) -> list[str]:
    """The `.npy` names in a part of a spool, or at its top, in order."""
    return sorted(name for name in os.listdir(path / part) if name.endswith(".npy"))


def check_spool(path: Path, *, orphans: bool = False, checked: bool = True) -> None:
    """Assert that the table and the directories of the spool at `path` say the same.

    orphans: `free/` may hold files that nobody knows, which `gc` removes. checked: ask `fsck` and `stat` as well.
    Nobody may use the spool meanwhile. A step that a crash left half done counts as a fault here: open the spool first.
    """
    table = peek_table(path)
    assert table.clean, "a transition was left half done"
    for states, part in ((IN_ITEMS, "items"), (IN_FREE, "free")):
        known = sorted(f"{row.file:020d}.npy" for row in table.of(*states))
        there = names_in(path, part)
        assert set(known) <= set(there), f"{part}/ lacks {sorted(set(known) - set(there))}"
        if part == "items" or not orphans:
            assert known == there, (
                f"{part}/ has {sorted(set(there) - set(known))} beside what the table knows"
            )
    counts = table.counts
    waiting = sorted(row.seq for row in table.of("waiting"))
    assert sorted(table.queue + table.redelivered) == waiting
    assert counts["waiting"] == len(waiting)
    assert list(table.queue) == sorted(table.queue), "not in the order of put"
    assert counts["in_flight"] == len(table.of("in_flight"))
    assert counts["delayed"] == len(table.of("delayed"))
    assert counts["item_bytes"] == sum(row.bytes for row in table.of(*IN_ITEMS))
    pooled = table.of("pooled")
    assert sorted(table.pooled) == sorted(row.file for row in pooled)
    assert counts["pooled"] == len(pooled)
    assert counts["pooled_bytes"] == sum(row.bytes for row in pooled)
    assert counts["next_seq"] > max([0, *(row.seq for row in table.of(*IN_ITEMS))])
    if checked:
        assert fsck(path).problems == ()
        assert stat(path).failed == len(names_in(path, "failed")) + len(names_in(path, "."))
