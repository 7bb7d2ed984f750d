"""The embedded default data of ``make demo``: one averaged brain as three scanners would show it.

The anatomy is the MNI152 T1 template with its grey and white matter maps (Fonov et al. 2011), as shipped inside the
nilearn wheel, so nothing is downloaded. A pseudo-patient is a seeded deformation of it; T1 and both maps are deformed
together, so that the mask always fits the image. Each patient belongs to one scanner.

Only the pixels of the wanted slices are deformed: the displacement is a B-spline formula, not a dense volume.

Positions are in mm. The template has 1 mm voxels, so a position is also a voxel index: x grows to the patient's right,
y to the front, z to the head.

Letters: X, Y, Z template voxels; L axial levels; T planes in one thick slice; H, W rows and columns of an image.
"""

import csv
import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from monai.transforms.intensity.array import AdjustContrast, GaussianSmooth, RandBiasField, RandRicianNoise
from monai.transforms.spatial.array import Resize
from PIL import Image
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from icmoe.errors import DataError, RunError
from icmoe.types import Split

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

DEMO_VERSION = 1
"""Raise it when the same seed would give other pixels: older demo folders are then written anew."""

GREY_MATTER, WHITE_MATTER = 1, 2
"""Raw mask values; everything else is 0."""

COLUMNS = ("site", "image", "mask", "width", "height", "split", "patient", "slice", "spacing")
PATIENT_SPLITS: tuple[Split, ...] = ("train", "train", "train", "train", "val", "test")
LEVELS_MM = (62.0, 76.0, 92.0, 112.0)
"""Temporal lobes and midbrain, basal ganglia, lateral ventricles, centrum semiovale."""

_RECORD = "demo.json"
_SIZE_MM = np.array([197.0, 233.0, 189.0])
_CENTRE_MM = np.array([98.0, 117.5, 76.0])
_CONTROL_GRIDS = ((48.0, 11.0), (20.0, 3.6))
"""(node spacing, largest coefficient) of the two B-spline displacements, in mm. The ratios sum to 0.41: below 0.48 a
cubic B-spline deformation cannot fold (Choi and Lee 2000)."""


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """How one scanner shows the anatomy.

    Args:
        site: name of the site that owns it.
        size: image rows and columns (H, W).
        spacing: pixel size in mm.
        resolution: in-plane resolution of the acquisition in mm; the image is interpolated from it.
        thickness: slice thickness in mm.
        grey_shift: added to the signal of pure grey matter, in units of the template's brightest voxel.
        white_shift: the same for white matter.
        gamma: exponent of the tone curve.
        bias: largest coefficient of the receive coil's bias field, a cubic polynomial in the exponent.
        noise: standard deviation of the complex noise, in units of the template's brightest voxel.
    """

    site: str
    size: tuple[int, int]
    spacing: float
    resolution: float
    thickness: float
    grey_shift: float
    white_shift: float
    gamma: float
    bias: float
    noise: float


SCANNERS = (
    Scanner(
        site="scanner_a_3t", size=(248, 204), spacing=0.875, resolution=1.0, thickness=1.0,
        grey_shift=-0.08, white_shift=0.02, gamma=1.1, bias=0.3, noise=0.02,
    ),
    Scanner(
        site="scanner_b_1t5", size=(216, 180), spacing=1.0, resolution=1.25, thickness=3.0,
        grey_shift=0.0, white_shift=-0.03, gamma=0.8, bias=0.12, noise=0.03,
    ),
    Scanner(
        site="scanner_c_lowfield", size=(192, 160), spacing=1.125, resolution=1.8, thickness=5.0,
        grey_shift=-0.02, white_shift=-0.08, gamma=1.0, bias=0.2, noise=0.045,
    ),
)  # fmt: skip


def write_demo_data(folder: Path, *, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write the demo's data folder, or reuse a complete one of the same seed and version.

    Args:
        folder: becomes the data folder, with ``manifest.csv`` in it. An older or damaged demo folder there is replaced.
        seed: another seed gives other patients; the same seed gives the same bytes.
        progress: called with (slices done, slices in all).

    Returns:
        The folder.

    Raises:
        DataError: if nilearn is missing, or ``folder`` holds something other than demo data.
        RunError: if the folder cannot be written.
    """
    target = folder.resolve()
    if _is_complete(target, seed):
        logger.info("reusing the demo data in %s", folder)
        return folder
    if target.exists() and not (target.is_dir() and ((target / _RECORD).exists() or not any(target.iterdir()))):
        raise DataError(
            f"{folder} exists and holds no demo data. Give a folder that does not exist yet, or move this one away."
        )
    anatomy = load_anatomy()
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        _write_all(partial, anatomy, seed, progress)
        _move_into_place(partial, target, seed)
    except OSError as error:
        raise RunError(
            f"cannot write the demo data to {folder}: {error.strerror}. Free about 10 MB there or give another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load_anatomy() -> ByteArray:
    """Read the template that ships inside the nilearn wheel.

    Returns:
        (3, X, Y, Z) uint8: T1 signal, grey matter and white matter probability, each scaled to 0..255.

    Raises:
        DataError: if nilearn is not installed or no longer ships the files.
    """
    try:
        from nibabel import Nifti1Image

        volumes = []
        for name in ("t1", "gm", "wm"):
            resource = files("nilearn") / "datasets" / "data" / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
            with as_file(resource) as path:
                volumes.append(np.asarray(Nifti1Image.from_filename(path).dataobj, dtype=np.uint8))
    except (ImportError, FileNotFoundError) as error:
        raise DataError(
            "the demo's brain template ships inside the package nilearn (0.11 to 0.13), and it is not installed here. "
            "Run: pip install 'icmoe-fl[demo]'"
        ) from error
    return np.stack(volumes)


def draw_patient(
    anatomy: ByteArray, scanner: Scanner, *, patient_seed: tuple[int, ...]
) -> list[tuple[ByteArray, ByteArray]]:
    """Deform the anatomy into one patient and scan it.

    Args:
        anatomy: (3, X, Y, Z) uint8, see ``load_anatomy``.
        scanner: how the images look.
        patient_seed: fixes anatomy, coil and noise of this patient.

    Returns:
        Image and mask, (H, W) uint8 each, per level of ``LEVELS_MM``, from foot to head.
    """
    rng = np.random.default_rng(patient_seed)
    points = deform(slice_positions(scanner, rng), rng)
    sampled = [map_coordinates(volume, points, output=np.float32, order=1) / np.float32(255) for volume in anatomy]
    # A thick slice shows the mean over its thickness; the mask says what fills most of each pixel.
    signal, grey, white = (planes.mean(axis=1) for planes in sampled)
    images = _scan(signal + scanner.grey_shift * grey + scanner.white_shift * white, scanner, rng)
    masks = np.argmax(np.stack([1 - grey - white, grey, white]), axis=0).astype(np.uint8)
    return list(zip(images, masks, strict=True))


def slice_positions(scanner: Scanner, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Positions of all pixels in mm, (3, L, T, H, W); the front is up and the patient's right is on the left side."""
    rows, columns = scanner.size
    num_planes = max(1, round(scanner.thickness))
    x = _CENTRE_MM[0] - (np.arange(columns) - (columns - 1) / 2) * scanner.spacing
    y = _CENTRE_MM[1] - (np.arange(rows) - (rows - 1) / 2) * scanner.spacing
    levels = np.array(LEVELS_MM) + rng.uniform(-3.0, 3.0, size=len(LEVELS_MM))
    across = (np.arange(num_planes) - (num_planes - 1) / 2) * scanner.thickness / num_planes
    z = levels[:, None] + across
    shape = (*z.shape, rows, columns)
    return np.stack([np.broadcast_to(axis, shape) for axis in (x, y[:, None], z[:, :, None, None])])


def deform(points: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Map positions in a patient to positions in the template: a small affine, then two smooth displacements.

    Args:
        points: (3, ...) positions in mm.
        rng: two equal generators give the same patient.

    Returns:
        (3, ...) positions in the template, in mm. The map does not fold.
    """
    turn = Rotation.from_euler("xyz", rng.uniform((-4, -3, -6), (4, 3, 6)), degrees=True).as_matrix()
    matrix = turn @ np.diag(np.exp(rng.uniform(-0.07, 0.07, size=3)))
    shift = rng.uniform((-3, -4, -3), (3, 4, 3))
    centre = _CENTRE_MM.reshape(3, *(1,) * (points.ndim - 1))
    moved = np.tensordot(matrix, points - centre, axes=1) + centre + shift.reshape(centre.shape)
    result: npt.NDArray[np.float64] = moved
    for node_spacing, largest in _CONTROL_GRIDS:
        num_nodes = np.ceil(_SIZE_MM / node_spacing).astype(int) + 5  # two beyond each face
        coefficients = rng.uniform(-largest, largest, size=(3, *num_nodes))
        where = moved / node_spacing + 2
        result = result + np.stack(
            [map_coordinates(axis, where, order=3, mode="nearest", prefilter=False) for axis in coefficients]
        )
    return result


def _scan(signal: FloatArray, scanner: Scanner, rng: np.random.Generator) -> ByteArray:
    """Turn (L, H, W) tissue signal into (L, H, W) uint8 images; the levels are MONAI's channels and share one coil."""
    scale = scanner.spacing / scanner.resolution
    acquired = tuple(round(side * scale) for side in scanner.size)
    field = RandBiasField(prob=1.0, coeff_range=(-scanner.bias, scanner.bias))
    noise = RandRicianNoise(prob=1.0, std=scanner.noise, sample_std=False)
    for transform in (field, noise):
        transform.set_random_state(seed=int(rng.integers(2**31)))
    smooth = GaussianSmooth(sigma=0.42 / scale)(field(AdjustContrast(gamma=scanner.gamma)(signal.clip(0, 1))))
    # 0.42 acquired pixels make a full width at half maximum of one. Noise arises on the acquired grid.
    coarse = noise(Resize(acquired, mode="bilinear")(torch.as_tensor(smooth)))
    pixels = np.asarray(Resize(scanner.size, mode="bicubic")(torch.as_tensor(coarse)))
    # Each series is stored with its own window, as scanners do.
    return np.asarray((pixels / np.percentile(pixels, 99.8)).clip(0, 1) * 255).round().astype(np.uint8)


def _write_all(folder: Path, anatomy: ByteArray, seed: int, progress: Callable[[int, int], None] | None) -> None:
    rows: list[tuple[object, ...]] = []
    total = len(SCANNERS) * len(PATIENT_SPLITS) * len(LEVELS_MM)
    for scanner_index, scanner in enumerate(SCANNERS):
        for name in ("images", "masks"):
            (folder / scanner.site / name).mkdir(parents=True)
        for patient_index, split in enumerate(PATIENT_SPLITS):
            patient = f"{scanner.site}_p{patient_index + 1}"
            slices = draw_patient(anatomy, scanner, patient_seed=(seed, scanner_index, patient_index))
            for level, image_and_mask in enumerate(slices, start=1):
                paths = [f"{scanner.site}/{name}/p{patient_index + 1}_s{level}.png" for name in ("images", "masks")]
                for path, pixels in zip(paths, image_and_mask, strict=True):
                    Image.fromarray(pixels).save(folder / path)
                height, width = image_and_mask[0].shape
                rows.append((scanner.site, *paths, width, height, split, patient, level, scanner.spacing))
                if progress is not None:
                    progress(len(rows), total)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([COLUMNS, *rows])
    record = {"version": DEMO_VERSION, "seed": seed, "digest": _digest(folder)}
    (folder / _RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")


def _digest(folder: Path) -> str:
    """Digest of our own files only: what others put beside them does not make the data damaged."""
    digest = hashlib.sha256()
    patterns = ("manifest.csv", "*/images/*.png", "*/masks/*.png")
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _is_complete(folder: Path, seed: int) -> bool:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return bool(record == {"version": DEMO_VERSION, "seed": seed, "digest": _digest(folder)})
    except (OSError, ValueError):
        return False


def _move_into_place(partial: Path, target: Path, seed: int) -> None:
    old = partial.with_name(f"{partial.name}.old")
    try:
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except OSError:
        # Another process may have written the same data meanwhile; then its folder is as good as ours.
        if not _is_complete(target, seed):
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
