from __future__ import annotations

import numpy as np
import pytest

from sam3_runner.training.exemplars import (
    QUESTIONS,
    draw_exemplar_prompt,
    match_exemplars,
    shared_kind,
)
from sam3_runner.training.scenes import Exemplar, Scene, SceneObject, ScenePrompt, draw_scene

KINDS = [("red", "circle"), ("red", "circle"), ("blue", "circle"), ("red", "star"), ("blue", "square")]
RED, OTHER_RED, BLUE, RED_STAR, BLUE_SQUARE = range(5)


def scene_of(kinds: list[tuple[str, str]]) -> Scene:
    """Objects of 10×10 px side by side."""
    image = np.zeros((10, 10 * len(kinds), 3), np.uint8)
    objects = []
    for index, (colour, shape) in enumerate(kinds):
        mask = np.zeros(image.shape[:2], bool)
        mask[:, 10 * index : 10 * index + 10] = True
        objects.append(SceneObject(colour, shape, mask, (10.0 * index, 0.0, 10.0 * index + 10, 10.0)))
    return Scene(image, tuple(objects))


def like(*shows: int) -> list[Exemplar]:
    return [Exemplar((0, 0, 1, 1), True, index) for index in shows]


def unlike(*shows: int) -> list[Exemplar]:
    return [Exemplar((0, 0, 1, 1), False, index) for index in shows]


@pytest.mark.parametrize(
    ("words", "exemplars", "expected"),
    [
        pytest.param((None, None), like(RED), [RED, OTHER_RED], id="one: its kind"),
        pytest.param((None, None), like(RED, OTHER_RED), [RED, OTHER_RED], id="two of a kind"),
        pytest.param((None, None), like(RED, BLUE), [RED, OTHER_RED, BLUE], id="a shape in common"),
        pytest.param((None, None), like(RED, RED_STAR), [RED, OTHER_RED, RED_STAR], id="a colour in common"),
        pytest.param((None, "circle"), like(RED), [RED, OTHER_RED], id="words and a box: what fits both"),
        pytest.param((None, "star"), like(RED), [], id="words and a box that contradict each other"),
        pytest.param((None, "circle"), unlike(BLUE), [RED, OTHER_RED], id="words but not like this"),
        pytest.param(
            ("red", None), unlike(BLUE), [RED, OTHER_RED, RED_STAR], id="not like what was not asked"
        ),
        pytest.param((None, "star"), unlike(RED_STAR), [], id="nothing is left"),
        pytest.param(
            (None, None), [*like(RED, BLUE), *unlike(BLUE)], [RED, OTHER_RED], id="like both, not one"
        ),
        pytest.param((None, None), [*like(BLUE), *unlike(BLUE_SQUARE)], [BLUE], id="a near miss"),
        pytest.param((None, None), [Exemplar((0, 0, 1, 1), True, None)], [], id="like nothing"),
        pytest.param(
            ("blue", None), [Exemplar((0, 0, 1, 1), False, None)], [BLUE, BLUE_SQUARE], id="not like nothing"
        ),
    ],
)
def test_exemplars_ask_for(
    words: tuple[str | None, str | None], exemplars: list[Exemplar], expected: list[int]
) -> None:
    assert list(match_exemplars(scene_of(KINDS), exemplars, *words)) == expected


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(7)
    return [draw_scene(rng, (96, 128), min_objects=4, share_repeated=0.4) for _ in range(40)]


def draw_many(kind: str, scenes: list[Scene]) -> list[tuple[Scene, ScenePrompt]]:
    rng = np.random.default_rng(8)
    drawn = [(scene, QUESTIONS[kind](rng, scene)) for scene in scenes for _ in range(6)]
    return [(scene, prompt) for scene, prompt in drawn if prompt is not None]


@pytest.mark.parametrize(
    ("kind", "has_words", "labels", "answered"),
    [
        pytest.param("positive boxes alone", False, {(True,), (True, True)}, 1.0, id="alike"),
        pytest.param("two unlike positive boxes", False, {(True, True)}, 1.0, id="unlike"),
        pytest.param("words and positive boxes", True, {(True,), (True, True)}, 0.85, id="words and like"),
        pytest.param("words and a negative box", True, {(False,)}, 0.93, id="words and unlike"),
        pytest.param(
            "positive and negative boxes",
            False,
            {(True, False), (True, True, False)},
            1.0,
            id="like and unlike",
        ),
        pytest.param("a box around nothing", False, {(True,)}, 0.0, id="nothing"),
    ],
)
def test_questions_are_of_their_kind(
    scenes: list[Scene], kind: str, has_words: bool, labels: set[tuple[bool, ...]], answered: float
) -> None:
    drawn = draw_many(kind, scenes)
    assert len(drawn) > 80
    assert {prompt.text is not None for _, prompt in drawn} == {has_words}
    assert {tuple(e.is_positive for e in prompt.exemplars) for _, prompt in drawn} == labels
    share = np.mean([bool(prompt.matches) for _, prompt in drawn])
    assert share == pytest.approx(answered, abs=0 if answered in (0.0, 1.0) else 0.08)


@pytest.mark.parametrize("kind", QUESTIONS)
def test_boxes_lie_around_what_they_show_and_forbid_what_is_like_it(scenes: list[Scene], kind: str) -> None:
    for scene, prompt in draw_many(kind, scenes):
        height, width = scene.image.shape[:2]
        for exemplar in prompt.exemplars:
            x0, y0, x1, y1 = exemplar.box_xyxy_px
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            inside = np.s_[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
            seen = [item.mask[inside].sum() for item in scene.objects]
            if exemplar.shows is None:
                assert sum(seen) == 0
            else:
                assert seen[exemplar.shows] > 0.8 * scene.objects[exemplar.shows].mask.sum()
        negatives = [
            scene.objects[e.shows] for e in prompt.exemplars if not e.is_positive and e.shows is not None
        ]
        kinds = {(item.colour, item.shape) for item in negatives}
        assert prompt.forbidden == tuple(
            index for index, item in enumerate(scene.objects) if (item.colour, item.shape) in kinds
        )
        assert not set(prompt.forbidden) & set(prompt.matches)


def test_many_questions_have_more_than_the_exemplar_to_find(scenes: list[Scene]) -> None:
    drawn = draw_many("positive boxes alone", scenes)
    others = [len(prompt.matches) > len(prompt.exemplars) for _, prompt in drawn]
    assert np.mean(others) > 0.4


def test_any_scene_can_be_asked_about() -> None:
    rng = np.random.default_rng(0)
    alone = scene_of([("red", "circle")])
    kinds = {draw_exemplar_prompt(rng, alone).text is None for _ in range(50)}
    assert kinds == {True, False}


def test_nothing_in_common_is_nothing_in_particular() -> None:
    scene = scene_of(KINDS)
    assert shared_kind([scene.objects[RED], scene.objects[BLUE_SQUARE]]) == (None, None)
    assert shared_kind([]) == (None, None)
