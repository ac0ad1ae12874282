"""A function can be seen at once, and a module read in one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import spoolipc

PACKAGE = Path(spoolipc.__file__).parent
TEXTS = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}


def test_no_function_is_longer_than_70_lines() -> None:
    assert "__init__.py" in TEXTS
    lines = {
        f"{module}, {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module, text in TEXTS.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: count for name, count in lines.items() if count > 70} == {}


def test_no_module_is_longer_than_520_lines() -> None:
    """But for the suite of engines, which is a list of promises."""
    lines = {module: len(text.splitlines()) for module, text in TEXTS.items() if module != "testing.py"}
    assert {name: count for name, count in lines.items() if count > 520} == {}
