from __future__ import annotations

import pytest
import torch
from torch import nn

from sam3_runner.training.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_orthogonal_updates_keep_directions_and_even_out_their_sizes(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 1e-3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    sizes = u.T @ orthogonalise(matrix) @ v.T
    assert sizes.diagonal().min() > 0.3
    assert sizes.diagonal().max() < 1.3
    assert (sizes - sizes.diagonal().diag()).abs().max() < 1e-3


def test_muon_solves_a_badly_scaled_regression() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 8) * torch.logspace(0, -1, 8)
    truth = torch.randn(4, 8)
    weight = nn.Parameter(torch.zeros(4, 8))
    optimiser = Muon([weight], lr=0.05)
    for step in range(400):
        optimiser.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        optimiser.zero_grad()
        (inputs @ (weight - truth).T).pow(2).mean().backward()
        optimiser.step()
    assert (weight - truth).abs().max() < 0.05


def test_weight_decay_shrinks_what_no_gradient_holds() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.zeros(2, 2)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.data, torch.full((2, 2), 0.95))
