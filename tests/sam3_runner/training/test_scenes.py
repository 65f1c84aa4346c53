"""Scenes must be exact about what they show: the labels of a training set are never checked again."""

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage

from sam3_runner.training.scenes import (
    COLOURS,
    DIAMETER_SHARE,
    MAX_OBJECTS,
    SHAPES,
    Scene,
    all_prompt_texts,
    draw_prompt,
    draw_scene,
    match_prompt,
    render_prompt,
    rgb_to_lab,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(7)
    return [draw_scene(rng) for _ in range(200)]


def test_the_same_seed_gives_the_same_scene_and_prompt() -> None:
    first, second = np.random.default_rng(3), np.random.default_rng(3)
    for _ in range(20):
        one, other = draw_scene(first), draw_scene(second)
        assert np.array_equal(one.image, other.image)
        for item, twin in zip(one.objects, other.objects, strict=True):
            assert (item.colour, item.shape, item.box_xyxy_px) == (twin.colour, twin.shape, twin.box_xyxy_px)
            assert np.array_equal(item.mask, twin.mask)
        assert draw_prompt(first, one) == draw_prompt(second, other)


def test_images_have_the_area_and_aspect_asked_for() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width, channels = draw_scene(rng, (64, 96)).image.shape
        assert channels == 3
        assert 63 <= math.sqrt(height * width) <= 97
        assert 1 / 3.1 <= width / height <= 3.1


def test_objects_are_few_sized_within_limits_and_mostly_visible(scenes: list[Scene]) -> None:
    assert {len(scene.objects) for scene in scenes} == set(range(1, MAX_OBJECTS + 1))
    smallest, largest = DIAMETER_SHARE
    for scene in scenes:
        side = math.sqrt(scene.image.shape[0] * scene.image.shape[1])
        for item in scene.objects:
            x0, y0, x1, y1 = item.box_xyxy_px
            assert max(x1 - x0, y1 - y0) <= largest * side + 2
            # A star fills a quarter of its enclosing square, of which 0.6 · 0.7 may be left after cut and cover.
            assert item.mask.sum() >= 0.08 * (smallest * side) ** 2


def test_masks_are_disjoint_and_boxes_are_tight(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert np.sum([item.mask for item in scene.objects], axis=0).max() == 1
        for item in scene.objects:
            assert item.mask.shape == scene.image.shape[:2]
            x0, y0, x1, y1 = map(int, item.box_xyxy_px)
            assert item.mask[y0:y1, x0:x1].sum() == item.mask.sum()
            assert item.mask[y0].any() and item.mask[y1 - 1].any()
            assert item.mask[:, x0].any() and item.mask[:, x1 - 1].any()


def test_every_colour_and_shape_occurs_often(scenes: list[Scene]) -> None:
    count = sum(len(scene.objects) for scene in scenes)
    for colour in COLOURS:
        assert sum(len(match_prompt(colour, None, scene)) for scene in scenes) > 0.04 * count
    for shape in SHAPES:
        assert sum(len(match_prompt(None, shape, scene)) for scene in scenes) > 0.1 * count


def test_the_median_colour_of_an_object_is_nearest_to_its_name(scenes: list[Scene]) -> None:
    names = list(COLOURS)
    centres_lab = rgb_to_lab(np.array([COLOURS[name].centre_rgb for name in names]))
    right = []
    for scene in scenes:
        for item in scene.objects:
            lab = rgb_to_lab(np.median(scene.image[item.mask], axis=0))
            right.append(names[int(np.linalg.norm(centres_lab - lab, axis=1).argmin())] == item.colour)
    assert np.mean(right) > 0.96


def test_objects_stand_out_from_what_surrounds_them(scenes: list[Scene]) -> None:
    contrasts = []
    for scene in scenes:
        free = ~np.logical_or.reduce([item.mask for item in scene.objects])
        for item in scene.objects:
            # From 2 px away: nearer pixels are antialiased or blurred with the object.
            near, far = (ndimage.binary_dilation(item.mask, iterations=steps) for steps in (2, 6))
            around = far & ~near & free
            if around.any():
                inside, outside = (np.median(scene.image[where], axis=0) for where in (item.mask, around))
                contrasts.append(np.linalg.norm(rgb_to_lab(inside) - rgb_to_lab(outside)))
    assert np.quantile(contrasts, 0.01) > 20


def test_prompts_match_exactly_what_their_text_says(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(1)
    for scene, _ in itertools.product(scenes, range(5)):
        prompt = draw_prompt(rng, scene)
        words = f"{prompt.text}".lower().split()
        named = [colour for colour in COLOURS if colour in words]
        shaped = [shape for shape in SHAPES if {shape, f"{shape}s", f"{shape}es"} & set(words)]
        expected = match_prompt(next(iter(named), None), next(iter(shaped), None), scene)
        assert named or shaped
        assert prompt.matches == expected


@pytest.mark.parametrize("absent_share", [0.0, 0.5, 1.0])
def test_the_share_of_absent_prompts_is_the_one_asked_for(scenes: list[Scene], absent_share: float) -> None:
    rng = np.random.default_rng(2)
    absent = [not draw_prompt(rng, scene, absent_share).matches for scene in scenes for _ in range(5)]
    assert np.mean(absent) == pytest.approx(absent_share, abs=0.05 if absent_share == 0.5 else 0)


def test_all_prompt_texts_holds_every_text_that_can_be_drawn(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(4)
    texts = set(all_prompt_texts())
    assert {"red circle", "Crosses", "AN ORANGE STAR", "the white objects", "Red"} <= texts
    assert {draw_prompt(rng, scene).text for scene in scenes for _ in range(20)} <= texts


def test_a_prompt_about_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="names a colour"):
        render_prompt(np.random.default_rng(0), None, None)
