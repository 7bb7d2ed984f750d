"""Whatever a site tries to send, only what is on the lists leaves; whatever a log says, it says it in one way."""

import math
from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from icmoe.errors import PrivacyError
from icmoe.exchange import SiteReport
from icmoe.receipts import Receipt, describe_tensors, flat_metrics, parse_line
from icmoe_client.egress import METRICS, EgressRules, release

few = settings(max_examples=150, deadline=None, database=None, derandomize=True)
ALLOWED = {
    "experts.basic.0.up.weight": ((2, 2), "float32"),
    "experts.adaptive.1.up.bias": ((3,), "float16"),
    "router.gate.weight": ((), "float32"),
}
SCALARS = sorted(set(METRICS) - {"expert_shares", "dice_per_class"})

names = (
    st.sampled_from(sorted(ALLOWED)) | st.from_regex(r"(experts|router)\.[a-z0-9.]{1,12}", fullmatch=True) | st.text()
)
dtypes = st.sampled_from([np.float32, np.float16, np.float64, np.int32, np.bool_])
shapes = st.sampled_from([(2, 2), (3,), (), (4,), (1, 3)])
tensors = st.dictionaries(names, dtypes.flatmap(lambda dtype: hnp.arrays(dtype, shapes)), max_size=3)
anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.floats().map(np.float64)
reports = st.builds(
    SiteReport,
    site=st.sampled_from(["oslo", "St. Olav"]) | st.text(max_size=5),
    server_round=st.integers(-1, 10**7) | anything,
    config_digest=st.just("c" * 64) | st.text(max_size=70),
    backbone_digest=st.just("b" * 64) | st.text(max_size=70),
    numbers=st.dictionaries(st.sampled_from(SCALARS) | st.text(max_size=8), anything, max_size=5),
    expert_shares=st.dictionaries(
        st.sampled_from(["basic.0", "adaptive.12"]) | st.text(max_size=8), anything, max_size=3
    ),
    dice_per_class=st.lists(anything, max_size=3),
)


@st.composite
def good_reports(draw: st.DrawFn) -> SiteReport:
    """Reports that may leave, with every subset of numbers."""

    def value(name: str) -> float:
        rule = METRICS[name]
        whole = rule.kind in ("count", "flag")
        return draw(st.integers(int(rule.low), int(rule.high)) if whole else st.floats(rule.low, rule.high))

    chosen = draw(st.lists(st.sampled_from(SCALARS), unique=True))
    return SiteReport(
        site="oslo",
        server_round=draw(st.integers(0, 10**6)),
        config_digest="c" * 64,
        backbone_digest="b" * 64,
        numbers={name: value(name) for name in chosen},
        expert_shares=draw(st.dictionaries(st.sampled_from(["basic.0", "adaptive.1"]), st.floats(0, 1))),
        dice_per_class=draw(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=4)),
    )


def check(report: SiteReport, rules: EgressRules) -> None:
    """What left is on the lists and plain."""
    assert set(report.numbers) <= set(METRICS)
    values = [*report.numbers.values(), *report.expert_shares.values(), *report.dice_per_class]
    assert {type(value) for value in values} <= {float}
    for name, value in report.numbers.items():
        assert METRICS[name].low <= value <= METRICS[name].high
        if rules.dp:
            assert METRICS[name].leaves == "always"
        if METRICS[name].cell == name and name != "num_examples":
            assert value >= rules.min_cell
    if rules.dp:
        assert (report.expert_shares, report.dice_per_class) == ({}, ())


@few
@given(reports, tensors, st.booleans(), st.integers(0, 10))
def test_egress_of_anything_is_refused_or_on_the_lists(
    report: SiteReport, arrays: dict[str, Any], dp: bool, min_cell: int
) -> None:
    rules = EgressRules(allowed=ALLOWED, dp=dp, min_cell=min_cell, fixed_examples=40 if dp else None)
    try:
        released, sent = release(report, arrays, rules=rules)
    except PrivacyError:
        return
    check(released, rules)
    assert sent is not None
    for name, array in sent.items():
        assert (array.shape, array.dtype.name) == ALLOWED[name]
        assert np.isfinite(array).all()


@few
@given(good_reports(), st.booleans(), st.integers(0, 50), st.integers(1, 100))
def test_egress_of_a_good_report_leaves_nothing_but_parts_of_it(
    report: SiteReport, dp: bool, min_cell: int, fixed: int
) -> None:
    if "num_examples" in report.numbers:
        report = SiteReport(**{**vars(report), "numbers": {**report.numbers, "num_examples": fixed}})
    rules = EgressRules(allowed=ALLOWED, dp=dp, min_cell=min_cell, fixed_examples=fixed)
    released, sent = release(report, None, rules=rules, images_per_class=[min_cell] * len(report.dice_per_class))
    assert sent is None
    check(released, rules)
    assert released.numbers.items() <= report.numbers.items()
    again, _ = release(released, None, rules=rules, images_per_class=[min_cell] * len(released.dice_per_class))
    assert set(again.numbers) <= set(released.numbers)


@few
@given(
    good_reports(),
    st.dictionaries(
        st.sampled_from(sorted(ALLOWED)),
        hnp.arrays(np.float32, hnp.array_shapes(min_dims=0), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    ),
    st.none() | st.integers(0, 10**6),
)
def test_audit_line_has_one_text(report: SiteReport, arrays: dict[str, Any], patients: int | None) -> None:
    receipt = Receipt(
        number=1, previous="0" * 64, time="2026-01-31T08:00:00+00:00", site="oslo", key="1" * 64, run="demo",
        round=report.server_round, job="train", config="c" * 64, backbone="b" * 64, tensors=describe_tensors(arrays),
        metrics=flat_metrics(report), patients=patients, images=None, epsilon=None,
    )  # fmt: skip
    text = receipt.to_json()
    assert Receipt.from_json(text) == receipt
    assert parse_line(text.encode()) == receipt


@few
@given(st.binary(max_size=200))
def test_audit_reads_any_bytes(line: bytes) -> None:
    assume(not line.startswith(b'{"'))
    assert parse_line(line) is None
