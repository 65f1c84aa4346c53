"""Scenes as training samples: pixels, prompts and their ground truth. Sample `i` is the same on every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from sam3_runner.images import resize_for_model
from sam3_runner.text import EXEMPLARS_ALONE
from sam3_runner.training.exemplars import draw_exemplar_prompt, shared_kind
from sam3_runner.training.losses import Target
from sam3_runner.training.scenes import (
    COLOURS,
    SHAPES,
    Scene,
    SceneObject,
    ScenePrompt,
    draw_prompt,
    draw_scene,
)

# Words that no scene answers to: a newcomer who asks the demo for a cat must get nothing, not the nearest shape.
UNKNOWN_COLOURS = ("pink", "brown", "grey", "cyan", "golden", "striped")
# fmt: off
UNKNOWN_THINGS = (
    "cat", "dog", "car", "person", "tree", "house", "boat", "bird", "horse", "chair", "table", "flower",
    "bottle", "cup", "phone", "book", "hat", "shoe", "wheel", "bus", "truck", "bicycle", "apple", "banana",
    "heart", "hexagon", "pentagon", "diamond", "arrow", "moon", "oval", "cube", "line", "letter", "word",
    "face", "hand", "eye",
)
# fmt: on
UNKNOWN_SHARE = 0.06
# For questions by exemplars half of the scenes hold more objects, which are often alike: something to be found beside
# the exemplar itself.
MIN_OBJECTS_ALIKE = 4
SHARE_ALIKE = 0.4
MAX_EXEMPLARS = 3  # in one question


@dataclass(frozen=True)
class Exemplars:
    """The boxes that belong to B prompts, K each at most.

    Attributes:
        boxes_cxcywh: (B, K, 4) in [0, 1] of the image's width and height.
        is_positive: (B, K) bool.
        is_box: (B, K) bool, False where a box is padding.
        kinds: (B, K, 2) which colour and which shape each shows, counted from 1; 0 for nothing.
        shared: (B, 2) the same of what the positive ones have in common; 0 for any, or for nothing.
    """

    boxes_cxcywh: Tensor
    is_positive: Tensor
    is_box: Tensor
    kinds: Tensor
    shared: Tensor

    @classmethod
    def gather(cls, scene: Scene, prompts: Sequence[ScenePrompt]) -> Exemplars:
        """Of prompts about one scene; K is `MAX_EXEMPLARS`."""
        count = len(prompts)
        made = cls(
            torch.zeros(count, MAX_EXEMPLARS, 4),
            torch.zeros(count, MAX_EXEMPLARS, dtype=torch.bool),
            torch.zeros(count, MAX_EXEMPLARS, dtype=torch.bool),
            torch.zeros(count, MAX_EXEMPLARS, 2, dtype=torch.long),
            torch.zeros(count, 2, dtype=torch.long),
        )
        for row, prompt in enumerate(prompts):
            marked = [None if e.shows is None else scene.objects[e.shows] for e in prompt.exemplars]
            for column, (exemplar, item) in enumerate(zip(prompt.exemplars, marked, strict=True)):
                corners = torch.tensor([exemplar.box_xyxy_px])
                made.boxes_cxcywh[row, column] = _relative_boxes(corners, scene)[0]
                made.is_positive[row, column] = exemplar.is_positive
                made.is_box[row, column] = True
                made.kinds[row, column] = _numbered(*((item.colour, item.shape) if item else (None, None)))
            made.shared[row] = _numbered(*shared_kind(_positives(prompt, marked)))
        return made

    @classmethod
    def join(cls, parts: Sequence[Exemplars]) -> Exemplars:
        """Those of several images as one, without the padding that all of them have."""
        boxes, is_positive, is_box, kinds, shared = (
            torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)
        )
        most = int(is_box.sum(1).max())
        return cls(boxes[:, :most], is_positive[:, :most], is_box[:, :most], kinds[:, :most], shared)

    def to(self, device: torch.device) -> Exemplars:
        """The same on another device."""
        return Exemplars(*(getattr(self, field.name).to(device) for field in fields(self)))


def _positives(prompt: ScenePrompt, marked: Sequence[SceneObject | None]) -> list[SceneObject]:
    return [
        item for exemplar, item in zip(prompt.exemplars, marked, strict=True) if exemplar.is_positive and item
    ]


def _numbered(colour: str | None, shape: str | None) -> Tensor:
    """(2,) a colour's and a shape's place in `COLOURS` and `SHAPES`, counted from 1; 0 for None."""
    return torch.tensor([(None, *COLOURS).index(colour), (None, *SHAPES).index(shape)])


@dataclass(frozen=True)
class Batch:
    """I images with P prompts each, B = I·P pairs; the prompts of an image stand beside each other.

    Attributes:
        pixel_values: (I, 3, S, S) float32 in [-1, 1].
        input_ids: (B, T) tokens, padded to the longest.
        attention_mask: (B, T), 1 where a token is real.
        exemplars: The boxes that belong to the prompts.
        targets: B ground truths, masks at twice the model's own mask resolution.
        kinds: (I, K, m, m), share of each pixel that is of each colour and each shape; see `paint_kinds`.
    """

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    exemplars: Exemplars
    targets: list[Target]
    kinds: Tensor

    @property
    def prompts_per_image(self) -> int:
        """P."""
        return len(self.input_ids) // len(self.pixel_values)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.pixel_values.to(device),
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.exemplars.to(device),
            [Target(target.boxes_cxcywh.to(device), target.masks.to(device)) for target in self.targets],
            self.kinds.to(device),
        )


@dataclass(frozen=True)
class Sample:
    """One image with its prompts. `pixels` is (S, S, 3) uint8."""

    pixels: npt.NDArray[np.uint8]
    prompts: tuple[str, ...]
    exemplars: Exemplars
    targets: tuple[Target, ...]
    kinds: Tensor


class SceneDataset(Dataset[Sample]):
    """Endless scenes, indexed.

    `dataset[i]` depends on `i` and the arguments alone, so that training can resume anywhere.

    Args:
        seed: Of all chance.
        image_size_px: Side of the pixels.
        mask_size_px: Side of the masks.
        prompts_per_image: Questions about each scene.
        min_objects: In each scene, as `draw_scene` takes it.
        exemplar_share: Of the questions, those by exemplars.
    """

    def __init__(
        self,
        seed: int,
        image_size_px: int,
        mask_size_px: int,
        prompts_per_image: int,
        min_objects: int = 1,
        exemplar_share: float = 0.0,
    ) -> None:
        self._seed = seed
        self._min_objects = min_objects
        self._exemplar_share = exemplar_share
        self._image_size_px = image_size_px
        self._mask_size_px = mask_size_px
        self._prompts_per_image = prompts_per_image

    def __getitem__(self, index: int) -> Sample:
        """Draw scene `index` and its prompts."""
        rng = np.random.default_rng([self._seed, index])
        if self._exemplar_share and rng.random() < 0.5:
            scene = draw_scene(rng, min_objects=MIN_OBJECTS_ALIKE, share_repeated=SHARE_ALIKE)
        else:
            scene = draw_scene(rng, min_objects=self._min_objects)
        prompts = [self._draw_question(rng, scene) for _ in range(self._prompts_per_image)]
        boxes, masks = _truth(scene, self._mask_size_px)
        targets = tuple(Target(boxes[list(p.matches)], masks[list(p.matches)]) for p in prompts)
        pixels = resize_for_model(scene.image, self._image_size_px)
        kinds = paint_kinds(scene, F.avg_pool2d(masks, 2))
        texts = tuple(EXEMPLARS_ALONE if prompt.text is None else prompt.text for prompt in prompts)
        return Sample(pixels, texts, Exemplars.gather(scene, prompts), targets, kinds)

    def _draw_question(self, rng: np.random.Generator, scene: Scene) -> ScenePrompt:
        if self._exemplar_share and rng.random() < self._exemplar_share:
            return draw_exemplar_prompt(rng, scene)
        return draw_any_prompt(rng, scene)


class Collate:
    """Joins samples to a `Batch`; an object, so that worker processes can receive it."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Stack images, tokenize all prompts together."""
        tokens = self._tokenizer(
            [text for sample in samples for text in sample.prompts], padding=True, return_tensors="pt"
        )
        return Batch(
            normalise(np.stack([sample.pixels for sample in samples])),
            tokens.input_ids,
            tokens.attention_mask,
            Exemplars.join([sample.exemplars for sample in samples]),
            [target for sample in samples for target in sample.targets],
            torch.stack([sample.kinds for sample in samples]),
        )


def draw_any_prompt(rng: np.random.Generator, scene: Scene) -> ScenePrompt:
    """A prompt about the scene, or now and then one about something that scenes never show."""
    if rng.random() >= UNKNOWN_SHARE:
        return draw_prompt(rng, scene)
    thing = str(rng.choice(UNKNOWN_THINGS))
    texts = (
        thing,
        f"{rng.choice(list(COLOURS))} {thing}",
        f"{rng.choice(UNKNOWN_COLOURS)} {rng.choice(SHAPES)}",
        "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(3, 10))),
    )
    return ScenePrompt(str(rng.choice(texts)), ())


def paint_kinds(scene: Scene, masks: Tensor) -> Tensor:
    """What every pixel shows, as shares: none or one of 8 colours, then none or one of 6 shapes.

    Args:
        scene: With G objects.
        masks: (G, m, m), coverage of each pixel by each object.
    Returns:
        (1 + 8 + 1 + 6, m, m); the first 9 add up to 1 everywhere, and so do the last 7.
    """
    parts = []
    for names, kind_of in ((list(COLOURS), "colour"), (list(SHAPES), "shape")):
        index = torch.tensor([names.index(getattr(item, kind_of)) for item in scene.objects])
        painted = masks.new_zeros(len(names), *masks.shape[1:]).index_add(0, index, masks)
        parts += [(1 - painted.sum(0, keepdim=True)).clamp(min=0), painted]
    return torch.cat(parts)


def normalise(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """(I, S, S, 3) uint8 -> (I, 3, S, S) float32 in [-1, 1], SAM3's mean and deviation of 0.5."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def _truth(scene: Scene, mask_size_px: int) -> tuple[Tensor, Tensor]:
    """(G, 4) relative boxes and (G, m, m) coverage of every object."""
    boxes = _relative_boxes(torch.tensor([item.box_xyxy_px for item in scene.objects]), scene)
    masks = torch.from_numpy(np.stack([item.mask for item in scene.objects])).float()
    return boxes, F.adaptive_avg_pool2d(masks, (mask_size_px, mask_size_px))


def _relative_boxes(boxes_xyxy_px: Tensor, scene: Scene) -> Tensor:
    """(G, 4) corners in pixels to centres and sizes in shares of the image's sides."""
    height, width = scene.image.shape[:2]
    corners = boxes_xyxy_px / torch.tensor([width, height, width, height])
    return torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
