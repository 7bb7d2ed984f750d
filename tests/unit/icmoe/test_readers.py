"""Every format as stored, and a sentence for every damaged file."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from icmoe.data.readers import map_classes, read_image, read_mask, read_size
from icmoe.errors import DataError, MaskError

GREY8 = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
GREY16 = GREY8.astype(np.uint16) * 257
RGB8 = np.stack([GREY8, GREY8 // 2, 255 - GREY8], axis=-1)
RGB16 = RGB8.astype(np.uint16) * 250 + 3


def write_deep_png(path: Path, pixels: npt.NDArray[np.uint16]) -> None:
    """Write 16 bits a channel, which Pillow cannot."""
    height, width, channels = pixels.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def repeated(grey: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    return np.stack([grey] * 3, axis=-1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("pixels", [GREY8, GREY16, RGB8, RGB16], ids=["grey8", "grey16", "rgb8", "rgb16"])
def test_values_come_as_stored(tmp_path: Path, suffix: str, pixels: npt.NDArray[np.generic]) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack")
    elif pixels is RGB16:
        write_deep_png(path, RGB16)
    else:
        Image.fromarray(pixels).save(path)
    image = read_image(path)
    assert image.dtype == np.float32
    assert (image == (pixels if pixels.ndim == 3 else repeated(pixels))).all()
    assert read_size(path) == (5, 7)


@pytest.mark.parametrize(
    "options",
    [{"compression": "zlib"}, {"planarconfig": "separate"}, {"extrasamples": ["unassalpha"]}],
    ids=["deflate", "planes", "alpha"],
)
def test_deep_tiff_in_other_layouts(tmp_path: Path, options: dict[str, Any]) -> None:
    pixels = np.dstack([RGB16, GREY16]) if "extrasamples" in options else RGB16
    stored = pixels.transpose(2, 0, 1) if "planarconfig" in options else pixels
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", **options)
    assert (read_image(tmp_path / "a.tif") == RGB16).all()


@pytest.mark.parametrize("kind", ["LZW", "JPEG"])
def test_compressed_tiff(tmp_path: Path, kind: str) -> None:
    pixels = np.full((16, 16), 90, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.tif", compression=f"tiff_{kind.lower()}")
    assert np.abs(read_image(tmp_path / "a.tif") - 90).max() <= 1


def test_alpha_is_dropped_and_a_palette_gives_its_colours(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([RGB8, GREY8])).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == RGB8).all()
    Image.fromarray(np.dstack([GREY8, GREY8])).save(tmp_path / "la.png")
    assert (read_image(tmp_path / "la.png") == repeated(GREY8)).all()
    write_deep_png(tmp_path / "deep.png", np.dstack([GREY16, GREY16]))
    assert (read_image(tmp_path / "deep.png") == repeated(GREY16)).all()
    palette = Image.fromarray(GREY8 % 2).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png")[0, :2].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert (read_mask(tmp_path / "p.png") == GREY8 % 2).all()


def test_jpeg_grey_and_colour(tmp_path: Path) -> None:
    for pixels in (GREY8, RGB8):
        Image.fromarray(np.full_like(pixels, 77)).save(tmp_path / "a.jpg")
        assert np.abs(read_image(tmp_path / "a.jpg") - 77).max() <= 1


def test_one_bit_images(tmp_path: Path) -> None:
    Image.fromarray(GREY8 > 100).save(tmp_path / "a.png")
    assert (read_mask(tmp_path / "a.png") == (GREY8 > 100)).all()
    assert (read_image(tmp_path / "a.png") == repeated((GREY8 > 100) * 255)).all()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "deep.png", "deep.tif"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_truncated_files_are_named(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    if name == "deep.png":
        write_deep_png(path, noise.astype(np.uint16) * 200)
    elif name == "deep.tif":
        tifffile.imwrite(path, noise.astype(np.uint16), photometric="rgb")
    else:
        Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=f"{name} is (no PNG, JPEG or TIFF|truncated or damaged)"):
            read(path)


def test_refuses_what_is_unclear(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        read_image(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(DataError, match=r"text\.png is no PNG"):
        read_size(tmp_path / "text.png")
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((3, 8, 8), np.uint8), photometric="minisblack")
    with pytest.raises(DataError, match="holds 3 pages"):
        read_image(tmp_path / "pages.tif")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB8).save(tmp_path / "turned.jpg", exif=exif)
    with pytest.raises(DataError, match="orientation tag 6"):
        read_image(tmp_path / "turned.jpg")
    tifffile.imwrite(tmp_path / "nan.tif", np.full((4, 4), np.nan, np.float32))
    with pytest.raises(DataError, match="NaN"):
        read_image(tmp_path / "nan.tif")


def test_colour_masks_pass_only_when_grey(tmp_path: Path) -> None:
    Image.fromarray(repeated(GREY8)).save(tmp_path / "grey.png")
    assert (read_mask(tmp_path / "grey.png") == GREY8).all()
    Image.fromarray(np.dstack([repeated(GREY8), np.full_like(GREY8, 255)])).save(tmp_path / "alpha.png")
    assert (read_mask(tmp_path / "alpha.png") == GREY8).all()
    Image.fromarray(np.dstack([GREY8, np.full_like(GREY8, 255)])).save(tmp_path / "la.png")
    assert (read_mask(tmp_path / "la.png") == GREY8).all()
    for name, pixels in (("c8.tif", RGB8), ("c16.tif", RGB16)):
        tifffile.imwrite(tmp_path / name, pixels, photometric="rgb")
        with pytest.raises(MaskError, match=f"{name} is a colour picture"):
            read_mask(tmp_path / name)
    tifffile.imwrite(tmp_path / "half.tif", np.full((4, 4), 0.5, np.float32))
    with pytest.raises(MaskError, match="no whole numbers"):
        read_mask(tmp_path / "half.tif")


def test_maps_raw_values_to_class_ids() -> None:
    raw = np.array([[0, 255, 40000], [7, 7, 0]])
    ids = map_classes(raw, classes=[255, 40000], ignore=[7])
    assert ids.dtype == np.uint8
    assert ids.tolist() == [[0, 1, 2], [255, 255, 0]]


def test_unknown_values_say_what_to_add() -> None:
    raw = np.array([0, 1, 128, 77, 77])
    with pytest.raises(MaskError, match=r"77, 128\. Known are 0 \(background\), 1 and ignored 9\.") as caught:
        map_classes(raw, classes=[1], ignore=[9])
    assert "'classes: {name: 77}'" in str(caught.value)
    assert "'ignore: [77, 128]'" in str(caught.value)
    with pytest.raises(MaskError, match=r"254 values without a class.*interpolation"):
        map_classes(np.arange(256), classes=[255])
