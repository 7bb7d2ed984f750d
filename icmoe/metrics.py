"""Dice and HD95 of one image, from MONAI, at the image's own resolution.

An image's Dice is the mean over the foreground classes present in its truth; a site's is the mean over its images.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import numpy.typing as npt
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from torch import Tensor
from torch.nn import functional as F

from icmoe.types import IGNORE_INDEX

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImageScore:
    """Scores of one image; lists are per foreground class, ``None`` where the class is absent from the truth.

    ``hd95`` is in mm where ``spacing`` was known, else in pixels.
    """

    dice: list[float | None]
    hd95: list[float | None] | None = None

    @property
    def mean_dice(self) -> float | None:
        """Mean over present classes; ``None`` for an image without foreground."""
        return mean_or_none(self.dice)


def score_image(
    prediction: Labels,
    truth: Labels,
    *,
    num_classes: int,
    with_hd95: bool = False,
    spacing: tuple[float, float] | None = None,
) -> ImageScore:
    """Compare a predicted label map with the truth.

    Args:
        prediction: (H, W) class ids.
        truth: (H, W) class ids with ``IGNORE_INDEX``; ignored pixels are background in both.
        num_classes: K.
        with_hd95: also the 95th percentile Hausdorff distance.
        spacing: mm per pixel (row, column).

    Returns:
        The scores. A present class that was not predicted at all has Dice 0 and the image diagonal as HD95.
    """
    ignored = truth == IGNORE_INDEX
    predicted = _one_hot(np.where(ignored, 0, prediction), num_classes)
    expected = _one_hot(np.where(ignored, 0, truth), num_classes)
    dice = compute_dice(predicted, expected, include_background=False)[0].tolist()
    present = [value == value for value in dice]  # MONAI marks classes absent from the truth with NaN
    return ImageScore(
        dice=[value if here else None for value, here in zip(dice, present, strict=True)],
        hd95=_hd95(predicted, expected, present, spacing) if with_hd95 else None,
    )


def surface_dice(
    prediction: Labels,
    truth: Labels,
    *,
    num_classes: int,
    tolerance: float,
    spacing: tuple[float, float] | None = None,
) -> list[float | None]:
    """Share of both outlines that lie within a tolerance of each other, per foreground class.

    Args:
        prediction: (H, W) class ids.
        truth: (H, W) class ids with ``IGNORE_INDEX``; ignored pixels are background in both.
        num_classes: K.
        tolerance: in mm where ``spacing`` is known, else in pixels.
        spacing: mm per pixel (row, column).

    Returns:
        Per class; ``None`` where it is absent from the truth, 0 where it was not predicted.
    """
    ignored = truth == IGNORE_INDEX
    predicted = _one_hot(np.where(ignored, 0, prediction), num_classes)
    expected = _one_hot(np.where(ignored, 0, truth), num_classes)
    with warnings.catch_warnings():
        # MONAI's own code calls its deprecated option, and warns of absent classes, which are told apart here.
        warnings.simplefilter("ignore")
        values = compute_surface_dice(
            predicted, expected, [tolerance] * (num_classes - 1), spacing=spacing or (1.0, 1.0)
        )[0].tolist()
    present = expected[0, 1:].flatten(1).any(dim=1).tolist()
    # NaN: neither outline has a pixel, which for a present class means that all of it lies outside the picture.
    return [(0.0 if value != value else value) if here else None for value, here in zip(values, present, strict=True)]


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Mean of what is there; ``None`` if nothing is."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _hd95(
    predicted: Tensor, expected: Tensor, present: Sequence[bool], spacing: tuple[float, float] | None
) -> list[float | None]:
    height, width = expected.shape[-2:]
    row, column = spacing or (1.0, 1.0)
    diagonal = float(np.hypot(height * row, width * column))
    result: list[float | None] = []
    for index, here in enumerate(present, start=1):
        if not here:
            result.append(None)
        elif not predicted[0, index].any():
            result.append(diagonal)
        else:
            with warnings.catch_warnings():
                # MONAI's own code calls its deprecated option.
                warnings.filterwarnings("ignore", message=".*get_mask_edges", category=FutureWarning)
                distance = compute_hausdorff_distance(
                    predicted[:, index : index + 1],
                    expected[:, index : index + 1],
                    include_background=True,
                    percentile=95,
                    spacing=(row, column),
                )
            result.append(float(distance[0, 0]))
    return result


def _one_hot(labels: npt.NDArray[np.integer], num_classes: int) -> Tensor:
    return F.one_hot(torch.from_numpy(labels.astype(np.int64)), num_classes).permute(2, 0, 1).unsqueeze(0)
