"""A narrow IC-MoE off its starting point, and unlike images that know how often they were read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from icmoe.config import ExpertsConfig, ModelConfig
from icmoe.modeling.backbone import Backbone
from icmoe.modeling.build import build_icmoe
from icmoe.modeling.decoder import FrozenDecoder
from icmoe.types import IGNORE_INDEX

SIDE, GRID, DETAIL, CLASSES = 8, 16, 32, 3


class TinyDecoder(nn.Module):
    """A frozen decoder with FrozenDecoder's face: products of embedding and tokens, four times finer."""

    embedding_size = SIDE

    def __init__(self) -> None:
        super().__init__()
        self.mask_tokens = torch.randn(4, 256)

    def forward(self, image_embeddings: Tensor, class_tokens: Tensor) -> Tensor:
        logits = torch.einsum("bchw,bkc->bkhw", image_embeddings, class_tokens) / 16
        return nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")


@dataclass(frozen=True)
class Item:
    embeddings: Tensor
    detail: Tensor
    labels: Tensor


class Images:
    """Random images of very different contrast; every fourth has no pixel that counts."""

    def __init__(self, num_images: int, dtype: torch.dtype) -> None:
        self.items, self.read = [], list[tuple[int, str]]()
        for index in range(num_images):
            embeddings = (0.2 + index) * torch.randn(256, SIDE, SIDE, dtype=dtype)
            labels = torch.randint(0, CLASSES, (4, 4)).repeat_interleave(8, 0).repeat_interleave(8, 1)
            labels[: 8 * (index % 3)] = IGNORE_INDEX
            if index % 4 == 3:
                labels[:] = IGNORE_INDEX
            self.items.append(Item(embeddings, torch.rand(3, DETAIL, DETAIL, dtype=dtype), labels))

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int, view: str) -> Item:
        self.read.append((index, view))
        return self.items[index]


class Case:
    """Model, decoder and images from one seed."""

    def __init__(
        self, seed: int, num_images: int = 4, dtype: torch.dtype = torch.float32, experts: ExpertsConfig | None = None
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            decoder = TinyDecoder()
            self.decoder = cast("FrozenDecoder", decoder)
            backbone = Backbone(
                name="tiny", image_encoder=nn.Identity(), decoder=self.decoder, image_size=DETAIL, pixel_norm="minmax"
            )
            config = ModelConfig(width=16, experts=experts or ExpertsConfig(adaptive=1))
            self.model = build_icmoe(config, num_classes=CLASSES, backbone=backbone, seed=seed).to(dtype)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            self.data = Images(num_images, dtype)


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """Give the class itself: most tests make several."""
    return Case
