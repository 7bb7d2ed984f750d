"""Aggregation as pure functions over named tensors. Numpy only.

Weights are normalised per tensor over the sites that sent it. (Flower's own ``aggregate_arrayrecords`` divides by all
sites, so that a tensor missing at one comes back shrunk.)
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from icmoe.exchange import Update, expert_of
from icmoe.types import Array, Arrays


def weighted_average(
    updates: Sequence[Update], previous: Arrays, *, expert_weighting: Literal["examples", "votes"]
) -> dict[str, Array]:
    """Average every tensor over the sites that sent it.

    A site's weight is its number of examples; with ``votes`` that number times the share of its pixels an expert won,
    so that an expert follows the sites that use it. The router is always weighted by examples.

    Args:
        updates: good replies in site order, which fixes the order of the sums.
        previous: global tensors; one that nobody sent keeps its value.
        expert_weighting: see above.

    Returns:
        float32 tensors with the names of ``previous``.
    """
    result = {}
    for name, old in previous.items():
        senders = [update for update in updates if name in update.arrays]
        weights = np.array([_weight(update, name, expert_weighting) for update in senders], dtype=np.float64)
        if weights.sum() <= 0.0:
            result[name] = np.asarray(old, dtype=np.float32)
            continue
        weights /= weights.sum()
        total = np.zeros(old.shape, dtype=np.float64)
        for weight, update in zip(weights, senders, strict=True):
            total += weight * update.arrays[name].astype(np.float64)
        result[name] = total.astype(np.float32)
    return result


def _weight(update: Update, name: str, expert_weighting: str) -> float:
    expert = expert_of(name)
    if expert_weighting == "examples" or expert is None:
        return update.num_examples
    return update.num_examples * update.report.expert_shares.get(expert, 0.0)
