"""``manifest.csv``: which image belongs to which mask, patient, split and site."""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from icmoe.data.intensity import IntensityRule
from icmoe.errors import ManifestError
from icmoe.types import AXES, SPLITS, Split

FILE_NAME = "manifest.csv"
REQUIRED_COLUMNS = ("image", "mask", "patient", "split")
DEFAULT_SITE = "site"
"""Site of all lines where the manifest has no such column."""
MAX_SHOWN = 10


@dataclass(frozen=True)
class Sample:
    """One image with its mask.

    Attributes:
        image: path of the image.
        mask: path of the mask.
        patient: who it shows, as text; unique within a site only.
        split: train, val or test.
        site: the hospital.
        slice: position in the patient's volume, as text; empty where there is none.
        spacing: (row, column) millimetres per pixel, None where unknown.
        axis: axial, coronal or sagittal: the image is slice number ``slice`` of a volume along it. Empty for a picture.
        series: SeriesInstanceUID, where the image is a folder that holds several.
        frame: index of the volume in a 4-D file.
        intensity: rule that makes grey of stored values; see ``icmoe.data.intensity``.
    """

    image: Path
    mask: Path
    patient: str
    split: Split
    site: str
    slice: str = ""
    spacing: tuple[float, float] | None = None
    axis: str = ""
    series: str = ""
    frame: str = ""
    intensity: str = ""


@dataclass(frozen=True)
class Manifest:
    """The checked content of a manifest, in the order of its lines.

    Attributes:
        root: the folder that paths in the file are relative to.
        samples: one for each line.
    """

    root: Path
    samples: tuple[Sample, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """Site names, sorted."""
        return tuple(sorted({sample.site for sample in self.samples}))

    def select(self, *, site: str | None = None, split: Split | None = None) -> tuple[Sample, ...]:
        """Samples of one site, one split or both, in manifest order; None takes all."""
        return tuple(s for s in self.samples if site in (None, s.site) and split in (None, s.split))


def load_manifest(folder: Path, *, default_site: str = DEFAULT_SITE) -> Manifest:
    """Read and check a manifest. No image is opened; see ``SegmentationDataset`` for what is inside them.

    Args:
        folder: a folder with ``manifest.csv``, or the path of a csv file.
        default_site: site of all samples when the file has no ``site`` column.

    Returns:
        The manifest.

    Raises:
        ManifestError: if the file is missing or malformed or contradicts itself. One message holds all findings.
    """
    path = folder if folder.suffix.lower() == ".csv" else folder / FILE_NAME
    rows = read_rows(path)
    samples: list[Sample] = []
    findings: list[str] = []
    for line, row in rows:
        problems, sample = parse_row(row, root=path.parent, default_site=default_site)
        findings += [f"line {line}: {problem}" for problem in problems]
        if sample is not None:
            samples.append(sample)
    findings += contradictions(samples, root=path.parent)
    if not findings:
        findings = _sites_without_training(samples)
    if findings:
        raise ManifestError(f"{path} cannot be used:\n{list_findings(findings)}")
    return Manifest(root=path.parent, samples=tuple(samples))


def list_findings(findings: Sequence[str]) -> str:
    """Write findings as an indented list, the first ten of them, and count the rest."""
    lines = [f"  {finding}" for finding in findings[:MAX_SHOWN]]
    if len(findings) > MAX_SHOWN:
        lines.append(f"  ... and {len(findings) - MAX_SHOWN} more")
    return "\n".join(lines)


def read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells of each row.

    Raises:
        ManifestError: if the file cannot be read as such a table.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, path=path)
            rows = [(reader.line_num, _as_mapping(header, values)) for values in reader if any(values)]
    except FileNotFoundError as error:
        raise ManifestError(_describe_missing(path)) from error
    except OSError as error:
        raise ManifestError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 text. Save it as 'CSV UTF-8'.") from error
    except csv.Error as error:
        raise ManifestError(f"{path} is not a valid csv file: {error}. Look for an unclosed quotation mark.") from error
    if not rows:
        raise ManifestError(f"{path} lists no images: below the header each line stands for one image and its mask.")
    return rows


def _describe_missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the data folder {path.parent} does not exist. Give a folder that holds {FILE_NAME} next to the images."
    return (
        f"there is no {path.name} in {path.parent}. Write one: a csv file with the columns "
        f"{', '.join(REQUIRED_COLUMNS)} (site, slice and spacing where known), a line per image, paths relative to it."
    )


def _check_header(header: Sequence[str], *, path: Path) -> None:
    missing = [name for name in REQUIRED_COLUMNS if name not in header]
    doubled = sorted({name for name in header if header.count(name) > 1})
    if missing:
        other_separator = len(header) == 1 and any(mark in header[0] for mark in ";\t|")
        hint = " Separate columns with commas." if other_separator else ""
        found = ", ".join(header) or "nothing"
        raise ManifestError(
            f"{path}: the first line lacks the columns {', '.join(missing)}; it has: {found}. "
            f"Needed are {', '.join(REQUIRED_COLUMNS)}; optional are site, slice, spacing.{hint}"
        )
    if doubled:
        raise ManifestError(f"{path}: the first line names columns twice: {', '.join(doubled)}. Keep one of each.")


def _as_mapping(header: Sequence[str], values: Sequence[str]) -> dict[str, str]:
    row = dict.fromkeys(header, "") | dict(zip(header, (value.strip() for value in values), strict=False))
    # The empty name carries what no column explains, so that the row can be refused with its line number.
    row[""] = ",".join(values[len(header) :])
    return row


def parse_row(row: Mapping[str, str], *, root: Path, default_site: str) -> tuple[list[str], Sample | None]:
    """Return what is wrong with a row, and the sample unless it is too broken to look at further."""
    if row[""].strip(","):
        return [f"more values than columns ({row['']!r} is left over). Put quotes around values with a comma."], None
    site = row.get("site", default_site)
    empty = [name for name in REQUIRED_COLUMNS if not row[name]] + (["site"] if not site else [])
    if empty:
        return [f"no value for {', '.join(empty)}."], None
    split = next((name for name in SPLITS if name == row["split"]), None)
    if split is None:
        return [f"split is {row['split']!r}. Allowed are {', '.join(SPLITS)}."], None
    problems = [*_path_problems(row, root=root), *_site_problems(site)]
    try:
        spacing = _parse_spacing(row.get("spacing", ""))
    except ValueError:
        problems.append(
            f"spacing is {row['spacing']!r}. Write millimetres per pixel as 0.7 or 0.7x0.8 (row x column), or nothing."
        )
        spacing = None
    address = {name: row.get(name, "") for name in ("slice", "axis", "series", "frame", "intensity")}
    problems += _address_problems(address)
    sample = Sample(
        image=root / row["image"], mask=root / row["mask"], patient=row["patient"], split=split, site=site,
        spacing=spacing, **address,
    )  # fmt: skip
    return problems, sample


def _path_problems(row: Mapping[str, str], *, root: Path) -> Iterator[str]:
    for column in ("image", "mask"):
        text = row[column]
        # Symbolic links inside the folder are the site's own business, so paths are judged as written.
        if PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive or ".." in PurePosixPath(text).parts:
            yield f"the {column} {text} leaves the data folder. Paths are relative to the manifest and hold no '..'."
        elif not (root / text).is_file() and not (column == "image" and row.get("axis") and (root / text).is_dir()):
            hint = " Write / between folders, not \\." if "\\" in text else ""
            yield f"the {column} {text} does not exist.{hint}"


def _address_problems(address: Mapping[str, str]) -> Iterator[str]:
    if address["axis"] and address["axis"] not in AXES:
        yield f"axis is {address['axis']!r}. Allowed are {', '.join(AXES)}, or nothing for a picture."
    if address["axis"] and not address["slice"].isdecimal():
        yield f"slice is {address['slice']!r}. With an axis it is the number of the slice, from 0."
    try:
        IntensityRule.parse(address["intensity"])
    except ManifestError as error:
        yield str(error)


def _site_problems(site: str) -> Iterator[str]:
    # The name becomes part of file names in run directories.
    if site.startswith(".") or any(mark in site for mark in "/\\"):
        yield f"site is {site!r}. A site's name holds no / and no \\ and does not start with a dot."


def _parse_spacing(text: str) -> tuple[float, float] | None:
    if not text:
        return None
    values = [float(part) for part in text.split("x")]
    if len(values) > 2 or not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(text)
    return values[0], values[-1]


def contradictions(samples: Sequence[Sample], *, root: Path) -> list[str]:
    """Say where lines contradict each other: a patient in two splits, an image listed twice."""
    splits: dict[tuple[str, str], set[str]] = {}
    counts: dict[tuple[Path, str], int] = {}
    for sample in samples:
        splits.setdefault((sample.site, sample.patient), set()).add(sample.split)
        # A slice of a volume is an image of its own.
        where = f", {sample.axis} slice {sample.slice} {sample.frame} {sample.series}".rstrip() if sample.axis else ""
        counts[sample.image, where] = counts.get((sample.image, where), 0) + 1
    divided = [
        f"patient {patient} of site {site} is in the splits {', '.join(name for name in SPLITS if name in found)}. "
        "Put all images of a patient into one split, or results would be too good to be true."
        for (site, patient), found in splits.items()
        if len(found) > 1
    ]
    doubled = [
        f"the image {image.relative_to(root)}{where} is listed {count} times. Keep one line."
        for (image, where), count in counts.items()
        if count > 1 and image.is_relative_to(root)
    ]
    return divided + doubled


def _sites_without_training(samples: Sequence[Sample]) -> list[str]:
    training = {sample.site for sample in samples if sample.split == "train"}
    return [
        f"site {site} has no image with split train. Mark some, or leave the site out."
        for site in sorted({sample.site for sample in samples} - training)
    ]
