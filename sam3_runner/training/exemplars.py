"""Questions by exemplars: boxes around objects of a scene, positive or negative, with words or without.

What they mean, here and in the demo checkpoint's training:

- Positive boxes ask for everything that has what their objects have in common: of one red circle, or two, the red
  circles; of a red circle and a blue one, the circles; of a red circle and a red star, whatever is red.
- Words and positive boxes ask for what fits both: "circle" and a red circle's box, the red circles; "square" and a red
  circle's box, nothing.
- Negative boxes take away what has both the colour and the shape of one of their objects: "circle" but not like this
  blue one leaves the circles of other colours. One that shows nothing of what is asked for takes nothing away.
- A positive box around nothing asks for nothing.

Positive exemplars that have nothing in common are never asked about: they name no concept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sam3_runner.training.scenes import (
    SHAPES,
    Exemplar,
    Scene,
    SceneObject,
    ScenePrompt,
    match_prompt,
    pick,
    pick_weighted,
    render_prompt,
)

JITTER_SHARE = 0.08  # of a box's side, by which each edge may be off: nobody drags it exactly
SHARE_OF_TWO = 0.4  # of questions that one exemplar would do for, those that show a second of the same kind
CONTRADICTION_SHARE = 0.15  # of questions in words and by a positive box, those that nothing can answer
IDLE_NEGATIVE_SHARE = 0.1  # of questions with a negative box, those where it takes nothing away
NOTHING_LEFT_SHARE = 0.07  # and those where it takes all away

Kind = tuple[str, str]  # colour and shape
Draw = Callable[[np.random.Generator, Scene], ScenePrompt | None]


def match_exemplars(
    scene: Scene, exemplars: Sequence[Exemplar], colour: str | None = None, shape: str | None = None
) -> tuple[int, ...]:
    """List the objects that exemplars ask for, as ascending indices into `scene.objects`.

    Args:
        scene: The one that the exemplars lie in.
        exemplars: Positive ones with something in common; or negative ones alone, with words.
        colour: That words ask for; None: any.
        shape: Likewise.
    """
    if any(exemplar.is_positive and exemplar.shows is None for exemplar in exemplars):
        return ()
    wanted = [_shown(scene, e) for e in exemplars if e.is_positive]
    unwanted = {_kind(_shown(scene, e)) for e in exemplars if not e.is_positive and e.shows is not None}
    shared_colour, shared_shape = shared_kind(wanted)
    alike = set(match_prompt(shared_colour, shared_shape, scene))
    return tuple(
        index
        for index in match_prompt(colour, shape, scene)
        if index in alike and _kind(scene.objects[index]) not in unwanted
    )


def shared_kind(items: Sequence[SceneObject]) -> tuple[str | None, str | None]:
    """The colour and the shape that all of them have; None where they differ, or there are none."""
    colours, shapes = {item.colour for item in items}, {item.shape for item in items}
    return (colours.pop() if len(colours) == 1 else None, shapes.pop() if len(shapes) == 1 else None)


def draw_exemplar_prompt(rng: np.random.Generator, scene: Scene) -> ScenePrompt:
    """Draw a question of any kind that the scene allows."""
    while True:
        prompt = pick_weighted(rng, TRAINED_QUESTIONS)(rng, scene)
        if prompt is not None:
            return prompt


# --- the kinds of questions ----------------------------------------------------------------------------------------
# Each gives None where the scene holds no such question.


def draw_alike(rng: np.random.Generator, scene: Scene) -> ScenePrompt:
    """One positive box, or two around objects of one colour and shape."""
    return _ask(rng, scene, _draw_positives(rng, scene, _draw_object(rng, scene)))


def draw_unlike(rng: np.random.Generator, scene: Scene) -> ScenePrompt | None:
    """Two positive boxes around objects that have either colour or shape in common, not both."""
    pair = _draw_unlike_pair(rng, scene)
    return None if pair is None else _ask(rng, scene, [_mark(rng, scene, index, True) for index in pair])


def draw_words_and_positive(rng: np.random.Generator, scene: Scene) -> ScenePrompt:
    """Words and a positive box, or two of one kind; now and then they contradict each other."""
    index = _draw_object(rng, scene)
    item = scene.objects[index]
    if rng.random() < CONTRADICTION_SHARE:
        others = [_kind(other) for other in scene.objects if _kind(other) != _kind(item)]
        others = others or [(item.colour, shape) for shape in SHAPES if shape != item.shape]
        colour, shape = pick(rng, others)
        choices = [(colour, shape), (colour, None), (None, shape)]
        choices = [words for words in choices if words not in ((item.colour, None), (None, item.shape))]
    else:
        choices = [(item.colour, item.shape), (item.colour, None), (None, item.shape)]
    return _ask(rng, scene, _draw_positives(rng, scene, index), pick(rng, choices))


def draw_words_and_negative(rng: np.random.Generator, scene: Scene) -> ScenePrompt | None:
    """Words and a negative box, which mostly takes some of what they name away, and leaves some."""
    item = scene.objects[_draw_object(rng, scene)]
    words = pick(rng, ((item.colour, None), (None, item.shape)))
    named = match_prompt(*words, scene)
    is_mixed = len({_kind(scene.objects[index]) for index in named}) > 1
    point = rng.random()
    if point < IDLE_NEGATIVE_SHARE:
        marked = [index for index in range(len(scene.objects)) if index not in named]
    elif is_mixed == (point > IDLE_NEGATIVE_SHARE + NOTHING_LEFT_SHARE):
        marked = list(named)
    else:
        marked = []
    return _ask(rng, scene, [_mark(rng, scene, pick(rng, marked), False)], words) if marked else None


def draw_positive_and_negative(rng: np.random.Generator, scene: Scene) -> ScenePrompt | None:
    """Positive boxes and a negative one: of two unlike exemplars it takes something away; of one it is a near miss."""
    pair = _draw_unlike_pair(rng, scene) if rng.random() < 0.5 else None
    positives = list(pair) if pair else [_draw_object(rng, scene)]
    colours, shapes = zip(*(_kind(scene.objects[index]) for index in positives), strict=True)
    wanted = set(zip(colours, shapes, strict=True))
    near = [
        index
        for index, item in enumerate(scene.objects)
        if _kind(item) not in wanted and ({item.colour} == set(colours) or {item.shape} == set(shapes))
    ]
    if not near:
        return None
    exemplars = [_mark(rng, scene, index, True) for index in positives]
    return _ask(rng, scene, [*exemplars, _mark(rng, scene, pick(rng, near), False)])


def draw_nothing(rng: np.random.Generator, scene: Scene) -> ScenePrompt | None:
    """A positive box around a piece of backdrop."""
    height, width = scene.image.shape[:2]
    taken = np.any([item.mask for item in scene.objects], axis=0)
    for _ in range(20):
        w, h = rng.uniform(0.06, 0.3, 2) * (width, height)
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        if not taken[int(y) : int(y + h) + 1, int(x) : int(x + w) + 1].any():
            return ScenePrompt(None, (), (Exemplar((x, y, x + w, y + h), True, None),))
    return None


# What is measured, by the name that it is reported under.
QUESTIONS: dict[str, Draw] = {
    "positive boxes alone": draw_alike,
    "two unlike positive boxes": draw_unlike,
    "words and positive boxes": draw_words_and_positive,
    "words and a negative box": draw_words_and_negative,
    "positive and negative boxes": draw_positive_and_negative,
    "a box around nothing": draw_nothing,
}
TRAINED_QUESTIONS: tuple[tuple[Draw, float], ...] = (
    (draw_alike, 0.2),
    (draw_unlike, 0.1),
    (draw_words_and_positive, 0.15),
    (draw_words_and_negative, 0.6),  # half of the draws are in vain
    (draw_positive_and_negative, 0.3),
    (draw_nothing, 0.03),
)


# --- their parts ---------------------------------------------------------------------------------------------------


def _ask(
    rng: np.random.Generator,
    scene: Scene,
    exemplars: Sequence[Exemplar],
    words: tuple[str | None, str | None] = (None, None),
) -> ScenePrompt:
    text = render_prompt(rng, *words) if any(words) else None
    unwanted = {_kind(_shown(scene, e)) for e in exemplars if not e.is_positive}
    forbidden = tuple(i for i, item in enumerate(scene.objects) if _kind(item) in unwanted)
    return ScenePrompt(text, match_exemplars(scene, exemplars, *words), tuple(exemplars), forbidden)


def _draw_object(rng: np.random.Generator, scene: Scene) -> int:
    return int(rng.integers(len(scene.objects)))


def _draw_positives(rng: np.random.Generator, scene: Scene, index: int) -> list[Exemplar]:
    kind = _kind(scene.objects[index])
    twins = [i for i, item in enumerate(scene.objects) if i != index and _kind(item) == kind]
    marked = [index, pick(rng, twins)] if twins and rng.random() < SHARE_OF_TWO else [index]
    return [_mark(rng, scene, i, True) for i in marked]


def _draw_unlike_pair(rng: np.random.Generator, scene: Scene) -> tuple[int, int] | None:
    items = scene.objects
    pairs = [
        (first, second)
        for first in range(len(items))
        for second in range(first)
        if (items[first].colour == items[second].colour) != (items[first].shape == items[second].shape)
    ]
    return pick(rng, pairs) if pairs else None


def _mark(rng: np.random.Generator, scene: Scene, index: int, is_positive: bool) -> Exemplar:
    """The box of an object, as somebody drags it."""
    height, width = scene.image.shape[:2]
    x0, y0, x1, y1 = scene.objects[index].box_xyxy_px
    sides = np.array([x1 - x0, y1 - y0] * 2)
    dragged = np.array([x0, y0, x1, y1]) + sides * rng.uniform(-JITTER_SHARE, JITTER_SHARE, 4)
    left, top, right, bottom = np.clip(dragged, 0, [width, height] * 2).tolist()
    return Exemplar((left, top, right, bottom), is_positive, index)


def _shown(scene: Scene, exemplar: Exemplar) -> SceneObject:
    if exemplar.shows is None:
        raise ValueError("the exemplar shows nothing")
    return scene.objects[exemplar.shows]


def _kind(item: SceneObject) -> Kind:
    return item.colour, item.shape
