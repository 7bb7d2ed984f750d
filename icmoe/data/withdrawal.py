"""A patient takes back consent: out of the manifest, out of the cache, noted in the site's books."""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from icmoe.data.cache import FeatureCache
from icmoe.data.manifest import FILE_NAME, Sample, load_manifest
from icmoe.data.sources import image_digest
from icmoe.errors import DataError

BOOKS = "withdrawals.jsonl"


@dataclass(frozen=True)
class Withdrawal:
    """What was removed, as it stands in the books.

    Attributes:
        patient: as the manifest names them.
        images: lines taken out of the manifest.
        cache_entries: features removed.
        unread: images whose file is gone already, so that their features, if any, could not be told.
        when: UTC, ISO 8601.
    """

    patient: str
    images: int
    cache_entries: int
    unread: int
    when: str


def withdraw(folder: Path, patient: str, *, cache: FeatureCache) -> Withdrawal:
    """Remove a patient from a site's data. The images themselves belong to the hospital and stay.

    Cached features go first: if this is interrupted, the manifest still names the patient and it can be run again.

    Args:
        folder: with ``manifest.csv``.
        patient: as the manifest names them.
        cache: of this site.

    Raises:
        DataError: if the manifest does not name the patient, or would be left without training images.
    """
    path = folder / FILE_NAME
    samples = load_manifest(folder).samples
    theirs = [sample for sample in samples if sample.patient == patient]
    if not theirs:
        raise DataError(
            f"{path} names no patient {patient!r}. Give the pseudonym, or the hospital's id with the secret."
        )
    if all(sample.patient == patient for sample in samples if sample.split == "train"):
        raise DataError(f"patient {patient} has the only training images of {path}; remove the whole folder instead.")
    digests, unread = _digests(theirs)
    removed = cache.remove_images(digests)
    _rewrite(path, without=patient)
    note = Withdrawal(patient, len(theirs), removed.entries, unread, datetime.now(UTC).isoformat(timespec="seconds"))
    with (folder / BOOKS).open("a", encoding="utf-8") as books:
        books.write(json.dumps(asdict(note)) + "\n")
        books.flush()
        os.fsync(books.fileno())
    return note


def _digests(samples: Sequence[Sample]) -> tuple[set[str], int]:
    digests, unread = set(), 0
    for sample in samples:
        try:
            digests.add(image_digest(sample))
        except DataError:
            unread += 1
    return digests, unread


def _rewrite(path: Path, *, without: str) -> None:
    """Copy the manifest but for a patient's lines; columns of others' making stay."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    header = [name.strip() for name in rows[0]]
    column = header.index("patient")
    kept = [row for row in rows[1:] if len(row) <= column or row[column].strip() != without]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([rows[0], *kept])
    temporary.replace(path)
