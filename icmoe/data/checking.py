"""The pre-flight check of a data folder: every image and mask is opened before anything is trained on them."""

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from icmoe.data import dicom
from icmoe.data.check_files import FileState, states_of
from icmoe.data.check_findings import (
    KINDS,
    Finding,
    Reading,
    class_findings,
    problem_findings,
    site_findings,
    unpaired_files,
)
from icmoe.data.check_opening import Opened, Thumbnail, make_thumbnail, open_together, sample_name
from icmoe.data.check_pairs import duplicates, near_duplicates, patient_findings
from icmoe.data.check_report import CheckReport, Skipped, summarise_labels, summarise_site
from icmoe.data.isolation import Lost, run_isolated

# The check goes on where ``load_manifest`` must stop, with the same rules for each line.
from icmoe.data.manifest import FILE_NAME, Sample, contradictions, parse_row, read_rows
from icmoe.errors import ManifestError

__all__ = ["CheckReport", "check_data", "num_processes"]

MAX_THUMBNAILS = 24
PICTURES_PER_CHUNK = 16
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".nii", ".nii.gz", ".dcm")
UNUSABLE = (
    "manifest-line",
    "image-missing",
    "mask-missing",
    "value-without-class",
    *(code for code, kind in KINDS.items() if kind.skippable),
)
"""Findings that make a single image useless; the other errors are about several images together."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Lines:
    """The manifest, with what cannot be used set aside."""

    root: Path
    sha256: str
    samples: tuple[Sample, ...]
    found: int
    findings: tuple[Finding, ...]


def num_processes() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_data(
    folder: Path,
    *,
    classes: Mapping[str, int] | None = None,
    ignore: Sequence[int] = (),
    default_site: str = "site",
    max_bad_share: float = 0.02,
    num_workers: int = 1,
    num_thumbnails: int = MAX_THUMBNAILS,
    progress: Progress | None = None,
) -> CheckReport:
    """Open every image and mask of a manifest in worker processes and say what is wrong with them.

    Args:
        folder: a folder with ``manifest.csv``, or the path of a csv file.
        classes: raw mask value by class name; ``None`` lists the values without judging them.
        ignore: raw mask values that count nowhere.
        default_site: site of all samples when the manifest has no ``site`` column.
        max_bad_share: share of images that may be skipped because they are damaged.
        num_workers: processes; each holds one picture or volume at a time.
        num_thumbnails: small pictures for the page, at most.
        progress: called with the number of images opened and to open.

    Returns:
        The report; it is not written anywhere.

    Raises:
        ManifestError: if there is no manifest, no line of it can be read, or somebody writes to it.
        RunError: if worker processes cannot work.
    """
    start = time.perf_counter()
    path = folder if folder.suffix.lower() == ".csv" else folder / FILE_NAME
    lines = _read_lines(path, default_site=default_site)
    readings = _open_all(lines, num_workers=num_workers, progress=progress)
    findings = _findings_of_each(lines, readings, classes=classes, ignore=ignore)
    skipped = _skipped(findings)
    usable = _usable(readings, skipped)
    by_site = {site: [r for r in usable if r.sample.site == site] for site in sorted({s.site for s in lines.samples})}
    findings += _findings_together(lines, usable, by_site, ignore=ignore)
    report = CheckReport(
        folder=str(lines.root),
        manifest_sha256=lines.sha256,
        found=lines.found,
        usable=len(usable),
        skipped=skipped,
        findings=_merge(findings),
        sites=tuple(summarise_site(site, members) for site, members in by_site.items() if members),
        labels=summarise_labels(usable, classes=classes, ignore=ignore),
        classes=dict(classes) if classes is not None else None,
        ignore=tuple(ignore),
        max_bad_share=max_bad_share,
        digests=tuple(r.opened.pixels.image_digest for r in usable if r.opened.pixels is not None),
        files=_states(readings, usable, root=lines.root),
        cache_bytes=None,
        step_bytes=None,
        seconds=time.perf_counter() - start,
    )
    shown = _choose_thumbnails(report, readings, num_thumbnails)
    return replace(report, thumbnails=_draw(shown, lines.root, num_workers=num_workers))


def _findings_of_each(
    lines: _Lines, readings: Sequence[Reading], *, classes: Mapping[str, int] | None, ignore: Sequence[int]
) -> list[Finding]:
    findings = [*lines.findings]
    for reading in readings:
        findings += problem_findings(reading.name, reading.opened)
        findings += class_findings(reading, classes=classes, ignore=ignore)
    return findings


def _findings_together(
    lines: _Lines, usable: Sequence[Reading], by_site: Mapping[str, Sequence[Reading]], *, ignore: Sequence[int]
) -> Iterator[Finding]:
    for site, members in by_site.items():
        yield from site_findings(site, members, ignore=ignore)
        yield from patient_findings(site, members)
    yield from duplicates(usable)
    yield from near_duplicates(usable)
    yield from unpaired_files(lines.root, lines.samples, is_image=_is_image)


def _read_lines(path: Path, *, default_site: str) -> _Lines:
    """Read a manifest line by line and go on after lines that cannot be used.

    Its digest is that of the lines read here: what is edited while the check runs was not checked.
    """
    before = _digest(path)
    rows = read_rows(path)
    if _digest(path) != before:
        raise ManifestError(f"{path} changed while it was read. Check again when nobody writes to it.")
    parsed: list[Sample] = []
    good: list[Sample] = []
    findings: list[Finding] = []
    for line, row in rows:
        problems, sample = parse_row(row, root=path.parent, default_site=default_site)
        name = sample_name(sample, path.parent) if sample is not None else row["image"] or f"line {line}"
        findings += [Finding(_line_code(text), (name,), f"line {line}: {text}") for text in problems]
        parsed += [sample] if sample is not None else []
        good += [sample] if sample is not None and not problems else []
    for text in contradictions(parsed, root=path.parent):
        code = "patient-in-two-splits" if text.startswith("patient ") else "manifest-line"
        findings.append(Finding(code, tuple(_named_in(text, parsed, path.parent)), text))
    # A line that stands twice is opened once.
    return _Lines(path.parent, before, tuple(dict.fromkeys(good)), len(rows), tuple(findings))


def _digest(path: Path) -> str:
    """Sha256 of a file; empty where it cannot be read, of which ``read_rows`` says more."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _line_code(problem: str) -> str:
    for column in ("image", "mask"):
        if problem.startswith(f"the {column} ") and " does not exist." in problem:
            return f"{column}-missing"
    return "manifest-line"


def _named_in(contradiction: str, samples: Sequence[Sample], root: Path) -> Iterator[str]:
    for sample in samples:
        patient = f"patient {sample.patient} of site {sample.site} is in "
        name = sample.image.relative_to(root) if sample.image.is_relative_to(root) else sample.image
        doubled = f"the image {name}" + (f", {sample.axis} slice {sample.slice} " if sample.axis else " ")
        if contradiction.startswith((patient, doubled)):
            yield sample_name(sample, root)


def _open_all(lines: _Lines, *, num_workers: int, progress: Progress | None) -> list[Reading]:
    opened: dict[int, Opened] = {}
    together: dict[object, list[int]] = defaultdict(list)
    for index, sample in enumerate(lines.samples):
        # A volume is read once, so all its slices are one piece of work.
        key = (sample.image, sample.series, sample.frame, sample.axis, sample.intensity) if sample.axis else index
        together[key].append(index)
    groups = list(together.values())
    work = partial(open_together, root=lines.root)
    for number, results in run_isolated(work, _chunks(groups, lines.samples), num_workers=num_workers):
        if isinstance(results, Lost):
            results = (Opened(None, None, (("reader-died", results.reason),)),) * len(groups[number])
        opened |= dict(zip(groups[number], results, strict=True))
        if progress is not None:
            progress(len(opened), len(lines.samples))
    return [Reading(s, sample_name(s, lines.root), opened[index]) for index, s in enumerate(lines.samples)]


def _chunks(groups: Sequence[Sequence[int]], samples: Sequence[Sample]) -> list[list[tuple[int, tuple[Sample, ...]]]]:
    items = [(number, tuple(samples[index] for index in group)) for number, group in enumerate(groups)]
    volumes = [[item] for item in items if item[1][0].axis]
    pictures = [item for item in items if not item[1][0].axis]
    # Volumes first: a long piece of work at the end would leave the other processes idle.
    return volumes + [
        pictures[first : first + PICTURES_PER_CHUNK] for first in range(0, len(pictures), PICTURES_PER_CHUNK)
    ]


def _usable(readings: Sequence[Reading], skipped: Sequence[Skipped]) -> list[Reading]:
    left_out = {one.name for one in skipped}
    return [reading for reading in readings if reading.name not in left_out]


def _states(readings: Sequence[Reading], usable: Sequence[Reading], *, root: Path) -> tuple[FileState, ...]:
    """Of the usable ones' files; a volume's may stand with a slice that is not."""
    known = (state for reading in readings for state in reading.opened.files)
    return states_of((reading.sample for reading in usable), known, root=root)


def _skipped(findings: Sequence[Finding]) -> tuple[Skipped, ...]:
    reasons: dict[str, str] = {}
    for finding in findings:
        if finding.code in UNUSABLE:
            for name in finding.files:
                reasons.setdefault(name, finding.kind.title)
    return tuple(Skipped(name, reason) for name, reason in reasons.items())


def _merge(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Errors first, kinds in the order of ``KINDS``; what is said of many files in the same words becomes one."""
    merged: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for finding in findings:
        merged[finding.code, finding.message] |= dict.fromkeys(finding.files)
    order = {code: place for place, code in enumerate(KINDS)}
    codes = sorted(merged, key=lambda key: (KINDS[key[0]].severity, order[key[0]]))
    return tuple(Finding(code, tuple(merged[code, message]), message) for code, message in codes)


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(IMAGE_SUFFIXES) or (not path.suffix and dicom.is_dicom(path))


def _choose_thumbnails(report: CheckReport, readings: Sequence[Reading], limit: int) -> list[Sample]:
    """Half for images of findings, a few of each kind; the rest evenly over the manifest, site by site."""
    readable = {r.name: r.sample for r in readings if r.opened.labels is not None}
    chosen: dict[str, None] = {}
    for depth in range(3):
        for finding in report.findings:
            named = [name for name in finding.files if name in readable]
            if finding.code != "spacing-missing" and len(chosen) < limit // 2 and depth < len(named):
                chosen[named[depth]] = None
    names = sorted(readable.keys() - chosen.keys(), key=lambda name: (readable[name].site, name))
    left = limit - len(chosen)
    step = max(1, len(names) // max(left, 1))
    chosen |= dict.fromkeys(names[step // 2 :: step][:left])
    return [readable[name] for name in chosen]


def _draw(samples: Sequence[Sample], root: Path, *, num_workers: int) -> tuple[Thumbnail, ...]:
    work = partial(make_thumbnail, root=root)
    chunks = [[item] for item in enumerate(samples)]
    drawn = dict(run_isolated(work, chunks, num_workers=min(num_workers, len(samples))))
    pictures = (drawn[index] for index in range(len(samples)))
    return tuple(picture for picture in pictures if isinstance(picture, Thumbnail))
