"""What decoding a JPEG at a fraction of its size does to the demo model's answers.

    python -m bench.jpeg_decisions            # 120 scenes, some minutes on one core

Each scene is made so large that its JPEG is decoded at a half, a quarter or an eighth, its shorter side then being 1
to 2 times the model's input. The answers are compared with those of decoding it whole. Beside that stands what other
small changes do: saving the JPEG once more, Pillow's resize for SAM3's own, every value moved by one level at random.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from bench.images import RESULTS, conditions
from sam3_runner import rle
from sam3_runner.images import resize_for_model
from sam3_runner.segmenter import Segmenter
from sam3_runner.training.evaluate import Question, iou
from sam3_runner.types import Segmentation, SegmentItem

SEED = 777  # of the scenes: neither trained nor evaluated on

Pixels = npt.NDArray[np.uint8]


@dataclass
class Tally:
    """How the answers of one change compare.

    Attributes:
        scenes: With one prompt each.
        same_set: Scenes in which as many instances were kept, each overlapping its counterpart by more than half.
        ious: Of each pair of masks in them.
        score_error: The largest.
        levels: Mean difference of the model's input, one per scene, of 255.
    """

    scenes: int = 0
    same_set: int = 0
    ious: list[float] = field(default_factory=list)
    score_error: float = 0.0
    levels: list[float] = field(default_factory=list)

    def add(self, whole: Segmentation, changed: Segmentation, levels: float) -> None:
        """Take in one scene's answers."""
        self.scenes += 1
        self.levels.append(levels)
        mine, theirs = ([rle.decode_mask(mask) for mask in one.masks] for one in (whole, changed))
        overlaps = np.array([[iou(one, other) for other in theirs] for one in mine]).reshape(
            len(mine), len(theirs)
        )
        rows, columns = linear_sum_assignment(overlaps, maximize=True)
        if len(mine) != len(theirs) or (overlaps[rows, columns] <= 0.5).any():
            return
        self.same_set += 1
        self.ious += overlaps[rows, columns].tolist()
        errors = np.abs(whole.scores[rows] - changed.scores[columns])
        self.score_error = max(self.score_error, float(errors.max(initial=0)))

    def figures(self) -> dict[str, str]:
        """What is written down."""
        ious = np.array(self.ious or [np.nan])
        return {
            "scenes": str(self.scenes),
            "same_set": str(self.same_set),
            "instances": str(len(self.ious)),
            "iou_099_share": f"{np.mean(ious >= 0.99):.3f}",
            "iou_median": f"{np.median(ious):.4f}",
            "iou_least": f"{ious.min():.4f}",
            "score_error_max": f"{self.score_error:.4f}",
            "mean_levels": f"{np.mean(self.levels):.3f}",
        }


def decoded(data: bytes, size_hw: tuple[int, int], eighths: int, side: int) -> Pixels:
    """The model's input from a JPEG decoded at so many eighths."""
    height, width = (one * eighths // 8 for one in size_hw)
    return resize_for_model(simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width), side)


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    """4:2:0, as phones write it."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling="4:2:0")
    return out.getvalue()


def enlarged(scene: Pixels, short_px: float, random: np.random.Generator) -> Image.Image:
    """The scene at another size, of multiples of 8, with a sensor's noise, so that there is detail to lose."""
    scale = short_px / min(scene.shape[:2])
    size_wh = math.ceil(scene.shape[1] * scale / 8) * 8, math.ceil(scene.shape[0] * scale / 8) * 8
    large = np.asarray(Image.fromarray(scene).resize(size_wh, Image.Resampling.BICUBIC), np.int16)
    noise = random.integers(-12, 13, (*large.shape[:2], 1), np.int16)
    return Image.fromarray((large + noise).clip(0, 255).astype(np.uint8))


def pairs(question: Question, side: int, random: np.random.Generator) -> Iterator[tuple[str, Pixels, Pixels]]:
    """Name of a change, the model's input without it, and with it."""
    cover = random.uniform(1, 2)
    for name, eighths in (("half", 4), ("quarter", 2), ("eighth", 1)):
        image = enlarged(question.scene.image, side * cover * 8 / eighths, random)
        data, size_hw = jpeg(image), (image.height, image.width)
        whole = decoded(data, size_hw, 8, side)
        covers = f"{name}, {'1 to 1.5' if cover < 1.5 else '1.5 to 2'} times the input"
        yield covers, whole, decoded(data, size_hw, eighths, side)
        if eighths != 4:
            continue
        again = Image.open(io.BytesIO(data))
        for quality in (92, 75):
            yield f"saved again at {quality}", whole, decoded(jpeg(again, quality), size_hw, 8, side)
        yield "Pillow's resize", whole, np.asarray(again.resize((side, side), Image.Resampling.BILINEAR))
        moved = whole.astype(np.int16) + random.integers(-1, 2, whole.shape, np.int16)
        yield "one level of noise", whole, moved.clip(0, 255).astype(np.uint8)


def compare(segmenter: Segmenter, scenes: int) -> dict[str, Tally]:
    """One tally for each change."""
    side = segmenter.info.input_size_px
    tallies: dict[str, Tally] = {}
    for index in tqdm(range(scenes), unit="scene"):
        question = Question.draw(SEED, index)
        prompt, size_hw = question.item(side).prompts[:1], question.item(side).size_hw
        for name, *inputs in pairs(question, side, np.random.default_rng([SEED, index])):
            results = segmenter.segment_batch([SegmentItem(pixels, size_hw, prompt) for pixels in inputs])
            levels = float(np.abs(inputs[0].astype(np.int16) - inputs[1]).mean())
            whole, changed = (result.segmentations[0] for result in results)
            tallies.setdefault(name, Tally()).add(whole, changed, levels)
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """The figures as Markdown."""
    lines = [
        "| change | kept set equal | instances | IoU ≥ 0.99 | median IoU | least | score error | levels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, tally in sorted(tallies.items()):
        seen = tally.figures()
        lines.append(
            f"| {name} | {seen['same_set']} of {seen['scenes']} | {seen['instances']} | {seen['iou_099_share']} "
            f"| {seen['iou_median']} | {seen['iou_least']} | {seen['score_error_max']} | {seen['mean_levels']} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.jpeg_decisions", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--scenes", type=int, default=120)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for jpeg_decisions.csv and .md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tallies = compare(Segmenter.from_checkpoint(), options.scenes)
    seen = conditions(rounds=1)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "jpeg_decisions.csv").open("w", newline="") as file:
        rows = [{**seen, "change": name, **tally.figures()} for name, tally in sorted(tallies.items())]
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    told = ", ".join(f"{key} {value}" for key, value in seen.items() if key != "rounds")
    (options.out / "jpeg_decisions.md").write_text(f"{told}\n\n{table(tallies)}\n")
    print(table(tallies))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
