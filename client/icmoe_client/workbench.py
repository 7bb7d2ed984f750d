"""Everything a site needs in memory to work for a run: frozen backbone, model, cached features."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch

from icmoe.allocator import keep_memory
from icmoe.config import RunConfig
from icmoe.data.cache import open_cache
from icmoe.data.dataset import SegmentationDataset
from icmoe.data.features import EncodeReport, FeatureSpec, encode_samples
from icmoe.data.manifest import Sample
from icmoe.exchange import shared_names
from icmoe.modeling.backbone import Backbone, load_backbone
from icmoe.modeling.build import build_icmoe, detail_size, normalisation_params
from icmoe.modeling.icmoe import IcMoe
from icmoe.types import Split
from icmoe_client.site import Site

ENCODE_BATCH_SIZE = 4


@lru_cache(maxsize=1)
def frozen_backbone(
    name: str, checkpoint: Path | None, image_size: int | None, verify_checkpoint: bool, device: str
) -> Backbone:
    """Load the backbone once per process; Flower's simulation keeps a process for many messages."""
    backbone = load_backbone(name, checkpoint=checkpoint, image_size=image_size, verify_checkpoint=verify_checkpoint)
    return cast(Backbone, backbone.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]


def choose_device(device: str) -> str:
    """Resolve ``auto``: a GPU where there is one, else the CPU."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


@dataclass(frozen=True)
class Workbench:
    """A run at a site, loaded."""

    site: Site
    run: RunConfig
    backbone: Backbone
    model: IcMoe
    device: str

    @classmethod
    def prepare(cls, site: Site, run: RunConfig) -> "Workbench":
        """Load the backbone and build a model with the run's initial weights.

        Raises:
            BackboneError: if the pretrained weights are not as expected.
        """
        keep_memory()
        if site.num_threads is not None:
            torch.set_num_threads(site.num_threads)
        device = choose_device(site.device)
        backbone = frozen_backbone(
            run.model.backbone, site.checkpoint, run.model.image_size, site.verify_checkpoint, device
        )
        model = build_icmoe(run.model, num_classes=run.task.num_classes, backbone=backbone, seed=run.train.seed)
        return cls(site, run, backbone, model.to(device), device)

    def select(self, split: Split) -> tuple[Sample, ...]:
        """Samples of a split."""
        return tuple(sample for sample in self.site.samples if sample.split == split)

    def encode(self, split: Split, *, progress: Callable[[int, int], None] | None = None) -> EncodeReport:
        """Put the features of a split into the cache; computes only what is missing."""
        views = ("identity", *self.run.train.views) if split == "train" else ("identity",)
        return encode_samples(
            self.backbone,
            self.select(split),
            views=tuple(dict.fromkeys(views)),
            cache=open_cache(),
            detail_size=detail_size(self.run.model, self.backbone),
            precision=self.run.train.precision,
            batch_size=ENCODE_BATCH_SIZE,
            progress=progress,
        )

    def dataset(self, split: Split) -> SegmentationDataset:
        """Encoded samples of a split with their labels."""
        size = detail_size(self.run.model, self.backbone)
        return SegmentationDataset(
            self.select(split),
            cache=open_cache(),
            features=FeatureSpec.of(self.backbone, detail_size=size, precision=self.run.train.precision),
            classes=tuple(self.run.task.classes.values()),
            ignore=self.run.task.ignore,
            label_size=size,
        )

    def shared(self) -> tuple[str, ...]:
        """Names of the tensors that may leave the site."""
        return shared_names(self.model.adapter_params(), self.run.federation.scope, normalisation_params(self.model))

    def latest_local_file(self, server_round: int) -> Path | None:
        """The newest local tensors up to a round; a site that missed rounds goes on from its last one."""
        files = sorted(self.local_file(0).parent.glob("round_*.safetensors"), key=_round_of)
        return next((file for file in reversed(files) if _round_of(file) <= server_round), None)

    def local_file(self, server_round: int) -> Path:
        """Where the tensors that never leave are kept, as they were after a round."""
        # One folder a run: another run's tensors are of another model, or of a run without differential privacy.
        return self.site.state_dir / "local" / self.run.digest()[:16] / f"round_{server_round:03d}.safetensors"


def _round_of(file: Path) -> int:
    return int(file.stem.split("_")[-1])
