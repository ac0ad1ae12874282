"""`docs/format.md` says where every field lies: its tables are those of the code, and leave no byte out."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from spoolipc import SpoolReader
from spoolipc.directory import layout, table
from spoolipc.format import footer

TEXT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


class Field(NamedTuple):
    """A row of a table. offset, size: in bytes."""

    offset: int
    size: int
    name: str
    meaning: str


def section(title: str) -> str:
    """What stands under a heading, up to the next."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def rows(title: str, columns: int) -> list[tuple[str, ...]]:
    """The cells of the tables of a section that have so many columns, their headings left out."""
    lines = [line[1:-1].split("|") for line in section(title).splitlines() if line.startswith("| ")]
    return [tuple(cell.strip(" `") for cell in line) for line in lines if len(line) == columns][1:]


def fields(title: str) -> list[Field]:
    return [Field(int(at), int(size), name, said) for at, size, name, said in rows(title, 4)]


def position(name: str) -> int:
    """Where `table.py` has a field, in words."""
    word, _, part = name.partition(".")
    found: Any = getattr(table, word)
    if part:
        return int(getattr(found, part))
    return int(found)


@pytest.mark.parametrize(
    ("title", "size"),
    [("Header", table.HEADER * table.WORD), ("Record", table.RECORD * table.WORD), ("Footer", footer.SIZE)],
)
def test_fields_follow_one_another_and_fill_their_place(title: str, size: int) -> None:
    at = 0
    for field in fields(title):
        assert field.offset == at, field
        at += field.size
    assert at == size


@pytest.mark.parametrize("title", ["Header", "Record"])
def test_offsets_are_those_of_the_table(title: str) -> None:
    found = [field for field in fields(title) if field.name != "-"]
    assert len(found) > 12
    for field in found:
        assert field.offset == position(field.name) * table.WORD, field


def test_sizes_and_states_are_those_of_the_table() -> None:
    sizes = {field.name: field.size for field in fields("Header")}
    assert {sizes[name] for name in ("TOKENS", "KINDS", "SINCES")} == {table.MOST_WAITERS * table.WORD}
    assert sizes["BUCKETS"] == table.BUCKET_COUNT * table.WORD
    assert sizes["JOURNAL"] == 2 * table.JOURNAL_ROOM * table.WORD
    states = {name: int(state) for state, name, *_ in rows("Record", 5)}
    assert states == {name: getattr(table, name) for name in states}
    assert set(states.values()) == {table.NOTHING, *table.IN_ITEMS, *table.IN_FREE}


def test_offsets_are_those_of_the_footer() -> None:
    said: dict[str, int] = {"put_time": 7, "data_end": 4096, "checksum": 11, "kind": 3, "expires": 13}
    number = bytes(range(16))
    packed = footer.pack(4096, 7, number, None, {"a": 1}, 11, kind=3, expires=13)
    text = packed[footer.SIZE :]
    said |= {
        "version": footer.VERSION,
        "flags": 1,
        "json_length": len(text),
        "crc": zlib.crc32(text, zlib.crc32(packed[:68])),
    }
    said["magic"] = int.from_bytes(footer.MAGIC, "little")
    said["id"] = int.from_bytes(number, "little")
    found = {
        field.name: int.from_bytes(packed[field.offset : field.offset + field.size], "little")
        for field in fields("Footer")
    }
    assert found == said
    assert f"`{footer.MAGIC.decode()}`" in section("Footer")


def test_versions_are_those_of_the_code() -> None:
    meanings = {
        title: {field.name: field.meaning for field in fields(title)} for title in ("Header", "Footer")
    }
    assert meanings["Header"]["VERSION"] == str(table.VERSION_VALUE)
    assert meanings["Footer"]["version"] == str(footer.VERSION)
    assert ("format", str(layout.FORMAT)) in rows("spool.json", 2)


def test_what_stands_in_the_small_files_is_what_is_said(spool: Path) -> None:
    with SpoolReader(spool):
        kept = json.loads((spool / "spool.json").read_text())
        (session,) = (spool / "alive").iterdir()
        first, line = session.read_text()[0], json.loads(session.read_text())
    assert [key for key, _ in rows("spool.json", 2)] == list(kept)
    assert first == "\n"
    assert re.findall(r'"(\w+)":', section("alive/TOKEN")) == list(line)


def test_every_name_of_the_spool_is_told() -> None:
    there = " ".join(re.findall(r"`([^`]*)`", section("Names"))).split()
    assert {*layout.FILES, *(f"{part}/" for part in layout.PARTS)} - set(there) <= {"index"}
