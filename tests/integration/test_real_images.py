"""The shipped run configs against the real images they are meant for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from icmoe.config import load_run_config
from icmoe.data.cache import FeatureCache
from icmoe.data.dataset import SegmentationDataset
from icmoe.data.features import FeatureSpec, encode_samples
from icmoe.data.manifest import load_manifest
from icmoe.modeling.backbone import Backbone, load_backbone
from icmoe.modeling.build import build_icmoe, detail_size
from icmoe.modeling.icmoe import IcMoe
from icmoe.training import evaluate, train_local
from icmoe.types import SPLITS

TASKS = {
    "cardiac": ("cardiac_mri", 5, 396),
    "nuclei": ("nuclei_fluorescence", 4, 240),
    "vessels": ("retinal_vessels", 4, 118),
}


@pytest.mark.parametrize("name", TASKS)
def test_every_mask_of_a_task_maps_to_classes(name: str, test_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder, num_sites, num_images = TASKS[name]
    task = load_run_config(Path("configs/run") / f"{name}.yaml").task
    manifest = load_manifest(test_data(folder))
    assert len(manifest.sites) == num_sites
    assert len(manifest.samples) == num_images
    assert all(manifest.select(site=site, split=split) for site in manifest.sites for split in SPLITS)
    some = manifest.samples[::5]
    spec = FeatureSpec("digest", 256, 64, "minmax", 256, "bf16")
    data = SegmentationDataset(
        some,
        cache=FeatureCache(tmp_path / "features"),
        features=spec,
        classes=tuple(task.classes.values()),
        ignore=task.ignore,
        label_size=256,
    )
    present = set(np.unique(np.concatenate([np.unique(data.original_labels(i)) for i in range(len(data))])).tolist())
    assert present == set(range(task.num_classes))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cardiac", "nuclei"])  # thin vessels need more steps than a test has
def test_a_few_steps_on_real_images_learn(name: str, test_data: Callable[[str], Path], tmp_path: Path) -> None:
    """Real images through the real backbone, cached; a few steps must beat the untrained model."""
    run = load_run_config(
        Path("configs/run") / f"{name}.yaml",
        ["train.local_epochs=6", "train.batch_size=2", "train.basic_every=4", "train.views=[identity]"],
    )
    manifest = load_manifest(test_data(TASKS[name][0]))
    samples = manifest.select(site=manifest.sites[0], split="train")[:6]
    backbone = load_backbone("lite_medsam")
    cache, size = FeatureCache(tmp_path / "features"), detail_size(run.model, backbone)
    encode_samples(backbone, samples, views=["identity"], cache=cache, detail_size=size, precision="bf16")
    data = SegmentationDataset(
        samples,
        cache=cache,
        features=FeatureSpec.of(backbone, detail_size=size, precision="bf16"),
        classes=tuple(run.task.classes.values()),
        label_size=size,
    )
    model = build_icmoe(run.model, num_classes=run.task.num_classes, backbone=backbone, seed=0)
    before = _mean_dice(model, backbone, data, run.task.num_classes)
    digest = backbone.digest()
    train_local(model, backbone.decoder, data, config=run.train, views=["identity"], learning_rate=3e-3, seed=(0,))
    assert _mean_dice(model, backbone, data, run.task.num_classes) > before + 0.1
    assert backbone.digest() == digest


def _mean_dice(model: IcMoe, backbone: Backbone, data: SegmentationDataset, num_classes: int) -> float:
    scores = evaluate(model, backbone.decoder, data, num_classes=num_classes, precision="bf16")
    return float(np.mean([score.mean_dice for score in scores if score.mean_dice is not None]))
