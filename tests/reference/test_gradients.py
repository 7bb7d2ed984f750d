"""A sample's gradient depends on that sample alone: micro-batch gradients, and Opacus, against one batch."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from icmoe.config import LossConfig, ModelConfig
from icmoe.losses import icmoe_loss
from icmoe.modeling.backbone import Backbone
from icmoe.modeling.build import build_icmoe
from icmoe.modeling.decoder import FrozenDecoder
from icmoe.modeling.icmoe import IcMoe
from icmoe.types import IGNORE_INDEX

B, SIDE, GRID, DETAIL, CLASSES = 3, 8, 16, 32, 3


class TinyDecoder(nn.Module):
    """A frozen decoder with FrozenDecoder's face and, as SAM's, with attention from tokens to the image."""

    embedding_size = SIDE

    def __init__(self) -> None:
        super().__init__()
        self.mask_tokens = torch.randn(4, 256)
        self.attention = nn.MultiheadAttention(256, 4, batch_first=True)
        self.requires_grad_(False)

    def forward(self, image_embeddings: Tensor, class_tokens: Tensor) -> Tensor:
        image = image_embeddings.flatten(2).transpose(1, 2)
        tokens = class_tokens + self.attention(class_tokens, image, image, need_weights=False)[0]
        logits = torch.einsum("bchw,bkc->bkhw", image_embeddings, tokens) / 16
        return nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")


class Case:
    """A default model (with narrow experts) off its starting point, and a batch of unlike images."""

    def __init__(self, seed: int, **settings: Any) -> None:
        torch.manual_seed(seed)
        self.decoder = cast("FrozenDecoder", TinyDecoder())
        backbone = Backbone(
            name="tiny", image_encoder=nn.Identity(), decoder=self.decoder, image_size=DETAIL, pixel_norm="minmax"
        )
        config = ModelConfig(width=16, **settings)
        self.model = build_icmoe(config, num_classes=CLASSES, backbone=backbone, seed=seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        self.embeddings = torch.randn(B, 256, SIDE, SIDE) * torch.tensor([0.5, 1.0, 2.0]).reshape(B, 1, 1, 1)
        self.detail = torch.rand(B, 3, DETAIL, DETAIL)
        self.labels = torch.randint(0, CLASSES, (B, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
        self.labels[1, :, 20:] = IGNORE_INDEX
        self.labels[2] = 0
        self.draws = torch.rand(B, GRID, GRID)

    def losses(self, model: nn.Module, chosen: slice = slice(None), *, with_basic: bool = True) -> Tensor:
        loss = LossConfig()
        output = model(self.embeddings[chosen], self.detail[chosen], self.decoder, with_basic=with_basic)
        return icmoe_loss(
            output,
            self.labels[chosen],
            self.draws[chosen],
            weights=loss.model_dump(include={"expert", "consistency", "balance", "contrast"}),
            consistency_temperature=loss.consistency_temperature,
            contrast_temperature=loss.contrast_temperature,
            contrast_anchors=loss.contrast_anchors,
        )


def gradients(model: IcMoe, value: Tensor) -> dict[str, Tensor | None]:
    names = model.adapter_params()
    found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
    return dict(zip(names, found, strict=True))


def close(name: str, one: Tensor, other: Tensor) -> None:
    """Equal within 1e-4 of the tensor's largest entry."""
    scale = float(other.abs().max())
    assert float((one - other).abs().max()) <= 1e-4 * scale + 1e-8, name


@pytest.fixture(params=[{}, {"top_k": 2}, {"voting": "softmax"}], ids=["default", "top_k", "softmax"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with torch.random.fork_rng(devices=[]):
        yield Case(seed=5, **request.param)


@pytest.mark.parametrize("with_basic", [True, False])
def test_the_gradient_of_an_image_in_a_batch_is_its_gradient_alone(case: Case, with_basic: bool) -> None:
    together = case.losses(case.model, with_basic=with_basic)
    assert together.shape == (B,)
    for i in range(B):
        alone = case.losses(case.model, slice(i, i + 1), with_basic=with_basic)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-5)
        one, other = gradients(case.model, together[i]), gradients(case.model, alone[0])
        for name, gradient in one.items():
            expected = other[name]
            unused = name.startswith("experts.basic") and not with_basic
            if unused or gradient is None or expected is None:
                assert gradient is None
                assert expected is None
                assert unused or (name.startswith("router.sharpness") and not case.model.adaptive_voting)
            else:
                close(name, gradient, expected)


@pytest.mark.parametrize("with_basic", [True, False])
def test_no_image_reaches_the_loss_of_another(case: Case, with_basic: bool) -> None:
    case.embeddings.requires_grad_()
    case.detail.requires_grad_()
    losses = case.losses(case.model, with_basic=with_basic)
    for i in range(B):
        for gradient in torch.autograd.grad(losses[i], [case.embeddings, case.detail], retain_graph=True):
            others = [j for j in range(B) if j != i]
            assert gradient[i].any()
            assert not gradient[others].any()


# Opacus hooks modules whose inputs (embedding, detail) need no gradient; torch says so and goes on.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_opacus_finds_the_gradient_of_each_image() -> None:
    opacus = pytest.importorskip("opacus")
    with torch.random.fork_rng(devices=[]):
        case = Case(seed=5)
    # Opacus 1.6 unfolds activations as if they were contiguous: from channels_last ones it computes wrong gradients in
    # silence. Who trains with it has to bring the model and its inputs into this format first.
    case.model.to(memory_format=torch.contiguous_format)
    micro = [gradients(case.model, case.losses(case.model, slice(i, i + 1))[0]) for i in range(B)]
    sampled = opacus.GradSampleModule(case.model, batch_first=True, loss_reduction="sum")
    case.losses(sampled).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in case.model.named_parameters():
        for i in range(B):
            expected = micro[i][name]
            assert expected is not None
            close(name, parameter.grad_sample[i], expected)  # type: ignore[attr-defined]
