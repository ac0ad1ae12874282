"""The house has floors: the table of CONTRIBUTING.md says which module may import which; any other is a fault.

Imports inside functions and under `TYPE_CHECKING` count like any other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final

import spoolipc

PACKAGE: Final = Path(spoolipc.__file__).parent


def floor_plan() -> Iterator[tuple[str, str]]:
    """The rows of the table in CONTRIBUTING.md."""
    plan = (PACKAGE.parent / "CONTRIBUTING.md").read_text().split("## The floor plan")[1].split("\n## ")[0]
    for line in plan.splitlines():
        if line.startswith("| `"):
            module, below, _ = line[1:-1].split("|")
            yield module.strip(" `"), " ".join(re.findall(r"`([\w.]+)`", below))


FLOORS: Final = dict(floor_plan())
"""From the ground up: a module, and which others it may import. Those of `directory/` are named without it."""
EVERYBODY: Final = {"errors", "message"}
"""What all that stands above these may import, without its being said."""
IN_DIRECTORY: Final = {"fs", "table"}
"""Likewise for all that stands above these in `directory/`."""
ORDER: Final = list(FLOORS)


def name_of(path: Path) -> str:
    """The module's name as the table has it."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts[1:] if parts[:1] == ("directory",) and len(parts) > 1 else parts) or "spoolipc"


PATHS: Final = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(path: Path, text: str) -> set[str]:
    """Which modules of the package a text that stands at `path` imports, anywhere in it."""
    inside = ["spoolipc", *path.relative_to(PACKAGE).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            names = [name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names]
        found |= {MODULES[name] for name in names if name.split(".")[0] == "spoolipc"}
    return found - {name_of(path)}


def dotted(path: Path) -> str:
    return ".".join(["spoolipc", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


MODULES: Final = {dotted(path): name for name, path in PATHS.items()}
GRAPH: Final = {name: imports_of(path, path.read_text()) for name, path in PATHS.items()}


def allowed(name: str) -> set[str]:
    """What a module may import."""
    said = set(FLOORS[name].split())
    below = set(ORDER[: ORDER.index(name)])
    return (
        said
        | (EVERYBODY & below)
        | (IN_DIRECTORY & below if PATHS[name].parent.name == "directory" else set())
    )


def test_every_import_is_one_that_the_table_allows() -> None:
    bare = {name for name in GRAPH if not GRAPH[name]} - set(FLOORS)
    assert set(GRAPH) - bare == set(FLOORS)
    assert bare == {"format", "cli"}  # packages that only say what is in them
    assert {name: GRAPH[name] - allowed(name) for name in FLOORS if GRAPH[name] - allowed(name)} == {}


def test_floors_stand_on_floors_below_them_and_in_no_circle() -> None:
    for name in FLOORS:
        assert {other for other in allowed(name) if ORDER.index(other) >= ORDER.index(name)} == set(), name
    list(TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names the circle


def test_an_import_is_seen_wherever_it_stands() -> None:
    text = """
import spoolipc.errors
from .. import message
from ..format.item import parse
from . import fs
def later():
    from .session import Session
if TYPE_CHECKING:
    from spoolipc import queue
    import spoolipc
"""
    found = imports_of(PATHS["stat"], text)
    assert found == {"errors", "message", "format.item", "fs", "session", "queue", "spoolipc"}


def test_the_faces_meet_engines_in_connect_only_and_engines_do_not_meet() -> None:
    in_directory = {name for name, path in PATHS.items() if path.parent.name == "directory"}
    in_nats = {name for name, path in PATHS.items() if path.parent.name == "nats"}
    engines = {*in_directory, *in_nats, "memory"}
    for name in ("errors", "message", "engine", "testing", "item", "queue", "aio", "format.item"):
        assert not allowed(name) & engines, name
    assert not allowed("memory") & (in_directory | in_nats)
    assert not any({"memory", "memory.spool", *in_nats} & allowed(name) for name in in_directory)
    assert not any({"memory", "memory.spool", *in_directory} & allowed(name) for name in in_nats)
