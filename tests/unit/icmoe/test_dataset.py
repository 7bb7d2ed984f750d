"""Items, labels in every view, and masks that must fail before training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from icmoe.data.dataset import SegmentationDataset
from icmoe.data.features import FeatureCache, FeatureSpec, encode_samples
from icmoe.data.manifest import Sample
from icmoe.data.transforms import PixelNorm
from icmoe.errors import ConfigError, DataError, MaskError
from icmoe.types import IGNORE_INDEX

SHAPE = (24, 32)


class TinyBackbone(nn.Module):
    image_size = 32
    embedding_size = 4
    pixel_norm: PixelNorm = "minmax"

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 256, kernel_size=8, stride=8)

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.encoder(images)
        return embeddings

    def digest(self) -> str:
        return "tiny-2"


SPEC = FeatureSpec.of(TinyBackbone(), detail_size=16, precision="fp32")


def write_sample(folder: Path, name: str, *, mask: np.ndarray | None = None, shape: tuple[int, int] = SHAPE) -> Sample:
    """Draw a bright square whose mask holds 100, with a frame of 200 around it."""
    image = np.zeros(shape, np.uint8)
    image[4:12, 6:20] = 250
    if mask is None:
        mask = np.where(image > 0, 100, 0).astype(np.uint8)
        mask[:2] = 200
    Image.fromarray(image).save(folder / f"{name}.png")
    Image.fromarray(mask).save(folder / f"{name}_mask.png")
    return Sample(image=folder / f"{name}.png", mask=folder / f"{name}_mask.png", patient=name, split="train", site="s")


def make_dataset(samples: list[Sample], folder: Path, *, views: tuple[str, ...] = ("identity",)) -> SegmentationDataset:
    cache = FeatureCache(folder / "cache")
    if views:
        encode_samples(TinyBackbone(), samples, views=views, cache=cache, detail_size=16, precision="fp32")
    return SegmentationDataset(samples, cache=cache, features=SPEC, classes=[100], ignore=[200], label_size=64)


def test_items_hold_features_and_mapped_labels(tmp_path: Path) -> None:
    dataset = make_dataset([write_sample(tmp_path, "a")], tmp_path)
    item = dataset[0]
    assert (item.embeddings.shape, item.embeddings.dtype) == ((256, 4, 4), torch.float32)
    assert (item.detail.shape, item.detail.dtype) == ((3, 16, 16), torch.float32)
    assert [item.detail.min().item(), item.detail.max().item()] == [0, 1]
    assert (item.labels.shape, item.labels.dtype) == ((64, 64), torch.int64)
    # Labels are drawn at twice the image's size here; rows 48 and below are padding.
    assert (item.labels[8:24, 12:40] == 1).all()
    assert (item.labels[:4] == IGNORE_INDEX).all()
    assert (item.labels[48:] == IGNORE_INDEX).all()
    assert int((item.labels == 1).sum()) == 16 * 28


@pytest.mark.parametrize("view", ["hflip", "vflip", "rot90", "rot180", "rot270", "affine0", "affine7"])
def test_labels_follow_the_detail_image(tmp_path: Path, view: str) -> None:
    dataset = make_dataset([write_sample(tmp_path, "a")], tmp_path, views=("identity", view))
    item = dataset.load(0, view)
    bright = nn.functional.interpolate(item.detail[None], size=(64, 64), mode="bilinear")[0, 0] > 0.5
    foreground = item.labels == 1
    overlap = 2 * (bright & foreground).sum() / (bright.sum() + foreground.sum())
    assert overlap > 0.85
    assert (dataset.load(0, view).labels == item.labels).all()


def test_original_labels_keep_the_image_size(tmp_path: Path) -> None:
    dataset = make_dataset([write_sample(tmp_path, "a")], tmp_path)
    labels = dataset.original_labels(0)
    assert dataset.original_size(0) == labels.shape == SHAPE
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {0, 1, IGNORE_INDEX}
    assert len(dataset) == 1
    assert dataset.spacing(0) is None


def test_labels_at_grid_size_come_back_to_their_pixels(tmp_path: Path) -> None:
    dataset = make_dataset([write_sample(tmp_path, "a")], tmp_path)
    restored = dataset.restore(0, (dataset[0].labels == 1).float()[None])[0]
    assert restored.shape == SHAPE
    assert ((restored > 0.5).numpy() == (dataset.original_labels(0) == 1)).all()


def test_empty_masks_are_allowed_and_counted(tmp_path: Path) -> None:
    ignored = np.full(SHAPE, 200, np.uint8)
    samples = [
        write_sample(tmp_path, "a"),
        write_sample(tmp_path, "b", mask=np.zeros(SHAPE, np.uint8)),
        write_sample(tmp_path, "c", mask=ignored),
    ]
    assert make_dataset(samples, tmp_path).num_empty_masks == 2


def test_bad_masks_fail_at_construction_all_at_once(tmp_path: Path) -> None:
    other = np.zeros(SHAPE, np.uint8)
    other[3, 3] = 7
    samples = [
        write_sample(tmp_path, "a", mask=np.zeros((32, 24), np.uint8)),
        write_sample(tmp_path, "b"),
        write_sample(tmp_path, "c", mask=other),
    ]
    with pytest.raises(MaskError, match="2 of 3 masks cannot be used") as caught:
        make_dataset(samples, tmp_path, views=())
    message = str(caught.value)
    assert f"the image {samples[0].image} has 24 x 32 pixels" in message
    assert f"its mask {samples[0].mask} has 32 x 24" in message
    assert f"the mask {samples[2].mask} holds values without a class: 7." in message


def test_missing_features_and_unknown_views_are_explained(tmp_path: Path) -> None:
    dataset = make_dataset([write_sample(tmp_path, "a")], tmp_path)
    with pytest.raises(DataError, match="Start again"):
        dataset.load(0, "hflip")
    with pytest.raises(ConfigError, match="unknown view"):
        dataset.load(0, "mirror")
