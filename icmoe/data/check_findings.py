"""What the pre-flight check may find: kinds of finding with their remedy, and the rules that compare images."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from icmoe.data.check_opening import Opened
from icmoe.data.manifest import Sample
from icmoe.data.readers import map_classes
from icmoe.errors import MaskError
from icmoe.types import SPLITS

Severity = Literal["error", "warning"]

OUTLIER_Z = 8.0
"""Robust z, |value - median| / (1.4826 MAD) within a site, from which brightness or contrast is reported."""
MIN_DEVIATION = 0.02
"""Smallest deviation that z is counted in, as a share of the site's median: sites with equal images have none."""
MIN_IMAGES_FOR_OUTLIERS = 8
SPACING_FACTOR = 2.0


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        severity: an error stops, a warning must be accepted.
        title: as a heading.
        remedy: what to do.
        skippable: training may leave these images out, as long as they are few.
    """

    severity: Severity
    title: str
    remedy: str
    skippable: bool = False


KINDS: dict[str, Kind] = {
    "manifest-line": Kind("error", "Line of the manifest that cannot be used", "Correct the line in manifest.csv."),
    "image-missing": Kind("error", "Image missing", "Bring the file back, or remove its line from manifest.csv."),
    "mask-missing": Kind("error", "Mask missing", "Bring the mask back, or remove its line from manifest.csv."),
    "patient-in-two-splits": Kind(
        "error", "Same patient in two splits", "Give all lines of the patient the same split in manifest.csv."
    ),
    "no-training-images": Kind("error", "Site without training images", "Mark some of its lines with split train."),
    "image-unreadable": Kind(
        "error", "Image cannot be read", "Export the image again, or remove its line from manifest.csv.", True
    ),
    "empty-shell": Kind(
        "error", "DICOM file without pixels", "Repeat the export: it left a header without an image.", True
    ),
    "mask-unreadable": Kind(
        "error", "Mask cannot be read", "Export the mask again, or remove its line from manifest.csv.", True
    ),
    "reader-died": Kind(
        "error", "Reading the file ended its process", "Export the file again in another format or compression.", True
    ),
    "geometry-mismatch": Kind(
        "error", "Image and mask do not fit", "Draw the mask on this image, or export both at the same size.", True
    ),
    "mask-invalid": Kind("error", "Mask holds no class values", "Save one whole number per pixel.", True),
    "constant-image": Kind(
        "error", "Constant image", "Export the image again; a blank one teaches nothing and may hide a failure.", True
    ),
    "value-without-class": Kind(
        "error", "Mask value without a class", "Name the value under task.classes or task.ignore in the run config."
    ),
    "duplicate-across-splits": Kind(
        "error", "Same image under two patients, in different splits",
        "It is one patient under two ids: give both one id and one split, or remove one.",
    ),
    "duplicate-image": Kind(
        "warning", "Same image under two patients",
        "It is one patient under two ids: give both one id, or remove one of the lines.",
    ),
    "near-duplicate": Kind(
        "warning", "Nearly the same image under two patients",
        "Look at both: if they show one patient, give them one id and one split.",
    ),
    "one-patient": Kind(
        "warning", "All images of a site under one patient",
        "Anonymisation often gives everybody one id. Then tell patients apart by path: icmoe-fl data import with "
        "--patient-pattern.",
    ),
    "patient-id-missing": Kind(
        "warning", "DICOM images without PatientID, each a patient of its own",
        "If a patient has several of them, one may lie in two splits: icmoe-fl data import with --patient-pattern.",
    ),
    "empty-mask": Kind(
        "warning", "Empty mask", "Fine where the image shows none of the classes; else finish the drawing."
    ),
    "one-class-mask": Kind(
        "warning", "Mask with one class everywhere", "Look at it: background is 0; a whole image is rarely one class."
    ),
    "constant-slice": Kind("warning", "Blank slice of a volume", "Leave out the lines of slices beside the body."),
    "unpaired-file": Kind(
        "warning", "Image files that the manifest does not name", "Add lines for them, or move them out of the folder."
    ),
    "intensity-outlier": Kind(
        "warning", "Much brighter, darker or of other contrast than the site's images",
        "Look at it: another modality, window, bit depth or inverted grey are the usual causes.",
    ),
    "spacing-outlier": Kind(
        "warning", "Spacing far from the site's", "Compare with the scanner's header: centimetres or inches slip in."
    ),
    "spacing-missing": Kind(
        "warning", "No spacing", "Fill the column spacing (millimetres per pixel); without it distances are in pixels."
    ),
    "burned-in-text": Kind(
        "warning", "Suspected text in the picture", "Look at the image and blank what identifies the patient."
    ),
    "identifying-tag": Kind(
        "warning", "Identity that previews would show",
        "Rename the files, and import them with pseudonyms: icmoe-fl data import."
    ),
    "split-missing": Kind(
        "warning", "Site without validation or test images", "Mark some patients' lines with that split."
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be.

    Attributes:
        code: a key of ``KINDS``.
        files: relative paths, with the address of the slice for volumes.
        message: one or two sentences.
    """

    code: str
    files: tuple[str, ...]
    message: str

    @property
    def kind(self) -> Kind:
        """Severity, title and remedy."""
        return KINDS[self.code]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "severity": self.kind.severity,
            "code": self.code,
            "files": list(self.files),
            "message": self.message,
            "remedy": self.kind.remedy,
        }


@dataclass(frozen=True)
class Reading:
    """A line of the manifest with what its files held."""

    sample: Sample
    name: str
    opened: Opened


def class_findings(reading: Reading, *, classes: Mapping[str, int] | None, ignore: Sequence[int]) -> Iterator[Finding]:
    """What the labels of one image say."""
    labels = reading.opened.labels
    if labels is None:
        return
    mask = reading.sample.mask.name
    if classes is not None:
        try:
            map_classes(np.array(list(labels)), classes=tuple(classes.values()), ignore=ignore)
        except MaskError as error:
            yield Finding("value-without-class", (reading.name,), f"its mask {mask} {error}")
    if len(labels) == 1 and 0 not in labels:
        yield Finding("one-class-mask", (reading.name,), f"all pixels of its mask {mask} are {next(iter(labels))}.")


def is_empty(reading: Reading, *, ignore: Sequence[int]) -> bool:
    """Whether a mask holds nothing but background and ignored values."""
    return reading.opened.labels is not None and not set(reading.opened.labels) - {0, *ignore}


def site_findings(site: str, readings: Sequence[Reading], *, ignore: Sequence[int]) -> Iterator[Finding]:
    """What the images of one site say together."""
    splits = Counter(reading.sample.split for reading in readings)
    for split in SPLITS:
        if not splits[split]:
            code = "no-training-images" if split == "train" else "split-missing"
            yield Finding(code, (), f"site {site} has no usable image with split {split}.")
    empty = tuple(reading.name for reading in readings if is_empty(reading, ignore=ignore))
    if empty:
        yield Finding("empty-mask", empty, f"{len(empty)} of {len(readings)} masks of site {site} are empty.")
    without = tuple(reading.name for reading in readings if reading.sample.spacing is None)
    if without:
        yield Finding("spacing-missing", without, f"{len(without)} of {len(readings)} images of site {site} have none.")
    yield from _intensity_outliers(readings)
    yield from _spacing_outliers(site, readings)


def _intensity_outliers(readings: Sequence[Reading]) -> Iterator[Finding]:
    """Images whose mean or standard deviation lies far from the site's."""
    known = [(reading, reading.opened.pixels) for reading in readings if reading.opened.pixels is not None]
    if len(known) < MIN_IMAGES_FOR_OUTLIERS:
        return
    brightness, contrast = (
        np.array(values) for values in zip(*((one.mean, one.spread) for _, one in known), strict=True)
    )
    said: dict[str, list[str]] = defaultdict(list)
    for what, values in (("brightness (mean)", brightness), ("contrast (standard deviation)", contrast)):
        median = float(np.median(values))
        deviation = max(1.4826 * float(np.median(np.abs(values - median))), MIN_DEVIATION * abs(median), 1e-6)
        for (reading, _), value in zip(known, values, strict=True):
            z = abs(value - median) / deviation
            if z > OUTLIER_Z:
                said[reading.name].append(
                    f"its {what} is {value:.4g}, the site's median {median:.4g} (robust z {z:.1f} > {OUTLIER_Z:g})."
                )
    for name, sentences in said.items():
        yield Finding("intensity-outlier", (name,), " ".join(sentences))


def _spacing_outliers(site: str, readings: Sequence[Reading]) -> Iterator[Finding]:
    known = [(reading, reading.sample.spacing) for reading in readings if reading.sample.spacing is not None]
    if len(known) < 3:
        return
    median = np.median([spacing for _, spacing in known], axis=0)
    for reading, spacing in known:
        factor = max(abs(math.log(given / usual)) for given, usual in zip(spacing, median, strict=True))
        if factor > math.log(SPACING_FACTOR):
            yield Finding(
                "spacing-outlier",
                (reading.name,),
                f"its spacing is {spacing[0]:g} x {spacing[1]:g} mm, the median of site {site} is {median[0]:g} x "
                f"{median[1]:g} mm: more than a factor of {SPACING_FACTOR:g}.",
            )


def unpaired_files(root: Path, samples: Sequence[Sample], *, is_image: Callable[[Path], bool]) -> Iterator[Finding]:
    """Image files below the data folder that no line names, one finding per folder.

    A folder that a line names as a series counts as named with all its files.
    """
    named = {path for sample in samples for path in (sample.image, sample.mask)}
    folders = {sample.image for sample in samples if sample.axis and sample.image.is_dir()}
    left: dict[Path, list[str]] = defaultdict(list)
    # An imported folder is a link to where the images lie; links further down are not followed.
    links = [path for path in root.iterdir() if path.is_symlink() and path.is_dir()]
    for path in sorted(path for start in (root, *links) for path in start.rglob("*")):
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path in named or folders & set(path.parents) or not path.is_file():
            continue
        if is_image(path):
            left[relative.parent].append(relative.as_posix())
    for folder, files in left.items():
        where = "the data folder" if folder == Path() else f"the folder {folder.as_posix()}"
        yield Finding("unpaired-file", tuple(files), f"{len(files)} image files in {where} are in no line.")


def problem_findings(name: str, opened: Opened) -> Iterator[Finding]:
    """What opening one sample found."""
    for code, message in opened.problems:
        yield Finding(code, (name,), message)
