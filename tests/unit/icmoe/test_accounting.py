"""Epsilon against published numbers, against sums written out here, against another library, and against itself."""

import math
import random
import subprocess
import sys

import numpy as np
import pytest

from icmoe.errors import BudgetExhaustedError, PrivacyError
from icmoe.privacy.accounting import (
    MIN_NOISE,
    Spend,
    affordable_steps,
    epsilon,
    round_of,
    solve_noise_multiplier,
)

DELTA = 1e-5
WEEKS = Spend(4.0, 4 / 13, 80)


def exact_divergence(sample_rate: float, noise: float, order: float) -> float:
    """Rényi divergence of a step as Mironov, Talwar and Zhang 2019 define it, integrated by the trapezoidal rule.

    A_alpha = E over z from N(0, sigma^2) of ((1 - q) + q exp((2 z - 1) / (2 sigma^2)))^alpha. No series, no library:
    the integrand is smooth and falls like a Gaussian around 0 and around alpha, so the rule is exact to many digits.
    """
    z = np.linspace(-14 * noise, order + 14 * noise, 40_001)
    log_ratio = np.logaddexp(
        np.log1p(-sample_rate) if sample_rate < 1 else -np.inf, np.log(sample_rate) + (2 * z - 1) / (2 * noise**2)
    )
    log_density = -(z**2) / (2 * noise**2) - np.log(noise * np.sqrt(2 * np.pi))
    log_moment = np.logaddexp.reduce(order * log_ratio + log_density) + np.log(z[1] - z[0])
    return float(log_moment) / (order - 1)


def exact_epsilon(spends: list[Spend], delta: float) -> float:
    """The smallest over orders of the conversion of Balle et al. 2020."""
    orders = [1.05, *np.arange(1.1, 12, 0.1), *range(12, 40), *range(40, 200, 5), *range(200, 1000, 40)]

    def at(order: float) -> float:
        divergence = sum(
            spend.num_steps * exact_divergence(spend.sample_rate, spend.noise_multiplier, order) for spend in spends
        )
        return float(divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))

    return max(0.0, min(map(at, orders)))


def other_epsilon(spends: list[Spend], delta: float) -> float:
    """The same by Google's ``dp-accounting``, which shares no code with Opacus; its own orders leave 64 to 128 out."""
    # Costs a second, which quick tests need not pay.
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant([*np.arange(1.1, 11.0, 0.1), *range(11, 128), *range(128, 1024, 16)])
    for spend in spends:
        step = PoissonSampledDpEvent(spend.sample_rate, GaussianDpEvent(spend.noise_multiplier))
        accountant.compose(SelfComposedDpEvent(step, spend.num_steps))
    return float(accountant.get_epsilon(delta))


USUAL_RATES = (0.01, 0.04, 0.1, 4 / 13, 1.0)


def random_settings(count: int, sample_rates: tuple[float, ...]) -> list[tuple[list[Spend], float]]:
    draw = random.Random(20240503)
    return [
        (
            [
                Spend(draw.uniform(1.0, 12.0), draw.choice(sample_rates), draw.randint(1, 400))
                for _ in range(draw.randint(1, 3))
            ],
            draw.choice([1e-6, 1e-5, 1e-3]),
        )
        for _ in range(count)
    ]


def test_golden_epsilon() -> None:
    assert epsilon([Spend(1.5, 0.04, 2250)], delta=DELTA) == pytest.approx(7.3291, abs=5e-5)


def test_golden_epsilon_of_a_plain_gaussian_matches_its_closed_form() -> None:
    # One step on all data: the divergence of two normal distributions, alpha / (2 sigma^2), Mironov 2017.
    spends = [Spend(3.0, 1.0, 7)]
    orders = [1 + step / 1000 for step in range(50, 60000)]
    exact = min(7 * a / 18 + math.log1p(-1 / a) - math.log(DELTA * a) / (a - 1) for a in orders)
    assert epsilon(spends, delta=DELTA) == pytest.approx(exact, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("spends", "delta"), random_settings(20, (*USUAL_RATES, 0.6)))
def test_golden_epsilon_matches_the_formula_of_the_paper(spends: list[Spend], delta: float) -> None:
    assert epsilon(spends, delta=delta) == pytest.approx(exact_epsilon(spends, delta), rel=0.01)


# With a rate of 0.6 its series does not converge at low orders; it leaves them out and comes out up to 14 % higher.
@pytest.mark.slow
@pytest.mark.parametrize(("spends", "delta"), random_settings(20, USUAL_RATES))
def test_golden_epsilon_is_that_of_another_library(spends: list[Spend], delta: float) -> None:
    assert epsilon(spends, delta=delta) == pytest.approx(other_epsilon(spends, delta), rel=0.01)


@pytest.mark.slow
def test_prv_is_below_rdp_and_near_it() -> None:
    for spends in ([WEEKS], [Spend(1.5, 0.04, 2250)], [Spend(4.0, 1.0, 8)], [WEEKS, Spend(6.0, 0.5, 20)]):
        by_rdp, by_prv = (epsilon(spends, delta=DELTA, accountant=name) for name in ("rdp", "prv"))
        assert 0.85 * by_rdp < by_prv < by_rdp


def test_prv_of_a_hopeless_setting_is_refused_quickly() -> None:
    with pytest.raises(PrivacyError, match="computed up to 30"):
        epsilon([Spend(0.3, 0.04, 8000)], delta=DELTA, accountant="prv")


def test_nothing_spends_nothing() -> None:
    for name in ("rdp", "prv"):
        assert epsilon([], delta=DELTA, accountant=name) == 0.0
        assert epsilon([Spend(1.0, 0.5, 0)], delta=DELTA, accountant=name) == 0.0


def test_order_and_split_of_steps_do_not_matter() -> None:
    other = Spend(2.0, 0.1, 30)
    whole = epsilon([WEEKS, other], delta=DELTA)
    assert epsilon([other, Spend(4.0, 4 / 13, 50), Spend(4.0, 4 / 13, 30)], delta=DELTA) == pytest.approx(whole)
    assert max(epsilon([WEEKS], delta=DELTA), epsilon([other], delta=DELTA)) < whole


@pytest.mark.parametrize(("target", "expected"), [(8.0, 1.9703), (3.0, 4.3006), (1.0, 11.3061)])
def test_solved_noise_spends_the_budget_and_no_more(target: float, expected: float) -> None:
    noise = solve_noise_multiplier(target_epsilon=target, delta=DELTA, sample_rate=4 / 13, num_steps=80)
    assert noise == pytest.approx(expected, abs=2e-4)
    assert target * 0.999 < epsilon([Spend(noise, 4 / 13, 80)], delta=DELTA) <= target


def test_solved_noise_makes_room_for_what_was_spent() -> None:
    spent = (Spend(1.5, 0.04, 100),)
    noise = solve_noise_multiplier(target_epsilon=3.0, delta=DELTA, sample_rate=4 / 13, num_steps=80, spent=spent)
    assert 2.997 < epsilon([*spent, Spend(noise, 4 / 13, 80)], delta=DELTA) <= 3.0


def test_solved_noise_of_a_huge_budget_is_the_smallest() -> None:
    assert solve_noise_multiplier(target_epsilon=1e6, delta=DELTA, sample_rate=0.1, num_steps=1) == MIN_NOISE


@pytest.mark.parametrize("target", [1.0, 1e-4])
def test_no_noise_is_enough(target: float) -> None:
    spent = (WEEKS,) if target == 1.0 else ()
    with pytest.raises(BudgetExhaustedError, match="no noise makes 80 more steps fit"):
        solve_noise_multiplier(target_epsilon=target, delta=DELTA, sample_rate=4 / 13, num_steps=80, spent=spent)


@pytest.mark.parametrize("spent", [(), (Spend(2.0, 0.1, 30),)])
def test_affordable_steps_are_the_last_that_fit(spent: tuple[Spend, ...]) -> None:
    steps = affordable_steps(max_epsilon=3.0, delta=DELTA, noise_multiplier=4.0, sample_rate=4 / 13, spent=spent)
    assert steps > 0
    assert epsilon([*spent, Spend(4.0, 4 / 13, steps)], delta=DELTA) <= 3.0
    assert epsilon([*spent, Spend(4.0, 4 / 13, steps + 1)], delta=DELTA) > 3.0


def test_nothing_fits_into_a_spent_budget() -> None:
    assert affordable_steps(max_epsilon=1.0, delta=DELTA, noise_multiplier=4.0, sample_rate=0.3, spent=(WEEKS,)) == 0


@pytest.mark.parametrize(
    ("num_units", "batch_size", "expected"),
    [(13, 4, (4 / 13, 8)), (3, 4, (1.0, 2)), (4, 4, (1.0, 2)), (5, 4, (0.8, 4))],
)
def test_a_round_in_steps(num_units: int, batch_size: int, expected: tuple[float, int]) -> None:
    assert round_of(num_units=num_units, batch_size=batch_size, local_epochs=2) == expected


@pytest.mark.parametrize("numbers", [(0.0, 0.5, 1), (math.inf, 0.5, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.5, -1)])
def test_impossible_steps_are_refused(numbers: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match=r"must be|cannot be"):
        Spend(*numbers)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon([WEEKS], delta=delta)


def test_importing_it_imports_no_torch() -> None:
    names = "icmoe.privacy.accounting, icmoe_client.ledger, icmoe.commands.privacy"
    code = f"import {names}, sys; print(sorted({{'torch', 'opacus', 'flwr'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
