"""Train the demo checkpoint: `python -m sam3_runner.training.demo`.

Seeded, resumable (run it again and it goes on from its last state), on CPU or CUDA. It writes a Hugging Face
directory in the form of `facebook/sam3`: config, safetensors, tokenizer and image processor.
"""

from __future__ import annotations

import argparse
import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import CLIPTokenizer, Sam3ImageProcessor, Sam3Model

from sam3_runner.forward import decode, encode_image, encode_text
from sam3_runner.training.architecture import (
    HIDDEN,
    IMAGE_SIZE_PX,
    MAX_TEXT_TOKENS,
    PATCH_SIZE_PX,
    build_demo_model,
)
from sam3_runner.training.attention import use_plain_attention
from sam3_runner.training.data import UNKNOWN_COLOURS, UNKNOWN_THINGS, Batch, Collate, SceneDataset
from sam3_runner.training.guides import Guides, guide_losses
from sam3_runner.training.losses import detection_loss
from sam3_runner.training.scenes import all_prompt_texts
from sam3_runner.training.tokenizer import train_clip_tokenizer

MASK_SIZE_PX = 8 * IMAGE_SIZE_PX // PATCH_SIZE_PX  # truth at twice the model's mask resolution
EMA_DECAY = 0.998
MAX_GRADIENT_NORM = 2.0
WARM_UP_STEPS = 300
DECAY_SHARE = (
    0.3  # the learning rate falls over the last part; before, it stays: so `--steps` can be raised late
)


@dataclass(frozen=True)
class TrainingOptions:
    """What `python -m sam3_runner.training.demo` can be told."""

    out: Path
    state: Path
    steps: int
    images: int
    prompts: int
    learning_rate: float
    seed: int
    workers: int
    device: torch.device
    save_every: int


class Trainer:
    """Model, averaged model and optimiser, and how they go to disk and back."""

    def __init__(self, options: TrainingOptions) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.tokenizer = demo_tokenizer()
        self.model = build_demo_model(self.tokenizer).to(options.device).train()
        if options.device.type == "cpu":
            use_plain_attention(self.model)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.guides = Guides(HIDDEN).to(options.device)
        parameters = [*self.model.parameters(), *self.guides.parameters()]
        decayed = [p for p in parameters if p.ndim > 1]
        plain = [p for p in parameters if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))
        self.step = 0
        if options.state.exists():
            self._load(torch.load(options.state, map_location=options.device, weights_only=True))

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns the loss terms and the gradient's norm."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate_at(self.step, self.options.steps, self.options.learning_rate)
        batch = batch.to(self.options.device)
        with torch.autocast(self.options.device.type, torch.bfloat16):
            image = encode_image(self.model, batch.pixel_values)
            text = encode_text(self.model, batch.input_ids, batch.attention_mask)
            kinds, matches = self.guides(image, text)
            prompts_per_image = len(batch.input_ids) // len(batch.pixel_values)
            outputs = decode(self.model, image.repeat_each(prompts_per_image), text, with_semantic=True)
        terms = detection_loss(outputs, batch.targets)
        terms |= guide_losses(kinds, matches, batch)
        self.optimiser.zero_grad(set_to_none=True)
        (terms["total"] + terms["kinds"] + terms["match"]).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimiser.step()
        self.step += 1
        self._update_average()
        return {"norm": norm.item(), **{name: term.item() for name, term in terms.items()}}

    @torch.no_grad()
    def _update_average(self) -> None:
        # Early on the plain average of all steps so far forgets the random start faster.
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        for averaged, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
            averaged.lerp_(current, 1 - decay)

    def save_state(self) -> None:
        """Write everything that resuming needs; either whole or not at all."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "guides": self.guides.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        partial = self.options.state.with_suffix(".partial")
        self.options.state.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, partial)
        os.replace(partial, self.options.state)

    def _load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.guides.load_state_dict(state["guides"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, a plateau, then a linear fall to 2 % of the peak over the last `DECAY_SHARE` of the steps."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    decay = min(1.0, (steps - step) / (DECAY_SHARE * steps))
    return peak * min(warm_up, max(decay, 0.02))


def demo_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the demo's language; the same on every run."""
    return train_clip_tokenizer([*all_prompt_texts(), *UNKNOWN_COLOURS, *UNKNOWN_THINGS], MAX_TEXT_TOKENS)


def save_checkpoint(model: Sam3Model, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write a Hugging Face directory that the runner loads as it loads `facebook/sam3`.

    Weights are stored as float16, which halves the file; every consumer loads them in the dtype it computes in.
    """
    size = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}
    mask_size = {"height": MASK_SIZE_PX // 2, "width": MASK_SIZE_PX // 2}
    copy.deepcopy(model).half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    Sam3ImageProcessor(size=size, mask_size=mask_size).save_pretrained(out)


def train(options: TrainingOptions) -> None:
    """Train from the last saved state, or from the start, up to `options.steps`; save state and checkpoint."""
    trainer = Trainer(options)
    dataset = SceneDataset(options.seed, IMAGE_SIZE_PX, MASK_SIZE_PX, options.prompts)
    loader = DataLoader(
        dataset,
        batch_size=options.images,
        sampler=range(trainer.step * options.images, options.steps * options.images),
        num_workers=options.workers,
        collate_fn=Collate(trainer.tokenizer),
        worker_init_fn=_one_thread,
        prefetch_factor=8 if options.workers else None,
    )
    smooth: dict[str, float] = {}
    with tqdm(loader, total=options.steps, initial=trainer.step, unit="step", smoothing=0.02) as progress:
        for batch in progress:
            for name, value in trainer.train_step(batch).items():
                smooth[name] = 0.98 * smooth.get(name, value) + 0.02 * value
            if trainer.step % 20 == 0:
                progress.set_postfix({name: f"{value:.3g}" for name, value in smooth.items()}, refresh=False)
            if trainer.step % options.save_every == 0:
                trainer.save_state()
                save_checkpoint(trainer.average, trainer.tokenizer, options.out)
    trainer.save_state()
    save_checkpoint(trainer.average, trainer.tokenizer, options.out)


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


def parse_options(arguments: list[str] | None = None) -> TrainingOptions:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description="Train the demo checkpoint on synthetic scenes.")
    parser.add_argument(
        "--out", type=Path, default=Path("weights/demo"), help="checkpoint directory to write"
    )
    parser.add_argument(
        "--state", type=Path, default=Path("weights/demo-training.pt"), help="file to resume from"
    )
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--images", type=int, default=8, help="images in a step")
    parser.add_argument("--prompts", type=int, default=4, help="prompts for each image")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--save-every", type=int, default=250, help="steps between saved states")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    return TrainingOptions(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    train(parse_options())
