"""Train the demo checkpoint: `python -m sam3_runner.training.demo`.

Seeded, resumable (run it again and it goes on from its last state), on CPU or CUDA. It writes a Hugging Face
directory in the form of `facebook/sam3`: config, safetensors, tokenizer and image processor.

In four phases. First the image encoder learns alone which colour and shape every patch shows: a transformer needs
many images to see shapes, and without prompts an image costs a fifth. Then the whole model learns to answer words.
Then, both encoders at rest from here on, the geometry encoder learns alone what boxes show, and in the end the
detector learns to answer exemplars too.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import CLIPTokenizer, Sam3ImageProcessor, Sam3Model

from sam3_runner.checkpoint import DEMO_CHECKPOINT
from sam3_runner.forward import (
    ImageFeatures,
    LayerOutputs,
    TextFeatures,
    decode,
    encode_boxes,
    encode_image,
    encode_text,
)
from sam3_runner.training.architecture import (
    HIDDEN,
    IMAGE_SIZE_PX,
    MAX_TEXT_TOKENS,
    PATCH_SIZE_PX,
    build_demo_model,
)
from sam3_runner.training.attention import use_plain_attention
from sam3_runner.training.data import UNKNOWN_COLOURS, UNKNOWN_THINGS, Batch, Collate, SceneDataset
from sam3_runner.training.guides import Guides, pixel_kind_loss
from sam3_runner.training.losses import Target, detection_loss
from sam3_runner.training.muon import Muon
from sam3_runner.training.scenes import all_prompt_texts
from sam3_runner.training.tokenizer import train_clip_tokenizer

MASK_SIZE_PX = 8 * IMAGE_SIZE_PX // PATCH_SIZE_PX  # truth at twice the model's mask resolution
EMA_DECAY = 0.998
MAX_GRADIENT_NORM = 2.0
MUON_RATE = 5e-3
WEIGHT_DECAY = 0.02
# Shares of the highest learning rates where words are learnt; at the full rate the backbone forgets shapes.
DETECTOR_RATE = 0.7
TRAINED_BACKBONE_RATE = 0.2
CROWD = 7  # objects tried in a scene of the first phase, at least: they are what there is to learn from
EXEMPLAR_SHARE = 0.6  # of the questions of the last phase, so that words are not forgotten
WARM_UP_STEPS = 100
DECAY_SHARE = (
    0.3  # the learning rate falls over the last part; before, it stays: so `--steps` can be raised late
)


IMAGE_ENCODER, DETECTOR, BOX_READER, EXEMPLARS = "image encoder", "detector", "box reader", "exemplars"


@dataclass(frozen=True)
class TrainingOptions:
    """What `python -m sam3_runner.training.demo` can be told."""

    out: Path
    state: Path
    image_steps: int
    steps: int
    box_steps: int
    exemplar_steps: int
    images: int
    prompts: int
    learning_rate: float
    seed: int
    workers: int
    processes: int
    device: torch.device
    save_every: int


class Trainer:
    """Model, averaged model and optimiser, and how they go to disk and back."""

    def __init__(self, options: TrainingOptions) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.tokenizer = demo_tokenizer()
        self.model = build_demo_model(self.tokenizer).to(options.device).train()
        self.autocast = torch.autocast(
            options.device.type, torch.bfloat16, enabled=has_fast_bfloat16(options.device)
        )
        if options.device.type == "cpu" and has_fast_bfloat16(options.device):
            use_plain_attention(self.model)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.guides = Guides(HIDDEN).to(options.device)
        self.optimisers = build_optimisers(self.model, self.guides, options.learning_rate)
        self.steps = dict.fromkeys((IMAGE_ENCODER, DETECTOR, BOX_READER, EXEMPLARS), 0)  # that were taken
        if options.state.exists():
            self._load(torch.load(options.state, map_location=options.device, weights_only=True))

    def train_image_encoder(self, batch: Batch, factor: float) -> dict[str, float]:
        """One step at this fraction of the highest learning rates; the batch's prompts are not looked at."""
        batch = batch.to(self.options.device)
        with self.autocast:
            features = encode_coarse_level(self.model, batch.pixel_values)
            kinds = self.guides.kinds[-1](features)
        loss = pixel_kind_loss(kinds, batch.kinds)
        return {"norm": self._descend(loss, factor), "kinds": loss.item()}

    def train_box_reader(self, batch: Batch, factor: float) -> dict[str, float]:
        """Likewise, for I images with P prompts each, all by exemplars; nothing is detected."""
        batch = batch.to(self.options.device)
        with self.autocast:
            image = encode_image(self.model, batch.pixel_values)
            text = encode_text(self.model, batch.input_ids, batch.attention_mask)
            boxes = self._read_boxes(image.repeat_each(batch.prompts_per_image), batch)
            match = self.guides.match_loss(image, text.append(boxes.tokens, boxes.is_token), batch)
            guides = {"match": match, **self.guides.exemplar_losses(boxes, batch.exemplars)}
        return self._learn({}, guides, factor)

    def train_detector(self, batch: Batch, factor: float) -> dict[str, float]:
        """Likewise, for I images with P prompts each, all in words."""
        batch = batch.to(self.options.device)
        with self.autocast:
            image = encode_image(self.model, batch.pixel_values)
            text = encode_text(self.model, batch.input_ids, batch.attention_mask)
            guides = {
                "kinds": self.guides.kind_loss(image, batch),
                "match": self.guides.match_loss(image, text, batch),
            }
            outputs = self._decode(image, text, batch)
        found = detection_loss(outputs, batch.targets)
        return self._learn(found, guides, DETECTOR_RATE * factor, TRAINED_BACKBONE_RATE * factor)

    def train_exemplars(self, batch: Batch, factor: float) -> dict[str, float]:
        """Likewise, in words or by exemplars or both.

        Of the guides those of boxes alone go on: no inner product, as `match` asks for, can say "but not like this".
        """
        batch = batch.to(self.options.device)
        with self.autocast:
            image = encode_image(self.model, batch.pixel_values)
            text = encode_text(self.model, batch.input_ids, batch.attention_mask)
            boxes = self._read_boxes(image.repeat_each(batch.prompts_per_image), batch)
            guides = self.guides.exemplar_losses(boxes, batch.exemplars)
            outputs = self._decode(image, text, batch, boxes)
        return self._learn(detection_loss(outputs, batch.targets), guides, DETECTOR_RATE * factor)

    def _decode(
        self, image: ImageFeatures, text: TextFeatures, batch: Batch, boxes: TextFeatures | None = None
    ) -> LayerOutputs:
        drawn = pairs_to_draw(batch.targets, batch.prompts_per_image).to(self.options.device)
        return decode(self.model, image.repeat_each(batch.prompts_per_image), text, boxes=boxes, drawn=drawn)

    def _read_boxes(self, pairs: ImageFeatures, batch: Batch) -> TextFeatures:
        exemplars = batch.exemplars
        return encode_boxes(
            self.model, pairs, exemplars.boxes_cxcywh, exemplars.is_positive, exemplars.is_box
        )

    def _learn(
        self,
        found: dict[str, Tensor],
        guides: dict[str, Tensor],
        factor: float,
        backbone_factor: float | None = None,
    ) -> dict[str, float]:
        """Descend on what `detection_loss` says, if it was asked, and on what the guides add."""
        loss = torch.stack([*guides.values(), *([found["total"]] if found else [])]).sum()
        norm = self._descend(loss, factor, backbone_factor)
        return {"norm": norm, **{name: term.item() for name, term in (found | guides).items()}}

    def _descend(self, loss: Tensor, factor: float, backbone_factor: float | None = None) -> float:
        """One step at these fractions of the highest learning rates; returns the gradient's norm."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                is_special = group["is_backbone"] and backbone_factor is not None
                group["lr"] = group["initial_lr"] * (backbone_factor if is_special else factor)
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.optimisers)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        for optimiser in self.optimisers:
            optimiser.step()
        self._update_average()
        return norm.item()

    @torch.no_grad()
    def _update_average(self) -> None:
        # Early on the plain average of all steps so far forgets the random start faster.
        steps = sum(self.steps.values())
        decay = min(EMA_DECAY, steps / (steps + 10))
        for averaged, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
            averaged.lerp_(current, 1 - decay)

    def save_state(self) -> None:
        """Write everything that resuming needs; either whole or not at all."""
        if _place_in_group()[0] > 0:
            return
        state = {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "guides": self.guides.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        partial = self.options.state.with_suffix(".partial")
        self.options.state.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, partial)
        os.replace(partial, self.options.state)

    def _load(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])
        self.guides.load_state_dict(state["guides"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32; on a CPU without the instructions it is 30 times slower."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def build_optimisers(model: Sam3Model, guides: Guides, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of all transformer layers, AdamW for all else; groups know whether they are the backbone's.

    Each group keeps its highest rate as `initial_lr`.
    """
    backbone = {id(parameter) for parameter in model.vision_encoder.backbone.parameters()}
    matrices = {id(p) for name, p in model.named_parameters() if "layers." in name and p.ndim == 2}
    parameters = [*model.parameters(), *guides.parameters()]

    def group(is_backbone: bool, is_matrix: bool, decays: bool) -> dict[str, Any]:
        chosen = [
            p
            for p in parameters
            if (id(p) in backbone, id(p) in matrices, p.ndim > 1) == (is_backbone, is_matrix, decays)
        ]
        return {"params": chosen, "is_backbone": is_backbone, "weight_decay": WEIGHT_DECAY if decays else 0.0}

    optimisers = [
        Muon([group(own, True, True) for own in (True, False)], lr=MUON_RATE),
        torch.optim.AdamW(
            [group(own, False, decays) for own in (True, False) for decays in (True, False)],
            lr=learning_rate,
            betas=(0.9, 0.98),
        ),
    ]
    for optimiser in optimisers:
        for made in optimiser.param_groups:
            made["initial_lr"] = made["lr"]
    return optimisers


def average_gradients(optimisers: Sequence[torch.optim.Optimizer]) -> None:
    """Give every process of the group the mean of their gradients; nothing to do for one alone."""
    if not distributed.is_initialized():
        return
    groups = (group for optimiser in optimisers for group in optimiser.param_groups)
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    flat = nn.utils.parameters_to_vector(gradients)
    distributed.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / distributed.get_world_size(), gradients)


def pairs_to_draw(targets: Sequence[Target], prompts_per_image: int) -> Tensor:
    """Of every image one pair that has something to draw, if any has: ascending indices into `targets`, at least one.

    Masks at full resolution are half of what a training step costs, and those of one image teach much the same.
    """
    chosen = []
    for start in range(0, len(targets), prompts_per_image):
        pairs = range(start, start + prompts_per_image)
        chosen += [pair for pair in pairs if len(targets[pair].masks)][:1]
    return torch.tensor(chosen or [0])


def encode_coarse_level(model: Sam3Model, pixel_values: Tensor) -> Tensor:
    """(I, C, H, W), the level that the DETR encoder reads, without the cost of the finer ones."""
    vision = model.vision_encoder
    grid = IMAGE_SIZE_PX // PATCH_SIZE_PX
    patches = vision.backbone(pixel_values).last_hidden_state  # (I, H·W, C')
    features: Tensor = vision.neck.fpn_layers[-2](patches.unflatten(1, (grid, grid)).permute(0, 3, 1, 2))
    return features


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, a plateau at 1, then a linear fall to 0.02 over the last `DECAY_SHARE` of the steps."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    decay = min(1.0, (steps - step) / (DECAY_SHARE * steps))
    return min(warm_up, max(decay, 0.02))


def demo_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the demo's language; the same on every run."""
    return train_clip_tokenizer([*all_prompt_texts(), *UNKNOWN_COLOURS, *UNKNOWN_THINGS], MAX_TEXT_TOKENS)


def save_checkpoint(model: Sam3Model, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write a Hugging Face directory that the runner loads as it loads `facebook/sam3`.

    Weights are stored as float16, which halves the file; every consumer loads them in the dtype it computes in. Each
    file of `out` is replaced whole.
    """
    size = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}
    mask_size = {"height": MASK_SIZE_PX // 2, "width": MASK_SIZE_PX // 2}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=out.name, dir=out.parent) as folder:
        copy.deepcopy(model).half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        Sam3ImageProcessor(size=size, mask_size=mask_size).save_pretrained(folder)
        for file in Path(folder).iterdir():
            os.replace(file, out / file.name)


@dataclass(frozen=True)
class Phase:
    """A part of the training: so many steps of so many images, in which parts of the model learn."""

    name: str
    steps: int
    images: int
    scenes: SceneDataset
    train_step: Callable[[Batch, float], dict[str, float]]
    learns: tuple[nn.Module, ...]


def phases(trainer: Trainer) -> list[Phase]:
    """All of them, in order."""
    options, model = trainer.options, trainer.model
    seed, images = options.seed, options.images
    # Without prompts an image costs so little that twice as many fit into a step, and prompts cost little if nothing is
    # detected.
    grid = IMAGE_SIZE_PX // PATCH_SIZE_PX
    crowds = SceneDataset(seed + 1, IMAGE_SIZE_PX, 2 * grid, prompts_per_image=1, min_objects=CROWD)
    words = SceneDataset(seed, IMAGE_SIZE_PX, MASK_SIZE_PX, options.prompts)
    boxes = SceneDataset(seed + 2, IMAGE_SIZE_PX, 2 * grid, 2 * options.prompts, exemplar_share=1.0)
    both = SceneDataset(seed + 3, IMAGE_SIZE_PX, MASK_SIZE_PX, options.prompts, exemplar_share=EXEMPLAR_SHARE)
    answering = (
        model.geometry_encoder,
        model.detr_encoder,
        model.detr_decoder,
        model.mask_decoder,
        model.dot_product_scoring,
    )
    return [
        Phase(IMAGE_ENCODER, options.image_steps, 2 * images, crowds, trainer.train_image_encoder, (model,)),
        Phase(DETECTOR, options.steps, images, words, trainer.train_detector, (model,)),
        Phase(BOX_READER, options.box_steps, 2 * images, boxes, trainer.train_box_reader, answering[:1]),
        Phase(EXEMPLARS, options.exemplar_steps, images, both, trainer.train_exemplars, answering),
    ]


def train(options: TrainingOptions) -> None:
    """Train from the last saved state, or from the start, to the end of all phases; save state and checkpoint."""
    trainer = Trainer(options)
    for phase in phases(trainer):
        _run_phase(trainer, phase)
    trainer.save_state()
    if _place_in_group()[0] == 0:
        save_checkpoint(trainer.average, trainer.tokenizer, options.out)


def _run_phase(trainer: Trainer, phase: Phase) -> None:
    """Take the steps that are left of it; save the state now and then."""
    options = trainer.options
    rank, processes = _place_in_group()
    steps = range(trainer.steps[phase.name], phase.steps)
    images = phase.images
    loader = DataLoader(
        phase.scenes,
        batch_sampler=[list(range(step * images + rank, (step + 1) * images, processes)) for step in steps],
        num_workers=options.workers,
        collate_fn=Collate(trainer.tokenizer),
        worker_init_fn=_one_thread,
        prefetch_factor=8 if options.workers else None,
    )
    trainer.model.requires_grad_(False)
    for part in phase.learns:
        part.requires_grad_(True)
    smooth: dict[str, float] = {}
    with tqdm(
        loader, phase.name, steps.stop, initial=steps.start, unit="step", smoothing=0.02, disable=rank > 0
    ) as progress:
        for step, batch in zip(steps, progress, strict=True):
            terms = phase.train_step(batch, learning_rate_factor(step, phase.steps))
            trainer.steps[phase.name] = step + 1
            for term, value in terms.items():
                smooth[term] = 0.98 * smooth.get(term, value) + 0.02 * value
            if step % 20 == 19:
                progress.set_postfix({term: f"{value:.3g}" for term, value in smooth.items()}, refresh=False)
            if step % options.save_every == options.save_every - 1:
                trainer.save_state()


def _place_in_group() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _train_in_group(rank: int, options: TrainingOptions, meeting_place: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{meeting_place}", rank=rank, world_size=options.processes)
    train(options)
    distributed.destroy_process_group()


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


def parse_options(arguments: list[str] | None = None) -> TrainingOptions:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description="Train the demo checkpoint on synthetic scenes.")
    parser.add_argument("--out", type=Path, default=DEMO_CHECKPOINT, help="checkpoint to write in the end")
    parser.add_argument(
        "--state",
        type=Path,
        default=DEMO_CHECKPOINT.with_name("demo-training.pt"),
        help="file to resume from",
    )
    parser.add_argument("--image-steps", type=int, default=4000, help="steps of the image encoder alone")
    parser.add_argument("--steps", type=int, default=6000, help="steps of the detector with words")
    parser.add_argument("--box-steps", type=int, default=600, help="steps of the geometry encoder alone")
    parser.add_argument(
        "--exemplar-steps", type=int, default=3000, help="steps of the detector with exemplars"
    )
    parser.add_argument("--images", type=int, default=8, help="images in a step")
    parser.add_argument("--prompts", type=int, default=4, help="prompts for each image")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="highest, of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that draw scenes for each that trains"
    )
    parser.add_argument("--processes", type=int, default=1, help="processes that share every step, for a CPU")
    parser.add_argument("--save-every", type=int, default=250, help="steps between saved states")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    return TrainingOptions(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Command line."""
    options = parse_options()
    if options.processes == 1:
        train(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting_place = f"{folder}/meet"
        start_processes(_train_in_group, (options, meeting_place), options.processes, start_method="spawn")


if __name__ == "__main__":
    main()
