"""How far each faster mode is from float32 of itself: `python -m bench.exactness`.

Two comparisons. On demo scenes, the decisions: which queries are kept, with which scores and masks. On random weights
at full size, the features: there are no decisions to look at, but the depth and the sums are the real ones.
A mode that fails either is not to be offered.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Sam3Config, Sam3Model

from sam3_runner.checkpoint import DEMO_CHECKPOINT, Checkpoint
from sam3_runner.engine import MAX_ROWS, EncodedImages, Engine
from sam3_runner.exemplars import MAX_BOXES
from sam3_runner.forward import TextFeatures
from sam3_runner.text import PromptChecker
from sam3_runner.training.evaluate import Question

DTYPES = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
SEED = 4_000_037  # no scene of training or evaluation
THRESHOLD = 0.5
# What a mode must reach. A query whose score lies within the allowed score error of the threshold may fall on either
# side of it.
MIN_MASK_IOU = 0.99
MAX_SCORE_ERROR = 0.05
MIN_COSINE = 0.999


@dataclass
class Comparison:
    """One mode beside float32, over all pairs so far.

    Attributes:
        pairs: (image, prompt) pairs compared.
        equal: Of them, those that keep the same queries.
        undecided: Queries that only one of both keeps, though not within the allowed error of the threshold.
        score_errors: Of every query that either keeps.
        ious: Of the masks of every query that both keep.
    """

    pairs: int = 0
    equal: int = 0
    undecided: int = 0
    score_errors: list[float] = field(default_factory=list)
    ious: list[float] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        """Whether the mode decides as float32 does."""
        return (
            self.undecided == 0
            and max(self.score_errors) <= MAX_SCORE_ERROR
            and float(np.mean(self.ious)) >= MIN_MASK_IOU
        )


def compare_decisions(exact: Engine, fast: Engine, scenes: int, device: torch.device) -> Comparison:
    """Ask both about demo scenes, one prompt that is there and one that is not for each."""
    comparison = Comparison()
    for pixels, input_ids, attention_mask in _questions(scenes, device):
        answers = [
            engine.answer(engine.encode_images(pixels), engine.encode_texts(input_ids, attention_mask))
            for engine in (exact, fast)
        ]
        for pair in range(len(pixels)):
            scores = [answer.scores[pair] for answer in answers]
            kept = [score > THRESHOLD for score in scores]
            either, both = kept[0] | kept[1], kept[0] & kept[1]
            differs = kept[0] ^ kept[1]
            comparison.pairs += 1
            comparison.equal += not differs.any()
            comparison.undecided += int((differs & ((scores[0] - THRESHOLD).abs() > MAX_SCORE_ERROR)).sum())
            comparison.score_errors += (scores[0] - scores[1]).abs()[either].tolist()
            queries = both.nonzero()[:, 0]
            masks = [answer.mask_logits(pair, queries) > 0 for answer in answers]
            overlap, union = (masks[0] & masks[1]).sum((1, 2)), (masks[0] | masks[1]).sum((1, 2))
            comparison.ious += (overlap / union.clamp(min=1)).tolist()
    return comparison


def _questions(scenes: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pixels, tokens and attention masks of pairs, a few at a time."""
    checkpoint = Checkpoint.open(DEMO_CHECKPOINT)
    prompts = PromptChecker.from_checkpoint(DEMO_CHECKPOINT)
    for start in range(0, scenes, MAX_ROWS // 2):
        questions = [Question.draw(SEED, index) for index in range(start, min(start + MAX_ROWS // 2, scenes))]
        items = [question.item(checkpoint.input_size_px) for question in questions]
        pixels = np.stack([item.pixels for item in items for _ in item.prompts])
        tokens = prompts.encode([prompt for item in items for prompt in item.prompts])
        yield tuple(torch.from_numpy(part).to(device) for part in (pixels, *tokens))  # type: ignore[misc]


def compare_features(config: Sam3Config, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Cosine of every encoded tensor with float32's, for one noisy image on seeded random weights."""
    torch.manual_seed(0)
    with device:
        model = Sam3Model(config).eval()
    side = config.vision_config.backbone_config.image_size
    pixels = torch.randint(256, (1, side, side, 3), dtype=torch.uint8, device=device)
    encoded = [Engine(model, device, kind).encode_images(pixels) for kind in (torch.float32, dtype)]
    names = ("pixels", "geometry", "fine", "middle", "coarse")
    return {
        name: F.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0).item()
        for name, one, other in zip(names, encoded[0].tensors, encoded[1].tensors, strict=True)
    }


def compare_served(model: Sam3Model, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The largest differences that compiling, recording and padding make, in features (of their largest) and scores.

    Batch sizes follow each other up and down, images and prompts one by one and one for all, and every stage runs
    between two runs of the others: what a recording overwrites of another would show.
    """
    plain, served = (Engine(model, device, dtype) for _ in range(2))
    served.accelerate()
    side = plain.backbone.grid * plain.backbone.patch_px
    worst = {"features": 0.0, "scores": 0.0, "boxes": 0.0}
    for pairs in (1, 3, MAX_ROWS, 2, 1):
        for images in {1, pairs}:
            pixels = torch.randint(256, (images, side, side, 3), dtype=torch.uint8, device=device)
            input_ids = torch.randint(1, 300, (pairs, 32), device=device)
            mask = torch.arange(32, device=device)[None] < torch.randint(3, 32, (pairs, 1), device=device)
            encoded = [EncodedImages.join(e.encode_images(pixels).split()) for e in (plain, served)]
            texts = [TextFeatures.join(e.encode_texts(input_ids, mask).split()) for e in (plain, served)]
            for exact, near in zip(encoded[0].tensors, encoded[1].tensors, strict=True):
                difference = (exact - near).abs().max() / exact.abs().max()
                worst["features"] = max(worst["features"], difference.item())
            marked = torch.rand(pairs, MAX_BOXES, 4, device=device)
            is_box = torch.rand(pairs, MAX_BOXES, device=device) < 0.5
            for has_boxes in (False, True):
                one, other = (
                    engine.answer(
                        image,
                        text,
                        engine.encode_boxes(image, marked, marked[..., 0] < 0.5, is_box)
                        if has_boxes
                        else None,
                    )
                    for engine, image, text in zip((plain, served), encoded, texts, strict=True)
                )
                worst["scores"] = max(worst["scores"], (one.scores - other.scores).abs().max().item())
                boxes = (one.boxes_cxcywh - other.boxes_cxcywh).abs().max()
                worst["boxes"] = max(worst["boxes"], boxes.item())
    return worst


def full_config(layers: int | None) -> Sam3Config:
    """SAM3 at full size, or with its first `layers` layers of the image encoder alone."""
    config = Sam3Config()
    if layers is not None:
        backbone = config.vision_config.backbone_config
        backbone.num_hidden_layers = layers
        backbone.global_attn_indexes = [index for index in backbone.global_attn_indexes if index < layers]
    return config


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare faster modes with float32.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--layers", type=int, help="of the image encoder at full size; all, if not given")
    parser.add_argument("--no-features", action="store_true", help="compare decisions alone")
    options = parser.parse_args()
    model = Checkpoint.open(DEMO_CHECKPOINT).load_model(torch.device("cpu"))
    exact = Engine(model, options.device, torch.float32)
    print(
        "| mode | pairs | same queries kept | undecided | score error, max | mask IoU, mean | min | decides alike |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for name in options.dtypes:
            fast = Engine(model, options.device, DTYPES[name])
            found = compare_decisions(exact, fast, options.scenes, options.device)
            print(
                f"| {name} | {found.pairs} | {found.equal / found.pairs:.1%} | {found.undecided} | "
                f"{max(found.score_errors):.4f} | {np.mean(found.ious):.4f} | {min(found.ious):.4f} | {found.passes} |"
            )
        if options.device.type == "cuda":
            print(
                "\n| as served, against the same uncompiled | features | scores | boxes |\n|---|---|---|---|"
            )
            for name in options.dtypes:
                worst = compare_served(model, options.device, DTYPES[name])
                print(f"| {name} | " + " | ".join(f"{value:.2e}" for value in worst.values()) + " |")
        if options.no_features:
            return
        print(
            "\n| mode | pixels | geometry | fine | middle | coarse | alike |\n|---|---|---|---|---|---|---|"
        )
        for name in options.dtypes:
            cosines = compare_features(full_config(options.layers), DTYPES[name], options.device)
            values = " | ".join(f"{value:.6f}" for value in cosines.values())
            print(f"| {name} | {values} | {min(cosines.values()) >= MIN_COSINE} |")


if __name__ == "__main__":
    main()
