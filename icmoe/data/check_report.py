"""What a pre-flight check reports."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from icmoe.data.check_files import FileState
from icmoe.data.check_findings import Finding, Reading
from icmoe.data.check_opening import NUM_BINS, Thumbnail
from icmoe.types import SPLITS

Spread = tuple[float, float, float]
"""Smallest, median and largest."""


@dataclass(frozen=True)
class Skipped:
    """An image that cannot be used.

    Attributes:
        name: as in findings.
        reason: title of the first error.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class SiteSummary:
    """The usable images of a site.

    Attributes:
        site: its name.
        images: number by split.
        patients: number by split.
        height: rows.
        width: columns.
        row_spacing: millimetres; ``None`` where no image has any.
        column_spacing: the same across.
        without_spacing: number of images.
        brightness: mean grey of the images.
        contrast: standard deviation of grey of the images.
        histogram: share of pixels in 32 steps from dark to bright, mean over images.
    """

    site: str
    images: Mapping[str, int]
    patients: Mapping[str, int]
    height: Spread
    width: Spread
    row_spacing: Spread | None
    column_spacing: Spread | None
    without_spacing: int
    brightness: Spread
    contrast: Spread
    histogram: tuple[float, ...]


@dataclass(frozen=True)
class ClassSummary:
    """A value of the masks.

    Attributes:
        name: of the class; ``value N`` where no class map was given.
        value: raw.
        pixels: in all usable images.
        images: in which it is present.
    """

    name: str
    value: int
    pixels: int
    images: int


@dataclass(frozen=True)
class CheckReport:
    """Outcome of a check.

    Attributes:
        folder: the data folder.
        manifest_sha256: of the file as it was when its lines were read.
        found: lines of the manifest.
        usable: images that training can use.
        skipped: the others.
        findings: errors first.
        sites: by name.
        labels: raw values, smallest first.
        classes: the class map checked against, raw value by name; ``None`` where none was given.
        ignore: raw values that count nowhere.
        max_bad_share: share of skipped images up to which training may leave them out.
        digests: of the usable images, in manifest order.
        files: of the usable images and their masks.
        cache_bytes: size of the feature cache to come; ``None`` where it was not asked for.
        step_bytes: memory that one training step took at its peak, on top of what the process had; ``None`` where it
            was not tried.
        seconds: that the check took.
        thumbnails: pictures for the page; no part of the JSON.
    """

    folder: str
    manifest_sha256: str
    found: int
    usable: int
    skipped: tuple[Skipped, ...]
    findings: tuple[Finding, ...]
    sites: tuple[SiteSummary, ...]
    labels: tuple[ClassSummary, ...]
    classes: Mapping[str, int] | None
    ignore: tuple[int, ...]
    max_bad_share: float
    digests: tuple[str, ...]
    files: tuple[FileState, ...]
    cache_bytes: int | None
    step_bytes: int | None
    seconds: float
    thumbnails: tuple[Thumbnail, ...] = ()

    @cached_property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that stop, unless they are few files that can be left out."""
        return tuple(finding for finding in self.findings if finding.kind.severity == "error")

    @cached_property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that must be accepted."""
        return tuple(finding for finding in self.findings if finding.kind.severity == "warning")

    @property
    def bad_share(self) -> float:
        """Share of the manifest's images that cannot be used."""
        return len(self.skipped) / max(self.found, 1)

    @cached_property
    def stopping(self) -> tuple[Finding, ...]:
        """Errors that no share of skipped images excuses; all errors where the share is above the limit."""
        if self.bad_share > self.max_bad_share:
            return self.errors
        return tuple(finding for finding in self.errors if not finding.kind.skippable)

    @property
    def skipped_by_reason(self) -> dict[str, int]:
        """Number of skipped images by reason, most frequent first."""
        return dict(Counter(one.reason for one in self.skipped).most_common())

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "folder": self.folder,
            "manifest_sha256": self.manifest_sha256,
            "found": self.found,
            "usable": self.usable,
            "skipped": [asdict(one) for one in self.skipped],
            "skipped_by_reason": self.skipped_by_reason,
            "max_bad_share": self.max_bad_share,
            "findings": [finding.to_json() for finding in self.findings],
            "num_errors": len(self.errors),
            "num_warnings": len(self.warnings),
            "sites": [asdict(site) for site in self.sites],
            "labels": [asdict(label) for label in self.labels],
            "classes": self.classes,
            "ignore": list(self.ignore),
            "cache_bytes": self.cache_bytes,
            "step_bytes": self.step_bytes,
            "seconds": round(self.seconds, 1),
        }


def summarise_site(site: str, readings: Sequence[Reading]) -> SiteSummary:
    """Describe the usable images of a site, at least one."""
    pixels = [reading.opened.pixels for reading in readings if reading.opened.pixels is not None]
    spacings = [reading.sample.spacing for reading in readings if reading.sample.spacing is not None]
    by_split = {split: [r for r in readings if r.sample.split == split] for split in SPLITS}
    histogram = np.mean([one.histogram for one in pixels], axis=0) if pixels else np.zeros(NUM_BINS)
    return SiteSummary(
        site=site,
        images={split: len(members) for split, members in by_split.items()},
        patients={split: len({member.sample.patient for member in members}) for split, members in by_split.items()},
        height=_spread([one.height for one in pixels]),
        width=_spread([one.width for one in pixels]),
        row_spacing=_spread([row for row, _ in spacings]) if spacings else None,
        column_spacing=_spread([column for _, column in spacings]) if spacings else None,
        without_spacing=len(readings) - len(spacings),
        brightness=_spread([one.mean for one in pixels]),
        contrast=_spread([one.spread for one in pixels]),
        histogram=tuple(round(float(share), 5) for share in histogram),
    )


def summarise_labels(
    readings: Sequence[Reading], *, classes: Mapping[str, int] | None, ignore: Sequence[int]
) -> tuple[ClassSummary, ...]:
    """Count pixels and images of every raw value; classes that no mask holds are listed with zero."""
    names = {0: "background", **{value: name for name, value in (classes or {}).items()}}
    names |= dict.fromkeys(ignore, "ignored")
    pixels: Counter[int] = Counter(dict.fromkeys(names if classes is not None else (), 0))
    images: Counter[int] = Counter()
    for reading in readings:
        pixels.update(reading.opened.labels or {})
        images.update((reading.opened.labels or {}).keys())
    return tuple(
        ClassSummary(names.get(value, f"value {value}"), value, pixels[value], images[value])
        for value in sorted(pixels)
    )


def _spread(values: Sequence[float]) -> Spread:
    low, middle, high = (round(float(value), 4) for value in np.quantile(values, [0.0, 0.5, 1.0]))
    return low, middle, high
