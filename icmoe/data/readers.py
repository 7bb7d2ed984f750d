"""Read images and masks as they are stored: PNG, JPEG and TIFF, 8 and 16 bit, grey and colour.

Pillow reads everything but colour with 16 bits a channel, of which it keeps 8. Such a TIFF is left to tifffile, and of
such a PNG the other 8 bits are fetched in a second pass.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from icmoe.errors import DataError, MaskError
from icmoe.types import IGNORE_INDEX

_BITS_PER_SAMPLE = 258
_MAX_LISTED_VALUES = 8


def read_size(path: Path) -> tuple[int, int]:
    """Return (height, width) in pixels from the file's header.

    Raises:
        DataError: if the file is no readable image.
    """
    with _opened(path) as image:
        return image.height, image.width


def read_image(path: Path) -> npt.NDArray[np.float32]:
    """Read an image. Grey is repeated over three channels, an alpha channel is dropped.

    A file whose metadata asks for a turned display is refused: the mask may have been drawn on either view of it, and
    a wrong guess would go unnoticed where the image is square.

    Returns:
        (H, W, 3), values as stored: 0..255 for 8 bit, 0..65535 for 16 bit.

    Raises:
        DataError: if the file is missing, truncated, not an image, turned, or holds several pages or NaN.
    """
    with _opened(path) as image:
        if _is_deep_colour(image):
            pixels = _read_deep_colour(path, image)
        elif len(image.getbands()) == 1 and image.mode not in ("1", "P"):
            pixels = np.asarray(image)[..., None]
        else:
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "LA") else "RGB"))
    pixels = pixels.reshape(*pixels.shape[:2], -1).astype(np.float32)
    if not np.isfinite(pixels).all():
        raise DataError(f"{path} holds NaN or infinite values. Replace them, or leave the image out of the manifest.")
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def read_mask(path: Path) -> npt.NDArray[np.int32]:
    """Read a mask. A palette gives its indices, a one-bit image 0 and 1; colour passes if all channels are equal.

    Returns:
        (H, W) raw values.

    Raises:
        DataError: if the file is missing, truncated, not an image, turned or holds several pages.
        MaskError: if it is a colour picture or holds values that are no integers.
    """
    with _opened(path) as image:
        values = _read_deep_colour(path, image) if _is_deep_colour(image) else np.asarray(image)
        has_alpha = "A" in image.getbands() and values.shape[-1] in (2, 4)
    if values.ndim == 3:
        values = values[..., :-1] if has_alpha else values
        if (values != values[..., :1]).any():
            raise MaskError(
                f"{path} is a colour picture, so that it holds no class values. "
                "Save the mask as a grey or palette PNG in which each pixel is one number."
            )
        values = values[..., 0]
    raw = values.astype(np.int32)
    if (raw != values).any():
        raise MaskError(f"{path} holds values that are no whole numbers. Save the mask with an integer type.")
    return raw


def map_classes(
    raw: npt.NDArray[np.integer], *, classes: Sequence[int], ignore: Sequence[int] = ()
) -> npt.NDArray[np.uint8]:
    """Turn raw mask values into class ids.

    Args:
        raw: any shape.
        classes: the raw value of class 1, 2, ...; the raw value 0 is background.
        ignore: raw values that count nowhere.

    Returns:
        Same shape: 0 background, i + 1 for ``classes[i]``, ``IGNORE_INDEX`` for ignored values.

    Raises:
        MaskError: if a value is in neither list. The caller adds the file's name.
    """
    ids = np.zeros(raw.shape, dtype=np.uint8)
    known = raw == 0
    targets = [(value, index) for index, value in enumerate(classes, start=1)]
    for value, target in [*targets, *((value, IGNORE_INDEX) for value in ignore)]:
        hit = raw == value
        ids[hit] = target
        known |= hit
    if not known.all():
        raise MaskError(_describe_unknown(np.unique(raw[~known]).tolist(), classes=classes, ignore=ignore))
    return ids


def _describe_unknown(values: Sequence[int], *, classes: Sequence[int], ignore: Sequence[int]) -> str:
    shown = ", ".join(str(value) for value in values[:_MAX_LISTED_VALUES])
    known = f"0 (background), {', '.join(str(value) for value in classes)}"
    known += f" and ignored {', '.join(str(value) for value in ignore)}" if ignore else ""
    if len(values) > _MAX_LISTED_VALUES:
        return (
            f"holds {len(values)} values without a class: {shown}, ... Known are {known}. So many come from JPEG "
            "compression or from resizing with interpolation: save masks as PNG and resize with nearest neighbour."
        )
    return (
        f"holds values without a class: {shown}. Known are {known}. In the run config, under task, add "
        f"'classes: {{name: {values[0]}}}' to segment them or 'ignore: [{shown}]' to leave these pixels out."
    )


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Open an image for reading and give every failure, also of the reading itself, a message for users."""
    try:
        with warnings.catch_warnings():
            # Of damaged metadata, which nothing here uses.
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(path) as image:
                _refuse_unclear(path, image)
                yield image
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. Correct the manifest or bring the file back.") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is no PNG, JPEG or TIFF image, or its header is damaged. Export it again.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large to be read at once. Cut it into tiles: {error}") from error
    # Pillow and tifffile fail in many ways on damaged files.
    except (OSError, SyntaxError, ValueError, RuntimeError, EOFError) as error:
        raise DataError(f"{path} is truncated or damaged ({error}). Export it again or leave it out.") from error


def _refuse_unclear(path: Path, image: ImageFile.ImageFile) -> None:
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise DataError(f"{path} holds {pages} pages. Save each as an image of its own, with a line in the manifest.")
    # Asked for metadata, Pillow decodes a whole PNG in search of a block behind the pixels, where nobody writes one.
    has_metadata = image.format != "PNG" or "exif" in image.info
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if has_metadata else 1
    if orientation != 1:
        raise DataError(
            f"{path} asks viewers to turn it (orientation tag {orientation}), so its mask could be meant for either "
            "view. Save it with the pixels turned or with the tag removed, whichever fits the mask."
        )


def _is_deep_colour(image: ImageFile.ImageFile) -> bool:
    """Say whether the file has several channels of more than 8 bits; asks before the pixels are decoded."""
    if len(image.getbands()) == 1:
        return False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return bool(max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8)
    return any("16" in str(tile.args) for tile in image.tile)


def _read_deep_colour(path: Path, image: ImageFile.ImageFile) -> npt.NDArray[np.generic]:
    """Read (H, W, channels) with 16 bits or more; alpha is dropped, so that 1 or 3 channels are left."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            pixels = np.moveaxis(page.asarray(), 0, -1) if page.axes.startswith("S") else page.asarray()
    else:
        pixels = _read_deep_png(path, image)
    return pixels[..., : 3 if pixels.shape[-1] >= 3 else 1]


def _read_deep_png(path: Path, image: ImageFile.ImageFile) -> npt.NDArray[np.uint16]:
    """Have Pillow unpack the pixels in ways that bring out both bytes of each value; of its own it keeps the higher."""
    tile = image.tile[0]
    if tile.args == "LA;16B":
        image.tile = [tile._replace(args="RGBA")]  # four bytes: grey high and low, alpha high and low
        unpacked = np.asarray(image).astype(np.uint16)
        return unpacked[..., 0:1] * 256 + unpacked[..., 1:2]
    higher = np.asarray(image).astype(np.uint16)
    with Image.open(path) as again:
        # Told that the low byte comes first, Pillow keeps what is the lower byte in truth.
        again.tile = [tile._replace(args=str(tile.args).replace("16B", "16L"))]
        lower = np.asarray(again).astype(np.uint16)
    return higher * 256 + lower
