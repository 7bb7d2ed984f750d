"""Pixel probability adaptive voting (PPAV), as pure functions.

Letters: B batch, E experts, K classes, G grid side.
"""

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-6


class Vote(NamedTuple):
    """Result of a vote: fused probabilities (B, K, G, G) and weights of the experts (B, E, G, G)."""

    probabilities: Tensor
    weights: Tensor


def pixel_probability_adaptive_voting(
    expert_probabilities: Tensor, gate_log_probabilities: Tensor, beta: Tensor, *, top_k: int | None = None
) -> Vote:
    """Fuse experts per pixel: trust the router, and more so experts that agree with the consensus.

    q = sum_e g_e p_e; a_e = sum_k sqrt(p_e,k q_k) in [0, 1] (Bhattacharyya); w_e proportional to g_e exp(beta a_e);
    p = sum_e w_e p_e.

    Args:
        expert_probabilities: p (B, E, K, G, G).
        gate_log_probabilities: log g (B, E, G, G); -inf leaves an expert out.
        beta: (B, 1, 1, 1), at least 0. With 0 the vote is the router's softmax average.
        top_k: keep the k largest weights per pixel. By masking: compute stays dense and per-sample gradients exact.

    Returns:
        The fused probabilities and the weights, which sum to 1 over experts.
    """
    gate = gate_log_probabilities.exp()
    # Multiply and sum: as an einsum this is a matrix product per pixel, several times dearer.
    consensus = (expert_probabilities * gate.unsqueeze(2)).sum(dim=1)
    # EPS keeps the gradient of the root finite where a probability underflows.
    agreement = (expert_probabilities * consensus.unsqueeze(1) + EPS**2).sqrt().sum(dim=2)
    scores = gate_log_probabilities + beta * agreement
    if top_k is not None:
        threshold = scores.topk(min(top_k, scores.shape[1]), dim=1).values[:, -1:]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    weights = scores.softmax(dim=1)
    return Vote((expert_probabilities * weights.unsqueeze(2)).sum(dim=1), weights)
