"""Slow twin of the aggregation: exact fractions, one number at a time."""

from fractions import Fraction
from typing import Literal

import numpy as np
import pytest

from icmoe.aggregation import weighted_average
from icmoe.exchange import SiteReport, Update
from icmoe.types import Array

NAMES = ("experts.basic.0.up.weight", "experts.adaptive.1.mix.bias", "router.gate.weight")


def random_replies(rng: np.random.Generator) -> list[Update]:
    replies = []
    for _ in range(5):
        report = SiteReport(
            site="s",
            server_round=1,
            config_digest="",
            backbone_digest="",
            numbers={"num_examples": float(rng.integers(1, 100))},
            expert_shares={"basic.0": float(rng.random()), "adaptive.1": float(rng.random())},
        )
        kept = [name for name in NAMES if name.startswith("router") or rng.random() < 0.6]
        replies.append(Update(report, {name: rng.standard_normal((2, 2)).astype(np.float32) for name in kept}))
    return replies


def slow_number(replies: list[Update], name: str, position: tuple[int, int], previous: float, weighting: str) -> float:
    top, bottom = Fraction(0), Fraction(0)
    for update in replies:
        if name not in update.arrays:
            continue
        weight = Fraction(update.report.numbers["num_examples"])
        if weighting == "votes" and not name.startswith("router"):
            weight *= Fraction(update.report.expert_shares[".".join(name.split(".")[1:3])])
        top += weight * Fraction(float(update.arrays[name][position]))
        bottom += weight
    return float(top / bottom) if bottom else previous


@pytest.mark.parametrize("weighting", ["examples", "votes"])
@pytest.mark.parametrize("seed", range(5))
def test_equals_exact_fractions(weighting: Literal["examples", "votes"], seed: int) -> None:
    rng = np.random.default_rng(seed)
    replies = random_replies(rng)
    previous: dict[str, Array] = {name: np.full((2, 2), 9.0, np.float32) for name in NAMES}
    result = weighted_average(replies, previous, expert_weighting=weighting)
    for name in NAMES:
        for position in np.ndindex(2, 2):
            expected = slow_number(replies, name, (position[0], position[1]), 9.0, weighting)
            assert float(result[name][position]) == pytest.approx(expected, rel=1e-6, abs=1e-7)
