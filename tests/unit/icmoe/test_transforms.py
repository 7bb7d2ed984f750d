"""The square geometry: exact where it can be, aligned everywhere."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional

from icmoe.data.transforms import (
    VIEWS,
    apply_view,
    apply_view_to_mask,
    fit_mask,
    fit_to_square,
    fitted_shape,
    normalise,
    resize_longest,
    restore,
)
from icmoe.errors import ConfigError
from icmoe.types import IGNORE_INDEX

SHAPES = [(64, 64), (60, 41), (123, 200), (410, 512), (33, 97)]


def ramp(height: int, width: int) -> npt.NDArray[np.float32]:
    """Channels: row centre, column centre, constant; in pixels."""
    y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    return np.stack([y, x, np.full_like(x, 9)], axis=-1).astype(np.float32)


def disc(height: int, width: int, *, radius: float) -> npt.NDArray[np.uint8]:
    pixels = ramp(height, width)
    inside: npt.NDArray[np.bool_] = np.hypot(pixels[..., 0] - 0.45 * height, pixels[..., 1] - 0.52 * width) < radius
    return inside.astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [48, 64, 256])
def test_resizing_keeps_one_exact_scale_for_both_axes(shape: tuple[int, int], size: int) -> None:
    pixels = resize_longest(ramp(*shape), size)
    rows, columns = fitted_shape(*shape, size)
    assert tuple(pixels.shape) == (3, rows, columns)
    scale = max(shape) / size
    inner = slice(4, -4)
    expected = (torch.arange(rows) + 0.5) * scale
    torch.testing.assert_close(pixels[0, :, 5][inner], expected[inner], rtol=0, atol=0.05 * max(1, scale))
    expected = (torch.arange(columns) + 0.5) * scale
    torch.testing.assert_close(pixels[1, 5][inner], expected[inner], rtol=0, atol=0.05 * max(1, scale))


def test_fitted_shape_of_known_sizes() -> None:
    assert fitted_shape(410, 512, 256) == (205, 256)
    assert fitted_shape(512, 495, 256) == (256, 248)
    assert fitted_shape(1, 1000, 64) == (1, 64)


def test_an_image_of_the_right_size_is_copied_exactly() -> None:
    image = np.random.default_rng(0).random((64, 50, 3), dtype=np.float32)
    pixels = resize_longest(image, 64)
    assert (pixels.numpy() == image.transpose(2, 0, 1)).all()
    pixels.zero_()
    assert image.any()


def test_padding_is_zero_after_normalisation() -> None:
    square = fit_to_square(ramp(30, 60) + 50, 64, pixel_norm="imagenet")
    assert (square[:, 32:] == 0).all()
    assert (square[:, :32] != 0).all()


def test_minmax_uses_the_image_range_and_survives_a_constant_image() -> None:
    square = fit_to_square(ramp(30, 60), 64)
    assert square[:, :32].min() == 0
    assert square.max() == 1
    assert (fit_to_square(np.full((8, 8, 3), 7, np.float32), 16) == 0).all()


def test_imagenet_constants_and_sixteen_bit() -> None:
    white = torch.full((3, 2, 2), 255.0)
    expected = torch.tensor([(255 - 123.675) / 58.395, (255 - 116.28) / 57.12, (255 - 103.53) / 57.375])
    torch.testing.assert_close(normalise(white, "imagenet")[:, 0, 0], expected)
    deep = torch.tensor([1000.0, 61000.0]).expand(3, 1, 2)
    shallow = torch.tensor([0.0, 255.0]).expand(3, 1, 2)
    torch.testing.assert_close(normalise(deep, "imagenet"), normalise(shallow, "imagenet"))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_keeps_its_pixels_at_its_own_size_and_padding_is_ignored(shape: tuple[int, int]) -> None:
    mask = disc(*shape, radius=min(shape) / 3)
    square = fit_mask(mask, max(shape))
    assert (square[: shape[0], : shape[1]].numpy() == mask).all()
    assert (square[shape[0] :] == IGNORE_INDEX).all()
    assert (square[:, shape[1] :] == IGNORE_INDEX).all()


def test_fit_mask_is_nearest_exact() -> None:
    mask = np.random.default_rng(0).integers(0, 4, (96, 96), dtype=np.uint8)
    for size in (31, 64, 130):
        reference = functional.interpolate(torch.from_numpy(mask)[None, None], size=(size, size), mode="nearest-exact")
        assert (fit_mask(mask, size) == reference[0, 0]).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", [32, 128])
def test_restore_is_exact_on_a_linear_function(shape: tuple[int, int], grid: int) -> None:
    cells = (torch.arange(grid) + 0.5) / grid * max(shape)
    planes = torch.stack([cells[:, None].expand(grid, grid), cells.expand(grid, grid)])
    back = restore(planes, original_size=shape)
    edge = int(max(shape) / grid) + 1
    inner = (slice(edge, shape[0] - edge), slice(edge, shape[1] - edge))
    expected = torch.from_numpy(ramp(*shape)).permute(2, 0, 1)[:2]
    torch.testing.assert_close(back[:, *inner], expected[:, *inner], rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_disc_comes_back_where_it_was(shape: tuple[int, int]) -> None:
    mask = disc(*shape, radius=min(shape) / 3)
    grid = fitted_shape(*shape, 2 * max(shape))  # fine enough that only misalignment could move it
    square = fit_mask(mask, max(grid))
    back = restore((square == 1).float()[None], original_size=shape)[0].numpy() > 0.5
    assert (back != mask.astype(bool)).sum() <= 0.002 * mask.size
    for ours, truth in zip(np.nonzero(back), np.nonzero(mask), strict=True):
        assert abs(ours.mean() - truth.mean()) < 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_a_disc_on_a_coarse_grid_stays_within_a_fraction_of_a_pixel(shape: tuple[int, int]) -> None:
    mask = disc(*shape, radius=min(shape) / 3)
    soft = resize_longest(np.repeat(mask[..., None], 3, axis=-1).astype(np.float32), 64)
    square = functional.pad(soft, (0, 64 - soft.shape[2], 0, 64 - soft.shape[1]))
    back = restore(square[:1], original_size=shape)[0].numpy()
    for axis in (0, 1):
        profile, truth = back.sum(1 - axis), mask.sum(1 - axis)
        positions = np.arange(len(truth))
        drift = (profile @ positions) / profile.sum() - (truth @ positions) / truth.sum()
        assert abs(drift) < 0.1 * max(1, max(shape) / 64)


def test_padding_does_not_leak_into_the_restored_image() -> None:
    rows, columns = fitted_shape(41, 60, 32)
    grid = torch.full((1, 32, 32), 100.0)
    grid[:, :rows, :columns] = 1.0
    assert (restore(grid, original_size=(41, 60)) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("view", VIEWS)
def test_exact_views_are_permutations_that_labels_follow(view: str) -> None:
    labels = torch.arange(36, dtype=torch.uint8).view(6, 6)
    image = labels.float().expand(3, 6, 6)
    moved = apply_view(image, view, seed_text="a")
    assert sorted(moved[0].flatten().tolist()) == list(range(36))
    assert (moved[0] == apply_view_to_mask(labels, view, seed_text="a")).all()
    assert (view == "identity") == bool((moved == image).all())


@pytest.mark.parametrize("number", range(6))
def test_affine_views_move_images_of_all_sizes_and_masks_alike(number: int) -> None:
    view = f"affine{number}"
    moved = {}
    for size in (64, 256):
        mask = fit_mask(disc(size, size, radius=0.2 * size), size)
        image = mask.float().expand(3, size, size)
        soft = apply_view(image, view, seed_text="x")[0]
        hard = apply_view_to_mask(mask, view, seed_text="x")
        assert ((soft > 0.5) != (hard == 1)).float().mean() < 0.01
        y, x = torch.nonzero(hard == 1, as_tuple=True)
        moved[size] = torch.stack([y.float().mean() + 0.5, x.float().mean() + 0.5]) / size
        area = (hard == 1).sum() / (mask == 1).sum()
        assert 0.85**2 * 0.95 < area < 1.15**2 * 1.05
    torch.testing.assert_close(moved[64], moved[256], rtol=0, atol=0.3 / 64)
    # Rotated about the centre, scaled and shifted by at most 8 %.
    assert (moved[256] - torch.tensor([0.45, 0.52])).abs().max() < 0.12


def test_what_comes_in_from_outside_counts_nowhere() -> None:
    view = "affine1"
    image = apply_view(torch.ones(3, 64, 64), view, seed_text="x")
    mask = apply_view_to_mask(torch.ones(64, 64, dtype=torch.uint8), view, seed_text="x")
    assert set(mask.flatten().tolist()) == {1, IGNORE_INDEX}
    assert (image[0][mask == IGNORE_INDEX] < 0.5 + 1e-4).all()


def test_affine_views_differ_by_image_and_number_but_never_change() -> None:
    image = torch.from_numpy(ramp(32, 32)).permute(2, 0, 1)
    first = apply_view(image, "affine0", seed_text="a")
    assert (first == apply_view(image, "affine0", seed_text="a")).all()
    assert (first != apply_view(image, "affine0", seed_text="b")).any()
    assert (first != apply_view(image, "affine1", seed_text="a")).any()


@pytest.mark.parametrize("view", ["rot45", "affine", "affine-1", "", "affinex"])
def test_unknown_views_are_refused(view: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown view.*identity, hflip"):
        apply_view(torch.zeros(3, 8, 8), view, seed_text="")
