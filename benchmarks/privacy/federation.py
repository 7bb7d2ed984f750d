"""A federation in one process: the shipped trainings and a mean weighted by images, without messages.

No checkpoint is chosen by its validation score: the last round's weights are scored, with and without privacy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

import numpy as np

from icmoe.config import RunConfig
from icmoe.data.dataset import SegmentationDataset
from icmoe.privacy.accounting import Spend
from icmoe.privacy.dp_sgd import train_private
from icmoe.privacy.sampling import seeded_noise
from icmoe.training import dump_arrays, load_arrays, round_learning_rate, train_local
from icmoe.types import Array, Arrays
from icmoe_client.private_round import planned_spend
from icmoe_client.site import Site
from icmoe_client.trainer import score_split, training_seed
from icmoe_client.workbench import Workbench


@dataclass(frozen=True)
class Visit:
    """A site's turn in a round.

    Attributes:
        site: whose images are used.
        data: its training images, in memory or in the cache.
        server_round: from 1.
        spend: what the round takes of the site's epsilon; ``None`` trains without privacy.
        unit_of: for each image, the index of its unit.
    """

    site: Site
    data: SegmentationDataset
    server_round: int
    spend: Spend | None
    unit_of: Sequence[int]


class Learner(Protocol):
    """A model that is trained at one site after the other."""

    def arrays(self) -> dict[str, Array]:
        """Copy all weights."""

    def load(self, arrays: Arrays) -> None:
        """Set all weights."""

    def train(self, visit: Visit) -> None:
        """Train in place, from the weights that are loaded."""

    def dice(self, bench: Workbench) -> float | None:
        """Mean Dice of the site's validation images; ``None`` without one."""


class IcMoeLearner:
    """The shipped model and its shipped trainings."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    def arrays(self) -> dict[str, Array]:
        """Copy all weights."""
        return dump_arrays(self._bench.model)

    def load(self, arrays: Arrays) -> None:
        """Set all weights."""
        load_arrays(self._bench.model, arrays)

    def train(self, visit: Visit) -> None:
        """Train with or without privacy."""
        run, bench = self._bench.run, self._bench
        seed = training_seed(run, visit.site.name, visit.server_round)
        learning_rate = round_learning_rate(
            run.train, server_round=visit.server_round, num_rounds=run.federation.num_rounds
        )
        if visit.spend is None or run.privacy is None:
            train_local(
                bench.model,
                bench.backbone.decoder,
                visit.data,
                config=run.train,
                views=run.train.views,
                learning_rate=learning_rate,
                seed=seed,
            )
            return
        train_private(
            bench.model,
            bench.backbone.decoder,
            visit.data,
            config=run.train,
            privacy=run.privacy,
            spend=visit.spend,
            unit_of=visit.unit_of,
            views=run.train.views,
            learning_rate=learning_rate,
            noise=seeded_noise(seed),
        )

    def dice(self, bench: Workbench) -> float | None:
        """Mean Dice of the site's validation images."""
        return score_split(bench, "val")[0].get("dice")


@dataclass(frozen=True)
class Outcome:
    """What a federation gave: validation Dice by site, and the noise multiplier of each site as accounted."""

    dice: Mapping[str, float]
    noise_multiplier: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean over sites."""
        return fmean(self.dice.values())


def federate(
    learner: Learner,
    bench: Workbench,
    *,
    training: Sequence[Site],
    scored: Sequence[Site],
    noise_of: int | None = None,
) -> Outcome:
    """Train for the run's rounds and score the result.

    Args:
        learner: starts from its initial weights.
        bench: of any site, with the run; its images are not used.
        training: sites that train, or all images as one site.
        scored: sites whose validation images are scored.
        noise_of: train with the noise that a site with so many units would add, which is less. Epsilon does not hold
            then: it answers what more patients would change.
    """
    run = bench.run
    benches = {site.name: Workbench(site, run, bench.backbone, bench.model, bench.device) for site in training}
    data = {name: one.dataset("train") for name, one in benches.items()}
    units = {site.name: units_of(site, run) for site in training}
    spends = {name: _spend(run, unit_of) for name, unit_of in units.items()}
    arrays = learner.arrays()
    for server_round in range(1, run.federation.num_rounds + 1):
        updates = []
        for site in training:
            learner.load(arrays)
            spend = _less_noise(spends[site.name], max(units[site.name]) + 1, noise_of)
            learner.train(Visit(site, data[site.name], server_round, spend, units[site.name]))
            updates.append(learner.arrays())
        arrays = _average(updates, [len(data[site.name]) for site in training])
    learner.load(arrays)
    scores = {
        site.name: learner.dice(Workbench(site, run, bench.backbone, bench.model, bench.device)) for site in scored
    }
    return Outcome(
        {name: dice for name, dice in scores.items() if dice is not None},
        {name: spend.noise_multiplier for name, spend in spends.items() if spend is not None},
    )


def units_of(site: Site, run: RunConfig) -> list[int]:
    """For each training image, the index of its unit; without privacy every image stands for itself."""
    train = [sample for sample in site.samples if sample.split == "train"]
    if run.privacy is None or run.privacy.unit == "image":
        return list(range(len(train)))
    order = {name: index for index, name in enumerate(dict.fromkeys(sample.patient for sample in train))}
    return [order[sample.patient] for sample in train]


def _spend(run: RunConfig, unit_of: Sequence[int]) -> Spend | None:
    return planned_spend(run, run.privacy, num_units=max(unit_of) + 1) if run.privacy is not None else None


def _less_noise(spend: Spend | None, num_units: int, noise_of: int | None) -> Spend | None:
    """The mean gradient's noise is that of the sum by the number of units: more units, less noise in the mean."""
    if spend is None or noise_of is None:
        return spend
    return Spend(spend.noise_multiplier * num_units / noise_of, spend.sample_rate, spend.num_steps)


def _average(updates: Sequence[Arrays], num_images: Sequence[int]) -> dict[str, Array]:
    """Mean weighted by images, summed in float64 as the centre does."""
    return {
        name: np.average([arrays[name] for arrays in updates], axis=0, weights=num_images).astype(np.float32)
        for name in updates[0]
    }
