"""Values that are not one array: a frame, which says what there is, and the arrays of the item beside it.

The frame is JSON, as the first of the item's arrays; the others follow, each in a block of its own. In it

    null true 12 -0.5 NaN "text"    are themselves
    [...]                           is a list; {"tuple": [...]} and likewise "set", "frozenset"
    {"dict": {...}}                 a dict with strings as keys; {"dict": [[key, ...], [value, ...]]} any other
    {"array": n}                    array n of the item; {"scalar": [n, i]} is element i of it, by itself
    {"bytes": "base64"}             or {"bytes": n}, array n; {"int": "hex"} is one beyond 64 bits
    {"datetime": [...]}             likewise "date", "timedelta", "complex", "str_", "bytes_"
    {"Name": {...}}                 a dataclass or named tuple of the types that were named
    {"error": ["Name", [...], text]}    an exception: its arguments and its traceback

Every type comes back exactly: what is of another type, a subclass too, is refused. Nothing is pickled, and no module is
imported and no class looked for because a frame names it. `unpack` raises nothing but `BadItem` and `UnsupportedItem`,
whatever the bytes; it goes no deeper than `MAX_DEPTH`, reads no frame beyond `MAX_FRAME`, and copies no array twice.
"""

from __future__ import annotations

import base64
import builtins
import dataclasses
import datetime as dates
import json
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np

from spoolipc.errors import BadItem, RemoteError, TooLarge, UnsupportedItem
from spoolipc.message import Array

MAX_DEPTH: Final = 100
"""The deepest that values may be nested."""
MAX_FRAME: Final = 64 * 2**20
"""The most bytes of a frame."""
_LONG: Final = 1024  # bytes from which an object of bytes is an array beside the frame
_MANY: Final = 900  # arrays from which on it stays in the frame, as an item has 1024 at most
_WHOLE: Final = range(-(2**63), 2**64)
_ALIGN: Final = 64  # frames are filled up to a multiple: headers are remembered by the sizes of arrays
_REMEDY: Final = "take it apart, or use Queue(allow_pickle=True)"
_SEQUENCES: Final[dict[str, Callable[[Any], Any]]] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))


class _Refused(Exception):
    """A part that cannot travel. where: the way to it, its end first."""

    def __init__(self, what: str, *where: str) -> None:
        super().__init__(what)
        self.where = list(where)


class Values:
    """Packs and unpacks values. types: dataclasses, named tuples and exceptions that may be among them.

    Raises TypeError for any other type, ValueError for two of one name.
    """

    def __init__(self, types: Iterable[type] = ()) -> None:
        if isinstance(types, type) or not isinstance(types, Iterable):
            raise TypeError(f"types must be a list of classes, as [Frame], not {types!r}")
        self.types = tuple(types)
        self.named: dict[str, type] = {}
        for each in self.types:
            if not isinstance(each, type) or not (
                _fields(each) is not None or issubclass(each, BaseException)
            ):
                raise TypeError(f"types must be dataclasses, named tuples or exceptions, not {each!r}")
            if self.named.setdefault(each.__qualname__, each) is not each or each.__qualname__ in _TAGS:
                raise ValueError(f"types has two of the name {each.__qualname__}, or a name of Python's own")

    def pack(self, value: object) -> tuple[Array, ...]:
        """The frame of a value, and the arrays beside it: the value's own, not copied.

        Raises UnsupportedItem, which says which part at which place, and TooLarge.
        """
        packing = _Packing(self.named)
        try:
            frame = packing.pack(value, 0)
        except _Refused as refused:
            raise UnsupportedItem(f"item{''.join(reversed(refused.where))} {refused}") from None
        text = _ENCODER.encode(frame).encode("utf-8", "surrogatepass")
        if len(text) > MAX_FRAME:
            what = "long numbers and strings travel better as arrays or bytes, which are beside the frame"
            raise TooLarge(f"item takes {len(text)} bytes beside its arrays, {MAX_FRAME} at most; {what}")
        arrays = [np.array(each) if type(each) is list else each for each in packing.arrays]
        return np.frombuffer(text + b" " * (-len(text) % _ALIGN), np.uint8), *arrays

    def unpack(self, arrays: Sequence[Array]) -> Any:
        """The value of a frame and the arrays beside it, which are in it as they are.

        Raises BadItem for what `pack` does not make, UnsupportedItem for a type that was not named.
        """
        frame = arrays[0]
        if frame.dtype != np.uint8 or frame.ndim != 1 or frame.size > MAX_FRAME:
            raise BadItem(f"its frame is no text: {frame.dtype} of shape {frame.shape}")
        try:
            node = json.loads(frame.tobytes().decode("utf-8", "surrogatepass"))
            return _Unpacking(self.named, arrays).unpack(node, 0)
        except (BadItem, UnsupportedItem):
            raise
        except Exception as error:  # also RecursionError and MemoryError, which nested or huge JSON provokes
            raise BadItem(f"its frame cannot be read: {type(error).__name__}: {error}") from None


class _Packing:
    """One value being packed. arrays: those found so far, numbered from 1; scalars of one dtype are gathered in one."""

    def __init__(self, named: dict[str, type]) -> None:
        self.named = named
        self.arrays: list[Any] = []
        self.gathered: dict[np.dtype[Any], int] = {}

    def pack(self, value: Any, depth: int) -> Any:
        """The node of the frame for a value. Raises _Refused."""
        kind = type(value)
        if value is None or kind is str or kind is bool or kind is float:
            return value
        if kind is int:
            return value if value in _WHOLE else {"int": hex(value)}
        if depth >= MAX_DEPTH:
            raise _Refused(f"is nested deeper than {MAX_DEPTH} levels")
        if kind is list:
            return self._parts(enumerate(value), "[{}]".format, depth)
        if kind is dict:
            values = self._parts(value.items(), _index, depth)
            if all(type(key) is str for key in value):
                return {"dict": dict(zip(value, values, strict=True))}
            return {
                "dict": [self._parts(((key, key) for key in value), "[{!r}] as a key".format, depth), values]
            }
        if kind is np.ndarray or kind is np.memmap:
            if value.dtype.kind not in "biufcmMSUV" or value.dtype.hasobject:
                raise _Refused(f"is an array of {value.dtype}, which only pickle can store: {_REMEDY}")
            return {"array": self._add(np.asarray(value))}
        if kind in _SEQUENCES.values():
            return {kind.__name__: self._parts(enumerate(value), "[{}]".format, depth)}
        if kind in _LEAVES:
            return {kind.__name__: _LEAVES[kind][0](value)}
        if kind is bytes:
            if len(value) < _LONG or len(self.arrays) >= _MANY:
                return {"bytes": base64.b64encode(value).decode("ascii")}
            return {"bytes": self._add(np.frombuffer(value, np.uint8))}
        if isinstance(value, np.generic) and value.dtype.kind in "biufcmM" and kind is value.dtype.type:
            number = self.gathered.get(value.dtype) or self.gathered.setdefault(value.dtype, self._add([]))
            self.arrays[number - 1].append(value)
            return {"scalar": [number, len(self.arrays[number - 1]) - 1]}
        if isinstance(value, BaseException):
            args = self._parts(enumerate(_args(value)), ".args[{}]".format, depth)
            return {"error": [kind.__qualname__, args, "".join(traceback.format_exception(value))]}
        return {kind.__qualname__: self._named(kind, value, depth)}

    def _parts(self, parts: Iterable[tuple[Any, Any]], place: Callable[[Any], str], depth: int) -> list[Any]:
        """The nodes of parts that have each a label, which `place` makes a step of the way to it."""
        nodes = []
        for label, value in parts:
            try:
                nodes.append(self.pack(value, depth + 1))
            except _Refused as refused:
                refused.where.append(place(label))
                raise
        return nodes

    def _add(self, array: Array | list[np.generic]) -> int:
        self.arrays.append(array)
        return len(self.arrays)

    def _named(self, kind: type, value: Any, depth: int) -> dict[str, Any]:
        fields = _fields(kind)
        if fields is None or self.named.get(kind.__qualname__) is not kind:
            remedy = _REMEDY if fields is None else f"name its class, Queue(types=[{kind.__name__}])"
            raise _Refused(f"is a {_name_of(kind)}, which does not travel without pickle: {remedy}")
        if more := [name for name in getattr(value, "__dict__", ()) if name not in fields]:
            raise _Refused(f"is none of the fields of {_name_of(kind)}: {_REMEDY}", f".{more[0]}")
        given = (
            zip(fields, value, strict=True)
            if issubclass(kind, tuple)
            else ((f, getattr(value, f)) for f in fields)
        )
        return dict(zip(fields, self._parts(given, ".{}".format, depth), strict=True))


class _Unpacking:
    """One value being unpacked. left: the numbers of the arrays not yet in it, as each may be there once."""

    def __init__(self, named: dict[str, type], arrays: Sequence[Array]) -> None:
        self.named = named
        self.arrays = arrays
        self.left = set(range(1, len(arrays)))

    def unpack(self, node: Any, depth: int) -> Any:
        """The value of a node of the frame. Raises anything for a frame that nobody packed."""
        if type(node) is list:
            return [self.unpack(each, depth + 1) for each in node]
        if type(node) is not dict:
            return node
        if depth > MAX_DEPTH:
            raise BadItem(f"its frame is nested deeper than {MAX_DEPTH} levels")
        ((tag, said),) = node.items()
        if tag == "dict":
            if type(said) is dict:
                return {key: self.unpack(each, depth + 1) for key, each in said.items()}
            keys, values = (self.unpack(_a(list, each), depth) for each in said)
            return dict(zip(keys, values, strict=True))
        if tag == "array":
            return self._array(said)
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](self.unpack(_a(list, said), depth))
        if tag in _MADE:
            return _MADE[tag](said)
        if tag == "bytes":
            return self._array(said).tobytes() if type(said) is int else base64.b64decode(said, validate=True)
        if tag == "scalar":
            number, at = said
            if number < 1 or at < 0 or self.arrays[number].ndim != 1:
                raise BadItem(f"its frame has no scalar at {said}")
            return self.arrays[number][at]
        if tag == "error":
            return self._error(_a(list, said), depth)
        return self._named(tag, _a(dict, said), depth)

    def _array(self, number: int) -> Array:
        self.left.remove(number)
        return self.arrays[number]

    def _error(self, said: list[Any], depth: int) -> BaseException:
        """The exception again, its cause as it was told there; a RemoteError where its class is not known here."""
        name, args, text = said
        given = self.unpack(_a(list, args), depth)
        told = RemoteError(_a(str, name), given, _a(str, text))
        kind = self.named.get(name, getattr(builtins, name, None))
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            return told
        try:
            error = kind(*given)
        except Exception:  # its class takes other arguments than it kept
            return told
        error.__cause__ = told
        return error

    def _named(self, name: str, said: dict[str, Any], depth: int) -> Any:
        kind: Any = self.named.get(name)
        fields = _fields(kind) if kind is not None else None
        if fields is None or set(said) != set(fields):
            what = f"item has a {name} with {', '.join(said)}, and no such class was named here"
            raise UnsupportedItem(f"{what}: Queue(types=[{name}])")
        values = {field: self.unpack(said[field], depth + 1) for field in fields}
        if issubclass(kind, tuple):
            return tuple.__new__(kind, values.values())
        made = object.__new__(kind)
        for field, value in values.items():
            object.__setattr__(made, field, value)
        return made


def _fields(kind: type) -> tuple[str, ...] | None:
    """The names of the fields of a dataclass or named tuple, None for any other class."""
    if issubclass(kind, tuple):
        return getattr(kind, "_fields", None)
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


def _args(error: BaseException) -> tuple[Any, ...]:
    """The arguments that make an exception again: one of the system leaves the name of its file out of `args`."""
    is_of_file = isinstance(error, OSError) and error.filename is not None and len(error.args) == 2
    return (*error.args, error.filename) if is_of_file else error.args  # type: ignore[attr-defined]


def _index(key: Any) -> str:
    return f"[{json.dumps(key) if type(key) is str else repr(key)}]"


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _a(kind: type, said: Any) -> Any:
    """What a frame says, if it is of that type."""
    if type(said) is not kind:
        raise BadItem(f"its frame has a {type(said).__name__} in the place of a {kind.__name__}")
    return said


def _told_delta(delta: dates.timedelta) -> list[int]:
    return [delta.days, delta.seconds, delta.microseconds]


def _told(value: dates.datetime) -> list[Any]:
    zone: Any = value.tzinfo
    if zone is not None and type(zone) is not dates.timezone:
        raise _Refused(f"is a {_name_of(type(zone))}; use datetime.timezone, or {_REMEDY}", ".tzinfo")
    said = [value.replace(tzinfo=None, fold=0).isoformat(), value.fold]
    return said if zone is None else [*said, _told_delta(zone.utcoffset(None)), *zone.__reduce__()[1][1:]]


def _datetime(said: list[Any]) -> dates.datetime:
    text, fold, *zone = said
    made = dates.timezone(dates.timedelta(*zone[0]), *zone[1:]) if zone else None
    return dates.datetime.fromisoformat(_a(str, text)).replace(fold=fold, tzinfo=made)


_LEAVES: Final[dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]]] = {
    complex: (lambda value: [value.real, value.imag], lambda said: complex(*map(float, said))),
    dates.datetime: (_told, _datetime),
    dates.date: (dates.date.isoformat, dates.date.fromisoformat),
    dates.timedelta: (_told_delta, lambda said: dates.timedelta(*said)),
    np.str_: (str, np.str_),
    np.bytes_: (lambda value: value.hex(), lambda said: np.bytes_(bytes.fromhex(said))),
}
"""Types that are told by themselves: how to tell one, and how to make it again."""
_MADE: Final = {"int": lambda said: int(said, 16)} | {
    kind.__name__: make for kind, (_, make) in _LEAVES.items()
}
_TAGS: Final = {"dict", "array", "bytes", "scalar", "error", *_SEQUENCES, *_MADE}
