"""Writers of predictions: masks and maps in the geometry of their image, overlays to look at. Torch-free.

Letters: N slices, H x W pixels of one.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import numpy.typing as npt
from PIL import Image

from icmoe.data.nifti import write_nifti
from icmoe.errors import ConfigError

MAX_OVERLAYS = 12

Labels = npt.NDArray[np.uint8]
Values = npt.NDArray[Any]


def to_raw_values(labels: Labels, values: Sequence[int]) -> npt.NDArray[np.integer]:
    """Turn class ids back into the mask values of the run config.

    Args:
        labels: class ids, any shape.
        values: the raw value of class 1, 2, ...; background is 0.

    Returns:
        Same shape, in the smallest type that readers of masks know: uint8, uint16, int16 or int32.
    """
    low, high = min(0, *values), max(0, *values)
    kinds = (np.uint8, np.uint16, np.int16, np.int32)
    kind = next((kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max), np.int64)
    table: npt.NDArray[Any] = np.array([0, *values], dtype=kind)
    return table[labels]


def write_mask_png(path: Path, raw: npt.NDArray[np.integer]) -> None:
    """Write a grey PNG with 8 or, where a value needs it, 16 bits.

    Args:
        path: of the new file.
        raw: (H, W) raw values.

    Raises:
        ConfigError: if a value has no place in a PNG.
    """
    if raw.dtype not in (np.uint8, np.uint16):
        raise ConfigError("a PNG holds values from 0 to 65535; the run's task has others. Change its raw mask values.")
    Image.fromarray(raw).save(path, format="PNG")


def place(turned: hd.Volume, slices: Values, grid: hd.VolumeGeometry) -> hd.Volume:
    """Bring slices of a turned volume to the storage order of its file.

    Args:
        turned: the volume as ``volumes.turn`` gave it.
        slices: (N, H, W), of any type, in the order of ``turned``.
        grid: as stored.

    Returns:
        The values on ``grid``; only permuted and flipped.
    """
    return turned.with_array(slices).match_geometry(grid)


def write_volume(path: Path, values: hd.Volume, *, like: Path | None) -> None:
    """Write a volume as NIfTI.

    Args:
        path: of the new file, .nii or .nii.gz.
        values: in the storage order of its image.
        like: the image, where that is NIfTI: shape, affine and codes become exactly its own. Without it the axes are
            written as columns, rows, slices, as converters of DICOM do.
    """
    if like is not None:
        shape = nib.load(like).shape
        # A file may call one volume four-dimensional.
        write_nifti(path, values.array.reshape(shape) if np.prod(shape) == values.array.size else values.array, like)
        return
    turned = values.permute_spatial_axes([2, 1, 0])
    affine = turned.get_affine("RAS")
    image = nib.Nifti1Image(turned.array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    nib.save(image, path)


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write maps of a picture as one compressed .npz file.

    Args:
        path: of the new file.
        arrays: (H, W) each, by name.
    """
    named: dict[str, Any] = {file_name(name): array for name, array in arrays.items()}
    np.savez_compressed(path, **named)


def file_name(text: str) -> str:
    """Make a class or expert name fit for a file name."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("._") or "_"


def choose_slices(labels: Labels, *, most: int = MAX_OVERLAYS) -> list[int]:
    """Choose slices to draw: evenly over those with something in them, or over all where there is nothing.

    Args:
        labels: (N, H, W) class ids.
        most: slices at most.
    """
    filled = np.flatnonzero(labels.any(axis=(1, 2)))
    candidates = filled if filled.size else np.arange(len(labels))
    picks = np.linspace(0, len(candidates) - 1, min(most, len(candidates))).round().astype(int)
    return [int(candidates[pick]) for pick in picks]


def write_overlay(path: Path, pixels: npt.NDArray[np.float32], labels: Labels, *, colours: Sequence[str]) -> None:
    """Draw the outlines of classes on their image.

    Args:
        path: of the new PNG.
        pixels: (H, W, 3); their range is stretched to 0..255.
        labels: (H, W) class ids.
        colours: of class 1, 2, ... as #RRGGBB.
    """
    low, high = float(pixels.min()), float(pixels.max())
    picture = ((pixels - low) * (255 / max(high - low, 1e-8))).round().astype(np.uint8)
    palette = np.array([[0, 0, 0], *(list(bytes.fromhex(colour[1:])) for colour in colours)], dtype=np.uint8)
    border = _inner_border(labels)
    picture[border] = palette[labels[border]]
    Image.fromarray(picture).save(path, format="PNG")


def _inner_border(labels: Labels) -> npt.NDArray[np.bool_]:
    """Pixels of a class with a neighbour, above, below, left or right, of another."""
    padded = np.pad(labels, 1, mode="edge")
    height, width = labels.shape
    neighbours = [padded[y : y + height, x : x + width] for y, x in ((0, 1), (2, 1), (1, 0), (1, 2))]
    differs = np.any([neighbour != labels for neighbour in neighbours], axis=0)
    border: npt.NDArray[np.bool_] = differs & (labels != 0)
    return border
