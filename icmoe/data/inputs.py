"""What ``icmoe-fl predict`` is given: pictures, NIfTI volumes and DICOM series, one or a folder of them. Torch-free."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from icmoe.data import dicom
from icmoe.data.intensity import STORED, default_rule
from icmoe.data.manifest import Sample
from icmoe.data.nifti import SUFFIXES, is_nifti
from icmoe.data.volumes import StoredVolume, natural_axis, read_volume, turn
from icmoe.errors import DataError
from icmoe.types import Axis

Kind = Literal["picture", "dicom_picture", "nifti", "series"]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
VOLUMES: tuple[Kind, ...] = ("nifti", "series")
_ACCEPTED = "a PNG, JPEG or TIFF picture, a NIfTI volume (.nii, .nii.gz), a DICOM file or the folder of a DICOM series"


@dataclass(frozen=True)
class Input:
    """One thing to segment.

    Attributes:
        name: of its folder in the output.
        path: its file; the folder of a series of several files.
        kind: ``series`` is also a DICOM file with several frames.
        series: SeriesInstanceUID of a series of several files.
        frame: index of the volume in a 4-D NIfTI file.
    """

    name: str
    path: Path
    kind: Kind
    series: str = ""
    frame: str = ""

    @property
    def is_volume(self) -> bool:
        """Whether it is segmented slice by slice."""
        return self.kind in VOLUMES

    def read(self) -> StoredVolume:
        """Read a volume.

        Raises:
            DataError: if it cannot be read.
        """
        return read_volume(self.path, series=self.series, frame=self.frame)


def find_inputs(source: Path, *, out: Path, frame: str = "") -> list[Input]:
    """List what is to be segmented, sorted by name.

    Args:
        source: a file or a folder.
        out: folder of the outputs; what lies in it is passed over.
        frame: index of the volume in 4-D NIfTI files.

    Raises:
        DataError: if there is nothing of a known kind, or two things would have the same name.
    """
    if source.is_file():
        found = [_of_file(source, _stem(source), strict=True)]
    elif source.is_dir():
        found = _distinct(list(_of_folder(source, out.resolve())), source)
    else:
        raise DataError(f"{source} does not exist. Give {_ACCEPTED}, or a folder with many of these.")
    if not found:
        raise DataError(f"{source} holds nothing to segment. Looked for: {_ACCEPTED}.")
    named = [replace(item, frame=frame) if item.kind == "nifti" else item for item in found]
    return sorted(named, key=lambda item: item.name)


def slices_of(item: Input, *, axis: Axis | None, intensity: str) -> list[Sample]:
    """Address the images of an input as a manifest does, so that they are read as in training.

    Args:
        item: a picture or a volume.
        axis: of the slices of a volume; None takes the plane of acquisition.
        intensity: rule; empty takes what ``data import`` takes: stored for pictures, else the modality's default.

    Raises:
        DataError: if a volume cannot be read.
    """
    if not item.is_volume:
        return [_sample(item, intensity=intensity or STORED)]
    stored = item.read()
    chosen = axis or natural_axis(stored.grid)
    rule = intensity or default_rule(stored.modality)
    count = turn(stored.grid, chosen).spatial_shape[0]
    return [_sample(item, intensity=rule, axis=chosen, number=str(index)) for index in range(count)]


def _sample(item: Input, *, intensity: str, axis: str = "", number: str = "") -> Sample:
    # There is neither mask nor patient nor split: what reads pixels does not look at them.
    return Sample(
        image=item.path, mask=item.path, patient="", split="test", site="", slice=number, axis=axis,
        series=item.series, frame=item.frame, intensity=intensity,
    )  # fmt: skip


def _of_folder(root: Path, out: Path) -> Iterator[Input]:
    listed: set[Path] = set()
    for series in dicom.list_series(root):
        listed.update(series.files)
        files = [path for path in series.files if not path.resolve().is_relative_to(out)]
        if files and series.modality not in dicom.NOT_IMAGES:
            yield from _of_series(series, root)
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or path in listed or not path.is_file() or path.resolve().is_relative_to(out):
            continue
        known = is_nifti(path) or path.suffix.lower() in PICTURE_SUFFIXES
        # What claims to be DICOM but is in no series is damaged: it is tried, so that it is reported.
        if known or (path.name != "DICOMDIR" and dicom.is_dicom(path)):
            yield _of_file(path, _joined(path.with_name(_stem(path)).relative_to(root)))


def _of_series(series: dicom.Series, root: Path) -> Iterator[Input]:
    first = series.files[0]
    if len(series.files) > 1 and "ImageOrientationPatient" in dicom.read_header(first):
        parents = {path.parent for path in series.files}
        folder = parents.pop() if len(parents) == 1 else root
        name = folder.name if folder == root else _joined(folder.relative_to(root))
        yield Input(name, folder, "series", series=series.uid)
    else:
        # X-rays and photographs: a series of them is no volume.
        yield from (_of_file(path, _joined(path.with_name(_stem(path)).relative_to(root))) for path in series.files)


def _of_file(path: Path, name: str, *, strict: bool = False) -> Input:
    """Tell a file's kind by its name, then by its content; ``strict`` refuses what cannot be segmented."""
    if is_nifti(path):
        return Input(name, path, "nifti")
    if not dicom.is_dicom(path):
        if path.suffix.lower() not in PICTURE_SUFFIXES:
            raise DataError(f"{path} is of no known kind. Give {_ACCEPTED}, or a folder with many of these.")
        return Input(name, path, "picture")
    try:
        header = dicom.read_header(path)
    except DataError:
        if strict:
            raise
        return Input(name, path, "dicom_picture")
    modality = str(header.get("Modality", ""))
    if strict and modality in dicom.NOT_IMAGES:
        raise DataError(f"{path} is a DICOM object of modality {modality}, not an image. Give the image it belongs to.")
    return Input(name, path, "series" if int(header.get("NumberOfFrames") or 1) > 1 else "dicom_picture")


def _distinct(items: list[Input], root: Path) -> list[Input]:
    """Give inputs that would share a name their file's ending, or their series' UID."""
    counts = Counter(item.name for item in items)
    renamed = [
        item
        if counts[item.name] == 1
        else replace(item, name=f"{item.name}__{item.series}" if item.series else _joined(item.path.relative_to(root)))
        for item in items
    ]
    doubled = [name for name, count in Counter(item.name for item in renamed).items() if count > 1]
    if doubled:
        raise DataError(f"two inputs in {root} would have the name {doubled[0]}. Predict them one by one.")
    return renamed


def _joined(path: Path) -> str:
    return "__".join(path.parts)


def _stem(path: Path) -> str:
    endings = (*reversed(SUFFIXES), *PICTURE_SUFFIXES, ".dcm")
    ending = next((end for end in endings if path.name.lower().endswith(end)), "")
    return path.name[: len(path.name) - len(ending)] or path.name
