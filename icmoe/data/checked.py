"""The record of a passed pre-flight check, ``check.json``: training at a site asks for it."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from icmoe.data.check_files import FileState, count_changed
from icmoe.data.check_opening import sample_name
from icmoe.data.check_report import CheckReport, Skipped
from icmoe.data.manifest import FILE_NAME, Manifest, Sample
from icmoe.errors import DataError, RunError

CHECK_FILE = "check.json"
FORMAT = 2


@dataclass(frozen=True)
class Checked:
    """A manifest that passed.

    Attributes:
        manifest_sha256: of the file as it was checked.
        digests: of the usable images, in manifest order; see ``sources.image_digest``.
        files: of the usable images and their masks, to notice changes; see ``check_files``.
        skipped: images that training must leave out.
        accepted: codes of the warnings that a person accepted.
        classes: raw mask value by class name; ``None`` where the check had no run config.
        date: ISO 8601, UTC.
    """

    manifest_sha256: str
    digests: tuple[str, ...]
    files: tuple[FileState, ...]
    skipped: tuple[Skipped, ...]
    accepted: tuple[str, ...]
    classes: dict[str, int] | None
    date: str


def write_checked(report: CheckReport, folder: Path) -> Path:
    """Record a report whose errors do not stop and whose warnings were accepted.

    Args:
        report: of ``check_data``.
        folder: of the record, as a rule the data folder.

    Raises:
        RunError: if it cannot be written.
    """
    content = {
        "format": FORMAT,
        "manifest_sha256": report.manifest_sha256,
        "digests": report.digests,
        "files": {one.name: [one.size, one.modified_ns, one.changed_ns, one.sha256] for one in report.files},
        "skipped": [asdict(one) for one in report.skipped],
        "accepted": sorted({finding.code for finding in report.warnings}),
        "classes": report.classes,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = folder / CHECK_FILE
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}. Give --out in a folder you may write to.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def withdraw_checked(folder: Path) -> None:
    """Remove the record, because a later check did not pass.

    Raises:
        RunError: if it cannot be removed.
    """
    path = folder / CHECK_FILE
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot remove {path}: {error.strerror}. Remove it by hand: it says that the data passed, and they no "
            "longer do."
        ) from error


def load_check(folder: Path) -> Checked | None:
    """Read the record; ``None`` where there is none.

    Raises:
        DataError: if it is damaged, or of another version of this program.
    """
    path = folder / CHECK_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(
                f"{path} was written by another version (format {content['format']}, this one reads {FORMAT}). Run "
                f"'icmoe-fl data check {folder}' again."
            )
        return Checked(
            manifest_sha256=content["manifest_sha256"],
            digests=tuple(content["digests"]),
            files=tuple(FileState(name, *state) for name, state in content["files"].items()),
            skipped=tuple(Skipped(one["name"], one["reason"]) for one in content["skipped"]),
            accepted=tuple(content["accepted"]),
            classes=content["classes"],
            date=content["date"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}). Run 'icmoe-fl data check {folder}' again.") from error


def require_checked(folder: Path, *, record: Path | None = None) -> Checked:
    """The record of a manifest that passed and, with its images and masks, did not change since.

    Sizes and times of the files are compared, which is cheap; contents are only read where times differ.

    Args:
        folder: a folder with ``manifest.csv``, or the path of a csv file.
        record: folder of ``check.json``, where it is not the manifest's.

    Raises:
        DataError: if it was never checked, did not pass, or changed since.
    """
    path = folder if folder.suffix.lower() == ".csv" else folder / FILE_NAME
    checked = load_check(record or path.parent)
    if checked is None:
        raise DataError(f"{path} was never checked, or did not pass. Run 'icmoe-fl data check {folder}' first.")
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from error
    if digest != checked.manifest_sha256:
        raise DataError(f"{path} changed since its check of {checked.date}. Run 'icmoe-fl data check {folder}' again.")
    # Goes to the centre where a site refuses: a number, no names.
    changed = count_changed(checked.files, root=path.parent)
    if changed:
        raise DataError(
            f"{changed} of {len(checked.files)} image and mask files changed, or are gone, since their check of "
            f"{checked.date}. Run 'icmoe-fl data check' on the data folder again."
        )
    return checked


def usable_samples(manifest: Manifest, checked: Checked) -> tuple[Sample, ...]:
    """The manifest's samples without those that the check skipped."""
    skipped = {one.name for one in checked.skipped}
    return tuple(sample for sample in manifest.samples if sample_name(sample, manifest.root) not in skipped)
