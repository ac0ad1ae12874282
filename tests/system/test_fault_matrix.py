"""Every test that `docs/reliability.md` names exists, and every row of its matrix can be broken on purpose."""

from __future__ import annotations

import re
from pathlib import Path

from mutants import listed, place_of, uncovered

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "reliability.md").read_text()
FILES = {path.name: path.read_text() for path in TESTS.rglob("*.py")}


def test_every_row_of_the_fault_matrix_names_tests_that_exist() -> None:
    rows = [line for line in TEXT.splitlines() if re.match(r"\| (?!fault \||taken out \|)", line)]
    assert len(rows) > 20
    for row in rows:
        file = ""
        for name in re.findall(r"`((?:\w+\.py)?[\w:]*)(?:\[\w+\])?`", row.rsplit("|", 2)[1]):
            *module, test = name.split("::") if not name.endswith(".py") else (name, "")
            file = module[0] if module else file
            assert file in FILES, name
            assert re.search(rf"^ *(def|class) {test}\b", FILES[file], re.MULTILINE), name
        assert file, row


def test_every_mutation_fits_its_module_and_every_row_of_the_fault_matrix_has_one() -> None:
    mutations = list(listed())
    assert [one for one in mutations if place_of(one.module).read_text().count(one.old) != 1] == []
    assert uncovered(mutations) == []
    assert len({one.id for one in mutations}) == len(mutations)
