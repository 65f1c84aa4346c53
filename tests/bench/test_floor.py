"""The floor: what is counted by hand is what PyTorch counts when the engine runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Sam3Config, Sam3Model

from bench.floor import STAGES, Cost, Floor, Rates
from sam3_runner.engine import Engine

META = torch.device("meta")


@pytest.fixture(scope="module")
def full() -> Floor:
    return Floor(Sam3Config())


@pytest.fixture(scope="module")
def counted() -> dict[str, int]:
    """FLOP of the full model's stages; tensors without data are enough for that."""
    found: dict[str, int] = {}
    with torch.inference_mode(), META, sdpa_kernel(SDPBackend.MATH):  # plain products, which are all counted
        engine = Engine(Sam3Model(Sam3Config()).eval(), META, torch.bfloat16)
        side, tokens = 1008, torch.ones(1, 32, dtype=torch.int64)
        with FlopCounterMode(display=False) as image_counter:
            images = engine.encode_images(torch.empty(1, side, side, 3, dtype=torch.uint8))
        with FlopCounterMode(display=False) as text_counter:
            texts = engine.encode_texts(tokens, tokens)
        with FlopCounterMode(display=False) as answer_counter:
            engine.answer(images, texts)
    found["image"] = image_counter.get_total_flops()
    found["text"] = text_counter.get_total_flops()
    found["answer"] = answer_counter.get_total_flops()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["image", "text", "answer"])
def test_the_engine_computes_no_less_and_hardly_more(
    full: Floor, counted: dict[str, int], stage: str
) -> None:
    floor = full.stages(1, 1, kept=1, element_bytes=2)[stage].flop
    assert floor <= counted[stage] <= 1.01 * floor  # more: a border of pixels around convolutions


def test_the_weights_that_are_read_are_nearly_all(full: Floor) -> None:
    assert 0.75e9 < sum(full.weights.values()) < 0.84e9  # 0.84 with the token embedding and what nobody reads


def test_images_are_paid_once_and_pairs_each(full: Floor) -> None:
    one, many = (full.stages(1, pairs, kept=20, element_bytes=2) for pairs in (1, 16))
    assert list(one) == list(STAGES)
    assert many["image"] == one["image"]
    assert many["answer"].flop == 16 * one["answer"].flop
    assert many["answer"].bytes < 16 * one["answer"].bytes  # weights and features are read once


def test_the_slower_of_arithmetic_and_memory_is_the_floor() -> None:
    rates = Rates(flop_per_s=100.0, bytes_per_s=10.0)
    assert rates.floor_s(Cost(linear_flop=150.0, other_flop=50.0, bytes=10.0)) == 2.0
    assert rates.floor_s(Cost(linear_flop=100.0, bytes=50.0)) == 5.0
