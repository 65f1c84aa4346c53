"""What Meta's own interactive predictor answers. Runs in the environment of `environment.py`, which holds none of ours.

    python -m tests.parity.clicks_reference FOLDER BPE     FOLDER/request.json -> sam3.pt, answer-*.npz

As `reference.py`, with one library's function done by another: scikit-image, which names the parts of a mask on a CPU
and which Meta's wheel does not ask for, so that holes would stay as they are. SciPy's does the same.
"""

from __future__ import annotations

import functools
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn

from tests.parity.reference import CudaIsCpu, build, spread_weights  # first: it silences warnings

import sam3.model_builder as builder  # isort: skip
from sam3.model.sam3_image_processor import Sam3Processor  # isort: skip

PREDICTOR = "inst_interactive_predictor.model."
SINGLE_MASK = f"{PREDICTOR}sam_mask_decoder.output_hypernetworks_mlps.0.layers.2.weight"


def label(values: npt.NDArray[np.uint8], return_num: bool) -> tuple[npt.NDArray[Any], int]:
    """The parts of what is not 0, where corners hang together: as scikit-image's function of this name."""
    assert return_num
    return ndimage.label(values, np.ones((3, 3)))


def build_with_predictor(size: dict[str, dict[str, Any]], bpe: str, input_size_px: int) -> Any:
    """Meta's image model with its interactive predictor."""
    builder.build_sam3_image_model = functools.partial(
        builder.build_sam3_image_model, enable_inst_interactivity=True
    )
    model: Any = build(size, bpe)
    grid = input_size_px // 14
    model.inst_interactive_predictor._bb_feat_sizes = [(grid * by, grid * by) for by in (4, 2, 1)]
    return model


def save(model: nn.Module, file: Path) -> None:
    """By the names of `sam3.pt`."""
    tensors = {
        f"tracker.{name.removeprefix(PREDICTOR)}"
        if name.startswith(PREDICTOR)
        else f"detector.{name}": tensor
        for name, tensor in model.state_dict().items()
    }
    torch.save(tensors, file)


def answer(
    model: Any, image: Path, prompts: list[list[tuple[float, float, int]]], input_size_px: int
) -> dict[str, npt.NDArray[Any]]:
    """One image, each prompt in turn, as Meta's notebook asks: three masks for one click, one for several."""
    every: list[tuple[Tensor, Tensor]] = []
    decoder = model.inst_interactive_predictor.model.sam_mask_decoder
    predict_masks = decoder.predict_masks

    def watched(**kwargs: Any) -> Any:
        masks, overlaps, *rest = predict_masks(**kwargs)
        every.append((masks[0], overlaps[0]))
        return masks, overlaps, *rest

    decoder.predict_masks = watched
    found: dict[str, npt.NDArray[Any]] = {}
    state = Sam3Processor(model, resolution=input_size_px, device="cpu").set_image(
        Image.open(image).convert("RGB")
    )
    for number, prompt in enumerate(prompts):
        masks, overlaps, logits = model.predict_inst(
            state,
            point_coords=np.array([place[:2] for place in prompt]),
            point_labels=np.array([place[2] for place in prompt]),
            multimask_output=len(prompt) == 1,
        )
        best = int(overlaps.argmax())
        answers = {
            "mask": masks[best].astype(bool),
            "score": overlaps[best],
            "logits": logits[best],
            "all_logits": every[-1][0].numpy(),
            "all_scores": every[-1][1].numpy(),
        }
        found.update({f"{number}.{key}": np.asarray(value) for key, value in answers.items()})
    decoder.predict_masks = predict_masks
    return found


def run(folder: Path, bpe: str) -> None:
    """Do what the request asks."""
    measure = ModuleType("skimage.measure")
    measure.label = label  # type: ignore[attr-defined]
    sys.modules |= {"skimage": ModuleType("skimage"), "skimage.measure": measure}
    request = json.loads((folder / "request.json").read_text())
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])  # tables of positions are drawn as the model is built
    input_size_px = request["input_size_px"]
    model = build_with_predictor(request["size"], bpe, input_size_px)
    spread_weights(model, request["seed"])
    with torch.no_grad():
        model.get_parameter(SINGLE_MASK).mul_(request["single_gain"])
    save(model, folder / "sam3.pt")
    for number, case in enumerate(request["cases"]):
        with CudaIsCpu():
            found: dict[str, Any] = answer(model, folder / case["image"], case["prompts"], input_size_px)
        np.savez(folder / f"answer-{number}.npz", **found)
    versions = {name: version(name) for name in ("sam3", "torch", "torchvision", "numpy")}
    (folder / "done.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
