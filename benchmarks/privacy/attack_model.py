"""What the attacks train: a small IC-MoE on features in memory, with or without privacy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from icmoe.config import RunConfig
from icmoe.losses import Truth, at_grid, segmentation_loss
from icmoe.modeling.build import build_icmoe
from icmoe.modeling.icmoe import IcMoe
from icmoe.privacy.accounting import Spend, round_of, solve_noise_multiplier
from icmoe.privacy.config import PrivacyConfig
from icmoe.privacy.dp_sgd import train_private
from icmoe.privacy.sampling import seeded_noise
from icmoe.training import TrainItem, predict, train_local
from icmoe_client.workbench import Workbench

Floats = npt.NDArray[np.float64]
_PROBABLE = 1e-6


@dataclass(frozen=True)
class Images:
    """Images in memory, as a training reads them."""

    items: Sequence[TrainItem]

    def __len__(self) -> int:
        """Count images."""
        return len(self.items)

    def load(self, index: int, view: str) -> TrainItem:
        """Give an image; the attacks use one view."""
        return self.items[index]


def fresh_model(bench: Workbench, seed: int) -> IcMoe:
    """A new model with the run's sizes."""
    model = build_icmoe(bench.run.model, num_classes=bench.run.task.num_classes, backbone=bench.backbone, seed=seed)
    return model.to(bench.device)


def spend_for(run: RunConfig, epsilon: int | None, *, num_units: int) -> Spend | None:
    """Steps of one training of ``train.local_epochs`` that spend ``epsilon``; ``None`` without privacy."""
    if epsilon is None:
        return None
    sample_rate, num_steps = round_of(
        num_units=num_units, batch_size=run.train.batch_size, local_epochs=run.train.local_epochs
    )
    delta = PrivacyConfig(target_epsilon=epsilon).target_delta
    sigma = solve_noise_multiplier(target_epsilon=epsilon, delta=delta, sample_rate=sample_rate, num_steps=num_steps)
    return Spend(sigma, sample_rate, num_steps)


def train(bench: Workbench, model: IcMoe, images: Images, *, spend: Spend | None, seed: tuple[int, ...]) -> None:
    """Train ``model`` in place; every image is a unit."""
    config = bench.run.train
    if spend is None:
        train_local(
            model,
            bench.backbone.decoder,
            images,
            config=config,
            views=config.views,
            learning_rate=config.learning_rate,
            seed=seed,
        )
        return
    train_private(
        model,
        bench.backbone.decoder,
        images,
        config=config,
        privacy=PrivacyConfig(noise_multiplier=spend.noise_multiplier),
        spend=spend,
        unit_of=range(len(images)),
        views=config.views,
        learning_rate=config.learning_rate,
        noise=seeded_noise(seed),
    )


def image_losses(bench: Workbench, model: IcMoe, items: Sequence[TrainItem], batch_size: int = 10) -> Floats:
    """Dice + cross-entropy of the fused prediction, (number of items,)."""
    losses = []
    for start in range(0, len(items), batch_size):
        part = items[start : start + batch_size]
        probabilities, _ = predict(model, bench.backbone.decoder, part, precision=bench.run.train.precision)
        labels = at_grid(torch.stack([item.labels for item in part]), probabilities.shape[-1])
        truth = Truth.of(labels, probabilities.shape[1])
        losses.append(segmentation_loss(probabilities.clamp(min=_PROBABLE).log(), truth))
    return torch.cat(losses).double().numpy()
