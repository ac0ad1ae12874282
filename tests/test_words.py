"""The rows of words that are read at once name the words they say they do."""

from __future__ import annotations

from array import array

import pytest

from spoolipc import words as W

FLOW = [
    *(W.NEXT_SEQ, W.NEXT_SEQ_CHECK, W.READY, W.READY_TAIL, W.READY_COUNT),
    *(W.ITEM_BYTES, W.POOL_BYTES, W.POOL_COUNT, W.GOTS, W.PEAK_BYTES),
]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (W.FLOW, FLOW),
        (
            W.FLOW_TO_PUT,
            [*FLOW, W.RETURNED_COUNT, W.DELAYED_COUNT, W.SHUTDOWN, W.TENDED, W.MAXSIZE, W.MAX_BYTES],
        ),
        (W.FLOW_TO_GET, [*FLOW, W.RETURNED, W.AWAY, W.SHUTDOWN, W.NEXT_DUE, W.TENDED, W.RECYCLE_BYTES]),
    ],
)
def test_rows_of_the_header(row: object, names: list[int]) -> None:
    header = array("Q", range(W.HEADER)).tobytes()
    assert list(row.unpack_from(header, W.FLOW_AT)) == names  # type: ignore[attr-defined]
    assert list(range(W.HEADER))[W.FLOW_WORDS] == FLOW


def test_an_image_of_the_flow_fits_before_the_journal() -> None:
    assert len(FLOW) == W.JOURNAL - W.FLOW_IMAGE
    assert W.JOURNAL + 2 * W.JOURNAL_ROOM <= W.HEADER
    assert W.FLOW_IMAGE > W.BUCKETS + 191


def test_an_item_is_described_by_the_words_from_its_number_to_its_owner() -> None:
    assert W.ITEM.size // W.WORD == W.OWNER - W.SEQ
    assert W.ROW.size // W.WORD == W.RECORD
