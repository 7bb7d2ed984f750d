"""The router: which expert to trust at which pixel, seen from the embedding alone."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icmoe.modeling.layers import ConvNormAct, LearnedVectors, resize


class Router(nn.Module):
    """Per-pixel expert logits, and the sharpness of the vote.

    Args:
        embed_dim: C = 256.
        width: hidden channels.
        num_experts: E.
        grid_size: G.

    Shapes:
        image_embeddings: (B, C, h, h); returns logits (B, E, G, G) and sharpness beta (B, 1, 1, 1), at least 0.
    """

    def __init__(self, *, embed_dim: int, width: int, num_experts: int, grid_size: int) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.reduce = ConvNormAct(embed_dim, width, kernel_size=1)
        self.context = ConvNormAct(width, width)
        self.gate = nn.Conv2d(width, num_experts, 1)
        # Experts start equal: a router that begins with favourites starves the others.
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)  # type: ignore[arg-type]
        self.sharpness = LearnedVectors(1, 1)
        self.sharpness.fill(torch.tensor([[0.5413]]))  # softplus gives beta = 1

    def forward(self, image_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return expert logits and beta."""
        logits = self.gate(self.context(self.reduce(image_embeddings)))
        beta = F.softplus(self.sharpness(len(image_embeddings))).reshape(-1, 1, 1, 1)
        return resize(logits, self.grid_size), beta
