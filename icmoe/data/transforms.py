"""From an image of any size to the square the backbone sees, and back.

One geometry for everything: a pixel at (y, x) of an H x W image stands at (y, x) / max(H, W) of a unit square, at every
size the square is drawn in. Scale is the same along both axes and is not rounded to whole pixels, so that backbone
image, detail image, labels and logits stay aligned. What the image does not cover, right or below, is padding.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from icmoe.errors import ConfigError
from icmoe.types import IGNORE_INDEX

PixelNorm = Literal["minmax", "imagenet"]

FINGERPRINT = "square-1"
"""Part of every cache key. Change it whenever a change below alters what the backbone sees."""

AFFINE = "affine"
MAX_ROTATION = math.radians(20)
SCALE_RANGE = (0.85, 1.15)
MAX_SHIFT = 0.08  # of the square's side

# segment_anything's constants, for values 0..255.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)

_EXACT_VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda square: square,
    "hflip": lambda square: square.flip(-1),
    "vflip": lambda square: square.flip(-2),
    "rot90": lambda square: square.rot90(1, (-2, -1)),
    "rot180": lambda square: square.rot90(2, (-2, -1)),
    "rot270": lambda square: square.rot90(3, (-2, -1)),
}
VIEWS = tuple(_EXACT_VIEWS)
"""Views without a number; ``affine0``, ``affine1``, ... are allowed as well."""


def fitted_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Return (rows, columns) that an image covers of a square of side ``size``; the longer one is ``size``."""
    longest = max(height, width)
    return max(1, int(height * size / longest + 0.5)), max(1, int(width * size / longest + 0.5))


def resize_longest(image: npt.NDArray[np.float32], size: int) -> Tensor:
    """Resize with antialiased bilinear interpolation, values as they are.

    Args:
        image: (H, W, 3).
        size: longest side of the result, in pixels.

    Returns:
        (3, rows, columns) as ``fitted_shape`` gives them; an exact copy where the size stays.
    """
    height, width = image.shape[:2]
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    scale = size / max(height, width)
    if scale == 1.0:
        return pixels.clone()
    # With a scale factor torch keeps the scale exact but rounds the number of pixels down: repeat the border far enough
    # to cut the wanted shape out of the result.
    margin = math.ceil(1 / scale) + 1
    padded = functional.pad(pixels[None], (0, margin, 0, margin), mode="replicate")
    resized = functional.interpolate(padded, scale_factor=scale, mode="bilinear", antialias=True)[0]
    rows, columns = fitted_shape(height, width, size)
    return resized[:, :rows, :columns].contiguous()


def normalise(pixels: Tensor, pixel_norm: PixelNorm) -> Tensor:
    """Normalise the values of one image.

    Args:
        pixels: (3, rows, columns), values as stored.
        pixel_norm: ``minmax`` maps the image's own range to [0, 1], a constant image to 0. ``imagenet`` subtracts SAM's
            mean and divides by its deviation on values 0..255; values beyond 0..255 (16 bit) are first min-max scaled.

    Returns:
        (3, rows, columns) float32.
    """
    low, high = float(pixels.min()), float(pixels.max())
    scaled = (pixels - low) / (high - low) if high > low else torch.zeros_like(pixels)
    if pixel_norm == "minmax":
        return scaled
    values = pixels if low >= 0 and high <= 255 else scaled * 255
    return (values - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)


def fit_to_square(image: npt.NDArray[np.float32], size: int, *, pixel_norm: PixelNorm = "minmax") -> Tensor:
    """Resize, normalise, then pad with zeros right and below: the order LiteMedSAM and SAM were trained with.

    Args:
        image: (H, W, 3), values as stored.
        size: side of the square in pixels.
        pixel_norm: see ``normalise``.

    Returns:
        (3, size, size) float32.
    """
    pixels = normalise(resize_longest(image, size), pixel_norm)
    return functional.pad(pixels, (0, size - pixels.shape[2], 0, size - pixels.shape[1]))


def fit_mask(mask: npt.NDArray[np.uint8], size: int) -> Tensor:
    """Draw class ids into a square, each pixel taking the id at its centre (nearest-exact).

    Args:
        mask: (H, W) class ids.
        size: side of the square in pixels.

    Returns:
        (size, size) uint8; padding is ``IGNORE_INDEX``.
    """
    height, width = mask.shape
    rows, columns = fitted_shape(height, width, size)
    square = np.full((size, size), IGNORE_INDEX, dtype=np.uint8)
    scale = max(height, width) / size
    y = np.minimum(((np.arange(rows) + 0.5) * scale).astype(np.intp), height - 1)
    x = np.minimum(((np.arange(columns) + 0.5) * scale).astype(np.intp), width - 1)
    square[:rows, :columns] = mask[np.ix_(y, x)]
    return torch.from_numpy(square)


def restore(probabilities: Tensor, *, original_size: tuple[int, int]) -> Tensor:
    """Bring a grid over the padded square bilinearly to the image's own pixels; padding has no influence.

    Args:
        probabilities: (K, G, G).
        original_size: (H, W) in pixels.

    Returns:
        (K, H, W).
    """
    height, width = original_size
    grid_size = probabilities.shape[-1]
    rows, columns = fitted_shape(height, width, grid_size)
    cells_per_pixel = grid_size / max(height, width)

    def centres(length: int, cells: int) -> Tensor:
        position = (torch.arange(length, dtype=torch.float64, device=probabilities.device) + 0.5) * cells_per_pixel
        # Not beyond the centre of the last covered cell: the next one is padding, which nobody trained.
        return (position.clamp(0.5, cells - 0.5) * (2 / grid_size) - 1).to(probabilities.dtype)

    y, x = torch.meshgrid(centres(height, rows), centres(width, columns), indexing="ij")
    grid = torch.stack((x, y), dim=-1)[None]
    return functional.grid_sample(probabilities[None], grid, mode="bilinear", align_corners=False)[0]


def check_view(view: str) -> None:
    """Raise ConfigError unless the view has a known name."""
    if view not in _EXACT_VIEWS and not (view.startswith(AFFINE) and view.removeprefix(AFFINE).isdecimal()):
        raise ConfigError(f"unknown view {view!r}. Allowed are {', '.join(VIEWS)} and affine0, affine1, ...")


def apply_view(image: Tensor, view: str, *, seed_text: str) -> Tensor:
    """Show a square image in a geometric view; bilinear, zeros come in from outside.

    Args:
        image: (C, S, S) float, padded to the square.
        view: one of ``VIEWS``, or ``affineN``: a rotation within 20 degrees, a scale in 0.85..1.15 and a shift within
            8 % of the side, drawn from the view's name and ``seed_text``, so that a view of an image never changes.
        seed_text: names the image.

    Returns:
        (C, S, S).

    Raises:
        ConfigError: if the view is unknown.
    """
    check_view(view)
    if view in _EXACT_VIEWS:
        return _EXACT_VIEWS[view](image)
    return _sample(image, affine_matrix(view, seed_text=seed_text), mode="bilinear")


def apply_view_to_mask(mask: Tensor, view: str, *, seed_text: str) -> Tensor:
    """Show square class ids in the same view as ``apply_view``; nearest, ``IGNORE_INDEX`` comes in from outside.

    Args:
        mask: (S, S) uint8, padded to the square; S need not be the image's.
        view: as for ``apply_view``.
        seed_text: as for ``apply_view``.

    Returns:
        (S, S) uint8.

    Raises:
        ConfigError: if the view is unknown.
    """
    check_view(view)
    if view in _EXACT_VIEWS:
        return _EXACT_VIEWS[view](mask)
    # What comes in from outside is 0, which has to mean IGNORE_INDEX here.
    shifted = mask[None].float() - IGNORE_INDEX
    moved = _sample(shifted, affine_matrix(view, seed_text=seed_text), mode="nearest")
    return (moved[0] + IGNORE_INDEX).round().to(torch.uint8)


def affine_matrix(view: str, *, seed_text: str) -> Tensor:
    """Return the (2, 3) matrix from output to input coordinates, both (x, y) in -1..1 over the square."""
    digest = hashlib.sha256(f"{view} {seed_text}".encode()).digest()
    draws = [int.from_bytes(digest[8 * i : 8 * i + 8]) / 2**64 for i in range(4)]
    angle = (2 * draws[0] - 1) * MAX_ROTATION
    scale = SCALE_RANGE[0] + draws[1] * (SCALE_RANGE[1] - SCALE_RANGE[0])
    # The square is 2 wide in these coordinates.
    shift_x, shift_y = ((2 * draw - 1) * MAX_SHIFT * 2 for draw in draws[2:])
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    return torch.tensor(
        [[cos, sin, -cos * shift_x - sin * shift_y], [-sin, cos, sin * shift_x - cos * shift_y]], dtype=torch.float32
    )


def _sample(square: Tensor, matrix: Tensor, *, mode: Literal["bilinear", "nearest"]) -> Tensor:
    grid = functional.affine_grid(matrix[None].to(square.device), [1, *square.shape], align_corners=False)
    return functional.grid_sample(square[None], grid, mode=mode, padding_mode="zeros", align_corners=False)[0]
