"""Every test that `docs/reliability.md` names exists."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "reliability.md").read_text()


def test_every_row_of_the_fault_matrix_names_tests_that_exist() -> None:
    rows = [line for line in TEXT.splitlines() if re.match(r"\| (?!fault \||taken out \|)", line)]
    assert len(rows) > 20
    for row in rows:
        file = ""
        for name in re.findall(r"`((?:\w+\.py)?[\w:]*)(?:\[\w+\])?`", row.rsplit("|", 2)[1]):
            *module, test = name.split("::") if not name.endswith(".py") else (name, "")
            file = module[0] if module else file
            assert (TESTS / file).is_file(), name
            assert re.search(rf"^ *(def|class) {test}\b", (TESTS / file).read_text(), re.MULTILINE), name
        assert file, row
