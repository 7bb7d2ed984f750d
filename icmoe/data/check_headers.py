"""What the pre-flight check reads in DICOM headers: text in the picture, identities, missing ids."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pydicom
from pydicom import uid

from icmoe.data import dicom
from icmoe.data.manifest import Sample

_TEXT_PRONE = (
    uid.SecondaryCaptureImageStorage, uid.UltrasoundImageStorage, uid.UltrasoundMultiFrameImageStorage,
    uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage, uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
    uid.UID("1.2.840.10008.5.1.4.1.1.6"), uid.UID("1.2.840.10008.5.1.4.1.1.3"),
)  # fmt: skip
"""Kinds of image that carry drawn-in text by habit; the last two are the retired ultrasound classes."""
_HEADER_TAGS = ["SOPClassUID", "BurnedInAnnotation", "PatientName", "PatientID"]

Problem = tuple[str, str]
"""Code of a finding and what is to be said."""


def header_problems(sample: Sample, *, name: str) -> Iterator[Problem]:
    """Suspected text in the picture, and identities that the report would show; both from DICOM tags.

    Args:
        sample: a line of the manifest.
        name: of the sample, as the report shows it.
    """
    header = _header(sample.image, sample.series)
    if header is None:
        return
    burned_in = str(header.get("BurnedInAnnotation", "")).upper()
    if burned_in == "YES":
        yield "burned-in-text", "its header says that text is burned into the picture (BurnedInAnnotation YES)."
    elif burned_in != "NO" and header.get("SOPClassUID") in _TEXT_PRONE:
        yield "burned-in-text", f"its kind, {header.SOPClassUID.name}, often carries text in the picture."
    shown = f"{sample.patient}/{name}".lower()
    words = set(re.split(r"[\W_]+", shown))
    persons = {part for part in re.split(r"[\W_]+", str(header.get("PatientName", "")).lower()) if len(part) > 2}
    identifier = str(header.get("PatientID", "")).strip().lower()
    tags = ["PatientName"] * bool(persons & words) + ["PatientID"] * bool(len(identifier) > 2 and identifier in shown)
    if tags:
        yield (
            "identifying-tag",
            f"its path or the manifest's column patient repeats the DICOM tag {' and '.join(tags)}.",
        )


def lacks_patient_id(sample: Sample) -> bool:
    """Whether the image is DICOM and its header names no patient."""
    header = _header(sample.image, sample.series)
    return header is not None and not str(header.get("PatientID") or "").strip()


@lru_cache(maxsize=4)
def _header(image: Path, series: str) -> pydicom.Dataset | None:
    if image.is_dir():
        image = dicom.find_series(image, series).files[0]
    if not dicom.is_dicom(image):
        return None
    with dicom.refusing(image):
        return pydicom.dcmread(image, stop_before_pixels=True, specific_tags=list(_HEADER_TAGS))
