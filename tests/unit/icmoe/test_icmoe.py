from collections import Counter
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from icmoe.config import ExpertsConfig, ModelConfig
from icmoe.modeling.backbone import Backbone
from icmoe.modeling.build import build_icmoe
from icmoe.modeling.decoder import FrozenDecoder
from icmoe.modeling.icmoe import IcMoe, IcMoeOutput

CLASSES, SIDE, GRID, DETAIL = 3, 8, 16, 32


class TinyDecoder(nn.Module):
    """A frozen decoder with FrozenDecoder's face: products of embedding and tokens, four times finer."""

    embedding_size = SIDE

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(256, 256, 1)
        self.mask_tokens = torch.randn(4, 256)
        self.requires_grad_(False)

    def forward(self, image_embeddings: Tensor, class_tokens: Tensor) -> Tensor:
        logits = torch.einsum("bchw,bkc->bkhw", self.mix(image_embeddings), class_tokens) / 16
        return nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")


def tiny_backbone() -> Backbone:
    decoder = cast("FrozenDecoder", TinyDecoder())
    return Backbone(name="tiny", image_encoder=nn.Identity(), decoder=decoder, image_size=DETAIL, pixel_norm="minmax")


def tiny_model(backbone: Backbone, experts: ExpertsConfig | None = None, **settings: Any) -> IcMoe:
    """A model off its starting point, where several parts are zero."""
    config = ModelConfig(width=16, experts=experts or ExpertsConfig(), **settings)
    model = build_icmoe(config, num_classes=CLASSES, backbone=backbone, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 256, SIDE, SIDE), torch.rand(batch, 3, DETAIL, DETAIL)


def run(experts: ExpertsConfig | None = None, *, with_basic: bool = True, **settings: Any) -> IcMoeOutput:
    backbone = tiny_backbone()
    output = tiny_model(backbone, experts, **settings)(*inputs(), backbone.decoder, with_basic=with_basic)
    assert isinstance(output, IcMoeOutput)
    return output


def test_shapes() -> None:
    output = run()
    assert output.probabilities.shape == (2, CLASSES, GRID, GRID)
    assert output.expert_log_probabilities.shape == (2, 4, CLASSES, GRID, GRID)
    assert output.gate_log_probabilities.shape == output.votes.shape == (2, 4, GRID, GRID)
    assert output.pixels is not None
    assert output.pixels.shape == (2, 32, GRID, GRID)
    assert output.prototypes is not None
    assert output.prototypes.shape == (2, CLASSES, 32)
    torch.testing.assert_close(output.votes.sum(dim=1), torch.ones(2, GRID, GRID))
    torch.testing.assert_close(output.probabilities.sum(dim=1), torch.ones(2, GRID, GRID))


def test_all_tensors_are_trainable_and_named_by_family() -> None:
    model = tiny_model(tiny_backbone())
    families = ("experts.basic.0.", "experts.semantic.0.", "experts.adaptive.0.", "experts.adaptive.1.", "router.")
    assert list(model.state_dict()) == model.adapter_params()
    assert all(name.startswith(families) for name in model.adapter_params())
    assert all(any(name.startswith(family) for name in model.adapter_params()) for family in families)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.expert_names == ("basic.0", "semantic.0", "adaptive.0", "adaptive.1")


def test_a_forward_pass_registers_nothing() -> None:
    backbone = tiny_backbone()
    model = tiny_model(backbone)
    before = list(model.state_dict())
    model(*inputs(), backbone.decoder)
    assert list(model.state_dict()) == before


def test_nothing_looks_across_the_batch() -> None:
    kinds = {type(module).__name__ for module in tiny_model(tiny_backbone()).modules()}
    assert not [kind for kind in kinds if "BatchNorm" in kind or "InstanceNorm" in kind]


@pytest.mark.parametrize("with_basic", [True, False])
def test_no_module_is_called_twice_in_one_forward(with_basic: bool) -> None:
    backbone = tiny_backbone()
    model = tiny_model(backbone)
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model(*inputs(), backbone.decoder, with_basic=with_basic)
    assert set(calls.values()) == {1}
    holders = [name.rpartition(".")[0] for name, _ in model.named_parameters()]
    expected = [name for name in holders if with_basic or not name.startswith("experts.basic")]
    assert set(expected) <= set(calls)


def test_opacus_accepts_the_model() -> None:
    validation = pytest.importorskip("opacus.validators")
    assert validation.ModuleValidator.validate(tiny_model(tiny_backbone()), strict=False) == []


def test_without_basic_the_others_share_the_vote() -> None:
    backbone = tiny_backbone()
    model = tiny_model(backbone)
    x = inputs()
    full, part = model(*x, backbone.decoder), model(*x, backbone.decoder, with_basic=False)
    torch.testing.assert_close(part.expert_log_probabilities, full.expert_log_probabilities[:, 1:])
    gate = full.gate_log_probabilities[:, 1:]
    torch.testing.assert_close(part.gate_log_probabilities, gate - gate.logsumexp(dim=1, keepdim=True))
    torch.testing.assert_close(part.votes.sum(dim=1), torch.ones(2, GRID, GRID))


def test_without_basic_is_ignored_where_there_are_no_others() -> None:
    output = run(ExpertsConfig(basic=2, semantic=0, adaptive=0), with_basic=False)
    assert output.votes.shape[1] == 2
    assert output.pixels is None
    assert output.prototypes is None


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_without_basic_top_k_still_works(top_k: int) -> None:
    votes = run(with_basic=False, top_k=top_k).votes
    assert votes.shape[1] == 3
    torch.testing.assert_close(votes.sum(dim=1), torch.ones(2, GRID, GRID))


@pytest.mark.parametrize("family", ["basic", "semantic", "adaptive"])
def test_a_single_expert_is_the_model(family: str) -> None:
    counts = {"basic": 0, "semantic": 0, "adaptive": 0, family: 1}
    output = run(ExpertsConfig(**counts))
    torch.testing.assert_close(output.probabilities, output.expert_log_probabilities[:, 0].exp())


def test_swapping_experts_with_their_gate_rows_changes_nothing() -> None:
    backbone = tiny_backbone()
    model, x = tiny_model(backbone), inputs()
    before = model(*x, backbone.decoder)
    with torch.no_grad():
        pairs = zip(*(model.experts["adaptive"].get_submodule(i).parameters() for i in "01"), strict=True)
        for one, other in pairs:
            one_value = one.clone()
            one.copy_(other)
            other.copy_(one_value)
        for tensor in (model.router.gate.weight, model.router.gate.bias):
            assert tensor is not None
            tensor.copy_(tensor[[0, 1, 3, 2]].clone())
    after = model(*x, backbone.decoder)
    torch.testing.assert_close(after.probabilities, before.probabilities)
    torch.testing.assert_close(after.votes, before.votes[:, [0, 1, 3, 2]])


def test_softmax_voting_is_the_routers_average() -> None:
    output = run(voting="softmax")
    torch.testing.assert_close(output.votes, output.gate_log_probabilities.exp())
    assert not torch.allclose(run().votes, run().gate_log_probabilities.exp(), atol=1e-3)


def test_every_parameter_gets_a_gradient() -> None:
    backbone = tiny_backbone()
    model = tiny_model(backbone)
    output = model(*inputs(), backbone.decoder)
    (output.probabilities * torch.randn_like(output.probabilities)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
