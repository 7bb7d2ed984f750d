"""Randomness of differential privacy: Gaussian noise and Poisson draws, from the operating system.

Torch's and numpy's generators are not used for it. Both can be computed back from what they give out, and torch's CPU
generator takes only 32 bits of its seed (1 and 2**32 + 1 give the same numbers, torch 2.15): who sees an update could
try them all and subtract the noise. Every number here is made of bits the operating system gives for this one draw;
350,000 Gaussian numbers take some 25 ms.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from icmoe.config import TrainConfig

Bits = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NoiseSource:
    """Where noise comes from; made by ``os_noise`` or ``seeded_noise``.

    Args:
        bits: gives that many words of 64 random bits.
        secret: whether nobody can know or repeat them. If not, epsilon is not valid.
    """

    bits: Callable[[int], Bits]
    secret: bool

    def uniform(self, count: int) -> Floats:
        """``count`` numbers, uniform in (0, 1]."""
        # Never 0, whose logarithm is infinite; the largest words round to 1.
        return (self.bits(count).astype(np.float64) + 0.5) * 2.0**-64

    def gaussian(self, count: int) -> Floats:
        """``count`` standard normal numbers (Box and Muller), from 64 bits each: tails reach 9.4."""
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log(self.uniform(half)))
        angle = 2.0 * math.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def poisson(self, num_units: int, sample_rate: float) -> list[int]:
        """Indices of the units that take part in a step: each for itself with probability ``sample_rate``."""
        return np.flatnonzero(self.uniform(num_units) <= sample_rate).tolist()

    def seeds(self, count: int) -> list[int]:
        """``count`` seeds in [0, 2**63), such as of an image's own randomness."""
        return [int(word) >> 1 for word in self.bits(count)]


def os_noise() -> NoiseSource:
    """Noise from the operating system's entropy. Nothing seeds it: no run, no site, no round."""
    return NoiseSource(lambda count: np.frombuffer(os.urandom(8 * count), dtype=np.uint64), secret=True)


def seeded_noise(seed: int | Sequence[int]) -> NoiseSource:
    """Repeatable noise, for simulations only: epsilon is not valid with it."""
    rng = np.random.default_rng(seed)
    return NoiseSource(lambda count: rng.integers(0, 2**64, count, dtype=np.uint64), secret=False)


def planned(*, num_units: int, config: TrainConfig) -> tuple[float, int]:
    """Sample rate and steps of a round.

    Args:
        num_units: patients or images of the site, as the run's unit of protection is.
        config: the run's train section; ``batch_size`` counts units here.

    Returns:
        The probability with which a unit takes part in a step, and the steps: as many as make a unit take part
        ``local_epochs`` times on average.
    """
    return min(1.0, config.batch_size / num_units), config.local_epochs * math.ceil(num_units / config.batch_size)
