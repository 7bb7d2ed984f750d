"""What DP-SGD spends: epsilon of steps taken, noise for a budget, steps that still fit.

A step is the Poisson-subsampled Gaussian mechanism: each unit (patient or image) takes part with probability
``sample_rate``, and the sum of clipped gradients gets noise of ``noise_multiplier`` times the clip. Epsilon speaks of
adding or removing one unit. Steps of different settings compose, in any order.

Two accountants, both upper bounds. ``rdp``: Rényi divergence at many orders (Mironov, Talwar and Zhang 2019, arXiv
1908.10530) and the conversion of Balle et al. 2020; fast, and what budgets are enforced with. ``prv``: the privacy loss
composed numerically (Gopi et al. 2021); some 10 % lower, slow, shown beside it.

Importing this module costs nothing; the first call imports Opacus, and with it torch: seconds.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from icmoe.errors import BudgetExhaustedError, PrivacyError

Accountant = Literal["rdp", "prv"]
ACCOUNTANTS: tuple[Accountant, ...] = ("rdp", "prv")

PRV_LIMIT = 30.0
"""RDP epsilon above which PRV is not computed: its grid grows with epsilon. At 1163 it took 12 GB and 4 minutes."""
MIN_NOISE, MAX_NOISE = 0.1, 1e4
_NOISE_STEP = 1e-4
_ROUNDING = 1e-15
"""Rényi divergence of a step below which the library's sums are rounding errors, some of them negative."""

# Opacus's own orders, and more at both ends: large epsilons have their best order near 1, small ones above 64.
_ORDERS = np.array(
    [
        *(1.01, 1.02, 1.05),
        *(1 + x / 10 for x in range(1, 100)),
        *range(12, 64),
        *range(64, 128, 8),
        *(128, 160, 192, 256, 320, 384, 512, 768, 1000),
    ],
    dtype=np.float64,
)


@dataclass(frozen=True)
class Spend:
    """Steps of one setting.

    Attributes:
        noise_multiplier: standard deviation of the noise in units of the clip, above 0.
        sample_rate: probability of a unit to take part in a step, above 0 and at most 1.
        num_steps: how many.

    Raises:
        ValueError: if a number is out of range.
    """

    noise_multiplier: float
    sample_rate: float
    num_steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError(f"noise_multiplier is {self.noise_multiplier}; it must be a number above 0")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate is {self.sample_rate}; it must be above 0 and at most 1")
        if self.num_steps < 0:
            raise ValueError(f"num_steps is {self.num_steps}; it cannot be negative")


def round_of(*, num_units: int, batch_size: int, local_epochs: int) -> tuple[float, int]:
    """Sample rate and steps of a round.

    Args:
        num_units: training units (patients or images) of the site.
        batch_size: units expected in a step.
        local_epochs: passes over the data.

    Returns:
        ``(min(1, batch_size / num_units), local_epochs * ceil(num_units / batch_size))``.

    Raises:
        ValueError: if a number is below 1.
    """
    if min(num_units, batch_size, local_epochs) < 1:
        raise ValueError(
            f"num_units, batch_size and local_epochs must be at least 1; got {num_units}, {batch_size}, {local_epochs}"
        )
    return min(1.0, batch_size / num_units), local_epochs * math.ceil(num_units / batch_size)


def epsilon(spends: Sequence[Spend], *, delta: float, accountant: Accountant = "rdp") -> float:
    """Epsilon of all these steps together, at ``delta``; 0 without a step.

    Raises:
        ValueError: if delta is not between 0 and 1.
        PrivacyError: if PRV is asked for where it cannot be computed; RDP always can.
    """
    merged = _merge(spends)
    divergence = _divergence(merged, delta=delta)
    if not merged:
        return 0.0
    by_rdp = max(0.0, float(np.min(divergence)))
    return by_rdp if accountant == "rdp" else _prv_epsilon(merged, delta=delta, by_rdp=by_rdp)


def solve_noise_multiplier(
    *, target_epsilon: float, delta: float, sample_rate: float, num_steps: int, spent: Sequence[Spend] = ()
) -> float:
    """Smallest noise multiplier, to 4 digits and rounded up, with which the steps stay within a budget (RDP).

    Args:
        target_epsilon: budget for ``spent`` and the steps together.
        delta: what epsilon is stated for.
        sample_rate: of the steps.
        num_steps: at least 1.
        spent: steps taken before.

    Returns:
        At least ``MIN_NOISE``, below which no budget makes sense.

    Raises:
        BudgetExhaustedError: if no noise is enough, as when ``spent`` alone passes the target.
        ValueError: if a number is out of range.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; without a step there is no noise to solve for")

    def reached(noise_multiplier: float) -> float:
        return epsilon((*spent, Spend(noise_multiplier, sample_rate, num_steps)), delta=delta)

    before = epsilon(spent, delta=delta)
    high = 1.0
    while before < target_epsilon and high < MAX_NOISE and reached(high) > target_epsilon:
        high *= 2
    if before >= target_epsilon or high >= MAX_NOISE:
        raise BudgetExhaustedError(
            f"epsilon {target_epsilon:g} at delta {delta:g} is not enough: {before:.3f} is spent already, and no noise "
            f"makes {num_steps} more steps fit. Ask for a larger epsilon or for fewer steps."
        )
    low = MIN_NOISE if high == 1.0 else high / 2
    if reached(low) <= target_epsilon:
        return low
    return _crossing(reached, target_epsilon, low=low, high=high)


def affordable_steps(
    *, max_epsilon: float, delta: float, noise_multiplier: float, sample_rate: float, spent: Sequence[Spend] = ()
) -> int:
    """Most further steps of one setting that keep epsilon (RDP) at or below ``max_epsilon``; 0 if none fits.

    Raises:
        ValueError: if a number is out of range.
    """
    one = Spend(noise_multiplier, sample_rate, 1)
    # At every order epsilon is a straight line in the number of steps, and the lowest line counts.
    room = max_epsilon - _divergence(_merge(spent), delta=delta)
    steps = max(0, math.floor(float(np.max(room / _rdp_of_step(one.noise_multiplier, one.sample_rate)))))
    while steps and epsilon((*spent, Spend(noise_multiplier, sample_rate, steps)), delta=delta) > max_epsilon:
        steps -= 1  # a rounding error of the division
    return steps


def _merge(spends: Sequence[Spend]) -> tuple[Spend, ...]:
    """One entry for each setting: what both accountants cost grows with the number of settings."""
    steps: dict[tuple[float, float], int] = {}
    for spend in spends:
        setting = (spend.noise_multiplier, spend.sample_rate)
        steps[setting] = steps.get(setting, 0) + spend.num_steps
    return tuple(Spend(*setting, count) for setting, count in sorted(steps.items()) if count)


def _divergence(spends: Sequence[Spend], *, delta: float) -> npt.NDArray[np.float64]:
    """Epsilon at ``delta`` by each order alone (Balle et al. 2020, theorem 21)."""
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; it must be between 0 and 1")
    conversion = np.log1p(-1 / _ORDERS) - (math.log(delta) + np.log(_ORDERS)) / (_ORDERS - 1)
    total = np.asarray(conversion, dtype=np.float64)
    for spend in spends:
        total = total + spend.num_steps * _rdp_of_step(spend.noise_multiplier, spend.sample_rate)
    return total


@lru_cache(maxsize=4096)
def _rdp_of_step(noise_multiplier: float, sample_rate: float) -> npt.NDArray[np.float64]:
    from opacus.accountants.analysis.rdp import compute_rdp

    rdp = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=list(_ORDERS))
    return np.maximum(np.asarray(rdp, dtype=np.float64), _ROUNDING)


def _prv_epsilon(spends: Sequence[Spend], *, delta: float, by_rdp: float) -> float:
    from opacus.accountants import PRVAccountant

    if by_rdp > PRV_LIMIT:
        raise PrivacyError(
            f"epsilon is {by_rdp:.1f} by RDP; PRV is computed up to {PRV_LIMIT:g}. Above that neither protects."
        )
    counting = PRVAccountant()
    counting.history = [(spend.noise_multiplier, spend.sample_rate, spend.num_steps) for spend in spends]
    with warnings.catch_warnings():
        # It takes logarithms of 0 at a sample rate of 1 and searches its orders beyond their best, and says so.
        warnings.simplefilter("ignore")
        found = float(counting.get_epsilon(delta=delta))
    if not math.isfinite(found):
        raise PrivacyError("PRV found no finite epsilon for these steps; use the one by RDP.")
    return max(0.0, min(found, by_rdp))


def _crossing(reached: Callable[[float], float], target: float, *, low: float, high: float) -> float:
    """Where a falling function passes a target, from above: its value at the result is at most the target."""
    from scipy.optimize import brentq

    # Each evaluation of a new noise multiplier costs some 0.3 s, so no more digits than are kept.
    root = math.exp(
        brentq(lambda x: reached(math.exp(x)) - target, math.log(low), math.log(high), xtol=_NOISE_STEP / 2)
    )
    found = math.ceil(root / _NOISE_STEP) * _NOISE_STEP
    while reached(round(found, 4)) > target:
        found += _NOISE_STEP * max(1.0, found)
    return round(found, 4)
