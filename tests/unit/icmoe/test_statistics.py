import numpy as np
import pytest

from icmoe.statistics import bootstrap_means, interval, paired_p_value


def test_images_of_a_patient_are_drawn_together() -> None:
    # Ten copies of each patient's image say no more than one: the interval must not shrink.
    rng = np.random.default_rng(0)
    values = rng.normal(0.8, 0.1, 12)
    patients = [str(n) for n in range(12)]
    single = interval(bootstrap_means(values.tolist(), patients, seed=1))
    copied = interval(bootstrap_means(np.repeat(values, 10).tolist(), np.repeat(patients, 10).tolist(), seed=1))
    np.testing.assert_allclose(copied, single)
    as_if_independent = interval(bootstrap_means(np.repeat(values, 10).tolist(), [str(n) for n in range(120)], seed=1))
    assert as_if_independent[1] - as_if_independent[0] < 0.5 * (single[1] - single[0])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        low, high = interval(
            bootstrap_means(rng.normal(0.8, 0.1, 30).tolist(), [str(n) for n in range(30)], seed=trial, draws=500)
        )
        hits += low <= 0.8 <= high
    assert 180 <= hits <= 198  # of a percentile bootstrap with 30 patients: 93 to 94 % of 200


def test_patients_with_more_images_weigh_more_in_a_mean_over_images() -> None:
    draws = bootstrap_means([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"], seed=0)
    assert set(np.unique(draws.round(6))) == {0.0, 0.75, 1.0}


def test_the_same_seed_gives_the_same_interval() -> None:
    arguments = ([0.1, 0.5, 0.9], ["a", "b", "c"])
    np.testing.assert_array_equal(bootstrap_means(*arguments, seed=4), bootstrap_means(*arguments, seed=4))


def test_pairs() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(20)
    better = paired_p_value((base + 0.1).tolist(), base.tolist())
    assert better is not None
    assert better < 0.001
    noise = paired_p_value((base + rng.normal(0, 0.1, 20)).tolist(), base.tolist())
    assert noise is not None
    assert noise > 0.05


@pytest.mark.parametrize("differing", [0, 5])
def test_too_few_pairs_are_not_tested(differing: int) -> None:
    first = [0.5] * 10
    second = [0.6] * differing + [0.5] * (10 - differing)
    assert paired_p_value(first, second) is None
