"""Before and after the model: the choices of Meta's `Sam3Processor`, each against the torchvision call it makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from transformers import Sam3ImageProcessor

from sam3_runner.forward import LayerOutputs
from sam3_runner.images import resize_for_model
from sam3_runner.rle import decode_mask
from sam3_runner.segmenter import Segmenter, _keep
from sam3_runner.types import SegmentItem, TextPrompt
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
    demo: Segmenter, size_hw: tuple[int, int], is_grey: bool
) -> None:
    image = made(size_hw, is_grey=is_grey)
    as_bytes = v2.Resize(size=(SIZE_PX, SIZE_PX))(v2.functional.to_image(Image.fromarray(image)))
    as_floats = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])(
        as_bytes
    )

    resized = resize_for_model(image, SIZE_PX)
    values = demo._pixel_values([SegmentItem(resized, size_hw, (TextPrompt("red"),))])

    assert np.array_equal(resized, as_bytes.permute(1, 2, 0).numpy())
    torch.testing.assert_close(values[0], as_floats, rtol=0, atol=ONE_ULP)


def test_transformers_prepares_the_same_pixels() -> None:
    image = made((150, 211))
    processor = Sam3ImageProcessor(size={"height": SIZE_PX, "width": SIZE_PX})
    theirs = processor(images=Image.fromarray(image), return_tensors="pt").pixel_values[0]
    ours = torch.from_numpy(resize_for_model(image, SIZE_PX)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ONE_ULP)


def outputs_of(logits: list[float], presence: float, boxes_cxcywh: list[float]) -> LayerOutputs:
    """One pair, one layer; every query has the same box and a mask that is positive all over."""
    count = len(logits)
    return LayerOutputs(
        logits=torch.tensor(logits).view(1, 1, count),
        boxes_cxcywh=torch.tensor(boxes_cxcywh).expand(1, 1, count, 4),
        presence_logits=torch.tensor(presence).view(1, 1),
        mask_embeddings=torch.ones(1, 1, count, 2),
        pixel_embeddings=torch.ones(1, 2, 6, 6),
        semantic_logits=None,
        drawn=None,
    )


def item(threshold: float = 0.5) -> SegmentItem:
    return SegmentItem(np.zeros((SIZE_PX, SIZE_PX, 3), np.uint8), (10, 20), (TextPrompt("red"),), threshold)


def test_the_score_is_the_product_and_must_be_above_the_threshold() -> None:
    certain = 40.0  # sigmoid(40) is 1 in float32, and sigmoid(0) exactly one half
    just_above = 1e-6
    outputs = outputs_of([0.0, just_above, -just_above, 3.0], certain, [0.5, 0.5, 0.2, 0.2])

    kept = _keep(outputs, 0, item())

    assert kept.scores.tolist() == torch.tensor([3.0, just_above]).sigmoid().tolist()
    doubtful = outputs_of([1.0], 1.0, [0.5, 0.5, 0.2, 0.2])  # 0.73 · 0.73, and 0.73 alone would pass 0.6
    assert len(_keep(doubtful, 0, item()).scores) == 1
    assert len(_keep(doubtful, 0, item(0.6)).scores) == 0


def test_boxes_are_metas_clipped_to_the_image() -> None:
    kept = _keep(outputs_of([5.0], 5.0, [0.25, 0.5, 0.7, 0.4]), 0, item())
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
