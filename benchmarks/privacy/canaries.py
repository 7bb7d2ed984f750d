"""Canaries: what one round's update tells about the images behind it, and the epsilon that proves.

Half of the canaries, each by the toss of a coin, are trained on. Whoever sees the update (the centre does) then asks
for each how much of the weights' move its gradient explains. A canary is a real image with a mask of random blocks: its
gradient is large and its own.

The guesses prove a lower bound of epsilon (Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run",
2023): under (epsilon, delta)-DP the right ones among r guesses are at most binomial, with
probability e^epsilon / (1 + e^epsilon), up to a failure of at most 2 m delta for m canaries.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from icmoe.modeling.icmoe import IcMoe
from icmoe.privacy.accounting import Spend
from icmoe.privacy.gradients import ClippedSum
from icmoe.privacy.sampling import seeded_noise
from icmoe.training import Draw, TrainItem, part_losses
from icmoe_client.workbench import Workbench
from privacy.attack_model import Floats, Images, fresh_model, train
from privacy.membership import Members

BLOCKS = 8
"""Blocks a side of a canary's mask."""
RIDGE = 0.1
"""Of the mean squared length of the gradients."""


@dataclass(frozen=True)
class Canary:
    """A real image with a mask nobody would draw."""

    embeddings: Tensor
    detail: Tensor
    labels: Tensor


def make_canaries(items: Sequence[TrainItem], *, num_classes: int, seed: int) -> list[Canary]:
    """Give each image a mask of random blocks."""
    random = torch.Generator().manual_seed(seed)
    canaries = []
    for item in items:
        side = item.labels.shape[-1] // BLOCKS
        blocks = torch.randint(0, num_classes, (BLOCKS, BLOCKS), generator=random)
        labels = blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)
        canaries.append(Canary(item.embeddings, item.detail, labels))
    return canaries


def audit_round(
    bench: Workbench, regular: Sequence[TrainItem], canaries: Sequence[Canary], *, spend: Spend | None, seed: int
) -> tuple[Floats, Members]:
    """Train one round on the regular images and a random half of the canaries; score every canary.

    Returns:
        How much of the update each canary's gradient before training explains, and which canaries were in.
    """
    included = np.random.default_rng([seed, 1]).random(len(canaries)) < 0.5
    model = fresh_model(bench, seed)
    gradients = torch.stack([_direction(bench, model, canary) for canary in canaries]).cpu()
    before = _flat(model.parameters()).cpu()
    chosen = [canary for canary, held in zip(canaries, included, strict=True) if held]
    train(bench, model, Images([*regular, *chosen]), spend=spend, seed=(seed,))
    update = before - _flat(model.parameters()).cpu()
    return _explained(gradients.double(), update.double()).numpy(), included


def audit_mechanism(spend: Spend, *, noise_multiplier: float, num_canaries: int, seed: int) -> tuple[Floats, Members]:
    """Audit the shipped sampling, clipping and noise with the worst gradients there are, seen at every step.

    Each canary has a number of the model to itself and a gradient far above the clip, and the attacker sees every noisy
    mean, as the theory grants. A model's own gradients, seen once a round, prove much less.

    Args:
        spend: sampling and steps.
        noise_multiplier: that of ``spend``, or 0 for no privacy.
        num_canaries: m, tossed for one by one.
        seed: of coins and noise.

    Returns:
        Score of each canary, and which were in.
    """
    included = np.random.default_rng([seed, 1]).random(num_canaries) < 0.5
    chosen = np.flatnonzero(included)
    noise = seeded_noise((seed,))
    numbers = torch.zeros(num_canaries, requires_grad=True)
    scores = torch.zeros(num_canaries, dtype=torch.float64)
    for _ in range(spend.num_steps):
        clipped = ClippedSum([numbers], max_grad_norm=1.0)
        for unit in noise.poisson(len(chosen), spend.sample_rate):
            numbers.grad = torch.zeros(num_canaries)
            numbers.grad[chosen[unit]] = 1e3
            clipped.add_unit()
        scores += clipped.noisy_mean(noise, noise_multiplier=noise_multiplier, expected_units=1.0)
    return scores.numpy(), included


def guess(scores: Floats, included: Members, *, share: int = 4) -> tuple[int, int]:
    """Guess for the highest and lowest scores only.

    Args:
        scores: of the canaries.
        included: which were in.
        share: the highest ``1 / share`` are called in, the lowest out.

    Returns:
        Guesses, and how many are right.
    """
    order, count = np.argsort(scores), len(scores) // share
    right = int(included[order[-count:]].sum() + (~included[order[:count]]).sum())
    return 2 * count, right


def epsilon_at_least(
    num_guesses: int, num_right: int, *, num_canaries: int, delta: float, level: float = 0.95
) -> float:
    """Lower bound of epsilon with confidence ``level`` (Clopper and Pearson, 1934); 0 where guesses prove nothing.

    Args:
        num_guesses: of all rounds.
        num_right: of them.
        num_canaries: m, of all rounds; their share in delta is taken off the confidence.
        delta: of the claimed epsilon; 0 where none is claimed.
        level: of confidence.
    """
    failure = 1 - level - 2 * num_canaries * delta
    if failure <= 0 or num_right == 0:
        return 0.0
    low = float(beta.ppf(failure, num_right, num_guesses - num_right + 1))
    return max(0.0, math.log(low / (1 - low)))


def _explained(gradients: Tensor, update: Tensor) -> Tensor:
    """Coefficients (m,) with which gradients (m, P) give the update (P,): a ridge regression.

    Inner products alone say little: canaries share most of their gradients, and what they share moves with every image.
    """
    own = gradients - gradients.mean(dim=0)
    products = own @ own.T
    ridge = RIDGE * products.diagonal().mean() * torch.eye(len(own), dtype=own.dtype)
    coefficients: Tensor = torch.linalg.solve(products + ridge, own @ update)
    return coefficients


def _direction(bench: Workbench, model: IcMoe, canary: Canary) -> Tensor:
    """The canary's gradient, of length 1."""
    draw = [Draw(0, "identity", 0)]
    loss, _ = part_losses(
        model, bench.backbone.decoder, Images([canary]), draw, config=bench.run.train, with_basic=True
    )
    found = torch.autograd.grad(loss.sum(), list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.nn.functional.normalize(_flat(found), dim=0)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """Copy into one vector, in the tensors' order."""
    return torch.cat([one.detach().reshape(-1) for one in tensors])
