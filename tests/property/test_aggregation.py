from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from icmoe.aggregation import weighted_average
from icmoe.exchange import SiteReport, Update
from icmoe.types import Array

NAMES = ("experts.basic.0.up.weight", "experts.semantic.0.project.bias", "router.gate.weight")
SHAPE = (2, 3)
PREVIOUS = {name: np.full(SHAPE, -7.0, dtype=np.float32) for name in NAMES}
few = settings(max_examples=40, deadline=None, database=None, derandomize=True)

tensors = hnp.arrays(np.float32, SHAPE, elements=st.floats(-1e4, 1e4, width=32))
weightings = st.sampled_from(["examples", "votes"])
shares = st.fixed_dictionaries({"basic.0": st.floats(0.01, 1.0), "semantic.0": st.floats(0.01, 1.0)})


def reply(arrays: dict[str, Array], num_examples: float, expert_shares: dict[str, float]) -> Update:
    report = SiteReport(
        site="s",
        server_round=1,
        config_digest="",
        backbone_digest="",
        numbers={"num_examples": num_examples},
        expert_shares=expert_shares,
    )
    return Update(report=report, arrays=arrays)


@st.composite
def updates(draw: st.DrawFn, *, complete: bool = True) -> list[Update]:
    """One to five replies; not ``complete`` means that a reply may lack tensors."""
    replies = []
    for _ in range(draw(st.integers(1, 5))):
        arrays = {name: draw(tensors) for name in NAMES if complete or draw(st.booleans())}
        replies.append(reply(arrays, float(draw(st.integers(1, 1000))), draw(shares)))
    return replies


def average(replies: list[Update], weighting: Literal["examples", "votes"]) -> dict[str, Array]:
    return weighted_average(replies, PREVIOUS, expert_weighting=weighting)


def close(one: dict[str, Array], other: dict[str, Array]) -> None:
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-2)


@few
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.tuples(tensors, tensors, tensors), shares, weightings)
def test_the_mean_of_equal_updates_is_that_update(
    sizes: list[int], values: tuple[Array, Array, Array], share: dict[str, float], weighting: Any
) -> None:
    arrays = dict(zip(NAMES, values, strict=True))
    result = average([reply(arrays, float(size), share) for size in sizes], weighting)
    assert all(np.array_equal(result[name], arrays[name]) for name in NAMES)


@few
@given(st.data(), updates(complete=False), weightings)
def test_the_order_of_sites_does_not_matter(data: st.DataObject, replies: list[Update], weighting: Any) -> None:
    close(average(data.draw(st.permutations(replies)), weighting), average(replies, weighting))


@few
@given(updates(complete=False), st.floats(1e-3, 1e3), weightings)
def test_the_scale_of_all_weights_does_not_matter(replies: list[Update], scale: float, weighting: Any) -> None:
    scaled = [
        reply(dict(update.arrays), scale * update.num_examples, dict(update.report.expert_shares)) for update in replies
    ]
    close(average(scaled, weighting), average(replies, weighting))


@few
@given(updates(complete=False), weightings)
def test_the_result_lies_between_the_smallest_and_the_largest(replies: list[Update], weighting: Any) -> None:
    result = average(replies, weighting)
    for name in NAMES:
        sent = np.stack(
            [update.arrays.get(name, PREVIOUS[name]) for update in replies if name in update.arrays] or [PREVIOUS[name]]
        )
        assert (result[name] >= sent.min(axis=0)).all()
        assert (result[name] <= sent.max(axis=0)).all()


@few
@given(updates(), tensors, weightings)
def test_a_tensor_of_one_site_keeps_its_value(replies: list[Update], only: Array, weighting: Any) -> None:
    name = NAMES[0]
    arrays = [{other: array for other, array in update.arrays.items() if other != name} for update in replies]
    arrays[-1][name] = only
    sparse = [
        reply(each, update.num_examples, dict(update.report.expert_shares))
        for each, update in zip(arrays, replies, strict=True)
    ]
    assert np.array_equal(average(sparse, weighting)[name], only)


@few
@given(updates(complete=False), weightings)
def test_a_tensor_that_nobody_sent_keeps_its_previous_value(replies: list[Update], weighting: Any) -> None:
    result = average(replies, weighting)
    for name in NAMES:
        if not any(name in update.arrays for update in replies):
            assert np.array_equal(result[name], PREVIOUS[name])


@few
@given(updates(), st.floats(0.01, 1.0))
def test_votes_with_equal_shares_are_examples(replies: list[Update], share: float) -> None:
    equal = [
        reply(dict(update.arrays), update.num_examples, {"basic.0": share, "semantic.0": share}) for update in replies
    ]
    close(average(equal, "votes"), average(equal, "examples"))


@pytest.mark.parametrize("weighting", ["examples", "votes"])
def test_a_larger_share_pulls_harder(weighting: Any) -> None:
    low, high = ({name: np.full(SHAPE, value, np.float32) for name in NAMES} for value in (0.0, 1.0))
    results = [
        average(
            [reply(low, 10, {"basic.0": 0.5, "semantic.0": 0.5}), reply(high, 10, {"basic.0": s, "semantic.0": 0.5})],
            weighting,
        )
        for s in (0.1, 0.5, 0.9)
    ]
    pulls = [float(result[NAMES[0]].mean()) for result in results]
    assert (pulls == sorted(set(pulls))) == (weighting == "votes")
    assert len({float(result[NAMES[2]].mean()) for result in results}) == 1
