"""A system call that fails, with any error it can give, is a clear error that names the path, or no matter.

Every call of every scenario of `crash.py` is made to fail once. Nothing is lost or doubled by it, no descriptor
leaks, the lock is free, and the same objects go on working.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from crash import SCENARIOS, Crew
from test_crash import check

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.fault,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is missing"),
]


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    crew = Crew(2 * (os.cpu_count() or 1))
    yield crew
    crew.close()


# "open_shared" meets the same calls as "open_new".
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "open_shared"])
def test_a_failing_call_is_a_clear_error_or_no_matter(crew: Crew, name: str) -> None:
    check(crew.run_all(name, "error"), least=2)
