"""The vectorised run-length code against slow and obvious code, and against pycocotools."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as pycocotools

from sam3_runner import rle
from sam3_runner.errors import InvalidInput
from sam3_runner.types import RunLengthMask

Mask = npt.NDArray[np.bool_]

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))
# The same cases each time, however slow the machine is.
STEADY = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

MASKS = SHAPES.flatmap(lambda shape: arrays(np.bool_, shape))


def slow_counts(mask: Mask) -> list[int]:
    """Down each column, columns left to right; a run of zeros comes first, if only of length 0."""
    height, width = mask.shape
    counts, current = [0], False
    for x in range(width):
        for y in range(height):
            if mask[y, x] != current:
                counts.append(0)
                current = bool(mask[y, x])
            counts[-1] += 1
    return counts


def slow_row_edges(mask: Mask) -> list[int]:
    """Places y·(W + 1) + x where a row's pixel is not what is to the left of it; outside the mask is nothing."""
    height, width = mask.shape
    edges = []
    for y in range(height):
        row = [False, *mask[y].tolist(), False]
        edges += [y * (width + 1) + x for x in range(width + 1) if row[x] != row[x + 1]]
    return edges


def slow_string(counts: list[int]) -> str:
    """COCO's compressed form, one number and one group of 5 bits at a time."""
    text = ""
    for index, count in enumerate(counts):
        number = count - counts[index - 2] if index > 2 else count
        while True:
            group, number = number & 0x1F, number >> 5
            is_done = number == (-1 if group & 0x10 else 0)
            text += chr(48 + group + (0 if is_done else 0x20))
            if is_done:
                break
    return text


def blobs(seed: int, size_hw: tuple[int, int] = (120, 160)) -> Mask:
    rows, columns = np.mgrid[: size_hw[0], : size_hw[1]]
    random = np.random.default_rng(seed)
    mask = np.zeros(size_hw, dtype=bool)
    for _ in range(4):
        y, x, radius = random.integers(size_hw[0]), random.integers(size_hw[1]), random.integers(3, 40)
        mask |= (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    return mask


def special_masks() -> dict[str, Mask]:
    corner = np.zeros((5, 7), dtype=bool)
    corner[0, 0] = True
    last = np.zeros((5, 7), dtype=bool)
    last[-1, -1] = True
    return {
        "empty": np.zeros((5, 7), dtype=bool),
        "full": np.ones((5, 7), dtype=bool),
        "one_pixel_off": np.zeros((1, 1), dtype=bool),
        "one_pixel_on": np.ones((1, 1), dtype=bool),
        "one_row": np.array([[False, True, True, False]]),
        "one_column": np.array([[True], [False], [True]]),
        "first_pixel": corner,
        "last_pixel": last,
        "stripes_across": np.tile(np.array([[True], [False]]), (20, 30)),
        "stripes_down": np.tile(np.array([[True, False]]), (30, 20)),
        "checks": np.indices((31, 33)).sum(axis=0) % 2 == 0,
        "blobs": blobs(0),
        "long_runs": np.repeat(np.eye(3, dtype=bool), 9_000, axis=0),
        "columns_first_in_memory": np.asfortranarray(blobs(1)),
        "every_other_pixel_of_a_larger_one": blobs(2)[::2, ::2],
        "upside_down": blobs(3)[::-1],
    }


@pytest.mark.parametrize("name", special_masks())
class TestSpecialMasks:
    def test_encoding_equals_the_slow_way(self, name: str) -> None:
        mask = special_masks()[name]
        encoded = rle.encode_mask(mask)
        assert encoded.size_hw == mask.shape
        assert encoded.counts.dtype == np.uint32
        assert encoded.counts.tolist() == slow_counts(mask)

    def test_decoding_gives_the_mask_back(self, name: str) -> None:
        mask = special_masks()[name]
        decoded = rle.decode_mask(rle.encode_mask(mask))
        assert np.array_equal(decoded, mask)
        assert decoded.dtype == np.bool_
        assert decoded.flags.c_contiguous

    def test_the_edges_of_rows_are_where_a_slow_reader_finds_them(self, name: str) -> None:
        mask = special_masks()[name]
        assert rle.row_edges(rle.encode_mask(mask)).tolist() == slow_row_edges(mask)

    def test_the_area_is_the_number_of_pixels(self, name: str) -> None:
        mask = special_masks()[name]
        assert rle.area_px(rle.encode_mask(mask)) == mask.sum()

    def test_the_string_equals_pycocotools_and_the_slow_way(self, name: str) -> None:
        mask = special_masks()[name]
        coco = rle.to_coco(rle.encode_mask(mask))
        theirs = pycocotools.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert coco["counts"].encode() == theirs["counts"]
        assert coco["counts"] == slow_string(slow_counts(mask))
        assert coco["size"] == theirs["size"] == list(mask.shape)

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
    def test_pycocotools_reads_what_we_write_and_we_read_what_it_writes(self, name: str) -> None:
        mask = special_masks()[name]
        assert np.array_equal(pycocotools.decode(rle.to_coco(rle.encode_mask(mask))), mask)
        theirs = pycocotools.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert np.array_equal(rle.decode_mask(rle.from_coco(theirs)), mask)
        as_text = {"size": theirs["size"], "counts": theirs["counts"].decode()}
        assert np.array_equal(rle.decode_mask(rle.from_coco(as_text)), mask)


class TestRandomMasks:
    @STEADY
    @given(MASKS)
    def test_the_edges_of_rows_are_where_a_slow_reader_finds_them(self, mask: Mask) -> None:
        assert rle.row_edges(rle.encode_mask(mask)).tolist() == slow_row_edges(mask)

    @STEADY
    @given(MASKS)
    def test_encoding_equals_the_slow_way(self, mask: Mask) -> None:
        assert rle.encode_mask(mask).counts.tolist() == slow_counts(mask)

    @STEADY
    @given(MASKS, st.integers(1, 40), st.integers(1, 40))
    def test_strings_equal_pycocotools_for_runs_of_any_length(
        self, mask: Mask, down: int, across: int
    ) -> None:
        large = mask.repeat(down, axis=0).repeat(across, axis=1)
        encoded = rle.encode_mask(large)
        coco = rle.to_coco(encoded)
        assert (
            coco["counts"].encode() == pycocotools.encode(np.asfortranarray(large.astype(np.uint8)))["counts"]
        )
        assert np.array_equal(rle.from_coco(coco).counts, encoded.counts)
        assert np.array_equal(rle.decode_mask(encoded), large)
        assert rle.area_px(encoded) == large.sum()

    @STEADY
    @given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
    def test_strings_keep_every_count_up_to_31_bits(self, counts: list[int]) -> None:
        encoded = RunLengthMask((1, sum(counts)), np.array(counts, np.uint32))
        assert rle.to_coco(encoded)["counts"] == slow_string(counts)
        if 1 <= sum(counts) < 2**31:
            assert rle.from_coco(rle.to_coco(encoded)).counts.tolist() == counts

    @STEADY
    @given(SHAPES.flatmap(lambda shape: st.lists(arrays(np.bool_, shape), min_size=1, max_size=6)))
    def test_the_union_is_what_or_gives(self, masks: list[Mask]) -> None:
        expected = np.logical_or.reduce(masks)
        encoded = [rle.encode_mask(mask) for mask in masks]
        assert np.array_equal(rle.union(encoded, expected.shape), expected)
        assert rle.union_rle(encoded, expected.shape).counts.tolist() == slow_counts(expected)


class TestUnion:
    def test_the_union_of_nothing_is_empty(self) -> None:
        united = rle.union([], (3, 4))
        assert united.shape == (3, 4)
        assert not united.any()

    def test_runs_of_length_zero_do_no_harm(self) -> None:
        with_gaps = RunLengthMask((2, 5), np.array([2, 0, 1, 3, 0, 2, 0, 0, 2, 0], np.uint32))
        plain = rle.encode_mask(rle.decode_mask(with_gaps))
        other = rle.encode_mask(np.eye(2, 5, dtype=bool))
        assert np.array_equal(rle.union([with_gaps, other], (2, 5)), rle.union([plain, other], (2, 5)))
        assert rle.union_rle([with_gaps], (2, 5)).counts.tolist() == plain.counts.tolist()

    def test_a_mask_of_another_size_is_refused(self) -> None:
        with pytest.raises(ValueError, match="Expected masks of 3×4"):
            rle.union([rle.encode_mask(np.ones((4, 3), bool))], (3, 4))

    def test_two_hundred_masks_of_12_megapixels_are_never_held_as_pixels(self) -> None:
        import tracemalloc

        size_hw = (3000, 4000)
        counts = np.array([5000, *[400, 2600] * 1499, 400, 12_000_000 - 5000 - 1499 * 3000 - 400], np.uint32)
        masks = [RunLengthMask(size_hw, counts)] * 200
        tracemalloc.start()
        united = rle.union(masks, size_hw)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert united.sum() == 1500 * 400
        assert peak < 60_000_000  # the result has 12 MB, and so has the copy that turns it


class TestWrongInput:
    @pytest.mark.parametrize(
        "mask",
        [
            pytest.param(np.zeros((2, 2), np.uint8), id="bytes"),
            pytest.param(np.zeros((2, 2, 2), bool), id="three-dimensions"),
            pytest.param(np.zeros((0, 2), bool), id="no-rows"),
        ],
    )
    def test_what_is_no_mask_is_not_encoded(self, mask: np.ndarray) -> None:
        with pytest.raises(ValueError, match="Expected a mask"):
            rle.encode_mask(mask)

    @pytest.mark.parametrize(
        "coco",
        [
            pytest.param({}, id="nothing"),
            pytest.param({"size": [2, 2]}, id="no-counts"),
            pytest.param({"counts": "4"}, id="no-size"),
            pytest.param({"size": [2], "counts": "4"}, id="one-number-for-a-size"),
            pytest.param({"size": [0, 4], "counts": "0"}, id="height-0"),
            pytest.param({"size": [-2, -2], "counts": "4"}, id="negative-size"),
            pytest.param({"size": [2.0, 2.0], "counts": "4"}, id="size-of-floats"),
            pytest.param({"size": [True, True], "counts": "1"}, id="size-of-booleans"),
            pytest.param({"size": "22", "counts": "4"}, id="size-as-text"),
            pytest.param({"size": [2, 2], "counts": ""}, id="empty-string"),
            pytest.param({"size": [2, 2], "counts": []}, id="empty-list"),
            pytest.param({"size": [2, 2], "counts": "5"}, id="too-many-pixels"),
            pytest.param({"size": [2, 2], "counts": "3"}, id="too-few-pixels"),
            pytest.param({"size": [2, 2], "counts": [5, -1]}, id="negative-run"),
            pytest.param({"size": [2, 2], "counts": [2.0, 2.0]}, id="float-runs"),
            pytest.param({"size": [2, 2], "counts": [2**62]}, id="astronomical-run"),
            pytest.param({"size": [2, 2], "counts": 4}, id="counts-as-a-number"),
            pytest.param({"size": [2, 2], "counts": "4P"}, id="cut-off"),
            pytest.param({"size": [2, 2], "counts": "4 "}, id="a-blank"),
            pytest.param({"size": [2, 2], "counts": "4\n"}, id="a-line-end"),
            pytest.param({"size": [2, 2], "counts": "4é"}, id="not-ascii"),
            pytest.param({"size": [2, 2], "counts": b"\xff\xfe"}, id="binary"),
            pytest.param({"size": [2, 2], "counts": "o" * 40 + "0"}, id="a-number-of-200-bits"),
            pytest.param({"size": [2**20, 2**20], "counts": [2**40]}, id="a-terapixel"),
        ],
    )
    def test_what_is_no_coco_rle_is_refused(self, coco: dict) -> None:
        with pytest.raises(InvalidInput):
            rle.from_coco(coco)

    def test_plain_lists_of_counts_are_read(self) -> None:
        assert rle.from_coco({"size": [2, 3], "counts": [1, 2, 3]}).counts.tolist() == [1, 2, 3]

    @STEADY
    @given(
        st.text(alphabet=[chr(code) for code in range(40, 120)], max_size=30),
        st.integers(1, 50),
        st.integers(1, 50),
    )
    def test_any_text_is_read_into_a_sound_mask_or_refused(self, text: str, height: int, width: int) -> None:
        try:
            encoded = rle.from_coco({"size": [height, width], "counts": text})
        except InvalidInput:
            return
        assert rle.decode_mask(encoded).shape == (height, width)


@STEADY
@given(MASKS, st.tuples(*[st.integers(0, 5)] * 4))
def test_a_mask_is_pasted_where_it_belongs(mask: Mask, around: tuple[int, int, int, int]) -> None:
    above, below, left, right = around
    expected = np.pad(mask, ((above, below), (left, right)))
    found = rle.pasted(rle.encode_mask(mask), (above, left), (expected.shape[0], expected.shape[1]))
    np.testing.assert_array_equal(found.counts, rle.encode_mask(expected).counts)
    assert found.size_hw == expected.shape


def test_a_mask_that_does_not_fit_is_not_pasted() -> None:
    mask = rle.encode_mask(np.ones((4, 6), np.bool_))
    for place in ((0, 1), (2, 0), (-1, 0)):
        with pytest.raises(ValueError, match="does not fit"):
            rle.pasted(mask, place, (5, 6))
