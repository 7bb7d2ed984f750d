"""Predictions as DICOM SEG, written by highdicom: one segment per class, frames that name their source image.

Torch-free. BINARY rather than LABELMAP: viewers and archives know it, and dciodvfy checks it.
"""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from icmoe import __version__
from icmoe.data.dicom import find_series, refusing
from icmoe.data.inputs import Input
from icmoe.errors import DataError

PRIVATE_SCHEME = "99ICMOE"
NAME = "icmoe-fl"
SERIES_NUMBER = 900
"""Far from the numbers that scanners give."""

_ANATOMY = codes.SCT.AnatomicalStructure
_TISSUE = codes.SCT.Tissue
_ABNORMAL = codes.SCT.MorphologicallyAbnormalStructure
_SEGMENT_LABEL_LENGTH = 64
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime",
)  # fmt: skip
"""Tags of patient and study that a SEG must repeat; pseudonymised images may lack them."""

_ANATOMIC = {
    "right ventricle": "RightVentricle", "left ventricle": "LeftVentricle", "left atrium": "LeftAtrium",
    "right atrium": "RightAtrium", "heart": "Heart", "aorta": "Aorta", "vessel": "BloodVessel",
    "prostate": "Prostate", "peripheral zone": "PeripheralZoneOfTheProstate",
    "transition zone": "TransitionZoneOfTheProstate", "bladder": "Bladder", "liver": "Liver", "kidney": "Kidney",
    "spleen": "Spleen", "pancreas": "Pancreas", "stomach": "Stomach", "gallbladder": "Gallbladder",
    "esophagus": "Esophagus", "colon": "Colon", "lung": "Lung", "brain": "Brain", "grey matter": "CerebralGrayMatter",
    "white matter": "CerebralWhiteMatter", "spinal cord": "SpinalCord", "femur": "Femur", "bone": "Bone",
    "nucleus": "Nucleus", "optic disc": "OpticDiscStructure",
}  # fmt: skip
"""Class name -> pydicom's keyword of its SNOMED CT concept."""
_PATHOLOGIC = {"tumor": "Neoplasm", "lesion": "Lesion"}
_SYNONYMS = {
    "rv": "right ventricle", "lv": "left ventricle", "myo": "myocardium", "la": "left atrium", "ra": "right atrium",
    "pz": "peripheral zone", "tz": "transition zone", "blood vessel": "vessel", "gray matter": "grey matter",
    "oesophagus": "esophagus", "tumour": "tumor", "neoplasm": "tumor", "urinary bladder": "bladder",
    "prostate peripheral zone": "peripheral zone", "prostate transition zone": "transition zone",
}  # fmt: skip


def code_of(class_name: str) -> tuple[Code, Code]:
    """Category and type of a class: SNOMED CT where the name is known, else a private code of our own scheme.

    Args:
        class_name: as the run config has it; case, ``_`` and ``-`` mean nothing.
    """
    plain = " ".join(class_name.lower().replace("_", " ").replace("-", " ").split())
    plain = _SYNONYMS.get(plain, plain)
    if plain == "myocardium":  # pydicom's table knows only the left ventricle's
        return _ANATOMY, Code("74281007", "SCT", "Myocardium")
    for category, keywords in ((_ANATOMY, _ANATOMIC), (_ABNORMAL, _PATHOLOGIC)):
        if plain in keywords:
            return category, getattr(codes.SCT, keywords[plain])
    # A code value holds 16 characters, so that a name may not fit; the same name always gets the same code.
    value = "C" + hashlib.sha256(plain.encode()).hexdigest()[:10].upper()
    return _TISSUE, Code(value, PRIVATE_SCHEME, _text(class_name))


def read_sources(item: Input, instances: Sequence[str]) -> list[pydicom.Dataset]:
    """Read the images of a DICOM input without their pixels.

    Args:
        item: a series or a picture.
        instances: SOP instance UIDs in the order that is wanted.

    Raises:
        DataError: if a file cannot be read.
    """
    files = find_series(item.path, item.series).files if item.path.is_dir() else (item.path,)
    datasets = {}
    for file in files:
        with refusing(file):
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
            for tag in _MAY_BE_EMPTY:
                dataset.setdefault(tag, "")
            datasets[str(dataset.SOPInstanceUID)] = dataset
    return [datasets[uid] for uid in instances] if instances else list(datasets.values())


def write_segmentation(
    path: Path,
    labels: npt.NDArray[np.uint8] | hd.Volume,
    sources: Sequence[pydicom.Dataset],
    *,
    class_names: Sequence[str],
    model: str,
) -> None:
    """Write class ids as a DICOM SEG; segment k is class k.

    Args:
        path: of the new file.
        labels: (N, H, W) uint8 for N source images in their order, so that no rounding of coordinates decides which
            image a frame names; of one source with several frames, a volume on its grid.
        sources: as ``read_sources`` gives them.
        class_names: of class 1, 2, ...
        model: digest of the run config, recorded as the device's serial number.

    Raises:
        DataError: if the images lack what a SEG has to repeat of them.
        OSError: if the file cannot be written.
    """
    try:
        with warnings.catch_warnings():
            # Of odd values in the source's own tags, which a SEG repeats as they are.
            warnings.simplefilter("ignore")
            segmentation = _build(labels, sources, class_names=class_names, model=model)
    # highdicom fails on incomplete sources with whatever the missing tag leads to.
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise DataError(
            f"no DICOM SEG can be made on these images ({type(error).__name__}: {reason}): they lack tags that a SEG "
            "repeats. Use --format nifti for a series, --format png for a picture."
        ) from error
    segmentation.save_as(path)


def _build(
    labels: npt.NDArray[np.uint8] | hd.Volume,
    sources: Sequence[pydicom.Dataset],
    *,
    class_names: Sequence[str],
    model: str,
) -> hd.seg.Segmentation:
    algorithm = hd.AlgorithmIdentificationSequence(
        name=NAME, family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    described = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=_text(name),
            segmented_property_category=category,
            segmented_property_type=kind,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(class_names, start=1)
        for category, kind in [code_of(name)]
    ]
    segmentation = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=labels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        series_instance_uid=hd.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=NAME,
        manufacturer_model_name="IC-MoE",
        software_versions=__version__,
        device_serial_number=model,
        content_label="PREDICTION",
        content_description="Segmentation by IC-MoE",
        specific_character_set="ISO_IR 192",  # UTF-8: the images' own may be empty or of several parts
    )
    segmentation.SeriesDescription = "IC-MoE segmentation"
    if "FrameOfReferenceUID" not in segmentation:
        # Of an image without a place in the patient, such as an X-ray.
        segmentation.PatientOrientation = sources[0].get("PatientOrientation") or ""
    if any(kind.scheme_designator == PRIVATE_SCHEME for _, kind in map(code_of, class_names)):
        scheme = pydicom.Dataset()
        scheme.CodingSchemeDesignator = PRIVATE_SCHEME
        scheme.CodingSchemeName = "Classes of icmoe-fl run configs"
        scheme.CodingSchemeResponsibleOrganization = NAME
        segmentation.CodingSchemeIdentificationSequence = [
            *segmentation.get("CodingSchemeIdentificationSequence", []), scheme,
        ]  # fmt: skip
    return segmentation


def _text(name: str) -> str:
    """What DICOM's LO takes: 64 characters, no backslash."""
    return name.replace("\\", "/")[:_SEGMENT_LABEL_LENGTH]
