"""Before and after the model: the choices of Meta's `Sam3Processor`, each against the torchvision call it makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from transformers import Sam3ImageProcessor

from sam3_runner.blocks import joint_scores, normalise
from sam3_runner.engine import Answers
from sam3_runner.images import resize_for_model
from sam3_runner.rle import decode_mask
from sam3_runner.segmenter import _keep
from sam3_runner.types import Segmentation, Selection
from sam3_runner.upsample import masks_from_logits

SIZE_PX = 240  # the demo's; what is held does not depend on it
ONE_ULP = 2**-23  # of what lies in [1, 2), more than any of these differ by
SHAPES_HW = [(150, 211), (480, 640), (1, 7), (SIZE_PX, SIZE_PX), (513, 40)]


def made(size_hw: tuple[int, int], *, is_grey: bool = False) -> np.ndarray:
    pixels = np.random.default_rng(1).integers(0, 256, (*size_hw, 1 if is_grey else 3), dtype=np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*size_hw, 3)))


@pytest.mark.parametrize("is_grey", [False, True], ids=["coloured", "grey"])
@pytest.mark.parametrize("size_hw", SHAPES_HW)
def test_pixels_are_resized_as_bytes_with_antialiasing_and_then_normalised(
    size_hw: tuple[int, int], is_grey: bool
) -> None:
    image = made(size_hw, is_grey=is_grey)
    as_bytes = v2.Resize(size=(SIZE_PX, SIZE_PX))(v2.functional.to_image(Image.fromarray(image)))
    as_floats = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])(
        as_bytes
    )

    resized = resize_for_model(image, SIZE_PX)
    values = normalise(torch.from_numpy(resized)).permute(2, 0, 1)

    assert np.array_equal(resized, as_bytes.permute(1, 2, 0).numpy())
    torch.testing.assert_close(values, as_floats, rtol=0, atol=ONE_ULP)


def test_transformers_prepares_the_same_pixels() -> None:
    image = made((150, 211))
    processor = Sam3ImageProcessor(size={"height": SIZE_PX, "width": SIZE_PX})
    theirs = processor(images=Image.fromarray(image), return_tensors="pt").pixel_values[0]
    ours = torch.from_numpy(resize_for_model(image, SIZE_PX)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ONE_ULP)


def kept_of(logits: list[float], presence: float, box: list[float], threshold: float = 0.5) -> Segmentation:
    """What is kept of queries that all have the same box and a mask that is positive all over."""
    count = len(logits)
    answers = Answers(
        scores=joint_scores(torch.tensor([logits]), torch.tensor([[presence]])),
        boxes_cxcywh=torch.tensor(box).expand(1, count, 4),
        mask_embeddings=torch.ones(1, count, 2),
        mask_shifts=torch.zeros(1, count),
        pixels=torch.ones(1, 6, 6, 2),
    )
    decided = torch.cat([answers.scores[..., None], answers.boxes_cxcywh], dim=-1).numpy()
    return _keep(answers, decided[0], 0, Selection(threshold), (10, 20))


SMALL_BOX = [0.5, 0.5, 0.2, 0.2]


def test_the_score_is_the_product_and_must_be_above_the_threshold() -> None:
    certain = 40.0  # sigmoid(40) is 1 in float32, and sigmoid(0) exactly one half
    just_above = 1e-6
    kept = kept_of([0.0, just_above, -just_above, 3.0], certain, SMALL_BOX)
    assert kept.scores.tolist() == torch.tensor([3.0, just_above]).sigmoid().tolist()
    # 0.73 · 0.73, and 0.73 alone would pass 0.6
    assert len(kept_of([1.0], 1.0, SMALL_BOX).scores) == 1
    assert len(kept_of([1.0], 1.0, SMALL_BOX, threshold=0.6).scores) == 0


def test_boxes_are_metas_clipped_to_the_image() -> None:
    kept = kept_of([5.0], 5.0, [0.25, 0.5, 0.7, 0.4])
    np.testing.assert_allclose(kept.boxes_xyxy_px, [[0, 3, 12, 7]], atol=1e-5)


def test_masks_are_upsampled_as_logits_and_then_cut_where_transformers_cuts_probabilities() -> None:
    logits = torch.tensor([[[-8.0, 2.0]]])
    size_hw = (1, 8)
    as_meta = interpolate(logits[None], size_hw, mode="bilinear", align_corners=False)[0, 0].sigmoid() > 0.5
    as_transformers = (
        interpolate(logits[None].sigmoid(), size_hw, mode="bilinear", align_corners=False)[0, 0] > 0.5
    )

    (mask,) = masks_from_logits(logits, size_hw)

    assert decode_mask(mask).tolist() == as_meta.tolist()
    assert as_meta.tolist() != as_transformers.tolist()
