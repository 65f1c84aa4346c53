"""Meta's code and ours on the same weights, images and prompts, and how far apart the answers are."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from transformers import Sam3Config, Sam3Model

from sam3_runner import engine
from sam3_runner.engine import EncodedImages
from sam3_runner.forward import TextFeatures
from sam3_runner.images import resize_for_model
from sam3_runner.rle import decode_mask
from sam3_runner.segmenter import Segmenter, _Pair
from sam3_runner.text import VOCABULARY_FILE
from sam3_runner.types import Box, Prompt, Segmentation, SegmentItem, Selection
from tests.parity.environment import bpe_file, meta_python

Arrays = dict[str, npt.NDArray[Any]]

REFERENCE = Path(__file__).with_name("reference.py")
TIMEOUT_S = 3600
THRESHOLD = 0.5
# What counts as the same answer, in float32.
SCORE_TOLERANCE = 1e-4
BOX_TOLERANCE_PX = 0.05
MASK_LOGIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Size:
    """A SAM3, told to both packages.

    Attributes:
        meta: For each class that Meta's builder calls, what to call it with instead.
        ours: The same as changes of `Sam3Config`.
    """

    meta: dict[str, dict[str, Any]]
    ours: dict[str, dict[str, Any]]

    def config(self) -> dict[str, Any]:
        """As in `config.json`."""
        config: dict[str, Any] = Sam3Config().to_dict()
        for part, changes in self.ours.items():
            inner = config
            for name in part.split("."):
                inner = inner[name]
            inner.update(changes)
        return config


FULL = Size({}, {})
# Fewer and narrower layers and 672 pixels a side: each kind of layer is there, windowed and global attention too.
REDUCED = Size(
    meta={
        "ViT": {"img_size": 672, "depth": 4, "global_att_blocks": [1, 3], "embed_dim": 256, "num_heads": 4},
        "VETextEncoder": {"layers": 2, "width": 256, "heads": 4},
        "SequenceGeometryEncoder": {"num_layers": 2},
        "TransformerEncoderFusion": {"num_layers": 2},
        "TransformerDecoder": {"num_layers": 3},
    },
    ours={
        "vision_config": {"backbone_feature_sizes": [[192, 192], [96, 96], [48, 48]]},
        "vision_config.backbone_config": {
            "image_size": 672,
            "num_hidden_layers": 4,
            "global_attn_indexes": [1, 3],
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1184,
        },
        "text_config": {
            "num_hidden_layers": 2,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
        },
        "geometry_encoder_config": {"num_layers": 2},
        "detr_encoder_config": {"num_layers": 2},
        "detr_decoder_config": {"num_layers": 3},
    },
)


@dataclass(frozen=True)
class Case:
    """One image, (H, W, 3) uint8, and its prompts."""

    image: npt.NDArray[np.uint8]
    prompts: tuple[Prompt, ...]

    def asked(self) -> list[dict[str, Any]]:
        """The prompts as Meta's processor takes them: boxes as centre and size in shares of the image's sides."""
        return [
            {
                "text": prompt.text,
                "boxes": [self.shares(box) for box in prompt.boxes],
                "labels": [box.is_positive for box in prompt.boxes],
            }
            for prompt in self.prompts
        ]

    def shares(self, box: Box) -> tuple[float, float, float, float]:
        """Centre and size of a box in shares of the image's width and height."""
        height, width = self.image.shape[:2]
        x0, y0, x1, y1 = box.xyxy
        return (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height


@dataclass(frozen=True)
class Raw:
    """What the model itself says of one pair: of all N queries, before any is dropped."""

    scores: Tensor
    boxes_cxcywh: Tensor
    mask_logits: Tensor


@dataclass(frozen=True)
class Difference:
    """How far one of ours is from Meta's answer to the same pair.

    Attributes:
        case: Number of the image.
        prompt: What was asked.
        kept: Queries that Meta's code keeps.
        same_kept: Whether ours keeps the same ones.
        score: The largest difference of a score, among all queries.
        box_px: Of a box's corner, among all queries, in pixels of the original image.
        mask_logit: Of a mask logit, among all queries.
    """

    case: int
    prompt: str
    kept: int
    same_kept: bool
    score: float
    box_px: float
    mask_logit: float


@dataclass(frozen=True)
class MaskDifference:
    """How far the final answers are apart: instances at the image's own size.

    Attributes:
        case: Number of the image.
        prompt: What was asked.
        instances: In Meta's answer.
        same_count: Whether ours has as many.
        score: The largest difference of an instance's score.
        box_px: Of a corner of its box, Meta's clipped to the image as ours are.
        pixels: Pixels that differ, of all masks.
        of_pixels: Pixels of all masks.
        logit_there: The largest absolute value of Meta's upsampled logit, in float64, where a pixel differs.
    """

    case: int
    prompt: str
    instances: int
    same_count: bool
    score: float
    box_px: float
    pixels: int
    of_pixels: int
    logit_there: float


def is_same(found: Difference | MaskDifference) -> bool:
    """Whether an answer is Meta's, within what rounding in float32 may do."""
    if isinstance(found, Difference):
        return (
            found.same_kept
            and found.score <= SCORE_TOLERANCE
            and found.box_px <= BOX_TOLERANCE_PX
            and found.mask_logit <= MASK_LOGIT_TOLERANCE
        )
    return (
        found.same_count
        and found.score <= SCORE_TOLERANCE
        and found.box_px <= BOX_TOLERANCE_PX
        and found.logit_there <= MASK_LOGIT_TOLERANCE
    )


def made_cases() -> list[Case]:
    """Images of all proportions, one of them grey, with prompts in words, by boxes, and both."""
    generator = np.random.default_rng(5)
    small, tall, flat = (100.0, 80.0, 150.5, 133.25), (20.0, 10.0, 60.0, 290.0), (205.0, 12.0, 415.0, 30.0)
    several = tuple(map(Box, (small, tall, flat, (0.0, 0.0, 420.0, 300.0), (2.0, 3.0, 4.0, 5.0))))
    prompts = (
        (Prompt("red circle"), Prompt(boxes=(Box(small),)), Prompt("a Dog's nose"), Prompt("shoe", several)),
        (Prompt("truck", (Box((30.0, 100.0, 200.0, 400.0)),)), Prompt("truck")),
        (Prompt("red circle"), Prompt("red circle", (Box(flat), Box((40, 3, 600, 96), is_positive=False)))),
        (
            Prompt("Ünïted &amp; 2 stripes"),
            Prompt("!+ shoe"),
            Prompt(boxes=tuple(Box(box.xyxy, is_positive=row % 2 == 0) for row, box in enumerate(several))),
        ),
    )
    return [
        Case(_made_image(generator, size_hw, is_grey=number == 2), asked)
        for number, (size_hw, asked) in enumerate(
            zip(((300, 420), (511, 256), (97, 640), (672, 672)), prompts, strict=True)
        )
    ]


def name_of(prompt: Prompt) -> str:
    """A prompt in a table: its words, and how many boxes say "like this" and "not like this"."""
    positive = sum(box.is_positive for box in prompt.boxes)
    negative = len(prompt.boxes) - positive
    counts = [f"{sign}{count}" for sign, count in (("+", positive), ("-", negative)) if count]
    return " ".join([*([prompt.text] if prompt.text else []), *([f"[{' '.join(counts)}]"] if counts else [])])


def _made_image(
    generator: np.random.Generator, size_hw: tuple[int, int], *, is_grey: bool
) -> npt.NDArray[np.uint8]:
    """Colours that change slowly, and noise."""
    height, width = size_hw
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    noise = generator.integers(-20, 21, (height, width, 3))
    image = Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))
    return np.asarray((image.convert("L") if is_grey else image).convert("RGB"))


class Reference:
    """What Meta's code answered.

    Attributes:
        folder: Where its weights lie as `sam3.pt`, with all that ours needs to load them.
        cases: What it was asked.
        seed: Of its weights.
        seconds: That it took for each case.
        versions: Of its libraries.
    """

    def __init__(self, folder: Path, cases: Sequence[Case]) -> None:
        self.folder = folder
        self.cases = list(cases)
        self.seed: int = json.loads((folder / "request.json").read_text())["seed"]
        done = json.loads((folder / "done.json").read_text())
        self.seconds: list[float] = done["seconds"]
        self.versions: dict[str, str] = done["versions"]

    @classmethod
    def ask(
        cls,
        folder: Path,
        size: Size,
        cases: Sequence[Case],
        *,
        seed: int = 3,
        threads: int = 1,
        under_model: bool = False,
    ) -> Reference:
        """Build Meta's model with seeded weights, save it, and ask it everything."""
        config = size.config()
        for number, case in enumerate(cases):
            Image.fromarray(case.image).save(folder / f"{number}.png")
        request = {
            "size": size.meta,
            "input_size_px": config["vision_config"]["backbone_config"]["image_size"],
            "seed": seed,
            "threads": threads,
            "under_model": under_model,
            "cases": [
                {"image": f"{number}.png", "prompts": case.asked()} for number, case in enumerate(cases)
            ],
        }
        (folder / "request.json").write_text(json.dumps(request))
        (folder / "config.json").write_text(json.dumps(config))
        python = meta_python()
        (folder / VOCABULARY_FILE).write_bytes(bpe_file(python).read_bytes())
        finished = subprocess.run(
            [python, REFERENCE, "model", folder, folder / VOCABULARY_FILE],
            stdout=sys.stderr,
            timeout=TIMEOUT_S,
            check=False,
        )
        if finished.returncode != 0:
            raise RuntimeError("Meta's code failed: see its message above")
        return cls(folder, cases)

    def pairs(self) -> Iterator[tuple[int, str, Arrays]]:
        """(case, prompt, what Meta's code says), in order."""
        for number, case in enumerate(self.cases):
            with np.load(self.folder / f"answer-{number}.npz") as answers:
                for index, prompt in enumerate(case.prompts):
                    names = [name for name in answers if name.startswith(f"{index}.")]
                    yield number, name_of(prompt), {name.partition(".")[2]: answers[name] for name in names}


@dataclass(frozen=True)
class Answers:
    """What ours says: `raw` of each pair in order, and `found` for each image and prompt, as callers get it."""

    raw: list[Raw]
    found: list[tuple[Segmentation, ...]]


def ask_ours(segmenter: Segmenter, cases: Sequence[Case]) -> Answers:
    """All images in one batch, watching what the engine itself says on the way."""
    raw: dict[tuple[int, int], Raw] = {}
    latest: list[Raw] = []
    answer, answer_pairs = segmenter._engine.answer, segmenter._answer

    def watched(images: EncodedImages, texts: TextFeatures, boxes: TextFeatures | None) -> engine.Answers:
        answers = answer(images, texts, boxes)
        queries = torch.arange(answers.scores.shape[1])
        latest[:] = [
            Raw(scores, found, answers.mask_logits(pair, queries))
            for pair, (scores, found) in enumerate(zip(answers.scores, answers.boxes_cxcywh, strict=True))
        ]
        return answers

    def watched_pairs(pairs: Sequence[_Pair], items: Sequence[SegmentItem]) -> object:
        found = answer_pairs(pairs, items)
        raw.update({(pair.item, pair.number): one for pair, one in zip(pairs, latest, strict=True)})
        return found

    with (
        mock.patch.object(segmenter._engine, "answer", watched),
        mock.patch.object(segmenter, "_answer", watched_pairs),
    ):
        results = segmenter.segment_batch([_item(segmenter, case) for case in cases])
    return Answers([raw[pair] for pair in sorted(raw)], [result.segmentations for result in results])


@torch.inference_mode()
def ask_transformers(model: Sam3Model, segmenter: Segmenter, cases: Sequence[Case]) -> list[Raw]:
    """`Sam3Model.forward`, one image and prompt at a time, from the same pixels and tokens."""
    answers: list[Raw] = []
    for case in cases:
        item = _item(segmenter, case)
        pixels = torch.from_numpy(item.pixels).permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, S, S)
        vision = model.get_vision_features(pixels)
        for prompt in item.prompts:
            input_ids, attention_mask = map(torch.from_numpy, segmenter._prompts.encode([prompt]))
            boxes = {
                "input_boxes": torch.tensor([[case.shares(box) for box in prompt.boxes]]),
                "input_boxes_labels": torch.tensor([[int(box.is_positive) for box in prompt.boxes]]),
            }
            marked = boxes if prompt.boxes else {}
            out = model(vision_embeds=vision, input_ids=input_ids, attention_mask=attention_mask, **marked)
            scores = out.pred_logits[0].sigmoid() * out.presence_logits[0].sigmoid()
            x0, y0, x1, y1 = out.pred_boxes[0].unbind(-1)
            found = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)
            answers.append(Raw(scores, found, out.pred_masks[0]))
    return answers


def _item(segmenter: Segmenter, case: Case) -> SegmentItem:
    height, width = case.image.shape[:2]
    pixels = resize_for_model(case.image, segmenter.info.input_size_px)
    prompts = tuple(dataclasses.replace(prompt, selection=Selection(THRESHOLD)) for prompt in case.prompts)
    return SegmentItem(pixels, (height, width), prompts)


def raw_differences(reference: Reference, ours: Sequence[Raw]) -> list[Difference]:
    """Of all queries of the first pairs, as many as `ours` holds."""
    return [
        _raw_difference(number, prompt, reference.cases[number], theirs, one)
        for (number, prompt, theirs), one in zip(reference.pairs(), ours, strict=False)
    ]


def _raw_difference(number: int, prompt: str, case: Case, theirs: Arrays, ours: Raw) -> Difference:
    scores = _scores(theirs)
    height, width = case.image.shape[:2]
    boxes = torch.from_numpy(theirs["boxes_cxcywh"])
    kept = scores > THRESHOLD
    return Difference(
        case=number,
        prompt=prompt,
        kept=int(kept.sum()),
        same_kept=bool(torch.equal(kept, ours.scores > THRESHOLD)),
        score=_largest(scores - ours.scores),
        box_px=_largest(_corners_px(boxes, width, height) - _corners_px(ours.boxes_cxcywh, width, height)),
        mask_logit=_largest(torch.from_numpy(theirs["mask_logits"]) - ours.mask_logits),
    )


def _scores(theirs: Arrays) -> Tensor:
    """(N,) of all queries, as Meta's processor computes them before it drops any."""
    return torch.from_numpy(theirs["logits"]).sigmoid() * torch.from_numpy(theirs["presence_logit"]).sigmoid()


def _corners_px(boxes_cxcywh: Tensor, width: int, height: int) -> Tensor:
    centre, half = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
    return torch.cat([centre - half, centre + half], dim=1) * torch.tensor([width, height, width, height])


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


def final_differences(reference: Reference, found: Sequence[Sequence[Segmentation]]) -> list[MaskDifference]:
    """Of the answers that callers get, `found` for each case and prompt, as many cases as it holds."""
    flat = [answer for answers in found for answer in answers]
    return [
        _final_difference(number, prompt, reference.cases[number], theirs, ours)
        for (number, prompt, theirs), ours in zip(reference.pairs(), flat, strict=False)
    ]


def _final_difference(
    number: int, prompt: str, case: Case, theirs: Arrays, ours: Segmentation
) -> MaskDifference:
    height, width = case.image.shape[:2]
    count = len(theirs["scores"])
    if count != len(ours.scores):
        return MaskDifference(number, prompt, count, False, np.inf, np.inf, 0, 0, np.inf)
    order = np.argsort(-theirs["scores"], kind="stable")  # ours come best first
    masks = np.unpackbits(theirs["masks"], axis=1, count=height * width).astype(bool)
    theirs_at_size = masks.reshape(count, height, width)[order]
    ours_at_size = np.stack([decode_mask(mask) for mask in ours.masks]) if count else theirs_at_size
    differs = theirs_at_size != ours_at_size
    boxes = theirs["boxes_xyxy_px"][order].clip(0, [width, height, width, height])
    kept = _scores(theirs).numpy() > THRESHOLD
    return MaskDifference(
        case=number,
        prompt=prompt,
        instances=count,
        same_count=True,
        score=float(np.abs(theirs["scores"][order] - ours.scores).max(initial=0)),
        box_px=float(np.abs(boxes - ours.boxes_xyxy_px).max(initial=0)),
        pixels=int(differs.sum()),
        of_pixels=differs.size,
        logit_there=_largest_logit(theirs["mask_logits"][kept][order], differs),
    )


def _largest_logit(mask_logits: npt.NDArray[Any], where: npt.NDArray[np.bool_]) -> float:
    """The largest |logit| among the pixels of `where`, upsampled in float64, which does not round as we do."""
    largest = 0.0
    for logits, chosen in zip(mask_logits, where, strict=True):
        if chosen.any():
            fine = torch.nn.functional.interpolate(
                torch.from_numpy(logits).double()[None, None],
                chosen.shape,
                mode="bilinear",
                align_corners=False,
            )
            largest = max(largest, float(np.abs(fine[0, 0].numpy()[chosen]).max()))
    return largest
