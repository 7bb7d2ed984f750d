"""Example pictures: outlines and winning experts as transparent layers over the image, as data URIs."""

import base64
import io
import logging
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from icmoe.errors import RunError
from icmoe.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

Labels = npt.NDArray[np.uint8]

LAYERS = ("truth", "prediction", "winner")
MAX_SIDE = 512
OUTLINE_SIDE = 1024
PNG_LIMIT = 300_000
# Okabe and Ito's palette, those first that stand out on dark and on orange images
CLASS_COLOURS = ("#56B4E9", "#F0E442", "#D55E00", "#CC79A7", "#009E73", "#E69F00", "#0072B2")
# hue by family (blue, pink, orange), lightness by number within the family
EXPERT_COLOURS = {
    "basic": ("#0072B2", "#56B4E9", "#003F63", "#A6D8F5"),
    "semantic": ("#CC79A7", "#7D2E5A", "#EBC1D8", "#5E1F43"),
    "adaptive": ("#E69F00", "#A85A00", "#FFD37F", "#5C4A1F"),
}
OTHER_COLOUR = "#7F7F7F"


@dataclass(frozen=True)
class Example:
    """One test image with its layers; the four pictures are data URIs. Sizes in pixels as shown."""

    site: str
    dice: float
    width: int
    height: int
    image: str
    truth: str
    prediction: str
    winner: str
    expert_names: tuple[str, ...]
    has_ignored: bool

    @property
    def characters(self) -> int:
        """Length of the pictures in the page."""
        return len(self.image) + len(self.truth) + len(self.prediction) + len(self.winner)


@dataclass(frozen=True)
class Gallery:
    """Examples by site, and how many did not fit into the page."""

    by_site: Mapping[str, Sequence[Example]]
    left_out: int

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Every expert that appears in an example."""
        examples = (example for site in self.by_site.values() for example in site)
        return tuple(dict.fromkeys(name for example in examples for name in example.expert_names))

    @property
    def has_ignored(self) -> bool:
        """Whether a truth holds pixels that count nowhere."""
        return any(example.has_ignored for site in self.by_site.values() for example in site)


def class_colour(class_id: int) -> str:
    """Colour of a foreground class, ids from 1."""
    return CLASS_COLOURS[(class_id - 1) % len(CLASS_COLOURS)]


def expert_colour(name: str) -> str:
    """Colour of an expert of the name ``family.number``."""
    family, _, number = name.partition(".")
    shades = EXPERT_COLOURS.get(family)
    return shades[int(number) % len(shades)] if shades is not None and number.isdecimal() else OTHER_COLOUR


def load_gallery(folder: Path, *, budget: int) -> Gallery:
    """Read ``examples/*.npz``. Sites take turns, so that a full page still shows every site it can.

    Args:
        folder: the run's ``examples`` folder; it may be missing.
        budget: characters of pictures at most.

    Returns:
        The examples that fit, by site.

    Raises:
        RunError: if an example cannot be read.
    """
    seen: Counter[str] = Counter()
    examples = []
    for path in sorted(folder.glob("*.npz")):
        example = read_example(path)
        examples.append((seen[example.site], example))
        seen[example.site] += 1
    by_site: dict[str, list[Example]] = {site: [] for site in sorted(seen)}
    left_out = 0
    for _, example in sorted(examples, key=lambda item: item[0]):
        if example.characters > budget:
            left_out += 1
            continue
        budget -= example.characters
        by_site[example.site].append(example)
    if left_out:
        logger.info("%d of %d example images left out of the report to keep it small", left_out, len(examples))
    return Gallery({site: shown for site, shown in by_site.items() if shown}, left_out)


def read_example(path: Path) -> Example:
    """Read one example and draw its layers.

    Args:
        path: an ``.npz`` file as a run writes it.

    Returns:
        The example with its pictures, at most ``MAX_SIDE`` pixels a side.

    Shapes:
        image (H, W, 3), truth, prediction and winner (H, W), all uint8.

    Raises:
        RunError: if the file is damaged or its arrays do not fit each other.
    """
    arrays = _load_arrays(path)
    names = tuple(str(name) for name in arrays["expert_names"])
    image = arrays["image"]
    step = -(-max(image.shape[:2]) // MAX_SIDE)
    truth, prediction, winner = (arrays[key][::step, ::step] for key in LAYERS)
    height, width = truth.shape
    return Example(
        site=str(arrays["site"]),
        dice=float(arrays["dice"]),
        width=width,
        height=height,
        image=_encode_image(Image.fromarray(image).resize((width, height), Image.Resampling.BOX)),
        truth=draw_outlines(truth),
        prediction=draw_outlines(prediction),
        winner=_encode_palette(winner, {index: expert_colour(name) for index, name in enumerate(names)}),
        expert_names=names,
        has_ignored=bool((truth == IGNORE_INDEX).any()),
    )


def _load_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in ("image", *LAYERS, "expert_names", "site", "dice")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(
            f"cannot read the example {path}: {error}. Delete the file to make the report without it."
        ) from error
    shape = arrays["image"].shape
    fits = len(shape) == 3 and shape[2] == 3 and all(arrays[key].shape == shape[:2] for key in LAYERS)
    if not fits or any(arrays[key].dtype != np.uint8 for key in ("image", *LAYERS)):
        shapes = {key: (arrays[key].shape, str(arrays[key].dtype)) for key in ("image", *LAYERS)}
        raise RunError(
            f"the example {path} holds arrays of shapes {shapes}; an (H, W, 3) image and (H, W) layers of uint8 are "
            "needed. Delete the file to make the report without it."
        )
    return arrays


def draw_outlines(labels: Labels) -> str:
    """Outline every class on its own side of the border, on an enlarged grid so that thin lines stay thin.

    Args:
        labels: (H, W) class ids; pixels of ``IGNORE_INDEX`` are filled with grey.

    Returns:
        A transparent PNG as data URI.
    """
    scale = max(1, OUTLINE_SIDE // max(labels.shape))
    enlarged = labels.repeat(scale, axis=0).repeat(scale, axis=1)
    size = 2 * max(1, round(max(enlarged.shape) / 180)) + 1
    border = ndimage.maximum_filter(enlarged, size=size) != ndimage.minimum_filter(enlarged, size=size)
    shown = np.where(border | (enlarged == IGNORE_INDEX), enlarged, 0).astype(np.uint8)
    classes = [int(value) for value in np.unique(shown) if value not in (0, IGNORE_INDEX)]
    return _encode_palette(shown, {value: class_colour(value) for value in classes} | {IGNORE_INDEX: OTHER_COLOUR})


def _encode_palette(indices: Labels, colours: Mapping[int, str]) -> str:
    """Write indices as a palette PNG; an index without a colour is transparent, ``IGNORE_INDEX`` half so."""
    palette = bytearray(768)
    alpha = bytearray(256)
    for index, colour in colours.items():
        palette[3 * index : 3 * index + 3] = bytes.fromhex(colour[1:])
        alpha[index] = 128 if index == IGNORE_INDEX else 255
    picture = Image.fromarray(indices)
    picture.putpalette(bytes(palette))
    return _data_uri(picture, "png", transparency=bytes(alpha))


def _encode_image(picture: Image.Image) -> str:
    lossless = _data_uri(picture, "png")
    return lossless if len(lossless) <= PNG_LIMIT else _data_uri(picture, "jpeg", quality=90)


def _data_uri(picture: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
