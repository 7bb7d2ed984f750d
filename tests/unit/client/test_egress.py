"""What may leave a site, and what may not."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from icmoe.errors import PrivacyError
from icmoe.exchange import SiteReport
from icmoe.receipts import describe_tensors, flat_metrics
from icmoe_client.egress import METRICS, EgressRules, release

WEIGHT, BIAS = "experts.basic.0.up.weight", "router.gate.bias"
RULES = EgressRules(allowed={WEIGHT: ((2, 2), "float32"), BIAS: ((2,), "float32")}, dp=False)
PRIVATE = replace(RULES, dp=True, fixed_examples=40)
REPORT = SiteReport(
    site="oslo",
    server_round=3,
    config_digest="c" * 64,
    backbone_digest="b" * 64,
    numbers={
        "num_examples": 40, "trainable_params": 900, "dice": 0.75, "hd95": 4.5, "hd95_in_mm": 1.0, "num_scored": 9,
        "found": 43, "used": 40, "skipped": 3, "empty_masks": 2, "num_steps": 20, "train_loss": 0.8, "epsilon": 2.5,
    },
    expert_shares={"basic.0": 0.25, "adaptive.1": 0.75},
    dice_per_class=[0.5, math.nan],
)  # fmt: skip


def tensors() -> dict[str, Any]:
    return {WEIGHT: np.ones((2, 2), np.float32), BIAS: np.zeros(2, np.float32)}


def with_numbers(**numbers: Any) -> SiteReport:
    return replace(REPORT, numbers={**REPORT.numbers, **numbers})


class Half(float):
    """A float that carries more than its value."""


def test_egress_lets_the_whole_of_a_plain_report_pass() -> None:
    report, arrays = release(REPORT, tensors(), rules=RULES)
    assert report.numbers == REPORT.numbers
    assert report.expert_shares == REPORT.expert_shares
    np.testing.assert_array_equal(report.dice_per_class, REPORT.dice_per_class)
    assert arrays is not None
    assert set(arrays) == {WEIGHT, BIAS}
    assert release(REPORT, None, rules=RULES)[1] is None


def test_egress_hands_out_copies_that_stay_what_was_checked() -> None:
    given = tensors()
    _, arrays = release(REPORT, given, rules=RULES)
    assert arrays is not None
    described = describe_tensors(arrays)
    given[WEIGHT][:] = 7
    assert describe_tensors(arrays) == described
    with pytest.raises(ValueError, match="read-only"):
        arrays[WEIGHT][0, 0] = 7


@pytest.mark.parametrize(
    "spoil",
    [
        lambda arrays: arrays.update({"experts.basic.0.up.bias": np.ones(2, np.float32)}),
        lambda arrays: arrays.update({"experts.basic.00.up.weight": arrays.pop(WEIGHT)}),
        lambda arrays: arrays.update({WEIGHT: arrays[WEIGHT].astype(np.float64)}),
        lambda arrays: arrays.update({WEIGHT: arrays[WEIGHT].astype(">f4")}),
        lambda arrays: arrays.update({WEIGHT: arrays[WEIGHT].reshape(4)}),
        lambda arrays: arrays.update({WEIGHT: arrays[WEIGHT].tolist()}),
        lambda arrays: arrays.update({WEIGHT: np.ma.masked_array(arrays[WEIGHT])}),
        lambda arrays: arrays.update({WEIGHT: arrays[WEIGHT].astype(np.dtype("f4", metadata={"patient": "4711"}))}),
        lambda arrays: arrays[WEIGHT].__setitem__((0, 0), np.nan),
        lambda arrays: arrays[WEIGHT].__setitem__((1, 1), -np.inf),
    ],
    ids=["extra", "renamed", "float64", "other-endian", "shape", "list", "subclass", "metadata", "nan", "infinite"],
)
def test_egress_refuses_a_tensor_that_is_not_on_the_list(spoil: Callable[[dict[str, Any]], None]) -> None:
    arrays = tensors()
    spoil(arrays)
    with pytest.raises(PrivacyError, match="nothing was sent"):
        release(REPORT, arrays, rules=RULES)


def test_egress_refuses_a_list_that_names_something_else_than_experts() -> None:
    name = "backbone.patch_embed.weight"
    with pytest.raises(PrivacyError, match="no expert's"):
        release(REPORT, {name: np.ones(1, np.float32)}, rules=replace(RULES, allowed={name: ((1,), "float32")}))


@pytest.mark.parametrize(
    "report",
    [
        with_numbers(patient_smith=1.0),
        with_numbers(expert_shares=0.5),
        with_numbers(dice="0.75 Smith"),
        with_numbers(dice=Half(0.5)),
        with_numbers(dice=np.float64(0.5)),
        with_numbers(hd95_in_mm=True),
        with_numbers(dice=math.nan),
        with_numbers(train_loss=math.inf),
        with_numbers(dice=1.0000001),
        with_numbers(num_examples=40.5),
        with_numbers(found=-1),
        replace(REPORT, site="oslo: Smith, 1950-01-01"),
        replace(REPORT, site="oslo\n"),
        replace(REPORT, config_digest="Smith"),
        replace(REPORT, backbone_digest="B" * 64),
        replace(REPORT, server_round=True),
        replace(REPORT, server_round=10**9),
        replace(REPORT, expert_shares={"Smith": 0.5}),
        replace(REPORT, expert_shares={"basic.0": 1.5}),
        replace(REPORT, expert_shares={"basic.0": math.nan}),
        replace(REPORT, dice_per_class=[2.0]),
        replace(REPORT, dice_per_class=["Smith"]),  # type: ignore[list-item]
        replace(REPORT, dice_per_class=np.array([0.5])),  # type: ignore[arg-type]
    ],
)
def test_egress_refuses_numbers_and_text_that_are_not_on_the_list(report: SiteReport) -> None:
    with pytest.raises(PrivacyError, match="nothing was sent") as refused:
        release(report, tensors(), rules=RULES)
    for secret in ("smith", "1950", "1.5", "40.5", "0.75", "1.0000001", "nan"):
        assert secret not in str(refused.value).lower()


def test_egress_with_differential_privacy_leaves_only_what_is_no_exact_count() -> None:
    report, _ = release(REPORT, tensors(), rules=PRIVATE)
    assert set(report.numbers) == {"num_examples", "trainable_params", "epsilon", "dice", "hd95", "hd95_in_mm"}
    assert report.expert_shares == {}
    assert report.dice_per_class == ()
    assert PRIVATE.count(13) is None
    assert RULES.count(13) == 13


@pytest.mark.parametrize("fixed", [None, 41])
def test_egress_with_differential_privacy_needs_the_fixed_weight(fixed: int | None) -> None:
    with pytest.raises(PrivacyError, match="fixed in the site file") as refused:
        release(REPORT, tensors(), rules=replace(PRIVATE, fixed_examples=fixed))
    assert "40" not in str(refused.value)


def test_egress_withholds_small_counts_and_what_gives_them_away() -> None:
    rules = replace(RULES, min_cell=5)
    report, _ = release(REPORT, tensors(), rules=rules, images_per_class=[9, 4])
    assert set(REPORT.numbers) - set(report.numbers) == {"skipped", "empty_masks", "found"}
    assert report.dice_per_class[0] == 0.5
    per_class = release(replace(REPORT, dice_per_class=[0.5, 0.7]), None, rules=rules, images_per_class=[4, 9])[0]
    np.testing.assert_array_equal(per_class.dice_per_class, [math.nan, 0.7])
    assert release(REPORT, tensors(), rules=rules)[0].dice_per_class == ()
    assert rules.count(4) is None


def test_egress_withholds_scores_of_few_images() -> None:
    report, _ = release(with_numbers(num_scored=4), None, rules=replace(RULES, min_cell=5), images_per_class=[4, 4])
    assert not {"dice", "hd95", "hd95_in_mm", "num_scored"} & set(report.numbers)
    assert report.dice_per_class == ()
    unknown = replace(REPORT, numbers={"dice": 0.5})
    assert release(unknown, None, rules=replace(RULES, min_cell=5))[0].numbers == {}


def test_egress_of_a_site_below_min_cell_needs_a_fixed_weight() -> None:
    few = with_numbers(num_examples=3, used=3, found=6)
    with pytest.raises(PrivacyError, match="fixed num_examples"):
        release(few, tensors(), rules=replace(RULES, min_cell=5))
    report, _ = release(
        with_numbers(num_examples=10, used=3), tensors(), rules=replace(RULES, min_cell=5, fixed_examples=10)
    )
    assert report.numbers["num_examples"] == 10
    assert not {"used", "train_loss", "num_steps"} & set(report.numbers)
    assert report.expert_shares == {}


def test_egress_keeps_shares_back_where_the_site_says_so() -> None:
    assert release(REPORT, tensors(), rules=replace(RULES, release_shares=False))[0].expert_shares == {}


def test_egress_noise_blurs_scores_and_nothing_else() -> None:
    rules = replace(RULES, metric_noise=0.05)
    drawn = [release(REPORT, None, rules=rules)[0] for _ in range(300)]
    dice = [report.numbers["dice"] for report in drawn]
    assert 0.04 < np.std(dice) < 0.06
    assert abs(np.mean(dice) - 0.75) < 0.02
    assert all(0 <= share <= 1 for report in drawn for share in report.expert_shares.values())
    assert {report.numbers["train_loss"] for report in drawn} == {0.8}
    assert math.isnan(drawn[0].dice_per_class[1])


def test_egress_table_speaks_of_every_number_of_a_receipt() -> None:
    named = {name.split(".")[0] for name in flat_metrics(REPORT)}
    assert named == set(METRICS)
