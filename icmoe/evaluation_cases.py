"""What ``icmoe-fl evaluate`` measures: a case per image and class, and one per volume and class.

Letters: N slices of a volume, H x W pixels of one.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from icmoe.data.manifest import Sample
from icmoe.data.volumes import read_volume, turn
from icmoe.metrics import Labels, score_image, surface_dice
from icmoe.types import IGNORE_INDEX, Axis

Unit = Literal["mm", "px"]
VolumeUnit = Literal["ml", "mm2", "px"]
Geometry = Literal["3-D", "per slice"]
Item = tuple[str, str, str]
"""Site, patient, and the image or volume."""

MIN_SLICES = 3
"""Of a volume with a surface: every voxel of fewer slices lies on it."""


@dataclass(frozen=True)
class Case:
    """One class of one image; a metric is ``None`` where the class is not in the truth.

    ``unit`` is that of ``hd95`` and of the surface Dice's tolerance: mm where the image's spacing is known.
    """

    site: str
    patient: str
    image: str
    slice: str
    class_name: str
    dice: float | None
    hd95: float | None
    surface_dice: float | None
    unit: Unit
    true_pixels: int
    predicted_pixels: int

    @property
    def item(self) -> Item:
        """The image."""
        return self.site, self.patient, self.image

    @property
    def is_present(self) -> bool:
        """Whether the class is in the truth."""
        return self.dice is not None


@dataclass(frozen=True)
class VolumeCase:
    """One class of one volume: all its slices together. Pictures of a patient count together as one.

    ``unit`` is ``None`` where the volume has no surface in 3-D. Volumes are in ml where the distance of slices is
    known, in mm2 (areas added up) where only pixels have a size, else in pixels.
    """

    site: str
    patient: str
    volume: str
    class_name: str
    num_images: int
    true_volume: float
    predicted_volume: float
    volume_unit: VolumeUnit
    volume_difference: float | None
    absolute_volume_difference: float | None
    hd95: float | None = None
    surface_dice: float | None = None
    unit: Unit | None = None

    @property
    def item(self) -> Item:
        """The volume."""
        return self.site, self.patient, self.volume

    @property
    def is_present(self) -> bool:
        """Whether the class is in the truth."""
        return self.true_volume > 0


@dataclass(frozen=True)
class SliceGroup:
    """The images that are scored as one volume.

    Attributes:
        volume: name; empty for pictures.
        indices: of the images among the site's, in the order of the slices.
        is_whole: whether they are consecutive slices of one volume, enough of them for a surface.
    """

    volume: str
    indices: tuple[int, ...]
    is_whole: bool


def group_slices(samples: Sequence[Sample], *, names: Sequence[str]) -> list[SliceGroup]:
    """Put slices of a volume together, and a patient's pictures.

    Args:
        samples: of one site.
        names: of the samples' images; a volume is called after its first slice.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        address = (str(sample.image), sample.series, sample.frame, sample.axis) if sample.axis else ()
        groups.setdefault((sample.patient, *address), []).append(index)
    return [_group(samples, indices, names) for indices in groups.values()]


def _group(samples: Sequence[Sample], indices: list[int], names: Sequence[str]) -> SliceGroup:
    if not samples[indices[0]].axis:
        return SliceGroup("", tuple(indices), is_whole=False)
    ordered = sorted(indices, key=lambda index: int(samples[index].slice))
    numbers = [int(samples[index].slice) for index in ordered]
    is_whole = len(numbers) >= MIN_SLICES and numbers == list(range(numbers[0], numbers[-1] + 1))
    return SliceGroup(names[ordered[0]], tuple(ordered), is_whole)


def voxel_size(sample: Sample) -> tuple[float, float, float] | None:
    """Slice distance, row and column spacing in mm of a volume's slice; ``None`` for a picture.

    Raises:
        DataError: if the volume cannot be read.
    """
    if not sample.axis:
        return None
    grid = read_volume(sample.image, series=sample.series, frame=sample.frame).grid
    across, row, column = turn(grid, cast(Axis, sample.axis)).spacing
    return float(across), float(row), float(column)


def score_case(
    prediction: Labels,
    truth: Labels,
    *,
    where: tuple[str, str, str, str],
    classes: Sequence[str],
    spacing: tuple[float, float] | None,
    tolerance: float,
) -> list[Case]:
    """All metrics of one image, a case per foreground class.

    Args:
        prediction: (H, W) class ids.
        truth: (H, W) class ids with ``IGNORE_INDEX``.
        where: site, patient, image, slice.
        classes: names in order.
        spacing: mm per pixel (row, column).
        tolerance: of the surface Dice.
    """
    num_classes = len(classes) + 1
    score = score_image(prediction, truth, num_classes=num_classes, with_hd95=True, spacing=spacing)
    surface = surface_dice(prediction, truth, num_classes=num_classes, tolerance=tolerance, spacing=spacing)
    counted = truth != IGNORE_INDEX
    return [
        Case(
            *where,
            class_name=name,
            dice=score.dice[index],
            hd95=score.hd95[index] if score.hd95 else None,
            surface_dice=surface[index],
            unit="mm" if spacing else "px",
            true_pixels=int((truth == index + 1).sum()),
            predicted_pixels=int(((prediction == index + 1) & counted).sum()),
        )
        for index, name in enumerate(classes)
    ]


def score_volume(
    cases: Sequence[Case],
    *,
    volume: str,
    spacings: Sequence[tuple[float, float] | None],
    slice_distance: float | None,
) -> list[VolumeCase]:
    """Volumes of each class, over all images of a group.

    Args:
        cases: of the group's images, all classes of an image in a row.
        volume: name of the group.
        spacings: of each image, mm per pixel (row, column).
        slice_distance: in mm, where the images are consecutive slices.
    """
    unit: VolumeUnit = "px" if None in spacings else "mm2" if slice_distance is None else "ml"
    sizes = [1.0 if unit == "px" or one is None else one[0] * one[1] for one in spacings]
    scale = slice_distance / 1000 if unit == "ml" and slice_distance is not None else 1.0
    found = []
    for name in dict.fromkeys(case.class_name for case in cases):
        own = [case for case in cases if case.class_name == name]
        true = scale * sum(case.true_pixels * size for case, size in zip(own, sizes, strict=True))
        predicted = scale * sum(case.predicted_pixels * size for case, size in zip(own, sizes, strict=True))
        difference = (predicted - true) / true if true else None
        found.append(
            VolumeCase(
                site=own[0].site,
                patient=own[0].patient,
                volume=volume,
                class_name=name,
                num_images=len(own),
                true_volume=true,
                predicted_volume=predicted,
                volume_unit=unit,
                volume_difference=difference,
                absolute_volume_difference=None if difference is None else abs(difference),
            )
        )
    return found


def surface_scores(
    prediction: Labels, truth: Labels, *, class_id: int, spacing: tuple[float, float, float], tolerance: float
) -> tuple[float | None, float | None]:
    """HD95 in mm and surface Dice of one class in 3-D, from MONAI.

    Args:
        prediction: (N, H, W) class ids of consecutive slices.
        truth: (N, H, W) class ids with ``IGNORE_INDEX``; ignored voxels are background in both.
        class_id: 1 or more.
        spacing: mm between slices, rows and columns.
        tolerance: of the surface Dice in mm.

    Returns:
        Both ``None`` where the class is not in the truth; the volume's diagonal and 0 where it was not predicted.
    """
    expected = truth == class_id
    predicted = (prediction == class_id) & (truth != IGNORE_INDEX)
    if not expected.any():
        return None, None
    if not predicted.any():
        return float(np.linalg.norm(np.multiply(truth.shape, spacing))), 0.0
    # One class in its own box: a whole volume of one-hot classes would take gigabytes.
    box = _bounding_box(expected | predicted)
    found, wanted = (torch.from_numpy(np.ascontiguousarray(one[box]))[None, None] for one in (predicted, expected))
    with warnings.catch_warnings():
        # MONAI's own code calls its deprecated option.
        warnings.filterwarnings("ignore", message=".*get_mask_edges", category=FutureWarning)
        distance = compute_hausdorff_distance(
            found, wanted, include_background=True, percentile=95, spacing=list(spacing)
        )
        share = compute_surface_dice(found, wanted, [tolerance], include_background=True, spacing=list(spacing))
    return float(distance[0, 0]), float(share[0, 0])


def _bounding_box(mask: npt.NDArray[np.bool_]) -> tuple[slice, ...]:
    def extent(axis: int) -> slice:
        others = tuple(other for other in range(mask.ndim) if other != axis)
        filled = np.flatnonzero(mask.any(axis=others))
        return slice(int(filled[0]), int(filled[-1]) + 1)

    return tuple(extent(axis) for axis in range(mask.ndim))


def choose_geometry(groups: Iterable[SliceGroup]) -> tuple[Geometry, str]:
    """How surfaces are measured, the same for everything that is evaluated, and why.

    Args:
        groups: of all sites.
    """
    every = list(groups)
    if any(not group.volume for group in every):
        return "per slice", "some images are pictures, whose distance from each other is not known"
    if not any(group.is_whole for group in every):
        return "per slice", f"no volume has {MIN_SLICES} or more consecutive slices among the images"
    return "3-D", "all images are slices of volumes with known slice distance"
