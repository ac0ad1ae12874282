"""The house has floors: a table says which module may import which, and any other import is a fault.

Imports inside functions and under `TYPE_CHECKING` count like any other.
"""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final

import spoolipc

PACKAGE: Final = Path(spoolipc.__file__).parent
CONTRIBUTING: Final = (PACKAGE.parent / "CONTRIBUTING.md").read_text()

FLOORS: Final = {
    "errors": "",
    "message": "",
    "engine": "",
    "testing": "engine",
    "format.header": "",
    "format.footer": "",
    "format.item": "format.footer format.header",
    "format.values": "",
    "table": "",
    "fs": "format.item",
    "lock": "",
    "liveness": "",
    "layout": "lock",
    "itemfile": "format.footer format.header format.item",
    "transitions": "layout",
    "journal": "layout liveness transitions",
    "pool": "journal layout liveness transitions",
    "quarantine": "journal layout pool transitions",
    "rebuild": "journal layout liveness quarantine",
    "doorbell": "layout liveness lock",
    "session": "doorbell journal layout liveness lock pool rebuild",
    "watch": "doorbell session",
    "visitor": "journal layout lock session transitions",
    "sources": "engine journal layout liveness pool",
    "recycling": "itemfile layout lock pool session transitions",
    "housekeeping": "doorbell layout liveness pool quarantine session sources transitions",
    "gc": "housekeeping journal layout liveness pool quarantine session sources visitor",
    "stat": "doorbell layout liveness pool quarantine session visitor",
    "dead_letters": "format.footer itemfile layout quarantine session transitions visitor",
    "check": "gc itemfile layout liveness quarantine rebuild session visitor",
    "staging": "format.footer format.item itemfile layout liveness pool recycling session",
    "reset": "dead_letters gc housekeeping layout liveness lock quarantine session transitions visitor",
    "producer": "engine format.footer format.item housekeeping itemfile lock pool recycling reset session"
    " staging transitions watch",
    "receiving": "engine format.footer format.item housekeeping itemfile journal liveness pool quarantine recycling"
    " session transitions watch",
    "consumer": "engine housekeeping itemfile layout lock pool quarantine receiving recycling session transitions",
    "forwarding": "engine format.item consumer itemfile layout producer session sources staging",
    "pair": "engine consumer housekeeping journal liveness pool producer session",
    "temporary": "",
    "directory": "engine dead_letters forwarding gc pair reset stat",
    "memory.spool": "format.item",
    "memory": "engine format.footer format.item memory.spool",
    "nats.access": "",
    "nats.link": "nats.access",
    "nats.memory": "",
    "nats.spool": "format.footer format.item nats.link nats.memory",
    "nats.session": "engine nats.access nats.link nats.spool",
    "nats.producer": "engine format.footer format.item nats.access nats.link nats.session nats.spool",
    "nats.consumer": "engine nats.access nats.link nats.session nats.spool",
    "nats": "engine nats.access nats.consumer nats.link nats.producer nats.session nats.spool",
    "connect": "engine directory memory nats",
    "admin": "engine connect directory check",
    "item": "engine format.item",
    "queue": "engine format.item connect item",
    "aio": "engine item queue",
    "torch": "engine item queue",
    "mp": "engine format.values temporary connect",
    "workers": "connect mp",
    "forward": "engine connect",
    "spoolipc": "admin forward item queue mp workers temporary check gc",
    "cli.text": "check gc",
    "cli.bench": "spoolipc connect",
    "cli.main": "spoolipc admin connect forward temporary cli.bench cli.text",
    "__main__": "cli.main",
}
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


def test_the_floor_plan_of_contributing_is_this_table() -> None:
    plan = CONTRIBUTING.split("## The floor plan")[1].split("\n## ")[0]
    told = {}
    for line in plan.splitlines():
        if line.startswith("| `"):
            module, below, _ = line[1:-1].split("|")
            told[module.strip(" `")] = set(re.findall(r"`([\w.]+)`", below))
    assert told == {name: set(below.split()) for name, below in FLOORS.items()}
    assert list(told) == ORDER
