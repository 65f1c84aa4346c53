"""Train the demo checkpoint: `python -m sam3_runner.training.demo`.

Seeded, resumable (run it again and it goes on from its last state), on CPU or CUDA. It writes a Hugging Face
directory in the form of `facebook/sam3`: config, safetensors, tokenizer and image processor.

In two phases. First the image encoder learns alone which colour and shape every patch shows: a transformer needs
many images to see shapes, and without prompts an image costs a fifth. Then the whole model learns to answer.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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
from sam3_runner.training.guides import Guides, guide_losses, pixel_kind_loss
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
    image_steps: int
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
        self.image_step = 0  # of the first phase
        self.step = 0  # of the second
        if options.state.exists():
            self._load(torch.load(options.state, map_location=options.device, weights_only=True))

    def train_image_encoder(self, batch: Batch) -> dict[str, float]:
        """One step of the first phase; the batch's prompts are not looked at."""
        options = self.options
        batch = batch.to(options.device)
        with torch.autocast(options.device.type, torch.bfloat16):
            features = encode_coarse_level(self.model, batch.pixel_values)
            kinds = self.guides.kinds[-1](features)
        loss = pixel_kind_loss(kinds, batch.kinds)
        norm = self._descend(
            loss, learning_rate_at(self.image_step, options.image_steps, options.learning_rate)
        )
        self.image_step += 1
        return {"norm": norm, "kinds": loss.item()}

    def train_detector(self, batch: Batch) -> dict[str, float]:
        """One step of the second phase: I images with P prompts each."""
        options = self.options
        batch = batch.to(options.device)
        with torch.autocast(options.device.type, torch.bfloat16):
            image = encode_image(self.model, batch.pixel_values)
            text = encode_text(self.model, batch.input_ids, batch.attention_mask)
            kinds, matches = self.guides(image, text)
            prompts_per_image = len(batch.input_ids) // len(batch.pixel_values)
            outputs = decode(self.model, image.repeat_each(prompts_per_image), text, with_semantic=True)
        terms = detection_loss(outputs, batch.targets) | guide_losses(kinds, matches, batch)
        loss = terms["total"] + terms["kinds"] + terms["match"]
        norm = self._descend(loss, learning_rate_at(self.step, options.steps, options.learning_rate))
        self.step += 1
        return {"norm": norm, **{name: term.item() for name, term in terms.items()}}

    def _descend(self, loss: Tensor, learning_rate: float) -> float:
        """One optimiser step at this rate; returns the gradient's norm."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimiser.step()
        self._update_average()
        return norm.item()

    @torch.no_grad()
    def _update_average(self) -> None:
        # Early on the plain average of all steps so far forgets the random start faster.
        steps = self.image_step + self.step
        decay = min(EMA_DECAY, steps / (steps + 10))
        for averaged, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
            averaged.lerp_(current, 1 - decay)

    def save_state(self) -> None:
        """Write everything that resuming needs; either whole or not at all."""
        state = {
            "image_step": self.image_step,
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
        self.image_step, self.step = state["image_step"], state["step"]
        self.model.load_state_dict(state["model"])
        self.guides.load_state_dict(state["guides"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])


def encode_coarse_level(model: Sam3Model, pixel_values: Tensor) -> Tensor:
    """(I, C, H, W), the level that the DETR encoder reads, without the cost of the finer ones."""
    vision = model.vision_encoder
    grid = IMAGE_SIZE_PX // PATCH_SIZE_PX
    patches = vision.backbone(pixel_values).last_hidden_state  # (I, H·W, C')
    features: Tensor = vision.neck.fpn_layers[-2](patches.unflatten(1, (grid, grid)).permute(0, 3, 1, 2))
    return features


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
    """Train from the last saved state, or from the start, to the end of both phases; save state and checkpoint."""
    trainer = Trainer(options)
    # An image without prompts costs so little that four times as many fit into a step.
    scenes = SceneDataset(options.seed + 1, IMAGE_SIZE_PX, MASK_SIZE_PX, prompts_per_image=1)
    steps = range(trainer.image_step, options.image_steps)
    _run_phase("image encoder", trainer, trainer.train_image_encoder, scenes, 4 * options.images, steps)
    questions = SceneDataset(options.seed, IMAGE_SIZE_PX, MASK_SIZE_PX, options.prompts)
    steps = range(trainer.step, options.steps)
    _run_phase("detector", trainer, trainer.train_detector, questions, options.images, steps)
    trainer.save_state()
    save_checkpoint(trainer.average, trainer.tokenizer, options.out)


def _run_phase(
    name: str,
    trainer: Trainer,
    train_step: Callable[[Batch], dict[str, float]],
    dataset: SceneDataset,
    images: int,
    steps: range,
) -> None:
    """Take `steps` steps of `images` images; save state and checkpoint now and then."""
    options = trainer.options
    loader = DataLoader(
        dataset,
        batch_size=images,
        sampler=range(steps.start * images, steps.stop * images),
        num_workers=options.workers,
        collate_fn=Collate(trainer.tokenizer),
        worker_init_fn=_one_thread,
        prefetch_factor=8 if options.workers else None,
    )
    smooth: dict[str, float] = {}
    with tqdm(loader, name, steps.stop, initial=steps.start, unit="step", smoothing=0.02) as progress:
        for step, batch in zip(steps, progress, strict=True):
            for term, value in train_step(batch).items():
                smooth[term] = 0.98 * smooth.get(term, value) + 0.02 * value
            if step % 20 == 19:
                progress.set_postfix({term: f"{value:.3g}" for term, value in smooth.items()}, refresh=False)
            if step % options.save_every == options.save_every - 1:
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
    parser.add_argument("--image-steps", type=int, default=6000, help="steps of the first phase")
    parser.add_argument("--steps", type=int, default=8000, help="steps of the second phase")
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
