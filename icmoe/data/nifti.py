"""NIfTI through nibabel, as volumes in DICOM's patient coordinates (x to the left, y to the back, z to the head)."""

import hashlib
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import numpy.typing as npt

from icmoe.data.dicom import refusing
from icmoe.errors import DataError

SUFFIXES = (".nii", ".nii.gz")
MAX_SHEAR = 1e-3
"""Largest cosine between two axes of a grid that counts as orthogonal."""
_MILLIMETRES = {1: 1000.0, 3: 0.001}  # NIfTI's codes of metres and microns; millimetres, unknown and others stay
_UNIT_BITS = 0b111  # of xyzt_units, for space; the others are for time
_MAX_GZIP_RATIO = 1100  # deflate cannot do better


def is_nifti(path: Path) -> bool:
    """Whether a file is NIfTI by its name."""
    return path.name.lower().endswith(SUFFIXES)


def read_nifti(path: Path, *, frame: str = "") -> tuple[hd.Volume, str]:
    """Read one 3-D volume, in storage order of its axes.

    A header that counts in metres or microns is turned into millimetres; one that names no unit means millimetres, as
    everybody writes them.

    Args:
        path: a .nii or .nii.gz file.
        frame: index of the fourth axis, for a 4-D file.

    Returns:
        The volume, float32 and scaled as the header says; and the digest of the file.

    Raises:
        DataError: if the file is damaged, sheared, in colour, has NaN, or holds several volumes and none was named.
    """
    with refusing(path):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise DataError(f"{path} is no NIfTI file, but {type(image).__name__}.")
        _check_size(path, image)
        if image.header.get_data_dtype().names is not None or np.iscomplexobj(image.dataobj[..., :0]):
            raise DataError(f"{path} holds colour or complex values; an image has one number per voxel.")
        affine = check_affine(path, _in_millimetres(image))
        values = np.asarray(_choose_frame(path, image, frame), dtype=np.float32)
    if not np.isfinite(values).all():
        raise DataError(f"{path} holds NaN or infinite values. Replace them, or leave the image out.")
    return hd.Volume(values, affine, coordinate_system="PATIENT", from_reference_convention="RAS"), digest


def write_nifti(path: Path, values: npt.NDArray[np.generic], like: Path) -> None:
    """Write values on the grid of the NIfTI file ``like``: same shape, affine, units and codes.

    Args:
        path: of the new file.
        values: in the storage order of ``like``.
        like: the image.
    """
    reference = nib.load(like)
    header = reference.header.copy()
    header.set_data_dtype(values.dtype)
    header.set_slope_inter(1.0, 0.0)
    header["cal_min"] = header["cal_max"] = 0.0
    nib.save(nib.Nifti1Image(values, reference.affine, header), path)


def check_affine(path: Path, affine: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Make the axes exactly orthogonal, where float32 rounding left them nearly so.

    Raises:
        DataError: if they are not, or the affine is singular.
    """
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or (lengths < 1e-6).any():
        raise DataError(f"{path} has no usable affine (a voxel has no size along an axis). Export it again.")
    cosines = axes / lengths
    shear = np.abs(cosines.T @ cosines - np.eye(3)).max()
    if shear > MAX_SHEAR:
        raise DataError(
            f"{path} has a sheared affine (its axes are up to {np.degrees(np.arcsin(min(shear, 1.0))):.1f} degrees off "
            "a right angle), so that slices would be skewed. Resample it to an orthogonal grid, such as gantry-tilt "
            "correction does."
        )
    u, _, vt = np.linalg.svd(cosines)
    fixed = affine.copy()
    fixed[:3, :3] = (u @ vt) * lengths
    return fixed


def _in_millimetres(image: nib.Nifti1Image) -> npt.NDArray[np.floating]:
    affine = np.array(image.affine, dtype=float)
    # Not by nibabel's get_xyzt_units, which fails on codes that the standard does not know.
    affine[:3] *= _MILLIMETRES.get(int(image.header["xyzt_units"]) & _UNIT_BITS, 1.0)
    return affine


def _check_size(path: Path, image: nib.Nifti1Image) -> None:
    """Refuse a header that promises more than the file can hold, before memory is asked for."""
    expected = float(np.prod([float(n) for n in image.shape])) * image.header.get_data_dtype().itemsize
    packed = path.name.lower().endswith(".gz")
    if expected <= 0 or expected > path.stat().st_size * (_MAX_GZIP_RATIO if packed else 1):
        raise DataError(
            f"{path} is truncated or its header damaged: {' x '.join(map(str, image.shape))} voxels need "
            f"{expected:.3g} bytes, the file has {path.stat().st_size}. Export it again."
        )


def _choose_frame(path: Path, image: nib.Nifti1Image, frame: str) -> npt.NDArray[np.generic]:
    shape = image.shape
    if (len(shape) > 4 and any(n > 1 for n in shape[4:])) or len(shape) < 2:
        raise DataError(f"{path} has {len(shape)} axes; 3 or 4 can be used.")
    num_frames = shape[3] if len(shape) > 3 else 1
    if num_frames > 1 and not (frame.isdecimal() and int(frame) < num_frames):
        raise DataError(
            f"{path} holds {num_frames} volumes. Name one in the manifest's column frame, 0 to {num_frames - 1}; it "
            f"says {frame!r}."
        )
    data = image.dataobj[..., int(frame)] if num_frames > 1 and len(shape) == 4 else np.asarray(image.dataobj)
    return np.asarray(data).reshape(*shape[:3], *(1,) * (3 - len(shape)))
