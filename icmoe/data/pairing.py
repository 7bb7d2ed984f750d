"""Find images and their labels in a folder: DICOM series with SEGs or RTSTRUCTs, NIfTI pairs, picture pairs."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, get_args

from icmoe.data import dicom, rtstruct
from icmoe.data.nifti import is_nifti
from icmoe.errors import ConfigError, DataError

LabelKind = Literal["seg", "rtstruct", "nifti", "mask"]
LABEL_KINDS: tuple[LabelKind, ...] = get_args(LabelKind)

DICOM_KINDS: Mapping[LabelKind, str] = {"seg": "SEG", "rtstruct": "RTSTRUCT"}
"""Modality of the labels that belong to a DICOM series."""

LABEL_NAMES = ("{name}_seg", "{name}_label", "{name}_labels", "{name}_lab", "{name}_mask", "{name}_gt", "{name}")
"""Tried in this order beside the image and in the folders below; ``{name}`` is the image's name without its ending."""
LABEL_FOLDERS = ("labelsTr", "labels", "label", "masks", "mask", "annotations", "gt")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

_CHANNEL = re.compile(r"_0000$")  # nnU-Net's first channel; its label has the name without
_LABEL_ENDING = re.compile(r"_(seg|labels?|lab|mask|gt|scribble)$")


@dataclass(frozen=True)
class Pair:
    """An image and its label as found.

    Attributes:
        image: a file, or the folder of a DICOM series.
        label: a file.
        patient: the site's own id, before it is pseudonymised.
        series: SeriesInstanceUID of a DICOM series.
        modality: such as CT; empty where the format does not tell.
    """

    image: Path
    label: Path
    patient: str
    series: str = ""
    modality: str = ""


@dataclass
class Found:
    """Pairs, and what was found but cannot be used, with the reason."""

    pairs: list[Pair] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def find_pairs(source: Path, *, labels: LabelKind, patient_pattern: str, label_pattern: str) -> Found:
    """Find all pairs below a folder.

    Args:
        source: the folder.
        labels: ``seg`` or ``rtstruct`` for a DICOM tree with such objects, ``nifti`` for NIfTI pairs, ``mask`` for
            pictures.
        patient_pattern: regular expression over an image's path below ``source``; its first group is the patient.
            Empty: the PatientID for DICOM, else the image's name.
        label_pattern: path of the label relative to the image's folder, such as ``../labels/{name}.nii.gz``. Empty:
            the usual names. For ``seg`` and ``rtstruct`` a file name such as ``liver*.dcm``, where a series has more
            than one.

    Raises:
        DataError: if the folder does not exist or holds no pair at all.
        ConfigError: if a pattern is wrong.
    """
    if not source.is_dir():
        raise DataError(f"the folder {source} does not exist. Give the folder that holds the images.")
    try:
        patient_of = re.compile(patient_pattern)
    except re.error as error:
        raise ConfigError(f"--patient-pattern {patient_pattern!r} is no regular expression: {error}.") from error
    if patient_pattern and patient_of.groups < 1:
        raise ConfigError(
            f"--patient-pattern {patient_pattern!r} needs a group that is the patient, such as '(P[0-9]+)_'."
        )
    found = Found()
    if labels in DICOM_KINDS:
        _pair_series(source, found, labels=labels, wanted=label_pattern or "*")
    else:
        _pair_files(source, found, labels=labels, label_pattern=label_pattern)
    if patient_pattern:
        found.pairs = list(_with_patients(source, found, patient_of))
    elif labels not in DICOM_KINDS:
        _refuse_repeated_names(found.pairs)
    if not found.pairs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(found.skipped.items())[:5])
        raise DataError(f"no image with a label of kind '{labels}' in {source}. {reasons or 'It holds no such file.'}")
    return found


def _pair_series(source: Path, found: Found, *, labels: LabelKind, wanted: str) -> None:
    series = {one.uid: one for one in dicom.list_series(source)}
    of_instance = {uid: one.uid for one in series.values() for uid in one.instances}
    of_series: dict[str, list[Path]] = {}
    for one in series.values():
        if one.modality != DICOM_KINDS[labels]:
            continue
        for path in (path for path in one.files if fnmatch(path.name, wanted)):
            try:
                target = _referenced_series(path, of_instance, labels)
            except DataError as error:
                found.skipped[str(path.relative_to(source))] = str(error)
                continue
            if target in series:
                of_series.setdefault(target, []).append(path)
            else:
                found.skipped[str(path.relative_to(source))] = "the series it was made on is not here"
    for one in series.values():
        if one.modality in dicom.NOT_IMAGES:
            continue
        name = f"{one.files[0].parent.relative_to(source)} {one.modality} {one.description} {one.uid}".strip()
        masks = of_series.get(one.uid, [])
        if len(masks) == 1:
            found.pairs.append(Pair(common_folder(one.files), masks[0], one.patient or one.uid, one.uid, one.modality))
        else:
            names = ", ".join(path.name for path in masks[:4]) or "none"
            found.skipped[name] = f"one {DICOM_KINDS[labels]} is needed, found {names}; choose with --label-pattern"
    for path in sorted(source.rglob("*.dcm")):
        if path.is_file() and not dicom.is_dicom(path):
            found.skipped[str(path.relative_to(source))] = (
                "it lacks the preamble of a DICOM file, as some old exports do: export it again"
            )


def _referenced_series(path: Path, of_instance: Mapping[str, str], labels: LabelKind) -> str:
    """UID of the series whose images a label names, told by the images; some RTSTRUCTs name only the series."""
    if labels == "seg":
        named = dicom.referenced_instances(path)
        return next((of_instance[uid] for uid in named if uid in of_instance), "")
    named = rtstruct.referenced_images(path)
    uids = set(of_instance.values())
    return next((of_instance.get(uid, uid) for uid in named if uid in of_instance or uid in uids), "")


def common_folder(files: tuple[Path, ...]) -> Path:
    """The deepest folder that holds all files."""
    folder = files[0].parent
    while not all(path.is_relative_to(folder) for path in files):
        folder = folder.parent
    return folder


def _pair_files(source: Path, found: Found, *, labels: LabelKind, label_pattern: str) -> None:
    def fits(path: Path) -> bool:
        return is_nifti(path) if labels == "nifti" else path.suffix.lower() in PICTURES

    files = [path for path in sorted(source.rglob("*")) if path.is_file() and fits(path)]
    for image in files:
        name = stem(image)
        if _LABEL_ENDING.search(name) or image.parent.name in LABEL_FOLDERS:
            continue
        candidates = _candidates(image, name, label_pattern)
        found_here = ((path, base) for path, base in candidates if path.is_file() and path != image)
        label, patient = next(found_here, (None, ""))
        if label is None:
            found.skipped[str(image.relative_to(source))] = "no label beside it"
        else:
            found.pairs.append(Pair(image, label, patient))


def stem(path: Path) -> str:
    """Name without its ending, .nii.gz counting as one."""
    return path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem


def _candidates(image: Path, name: str, label_pattern: str) -> Iterator[tuple[Path, str]]:
    """Places where the label may be, each with the name that image and label share."""
    if label_pattern:
        try:
            yield image.parent / label_pattern.format(name=name), name
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(f"--label-pattern {label_pattern!r} may use {{name}} only: {error}.") from error
        return
    folders = [image.parent, *(image.parent.parent / folder for folder in LABEL_FOLDERS)]
    endings = (".nii.gz", ".nii") if is_nifti(image) else (".png", ".tif", ".tiff", ".gif", ".bmp")
    for base in dict.fromkeys((name, _CHANNEL.sub("", name))):
        for folder in folders:
            for pattern in LABEL_NAMES:
                # An equal name beside the image is as likely the image in another format.
                if folder == image.parent and pattern == "{name}":
                    continue
                yield from ((folder / (pattern.format(name=base) + ending), base) for ending in endings)


def _refuse_repeated_names(pairs: list[Pair]) -> None:
    """P1/t2.nii.gz and P2/t2.nii.gz are hardly the same patient: the name alone does not tell."""
    first: dict[str, Path] = {}
    for pair in pairs:
        other = first.setdefault(pair.patient, pair.image)
        if other.parent != pair.image.parent:
            raise ConfigError(
                f"{other} and {pair.image} have the same name, so it does not tell the patient. Say which part of "
                "the path does with --patient-pattern, such as '([^/]+)/[^/]+$' for the folder."
            )


def _with_patients(source: Path, found: Found, patient_of: re.Pattern[str]) -> Iterator[Pair]:
    for pair in found.pairs:
        path = str(pair.image.relative_to(source))
        match = patient_of.search(path)
        if match is None or not match.group(1):
            found.skipped[path] = "--patient-pattern does not fit it"
        else:
            yield Pair(pair.image, pair.label, match.group(1), pair.series, pair.modality)
