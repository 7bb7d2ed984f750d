"""Small shared vocabulary: plain values that several modules speak. No torch, no Flower.

Letters used in shapes everywhere: B batch, C = 256 embedding channels, h = w embedding grid, S side of the square image
the backbone sees, D side of the square image the experts' stem sees, g = G grid side of the logits, K classes with
background 0, E experts.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Arrays = Mapping[str, Array]
"""Tensors by name, as they travel and as they are stored: ``experts.*`` and ``router.*``."""

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

Axis = Literal["axial", "coronal", "sagittal"]
AXES: tuple[Axis, ...] = ("axial", "coronal", "sagittal")

Family = Literal["basic", "semantic", "adaptive"]
FAMILIES: tuple[Family, ...] = ("basic", "semantic", "adaptive")

IGNORE_INDEX = 255
"""Class id of pixels that count nowhere (padding, ignored values).

Only after mapping: a raw 255 has no meaning of its own.
"""
