import math
import random
import statistics

import numpy as np
import pytest
import torch

from icmoe.config import TrainConfig
from icmoe.privacy.sampling import NoiseSource, os_noise, planned, seeded_noise

NUM = 100_000
SIGMAS = 6.0
"""Deviations from the expected value that pass; more happen in one of 500 million runs."""
sources = pytest.mark.parametrize("noise", [os_noise(), seeded_noise(3)], ids=["os", "seeded"])


@sources
def test_noise_is_standard_normal(noise: NoiseSource) -> None:
    draws = noise.gaussian(NUM)
    assert draws.dtype == np.float64
    assert abs(draws.mean()) < SIGMAS / math.sqrt(NUM)
    assert abs(draws.std() - 1.0) < SIGMAS / math.sqrt(2 * NUM)
    for point in (-3.0, -1.0, -0.1, 0.5, 2.0):
        share = statistics.NormalDist().cdf(point)
        assert abs((draws < point).mean() - share) < SIGMAS * math.sqrt(share * (1 - share) / NUM)


@sources
def test_noise_is_independent_from_number_to_number(noise: NoiseSource) -> None:
    """Both halves of a Box-Muller pair, neighbours, and one call and the next."""
    one, other = noise.gaussian(NUM), noise.gaussian(NUM)
    half = NUM // 2
    for left, right in ((one[:half], one[half:]), (one[:-1], one[1:]), (one, other)):
        assert abs((left * right).mean()) < SIGMAS / math.sqrt(len(left))
        assert abs((left**2 * right**2).mean() - 1.0) < SIGMAS * math.sqrt(8 / len(left))


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_any_number_of_draws(count: int) -> None:
    assert len(os_noise().gaussian(count)) == count
    assert len(os_noise().seeds(count)) == count


def test_extreme_bits_give_finite_noise() -> None:
    top, zero = np.uint64(2**64 - 1), np.uint64(0)
    for word in (zero, top):
        noise = NoiseSource(lambda count, word=word: np.full(count, word), secret=False)  # type: ignore[misc]
        assert np.isfinite(noise.gaussian(4)).all()
        assert noise.poisson(3, 1.0) == [0, 1, 2]
        assert all(0 <= seed < 2**63 for seed in noise.seeds(2))


@sources
@pytest.mark.parametrize("sample_rate", [0.01, 0.3, 0.9])
def test_units_are_drawn_at_the_sample_rate(noise: NoiseSource, sample_rate: float) -> None:
    num_units, num_steps = 50, 2000
    taking_part = np.zeros((num_steps, num_units))
    for step in range(num_steps):
        taking_part[step, noise.poisson(num_units, sample_rate)] = 1
    each = math.sqrt(sample_rate * (1 - sample_rate) / num_steps)
    assert abs(taking_part.mean() - sample_rate) < SIGMAS * each / math.sqrt(num_units)
    assert (np.abs(taking_part.mean(axis=0) - sample_rate) < SIGMAS * each).all()
    # Drawn for itself, a unit makes the number drawn binomial; batches of one size would not.
    variance = num_units * sample_rate * (1 - sample_rate)
    assert taking_part.sum(axis=1).var() == pytest.approx(
        variance, rel=SIGMAS * math.sqrt((2 + 1 / variance) / num_steps)
    )


def test_a_sample_rate_of_one_draws_everyone() -> None:
    assert os_noise().poisson(1000, 1.0) == list(range(1000))


def test_nothing_seeds_the_noise_of_a_site() -> None:
    draws = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the very thing that must not matter
        torch.manual_seed(0)
        draws.append(os_noise().gaussian(8))
    assert not np.intersect1d(draws[0], draws[1]).size
    assert os_noise().secret


def test_seeded_noise_repeats_and_says_that_it_is_no_secret() -> None:
    assert not seeded_noise(1).secret
    assert np.array_equal(seeded_noise([1, 2]).gaussian(9), seeded_noise([1, 2]).gaussian(9))
    assert not np.array_equal(seeded_noise([1, 2]).gaussian(9), seeded_noise([1, 3]).gaussian(9))


@pytest.mark.parametrize(
    ("num_units", "batch_size", "epochs", "sample_rate", "steps"),
    [(100, 4, 1, 0.04, 25), (13, 2, 3, 2 / 13, 21), (3, 4, 2, 1.0, 2), (4, 4, 1, 1.0, 1)],
)
def test_planned(num_units: int, batch_size: int, epochs: int, sample_rate: float, steps: int) -> None:
    config = TrainConfig(batch_size=batch_size, local_epochs=epochs)
    rate, num_steps = planned(num_units=num_units, config=config)
    assert rate == pytest.approx(sample_rate)
    assert num_steps == steps
