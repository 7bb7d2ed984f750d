"""How sure a mean is, and whether two models differ.

The patient is the unit: images of one patient are not independent.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import wilcoxon

DRAWS = 2000
MIN_PAIRS = 6
"""Below this many differing patients the signed-rank test cannot reach p < 0.05."""

Draws = npt.NDArray[np.float64]


def bootstrap_means(values: Sequence[float], patients: Sequence[str], *, seed: int, draws: int = DRAWS) -> Draws:
    """Means over images when patients are drawn again with replacement.

    Args:
        values: one per image.
        patients: whose image it is.
        seed: the same seed gives the same draws.
        draws: how many.

    Returns:
        (draws,).
    """
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    sums = np.bincount(owner, weights=np.asarray(values, dtype=float), minlength=len(names))
    counts = np.bincount(owner, minlength=len(names))
    times = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return np.asarray((times @ sums) / (times @ counts))


def interval(draws: Draws) -> tuple[float, float]:
    """The central 95 % of bootstrap draws."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def paired_p_value(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Two-sided Wilcoxon signed-rank test on pairs, one per patient; ``None`` where too few differ to tell."""
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    if np.count_nonzero(differences) < MIN_PAIRS:
        return None
    return float(wilcoxon(differences).pvalue)
