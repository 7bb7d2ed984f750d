"""Local training and scoring of IC-MoE on cached features. Knows nothing of rounds on a wire.

Letters: B batch, C = 256, h embedding grid, D detail side, L label side, G logit grid, E experts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from icmoe.config import TrainConfig
from icmoe.errors import ExchangeError, RunError
from icmoe.losses import at_grid, icmoe_loss
from icmoe.metrics import ImageScore, Labels, score_image
from icmoe.modeling.decoder import FrozenDecoder
from icmoe.modeling.icmoe import IcMoe
from icmoe.types import IGNORE_INDEX


class TrainItem(Protocol):
    """One image of one view: embeddings (C, h, h), detail (3, D, D), labels (L, L)."""

    @property
    def embeddings(self) -> Tensor:
        """(C, h, h) float32."""

    @property
    def detail(self) -> Tensor:
        """(3, D, D) in [0, 1]."""

    @property
    def labels(self) -> Tensor:
        """(L, L) class ids."""


class TrainData(Protocol):
    """What training needs of a data set; ``icmoe.data.dataset.SegmentationDataset`` is one."""

    def __len__(self) -> int:
        """Count images."""

    def load(self, index: int, view: str) -> TrainItem:
        """Read an image in a view."""


class ScoreData(TrainData, Protocol):
    """What scoring needs beside it."""

    def original_labels(self, index: int) -> Labels:
        """(H, W) class ids at the image's own resolution."""

    def restore(self, index: int, probabilities: Tensor) -> Tensor:
        """(K, G, G) on the padded square to (K, H, W)."""

    def spacing(self, index: int) -> tuple[float, float] | None:
        """Millimetres per pixel (row, column)."""


@dataclass(frozen=True)
class TrainResult:
    """Outcome of local training.

    ``expert_shares`` is the share of the vote each expert won, over all pixels that count, summing to 1; steps without
    the basic experts are left out.
    """

    loss: float
    num_steps: int
    expert_shares: dict[str, float]


def round_learning_rate(config: TrainConfig, *, server_round: int, num_rounds: int) -> float:
    """Cosine from ``learning_rate`` in round 1 to ``final_learning_rate`` in the last round."""
    progress = (server_round - 1) / max(num_rounds - 1, 1)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * progress))


def train_local(
    model: IcMoe,
    decoder: FrozenDecoder,
    data: TrainData,
    *,
    config: TrainConfig,
    views: Sequence[str],
    learning_rate: float,
    seed: Sequence[int],
    proximal_mu: float = 0.0,
    max_physical_batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Train all of ``model`` for ``config.local_epochs``, in place.

    Args:
        model: starts from the received global weights.
        decoder: the backbone's frozen decoder.
        data: training images of one site.
        config: the run's train section.
        views: cached views to draw from; each epoch draws one per image.
        learning_rate: of this round.
        seed: such as (run seed, crc of the site's name, round); the same seed gives the same result on one machine.
        proximal_mu: FedProx: adds mu / 2 * ||w - w_received||^2.
        max_physical_batch_size: images that fit in memory at once; smaller than the batch only accumulates.
        progress: called with (steps done, steps in all).

    Returns:
        Mean loss of the last epoch, steps made, and the experts' shares of the vote.

    Raises:
        RunError: if the loss is not finite.
    """
    rng = np.random.default_rng(list(seed))
    received = [parameter.detach().clone() for parameter in model.parameters()] if proximal_mu else []
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=config.weight_decay)
    model.train()
    steps_per_epoch = math.ceil(len(data) / config.batch_size)
    losses: list[float] = []
    shares = torch.zeros(len(model.expert_names))
    step = 0
    for epoch in range(config.local_epochs):
        for pairs in _batches(rng, len(data), config.batch_size):
            batch = [Draw(index, views[draw % len(views)], int(draw)) for index, draw in pairs]
            with_basic = step % config.basic_every == 0
            optimizer.zero_grad(set_to_none=True)
            batch_loss = 0.0
            for part in in_parts(batch, max_physical_batch_size):
                each, votes = part_losses(model, decoder, data, part, config=config, with_basic=with_basic)
                loss = each.sum()
                (loss / len(batch)).backward()  # type: ignore[no-untyped-call]
                batch_loss += float(loss.detach()) / len(batch)
                shares += votes
            if received:
                add_proximal_gradient(model, received, proximal_mu)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            if not math.isfinite(batch_loss) or not math.isfinite(norm):
                raise RunError(
                    f"training diverged at step {step} (loss {batch_loss}, gradient norm {float(norm)}); "
                    "lower train.learning_rate or set train.precision: fp32"
                )
            optimizer.step()
            step += 1
            if epoch == config.local_epochs - 1:
                losses.append(batch_loss)
            if progress:
                progress(step, steps_per_epoch * config.local_epochs)
    shares = shares / shares.sum().clamp(min=1e-12)
    return TrainResult(float(np.mean(losses)), step, dict(zip(model.expert_names, shares.tolist(), strict=True)))


def part_losses(
    model: IcMoe,
    decoder: FrozenDecoder,
    data: TrainData,
    part: Sequence["Draw"],
    *,
    config: TrainConfig,
    with_basic: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of each of some images (B,), and their summed votes (E,)."""
    items = [data.load(draw.index, draw.view) for draw in part]
    # Each image brings its own randomness, so that neither batch nor part changes what it gets.
    generators = [np.random.default_rng(draw.seed) for draw in part]
    device = next(model.parameters()).device
    embeddings, detail = _inputs(items, device)
    if config.embedding_noise:
        noise = _stack(generator.standard_normal(embeddings.shape[1:], dtype=np.float32) for generator in generators)
        noise = noise.to(device)
        embeddings = embeddings + config.embedding_noise * embeddings.std(dim=(1, 2, 3), keepdim=True) * noise
    labels = torch.stack([item.labels for item in items]).long().to(device)
    with autocast(device, config.precision):
        output = model(embeddings, detail, decoder, with_basic=with_basic)
    grid = output.probabilities.shape[-1]
    draws = _stack(generator.random((grid, grid), dtype=np.float32) for generator in generators).to(device)
    losses = icmoe_loss(
        output,
        labels,
        draws,
        weights=config.loss.model_dump(include={"expert", "consistency", "balance", "contrast"}),
        consistency_temperature=config.loss.consistency_temperature,
        contrast_temperature=config.loss.contrast_temperature,
        contrast_anchors=config.loss.contrast_anchors,
    )
    num_experts = len(model.expert_names)
    if output.votes.shape[1] < num_experts:
        return losses, torch.zeros(num_experts)
    valid = (at_grid(labels, grid) != IGNORE_INDEX).unsqueeze(1)
    return losses, (output.votes.detach() * valid).sum(dim=(0, 2, 3)).cpu()


@torch.no_grad()
def predict(
    model: IcMoe, decoder: FrozenDecoder, items: Sequence[TrainItem], *, precision: str
) -> tuple[Tensor, Tensor]:
    """Fused probabilities (B, K, G, G) and votes (B, E, G, G), all experts taking part."""
    model.eval()
    device = next(model.parameters()).device
    embeddings, detail = _inputs(items, device)
    with autocast(device, precision):
        output = model(embeddings, detail, decoder)
    return output.probabilities.float().cpu(), output.votes.float().cpu()


def evaluate(
    model: IcMoe,
    decoder: FrozenDecoder,
    data: ScoreData,
    *,
    num_classes: int,
    precision: str,
    batch_size: int = 4,
    with_hd95: bool = False,
) -> list[ImageScore]:
    """Score every image of ``data`` at its own resolution, in order."""
    scores = []
    for start in range(0, len(data), batch_size):
        indices = range(start, min(start + batch_size, len(data)))
        items = [data.load(index, "identity") for index in indices]
        probabilities, _ = predict(model, decoder, items, precision=precision)
        for index, image_probabilities in zip(indices, probabilities, strict=True):
            prediction = data.restore(index, image_probabilities).argmax(dim=0).numpy().astype(np.uint8)
            scores.append(
                score_image(
                    prediction,
                    data.original_labels(index),
                    num_classes=num_classes,
                    with_hd95=with_hd95,
                    spacing=data.spacing(index),
                )
            )
    return scores


def _inputs(items: Sequence[TrainItem], device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings (B, C, h, h) and detail (B, 3, D, D), channels last: convolutions and doubling run faster on it."""
    embeddings = torch.stack([item.embeddings for item in items]).to(device, memory_format=torch.channels_last)
    detail = torch.stack([item.detail for item in items]).to(device, memory_format=torch.channels_last)
    return embeddings, detail


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Bfloat16 autocast where asked, else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def load_arrays(model: IcMoe, arrays: Mapping[str, np.ndarray]) -> None:
    """Set the named parameters of ``model``; names left out keep their value.

    Raises:
        ExchangeError: if the model has no such tensor or one of another shape.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, array in arrays.items():
            if name not in parameters or parameters[name].shape != array.shape:
                has = tuple(parameters[name].shape) if name in parameters else "no such tensor"
                raise ExchangeError(f"tensor {name} has shape {array.shape}; the model of this run config has {has}")
            # A copy: torch warns of arrays that may not be written, as released updates are.
            parameters[name].copy_(torch.from_numpy(np.array(array, dtype=np.float32)))


def dump_arrays(model: IcMoe) -> dict[str, np.ndarray]:
    """All parameters by name, as float32 copies."""
    return {name: parameter.detach().cpu().numpy().copy() for name, parameter in model.named_parameters()}


def _batches(rng: np.random.Generator, num_images: int, batch_size: int) -> Iterator[list[tuple[int, int]]]:
    """Shuffled (image, view draw) pairs in batches."""
    order = rng.permutation(num_images).tolist()
    draws = rng.integers(0, 2**31, num_images).tolist()
    pairs = list(zip(order, draws, strict=True))
    return (pairs[start : start + batch_size] for start in range(0, num_images, batch_size))


@dataclass(frozen=True)
class Draw:
    """An image of a batch: which view of it, and the seed of its own randomness."""

    index: int
    view: str
    seed: int


def _stack(arrays: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(list(arrays)))


def in_parts(batch: list[Draw], size: int | None) -> Iterator[list[Draw]]:
    """Split a batch into parts of at most ``size`` images."""
    size = size or len(batch)
    return (batch[start : start + size] for start in range(0, len(batch), size))


def add_proximal_gradient(model: IcMoe, received: Sequence[Tensor], mu: float) -> None:
    """Add the gradient of mu / 2 * ||w - w_received||^2 (FedProx)."""
    for parameter, start in zip(model.parameters(), received, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - start, alpha=mu)
