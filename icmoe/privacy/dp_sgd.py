"""Local training under differential privacy (DP-SGD; Abadi et al., 2016) with a patient or an image as the unit.

A step: every unit takes part for itself with probability q (Poisson sampling); the gradients of a unit's images are
summed; the sum is clipped to L2 norm C over all trainable numbers together; clipped sums are added; N(0, (sigma C)^2)
is added to each number once; the result is divided by the expected number of units, q times all. What follows (FedProx,
AdamW) looks at weights and noisy gradients only. Adding or removing a unit moves the sum by at most C, which is what
the accountant is told.

How the units' gradients are found: one after the other, by ordinary backward passes. A batch here is a handful of
images of 128 to 256 logits a side, and one such image keeps a processor busy. Measured against the plain step (4
images, default model, bf16, one CPU thread, with clipping): 1.1 to 1.2 times its cost; Opacus' functorch mode 1.7 to
2.2 times; its hooks (``GradSampleModule``) stop under bf16 autocast and give wrong gradients without a word for
channels-last tensors (Opacus 1.6, torch 2.15). The passes of one unit are also right for any layer, take no more memory
than the plain step, and give a patient's sum directly, where sampled gradients would first be made for each image.
Opacus does the accounting (``icmoe.privacy.accounting``) and is what the tests compare these gradients with.

What this does not hide: how long a step took, and that a round failed. ``TrainResult.loss`` has no noise: it is for the
site's own eyes.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch

from icmoe.config import TrainConfig
from icmoe.errors import PrivacyError
from icmoe.modeling.decoder import FrozenDecoder
from icmoe.modeling.icmoe import IcMoe
from icmoe.privacy.accounting import Spend
from icmoe.privacy.config import PrivacyConfig
from icmoe.privacy.first_step import check_moved, check_separability
from icmoe.privacy.gradients import ClippedSum, not_finite, set_gradients
from icmoe.privacy.sampling import NoiseSource, planned
from icmoe.training import Draw, TrainData, TrainResult, add_proximal_gradient, in_parts, part_losses

__all__ = ["planned", "train_private"]


def train_private(
    model: IcMoe,
    decoder: FrozenDecoder,
    data: TrainData,
    *,
    config: TrainConfig,
    privacy: PrivacyConfig,
    spend: Spend,
    unit_of: Sequence[int],
    views: Sequence[str],
    learning_rate: float,
    noise: NoiseSource,
    max_physical_batch_size: int | None = None,
    proximal_mu: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Train all of ``model`` in place, exactly as ``spend`` says.

    Args:
        model: starts from the received global weights.
        decoder: the backbone's frozen decoder.
        data: training images of one site.
        config: the run's train section; ``batch_size`` counts units, its ``max_grad_norm`` is not used.
        privacy: the run's privacy section, for ``max_grad_norm``.
        spend: noise, sample rate and steps, as booked in the site's ledger.
        unit_of: for each image, the index of its unit (patient or image) in 0..number of units - 1.
        views: cached views; each step draws one per image. All views of an image are that one image.
        learning_rate: of this round.
        noise: ``os_noise()`` at a site.
        max_physical_batch_size: images that fit in memory at once, by default ``batch_size``. A unit with more images
            only accumulates: there is no limit on the images of a patient.
        proximal_mu: FedProx: adds mu / 2 * ||w - w_received||^2.
        progress: called with (steps done, steps in all).

    Returns:
        Mean loss per image of the last epoch (NaN if no unit was drawn), steps made, and no expert shares: they are
        counts over the data.

    Raises:
        PrivacyError: if images are coupled, weights do not move, or ``unit_of`` does not fit the data.
        RunError: if a loss or gradient is not finite.
    """
    images = _images_of(unit_of, num_images=len(data))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=config.weight_decay)
    model.train()
    check_separability(model, decoder, data.load(0, views[0]), config=config)
    last_epoch = spend.num_steps - math.ceil(spend.num_steps / config.local_epochs)
    losses: list[float] = []
    for step in range(spend.num_steps):
        with_basic = step % config.basic_every == 0
        parameters = _taking_part(model, with_basic=with_basic)
        optimizer.zero_grad(set_to_none=True)
        clipped = ClippedSum(parameters, max_grad_norm=privacy.max_grad_norm)
        for unit in noise.poisson(len(images), spend.sample_rate):
            draws = _draw_views(images[unit], views, noise)
            size = max_physical_batch_size or config.batch_size
            unit_losses = unit_backward(model, decoder, data, draws, config=config, with_basic=with_basic, size=size)
            clipped.add_unit()
            losses += unit_losses if step >= last_epoch else []
        gradient = clipped.noisy_mean(
            noise, noise_multiplier=spend.noise_multiplier, expected_units=spend.sample_rate * len(images)
        )
        set_gradients(parameters, gradient)
        if proximal_mu:
            add_proximal_gradient(model, list(start.values()), proximal_mu)
        optimizer.step()
        if step == 0:
            check_moved(model, start)
        if progress:
            progress(step + 1, spend.num_steps)
    return TrainResult(fmean(losses) if losses else math.nan, spend.num_steps, {})


def unit_backward(
    model: IcMoe,
    decoder: FrozenDecoder,
    data: TrainData,
    draws: list[Draw],
    *,
    config: TrainConfig,
    with_basic: bool,
    size: int,
) -> list[float]:
    """Add the gradients of a unit's images to ``.grad``, ``size`` images at a time; return their losses."""
    losses: list[float] = []
    for part in in_parts(draws, size):
        each, _ = part_losses(model, decoder, data, part, config=config, with_basic=with_basic)
        each.sum().backward()  # type: ignore[no-untyped-call]
        losses += each.detach().tolist()
    if not all(math.isfinite(loss) for loss in losses):
        raise not_finite()
    return losses


def _taking_part(model: IcMoe, *, with_basic: bool) -> list[torch.nn.Parameter]:
    """Parameters of a step. Which sit out is known from the step's number: it never depends on the data."""
    if with_basic or not (model.family("semantic") or model.family("adaptive")):
        return list(model.parameters())
    sitting_out = {id(parameter) for parameter in model.family("basic").parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in sitting_out]


def _draw_views(images: Sequence[int], views: Sequence[str], noise: NoiseSource) -> list[Draw]:
    """A view and a seed for each image of a unit."""
    seeds = noise.seeds(len(images))
    return [Draw(image, views[seed % len(views)], seed) for image, seed in zip(images, seeds, strict=True)]


def _images_of(unit_of: Sequence[int], *, num_images: int) -> Mapping[int, Sequence[int]]:
    images: defaultdict[int, list[int]] = defaultdict(list)
    for image, unit in enumerate(unit_of):
        images[unit].append(image)
    if len(unit_of) != num_images or sorted(images) != list(range(len(images))):
        raise PrivacyError("every image needs its unit, and units are numbered from 0 without a gap")
    return images
