"""DICOM through pydicom, highdicom and SimpleITK: series, single pictures, segmentations.

Whatever a damaged file makes these libraries raise becomes a ``DataError`` here.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pydicom
import SimpleITK as sitk
from highdicom.spatial import get_series_volume_positions
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.uid import SegmentationStorage

from icmoe.errors import DataError, IcmoeError, MaskError

MAX_PIXELS = 2**31
"""Samples of one file above which its header is taken for damaged."""
POSITION_TOLERANCE = 0.01
"""Millimetres between a segmentation's frame and the image it names."""

NOT_IMAGES = ("SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "SR", "PR", "KO", "REG", "DOC")
"""Modalities of objects about images."""

_HEADER_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality", "Rows",
    "SeriesDescription", "NumberOfFrames", "ImageOrientationPatient", "BurnedInAnnotation",
]  # fmt: skip

logger = logging.getLogger(__name__)
# Both describe at length what is wrong with a file that is refused anyway.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
logging.getLogger("highdicom").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Series:
    """One series of a folder.

    Attributes:
        uid: SeriesInstanceUID.
        modality: such as CT; SEG for segmentations.
        description: as the scanner wrote it.
        patient: PatientID.
        files: in path order, which means nothing.
        instances: SOPInstanceUID of each file.
    """

    uid: str
    modality: str
    description: str
    patient: str
    files: tuple[Path, ...]
    instances: tuple[str, ...] = ()


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a damaged file into a DataError that names the file."""
    try:
        with warnings.catch_warnings():
            # What they warn of is either harmless or found by our own checks.
            warnings.simplefilter("ignore")
            yield
    except IcmoeError:
        raise
    # Readers fail on damaged files with nearly every type there is.
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {reason}). Export it again, or leave it out."
        ) from error


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its preamble."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


@lru_cache(maxsize=32)
def list_series(folder: Path) -> tuple[Series, ...]:
    """All series below a folder, by their headers; what is no DICOM file or damaged is passed over."""
    groups: dict[str, list[tuple[Path, Any]]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and is_dicom(path):
            try:
                header = read_header(path)
            except DataError as error:
                # If it belongs to a series, the gap it leaves is found there.
                logger.warning("passed over: %s", error)
                continue
            if "SeriesInstanceUID" in header and "SOPInstanceUID" in header:
                groups.setdefault(str(header.SeriesInstanceUID), []).append((path, header))
    return tuple(
        Series(
            uid=uid,
            modality=str(members[0][1].get("Modality", "")),
            description=str(members[0][1].get("SeriesDescription", "")),
            patient=str(members[0][1].get("PatientID", "")),
            files=tuple(path for path, _ in members),
            instances=tuple(str(header.SOPInstanceUID) for _, header in members),
        )
        for uid, members in groups.items()
    )


def read_header(path: Path) -> pydicom.Dataset:
    """The tags that say what a file is.

    Raises:
        DataError: if it cannot be read.
    """
    with refusing(path):
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_HEADER_TAGS))


def referenced_instances(path: Path) -> list[str]:
    """SOP instance UIDs of the images that a segmentation names, without reading its pixels.

    Raises:
        DataError: if it cannot be read.
    """
    with refusing(path):
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        return [
            str(instance.ReferencedSOPInstanceUID)
            for series in dataset.get("ReferencedSeriesSequence", [])
            for instance in series.get("ReferencedInstanceSequence", [])
        ]


def find_series(folder: Path, uid: str) -> Series:
    """The series of a folder with this UID; with an empty one, its only image series.

    Raises:
        DataError: if there is none, or several and none was named.
    """
    images = [series for series in list_series(folder) if series.modality not in NOT_IMAGES]
    chosen = [series for series in images if uid in ("", series.uid)]
    if len(chosen) == 1:
        return chosen[0]
    shown = "; ".join(f"{s.uid} ({s.modality} {s.description}, {len(s.files)} files)" for s in images[:5]) or "none"
    problem = f"no image series {uid}" if uid else f"{len(images)} image series"
    raise DataError(f"{folder} holds {problem}. Name one in the manifest's column series. Found: {shown}.")


def read_series(series: Series) -> tuple[hd.Volume, str, tuple[str, ...]]:
    """Sort a series by position and stack it.

    Slice distance comes from the positions, never from SliceThickness.

    Returns:
        The volume in real-world units (Hounsfield for CT), float32; its digest; SOP instance UIDs by slice.

    Raises:
        DataError: if a file is damaged, slices are missing or doubled, or orientations differ.
    """
    folder = series.files[0].parent
    datasets, hashes = [], []
    for path in series.files:
        with refusing(path):
            content = path.read_bytes()
            hashes.append(hashlib.sha256(content).hexdigest())
            datasets.append(pydicom.dcmread(path))
    digest = hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()
    with refusing(folder):
        if len(datasets) == 1 and int(datasets[0].get("NumberOfFrames") or 1) > 1:
            volume = hd.imread(series.files[0]).get_volume(dtype=np.float32)
            return volume, digest, (str(datasets[0].SOPInstanceUID),)
        if len(datasets) < 2:
            raise DataError(
                f"the series in {folder} has one slice and so no slice distance. Leave the column axis empty to use "
                f"{series.files[0].name} as a picture."
            )
        # Scanners round orientations differently from slice to slice in the sixth digit.
        spacing, positions = get_series_volume_positions(datasets, sort=True, orientation_tol=1e-4)
        if spacing is None or positions is None:
            raise DataError(
                f"the {len(datasets)} slices in {folder} do not form a volume: distances between their positions "
                "differ, positions repeat, orientations differ, or the gantry is tilted. Look for missing or doubled "
                "files."
            )
        if len({tuple(map(float, ds.PixelSpacing)) for ds in datasets}) > 1:
            raise DataError(
                f"the slices in {folder} have different pixel spacings, so they form no volume. Split them."
            )
        order = np.argsort(positions)
        ordered = [datasets[index] for index in order]
        array = np.stack([decode(ds, series.files[index]) for ds, index in zip(ordered, order, strict=True)])
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
        segmentation = hd.seg.segread(path)
        _check_references(segmentation, path, image, instances)
        try:
            volume = segmentation.get_volume(combine_segments=True, dtype=np.uint16)
        except RuntimeError as error:
            if "overlap" not in str(error):
                raise
            raise MaskError(
                f"segments of {path} overlap, so that a voxel would have two classes. Keep one segment per voxel in "
                "the tool that made it, or export each as a mask of its own."
            ) from error
        return match_grid(volume, image, path)


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
