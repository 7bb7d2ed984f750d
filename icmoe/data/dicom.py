"""Pixels of DICOM images through pydicom, highdicom and SimpleITK: series as volumes, single pictures.

Files and series are found in ``dicom_files``, segmentations are read in ``dicom_labels``; both are offered here too.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pydicom
import SimpleITK as sitk
from highdicom.spatial import get_series_volume_positions
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.uid import SegmentationStorage

from icmoe.data.dicom_files import (
    NOT_IMAGES,
    Series,
    find_series,
    is_dicom,
    list_series,
    patient_ids,
    read_header,
    referenced_instances,
    refusing,
    series_digest,
)
from icmoe.data.dicom_labels import match_grid, read_segmentation
from icmoe.errors import DataError

__all__ = [
    "NOT_IMAGES", "Series", "decode", "find_series", "is_dicom", "list_series", "match_grid", "read_header",
    "read_picture", "read_segmentation", "read_series", "referenced_instances", "refusing",
]  # fmt: skip

MAX_PIXELS = 2**31
"""Samples of one file above which its header is taken for damaged."""


def read_series(series: Series) -> tuple[hd.Volume, str, tuple[str, ...]]:
    """Sort a series by position and stack it.

    Slice distance comes from the positions, never from SliceThickness.

    Returns:
        The volume in real-world units (Hounsfield for CT), float32; its digest; SOP instance UIDs by slice.

    Raises:
        DataError: if a file is damaged, slices are missing or doubled, orientations differ, or it has two patients.
    """
    folder = series.files[0].parent
    datasets, hashes = [], []
    for path in series.files:
        with refusing(path):
            hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
            datasets.append(pydicom.dcmread(path))
    digest = series_digest(hashes)
    with refusing(folder):
        _require_one_patient(datasets, folder)
        if len(datasets) == 1 and int(datasets[0].get("NumberOfFrames") or 1) > 1:
            return _read_frames(datasets[0], series.files[0]), digest, (str(datasets[0].SOPInstanceUID),)
        if len(datasets) < 2:
            raise DataError(
                f"the series in {folder} has one slice and so no slice distance. Leave the column axis empty to use "
                f"{series.files[0].name} as a picture."
            )
        spacing, order = _order_slices(datasets, folder)
        ordered = [datasets[index] for index in order]
        array = np.stack([decode(datasets[index], series.files[index]) for index in order])
        if array.ndim != 3:
            raise DataError(f"the series in {folder} is in colour; a volume has one value per voxel.")
        if _shows_low_values_white(ordered[0]) and series.modality != "CT":
            array = array.max() + array.min() - array
        geometry = hd.VolumeGeometry.from_attributes(
            image_position=ordered[0].ImagePositionPatient,
            image_orientation=ordered[0].ImageOrientationPatient,
            rows=array.shape[1],
            columns=array.shape[2],
            pixel_spacing=ordered[0].PixelSpacing,
            spacing_between_slices=spacing,
            number_of_frames=len(ordered),
            coordinate_system="PATIENT",
            frame_of_reference_uid=ordered[0].get("FrameOfReferenceUID"),
        )
        return geometry.with_array(array), digest, tuple(str(ds.SOPInstanceUID) for ds in ordered)


def _require_one_patient(datasets: Sequence[pydicom.Dataset], folder: Path) -> None:
    count = len(patient_ids(datasets))
    if count > 1:
        raise DataError(
            f"the series in {folder} has {count} different PatientIDs, so that it cannot be told whom it shows. "
            "Correct the ids, or take out the files of the other patient."
        )


def _order_slices(datasets: Sequence[pydicom.Dataset], folder: Path) -> tuple[float, list[int]]:
    """Distance between slices in mm, and their indices by position."""
    # Scanners round orientations differently from slice to slice in the sixth digit.
    spacing, positions = get_series_volume_positions(datasets, sort=True, orientation_tol=1e-4)
    if spacing is None or positions is None:
        raise DataError(
            f"the {len(datasets)} slices in {folder} do not form a volume: distances between their positions "
            "differ, positions repeat, orientations differ, or the gantry is tilted. Look for missing or doubled "
            "files."
        )
    if len({tuple(map(float, dataset.PixelSpacing)) for dataset in datasets}) > 1:
        raise DataError(f"the slices in {folder} have different pixel spacings, so they form no volume. Split them.")
    return spacing, [int(index) for index in np.argsort(positions)]


def _read_frames(dataset: pydicom.Dataset, path: Path) -> hd.Volume:
    """The frames of one file, placed by their positions."""
    if "PerFrameFunctionalGroupsSequence" not in dataset:
        raise DataError(
            f"{path} holds {dataset.NumberOfFrames} frames and does not say where they lie, as films of ultrasound "
            "do, so they form no volume. Export the frames as single pictures."
        )
    return hd.imread(path).get_volume(dtype=np.float32)


def read_picture(path: Path) -> npt.NDArray[np.float32]:
    """A single DICOM image.

    Returns:
        (H, W) or (H, W, 3) in real-world units, dark to bright.

    Raises:
        DataError: if it cannot be read or holds several frames.
    """
    with refusing(path):
        dataset = pydicom.dcmread(path)
        if dataset.get("SOPClassUID") == SegmentationStorage:
            raise DataError(f"{path} is a segmentation, not an image. It belongs into the column mask.")
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            raise DataError(f"{path} holds several frames. Name an axis and a slice in the manifest.")
        pixels = decode(dataset, path)
        return pixels.max() + pixels.min() - pixels if _shows_low_values_white(dataset) else pixels


def _shows_low_values_white(dataset: pydicom.Dataset) -> bool:
    return str(dataset.get("PhotometricInterpretation")) == "MONOCHROME1"


def decode(dataset: pydicom.Dataset, path: Path) -> npt.NDArray[np.float32]:
    """Pixels with palette and rescale slope applied; not inverted, which a slice of a volume must not be alone.

    Raises:
        DataError: if the pixels are missing or damaged.
    """
    num_samples = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("SamplesPerPixel") or 1)
    if "PixelData" not in dataset or not 0 < num_samples < MAX_PIXELS:
        raise DataError(f"{path} holds no pixels. It may be an empty shell left by an export that failed: repeat it.")
    photometric = str(dataset.PhotometricInterpretation)
    try:
        values = dataset.pixel_array
    except RuntimeError:
        # JPEG with 12 bits, which no permissively licensed codec of pydicom reads; ITK's rescales on its own.
        rescaled: npt.NDArray[np.float32] = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0].astype(np.float32)
        # ITK inverts on its own as well.
        return rescaled.max() + rescaled.min() - rescaled if _shows_low_values_white(dataset) else rescaled
    if photometric == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)
        return (values // 256 if values.dtype == np.uint16 else values).astype(np.float32)
    if values.ndim == 3:
        colour: npt.NDArray[np.float32] = values.astype(np.float32)
        return colour
    pixels: npt.NDArray[np.float32] = apply_modality_lut(values, dataset).astype(np.float32)
    return pixels
