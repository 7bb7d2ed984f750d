"""What the pre-flight check learns of one line of the manifest: small numbers, never the pixels themselves.

Runs in worker processes, so it imports no torch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image

from icmoe.data import dicom
from icmoe.data.check_files import FileState, read_states
from icmoe.data.check_headers import Problem, header_problems, lacks_patient_id
from icmoe.data.manifest import Sample
from icmoe.data.sources import image_digest, load_pixels, load_raw_labels
from icmoe.data.volumes import read_volume
from icmoe.errors import DataError, MaskError

NUM_BINS = 32
SIGNATURE_SIDE = 16
THUMBNAIL_SIDE = 64
MAX_LABEL_VALUES = 64
_SCALES = (255.0, 65535.0)

Grey = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pixels:
    """What an image looks like, in a few hundred bytes.

    Attributes:
        image_digest: as the feature cache names the image.
        pixel_digest: sha256 of size and grey or colour values; equal for equal pixels in whatever file.
        difference_hash: 64 bits; bit set where brightness rises to the right, on an 8 x 9 grid.
        signature: 16 x 16 grey levels as bytes, stretched to 0..255.
        height: rows.
        width: columns.
        mean: of the grey values after the intensity rule.
        spread: their standard deviation.
        histogram: share of the pixels in 32 steps from darkest to brightest of 0..255, of 0..65535 or, where values
            leave both, of the image's own range.
        constant: every pixel is the same.
    """

    image_digest: str
    pixel_digest: str
    difference_hash: int
    signature: bytes
    height: int
    width: int
    mean: float
    spread: float
    histogram: tuple[float, ...]
    constant: bool


@dataclass(frozen=True)
class Opened:
    """One line of the manifest after its files were read.

    Attributes:
        pixels: ``None`` where the image cannot be read.
        labels: number of pixels by raw mask value, the 64 most frequent; ``None`` where the mask cannot be read.
        problems: what is wrong with these files by themselves.
        lacks_patient_id: it is DICOM and its header names no patient.
        files: states of the files; of lines read together, the first has them all.
    """

    pixels: Pixels | None
    labels: dict[int, int] | None
    problems: tuple[Problem, ...]
    lacks_patient_id: bool = False
    files: tuple[FileState, ...] = ()


@dataclass(frozen=True)
class Thumbnail:
    """A small picture for the report.

    Attributes:
        name: of the sample, as the report names it.
        site: its hospital.
        image: (h, w) uint8, at most 64 a side.
        labels: (h, w) uint8: 0 background, else the position of the raw value among the mask's own, from 1.
    """

    name: str
    site: str
    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]


def sample_name(sample: Sample, root: Path) -> str:
    """The image's path in the data folder and, for a slice of a volume, where it lies there."""
    name = sample.image.relative_to(root).as_posix() if sample.image.is_relative_to(root) else str(sample.image)
    address = [part for part in (sample.axis, sample.slice, sample.frame, sample.series) if part]
    return f"{name} [{' '.join(address)}]" if sample.axis else name


def open_together(samples: Sequence[Sample], *, root: Path) -> tuple[Opened, ...]:
    """Read lines that point into one volume, or a single picture. A damaged file is read once, not once a slice.

    Args:
        samples: of one volume, or one picture.
        root: the data folder, left out of messages.
    """
    first = samples[0]
    states = read_states(samples, root=root)
    if first.axis:
        try:
            read_volume(first.image, series=first.series, frame=first.frame)
        except DataError as error:
            return (_unreadable(first, error, root),) * len(samples)
    broken: dict[Path, tuple[Problem, ...]] = {}
    opened = [open_sample(sample, root=root, broken=broken) for sample in samples]
    return (replace(opened[0], files=states), *opened[1:])


def open_sample(sample: Sample, *, root: Path, broken: dict[Path, tuple[Problem, ...]] | None = None) -> Opened:
    """Read image and mask of a sample completely.

    Args:
        sample: a line of the manifest.
        root: the data folder, left out of messages.
        broken: label volumes that could not be read, with what is said of them; filled here.

    Returns:
        Numbers and problems; a damaged file is a problem, not an exception.
    """
    problems: list[Problem] = []
    broken = {} if broken is None else broken
    try:
        image = load_pixels(sample)
        pixels = describe_pixels(image, image_digest(sample))
        problems += header_problems(sample, name=sample_name(sample, root))
        nameless = lacks_patient_id(sample)
    except DataError as error:
        return _unreadable(sample, error, root)
    if pixels.constant:
        problems.append(("constant-slice" if sample.axis else "constant-image", "every pixel has the same value."))
    if sample.mask in broken:
        return Opened(pixels, None, (*problems, *broken[sample.mask]), nameless)
    labels, mask_problems = _open_mask(sample, (pixels.height, pixels.width), root=root)
    if sample.axis and mask_problems:
        broken[sample.mask] = mask_problems
    return Opened(pixels, labels, (*problems, *mask_problems), nameless)


def make_thumbnail(sample: Sample, *, root: Path) -> Thumbnail | None:
    """A small picture of a sample with its labels; ``None`` if it cannot be read."""
    try:
        grey = load_pixels(sample).mean(axis=2)
        raw = load_raw_labels(sample)
    except DataError:
        return None
    scale = THUMBNAIL_SIDE / max(grey.shape)
    size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    values, positions = np.unique(raw, return_inverse=True)
    # Background may be absent; then the first value is no background.
    ids = positions.reshape(raw.shape) + (0 if values[0] == 0 else 1)
    labels = Image.fromarray(np.minimum(ids, 254).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return Thumbnail(sample_name(sample, root), sample.site, _shrink(grey, size), np.asarray(labels))


def describe_pixels(image: Grey, digest: str) -> Pixels:
    """Numbers of an image.

    Args:
        image: (H, W, 3) values after the intensity rule.
        digest: as the feature cache names it.
    """
    height, width = image.shape[:2]
    content = hashlib.sha256(f"{height}x{width}".encode())
    content.update(np.ascontiguousarray(image).data)
    grey = image.mean(axis=2)
    low, high = float(grey.min()), float(grey.max())
    grid = _shrink(grey, (9, 8)).astype(np.int16)
    bits = np.packbits(grid[:, 1:] > grid[:, :-1])
    full = next((scale for scale in _SCALES if low >= 0 and high <= scale), None)
    counts, _ = np.histogram(grey, bins=NUM_BINS, range=(0.0, full) if full else (low, high))
    return Pixels(
        image_digest=digest,
        pixel_digest=content.hexdigest(),
        difference_hash=int.from_bytes(bits.tobytes(), "big"),
        signature=_shrink(grey, (SIGNATURE_SIDE, SIGNATURE_SIDE)).tobytes(),
        height=height,
        width=width,
        mean=float(grey.mean()),
        spread=float(grey.std()),
        histogram=tuple(round(float(share), 4) for share in counts / grey.size),
        constant=low == high,
    )


def _open_mask(
    sample: Sample, size: tuple[int, int], *, root: Path
) -> tuple[dict[int, int] | None, tuple[Problem, ...]]:
    try:
        raw = load_raw_labels(sample)
    except MaskError as error:
        message = _without_root(error, root)
        # Volumes are compared where they are read, with the class of error that colour or fractions have, too.
        elsewhere = any(words in message for words in ("grid", "another one", "away from it"))
        return None, (("geometry-mismatch" if elsewhere else "mask-invalid", message),)
    except DataError as error:
        return None, (("mask-unreadable", _without_root(error, root)),)
    if raw.shape != size:
        given = f"the image has {size[0]} x {size[1]} pixels (rows x columns), its mask "
        given += f"{sample.mask.name} {raw.shape[0]} x {raw.shape[1]}."
        return None, (("geometry-mismatch", given),)
    values, counts = np.unique(raw, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:MAX_LABEL_VALUES]
    return {int(values[place]): int(counts[place]) for place in sorted(most)}, ()


def _unreadable(sample: Sample, error: DataError, root: Path) -> Opened:
    code = "empty-shell" if _is_shell(sample) else "image-unreadable"
    # The finding names the image already.
    message = _without_root(error, root).removeprefix(f"{sample.image.relative_to(root).as_posix()} ")
    return Opened(None, None, ((code, message),))


def _is_shell(sample: Sample) -> bool:
    """Whether a DICOM file of the image has a readable header and no pixels."""
    try:
        image = sample.image
        files = dicom.find_series(image, sample.series).files if image.is_dir() else (image,)
        return any(dicom.is_dicom(path) and _lacks_pixels(path) for path in files)
    except DataError:
        return False


def _lacks_pixels(path: Path) -> bool:
    with dicom.refusing(path):
        return not pydicom.dcmread(path, specific_tags=["PixelData"]).get("PixelData")


def _without_root(error: DataError, root: Path) -> str:
    return str(error).replace(f"{root}/", "")


def _shrink(grey: Grey, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Average over areas, then stretch to 0..255: in this order, single noisy pixels do not set the range."""
    small = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BOX))
    low, high = float(small.min()), float(small.max())
    stretched: npt.NDArray[np.uint8] = ((small - low) * (255.0 / max(high - low, 1e-6))).astype(np.uint8)
    return stretched
