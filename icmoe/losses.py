"""Losses, as pure functions. Each returns one value per image.

The total is a mean over images of per-image values, and nothing in a value looks at another image: a sample's gradient
depends on that sample alone, which is what differential privacy later stands on.

Letters: B batch, E experts, K classes, G logit grid, d length of a pixel embedding, A anchors.
"""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from monai.losses import DiceLoss
from torch import Tensor
from torch.nn import functional as F

from icmoe.modeling.icmoe import IcMoeOutput
from icmoe.types import IGNORE_INDEX

EPS = 1e-6
_soft_dice = DiceLoss(reduction="none", smooth_nr=1.0, smooth_dr=1.0)


def at_grid(labels: Tensor, grid: int) -> Tensor:
    """Labels (B, L, L) on the logit grid (B, G, G), by the pixel in the middle of each cell; L is a multiple of G."""
    stride = labels.shape[-1] // grid
    return labels[:, stride // 2 :: stride, stride // 2 :: stride]


class Truth(NamedTuple):
    """Labels as the losses use them: ``valid`` (B, 1, G, G) and ``one_hot`` (B, K, G, G), 0 at ignored pixels."""

    valid: Tensor
    one_hot: Tensor

    @classmethod
    def of(cls, labels: Tensor, num_classes: int) -> Self:
        """From (B, G, G) class ids with ``IGNORE_INDEX``."""
        classes = torch.arange(num_classes, device=labels.device).reshape(1, -1, 1, 1)
        return cls((labels != IGNORE_INDEX).unsqueeze(1).float(), (labels.unsqueeze(1) == classes).float())


def segmentation_loss(log_probabilities: Tensor, truth: Truth) -> Tensor:
    """Dice + cross-entropy per image; ignored pixels count in neither.

    Args:
        log_probabilities: (B, K, G, G).
        truth: the labels, made once for all experts.

    Returns:
        (B,).
    """
    num_pixels = truth.valid.sum(dim=(1, 2, 3)).clamp(min=1)
    cross_entropy = -(log_probabilities * truth.one_hot).sum(dim=(1, 2, 3)) / num_pixels
    foreground = log_probabilities[:, 1:].exp() * truth.valid
    # MONAI reduces nothing here: (B, K-1, 1, 1).
    dice: Tensor = _soft_dice(foreground, truth.one_hot[:, 1:]).flatten(1).mean(dim=1)
    return cross_entropy + dice


def label_consistency_loss(
    gate_log_probabilities: Tensor, expert_log_probabilities: Tensor, labels: Tensor, *, temperature: float
) -> Tensor:
    """Teach the router which expert was right: cross-entropy of g(i) to softmax_e(log p_e,y(i) / tau), target detached.

    Args:
        gate_log_probabilities: log g (B, E, G, G).
        expert_log_probabilities: (B, E, K, G, G).
        labels: (B, G, G) with ``IGNORE_INDEX``.
        temperature: tau.

    Returns:
        (B,).
    """
    valid = labels != IGNORE_INDEX
    ids = labels.masked_fill(~valid, 0)
    num_experts = gate_log_probabilities.shape[1]
    index = ids[:, None, None].expand(-1, num_experts, 1, -1, -1)
    target = (expert_log_probabilities.detach().gather(2, index).squeeze(2) / temperature).softmax(dim=1)
    per_pixel = -(target * gate_log_probabilities).sum(dim=1) * valid
    return per_pixel.sum(dim=(1, 2)) / valid.sum(dim=(1, 2)).clamp(min=1)


def load_balancing_loss(gate_log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """E * sum_e mean_i(g_e)^2 - 1 per image: 0 when all experts carry the same load.

    Args:
        gate_log_probabilities: log g (B, E, G, G).
        labels: (B, G, G) with ``IGNORE_INDEX``; only for telling which pixels count.

    Returns:
        (B,).
    """
    valid = (labels != IGNORE_INDEX).unsqueeze(1)
    load = (gate_log_probabilities.exp() * valid).sum(dim=(2, 3)) / valid.sum(dim=(2, 3)).clamp(min=1)
    # An image without a pixel that counts has no load at all, and no loss.
    return (load.shape[1] * load.square().sum(dim=1) - 1.0) * valid.any(dim=(1, 2, 3))


def choose_anchors(probabilities: Tensor, labels: Tensor, draws: Tensor, num_anchors: int) -> Tensor:
    """Pick anchor pixels of each image: a third on class boundaries, a third uncertain, a third anywhere.

    Args:
        probabilities: fused (B, K, G, G).
        labels: (B, G, G) with ``IGNORE_INDEX``.
        draws: (B, G, G) uniform in [0, 1), drawn per image, which make the choice.
        num_anchors: A, at least 3.

    Returns:
        (B, A) flat pixel indices. Where an image has too few boundary pixels, random ones take their place.
    """
    num_anchors = min(num_anchors, 3 * (labels[0].numel() // 3))
    third = num_anchors // 3
    is_valid = labels != IGNORE_INDEX
    valid = is_valid.float()
    # Highest and lowest class in the 3 x 3 neighbourhood, over pixels that count: padding is no boundary.
    top = F.max_pool2d(labels.masked_fill(~is_valid, -1).float().unsqueeze(1), 3, 1, 1).squeeze(1)
    bottom = -F.max_pool2d(-labels.float().unsqueeze(1), 3, 1, 1).squeeze(1)
    boundary = ((top > bottom) & is_valid).float()
    entropy = -(probabilities * (probabilities + EPS).log()).sum(dim=1)
    scores = (boundary + draws, entropy + 0.1 * draws, 1.0 - draws)
    sizes = (third, third, num_anchors - 2 * third)
    chosen = [
        ((score + 10.0) * valid).flatten(1).topk(size, dim=1).indices for score, size in zip(scores, sizes, strict=True)
    ]
    return torch.cat(chosen, dim=1)


def semantic_contrast_loss(
    pixels: Tensor, prototypes: Tensor, labels: Tensor, anchors: Tensor, *, temperature: float
) -> Tensor:
    """Semantic-guided contrast within one image (InfoNCE with two positives).

    Positives of an anchor: its class prototype and the mean of its class in this image. Negatives: the other prototypes
    and the anchors of other classes.

    Args:
        pixels: (B, d, G, G) of any length; their directions are compared.
        prototypes: (B, K, d) unit length.
        labels: (B, G, G) with ``IGNORE_INDEX``.
        anchors: (B, A) flat indices.
        temperature: of InfoNCE.

    Returns:
        (B,).
    """
    num_classes = prototypes.shape[1]
    flat, flat_labels = pixels.permute(0, 2, 3, 1).flatten(1, 2), labels.flatten(1)
    anchor_labels = flat_labels.gather(1, anchors)
    valid = anchor_labels != IGNORE_INDEX
    ids = anchor_labels.masked_fill(~valid, 0)
    anchor_pixels = F.normalize(flat.gather(1, anchors.unsqueeze(2).expand(-1, -1, flat.shape[2])).float(), dim=2)
    members = torch.stack([flat_labels == k for k in range(num_classes)], dim=1)
    # Each member counts with its direction, not its length.
    directions = members * flat.detach().norm(dim=2).clamp(min=EPS).reciprocal().unsqueeze(1)
    means = F.normalize((directions.to(flat.dtype) @ flat.detach()).float(), dim=2)

    to_prototypes = torch.einsum("bad,bkd->bak", anchor_pixels, prototypes) / temperature
    own_mean = (anchor_pixels * means.gather(1, ids.unsqueeze(2).expand(-1, -1, means.shape[2]))).sum(2) / temperature
    to_anchors = anchor_pixels @ anchor_pixels.transpose(1, 2) / temperature
    other = (ids.unsqueeze(2) != ids.unsqueeze(1)) & valid.unsqueeze(1) & valid.unsqueeze(2)

    own_prototype = to_prototypes.gather(2, ids.unsqueeze(2)).squeeze(2)
    # The mean of both logarithms: their joint sum would be content with either, and let two prototypes coincide.
    positive = 0.5 * (own_prototype + own_mean)
    everything = torch.cat(
        [to_prototypes, own_mean.unsqueeze(2), to_anchors.masked_fill(~other, -torch.inf)], dim=2
    ).logsumexp(dim=2)
    per_anchor = (everything - positive) * valid
    return per_anchor.sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def icmoe_loss(
    output: IcMoeOutput,
    labels: Tensor,
    draws: Tensor,
    *,
    weights: Mapping[str, float],
    consistency_temperature: float,
    contrast_temperature: float,
    contrast_anchors: int,
) -> Tensor:
    """The whole training loss, one value per image.

    Args:
        output: of the model.
        labels: (B, L, L) class ids with ``IGNORE_INDEX``, L a multiple of G. The fused probabilities are scored at L,
            where evaluation looks; everything else on the logit grid.
        draws: (B, G, G) uniform, see ``choose_anchors``.
        weights: of ``expert``, ``consistency``, ``balance`` and ``contrast``; a weight of 0 skips the term.
        consistency_temperature: tau.
        contrast_temperature: of InfoNCE.
        contrast_anchors: A.

    Returns:
        (B,). Take its mean.
    """
    grid, side = output.probabilities.shape[-1], labels.shape[-1]
    fused = output.probabilities
    if side != grid:
        fused = F.interpolate(fused, size=(side, side), mode="bilinear", align_corners=False)
    coarse = at_grid(labels, grid)
    num_experts, num_classes = output.expert_log_probabilities.shape[1:3]
    truth = Truth.of(labels, num_classes)
    loss = segmentation_loss((fused + EPS).log(), truth)
    if weights["expert"]:
        coarse_truth = truth if side == grid else Truth.of(coarse, num_classes)
        each = [segmentation_loss(output.expert_log_probabilities[:, e], coarse_truth) for e in range(num_experts)]
        loss = loss + weights["expert"] * torch.stack(each).mean(dim=0)
    if weights["consistency"]:
        loss = loss + weights["consistency"] * label_consistency_loss(
            output.gate_log_probabilities,
            output.expert_log_probabilities,
            coarse,
            temperature=consistency_temperature,
        )
    if weights["balance"]:
        loss = loss + weights["balance"] * load_balancing_loss(output.gate_log_probabilities, coarse)
    if weights["contrast"] and output.pixels is not None and output.prototypes is not None:
        anchors = choose_anchors(output.probabilities.detach(), coarse, draws, contrast_anchors)
        loss = loss + weights["contrast"] * semantic_contrast_loss(
            output.pixels, output.prototypes, coarse, anchors, temperature=contrast_temperature
        )
    return loss
