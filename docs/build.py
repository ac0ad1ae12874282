"""Write docs/reference.md from what spoolipc exports, the commands and the protocols of an engine.

With --check, say whether it is current.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import typing
from pathlib import Path
from typing import Any

import spoolipc
import spoolipc.aio
import spoolipc.engine
import spoolipc.testing
from spoolipc.cli.main import _parser

TARGET = Path(__file__).with_name("reference.md")
SECTIONS: dict[str, list[str]] = {
    "Writing": ["SpoolWriter", "Loan"],
    "Reading": ["SpoolReader", "Item", "Peeked"],
    "In the place of `multiprocessing`": ["Queue", "JoinableQueue", "imap"],
    "Looking after a spool": [
        "stat",
        "purge",
        "remove",
        "set_limits",
        "gc",
        "fsck",
        "failed_list",
        "failed_show",
        "failed_retry",
        "failed_drop",
        "forward",
        "remove_temporary",
    ],
}
OTHER, ERRORS = "What these return", "Errors"
INTRODUCTION = """# Reference

Everything `import spoolipc` gives, the [commands](#commands), and what [an engine of one's
own](#an-engine-of-ones-own) is; made from the docstrings by `make docs`. Times are in seconds, sizes in bytes. How the
parts are meant to be used is in the [tutorial](tutorial.md) and in [delivery](delivery.md).
"""
ENGINE = """## An engine of one's own

`spoolipc.connect` takes a path or URL to an engine, which keeps the protocols of `spoolipc.engine`: those of both sides
and of administration, and as many of the capabilities (`Lender`, `Preallocator`, `Watchable`, `Restorer`,
`Collector`) as it can. The values that cross them are in `spoolipc.message`.
"""
PROTOCOLS = [
    "Engine",
    "Session",
    "Producer",
    "Consumer",
    "Admin",
    "Lender",
    "Loan",
    "Preallocator",
    "Watchable",
    "Watch",
    "Restorer",
    "Collector",
]


def reference() -> str:
    """The text of the reference: every public name, each in its section."""
    names = {name: getattr(spoolipc, name) for name in dir(spoolipc) if not name.startswith("_")}
    parts = [INTRODUCTION]
    for title, chosen in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(name, names.pop(name)) for name in chosen if name in names]
    errors = {name: thing for name, thing in names.items() if _is_error(thing)}
    others = {name: thing for name, thing in names.items() if name not in errors}
    parts.append(f"## {OTHER}\n")
    parts += [_entry(name, thing) for name, thing in sorted(others.items())]
    parts.append(f"## {ERRORS}\n")
    parts.append("| error | is also | raised when |\n|---|---|---|")
    parts += [_error(name, thing) for name, thing in sorted(errors.items())]
    parts += [f"\n## asyncio\n\n{_doc(spoolipc.aio)}\n"]
    parts += [_entry(name, getattr(spoolipc.aio, name)) for name in spoolipc.aio.__all__]
    parts += ["\n## Commands\n", *map(_command, _commands(_parser())), ENGINE]
    parts += [_protocol(name, getattr(spoolipc.engine, name)) for name in PROTOCOLS]
    parts.append(f"### `spoolipc.testing`\n\n{_doc(spoolipc.testing)}")
    return "\n".join(parts) + "\n"


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of all commands that are no groups of others."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return [found for each in action.choices.values() for found in _commands(each)]
    return [parser]


def _command(parser: argparse.ArgumentParser) -> str:
    """A command, not as argparse formats it, which differs between versions of Python."""
    asked = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    words = [_word(action) for action in sorted(asked, key=lambda action: bool(action.option_strings))]
    parts = [f"### `{' '.join([parser.prog, *words])}`\n", f"{parser.description}\n"]
    parts += [f"- `{_word(action).strip('[]')}`: {action.help}" for action in asked]
    examples = (parser.epilog or "").replace("%(prog)s", parser.prog)
    return "\n".join([*parts, f"\n```text\n{examples}\n```\n"])


def _word(action: argparse.Action) -> str:
    if action.option_strings:
        return f"[{action.option_strings[0]}]"
    return {"?": f"[{action.metavar}]", "*": f"[{action.metavar} ...]"}.get(
        str(action.nargs), str(action.metavar)
    )


def _protocol(name: str, thing: type) -> str:
    members = [said for member, what in _members(thing).items() if (said := _member(member, what))]
    return "\n".join([f"### `spoolipc.engine.{name}`\n", _doc(thing) + "\n", *members])


def _is_error(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, Exception)


def _error(name: str, thing: type[Exception]) -> str:
    also = [base for base in thing.__mro__ if base.__module__ in ("builtins", "queue", "_queue")]
    standard = [_standard(base) for base in also if base not in (Exception, BaseException, object)]
    if name == "ShutDown":
        standard = ["queue.ShutDown` (from Python 3.13) or `Exception"]
    said = " ".join(_doc(thing).split())
    return f"| `{name}` | {', '.join(f'`{each}`' for each in standard[:1])} | {said} |"


def _standard(base: type) -> str:
    return base.__name__ if base.__module__ == "builtins" else f"queue.{base.__name__}"


def _entry(name: str, thing: Any) -> str:
    if typing.get_origin(thing) is not None or not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return f"### `{name}`\n\n`{thing}`\n"
    parts = [f"### `{name}{_signature(thing)}`\n", _doc(thing) + "\n"]
    if inspect.isclass(thing):
        parts += [said for member, what in _members(thing).items() if (said := _member(member, what))]
    return "\n".join(parts)


def _members(thing: type) -> dict[str, Any]:
    """What a class has, with what it shares with others of the package: that comes last."""
    found: dict[str, Any] = {}
    for base in thing.__mro__:
        if base.__module__.split(".")[0] == "spoolipc":
            found = {**found, **{name: what for name, what in vars(base).items() if name not in found}}
    return found


def _member(name: str, what: Any) -> str:
    if name.startswith("_"):
        return ""
    if isinstance(what, property) and what.fget is not None:
        return f"**`{name}`**: {_doc(what.fget)}\n"
    if inspect.isfunction(what):
        return f"**`{name}{_signature(what)}`**\n\n{_doc(what)}\n"
    return ""


def _doc(thing: Any) -> str:
    """The docstring as Markdown: what it says of each parameter a list, indented examples code blocks."""
    text = inspect.getdoc(thing)
    if not text:
        raise SystemExit(f"{thing!r} has no docstring")
    text = re.sub(r"(?m)^((?:\w+, )*\w+): ", r"- `\1`: ", text)
    text = re.sub(r"\n\n(?=- `)|(?<=[^\n])\n(?=- `)", "\n", text).replace("\n- `", "\n\n- `", 1)
    return re.sub(r"\n\n((?:    .*\n?)+)", lambda found: f"\n\n```python\n{_dedented(found[1])}\n```\n", text)


def _dedented(block: str) -> str:
    return "\n".join(line[4:] for line in block.rstrip().splitlines())


def _signature(thing: Any) -> str:
    if inspect.isclass(thing) and getattr(thing, "__dataclass_params__", None):
        return ""  # its fields are what its docstring tells
    if thing in (spoolipc.Item, spoolipc.Loan, spoolipc.aio.AsyncItem):
        return ""  # made by `receive` and `loan` alone
    signature = inspect.signature(thing)
    kept = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in signature.parameters.items()
        if name != "self"
    ]
    plain = signature.replace(parameters=kept, return_annotation=inspect.Signature.empty)
    return re.sub(r"<class '(\w+)'>", r"\1", str(plain))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when it is not current")
    options = parser.parse_args()
    text = reference()
    if not options.check:
        TARGET.write_text(text)
    elif not TARGET.exists() or TARGET.read_text() != text:
        sys.exit(f"{TARGET.name} is not current; run: make docs")


if __name__ == "__main__":
    main()
