"""The house has floors: imports only go down, and no circle is hidden in a function or a type check."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import spoolipc
from spoolipc.engine import Sink, Source
from spoolipc.sink import DirectorySink
from spoolipc.source import DirectorySource

PACKAGE = Path(spoolipc.__file__).parent


def imported_by(module: Path) -> set[str]:
    """The modules of the package that a module imports, anywhere in its text."""
    names = {path.stem for path in PACKAGE.glob("*.py")}
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom):
            source = (node.module or "").removeprefix("spoolipc").lstrip(".")
            ours = node.level == 1 or (node.module or "").split(".")[0] == "spoolipc"
            if ours and source:
                found.add(source)
            elif ours:
                found |= {alias.name for alias in node.names} & names
    return found


def test_imports_only_go_down() -> None:
    graph = {path.stem: imported_by(path) for path in PACKAGE.glob("*.py")}
    assert graph["writer"] >= {"engine", "sink"}, "the test sees no imports"
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert order.index("errors") < order.index("index") < order.index("party") < order.index("writer")


def used_of(module: str, attribute: str) -> set[str]:
    """What a module asks of `self.ATTRIBUTE`, or of a name that stands for it."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in (f"self.{attribute}", attribute.removeprefix("_"))
    }


def test_the_faces_ask_an_engine_only_for_what_the_interface_says() -> None:
    sink: type[Sink[Any]] = DirectorySink
    source: type[Source] = DirectorySource
    for module, attribute, interface, engine in (
        ("writer", "_sink", Sink, sink),
        ("reader", "_source", Source, source),
        ("delivery", "_source", Source, source),
    ):
        used = used_of(module, attribute)
        assert used, "the test sees no use of the engine"
        said = {name for name in vars(interface) if not name.startswith("_")}
        assert used <= said <= set(dir(engine))


def test_the_engine_interface_knows_no_engine() -> None:
    assert imported_by(PACKAGE / "engine.py") == set()
    assert imported_by(PACKAGE / "delivery.py") <= {"engine", "errors"}
