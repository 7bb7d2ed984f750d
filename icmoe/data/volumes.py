"""Volumes by path, whatever their format, and their slices along anatomical axes.

A volume keeps its own storage order. Slices are cut after turning it the way a radiologist looks at it, so that the
same patient gives the same slices in whatever order a file stores its axes.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import highdicom as hd
import numpy as np

from icmoe.data import dicom, rtstruct
from icmoe.data.nifti import is_nifti, read_nifti
from icmoe.errors import DataError, MaskError
from icmoe.types import AXES, Axis

_ORIENTATION = {"axial": "HPL", "coronal": "PFL", "sagittal": "LFP"}
"""Directions of slices, rows and columns, in DICOM's letters: head or foot, posterior, left."""


@dataclass(frozen=True)
class StoredVolume:
    """An image volume as it lies on disk.

    Attributes:
        grid: (I, J, K) float32 values with their place in the patient, axes in storage order.
        modality: such as CT; empty where the format does not tell.
        digest: sha256 over the bytes of its files.
        instances: SOP instance UIDs by slice; empty for NIfTI.
    """

    grid: hd.Volume
    modality: str
    digest: str
    instances: tuple[str, ...] = ()


# Two: a run through a manifest needs one at a time, and masks are read beside their images.
@lru_cache(maxsize=2)
def read_volume(path: Path, *, series: str = "", frame: str = "") -> StoredVolume:
    """Read a NIfTI file, a DICOM series or a multi-frame DICOM file.

    Args:
        path: a file, or the folder of a DICOM series.
        series: SeriesInstanceUID, where the folder holds several.
        frame: index of the volume in a 4-D NIfTI file.

    Raises:
        DataError: if it cannot be read as one volume.
    """
    if is_nifti(path):
        grid, digest = read_nifti(path, frame=frame)
        return StoredVolume(grid, "", digest)
    if path.is_dir():
        found = dicom.find_series(path, series)
    elif dicom.is_dicom(path):
        header = dicom.read_header(path)
        found = dicom.Series(str(header.get("SeriesInstanceUID")), str(header.get("Modality", "")), "", "", (path,))
    else:
        raise DataError(f"{path} is no volume: it is neither NIfTI (.nii, .nii.gz) nor DICOM.")
    grid, digest, instances = dicom.read_series(found)
    return StoredVolume(grid, found.modality, digest, instances)


@lru_cache(maxsize=2)
def read_labels(path: Path, *, image: Path, series: str = "", frame: str = "") -> hd.Volume:
    """Read the label volume of an image: NIfTI, DICOM SEG or RTSTRUCT, on the image's grid.

    Returns:
        Raw label values, int32, with the grid of the image.

    Raises:
        MaskError: if it lies on another grid or holds values that are no whole numbers.
        DataError: if a file cannot be read.
    """
    stored = read_volume(image, series=series, frame=frame)
    if not is_nifti(path):
        if rtstruct.is_structure_set(path):
            return rtstruct.read_structures(path, stored.grid.get_geometry(), stored.instances).volume
        return dicom.read_segmentation(path, stored.grid.get_geometry(), stored.instances)
    labels, _ = read_nifti(path)
    if sorted(labels.spatial_shape) != sorted(stored.grid.spatial_shape):
        raise MaskError(
            f"the label {path} has {_by(labels.spatial_shape)} voxels, its image {image} has "
            f"{_by(stored.grid.spatial_shape)}. Both must have the same grid."
        )
    whole = labels.array.astype(np.int32)
    if (whole != labels.array).any():
        raise MaskError(f"{path} holds values that are no whole numbers. Save the label with an integer type.")
    return dicom.match_grid(labels.with_array(whole), stored.grid.get_geometry(), path)


def turn(volume: hd.Volume, axis: Axis) -> hd.Volume:
    """Turn a volume so that its first axis runs through the slices of ``axis``, rows and columns as shown on a screen.

    Axial: slices to the head, rows to the back, columns to the left. Coronal: slices to the back, rows to the feet.
    Sagittal: slices to the left, rows to the feet, columns to the back.
    """
    return volume.to_patient_orientation(_ORIENTATION[axis])


def natural_axis(volume: hd.Volume) -> Axis:
    """The axis whose slices are in the plane of acquisition: across the largest voxel spacing, else axial."""
    spacing = {axis: turn(volume, axis).spacing[0] for axis in AXES}
    thickest = max(AXES, key=lambda axis: spacing[axis])
    return thickest if spacing[thickest] > 1.05 * spacing["axial"] else "axial"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
