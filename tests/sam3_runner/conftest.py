"""Parts that the runner's tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sam3_runner.checkpoint import DEMO_CHECKPOINT
from sam3_runner.segmenter import Segmenter
from sam3_runner.training.architecture import build_demo_model
from sam3_runner.training.demo import demo_tokenizer, save_checkpoint
from sam3_runner.training.scenes import Scene, draw_scene


@pytest.fixture(scope="session")
def demo() -> Segmenter:
    return Segmenter.from_checkpoint(DEMO_CHECKPOINT)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights: right in form, blind in answer."""
    path = tmp_path_factory.mktemp("checkpoint") / "random"
    torch.manual_seed(7)
    tokenizer = demo_tokenizer()
    save_checkpoint(build_demo_model(tokenizer).eval(), tokenizer, path)
    return path


@pytest.fixture
def scenes() -> list[Scene]:
    """Six scenes of mixed sizes and shapes."""
    return [draw_scene(np.random.default_rng([11, index]), (150, 500)) for index in range(6)]
