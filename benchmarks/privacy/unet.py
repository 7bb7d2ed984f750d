"""A plain U-Net trained from scratch on the same images, with the same views, rounds, units, clip and noise.

What differs from IC-MoE: no pretrained backbone, all weights are trained, and the loss is Dice + cross-entropy alone.
InstanceNorm: each image is normalised by itself, as privacy asks.
"""

import math
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from icmoe.data.dataset import SegmentationDataset
from icmoe.losses import Truth, segmentation_loss
from icmoe.metrics import mean_or_none, score_image
from icmoe.privacy.gradients import ClippedSum, set_gradients
from icmoe.privacy.sampling import seeded_noise
from icmoe.training import autocast, round_learning_rate
from icmoe.types import Array, Arrays
from icmoe_client.trainer import training_seed
from icmoe_client.workbench import Workbench
from privacy.federation import Visit

MAX_TRAINABLE = 2_000_000


class UNetLearner:
    """MONAI's residual U-Net with at most 2 M parameters on the 256 px image that IC-MoE's adaptive experts see.

    Args:
        bench: gives run and device; its model is not used.
    """

    def __init__(self, bench: Workbench) -> None:
        self._run = bench.run
        self._device = torch.device(bench.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(bench.run.train.seed)
            net = UNet(
                spatial_dims=2,
                in_channels=3,
                out_channels=bench.run.task.num_classes,
                channels=(16, 32, 64, 128, 256),
                strides=(2, 2, 2, 2),
                num_res_units=2,
                norm="INSTANCE",
            )
        self._net = cast(nn.Module, net.to(self._device, memory_format=torch.channels_last))  # type: ignore[call-overload]
        if self.num_trainable > MAX_TRAINABLE:
            raise ValueError(f"the U-Net has {self.num_trainable} parameters; the comparison allows {MAX_TRAINABLE}")

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self._net.parameters())

    def arrays(self) -> dict[str, Array]:
        """Copy all weights."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self._net.named_parameters()}

    def load(self, arrays: Arrays) -> None:
        """Set all weights."""
        with torch.no_grad():
            for name, parameter in self._net.named_parameters():
                parameter.copy_(torch.from_numpy(np.asarray(arrays[name])))

    def train(self, visit: Visit) -> None:
        """Train with or without privacy."""
        config, federation = self._run.train, self._run.federation
        learning_rate = round_learning_rate(config, server_round=visit.server_round, num_rounds=federation.num_rounds)
        optimizer = torch.optim.AdamW(self._net.parameters(), lr=learning_rate, weight_decay=config.weight_decay)
        self._net.train()
        for _ in self._private_steps(visit) if visit.spend else self._plain_steps(visit):
            optimizer.step()

    def dice(self, bench: Workbench) -> float | None:
        """Mean Dice of the site's validation images, at their own resolution."""
        self._net.eval()
        data = bench.dataset("val")
        scores = []
        for index in range(len(data)):
            with torch.no_grad():
                probabilities = self._forward(data, [index], ["identity"])[0].exp()[0].cpu()
            prediction = data.restore(index, probabilities).argmax(dim=0).numpy().astype(np.uint8)
            truth = data.original_labels(index)
            scores.append(score_image(prediction, truth, num_classes=self._run.task.num_classes))
        return mean_or_none([score.mean_dice for score in scores])

    def _plain_steps(self, visit: Visit) -> Iterator[None]:
        """Leave the gradient of each batch in ``.grad``, clipped as the shipped training does."""
        config, data = self._run.train, visit.data
        rng = np.random.default_rng(training_seed(self._run, visit.site.name, visit.server_round))
        for _ in range(config.local_epochs):
            order = rng.permutation(len(data)).tolist()
            for start in range(0, len(order), config.batch_size):
                batch = order[start : start + config.batch_size]
                self._net.zero_grad(set_to_none=True)
                losses = self._losses(data, batch, rng.choice(config.views, len(batch)).tolist())
                losses.mean().backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(self._net.parameters(), config.max_grad_norm)
                yield

    def _private_steps(self, visit: Visit) -> Iterator[None]:
        """Leave the noisy gradient of each step in ``.grad``: the step of ``icmoe.privacy.dp_sgd``."""
        privacy, spend = self._run.privacy, visit.spend
        if privacy is None or spend is None:
            raise ValueError("a private training needs a privacy section and a spend")
        views, num_units = self._run.train.views, max(visit.unit_of) + 1
        noise = seeded_noise(training_seed(self._run, visit.site.name, visit.server_round))
        parameters = list(self._net.parameters())
        for _ in range(spend.num_steps):
            self._net.zero_grad(set_to_none=True)
            clipped = ClippedSum(parameters, max_grad_norm=privacy.max_grad_norm)
            for unit in noise.poisson(num_units, spend.sample_rate):
                images = [image for image, owner in enumerate(visit.unit_of) if owner == unit]
                chosen = [views[seed % len(views)] for seed in noise.seeds(len(images))]
                self._losses(visit.data, images, chosen).sum().backward()  # type: ignore[no-untyped-call]
                clipped.add_unit()
            gradient = clipped.noisy_mean(
                noise, noise_multiplier=spend.noise_multiplier, expected_units=spend.sample_rate * num_units
            )
            set_gradients(parameters, gradient)
            yield

    def _losses(self, data: SegmentationDataset, images: Sequence[int], views: Sequence[str]) -> Tensor:
        log_probabilities, labels = self._forward(data, images, views)
        losses = segmentation_loss(log_probabilities, Truth.of(labels, log_probabilities.shape[1]))
        if not math.isfinite(float(losses.detach().sum())):
            raise ValueError("the U-Net's training diverged; lower train.learning_rate")
        return losses

    def _forward(self, data: SegmentationDataset, images: Sequence[int], views: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log probabilities (B, K, D, D) and labels (B, D, D)."""
        items = [data.load(index, view) for index, view in zip(images, views, strict=True)]
        pixels = torch.stack([item.detail for item in items])
        pixels = pixels.to(self._device, memory_format=torch.channels_last)
        labels = torch.stack([item.labels for item in items]).to(self._device)
        with autocast(self._device, self._run.train.precision):
            logits = self._net(pixels)
        return logits.float().log_softmax(dim=1), labels
