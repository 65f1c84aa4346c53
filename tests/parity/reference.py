"""What Meta's own code answers. Runs in the environment of `environment.py`, which holds none of ours.

    python reference.py model FOLDER BPE     FOLDER/request.json -> sam3.pt, answers/*.npz
    python reference.py tokens REQUEST BPE   a JSON file of texts -> their token ids as JSON, on standard output

Meta's builder writes "cuda" where it prepares its tables; here that means the CPU. Nothing is stubbed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

warnings.simplefilter("ignore")  # Meta's code has many, about a GPU that is not there

import sam3.model_builder as builder  # noqa: E402
from sam3.model.sam3_image_processor import Sam3Processor  # noqa: E402


class CudaIsCpu(TorchFunctionMode):
    """What asks for the device "cuda" gets the CPU, whose memory needs no pinning."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            return args[0]
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def build(size: dict[str, dict[str, Any]], bpe: str) -> nn.Module:
    """Meta's image model, as its builder makes it, with a video checkpoint's second feature pyramid.

    Args:
        size: By the class that the builder calls: what to build it with instead. Empty for the full size.
        bpe: CLIP's vocabulary.
    """
    for name, changes in size.items():
        setattr(builder, name, _with(getattr(builder, name), changes))
    with CudaIsCpu():
        vision = builder._create_vision_backbone
        builder._create_vision_backbone = _with(vision, {"enable_inst_interactivity": True})
        model: nn.Module = builder.build_sam3_image_model(
            bpe_path=bpe, device="cpu", eval_mode=True, load_from_HF=False
        )
    return model


def _with(make: Callable[..., Any], changes: dict[str, Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: make(*args, **{**kwargs, **changes})


# How far a branch's last weights are scaled down: the residual stream then keeps what it had, and rounding errors
# do not grow from layer to layer. The rest is scaled so that the answers are spread; see `spread_weights`.
BRANCH_ENDS = ("attn.proj", "mlp.fc2", "mlp.c_proj", "linear2", "out_proj")


def spread_weights(model: nn.Module, seed: int) -> None:
    """Give every parameter a random value of its own, none the 0 or 1 that would hide a mix-up of names.

    Drawn with unit gain, normalisations around 1, biases around 0; scaled so that some of the 200 queries pass the
    threshold, boxes lie all over the image, and mask logits have both signs.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _draw(name, parameter, generator)
        presence = model.get_submodule("transformer.decoder.presence_token_head.layers.2")
        presence.get_parameter("weight").mul_(0.2)
        presence.get_parameter("bias").fill_(1.5)


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    parameter.normal_(generator=generator)
    stem, _, kind = name.rpartition(".")
    if (
        "embed" in stem.rpartition(".")[2]
        and parameter.ndim == 2
        and "mask" not in stem
        and "box" not in stem.lower()
    ):
        return  # tables of embeddings
    if kind.endswith("bias"):
        parameter.mul_(0.1)
    elif parameter.ndim == 1:
        parameter.mul_(0.1).add_(1.0)
    elif kind in ("pos_embed", "positional_embedding"):
        parameter.mul_(0.3)
    elif kind == "text_projection":
        parameter.div_(math.sqrt(len(parameter)))
    elif not stem.endswith(("reference_points", "presence_token")):
        gain = 0.3 if stem.endswith(BRANCH_ENDS) else GAINS.get(stem, 1.0)
        parameter.mul_(gain / math.sqrt(parameter[0].numel()))


GAINS = {
    "dot_prod_scoring.hs_proj": 2.0,
    "transformer.decoder.bbox_embed.layers.2": 0.5,
    "segmentation_head.mask_predictor.mask_embed.layers.2": 0.3,
}


def answer(
    model: nn.Module, image: Path, prompts: list[dict[str, Any]], input_size_px: int, times: list[float]
) -> dict[str, Any]:
    """One image, each prompt in turn, through `Sam3Processor`."""
    raw: dict[str, Tensor] = {}

    def remember(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        raw.update(outputs)
        return outputs

    ground: Callable[..., dict[str, Tensor]] = getattr(model, "forward_grounding")  # noqa: B009  # Meta's own
    setattr(model, "forward_grounding", lambda *args, **kwargs: remember(ground(*args, **kwargs)))  # noqa: B010
    processor = Sam3Processor(model, resolution=input_size_px, device="cpu")
    found: dict[str, Any] = {}
    started = time.perf_counter()
    state = processor.set_image(Image.open(image).convert("RGB"))
    for number, prompt in enumerate(prompts):
        state = ask(processor, prompt, state)
        kept = {
            "boxes_xyxy_px": state["boxes"],
            "scores": state["scores"],
            "logits": raw["pred_logits"][0, :, 0],
            "presence_logit": raw["presence_logit_dec"].reshape(()),
            "boxes_cxcywh": raw["pred_boxes"][0],
            "mask_logits": raw["pred_masks"][0],
        }
        found.update({f"{number}.{key}": value.float().numpy() for key, value in kept.items()})
        masks = state["masks"][:, 0].numpy()  # (K, 1, H, W) -> (K, H, W)
        found[f"{number}.masks"] = np.packbits(masks.reshape(len(masks), -1), axis=1)
    times.append(time.perf_counter() - started)
    setattr(model, "forward_grounding", ground)  # noqa: B010
    return found


def ask(processor: Sam3Processor, prompt: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """One prompt, of words, boxes or both. The processor answers after each part; here after the last alone."""
    processor.reset_all_prompts(state)
    words = [] if prompt["text"] is None else [partial(processor.set_text_prompt, prompt["text"], state)]
    boxes = zip(prompt["boxes"], prompt["labels"], strict=True)
    parts = [*words, *(partial(processor.add_geometric_prompt, box, label, state) for box, label in boxes)]
    setattr(processor, "_forward_grounding", lambda state: state)  # noqa: B010  # Meta's own
    for part in parts[:-1]:
        part()
    delattr(processor, "_forward_grounding")
    answered: dict[str, Any] = parts[-1]()
    return answered


def run_model(folder: Path, bpe: str) -> None:
    request = json.loads((folder / "request.json").read_text())
    torch.set_num_threads(request["threads"])
    model = build(request["size"], bpe)
    spread_weights(model, request["seed"])
    tensors = {f"detector.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["tracker.maskmem_tpos_enc"] = torch.zeros(
        7, 1, 1, 64
    )  # one of the tracker's, which nobody may miss
    torch.save({"model": tensors} if request["under_model"] else tensors, folder / "sam3.pt")
    times: list[float] = []
    for number, case in enumerate(request["cases"]):
        with CudaIsCpu():
            found = answer(model, folder / case["image"], case["prompts"], request["input_size_px"], times)
        np.savez(folder / f"answer-{number}.npz", **found)
    versions = {name: version(name) for name in ("sam3", "torch", "torchvision", "numpy")}
    (folder / "done.json").write_text(json.dumps({"seconds": times, "versions": versions}))


def run_tokens(request: Path, bpe: str) -> None:
    asked = json.loads(request.read_text())
    tokenizer = builder.SimpleTokenizer(bpe_path=bpe)
    ids = [tokenizer(text, context_length=asked["context_length"])[0].tolist() for text in asked["texts"]]
    lengths = [len(tokenizer.encode(text)) + 2 for text in asked["texts"]]  # before truncation
    json.dump({"ids": ids, "lengths": lengths}, sys.stdout)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    command, path, bpe_path = sys.argv[1:]
    {"model": run_model, "tokens": run_tokens}[command](Path(path), bpe_path)
