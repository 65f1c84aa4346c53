"""Items and results survive the way between two processes, and nothing else passes for them."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam3_runner.types import (
    Box,
    ItemError,
    Point,
    Prompt,
    RunLengthMask,
    Segmentation,
    SegmentItem,
    SegmentResult,
    Selection,
)
from sam3_runner.wire import MAGIC, WireError, decode_items, decode_results, encode_items, encode_results

RANDOM = np.random.default_rng(7)
KEY = bytes(range(32))
WITHOUT_WORDS = (
    Prompt(boxes=(Box((1.5, 2, 30, 40)), Box((5, 6, 7, 8), is_positive=False))),
    Prompt(points=(Point((3, 4)), Point((0.5, 0.25), False, True)), selection=Selection(0.0, 0.5, 3, 0.7)),
)


def an_item(side: int = 3, *texts: str) -> SegmentItem:
    pixels = RANDOM.integers(0, 256, (side, side, 3), np.uint8)
    prompts = [Prompt(text, selection=Selection(0.25, 0.4)) for text in texts or ("red circle",)]
    return SegmentItem(pixels, (480, 640), (*prompts, *WITHOUT_WORDS), KEY)


def a_segmentation(instances: int) -> Segmentation:
    masks = [
        RunLengthMask((4, 5), np.array([0, *RANDOM.integers(1, 4, n)], np.uint32)) for n in range(instances)
    ]
    return Segmentation(
        scores=RANDOM.random(instances, np.float32),
        boxes_xyxy_px=RANDOM.random((instances, 4), np.float32),
        masks=tuple(masks),
    )


def assert_same_segmentation(one: Segmentation, other: Segmentation) -> None:
    np.testing.assert_array_equal(one.scores, other.scores)
    np.testing.assert_array_equal(one.boxes_xyxy_px, other.boxes_xyxy_px)
    assert other.scores.dtype == np.float32 and other.boxes_xyxy_px.shape == (len(other.scores), 4)
    assert len(one.masks) == len(other.masks)
    for mine, theirs in zip(one.masks, other.masks, strict=True):
        assert mine.size_hw == theirs.size_hw
        assert theirs.counts.dtype == np.uint32
        np.testing.assert_array_equal(mine.counts, theirs.counts)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.text(min_size=1), min_size=1, max_size=3)), max_size=5)
)
def test_items_come_out_as_they_went_in(shapes: list[tuple[int, list[str]]]) -> None:
    items = [an_item(side, *texts) for side, texts in shapes]
    arrived = decode_items(b"".join(encode_items(items)))
    assert len(arrived) == len(items)
    for sent, got in zip(items, arrived, strict=True):
        np.testing.assert_array_equal(sent.pixels, got.pixels)
        assert (sent.size_hw, sent.prompts, sent.key) == (got.size_hw, got.prompts, got.key)


@given(st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4))
def test_results_come_out_as_they_went_in(counts: list[list[int]]) -> None:
    results = [SegmentResult(tuple(map(a_segmentation, each)), infer_ms=1.5, batch_size=3) for each in counts]
    arrived = decode_results(b"".join(encode_results(results)))
    assert len(arrived) == len(results)
    for sent, got in zip(results, arrived, strict=True):
        assert (got.infer_ms, got.batch_size, got.error) == (1.5, 3, None)
        assert len(got.segmentations) == len(sent.segmentations)
        for mine, theirs in zip(sent.segmentations, got.segmentations, strict=True):
            assert_same_segmentation(mine, theirs)


def test_an_error_of_one_item_travels_beside_its_neighbours_results() -> None:
    failed = SegmentResult(error=ItemError("InvalidPrompt", "a prompt is blank"))
    fine = SegmentResult((a_segmentation(2),))
    first, second = decode_results(b"".join(encode_results([failed, fine])))
    assert first.error == failed.error and first.segmentations == ()
    assert_same_segmentation(fine.segmentations[0], second.segmentations[0])


def test_pixels_are_views_on_both_sides() -> None:
    item = an_item(64)
    chunks = encode_items([item])
    assert np.shares_memory(np.frombuffer(chunks[1], np.uint8), item.pixels)
    frame = b"".join(chunks)
    (got,) = decode_items(frame)
    assert np.shares_memory(np.frombuffer(frame, np.uint8), got.pixels)
    assert not got.pixels.flags.writeable


def test_pixels_that_lie_scattered_in_memory_arrive_in_order() -> None:
    pixels = RANDOM.integers(0, 256, (3, 6, 6), np.uint8).transpose(1, 2, 0)[::2]
    (got,) = decode_items(b"".join(encode_items([SegmentItem(pixels, (6, 6), (Prompt("x"),))])))
    np.testing.assert_array_equal(got.pixels, pixels)


def framed(header: object, rest: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<4sI", MAGIC, len(text)) + text + rest


GOOD_PROMPT = {"text": "x", "boxes": [], "points": [], "selection": {}}
GOOD_ITEM = {"size_hw": [1, 1], "prompts": [GOOD_PROMPT], "shape": [1, 1, 3], "key": None}


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x80\x05\x95", id="a pickle"),
        pytest.param(b"{}", id="JSON without a frame"),
        pytest.param(struct.pack("<4sI", MAGIC, 2**31), id="a header longer than the frame"),
        pytest.param(framed({}), id="a header that is no list"),
        pytest.param(framed([1]), id="an entry that is no object"),
        pytest.param(framed([{}]), id="an entry without fields"),
        pytest.param(framed([GOOD_ITEM], b"12"), id="pixels cut short"),
        pytest.param(framed([{**GOOD_ITEM, "shape": [-1, 1, 3]}], b"123"), id="a negative size"),
        pytest.param(framed([{**GOOD_ITEM, "shape": [1, 1]}], b"123"), id="two dimensions"),
        pytest.param(framed([{**GOOD_ITEM, "prompts": ["x"]}], b"123"), id="a prompt that is no object"),
        pytest.param(
            framed([{**GOOD_ITEM, "prompts": [{**GOOD_PROMPT, "boxes": [{"xyxy": [0]}]}]}], b"123"),
            id="a box",
        ),
    ],
)
def test_what_is_not_a_frame_of_items_is_refused(frame: bytes) -> None:
    with pytest.raises(WireError):
        decode_items(frame)


@pytest.mark.parametrize("size", range(0, 200, 7))
def test_a_frame_of_results_cut_anywhere_is_refused(size: int) -> None:
    frame = b"".join(encode_results([SegmentResult((a_segmentation(3),))]))
    with pytest.raises(WireError):
        decode_results(frame[: min(size, len(frame) - 1)])
