import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from icmoe.config import CommunicationConfig, ScopeConfig
from icmoe.exchange import Instruction, SiteReport, Update, check_update, expert_of, extract_update, shared_names
from icmoe.flower import pack_instruction, pack_report, unpack_instruction, unpack_report, unpack_update
from icmoe.types import FAMILIES, Array

few = settings(max_examples=30, deadline=None, database=None, derandomize=True)

experts = st.builds("{}.{}".format, st.sampled_from(FAMILIES), st.integers(0, 7))
names = st.one_of(
    st.builds(
        "experts.{}.{}".format, experts, st.sampled_from(["up.weight", "up.bias", "norm.weight", "branches.0.x"])
    ),
    st.sampled_from(["router.gate.weight", "router.sharpness.table.weight"]),
)
shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=3)
anything = st.floats(allow_nan=True, allow_infinity=True, width=16)
singles: st.SearchStrategy[Array] = hnp.arrays(np.float32, shapes, elements=anything)
halves: st.SearchStrategy[Array] = hnp.arrays(np.float16, shapes, elements=anything)
tensors = st.dictionaries(names, singles | halves, max_size=4)
finite_tensors = st.dictionaries(
    names, hnp.arrays(np.float32, st.just((2, 2)), elements=st.floats(-100, 100, width=32)), min_size=1, max_size=8
)
numbers = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9]*(_[a-z0-9]+){0,2}", fullmatch=True).filter(
        lambda name: name not in ("expert_shares", "dice_per_class")
    ),
    st.floats(),
    max_size=4,
)
digests = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
reports = st.builds(
    SiteReport,
    site=st.text(min_size=1, max_size=10),
    server_round=st.integers(0, 10_000),
    config_digest=digests,
    backbone_digest=digests,
    numbers=numbers,
    expert_shares=st.dictionaries(experts, st.floats(0, 1), max_size=4),
    dice_per_class=st.lists(st.floats(0, 1) | st.just(math.nan), max_size=4),
)


def same_tensors(one: dict[str, Array], other: dict[str, Array]) -> None:
    assert set(one) == set(other)
    for name, array in one.items():
        assert (array.dtype, array.shape) == (other[name].dtype, other[name].shape)
        assert array.tobytes() == other[name].tobytes()


def same_report(one: SiteReport, other: SiteReport) -> None:
    for field in ("site", "server_round", "config_digest", "backbone_digest", "expert_shares"):
        assert getattr(one, field) == getattr(other, field)
    assert list(one.expert_shares) == list(other.expert_shares)
    assert set(one.numbers) == set(other.numbers)
    for name, number in one.numbers.items():
        np.testing.assert_equal(number, other.numbers[name])
    np.testing.assert_equal(list(one.dice_per_class), list(other.dice_per_class))


@few
@given(reports, tensors)
def test_an_update_comes_back_from_its_record(report: SiteReport, arrays: dict[str, Array]) -> None:
    update = unpack_update(pack_report(report, arrays))
    same_report(update.report, report)
    same_tensors(dict(update.arrays), arrays)
    same_report(unpack_report(pack_report(report)), report)


@few
@given(st.sampled_from(["train", "validate", "test"]), st.text(max_size=40), digests, st.integers(0, 9999), tensors)
def test_an_instruction_comes_back_from_its_record(
    job: str, run_json: str, digest: str, server_round: int, arrays: dict[str, Array]
) -> None:
    sent = Instruction(job=job, run_json=run_json, config_digest=digest, server_round=server_round, site="a")  # type: ignore[arg-type]
    instruction, back = unpack_instruction(pack_instruction(sent, arrays))
    assert instruction == sent
    same_tensors(back, arrays)


@few
@given(finite_tensors, st.dictionaries(experts, st.floats(0, 1)), st.sampled_from([0.0, 0.1, 0.5]), st.booleans())
def test_what_a_site_extracts_the_centre_accepts(
    arrays: dict[str, Array], shares: dict[str, float], min_expert_share: float, half: bool
) -> None:
    communication = CommunicationConfig(dtype="float16" if half else "float32", min_expert_share=min_expert_share)
    sent = extract_update(arrays, list(arrays), expert_shares=shares, communication=communication)
    report = SiteReport(
        site="s",
        server_round=1,
        config_digest="c",
        backbone_digest="b",
        numbers={"num_examples": 1.0, "train_loss": 0.0},
        expert_shares=shares,
    )
    check_update(
        Update(report=report, arrays=sent),
        reference=arrays,
        communication=communication,
        max_update_norm=10.0,
    )
    for name in set(arrays) - set(sent):
        expert = expert_of(name)
        assert expert is not None
        assert shares.get(expert, 0.0) < min_expert_share


@few
@given(
    st.lists(names, unique=True),
    st.sets(names),
    st.dictionaries(st.sampled_from([*FAMILIES, "norm"]), st.just("local")),
)
def test_shared_names_are_a_subset_in_order(all_names: list[str], norms: set[str], local: dict[str, str]) -> None:
    shared = shared_names(all_names, ScopeConfig.model_validate(local), frozenset(norms))
    assert list(shared) == [name for name in all_names if name in shared]
    for name in all_names:
        family = (expert_of(name) or "router").split(".")[0]
        assert (name in shared) == (family not in local and not (name in norms and "norm" in local))
