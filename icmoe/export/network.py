"""Backbone and experts as one network, from the normalised image to probabilities, for formats that hold a graph.

Letters: B batch, S side of the square image the backbone sees, D side of the detail image, K classes.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from icmoe.modeling.backbone import Backbone
from icmoe.modeling.icmoe import IcMoe
from icmoe.prediction import Predictor


class DeployedNetwork(nn.Module):
    """Everything between a normalised image and its probabilities, in fp32.

    Training rounds features to half precision and the detail image to 8 bits; a graph does neither, which moves
    probabilities by less than training's own bf16 does.

    Args:
        backbone: frozen.
        model: with the run's weights.
        image_size: S.
        detail_size: D.
        needs_detail: whether the experts' stem sees another image than the backbone.

    Shapes:
        image: (B, 3, S, S), normalised as the backbone wants it and padded with zeros right and below.
        detail: (B, 3, D, D) in [0, 1], only with ``needs_detail``.
        returns probabilities (B, K, S, S).
    """

    def __init__(
        self, backbone: Backbone, model: IcMoe, *, image_size: int, detail_size: int, needs_detail: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = model
        self.image_size = image_size
        self.detail_size = detail_size
        self.needs_detail = needs_detail

    @classmethod
    def of(cls, predictor: Predictor) -> Self:
        """Take the parts of a predictor, on the CPU and in evaluation mode."""
        spec = predictor.spec
        # One image serves both only where both are scaled to [0, 1] and have the same size.
        needs_detail = spec.detail_size != spec.image_size or spec.pixel_norm != "minmax"
        network = cls(
            predictor.backbone,
            predictor.model,
            image_size=spec.image_size,
            detail_size=spec.detail_size,
            needs_detail=needs_detail,
        )
        return network.cpu().to(memory_format=torch.contiguous_format).eval()

    def forward(self, image: Tensor, detail: Tensor | None = None) -> Tensor:
        """Segment."""
        output = self.model(self.backbone(image), image if detail is None else detail, self.backbone.decoder)
        probabilities: Tensor = output.probabilities
        if probabilities.shape[-1] == self.image_size:
            return probabilities
        size = (self.image_size, self.image_size)
        return functional.interpolate(probabilities, size=size, mode="bilinear", align_corners=False)

    def example(self, *, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs of the right shapes, for tracing and for checks."""
        generator = torch.Generator().manual_seed(seed)
        image = torch.rand(1, 3, self.image_size, self.image_size, generator=generator)
        if not self.needs_detail:
            return (image,)
        return image, torch.rand(1, 3, self.detail_size, self.detail_size, generator=generator)
