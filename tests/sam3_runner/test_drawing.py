"""The overlay shows each instance, on any photo, and its tags can be read."""

from __future__ import annotations

import numpy as np
import pytest

from sam3_runner import palette, tags
from sam3_runner.drawing import draw_overlay, numbered
from tests.sam3_runner.found_instances import disc, many, segmentation

SIZE = (120, 160)
NOTO, DEJAVU = (path for path, _ in tags.SYSTEM_FONTS)
LEFT, RIGHT = disc(SIZE, 60, 40, 25), disc(SIZE, 60, 120, 25)


def overlay(pixels: np.ndarray, masks: list[np.ndarray], label: str = "", **more: list[float]) -> np.ndarray:
    size_hw = pixels.shape[0], pixels.shape[1]
    return draw_overlay(pixels, numbered([(label, segmentation(masks, **more))], size_hw))


@pytest.fixture
def without_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tags, "written", lambda *_: None)


@pytest.mark.usefixtures("without_tags")
class TestMasks:
    def test_each_instance_is_tinted_in_its_own_color_and_the_rest_is_left(self) -> None:
        image = np.full((*SIZE, 3), 100, np.uint8)
        drawn = overlay(image, [LEFT, RIGHT])
        assert np.array_equal(drawn[~(LEFT | RIGHT)], image[~(LEFT | RIGHT)])
        assert (drawn[LEFT | RIGHT] != 100).any(axis=1).all()
        tint = palette.colors(2)[1:] * 0.4 + 60
        assert np.abs(drawn[60, [40, 120]] - tint).max() <= 1
        assert (image == 100).all()

    @pytest.mark.parametrize("level", [0, 128, 255])
    @pytest.mark.parametrize("index", range(21))
    def test_the_line_around_it_stands_out_on_any_photo(self, level: int, index: int) -> None:
        image = np.full((*SIZE, 3), level, np.uint8)
        masks = [np.zeros(SIZE, bool)] * index + [LEFT]
        line = overlay(image, masks)[60, 15:20].astype(int)
        assert np.abs(line @ [0.299, 0.587, 0.114] - level).max() > 60

    @pytest.mark.parametrize("better", [0, 1])
    def test_the_best_instance_lies_on_top(self, better: int) -> None:
        image = np.zeros((*SIZE, 3), np.uint8)
        found = [("a", segmentation([LEFT], [0.6 + 0.1 * (better == 0)])), ("b", segmentation([LEFT], [0.6]))]
        found = found if better == 0 else [(label, part) for label, part in found[::-1]]
        drawn = draw_overlay(image, numbered(found, SIZE))
        assert np.abs(drawn[60, 40] - palette.colors(2)[1] * 0.4).max() <= 1 or better

    def test_strips_meet_without_a_seam(self, monkeypatch: pytest.MonkeyPatch) -> None:
        size_hw = (600, 50)
        image = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), np.uint8)
        masks = [disc(size_hw, 250, 25, 30), disc(size_hw, 500, 20, 60)]
        whole = overlay(image, masks)
        monkeypatch.setattr("sam3_runner.drawing._STRIP_ROWS", 7)
        assert np.array_equal(overlay(image, masks), whole)

    def test_no_masks_and_empty_ones_leave_the_image_as_it_is(self) -> None:
        image = np.full((*SIZE, 3), 7, np.uint8)
        assert np.array_equal(overlay(image, []), image)
        assert np.array_equal(overlay(image, [np.zeros(SIZE, bool)]), image)


class TestTags:
    @pytest.mark.parametrize("size_hw", [(1, 1), (1, 300), (300, 1), (15, 20), (40, 60)])
    def test_the_smallest_images_can_be_drawn_on(self, size_hw: tuple[int, int]) -> None:
        drawn = overlay(np.zeros((*size_hw, 3), np.uint8), [np.ones(size_hw, bool)], "x")
        assert drawn.shape == (*size_hw, 3)

    def test_they_are_written_in_the_color_of_the_instance(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image = np.zeros((*SIZE, 3), np.uint8)
        tagged = overlay(image, [LEFT], "cat")
        monkeypatch.setattr(tags, "written", lambda *_: None)
        differs = (tagged != overlay(image, [LEFT])).any(axis=2)
        assert differs[20:36, 15:80].mean() > 0.3  # on the upper edge of the box
        assert (tagged[differs] == palette.colors(1)[1]).all(axis=1).mean() > 0.5

    def test_a_label_that_no_font_can_write_gives_way_to_the_number(self) -> None:
        plain = tags.written(["#3 0.97"], 12, 200)
        assert plain is not None
        for label in ("\U00013000 0.97", "cat \U0001f9ff 0.97", "\ue000"):
            shown = tags.written([label, "#3 0.97"], 12, 200)
            assert shown is not None and np.array_equal(shown, plain)

    @pytest.mark.parametrize("label", ["cat", "Äpfel", "빨간 사과", "赤いリンゴ", "红苹果", "яблоко", "μήλο"])
    def test_labels_are_written_in_their_own_letters_if_a_font_has_them(self, label: str) -> None:
        shown, other = tags.written([label, "#3"], 16, 300), tags.written([label[::-1], "#3"], 16, 300)
        number = tags.written(["#3"], 16, 300)
        assert shown is not None and other is not None and number is not None
        if label in ("cat", "Äpfel") or NOTO.exists():
            assert shown.shape[1] > 20 and shown.max() == 255
            assert not np.array_equal(shown, other)  # it is the letters themselves, in this order
        else:
            assert np.array_equal(shown, number) or (label.isalpha() and DEJAVU.exists())

    def test_one_that_is_too_wide_gives_way_too(self) -> None:
        assert tags.written(["a very long label 0.97"], 12, 50) is None
        shown = tags.written(["a very long label 0.97", "#3"], 12, 50)
        assert shown is not None and shown.shape[1] <= 50

    def test_every_tag_of_a_size_is_of_one_height(self) -> None:
        inks = [tags.written([text], 14, 500) for text in ("cat 0.5", "ÄÇgjpq 0.97", "빨간")]
        assert len({ink.shape[0] for ink in inks if ink is not None}) == 1

    def test_they_do_not_hide_each_other_where_there_is_room(self) -> None:
        found = many(20, (600, 800), (10, 60))
        boxes = [tuple(int(edge) for edge in box) for box in found.boxes_xyxy_px]
        sizes = [(90, 16)] * 20
        corners = tags.placed(boxes, sizes, (800, 600))  # type: ignore[arg-type]
        free = np.zeros((600, 800), int)
        for (left, top), (width, height) in zip(corners, sizes, strict=True):
            assert 0 <= left <= 800 - width and 0 <= top <= 600 - height
            free[top : top + height, left : left + width] += 1
        assert free.max() == 1

    def test_where_there_is_none_the_best_lies_on_top(self) -> None:
        size_hw = (16, 60)
        image = np.zeros((*size_hw, 3), np.uint8)
        masks = [np.ones(size_hw, bool)] * 5
        assert np.array_equal(overlay(image, masks, "x")[:, :30], overlay(image, masks[:1], "x")[:, :30])

    def test_the_first_place_is_on_the_upper_edge_of_the_box(self) -> None:
        assert tags.placed([(50, 40, 90, 80)], [(30, 10)], (200, 100)) == [(50, 30)]
        assert tags.placed([(190, 0, 200, 80)], [(30, 10)], (200, 100)) == [(170, 0)]


def test_colors_can_be_told_apart_by_every_colour_vision() -> None:
    """Simulated as Viénot, Brettel and Mollon (1999) do, in linear RGB."""
    seven = (palette.colors(7)[1:] / 255.0) ** 2.2
    to_lms = np.array(
        [[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]]
    )
    visions = {
        "full": np.eye(3),
        "protanopia": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
        "deuteranopia": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
    }
    for vision in visions.values():
        seen = np.clip(seven @ (np.linalg.inv(to_lms) @ vision @ to_lms).T, 0, 1) ** (1 / 2.2) * 255
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=2) + 1e3 * np.eye(7)
        assert apart.min() > 25
