"""Slow twin of pixel probability adaptive voting: one pixel at a time, in numpy."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from icmoe.modeling.voting import pixel_probability_adaptive_voting

Vector = npt.NDArray[np.float64]


def slow_vote(p: Vector, gate: Vector, beta: float, top_k: int | None) -> tuple[Vector, Vector]:
    """Fuse the experts of one pixel: p (E, K), gate (E,); returns fused (K,) and weights (E,)."""
    num_experts, num_classes = p.shape
    consensus = [sum(gate[e] * p[e, k] for e in range(num_experts)) for k in range(num_classes)]
    agreement = [sum((p[e, k] * consensus[k]) ** 0.5 for k in range(num_classes)) for e in range(num_experts)]
    weights = np.array([gate[e] * np.exp(beta * agreement[e]) for e in range(num_experts)])
    if top_k is not None:
        for e in np.argsort(weights)[: num_experts - top_k]:
            weights[e] = 0.0
    weights /= weights.sum()
    return np.array([sum(weights[e] * p[e, k] for e in range(num_experts)) for k in range(num_classes)]), weights


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("beta", [0.0, 1.0, 8.0])
def test_equals_the_vote_of_each_pixel(beta: float, top_k: int | None) -> None:
    random = torch.Generator().manual_seed(3)
    p = (2 * torch.randn(2, 4, 3, 4, 4, generator=random)).softmax(dim=2)
    gate = torch.randn(2, 4, 4, 4, generator=random).log_softmax(dim=1)
    betas = torch.tensor([beta, 0.5 * beta]).reshape(2, 1, 1, 1)
    fused, weights = pixel_probability_adaptive_voting(p, gate, betas, top_k=top_k)
    for b, row, column in np.ndindex(2, 4, 4):
        slow_fused, slow_weights = slow_vote(
            p[b, :, :, row, column].double().numpy(),
            gate[b, :, row, column].double().exp().numpy(),
            float(betas[b]),
            top_k,
        )
        np.testing.assert_allclose(fused[b, :, row, column], slow_fused, atol=1e-5)
        np.testing.assert_allclose(weights[b, :, row, column], slow_weights, atol=1e-5)
