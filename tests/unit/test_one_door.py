"""Every system call of the engine is made through `spoolipc.directory.fs`: no other module makes one."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

import spoolipc
from spoolipc.directory import fs

PACKAGE = Path(spoolipc.__file__).parent
DOOR = "directory/fs.py"
EXEMPT = (DOOR, "cli/bench.py", "cli/main.py", "mp.py", "nats/access.py", "testing.py", "workers.py")
"""The door, and what is no part of the engine: what measures it, the suite, processes, a broken pipe at stdout,
files of secrets."""
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
PURE = frozenset(
    "path sysconf fspath fsdecode fsencode getpid geteuid getegid environ register_at_fork stat_result PathLike sep"
    " strerror urandom".split()
)
"""Names of `os` that touch nothing of the spool: text, this process and machine, random bytes."""
PURE_PATH = frozenset(
    "abspath basename dirname join split splitext normpath isabs commonpath relpath".split()
)
CLOSED = frozenset("socket subprocess shutil select fcntl tempfile glob multiprocessing".split())
CALLS = frozenset(
    "read_text write_text read_bytes write_bytes mkdir rmdir exists is_file is_dir is_symlink touch iterdir"
    " chmod lstat resolve symlink_to hardlink_to readlink samefile expanduser rglob".split()
)
"""Methods of `Path` that make system calls."""
MAKERS = {"np": {"save", "load", "memmap", "fromfile"}, "mmap": {"mmap"}, "time": {"sleep"}, "io": {"open"}}


def calls(tree: ast.AST) -> list[str]:
    """What in a module's syntax makes a system call, as far as syntax tells."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None) or ""
            tops = {name.partition(".")[0] for name in ([module] if module else names)}
            if getattr(node, "level", 0) == 0 and (tops & CLOSED or module == "os"):
                found.append(f"{node.lineno}: imports {module or names}")
            if module == "filelock" or "filelock" in names:
                found.append(f"{node.lineno}: imports filelock")
        elif isinstance(node, ast.Attribute):
            owner, name = ast.unparse(node.value), node.attr
            if (owner == "os" and name not in PURE and not name.isupper()) or (
                owner == "os.path" and name not in PURE_PATH
            ):
                found.append(f"{node.lineno}: {owner}.{name}")
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id == "open":
                found.append(f"{node.lineno}: open()")
            elif isinstance(function, ast.Attribute):
                owner, name = ast.unparse(function.value), function.attr
                if name in MAKERS.get(owner, ()) or (name in CALLS and owner != "fs"):
                    found.append(f"{node.lineno}: {owner}.{name}()")
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name not in EXEMPT])
def test_a_module_makes_no_system_call_of_its_own(module: str) -> None:
    assert calls(ast.parse((PACKAGE / module).read_text())) == []


@pytest.mark.parametrize("module", [name for name in MODULES if name not in EXEMPT])
def test_the_calls_are_looked_up_at_the_door_each_time(module: str) -> None:
    """A name taken out of the door would be the call itself, whatever is put in its place there."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in ("fs", "directory.fs"):
            raise AssertionError(f"{node.lineno}: imports from fs")


def test_the_door_itself_is_seen_to_make_calls() -> None:
    found = " ".join(calls(ast.parse((PACKAGE / DOOR).read_text())))
    for what in (
        "os.rename",
        "os.sched_yield",
        "np.save()",
        "open()",
        "filelock",
        "select",
        ".mkdir()",
        "os.fstat",
    ):
        assert what in found


def test_every_name_of_the_door_that_is_a_call_is_named() -> None:
    """What is bound to a function of `os`, `mmap`, `time` or filelock is in CALLS."""
    tree = ast.parse((PACKAGE / DOOR).read_text())
    bound = set()
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            value = ast.unparse(node.value)
            makes = any(word in value for word in ("os.", "mmap.", "time.", "lock_descriptor"))
            if makes and isinstance(target, ast.Name) and target.id.islower() and target.id[0] != "_":
                bound.add(target.id)
    assert bound <= set(fs.CALLS)
    assert all(callable(getattr(fs, name)) for name in fs.CALLS)
    below = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name not in fs.CALLS]
    made = [f"{node.name} {call}" for node in below for call in calls(node)]
    assert [call for call in made if not call.startswith(("_save_first", "_planted"))] == []


def test_nothing_is_left_out() -> None:
    assert set(EXEMPT) <= set(MODULES)
    assert os.path.join("directory", "journal.py") in MODULES
