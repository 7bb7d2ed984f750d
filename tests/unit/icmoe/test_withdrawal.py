"""A patient leaves: manifest, cache, what was made of their images, and a line in the books."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from icmoe.data.cache import FeatureCache
from icmoe.data.manifest import load_manifest
from icmoe.data.sources import source_digest
from icmoe.data.withdrawal import withdraw
from icmoe.errors import ConfigError, DataError


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


@pytest.fixture
def data(tmp_path: Path, cache: FeatureCache) -> Path:
    """Sites a and b with patients 1, 2 and 3, an image each, every image in the cache in two views."""
    folder = tmp_path / "data"
    (folder / "labels").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["image,mask,patient,split,site,scanner"]
    for site in "ab":
        for patient, split in (("1", "train"), ("2", "train"), ("3", "val")):
            image, mask = f"{site}{patient}.png", f"labels/{site}{patient}.png"
            for name in (image, mask):
                Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / name)
            lines.append(f"{image},{mask},{patient},{split},{site},x")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    for number, sample in enumerate(load_manifest(folder).samples):
        for view in range(2):
            cache.store(
                f"{number}{view}".rjust(64, "0"),
                image_digest=source_digest(sample),
                embeddings=torch.zeros(256, 2, 2, dtype=torch.float16),
                detail=torch.zeros(3, 4, 4, dtype=torch.uint8),
            )
    return folder


def test_of_one_site_only(data: Path, cache: FeatureCache) -> None:
    (data / "check.json").write_text("{}")
    note = withdraw(data, "1", site="b", cache=cache)
    assert (note.images, note.cache_entries, note.unread) == (1, 2, 0)
    assert cache.info().entries == 10
    left = [(sample.site, sample.patient) for sample in load_manifest(data).samples]
    assert left == [("a", "1"), ("a", "2"), ("a", "3"), ("b", "2"), ("b", "3")]
    assert (data / "manifest.csv").read_text().startswith("image,mask,patient,split,site,scanner")
    assert (data / "b1.png").exists()  # the hospital's own
    assert (data / "labels" / "b1.png").exists()
    assert not (data / "check.json").exists()
    assert json.loads((data / "withdrawals.jsonl").read_text())["site"] == "b"


def test_labels_that_the_import_wrote_go(data: Path, cache: FeatureCache) -> None:
    ours = data / "labels" / "0123456789ab.nii.gz"
    (data / "labels" / "a1.png").rename(ours)
    manifest = data / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("labels/a1.png", "labels/0123456789ab.nii.gz"))
    withdraw(data, "1", site="a", cache=cache)
    assert not ours.exists()


def test_the_same_name_at_two_sites_needs_a_site(data: Path, cache: FeatureCache) -> None:
    before = (data / "manifest.csv").read_bytes()
    with pytest.raises(ConfigError, match="a, b each have a patient 1; name one with --site"):
        withdraw(data, "1", cache=cache)
    assert (data / "manifest.csv").read_bytes() == before
    assert cache.info().entries == 12


def test_files_that_are_gone_are_no_obstacle(data: Path, cache: FeatureCache) -> None:
    (data / "a1.png").unlink()
    (data / "b3.png").unlink()
    note = withdraw(data, "1", site="a", cache=cache)
    assert (note.images, note.cache_entries, note.unread) == (1, 0, 1)
    assert "a1.png" not in (data / "manifest.csv").read_text()


def test_features_made_under_another_rule_go_too(data: Path, cache: FeatureCache) -> None:
    text = (data / "manifest.csv").read_text().splitlines()
    changed = [text[0] + ",intensity", *(line + ",window:0:99" for line in text[1:])]
    (data / "manifest.csv").write_text("\n".join(changed) + "\n")
    assert withdraw(data, "2", site="a", cache=cache).cache_entries == 2


def test_the_last_to_train_on_cannot_go(data: Path, cache: FeatureCache) -> None:
    withdraw(data, "1", site="a", cache=cache)
    with pytest.raises(DataError, match="without training images"):
        withdraw(data, "2", site="a", cache=cache)
    with pytest.raises(DataError, match="no such patient"):
        withdraw(data, "7", cache=cache)
