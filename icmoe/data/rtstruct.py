"""DICOM RTSTRUCT: closed contours in millimetres become voxels of the series they were drawn on.

pydicom reads the file and highdicom's volume geometry turns millimetres into slice, row and column. Filling a polygon
is the one step done here: Pillow moves corners to whole pixels and paints the outline too, which makes a disc of 20
pixels radius 5 % too large and lets neighbours overlap; see ``tests/unit/icmoe/test_rtstruct.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.uid import RTStructureSetStorage

from icmoe.data.dicom import read_header, refusing
from icmoe.errors import MaskError

CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
MAX_SLICE_OFFSET = 0.5
"""Slice distances between a point of a contour and its slice; from here on the next slice is as near."""
MAX_OUTSIDE = 1.0
"""Pixels that a contour may reach beyond the centres of the outermost pixels."""


@dataclass(frozen=True)
class Structures:
    """The regions of interest of a structure set, as voxels.

    Attributes:
        volume: (slices, rows, columns) int32 on the image's grid, 0 where no region is.
        names: ROI name by value.
        left_out: reason by ROI name, for what is not in ``volume``.
    """

    volume: hd.Volume
    names: dict[int, str]
    left_out: dict[str, str]


@dataclass(frozen=True)
class _Region:
    """One ROI as the file has it: ``contours`` are the items of its ContourSequence."""

    number: int
    name: str
    frame_of_reference: str
    contours: tuple[pydicom.Dataset, ...]


def is_structure_set(path: Path) -> bool:
    """Whether a DICOM file is an RTSTRUCT.

    Raises:
        DataError: if it cannot be read.
    """
    return str(read_header(path).get("SOPClassUID")) == RTStructureSetStorage


def referenced_images(path: Path) -> list[str]:
    """SOP instance UIDs of the images that a structure set names, then the UIDs of the series.

    Raises:
        DataError: if it cannot be read.
    """
    with refusing(path):
        dataset = pydicom.dcmread(path)
        contours = [contour for region in _regions(dataset) for contour in region.contours]
        series = [
            item
            for frame in dataset.get("ReferencedFrameOfReferenceSequence", [])
            for study in frame.get("RTReferencedStudySequence", [])
            for item in study.get("RTReferencedSeriesSequence", [])
        ]
        images = [uid for item in (*contours, *series) for uid in _images_of(item)]
        return [*dict.fromkeys(images), *(str(item.SeriesInstanceUID) for item in series)]


def read_structures(
    path: Path, image: hd.VolumeGeometry, instances: Sequence[str], *, rois: Sequence[str] = ()
) -> Structures:
    """Rasterise a structure set on the series it was drawn on. A voxel belongs to a contour if its centre is inside.

    A contour lies on the image it names, else on the slice nearest to it; the order of contours means nothing. Contours
    of one ROI on one slice combine by exclusive-or, so that one inside another is a hole. Nothing is interpolated
    between slices.

    Args:
        path: of the RTSTRUCT.
        image: grid of the image volume, its first axis through the slices.
        instances: SOP instance UIDs of the image by slice, or the one of a multi-frame image.
        rois: names of the ROIs wanted, in any case; the first gets the value 1. Empty: all of them, by ROI number.

    Raises:
        MaskError: if it was drawn on another series, a contour lies on no slice or leaves the image, or ROIs overlap.
        DataError: if it cannot be read.
    """
    if not instances:
        raise MaskError(f"{path} is an RTSTRUCT and its image is no DICOM series. Name the series it was drawn on.")
    with refusing(path):
        regions = _regions(pydicom.dcmread(path))
        _check_references(path, regions, instances)
        chosen = _choose(regions, rois)
        left_out = _describe_left_out([region for _, region in chosen])
        left_out |= {name: "no ROI has this name" for name in rois if not _named(name, regions)}
        names: dict[int, str] = {}
        labels = np.zeros(image.spatial_shape, np.int32)
        for value, region in chosen:
            if not any(_is_closed(contour) for contour in region.contours):
                continue
            _refuse_background(path, region, value)
            mask = _rasterise(path, region, image, instances)
            _refuse_overlap(path, region, names, labels[mask])
            labels[mask] = value
            names[value] = region.name
            if not mask.any():
                left_out[region.name] = "its contours enclose no voxel's centre"
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "it holds no contour"
        raise MaskError(f"{path} has no closed contour to use ({reasons[:300]}). Draw one, or choose other ROIs.")
    return Structures(image.with_array(labels), names, left_out)


def fill_polygon(points: npt.NDArray[np.float64], shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Pixels whose centre is inside a closed polygon, by the even-odd rule along each row.

    Of two polygons that share an edge, exactly one gets a pixel whose centre is on it.

    Args:
        points: (N, 2) rows and columns, in pixels; whole numbers are centres.
        shape: rows and columns of the picture.

    Returns:
        bool of ``shape``.
    """
    # Finer differences come from arithmetic, not from who drew it.
    start = np.round(np.asarray(points, dtype=np.float64), 6)
    end = np.roll(start, -1, axis=0)
    # An edge shared by two polygons runs both ways; taken from its upper end it crosses each row at one and the same
    # place.
    upper = np.where(start[:, :1] <= end[:, :1], start, end)
    lower = np.where(start[:, :1] <= end[:, :1], end, start)
    top, left = (int(np.ceil(low)) for low in start.min(axis=0, initial=np.inf).clip(0, shape))
    bottom, right = (int(np.ceil(high)) for high in start.max(axis=0, initial=-np.inf).clip(0, shape))
    rows = np.arange(top, bottom)[:, None]
    row, edge = np.nonzero((upper[:, 0] <= rows) & (rows < lower[:, 0]))
    share = (row + top - upper[edge, 0]) / (lower[edge, 0] - upper[edge, 0])
    crossing = upper[edge, 1] + share * (lower[edge, 1] - upper[edge, 1])
    turns = np.zeros((max(bottom - top, 0), max(right - left, 0) + 1), np.int32)
    np.add.at(turns, (row, np.ceil(crossing).clip(left, max(left, right)).astype(np.intp) - left), 1)
    inside = np.zeros(shape, np.bool_)
    inside[top:bottom, left:right] = turns.cumsum(axis=1)[:, :-1] % 2 == 1
    return inside


def _regions(dataset: pydicom.Dataset) -> list[_Region]:
    described = {int(roi.ROINumber): roi for roi in dataset.get("StructureSetROISequence", [])}
    regions = []
    for item in dataset.get("ROIContourSequence", []):
        number = int(item.ReferencedROINumber)
        roi = described.get(number, pydicom.Dataset())
        name = str(roi.get("ROIName") or "").strip() or f"ROI {number}"
        frame = str(roi.get("ReferencedFrameOfReferenceUID") or "")
        regions.append(_Region(number, name, frame, tuple(item.get("ContourSequence", []))))
    return regions


def _images_of(item: pydicom.Dataset) -> list[str]:
    return [str(image.ReferencedSOPInstanceUID) for image in item.get("ContourImageSequence", [])]


def _check_references(path: Path, regions: Sequence[_Region], instances: Sequence[str]) -> None:
    named = {uid for region in regions for contour in region.contours for uid in _images_of(contour)}
    if named and not named & set(instances):
        raise MaskError(
            f"{path} names {len(named)} images and none is in this series: it was drawn on another one. Bring the "
            "images it was drawn on."
        )


def _named(name: str, regions: Sequence[_Region]) -> list[_Region]:
    return [region for region in regions if region.name.casefold() == name.strip().casefold()]


def _choose(regions: Sequence[_Region], rois: Sequence[str]) -> list[tuple[int, _Region]]:
    """Regions and the value that each gets."""
    if not rois:
        return [(region.number, region) for region in regions]
    return [(value, region) for value, name in enumerate(rois, start=1) for region in _named(name, regions)]


def _refuse_background(path: Path, region: _Region, value: int) -> None:
    if value < 1:
        raise MaskError(
            f"{path} gives the ROI {region.name!r} the number {value}, but 0 is the background here. Choose ROIs by "
            "name with --roi, which numbers them from 1."
        )


def _is_closed(contour: pydicom.Dataset) -> bool:
    return str(contour.get("ContourGeometricType")) in CLOSED


def _describe_left_out(regions: Sequence[_Region]) -> dict[str, str]:
    left_out = {}
    for region in regions:
        kinds = [str(contour.get("ContourGeometricType")) for contour in region.contours if not _is_closed(contour)]
        if kinds:
            counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
            left_out[region.name] = f"{counts}; only CLOSED_PLANAR contours enclose voxels"
        elif not region.contours:
            left_out[region.name] = "no contour"
    return left_out


def _rasterise(
    path: Path, region: _Region, image: hd.VolumeGeometry, instances: Sequence[str]
) -> npt.NDArray[np.bool_]:
    mask = np.zeros(image.spatial_shape, np.bool_)
    stray = 0
    same_space = region.frame_of_reference in ("", str(image.frame_of_reference_uid or region.frame_of_reference))
    contours = [contour for contour in region.contours if _is_closed(contour)]
    for contour in contours:
        millimetres = np.asarray(contour.ContourData, dtype=np.float64).reshape(-1, 3)
        places = image.map_reference_to_indices(millimetres)
        number = _slice_of(places[:, 0], _images_of(contour), instances, image.spatial_shape[0], same_space=same_space)
        if number is None:
            stray += 1
            continue
        _refuse_outside(path, region, places[:, 1:], image)
        mask[number] ^= fill_polygon(places[:, 1:], (image.spatial_shape[1], image.spatial_shape[2]))
    if stray:
        raise MaskError(
            f"{stray} of {len(contours)} contours of ROI {region.name!r} in {path} lie on no slice of the series: they "
            "name images that are not here, belong to another frame of reference, or are not within half a slice "
            "distance of one. Look for missing images; draw in the plane of the slices."
        )
    return mask


def _slice_of(
    depths: npt.NDArray[np.float64], named: Sequence[str], instances: Sequence[str], count: int, *, same_space: bool
) -> int | None:
    """The slice of a contour; ``None`` if there is none.

    Args:
        depths: (N,) position of each point, in slices.
        named: images that the contour names.
        instances: of the series, by slice; one for a multi-frame image.
        count: of the slices.
        same_space: whether positions mean the same place in contour and image.
    """
    known = [instances.index(uid) for uid in named if uid in instances]
    if (named and not known) or not (named or same_space):
        return None
    middle = depths.mean()
    by_name = known and len(instances) > 1
    nearest = min(known, key=lambda index: abs(index - middle)) if by_name else np.rint(middle)
    # Damaged coordinates may be NaN, for which no comparison holds.
    on_it = bool((np.abs(depths - nearest) < MAX_SLICE_OFFSET).all()) and 0 <= nearest < count
    return int(nearest) if on_it else None


def _refuse_outside(path: Path, region: _Region, points: npt.NDArray[np.float64], image: hd.VolumeGeometry) -> None:
    last = np.array(image.spatial_shape[1:]) - 1
    if not ((points >= -MAX_OUTSIDE) & (points <= last + MAX_OUTSIDE)).all():
        raise MaskError(
            f"a contour of ROI {region.name!r} in {path} leaves the image, of which a mask cannot tell. Cut it to the "
            "image in the tool that drew it, or choose other ROIs with --roi."
        )


def _refuse_overlap(path: Path, region: _Region, names: dict[int, str], taken: npt.NDArray[Any]) -> None:
    others = [names[int(value)] for value in np.unique(taken[taken > 0])]
    if others:
        raise MaskError(
            f"the ROIs {region.name!r} and {', '.join(map(repr, others))} of {path} overlap in "
            f"{np.count_nonzero(taken)} voxels, so that a voxel would have two classes. Choose the ROIs that matter "
            "with --roi, or cut one out of the other in the tool that drew them."
        )
