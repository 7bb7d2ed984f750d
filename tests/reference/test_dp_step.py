"""Our clipped sum against that of Opacus' optimiser, where its hooks are right: one image a unit, fp32, contiguous."""

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from icmoe.config import LossConfig, ModelConfig, TrainConfig
from icmoe.losses import icmoe_loss
from icmoe.modeling.backbone import Backbone
from icmoe.modeling.build import build_icmoe
from icmoe.modeling.decoder import FrozenDecoder
from icmoe.modeling.icmoe import IcMoe
from icmoe.privacy.dp_sgd import unit_backward
from icmoe.privacy.gradients import ClippedSum
from icmoe.training import Draw, TrainItem

B, SIDE, GRID, DETAIL, CLASSES = 3, 8, 16, 32, 3


class TinyDecoder(nn.Module):
    """A frozen decoder with FrozenDecoder's face: products of embedding and tokens, four times finer."""

    embedding_size = SIDE

    def __init__(self) -> None:
        super().__init__()
        self.mask_tokens = torch.randn(4, 256)

    def forward(self, image_embeddings: Tensor, class_tokens: Tensor) -> Tensor:
        logits = torch.einsum("bchw,bkc->bkhw", image_embeddings, class_tokens) / 16
        return nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")


class Image:
    """Random, the more contrast the higher its number."""

    def __init__(self, number: int) -> None:
        self.embeddings = (0.5 + number) * torch.randn(256, SIDE, SIDE)
        self.detail = torch.rand(3, DETAIL, DETAIL)
        self.labels = torch.randint(0, CLASSES, (4, 4)).repeat_interleave(8, 0).repeat_interleave(8, 1)


class Images:
    """B of them."""

    def __init__(self) -> None:
        self.images = [Image(number) for number in range(B)]

    def __len__(self) -> int:
        return B

    def load(self, index: int, view: str) -> TrainItem:
        return self.images[index]


def make() -> tuple[IcMoe, FrozenDecoder, Images]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        decoder = cast("FrozenDecoder", TinyDecoder())
        backbone = Backbone(
            name="tiny", image_encoder=nn.Identity(), decoder=decoder, image_size=DETAIL, pixel_norm="minmax"
        )
        model = build_icmoe(ModelConfig(width=16), num_classes=CLASSES, backbone=backbone, seed=4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.to(memory_format=torch.contiguous_format), decoder, Images()


def losses_of_all(model: nn.Module, decoder: FrozenDecoder, data: Images) -> Tensor:
    """All images in one batch; each image's draws are those of its number."""
    embeddings, detail, labels = (
        torch.stack([getattr(image, name) for image in data.images]) for name in ("embeddings", "detail", "labels")
    )
    draws = [np.random.default_rng(number).random((GRID, GRID), dtype=np.float32) for number in range(B)]
    loss = LossConfig()
    return icmoe_loss(
        model(embeddings, detail, decoder),
        labels,
        torch.from_numpy(np.stack(draws)),
        weights=loss.model_dump(include={"expert", "consistency", "balance", "contrast"}),
        consistency_temperature=loss.consistency_temperature,
        contrast_temperature=loss.contrast_temperature,
        contrast_anchors=loss.contrast_anchors,
    )


# Opacus hooks modules whose inputs (embedding, detail) need no gradient; torch says so and goes on.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("max_grad_norm", [0.1, 5.0, 1e4])
def test_opacus_clips_and_sums_to_the_same(max_grad_norm: float) -> None:
    opacus = pytest.importorskip("opacus")
    optimizers = pytest.importorskip("opacus.optimizers")
    model, decoder, data = make()
    clipped = ClippedSum(list(model.parameters()), max_grad_norm=max_grad_norm)
    for number in range(B):
        draw, config = Draw(number, "identity", number), TrainConfig(precision="fp32")
        unit_backward(model, decoder, data, [draw], config=config, with_basic=True, size=1)
        clipped.add_unit()

    sampled = opacus.GradSampleModule(model, batch_first=True, loss_reduction="sum")
    optimizer = optimizers.DPOptimizer(
        torch.optim.SGD(sampled.parameters(), lr=1.0),
        noise_multiplier=1.0,
        max_grad_norm=max_grad_norm,
        expected_batch_size=B,
    )
    losses_of_all(sampled, decoder, data).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.clip_and_accumulate()
    theirs = torch.cat([parameter.summed_grad.reshape(-1) for parameter in sampled.parameters()]).double()
    # They divide by the norm plus 1e-6.
    assert float((clipped.total - theirs).norm()) <= 1e-4 * float(theirs.norm())
