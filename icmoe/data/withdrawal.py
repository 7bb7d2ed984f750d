"""A patient takes back consent: out of the manifest, out of the cache, noted in the site's books."""

import csv
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from icmoe.data.cache import FeatureCache
from icmoe.data.checked import CHECK_FILE
from icmoe.data.importing import LABELS
from icmoe.data.manifest import DEFAULT_SITE, FILE_NAME, Sample, parse_row, read_rows
from icmoe.data.sources import source_digest
from icmoe.errors import ConfigError, DataError

BOOKS = "withdrawals.jsonl"
_OURS = re.compile(r"[0-9a-f]{12}\.nii\.gz")  # as data import --write-labels names them; others are the hospital's


@dataclass(frozen=True)
class Withdrawal:
    """What was removed, as it stands in the books.

    Attributes:
        patient: as the manifest names them.
        site: whose patient.
        images: lines taken out of the manifest.
        cache_entries: features removed.
        unread: images whose file is gone already, so that their features, if any, could not be told.
        when: UTC, ISO 8601.
    """

    patient: str
    site: str
    images: int
    cache_entries: int
    unread: int
    when: str


def withdraw(folder: Path, patient: str, *, site: str = "", cache: FeatureCache) -> Withdrawal:
    """Remove a patient from a site's data. The images themselves belong to the hospital and stay.

    Cached features go first: if this is interrupted, the manifest still names the patient and it can be run again. A
    manifest with faulty lines, such as files that are gone, is no obstacle.

    Args:
        folder: with ``manifest.csv``.
        patient: as the manifest names them.
        site: needed where several sites of the manifest have such a patient.
        cache: of this site.

    Raises:
        ManifestError: if the manifest cannot be read as a table.
        DataError: if it does not name the patient, or the site would be left without training images.
        ConfigError: if several sites have such a patient and none was named.
    """
    path = folder / FILE_NAME
    parsed = [parse_row(row, root=folder, default_site=DEFAULT_SITE)[1] for _, row in read_rows(path)]
    samples = [sample for sample in parsed if sample is not None]
    theirs = [sample for sample in samples if sample.patient == patient and site in ("", sample.site)]
    sites = sorted({sample.site for sample in theirs})
    if not theirs:
        raise DataError(
            f"{path} names no such patient. Give the pseudonym that stands there, or the hospital's id with the secret."
        )
    if len(sites) > 1:
        raise ConfigError(f"the sites {', '.join(sites)} each have a patient {patient}; name one with --site.")
    left = [sample for sample in samples if sample.site == sites[0] and sample not in theirs]
    if not any(sample.split == "train" for sample in left):
        raise DataError(
            f"the site {sites[0]} would be left without training images. Take the whole site out of {path} by hand."
        )
    digests, unread = _digests(theirs)
    removed = cache.remove_images(digests)
    _remove_copies(folder, theirs, left)
    _rewrite(path, patient=patient, site=sites[0])
    when = datetime.now(UTC).isoformat(timespec="seconds")
    note = Withdrawal(patient, sites[0], len(theirs), removed.entries, unread, when)
    with (folder / BOOKS).open("a", encoding="utf-8") as books:
        books.write(json.dumps(asdict(note)) + "\n")
        books.flush()
        os.fsync(books.fileno())
    return note


def _remove_copies(folder: Path, theirs: Sequence[Sample], left: Sequence[Sample]) -> None:
    """What this project made of the images: labels it wrote, and a check with thumbnails that is out of date now."""
    kept = {sample.mask for sample in left}
    for mask in {sample.mask for sample in theirs} - kept:
        if mask.parent == folder / LABELS and _OURS.fullmatch(mask.name):
            mask.unlink(missing_ok=True)
    for name in (CHECK_FILE, "check.html"):
        (folder / name).unlink(missing_ok=True)


def _digests(samples: Sequence[Sample]) -> tuple[set[str], int]:
    digests, unread = set(), 0
    for sample in samples:
        try:
            digests.add(source_digest(sample))
        except DataError:
            unread += 1
    return digests, unread


def _rewrite(path: Path, *, patient: str, site: str) -> None:
    """Copy the manifest but for a patient's lines; columns of others' making stay."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    header = [name.strip() for name in rows[0]]

    def goes(row: list[str]) -> bool:
        cells = dict(zip(header, (value.strip() for value in row), strict=False))
        return cells.get("patient") == patient and cells.get("site", DEFAULT_SITE) == site

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([rows[0], *(row for row in rows[1:] if not goes(row))])
    temporary.replace(path)
