from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from icmoe.config import FederationConfig
from icmoe.exchange import SiteReport, Update
from icmoe.types import Array
from icmoe_server.optimizers import make_optimizer

WEIGHT, ROUTER = "experts.basic.0.up.weight", "router.gate.weight"
ALL = ["fedavg", "fedprox", "fedadam", "fedyogi", "fedmedian", "fedtrimmedavg", "krum"]
PREVIOUS: dict[str, Array] = {WEIGHT: np.zeros(2, np.float32), ROUTER: np.ones((1, 1), np.float32)}


def configured(strategy: str, **more: Any) -> FederationConfig:
    return FederationConfig.model_validate({"strategy": strategy, **more})


def updates(*values: float, dtype: npt.DTypeLike = np.float32, examples: Sequence[int] = ()) -> list[Update]:
    counts = examples or [1] * len(values)
    return [
        Update(
            SiteReport(f"s{index}", 1, "", "", {"num_examples": count}, {"basic.0": 1.0}),
            {WEIGHT: np.array([value, -value], dtype), ROUTER: np.full((1, 1), value, dtype)},
        )
        for index, (value, count) in enumerate(zip(values, counts, strict=True))
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("strategy", ALL)
def test_a_step_gives_finite_float32_of_the_same_shape(strategy: str, dtype: npt.DTypeLike) -> None:
    given = updates(0.1, 0.2, 0.3, dtype=dtype)
    result = make_optimizer(configured(strategy)).step(1, given, PREVIOUS)
    assert list(result) == list(PREVIOUS)
    for name, array in result.items():
        assert array.dtype == np.float32
        assert array.shape == PREVIOUS[name].shape
        assert np.isfinite(array).all()
        assert not np.array_equal(array, PREVIOUS[name])
    assert [update.arrays[WEIGHT].dtype for update in given] == [dtype] * 3, "the replies were changed"


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("count", [1, 2])
def test_few_replies_are_enough(strategy: str, count: int) -> None:
    result = make_optimizer(configured(strategy)).step(1, updates(*[0.5] * count), PREVIOUS)
    if strategy not in ("fedadam", "fedyogi"):
        np.testing.assert_allclose(result[WEIGHT], [0.5, -0.5])


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
def test_average_is_weighted_by_examples(strategy: str) -> None:
    result = make_optimizer(configured(strategy)).step(1, updates(1.0, 4.0, examples=[2, 1]), PREVIOUS)
    np.testing.assert_allclose(result[WEIGHT], [2.0, -2.0])


def test_median() -> None:
    result = make_optimizer(configured("fedmedian")).step(1, updates(0.1, 0.3, 900.0, examples=[1, 1, 99]), PREVIOUS)
    np.testing.assert_allclose(result[WEIGHT], [0.3, -0.3], rtol=1e-6)


def test_trimmed_mean_cuts_both_ends() -> None:
    given = updates(-50.0, 1.0, 2.0, 3.0, 900.0)
    result = make_optimizer(configured("fedtrimmedavg", trim=0.2)).step(1, given, PREVIOUS)
    np.testing.assert_allclose(result[WEIGHT], [2.0, -2.0])


def test_krum_takes_one_reply_from_the_crowd() -> None:
    given = updates(0.9, 1.0, 1.1, 1.05, 700.0)
    result = make_optimizer(configured("krum", num_malicious=1)).step(1, given, PREVIOUS)
    assert any(np.array_equal(result[WEIGHT], update.arrays[WEIGHT]) for update in given[:4])


def test_adam_by_hand() -> None:
    """One step of Adam on the mean change (0.2), from Flower's defaults beta 0.9 and 0.99."""
    config = configured("fedadam", server_learning_rate=0.01, server_tau=1e-3)
    result = make_optimizer(config).step(1, updates(0.1, 0.3), PREVIOUS)
    delta, m, v = 0.2, 0.1 * 0.2, 0.01 * 0.2**2
    eta = 0.01 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    assert delta > 0
    np.testing.assert_allclose(result[WEIGHT], [eta * m / (np.sqrt(v) + 1e-3)] * np.array([1, -1]), rtol=1e-5)


@pytest.mark.parametrize("strategy", ALL)
def test_a_restored_optimizer_goes_on_like_one_that_never_stopped(strategy: str) -> None:
    config, rounds = configured(strategy), [updates(0.1, 0.3), updates(0.4, -0.2), updates(0.0, 0.9)]
    steady, model = make_optimizer(config), dict(PREVIOUS)
    models = []
    for server_round, given in enumerate(rounds, start=1):
        model = steady.step(server_round, given, model)
        models.append((model, {name: array.copy() for name, array in steady.state().items()}))

    again = make_optimizer(config)
    again.restore(models[1][1])
    resumed = again.step(3, rounds[2], models[1][0])
    for name, array in models[2][0].items():
        assert np.array_equal(resumed[name], array)
    assert bool(models[1][1]) == (strategy in ("fedadam", "fedyogi"))


@pytest.mark.parametrize("strategy", ["fedadam", "fedyogi"])
def test_adaptive_state_can_be_stored(strategy: str) -> None:
    optimizer = make_optimizer(configured(strategy))
    assert optimizer.state() == {}
    optimizer.restore({})
    optimizer.step(1, updates(0.1, 0.3), PREVIOUS)
    assert set(optimizer.state()) == {f"{kind}/{name}" for kind in "mv" for name in PREVIOUS}


def test_votes_weight_an_expert_but_not_the_router() -> None:
    one, other = updates(1.0, 4.0)
    one = Update(SiteReport("s0", 1, "", "", {"num_examples": 1}, {"basic.0": 0.9}), one.arrays)
    other = Update(SiteReport("s1", 1, "", "", {"num_examples": 1}, {"basic.0": 0.45}), other.arrays)
    for strategy in ("fedavg", "fedadam"):
        config = configured(strategy, expert_weighting="votes", server_learning_rate=1.0)
        result = make_optimizer(config).step(1, [one, other], PREVIOUS)
        if strategy == "fedavg":
            np.testing.assert_allclose(result[WEIGHT], [2.0, -2.0])
            np.testing.assert_allclose(result[ROUTER], [[2.5]])
