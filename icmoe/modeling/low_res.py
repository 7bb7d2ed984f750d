"""SAM's ViT below its native 1024 px: which sizes are allowed, and how the weights are fitted to them."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from icmoe.errors import BackboneError

PATCH_SIZE = 16
SMALLEST_SIZE = 64


def choose_image_size(image_size: int | None, *, name: str, native_size: int, resizable: bool) -> int:
    """Check a wished image size S against what the backbone can do.

    Args:
        image_size: wished S in pixels; None is the native size.
        name: the backbone's, for the message.
        native_size: S the weights were trained at.
        resizable: whether smaller sizes work.

    Returns:
        S in pixels.

    Raises:
        BackboneError: if the backbone cannot run at that size.
    """
    if image_size in (None, native_size):
        return native_size
    if not resizable:
        raise BackboneError(
            f"{name} runs at {native_size} px only, got image_size {image_size}. Leave image_size out, or use a "
            "sam_vit or medsam_vit backbone for another size."
        )
    if not SMALLEST_SIZE <= image_size < native_size or image_size % PATCH_SIZE:
        raise BackboneError(
            f"{name} runs at multiples of {PATCH_SIZE} from {SMALLEST_SIZE} to {native_size} px, got image_size "
            f"{image_size}. Take 256 or 512 for speed, or leave it out for the native size."
        )
    return image_size


def resize_sam(sam: Any, image_size: int) -> None:
    """Fit a loaded SAM to another image size, in place.

    Three things depend on the size. The absolute position table is interpolated here. The prompt encoder makes its
    dense encodings for a grid it is told, here. The relative position tables stay as they are: ``segment_anything``
    interpolates them in each forward of the global blocks, and the windowed blocks do not depend on the size.

    Args:
        sam: a ``segment_anything`` SAM with loaded weights.
        image_size: S in pixels, a multiple of 16.
    """
    grid = image_size // PATCH_SIZE
    encoder, prompts = sam.image_encoder, sam.prompt_encoder
    encoder.pos_embed = nn.Parameter(interpolate_positions(encoder.pos_embed.detach(), grid), requires_grad=False)
    encoder.img_size = image_size
    prompts.input_image_size = (image_size, image_size)
    prompts.image_embedding_size = (grid, grid)
    prompts.mask_input_size = (4 * grid, 4 * grid)


def interpolate_positions(positions: Tensor, grid: int) -> Tensor:
    """Interpolate an absolute position table, bicubic.

    Without antialiasing: the table is a smooth code, sampled at cell centres. Averaging neighbouring codes would
    shorten them, and the frozen encoder has only seen codes of full length. In float64, rounded once at the end: the
    result is part of the backbone's digest, which has to be the same on every site's processor.

    Args:
        positions: (1, h, h, width of the ViT), float.
        grid: new side of the table.

    Returns:
        (1, grid, grid, width of the ViT), the dtype of ``positions``.
    """
    channels_first = positions.double().permute(0, 3, 1, 2)
    resized = functional.interpolate(channels_first, size=(grid, grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(positions.dtype).contiguous()
