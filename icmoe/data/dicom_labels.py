"""DICOM SEG read through highdicom, on the grid of the image it was made on. Written ones: ``dicom_seg``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom

from icmoe.data.dicom_files import referenced_instances, refusing
from icmoe.errors import MaskError

POSITION_TOLERANCE = 0.01
"""Millimetres between a segmentation's frame and the image it names."""


def read_segmentation(path: Path, image: hd.VolumeGeometry, instances: Sequence[str]) -> hd.Volume:
    """A DICOM SEG on the grid of the series it was made on; a voxel's value is its segment's number.

    Frames are placed by their position, and the image that each names must stand at that position. The order of frames
    means nothing.

    Args:
        path: of the SEG.
        image: grid of the image volume.
        instances: SOP instance UIDs of the image by slice; empty where unknown.

    Returns:
        The volume with the grid of ``image``, uint16.

    Raises:
        MaskError: if it was made on another series or grid, or its segments overlap.
        DataError: if it cannot be read.
    """
    with refusing(path):
        dataset = pydicom.dcmread(path)
        _tell_slice_distance(dataset, image)
        segmentation = hd.seg.Segmentation.from_dataset(dataset, copy=False)
        _check_references(segmentation, path, image, instances)
        try:
            volume = segmentation.get_volume(combine_segments=True, dtype=np.uint16)
        except RuntimeError as error:
            if "regularly" in str(error):
                raise MaskError(
                    f"frames of the label {path} lie between the slices of its image, so it is on another grid. Draw "
                    "the label on this image, or resample it to it with nearest neighbour."
                ) from error
            if "overlap" not in str(error):
                raise
            raise MaskError(
                f"segments of {path} overlap, so that a voxel would have two classes. Keep one segment per voxel in "
                "the tool that made it, or export each as a mask of its own."
            ) from error
        return match_grid(volume, image, path)


def _tell_slice_distance(segmentation: pydicom.Dataset, image: hd.VolumeGeometry) -> None:
    """Enter the image's slice distance where a SEG has none of its own.

    Empty frames are left out by most writers. highdicom would guess the distance from the frames that are there: twice
    the true one where every other slice has something in it, and any for a single frame. A distance that the SEG states
    stays, because it tells a coarser grid from gaps.
    """
    shared = segmentation.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
    measures, orientation = (shared[0].get(name) for name in ("PixelMeasuresSequence", "PlaneOrientationSequence"))
    if not measures or not orientation or measures[0].get("SpacingBetweenSlices"):
        return
    row, column = np.array(orientation[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    # Of the image's axes, that through the frames.
    through = int(np.argmax(np.abs(np.cross(row, column) @ image.direction)))
    measures[0].SpacingBetweenSlices = image.spacing[through]


def match_grid(labels: hd.Volume, image: hd.VolumeGeometry, path: Path) -> hd.Volume:
    """Permute, flip and pad labels to the image's grid; never resample.

    Raises:
        MaskError: if the grids differ by more.
    """
    try:
        matched = labels.match_geometry(image, tol=1e-3)
    except RuntimeError as error:
        raise MaskError(_describe_mismatch(labels, image, path)) from error
    # match_geometry may leave a rest beyond the far end, and crops what lies outside without a word.
    whole = np.count_nonzero(matched.array) == np.count_nonzero(labels.array)
    if (
        matched.spatial_shape != image.spatial_shape
        or not np.allclose(matched.affine, image.affine, atol=1e-2)
        or not whole
    ):
        raise MaskError(_describe_mismatch(labels, image, path))
    return matched


def _describe_mismatch(labels: hd.Volume, image: hd.VolumeGeometry, path: Path) -> str:
    here, there = _millimetres(labels), _millimetres(image)
    return (
        f"the label {path} is not on its image's grid: {here} against {there}. Slices of the image may be missing. "
        "Draw the label on this image, or resample it to it with nearest neighbour."
    )


def _check_references(segmentation: Any, path: Path, image: hd.VolumeGeometry, instances: Sequence[str]) -> None:
    """Each frame must stand where the image it names stands."""
    if not instances:
        return
    positions = {uid: image.map_indices_to_reference(np.array([[i, 0, 0]]))[0] for i, uid in enumerate(instances)}
    known = 0
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        place = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        for derivation in frame.get("DerivationImageSequence", []):
            for source in derivation.get("SourceImageSequence", []):
                position = positions.get(str(source.ReferencedSOPInstanceUID))
                known += position is not None
                # A multi-frame image is one instance for all its slices.
                if position is not None and len(instances) > 1 and np.abs(position - place).max() > POSITION_TOLERANCE:
                    raise MaskError(
                        f"a frame of {path} names an image that lies {np.abs(position - place).max():.2f} mm away from "
                        "it. The segmentation is damaged: export it again."
                    )
    if not known and not set(referenced_instances(path)) & set(instances):
        raise MaskError(f"{path} names none of the images of this series. It was made on another one.")


def _millimetres(grid: hd.VolumeGeometry | hd.Volume) -> str:
    spacing, origin = (" x ".join(f"{value:.6g}" for value in values) for values in (grid.spacing, grid.position))
    shape = " x ".join(map(str, grid.spatial_shape))
    return f"{shape} voxels, spacing {spacing} and origin {origin} mm"
