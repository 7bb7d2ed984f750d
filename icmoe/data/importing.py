"""Turn a hospital's folder into a manifest. Volumes stay where they are; slices are addressed, nothing is copied."""

import csv
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from icmoe.data.intensity import STORED, IntensityRule, default_rule
from icmoe.data.manifest import FILE_NAME
from icmoe.data.pairing import LabelKind, Pair, find_pairs
from icmoe.data.pseudonyms import pseudonym
from icmoe.data.rtstruct import read_structures
from icmoe.data.secret_note import note_secret, refuse_other_secret
from icmoe.data.volumes import StoredVolume, natural_axis, read_labels, read_volume, turn
from icmoe.errors import ConfigError, DataError
from icmoe.types import SPLITS, Axis, Split

LINK = "source"
LABELS = "labels"
COLUMNS = ("image", "mask", "patient", "split", "site", "slice", "spacing", "axis", "series", "frame", "intensity")


@dataclass(frozen=True)
class ImportRequest:
    """What ``icmoe-fl data import`` was asked to do.

    Attributes:
        source: folder with images and labels.
        out: folder of the manifest.
        labels: kind of the labels.
        site: name of the hospital in the manifest.
        secret: of the pseudonyms.
        axis: slices of volumes; ``None`` is each volume's plane of acquisition.
        intensity: rule for all images; empty is the modality's default.
        patient_pattern: see ``pairing.find_pairs``.
        label_pattern: see ``pairing.find_pairs``.
        fractions: of the patients in train, val and test.
        seed: of the split.
        write_labels: write labels of volumes as NIfTI files into ``out`` and let the manifest name these.
        rois: names of an RTSTRUCT's ROIs that become the values 1, 2, ...; labels are then written too, because the
            manifest has no place for the choice. Empty: all, by ROI number.
    """

    source: Path
    out: Path
    labels: LabelKind
    site: str
    secret: bytes
    axis: Axis | None = None
    intensity: str = ""
    patient_pattern: str = ""
    label_pattern: str = ""
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    seed: int = 0
    write_labels: bool = False
    rois: tuple[str, ...] = ()


@dataclass
class ImportReport:
    """What was imported.

    Attributes:
        num_images: slices and pictures in the manifest.
        patients: pseudonyms by split.
        values: number of pixels by raw label value.
        names: ROI name by raw label value, of RTSTRUCT.
        skipped: reason by name, for what is not in the manifest.
    """

    num_images: int = 0
    patients: dict[Split, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    values: dict[int, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def import_folder(request: ImportRequest, progress: Callable[[int, int], None] | None = None) -> ImportReport:
    """Write ``manifest.csv`` for a folder. A pair that cannot be read is left out and reported.

    Args:
        request: what to do.
        progress: called with (pairs done, pairs in all).

    Raises:
        DataError: if no pair is usable.
        ConfigError: if a pattern, rule or fraction is wrong, ``out`` holds a manifest already or names another secret,
            or a label value stands for different ROIs.
    """
    IntensityRule.parse(request.intensity)
    refuse_other_secret(request.out, request.secret)
    if (request.out / FILE_NAME).exists():
        raise ConfigError(f"{request.out} already holds a {FILE_NAME}. Choose another --out, or move that one away.")
    found = find_pairs(
        request.source,
        labels=request.labels,
        patient_pattern=request.patient_pattern,
        label_pattern=request.label_pattern,
    )
    report = ImportReport(skipped=dict(found.skipped))
    request.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for number, pair in enumerate(found.pairs, start=1):
        try:
            rows += _rows_of(pair, request, report)
        except DataError as error:
            report.skipped[str(pair.image.relative_to(request.source))] = str(error)
        if progress is not None:
            progress(number, len(found.pairs))
    if not rows:
        raise DataError(
            f"none of the {len(found.pairs)} pairs can be read; first: " + next(iter(report.skipped.values()))
        )
    splits = split_patients(sorted({row["patient"] for row in rows}), fractions=request.fractions, seed=request.seed)
    for patient, split in splits.items():
        report.patients[split].append(patient)
    report.num_images = len(rows)
    note_secret(request.out, request.secret)
    _write_manifest(request.out / FILE_NAME, [{**row, "split": splits[row["patient"]]} for row in rows])
    return report


def split_patients(patients: Sequence[str], *, fractions: tuple[float, float, float], seed: int) -> dict[str, Split]:
    """Deal patients out to the splits, in an order drawn from the seed.

    Each split with a fraction above zero gets at least one patient while there are enough, training first.

    Raises:
        ConfigError: if the fractions are no shares of one.
    """
    if min(fractions) < 0 or not np.isclose(sum(fractions), 1.0) or fractions[0] <= 0:
        raise ConfigError(
            f"--split takes shares of train, val and test that sum to 1, such as 0.7,0.15,0.15; got {fractions}."
        )
    order = sorted(patients, key=lambda patient: hashlib.sha256(f"{seed} {patient}".encode()).digest())
    counts = [0, 0, 0]
    for _ in order:
        empty = [index for index in range(3) if not counts[index] and fractions[index] > 0]
        missing = [share * len(order) - count for share, count in zip(fractions, counts, strict=True)]
        counts[empty[0] if empty else int(np.argmax(missing))] += 1
    names = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
    return dict(zip(order, names, strict=True))


def _rows_of(pair: Pair, request: ImportRequest, report: ImportReport) -> list[dict[str, str]]:
    common = {
        "image": _relative(pair.image, request),
        "mask": _relative(pair.label, request),
        "patient": pseudonym(pair.patient, secret=request.secret),
        "site": request.site,
        "series": pair.series,
    }
    if request.labels == "mask":
        return [{**common, "intensity": request.intensity or STORED}]
    stored = read_volume(pair.image, series=pair.series, frame="")
    labels = _labels_of(pair, stored, request, report)
    for value, count in zip(*np.unique(labels, return_counts=True), strict=True):
        report.values[int(value)] = report.values.get(int(value), 0) + int(count)
    if request.write_labels or request.rois:
        common["mask"] = _write_label(labels, stored.grid.affine, pair, request)
    axis = request.axis or natural_axis(stored.grid)
    turned = turn(stored.grid, axis)
    _, row_spacing, column_spacing = turned.spacing
    common |= {
        "axis": axis,
        "spacing": f"{row_spacing:.6g}x{column_spacing:.6g}",
        "intensity": request.intensity or default_rule(pair.modality),
    }
    return [{**common, "slice": str(number)} for number in range(turned.shape[0])]


def _labels_of(pair: Pair, stored: StoredVolume, request: ImportRequest, report: ImportReport) -> np.ndarray:
    """Raw labels on the image's grid; of an RTSTRUCT, names and what is left out go into the report."""
    if request.labels != "rtstruct":
        return read_labels(pair.label, image=pair.image, series=pair.series, frame="").array
    structures = read_structures(pair.label, stored.grid.get_geometry(), stored.instances, rois=request.rois)
    for value, name in structures.names.items():
        known = report.names.setdefault(value, name)
        if known.casefold() != name.casefold():
            raise ConfigError(
                f"the ROI number {value} means {name!r} in {pair.label} and {known!r} in another structure set, so one "
                "label value would have two meanings. Choose ROIs by name with --roi, which numbers them in its order."
            )
    file = pair.label.relative_to(request.source)
    report.skipped |= {f"{file} ROI {name!r}": reason for name, reason in structures.left_out.items()}
    return structures.volume.array


def _relative(path: Path, request: ImportRequest) -> str:
    """A path as the manifest writes it: below ``out``, through a link where the source lies elsewhere."""
    out = request.out.absolute()
    # Links are not followed: a linked file belongs where it is linked.
    inside = Path(os.path.normpath(path.absolute()))
    source = Path(os.path.normpath(request.source.absolute()))
    if inside.is_relative_to(out):
        return str(inside.relative_to(out))
    if not inside.is_relative_to(source):
        raise ConfigError(f"the label {inside} is outside {source}. Give a folder that holds images and labels.")
    link = request.out / LINK
    if not os.path.lexists(link):
        link.symlink_to(source)
    if link.resolve() != source.resolve():
        raise ConfigError(f"{link} does not lead to {source}. Choose another --out, or remove it.")
    return str(Path(LINK) / inside.relative_to(source))


def _write_label(values: np.ndarray, affine: np.ndarray, pair: Pair, request: ImportRequest) -> str:
    """Write a label as NIfTI on its image's grid; named by what it was made of, so that no two collide."""
    name = hashlib.sha256(f"{pair.image} {pair.series}".encode()).hexdigest()[:12]
    path = request.out / LABELS / f"{name}.nii.gz"
    path.parent.mkdir(exist_ok=True)
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.nii.gz")
    smallest = np.int16 if values.max(initial=0) <= np.iinfo(np.int16).max else np.int32
    nib.save(nib.Nifti1Image(values.astype(smallest), to_ras @ affine), temporary)
    temporary.replace(path)
    return str(path.relative_to(request.out))


def _write_manifest(path: Path, rows: Sequence[dict[str, str]]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
