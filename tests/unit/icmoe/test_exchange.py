from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest

from icmoe.config import CommunicationConfig, ScopeConfig
from icmoe.errors import ExchangeError, IncompatibleUpdateError
from icmoe.exchange import SiteReport, Update, check_report, check_update, expert_of, extract_update, shared_names
from icmoe.types import Array

CONFIG, BACKBONE = "c" * 64, "b" * 64
SHARES = {"basic.0": 0.5, "semantic.0": 0.45, "adaptive.1": 0.05}
SHAPES = {
    "experts.basic.0.up.weight": (2, 3),
    "experts.basic.0.up.bias": (2,),
    "experts.semantic.0.reduce.norm.weight": (4,),
    "experts.adaptive.1.mix.weight": (3, 2),
    "router.gate.weight": (3, 1),
}


def some_arrays(dtype: str = "float32") -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def good_report(**changes: Any) -> SiteReport:
    report = SiteReport(
        site="oslo",
        server_round=3,
        config_digest=CONFIG,
        backbone_digest=BACKBONE,
        numbers={"num_examples": 10.0, "train_loss": 0.5},
        expert_shares=SHARES,
    )
    return replace(report, **changes)


def check(arrays: Mapping[str, Array], report: SiteReport | None = None, **changes: Any) -> None:
    """Check a reply against what the centre sent out: the same tensors, a little different."""
    arguments: dict[str, Any] = {
        "reference": {name: array + np.float32(0.01) for name, array in some_arrays().items()},
        "communication": CommunicationConfig(),
        "max_update_norm": 1.0,
    }
    report = report or good_report()
    check_report(
        report, site=report.site, server_round=3, config_digest=CONFIG, backbone_digest=BACKBONE, num_classes=1
    )
    check_update(Update(report=report, arrays=arrays), **(arguments | changes))


def without(*names: str) -> dict[str, Array]:
    return {name: array for name, array in some_arrays().items() if name not in names}


class TestNames:
    def test_expert_of_a_tensor(self) -> None:
        assert expert_of("experts.basic.0.up.weight") == "basic.0"
        assert expert_of("experts.adaptive.11.branches.0.weight") == "adaptive.11"
        assert expert_of("router.gate.weight") is None

    @pytest.mark.parametrize(
        "name",
        [
            "decoder.weight",
            "experts.basic.0",
            "experts.shared.0.up.weight",
            "expert.basic.0.up.weight",
            "",
            "routers.x",
        ],
    )
    def test_a_foreign_name_is_refused(self, name: str) -> None:
        with pytest.raises(ExchangeError, match="neither experts"):
            expert_of(name)

    def test_all_names_are_shared_by_default(self) -> None:
        names = list(SHAPES)
        assert shared_names(names, ScopeConfig(), frozenset()) == tuple(names)

    @pytest.mark.parametrize("family", ["basic", "semantic", "adaptive", "router"])
    def test_a_local_family_stays(self, family: str) -> None:
        shared = shared_names(list(SHAPES), ScopeConfig.model_validate({family: "local"}), frozenset())
        assert shared == tuple(name for name in SHAPES if family not in name)

    def test_norm_local_wins_over_the_family(self) -> None:
        norm = "experts.semantic.0.reduce.norm.weight"
        shared = shared_names(list(SHAPES), ScopeConfig(norm="local"), frozenset({norm}))
        assert shared == tuple(name for name in SHAPES if name != norm)
        assert norm in shared_names(list(SHAPES), ScopeConfig(), frozenset({norm}))

    def test_norm_global_does_not_win_over_a_local_family(self) -> None:
        norm = "experts.semantic.0.reduce.norm.weight"
        assert norm not in shared_names([norm], ScopeConfig(semantic="local"), frozenset({norm}))

    def test_a_foreign_name_is_never_shared(self) -> None:
        with pytest.raises(ExchangeError, match="neither experts"):
            shared_names(["image_encoder.pos_embed"], ScopeConfig(), frozenset())


class TestExtract:
    def extract(self, arrays: Mapping[str, Array], **communication: Any) -> dict[str, Array]:
        return extract_update(
            arrays, list(SHAPES), expert_shares=SHARES, communication=CommunicationConfig(**communication)
        )

    def test_picks_allowed_names_and_nothing_else(self) -> None:
        arrays = some_arrays() | {"experts.basic.0.secret": np.ones(3, np.float32)}
        update = self.extract(arrays)
        assert list(update) == list(SHAPES)
        assert all(np.array_equal(update[name], arrays[name]) for name in update)

    def test_does_not_hand_out_the_models_own_memory(self) -> None:
        arrays = some_arrays()
        self.extract(arrays)["router.gate.weight"][:] = 9.0
        assert not (arrays["router.gate.weight"] == 9.0).any()

    def test_leaves_out_experts_the_site_hardly_used(self) -> None:
        assert set(SHAPES) - set(self.extract(some_arrays(), min_expert_share=0.1)) == {"experts.adaptive.1.mix.weight"}
        router_only = self.extract(some_arrays(), min_expert_share=0.9)
        assert list(router_only) == ["router.gate.weight"]

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_sends_the_agreed_dtype(self, dtype: Literal["float32", "float16"]) -> None:
        update = self.extract(some_arrays(), dtype=dtype)
        assert {array.dtype for array in update.values()} == {np.dtype(dtype)}

    def test_float16_overflow_sends_nothing(self) -> None:
        arrays = some_arrays()
        arrays["router.gate.weight"][0] = 1e6
        with pytest.raises(ExchangeError, match=r"router\.gate\.weight.*not finite as float16"):
            self.extract(arrays, dtype="float16")
        assert self.extract(arrays)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_tensor_that_is_not_finite_sends_nothing(self, value: float) -> None:
        arrays = some_arrays()
        arrays["experts.basic.0.up.bias"][1] = value
        with pytest.raises(ExchangeError, match=r"up\.bias.*not finite"):
            self.extract(arrays)

    def test_an_allowed_tensor_that_was_not_trained_is_an_error(self) -> None:
        with pytest.raises(ExchangeError, match=r"router\.gate\.weight.*not trained"):
            self.extract(without("router.gate.weight"))


class TestCheck:
    def test_a_good_update_passes(self) -> None:
        check(some_arrays())
        check(some_arrays("float16"), communication=CommunicationConfig(dtype="float16"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda a: a | {"experts.basic.0.extra": np.ones(1, np.float32)}, r"1 unknown tensors.*basic\.0\.extra"),
            (lambda a: a | {"decoder.weight": np.ones(1, np.float32)}, r"1 unknown tensors.*decoder\.weight"),
            (lambda _: without("router.gate.weight"), r"1 tensors are missing.*router\.gate"),
            (lambda _: without("experts.adaptive.1.mix.weight"), r"1 tensors are missing.*adaptive\.1"),
            (lambda _: {}, "5 tensors are missing"),
            (lambda a: a | {"router.gate.weight": np.ones((1, 3), np.float32)}, r"gate\.weight is float32 \(1, 3\)"),
            (lambda a: a | {"router.gate.weight": np.ones((3,), np.float32)}, r"expected float32 \(3, 1\)"),
            (lambda a: a | {"router.gate.weight": np.ones((3, 1))}, "is float64"),
            (lambda a: a | {"router.gate.weight": np.full((3, 1), np.nan, np.float32)}, "not finite"),
            (lambda a: a | {"router.gate.weight": np.full((3, 1), np.inf, np.float32)}, "not finite"),
            (lambda a: a | {"router.gate.weight": a["router.gate.weight"] + 2}, "L2 norm 3.4.*allowed is 1"),
        ],
    )
    def test_wrong_tensors_are_refused(
        self, change: Callable[[dict[str, Array]], dict[str, Array]], message: str
    ) -> None:
        with pytest.raises(IncompatibleUpdateError, match=message):
            check(change(some_arrays()))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"server_round": 2}, "round 2, expected 3"),
            ({"config_digest": "d" * 64}, "run config d+, expected c+"),
            ({"backbone_digest": "d" * 64}, "backbone d+, expected b+"),
            ({"config_digest": CONFIG[:-1] + "0"}, "run config"),
            ({"backbone_digest": BACKBONE[:-1] + "0"}, "backbone"),
            ({"numbers": {"num_examples": 0.0, "train_loss": 0.5}}, "0.0 examples"),
            ({"numbers": {"num_examples": -3.0, "train_loss": 0.5}}, "-3.0 examples"),
            ({"numbers": {"num_examples": np.inf, "train_loss": 0.5}}, "num_examples is inf"),
            ({"numbers": {"train_loss": 0.5}}, "num_examples is missing"),
            ({"numbers": {"num_examples": 3.0, "train_loss": np.nan}}, "train_loss is nan"),
            ({"dice_per_class": [1.5]}, "Dice of a class is 1.5"),
            ({"expert_shares": SHARES | {"basic.0": np.nan}}, "share"),
            ({"expert_shares": SHARES | {"basic.0": -0.5}}, "share"),
            ({"expert_shares": SHARES | {"basic.0": 1000.0}}, "share"),
        ],
    )
    def test_a_wrong_report_is_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(IncompatibleUpdateError, match=message):
            check(some_arrays(), good_report(**changes))

    def test_missing_experts_are_allowed_where_shares_are_agreed(self) -> None:
        agreed = CommunicationConfig(min_expert_share=0.1)
        check(without("experts.adaptive.1.mix.weight"), communication=agreed)
        check(without(*(name for name in SHAPES if name.startswith("experts"))), communication=agreed)

    @pytest.mark.parametrize("name", ["experts.basic.0.up.bias", "router.gate.weight"])
    def test_half_an_expert_or_no_router_is_refused_even_then(self, name: str) -> None:
        with pytest.raises(IncompatibleUpdateError, match="missing"):
            check(without(name), communication=CommunicationConfig(min_expert_share=0.1))

    def test_a_message_names_no_site_and_no_value(self) -> None:
        arrays = some_arrays()
        arrays["router.gate.weight"][0] = 123.456
        with pytest.raises(IncompatibleUpdateError) as refusal:
            check(arrays)
        assert "oslo" not in str(refusal.value)
        assert "123.456" not in str(refusal.value)


def test_update_counts_its_payload() -> None:
    update = Update(report=good_report(), arrays=some_arrays("float16"))
    assert update.num_bytes == 2 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert update.num_examples == 10.0
