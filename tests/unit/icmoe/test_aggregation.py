import numpy as np
import pytest

from icmoe.aggregation import weighted_average
from icmoe.exchange import SiteReport, Update
from icmoe.types import Array

BASIC, ROUTER = "experts.basic.0.up.weight", "router.gate.weight"


def reply(arrays: dict[str, Array], num_examples: float = 1.0, share: float = 1.0) -> Update:
    report = SiteReport(
        site="s",
        server_round=1,
        config_digest="",
        backbone_digest="",
        numbers={"num_examples": num_examples},
        expert_shares={"basic.0": share},
    )
    return Update(report=report, arrays=arrays)


def value(number: float, dtype: str = "float32") -> Array:
    return np.full((2, 2), number, dtype=dtype)


PREVIOUS = {BASIC: value(-1.0), ROUTER: value(-2.0)}


def test_weights_are_the_examples() -> None:
    updates = [reply({BASIC: value(0.0), ROUTER: value(0.0)}, 1), reply({BASIC: value(4.0), ROUTER: value(8.0)}, 3)]
    result = weighted_average(updates, PREVIOUS, expert_weighting="examples")
    assert np.array_equal(result[BASIC], value(3.0))
    assert np.array_equal(result[ROUTER], value(6.0))


def test_a_tensor_of_one_site_keeps_its_value() -> None:
    updates = [reply({BASIC: value(4.0), ROUTER: value(1.0)}, 3), reply({ROUTER: value(1.0)}, 1)]
    result = weighted_average(updates, PREVIOUS, expert_weighting="examples")
    assert np.array_equal(result[BASIC], value(4.0))


def test_a_tensor_that_nobody_sent_keeps_its_previous_value() -> None:
    result = weighted_average([reply({ROUTER: value(1.0)})], PREVIOUS, expert_weighting="examples")
    assert np.array_equal(result[BASIC], PREVIOUS[BASIC])


def test_without_any_update_nothing_changes() -> None:
    result = weighted_average([], PREVIOUS, expert_weighting="examples")
    assert all(np.array_equal(result[name], PREVIOUS[name]) for name in PREVIOUS)


def test_votes_weight_experts_by_share_and_the_router_by_examples() -> None:
    updates = [
        reply({BASIC: value(0.0), ROUTER: value(0.0)}, num_examples=10, share=0.1),
        reply({BASIC: value(1.0), ROUTER: value(1.0)}, num_examples=10, share=0.4),
    ]
    result = weighted_average(updates, PREVIOUS, expert_weighting="votes")
    np.testing.assert_allclose(result[BASIC], 0.8)
    np.testing.assert_allclose(result[ROUTER], 0.5)


def test_an_expert_without_a_vote_keeps_its_previous_value() -> None:
    result = weighted_average(
        [reply({BASIC: value(5.0), ROUTER: value(5.0)}, share=0.0)], PREVIOUS, expert_weighting="votes"
    )
    assert np.array_equal(result[BASIC], PREVIOUS[BASIC])
    assert np.array_equal(result[ROUTER], value(5.0))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_result_is_float32(dtype: str) -> None:
    updates = [reply({BASIC: value(1.0, dtype), ROUTER: value(2.0, dtype)}) for _ in range(2)]
    previous = {name: array.astype(dtype) for name, array in PREVIOUS.items()}
    for result in (
        weighted_average(updates, previous, expert_weighting="examples"),
        weighted_average([], previous, expert_weighting="examples"),
    ):
        assert {array.dtype for array in result.values()} == {np.dtype("float32")}


def test_only_names_of_the_global_model_come_out() -> None:
    extra = reply({BASIC: value(1.0), ROUTER: value(1.0), "experts.basic.0.extra": value(1.0)})
    assert set(weighted_average([extra], PREVIOUS, expert_weighting="examples")) == set(PREVIOUS)


def test_half_precision_sums_do_not_overflow() -> None:
    updates = [reply({BASIC: value(6e4, "float16"), ROUTER: value(6e4, "float16")}) for _ in range(4)]
    result = weighted_average(updates, PREVIOUS, expert_weighting="examples")
    np.testing.assert_allclose(result[BASIC], np.float16(6e4))


def test_inputs_stay_as_they_were() -> None:
    arrays = {BASIC: value(1.0), ROUTER: value(1.0)}
    previous = {name: array.copy() for name, array in PREVIOUS.items()}
    weighted_average([reply(arrays, 3), reply(arrays, 5)], previous, expert_weighting="votes")
    assert np.array_equal(arrays[BASIC], value(1.0))
    assert all(np.array_equal(previous[name], PREVIOUS[name]) for name in PREVIOUS)
