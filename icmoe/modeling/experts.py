"""The three expert families. Each maps the frozen embedding to class logits and never changes the backbone.

Letters: B batch, C = 256 embedding channels, h embedding grid side, G logit grid side, D detail image side, K classes,
W width.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icmoe.modeling.decoder import FrozenDecoder
from icmoe.modeling.layers import ConvNormAct, LearnedVectors, apply_dilated, resize

MIN_WIDTH = 16
"""Channels of the finest stem level."""
EPS = 1e-12


class BasicExpert(nn.Module):
    """Keep SAM's own decoding path, adapted from outside.

    Learned class tokens take the place of SAM's mask tokens, so that one pass serves all classes; a low-rank residual,
    zero at the start, moves the embedding before it enters the frozen decoder. At initialisation the decoder sees
    exactly the pretrained embedding and SAM's own tokens.

    Args:
        embed_dim: C.
        num_classes: K.
        rank: of the residual.
        grid_size: G.

    Shapes:
        image_embeddings: (B, C, h, h); returns logits (B, K, G, G).
    """

    def __init__(self, *, embed_dim: int, num_classes: int, rank: int, grid_size: int) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.down = nn.Conv2d(embed_dim, rank, 1)
        self.up = nn.Conv2d(rank, embed_dim, 1)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]
        self.class_tokens = LearnedVectors(num_classes, embed_dim)

    @torch.no_grad()
    def start_from(self, mask_tokens: Tensor) -> None:
        """Initialise the class tokens from SAM's mask tokens (4, C), repeated where K is larger."""
        num_classes = self.class_tokens.table.num_embeddings
        self.class_tokens.fill(mask_tokens[torch.arange(num_classes) % len(mask_tokens)])

    def forward(self, image_embeddings: Tensor, decoder: FrozenDecoder) -> Tensor:
        """Decode with the frozen ``decoder``, which is handed in so that it is never registered among the experts."""
        adapted = image_embeddings + self.up(F.gelu(self.down(image_embeddings)))
        logits = decoder(adapted, self.class_tokens(len(image_embeddings)))
        return resize(logits, self.grid_size)


class SemanticExpert(nn.Module):
    """One prototype per class; a pixel votes by its cosine to each.

    reduce -> dilated convolutions with residuals -> up -> pixel embedding z; logits = cos(z, prototype) / temperature.

    Args:
        embed_dim: C.
        num_classes: K.
        width: W.
        grid_size: G.
        temperature: initial temperature, learned afterwards.
        pixel_dim: length of z.

    Shapes:
        image_embeddings: (B, C, h, h); returns logits (B, K, G, G), z (B, pixel_dim, G, G) and prototypes
        (B, K, pixel_dim) of unit length.
    """

    def __init__(
        self, *, embed_dim: int, num_classes: int, width: int, grid_size: int, temperature: float, pixel_dim: int = 32
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.reduce = ConvNormAct(embed_dim, width, kernel_size=1)
        self.context = nn.ModuleList(ConvNormAct(width, width, dilation=dilation) for dilation in (1, 2, 4))
        self.narrow = nn.Conv2d(width, width // 2, 1)
        self.refine = ConvNormAct(width // 2, width // 2)
        self.project = nn.Conv2d(width // 2, pixel_dim, 1)
        self.prototypes = LearnedVectors(num_classes, pixel_dim)
        self.log_scale = LearnedVectors(1, 1)
        self.log_scale.fill(torch.tensor([[-math.log(temperature)]]))

    def forward(self, image_embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, pixel embeddings and prototypes."""
        x = self.reduce(image_embeddings)
        for block in self.context:
            x = x + block(x)
        pixels = self.project(self.refine(resize(self.narrow(x), self.grid_size)))
        # One row per pixel, as channels-last convolutions left them. The cosine divides K products by the row's length
        # rather than the row itself: at a pixel of the label's own grid that saves a fifth of a training step.
        rows = pixels.permute(0, 2, 3, 1).flatten(1, 2)
        length = (rows * rows).sum(dim=2, keepdim=True).float().add(EPS).sqrt()
        prototypes = F.normalize(self.prototypes(len(rows)), dim=2)
        cosine = (rows @ prototypes.to(rows.dtype).transpose(1, 2)) / length
        scale = self.log_scale(len(rows)).exp().reshape(-1, 1, 1, 1)
        return cosine.transpose(1, 2).unflatten(2, pixels.shape[2:]) * scale, pixels, prototypes


class DetailStem(nn.Module):
    """See the image itself: a pyramid of features from the logit grid down to the embedding grid.

    Fine structure (vessels, thin walls) is lost on the embedding grid; strided convolutions on the image keep it.

    Args:
        detail_size: D.
        grid_size: G, the finest level.
        widths: channels per level, fine first; each level has half the side of the one before.

    Shapes:
        detail: (B, 3, D, D) in [0, 1]; returns (B, widths[i], G / 2^i, G / 2^i) per level.
    """

    def __init__(self, *, detail_size: int, grid_size: int, widths: Sequence[int]) -> None:
        super().__init__()
        stride = detail_size // grid_size
        self.enter = ConvNormAct(3, widths[0], kernel_size=2 * (stride // 2) + 3, stride=stride)
        self.deepen = ConvNormAct(widths[0], widths[0])
        self.down = nn.ModuleList(ConvNormAct(fine, coarse, stride=2) for fine, coarse in pairwise(widths))

    def forward(self, detail: Tensor) -> list[Tensor]:
        """Return the pyramid, fine first."""
        x = self.enter(detail - 0.5)
        levels = [x + self.deepen(x)]
        for block in self.down:
            levels.append(block(levels[-1]))
        return levels


class Ascend(nn.Module):
    """One level up: narrow, double the grid, join the stem's features of that level.

    Narrowing comes first because it commutes with bilinear doubling and costs a quarter there.

    Args:
        coarse: channels below.
        skip: channels of the stem at the upper level.
        fine: channels out.

    Shapes:
        x: (B, coarse, H, H), level: (B, skip, 2H, 2H); returns (B, fine, 2H, 2H).
    """

    def __init__(self, coarse: int, skip: int, fine: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(coarse, fine, 1)
        self.join = ConvNormAct(fine + skip, fine)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Go up one level."""
        return self.join(torch.cat([resize(self.narrow(x), level.shape[-1]), level], dim=1))  # type: ignore[no-any-return]


class AdaptiveExpert(nn.Module):
    """Adapt the receptive field to the image, and look at the image itself.

    Parallel dilated convolutions are mixed by weights computed from the image's pooled embedding. On the way up to the
    logit grid the features of a small strided stem join at each level.

    The dilated convolutions are dense on half the width rather than depthwise on all of it: on a CPU a dilated
    depthwise convolution is several times dearer backward, and under bf16 its weight gradient is wrong in the torch we
    measured (docs/performance.md).

    Args:
        embed_dim: C.
        num_classes: K.
        width: W.
        embedding_size: h.
        grid_size: G, h times a power of two.
        detail_size: D, a multiple of G.
        dilations: of the parallel branches.

    Shapes:
        image_embeddings: (B, C, h, h); detail: (B, 3, D, D); returns logits (B, K, G, G).
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_classes: int,
        width: int,
        embedding_size: int,
        grid_size: int,
        detail_size: int,
        dilations: Sequence[int] = (1, 2, 4, 8),
    ) -> None:
        super().__init__()
        num_ups = (grid_size // embedding_size).bit_length() - 1
        skips = [min(MIN_WIDTH << level, width) for level in range(num_ups + 1)]
        ups = [max(width >> level, MIN_WIDTH) for level in range(num_ups + 1)]
        self.reduce = ConvNormAct(embed_dim, width, kernel_size=1)
        self.stem = DetailStem(detail_size=detail_size, grid_size=grid_size, widths=skips)
        self.join = ConvNormAct(width + skips[-1], width, kernel_size=1)
        self.squeeze = nn.Conv2d(width, width // 2, 1)
        self.branches = nn.ModuleList(
            nn.Conv2d(width // 2, width // 2, 3, padding=dilation, dilation=dilation) for dilation in dilations
        )
        self.mix = nn.Linear(embed_dim, len(dilations))
        self.expand = ConvNormAct(width // 2, width, kernel_size=1)
        self.ascend = nn.ModuleList(
            Ascend(coarse, skip, fine) for coarse, skip, fine in zip(ups, reversed(skips[:-1]), ups[1:], strict=False)
        )
        self.classify = nn.Conv2d(ups[-1], num_classes, 1)

    def forward(self, image_embeddings: Tensor, detail: Tensor) -> Tensor:
        """Return class logits."""
        levels = self.stem(detail)
        x = self.join(torch.cat([self.reduce(image_embeddings), levels[-1]], dim=1))
        weights_BM = self.mix(image_embeddings.mean(dim=(2, 3))).softmax(dim=1)
        narrow = self.squeeze(x)
        mixture = torch.stack(
            [
                apply_dilated(branch, narrow) * weights_BM[:, m].reshape(-1, 1, 1, 1)
                for m, branch in enumerate(self.branches)
            ]
        ).sum(dim=0)
        x = x + self.expand(mixture)
        for block, level in zip(self.ascend, reversed(levels[:-1]), strict=True):
            x = block(x, level)
        return self.classify(x)  # type: ignore[no-any-return]
