"""What a line of the manifest points to: pixels, raw labels, size and digest, for pictures and slices of volumes."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from icmoe.data import dicom, readers
from icmoe.data.intensity import IntensityRule, apply_limits
from icmoe.data.manifest import Sample
from icmoe.data.nifti import is_nifti
from icmoe.data.volumes import read_labels, read_volume, turn
from icmoe.errors import DataError
from icmoe.types import Axis

Limits = tuple[float, float] | None


def load_pixels(sample: Sample) -> npt.NDArray[np.float32]:
    """Pixels of a sample's image after its intensity rule; grey is repeated over three channels.

    Returns:
        (H, W, 3) float32.

    Raises:
        DataError: if it cannot be read.
    """
    if sample.axis:
        slices, limits = _slices(sample.image, sample.series, sample.frame, sample.axis, sample.intensity)
        pixels = apply_limits(slices[_slice_number(sample, len(slices))], limits)
    elif dicom.is_dicom(sample.image):
        pixels = dicom.read_picture(sample.image)
        pixels = apply_limits(pixels, IntensityRule.parse(sample.intensity).limits(pixels))
    else:
        pixels = readers.read_image(sample.image)
        pixels = apply_limits(pixels, IntensityRule.parse(sample.intensity).limits(pixels))
    if pixels.ndim == 2:
        pixels = np.broadcast_to(pixels[..., None], (*pixels.shape, 3))
    return np.ascontiguousarray(pixels)


def load_raw_labels(sample: Sample) -> npt.NDArray[np.int32]:
    """Raw values of a sample's mask; of a label volume, the slice that lies on the image's.

    Returns:
        (H, W) int32.

    Raises:
        DataError: if it cannot be read.
        MaskError: if it does not fit its image.
    """
    if sample.axis and (is_nifti(sample.mask) or dicom.is_dicom(sample.mask)):
        slices = _label_slices(sample.mask, sample.image, sample.series, sample.frame, sample.axis)
        labels: npt.NDArray[np.int32] = slices[_slice_number(sample, len(slices))].astype(np.int32)
        return labels
    return readers.read_mask(sample.mask)


def load_size(sample: Sample) -> tuple[int, int]:
    """(H, W) of a sample's image in pixels.

    Raises:
        DataError: if it cannot be read.
    """
    if sample.axis:
        slices, _ = _slices(sample.image, sample.series, sample.frame, sample.axis, sample.intensity)
        return slices.shape[1], slices.shape[2]
    if dicom.is_dicom(sample.image):
        height, width = dicom.read_picture(sample.image).shape[:2]
        return height, width
    return readers.read_size(sample.image)


def image_digest(sample: Sample) -> str:
    """Sha256 of what the pixels come from and how they are read; names the image in cache keys and seeds its views.

    Raises:
        DataError: if it cannot be read.
    """
    digest = source_digest(sample)
    if sample.axis:
        return _combine(digest, sample.frame, sample.axis, sample.slice, sample.intensity)
    return _combine(digest, sample.intensity) if sample.intensity else digest


def source_digest(sample: Sample) -> str:
    """Sha256 of a sample's file or series, however it is read.

    Raises:
        DataError: if it cannot be read.
    """
    if sample.axis:
        return read_volume(sample.image, series=sample.series, frame=sample.frame).digest
    try:
        return hashlib.sha256(sample.image.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(
            f"cannot read {sample.image}: {error.strerror}. Correct the manifest or bring the file back."
        ) from error


def _combine(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _slice_number(sample: Sample, available: int) -> int:
    number = int(sample.slice)
    if number >= available:
        raise DataError(
            f"{sample.image} has {available} {sample.axis} slices, the manifest asks for number {number}. Write 0 to "
            f"{available - 1}."
        )
    return number


@lru_cache(maxsize=2)
def _slices(image: Path, series: str, frame: str, axis: str, intensity: str) -> tuple[npt.NDArray[np.float32], Limits]:
    stored = read_volume(image, series=series, frame=frame)
    return turn(stored.grid, cast(Axis, axis)).array, IntensityRule.parse(intensity).limits(stored.grid.array)


@lru_cache(maxsize=2)
def _label_slices(mask: Path, image: Path, series: str, frame: str, axis: str) -> npt.NDArray[np.integer]:
    return turn(read_labels(mask, image=image, series=series, frame=frame), cast(Axis, axis)).array
