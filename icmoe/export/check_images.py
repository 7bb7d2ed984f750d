"""Images on which an exported network has to give torch's answer: the run's own pictures, shapes, and noise."""

import logging
import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from icmoe.data.features import FeatureSpec, draw_squares
from icmoe.export.network import DeployedNetwork

logger = logging.getLogger(__name__)

MAX_REAL = 4
"""Each costs two passes through the backbone."""

Inputs = tuple[Tensor, ...]


def check_images(network: DeployedNetwork, spec: FeatureSpec, run_dir: Path) -> dict[str, Inputs]:
    """Inputs of the network by name, batches of one.

    Noise alone would not do: it lies far from all training images and has neither flat regions nor outlines, where
    classes change.

    Args:
        network: that is checked.
        spec: how images are drawn for it.
        run_dir: of the run; ``examples/`` in it holds test images at 8 bits.
    """
    pictures = {"gradient": _gradient(), "shapes": _shapes(), **_examples(run_dir)}
    return {"noise": network.example()} | {
        name: _inputs(pixels.astype(np.float32), network, spec) for name, pixels in pictures.items()
    }


def _inputs(pixels: npt.NDArray[np.float32], network: DeployedNetwork, spec: FeatureSpec) -> Inputs:
    image, detail = draw_squares(pixels, spec=spec)
    return (image[None], detail.float().div(255)[None]) if network.needs_detail else (image[None],)


def _gradient() -> npt.NDArray[np.floating]:
    """(192, 256, 3): smooth everywhere, and wider than high, so that it is padded."""
    rows, columns = np.mgrid[:192, :256]
    return np.stack([rows, columns, 0.5 * (rows + columns)], axis=2)


def _shapes() -> npt.NDArray[np.floating]:
    """(256, 192, 3): a disc, a ring and a bar with sharp outlines on a shaded ground."""
    rows, columns = np.mgrid[:256, :192]
    radius = np.hypot(rows - 90, columns - 80)
    grey = 40 + 0.2 * rows + 120 * (radius < 30) + 70 * ((radius > 45) & (radius < 55))
    grey[200:215, 20:170] = 230
    return np.repeat(grey[..., None], 3, axis=2)


def _examples(run_dir: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """Test images that the run keeps for its report, as (H, W, 3); a damaged one is passed over."""
    found: dict[str, npt.NDArray[np.uint8]] = {}
    for path in sorted((run_dir / "examples").glob("*.npz"))[:MAX_REAL]:
        try:
            with np.load(path, allow_pickle=False) as stored:
                image = stored["image"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            logger.warning("ONNX is not checked on %s, which cannot be read: %s", path, error)
            continue
        if image.ndim == 3 and image.shape[2] == 3:
            found[f"examples/{path.name}"] = image
    return found
