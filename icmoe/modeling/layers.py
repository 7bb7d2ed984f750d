"""Building blocks that Opacus can sample: every parameter sits in a layer it knows, no layer is used twice.

Letters: B batch, C input channels, H W grid, W width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP_CHANNELS = 8


class ConvNormAct(nn.Module):
    """Convolution, GroupNorm and ReLU.

    GroupNorm looks at one image only, so a sample's gradient does not depend on its batch; BatchNorm would break that.

    Args:
        in_channels: C.
        out_channels: W, a multiple of 8.
        kernel_size: odd.
        stride: of the convolution.
        dilation: of the convolution.

    Shapes:
        x: (B, C, H, W); returns (B, out_channels, H / stride, W / stride).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int = 3, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)
        self.norm = nn.GroupNorm(out_channels // GROUP_CHANNELS, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return F.relu(self.norm(self.conv(x)))


def apply_dilated(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a dilated convolution, in float32 where bfloat16 would spoil its gradient.

    On a CPU, torch 2.15 gives NaN for the weight gradient of a dilated bfloat16 convolution on channels-last tensors
    whose channels are no multiple of 16, from 20 up (``model.width`` 48, 80, ...).

    Args:
        conv: a dilated ``nn.Conv2d``.
        x: (B, C, H, W).
    """
    if x.device.type != "cpu" or x.shape[1] % 16 == 0:
        return conv(x)  # type: ignore[no-any-return]
    with torch.autocast("cpu", enabled=False):
        return conv(x.float())  # type: ignore[no-any-return]


class LearnedVectors(nn.Module):
    """``num`` learned vectors, one row of an embedding each, handed out once per image.

    A bare ``nn.Parameter`` beside children gets no per-sample gradient from Opacus; an embedding called with indices
    (B, num) does.

    Args:
        num: how many vectors.
        dim: their length.

    Shapes:
        returns (B, num, dim).
    """

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num, dim)

    def forward(self, batch: int) -> Tensor:
        """Return the vectors for each of ``batch`` images."""
        indices = torch.arange(self.table.num_embeddings, device=self.table.weight.device)
        return self.table(indices.expand(batch, -1))  # type: ignore[no-any-return]

    @torch.no_grad()
    def fill(self, values: Tensor) -> None:
        """Set the vectors to ``values`` (num, dim)."""
        self.table.weight.copy_(values)


def resize(x: Tensor, size: int) -> Tensor:
    """Bring (B, C, H, H) to (B, C, size, size): average pooling down by whole factors, bilinear otherwise."""
    side = x.shape[-1]
    if side == size:
        return x
    if side % size == 0:
        return F.avg_pool2d(x, side // size)
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
