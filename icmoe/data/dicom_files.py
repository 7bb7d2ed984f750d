"""Which DICOM files there are and what their headers say: series by UID. No pixels; see ``icmoe.data.dicom``.

Whatever a damaged file makes pydicom and highdicom raise becomes a ``DataError`` here.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pydicom

from icmoe.errors import DataError, IcmoeError

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
        patient: PatientID; empty where no file has one. That there is only one is checked when pixels are read.
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
            patient=next(iter(patient_ids(header for _, header in members)), ""),
            files=tuple(path for path, _ in members),
            instances=tuple(str(header.SOPInstanceUID) for _, header in members),
        )
        for uid, members in groups.items()
    )


def patient_ids(headers: Iterable[pydicom.Dataset]) -> list[str]:
    """Different PatientIDs, in order; files without one, as partial anonymisation leaves them, are passed over."""
    found = (str(header.get("PatientID") or "").strip() for header in headers)
    return list(dict.fromkeys(identifier for identifier in found if identifier))


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


def series_digest(file_digests: Iterable[str]) -> str:
    """Sha256 over the digests of a series' files, whatever their names and order."""
    return hashlib.sha256("".join(sorted(file_digests)).encode()).hexdigest()
