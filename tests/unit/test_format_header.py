"""A dtype that pickle alone could store is refused, and so is a hostile header, running nothing, in little memory."""

from __future__ import annotations

import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.damage import crafted, fields

from spoolipc.errors import BadItem, UnsupportedArray
from spoolipc.format import item


def shaped(*shape: object) -> str:
    return fields(shape=shape)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        ("O", r"Python objects.*pickle.*astype"),
        ([("a", [("b", "O", (2,))])], r"Python objects.*pickle.*astype"),
        (np.dtypes.StringDType(), r"cannot describe.*astype\('U'\)"),
        (
            {"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 2]},
            r"cannot be stored.*repack_fields",
        ),
        (
            {"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [4, 0]},
            r"cannot be stored.*repack_fields",
        ),
        ([(f"field number {i}", "f8") for i in range(500)], "at most 10000.*x.dtype.names"),
        ([(f"field number {i}", "f8") for i in range(8000)], "cannot be stored.*x.dtype.names"),
        ([((None, "a"), "f8")], "not restore.*x.dtype.names"),
        ([((frozenset({1}), "a"), "f8")], "not a Python literal.*x.dtype.names"),
    ],
)
def test_a_dtype_that_np_load_would_not_restore_is_refused_with_the_remedy(dtype: Any, remedy: str) -> None:
    with pytest.raises(UnsupportedArray, match=remedy):
        item.layout_of([np.zeros(2, np.dtype(dtype))])


@pytest.mark.parametrize(
    "dtype",
    [
        {"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 2]},
        {"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [4, 0]},
        [((None, "a"), "f8"), ((frozenset({1}), "b"), "f8")],
        [(f"field number {i}", "f8") for i in range(500)],
    ],
    ids=range(4),
)
def test_fields_of_a_dtype_that_is_refused_can_be_stored_as_arrays_of_their_own(dtype: Any) -> None:
    array = np.zeros(2, np.dtype(dtype))
    with pytest.raises(UnsupportedArray):
        item.layout_of([array])
    names = array.dtype.names
    assert names is not None
    assert len(item.layout_of([array[name] for name in names]).blocks) == len(names)


CODE = "open('/nonexistent/reached', 'w')"
DEEP = fields().replace("'<f8'", "[('a'," * 120 + "'<f8'" + ")]" * 120)
OF_ITS_FIELDS: dict[str, list[str]] = {
    "not a Python literal": [f"{CODE} or {fields()}", fields().replace("2", CODE), fields() + "\0"],
    "SyntaxError": ["{'descr': '<f8', ", DEEP],
    "a list, not a dict": ["[1, 2]"],
    "keys other than": [
        "{}", fields()[:-1] + ", 'x': 1}", "{1: 2, 3: 4, 5: 6}", "{1:" * 90 + "1" + "}" * 90
    ],
    "neither True nor False": [fields(fortran=1)],
    "tuple of integers": [fields(shape=[2]), shaped(True, True), shaped(2.0)],
    "negative": [shaped(-1), shaped(-2, -1)],
    "impossibly large": [shaped(2**64), fields().replace("2,", "0x" + "f" * 9000 + ",")],
    "larger than any memory": [
        shaped(2**60), shaped(2**32, 2**32), shaped(0, 2**62, 4), fields("<U0", shape=(2**62, 4))
    ],
    "the file ends at": [shaped(2**57), shaped(20), fields("|S2147483647")],
    "at most 64": [shaped(*[1] * 65)],
    "needs pickle": [fields("|O"), fields([("a", "|O")])],
    "unknown dtype": [fields("f8,f8"), fields("float64")],
    "not a string": [fields({"names": ["a"], "formats": ["O"]}), fields(("<f8", (2,), ())), fields(b"<f8")],
    "field is not a tuple": [fields([("a",)])],
    "field names must be strings": [fields([(1, "<f8")]), fields([(("t", 1), "<f8")])],
    "invalid shape": [
        fields([("a", "<f8", (-1,))]), fields([("a", "<f8", (True,))]), fields([("a", "<f8", (2**40,))]),
        fields([("a", ("<f8", (2**16,)), (2**16,))]), fields(("<f8", (-1,))),
    ],
    "shape is not a tuple": [
        fields([("a", "<f8", 2)]), fields(("<f8", 2)), fields(("<f4", [("x", "<i4")])), fields(("<f4", "<i4")),
    ],
    "unhashable": [fields([(([], "a"), "<f8")])],
    "bad header": [
        fields("<f7"), fields("<V9999999999"),
        fields([("a", "<f8"), ("a", "<f8")]), fields("<M8[xy]"), r"{'\d': 1}", "\0\xff" * 50,
        "[" * 9000, "(" * 9000 + ")" * 900, "[" * 95 + "1," * 3000 + "]" * 95,
        "-" * 9000 + "1", "1+" * 4500 + "1", "9**" * 3000 + "9",
    ],
}  # fmt: skip
HOSTILE = [(crafted(text), reason) for reason, texts in OF_ITS_FIELDS.items() for text in texts] + [
    (crafted(fields("|O", shape=()), pickle.dumps(print)), "needs pickle"),
    (crafted(fields(), version=4), "unknown version 4.0"),
    (b"\x93NUMPY\x01\x01\x10\x00" + bytes(100), "unknown version 1.1"),
    (b"\x93NUMPY\x02\x00\x10\x00\x00", "header ends at"),
    (crafted(fields().ljust(10**7), version=2), "at most 65536"),
    (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "at most 65536"),
    (b"\x93NUMPY\x01\x00\xff\xff" + bytes(100), "header ends at"),
    (crafted(fields().ljust(20_000)), "at most 10000"),
    (crafted(b"\xff\xfe" * 50, version=3), "bad header"),
    (crafted(fields() + "\n", pad=False), "multiple of 64"),
]


@pytest.mark.parametrize(("data", "reason"), HOSTILE, ids=[f"{i} {one[1]}" for i, one in enumerate(HOSTILE)])
def test_a_hostile_header_is_refused_with_its_reason_in_little_memory(data: bytes, reason: str) -> None:
    known = len(item._parsed)
    tracemalloc.start()
    try:
        for buffer in (data, memoryview(data)):
            with pytest.raises(BadItem, match=reason):
                item.parse(buffer, len(data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20
    assert len(item._parsed) == known


LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.text(max_size=6)
    | st.sampled_from(["<f8", "|u1", ">M8[ns]", "|O", "<U3", "|V0", "|S0", "O", "i4,f8", "<f3", "|b1"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["descr", "fortran_order", "shape", ""]), inner, max_size=4)
        | st.lists(st.tuples(st.sampled_from(["", "a", "b", ("t", "a"), 3]), inner), max_size=3)
        | st.lists(st.tuples(st.just("a"), inner, st.tuples(st.integers(-1, 3))), max_size=2)
        | st.tuples(inner, st.tuples(st.integers(-1, 3)))
    ),
    max_leaves=12,
)
SHAPES = st.lists(st.integers(0, 12), max_size=3) | st.lists(st.integers(-1, 2**65), max_size=4)
TEXT = st.text(alphabet="{}()[]',:<>|=fiOUVMm0123456789TrueFalsdcrhpn_ \n\\-+*.", max_size=150)


@given(
    header=LITERALS.map(repr)
    | TEXT
    | st.builds(fields, LITERALS, st.booleans(), SHAPES.map(tuple) | LITERALS),
    size=st.integers(0, 320),
    version=st.sampled_from([1, 2, 3]),
)
def test_a_random_header_is_shown_or_refused(header: str, size: int, version: int) -> None:
    data = crafted(
        header.encode("utf-8" if version == 3 else "latin-1", "backslashreplace"), bytes(size), version
    )
    try:
        blocks, _ = item.parse(data, len(data))
    except BadItem:
        return
    for block in blocks:
        assert item.view(data, block).nbytes == block.nbytes
