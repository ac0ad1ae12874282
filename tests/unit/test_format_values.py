"""Values that are not one array: they come back as they went, and a frame that nobody packed costs that item only."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dates
import decimal
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import Array

from spoolipc.errors import BadItem, RemoteError, TooLarge, UnsupportedItem
from spoolipc.format import values
from spoolipc.format.values import MAX_DEPTH, Values


class Point(NamedTuple):
    x: float
    y: Any = None


@dataclasses.dataclass
class Frame:
    camera: Any
    pixels: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Fixed:
    inner: Any


class Odd(Exception):
    def __init__(self, code: int, *, hint: str) -> None:
        super().__init__(code)
        self.hint = hint


class Plain(Exception):
    pass


VALUES = Values([Point, Frame, Fixed, Plain, Odd])


def back(value: Any, codec: Values = VALUES) -> Any:
    """What comes out at the other end."""
    return codec.unpack([array.copy() for array in codec.pack(value)])


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, with all types in them."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one), list(other)) and same(list(one.values()), list(other.values()))
    if isinstance(one, (set, frozenset)):
        return same(sorted(one, key=repr), sorted(other, key=repr))
    if isinstance(one, np.ndarray):
        return bool((one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()))
    if isinstance(one, np.generic):
        return bool(one.dtype == other.dtype and one.tobytes() == other.tobytes())
    if isinstance(one, (float, complex)):
        return repr(one) == repr(other)
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, dates.datetime):
        return (str(one), one.fold, repr(one.tzinfo)) == (str(other), other.fold, repr(other.tzinfo))
    return bool(one == other)


ZONES = st.none() | st.builds(
    dates.timezone, st.timedeltas(dates.timedelta(hours=-23), dates.timedelta(hours=23))
)
SCALARS = st.one_of(
    st.floats(width=16).map(np.float16), st.floats(width=32).map(np.float32), st.floats().map(np.float64),
    st.integers(0, 255).map(np.uint8), st.integers(-(2**63), 2**63 - 1).map(np.int64), st.booleans().map(np.bool),
    st.complex_numbers().map(np.complex128), st.text().map(np.str_), st.binary().map(np.bytes_),
    st.integers(-(2**62), 2**62).map(lambda n: np.datetime64(n, "ns")), st.just(np.timedelta64(3, "D")),
)  # fmt: skip
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), ANY_TEXT, st.binary(max_size=3000),
    st.dates(), st.timedeltas(), st.datetimes(timezones=ZONES), SCALARS,
)  # fmt: skip
ARRAYS = st.builds(
    lambda shape, dtype, order: np.arange(math.prod(shape)).astype(dtype).reshape(shape, order=order),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from(["u1", "<f8", ">i4", "c8", "S3", "<U2", "M8[s]", "?"]),
    st.sampled_from("CF"),
)
KEYS = st.one_of(st.text(), st.integers(), st.none(), st.binary(), st.tuples(st.integers(), st.text()))
NESTED = st.recursive(
    LEAVES | ARRAYS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(KEYS, inner, max_size=4),
        st.sets(KEYS, max_size=3), st.frozensets(KEYS, max_size=3), st.builds(Point, inner, inner),
        st.builds(Frame, inner, inner), st.builds(Fixed, inner),
    ),
    max_leaves=12,
)  # fmt: skip


@given(NESTED)
@settings(max_examples=400, deadline=None)
def test_values_come_back_as_they_went(value: Any) -> None:
    assert same(value, back(value))


@pytest.mark.parametrize(
    "value",
    [
        math.nan, -math.inf, -0.0, 2**64, -(2**63) - 1, True, (), [], {}, {1: "a", "1": "b"}, {None: ()},
        b"", b"x" * 100_000, "\ud800\udc00", "\0", {"tuple": [1]}, {"array": 1}, [{"Point": {}}], float("1e-320"),
        dates.datetime(2026, 10, 25, 2, 30, fold=1), dates.datetime.now(dates.UTC),
        dates.datetime(1, 1, 1, tzinfo=dates.timezone(dates.timedelta(hours=2), "CEST")),
        pytest.param(1 << 20_000, id="huge"), pytest.param(-1 << 20_000, id="minus"),
        [np.float32(1), np.float32(2), 3.0, np.int64(4)], np.empty((0, 3)), np.array(5),
    ],
)  # fmt: skip
def test_what_is_easily_confused_comes_back_as_it_went(value: Any) -> None:
    assert same(value, back(value))
    assert same([value, (value,)], back([value, (value,)]))


def test_arrays_are_neither_copied_nor_moved_into_the_frame() -> None:
    image, text = np.zeros((100, 100)), b"x" * 5000
    frame, *others = VALUES.pack({"frame": Frame("left", image), "text": text, "n": [np.float64(1)] * 5000})
    assert [other.shape for other in others] == [(100, 100), (5000,), (5000,)]
    assert others[0] is image
    assert np.shares_memory(others[1], np.frombuffer(text, "u1"))
    assert VALUES.unpack([frame, *others])["frame"].pixels is image


def test_a_memory_map_travels_as_the_array_it_is(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "mapped", np.int16, "w+", shape=(4,))
    assert same(np.zeros(4, np.int16), back([mapped])[0])


def test_thousands_of_small_parts_are_one_item() -> None:
    value = [b"y" * 2000 for _ in range(3000)], [np.uint8(n % 256) for n in range(3000)]
    packed = VALUES.pack(value)
    assert len(packed) < 1024
    assert same(value, VALUES.unpack(packed))


class TestRefused:
    @pytest.mark.parametrize(
        ("value", "where"),
        [
            (decimal.Decimal(1), r"item is a decimal\.Decimal"),
            ({"frame": Frame(object())}, r'item\["frame"\]\.camera is a object'),
            ([1, (2, {3: [object]})], r"item\[1\]\[1\]\[3\]\[0\] is a type"),
            ({object: 1}, r"item\[<class 'object'>\] as a key is a type"),
            ([np.array([None])], r"item\[0\] is an array of object"),
            ([np.ma.masked_array([1], [True])], r"item\[0\] is a numpy\.ma\.MaskedArray"),
            (ValueError(1, object()), r"item\.args\[1\] is a object"),
            ([collections.OrderedDict()], r"item\[0\] is a collections\.OrderedDict"),
            ({"at": dates.datetime(2026, 1, 1, tzinfo=type("Z", (dates.tzinfo,), {})())}, r'item\["at"\]\.tzinfo'),
            ([np.void(b"12")], r"item\[0\] is a numpy\.void"),
        ],
    )  # fmt: skip
    def test_anything_else_is_refused_with_its_place_and_the_remedy(self, value: Any, where: str) -> None:
        with pytest.raises(TypeError, match=f"^{where}.*allow_pickle=True") as caught:
            VALUES.pack(value)
        assert caught.type is UnsupportedItem

    def test_a_class_that_was_not_named_is_refused_with_the_way_to_name_it(self) -> None:
        for value in (Point(1), Frame(1)):
            with pytest.raises(UnsupportedItem, match=rf"types=\[{type(value).__name__}\]"):
                Values().pack([value])

    def test_nothing_of_a_dataclass_is_left_out_silently(self) -> None:
        frame = Frame(1)
        frame.more = 2  # type: ignore[attr-defined]
        with pytest.raises(UnsupportedItem, match=r"item\[0\]\.more is none of the fields"):
            VALUES.pack([frame])

    def test_what_is_nested_in_itself_or_too_deep_is_refused(self) -> None:
        endless: list[Any] = []
        endless.append(endless)
        with pytest.raises(UnsupportedItem, match="deeper than 100 levels"):
            VALUES.pack(endless)
        deep: Any = 0
        for _ in range(MAX_DEPTH):
            deep = (deep,)
        assert same(deep, back(deep))

    def test_a_frame_beyond_its_limit_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(values, "MAX_FRAME", 1000)
        with pytest.raises(TooLarge, match="1000 at most"):
            VALUES.pack("x" * 2000)
        with pytest.raises(BadItem, match="no text"):
            VALUES.unpack([np.full(2000, ord(" "), np.uint8)])

    @pytest.mark.parametrize("types", [[int], [object], ["Point"], [Point(1)]])
    def test_types_that_nothing_can_be_made_of_are_refused(self, types: Any) -> None:
        with pytest.raises(TypeError, match="dataclasses, named tuples or exceptions"):
            Values(types)

    def test_two_types_of_one_name_are_refused(self) -> None:
        other = dataclasses.make_dataclass("Frame", ["camera"])
        with pytest.raises(ValueError, match="two of the name Frame"):
            Values([Frame, other])


class TestExceptions:
    def test_one_of_python_comes_back_with_what_was_told_of_it(self) -> None:
        try:
            open("/does/not/exist")  # noqa: SIM115
        except OSError as error:
            found = back([error])[0]
        assert (type(found), found.filename, str(found)[:9]) == (
            FileNotFoundError,
            "/does/not/exist",
            "[Errno 2]",
        )
        cause = found.__cause__
        assert type(cause) is RemoteError
        assert (cause.name, cause.arguments) == (
            "FileNotFoundError",
            [2, "No such file or directory", "/does/not/exist"],
        )
        assert "in test_one_of_python" in cause.traceback
        assert "open(" in str(cause)

    def test_one_that_was_named_comes_back_and_another_is_told(self) -> None:
        assert type(back(Plain("a", 1))) is Plain
        assert back(Plain("a", 1)).args == ("a", 1)
        for told, name in ((back(Plain("a"), Values()), "Plain"), (back(Odd(3, hint="b")), "Odd")):
            assert type(told) is RemoteError
            assert told.name == name
        assert type(back(json.JSONDecodeError("x", "y", 0))) is RemoteError

    def test_no_module_is_imported_for_the_name_of_a_class(self) -> None:
        before = set(sys.modules)
        frame = b'{"error":["wave.Error",[],""]}'
        assert type(VALUES.unpack([np.frombuffer(frame, np.uint8)])) is RemoteError
        assert set(sys.modules) == before

    @pytest.mark.parametrize("name", ["print", "object", "int", "exec", "__import__", "Point"])
    def test_a_name_that_is_no_exception_makes_nothing(self, name: str) -> None:
        frame = json.dumps({"error": [name, [], ""]}).encode()
        assert type(VALUES.unpack([np.frombuffer(frame, np.uint8)])) is RemoteError


class TestHostile:
    def unpack(self, frame: bytes, *arrays: Array) -> Any:
        return VALUES.unpack([np.frombuffer(frame, np.uint8), *arrays])

    @pytest.mark.parametrize(
        "frame",
        [
            b"", b"{", b"\xff", b"[" * 100_000, b'{"tuple":' * 5000, b"9" * 5000, b"{}", b'{"a":1,"b":2}',
            b'{"array":0}', b'{"array":-1}', b'{"array":9}', b'{"array":"1"}', b'[{"array":1},{"array":1}]',
            b'{"bytes":1.0}', b'{"bytes":"%"}', b'[{"bytes":1},{"bytes":1}]', b'{"scalar":[0,0]}', b'{"scalar":[1,99]}',
            b'{"scalar":[1,-1]}', b'{"scalar":[2,0]}', b'{"scalar":1}', b'{"int":1}', b'{"int":"x"}', b'{"tuple":{}}',
            b'{"tuple":"abc"}', b'{"set":[[]]}', b'{"dict":[[[]],[1]]}', b'{"dict":[[1],[]]}', b'{"dict":[1,2]}',
            b'{"dict":"ab"}', b'{"datetime":["2026-01-01",0,null,1,2]}', b'{"datetime":["2026",0,null]}',
            b'{"datetime":["2026-01-01",0,[99,0,0]]}', b'{"timedelta":[1e400]}', b'{"date":1}',
            b'{"complex":["a","b"]}',
            b'{"str_":1,"a":2}', b'{"bytes_":"x"}', b'{"error":[1,[],""]}', b'{"error":["ValueError","",""]}',
            b'{"error":["ValueError"]}', b'{"error":["ValueError",[],{}]}', b'{"Point":[1,2]}',
        ],
    )  # fmt: skip
    def test_a_frame_that_nobody_packed_is_a_bad_item(self, frame: bytes) -> None:
        with pytest.raises(BadItem):
            self.unpack(frame, np.arange(3), np.zeros((2, 2)))

    @pytest.mark.parametrize(
        "frame", [b'{"Point":{"x":1}}', b'{"os.system":{}}', b'{"Plain":{"a":1}}', b'{"Frame":{}}']
    )
    def test_a_class_or_fields_that_are_not_known_here_are_no_bad_item(self, frame: bytes) -> None:
        with pytest.raises(UnsupportedItem, match="no such class was named here"):
            self.unpack(frame)

    @given(st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.sampled_from([*values._TAGS, "Point", "Frame", "x"]), inner, max_size=2
        ),
        max_leaves=20,
    ))  # fmt: skip
    @settings(max_examples=400, deadline=None)
    def test_whatever_the_frame_nothing_but_an_error_of_the_item_is_raised(self, node: Any) -> None:
        with contextlib.suppress(BadItem, UnsupportedItem):
            self.unpack(json.dumps(node).encode(), np.arange(5.0), np.arange(5, dtype="u1"))

    @given(st.binary(max_size=60))
    @settings(deadline=None)
    def test_whatever_the_bytes_nothing_but_an_error_of_the_item_is_raised(self, frame: bytes) -> None:
        with contextlib.suppress(BadItem, UnsupportedItem):
            self.unpack(frame)

    def test_a_frame_of_another_shape_or_type_is_a_bad_item(self) -> None:
        for frame in (np.zeros((2, 2), np.uint8), np.zeros(3), np.array(7, np.uint8)):
            with pytest.raises(BadItem, match="no text"):
                VALUES.unpack([frame])
