"""The images that are measured on, and virtual hospitals made of them."""

import csv
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from icmoe.config import RunConfig, load_run_config
from icmoe.data.demo import write_demo_data
from icmoe.data.manifest import FILE_NAME, Sample, load_manifest
from icmoe.errors import ConfigError
from icmoe.simulation import SimulationRequest, Watcher, encode_everything, make_sites
from icmoe.types import SPLITS, Split

from .stopwatch import Cost, in_fresh_process, now_with_children

CONFIGS = Path(__file__).parents[2] / "configs" / "run"
DISTINCT: Mapping[Split, int] = {"train": 16, "val": 4, "test": 4}
"""Images that virtual sites share, so that many sites cost no more encoding than few."""


@dataclass(frozen=True)
class Setup:
    """What all parts are told.

    Attributes:
        data: folder with ``manifest.csv``.
        config: the shipped run config that fits it.
        work: scratch folder.
        quick: as few repetitions as show that the code runs; the figures mean nothing.
    """

    data: Path
    config: Path
    work: Path
    quick: bool

    @classmethod
    def choose(cls, data_root: Path | None, *, work: Path, quick: bool) -> "Setup":
        """Real cardiac images where there are any, else the embedded demo images.

        Raises:
            ConfigError: if ``data_root`` holds no cardiac images.
        """
        if data_root is None:
            return cls(write_demo_data(work / "demo"), CONFIGS / "demo.yaml", work, quick)
        data = data_root / "cardiac_mri"
        if not (data / FILE_NAME).is_file():
            raise ConfigError(
                f"there is no {data / FILE_NAME}. Give a folder that holds cardiac_mri as --data-root, or leave it out "
                "(and ICMOE_TEST_DATA unset) to measure on the embedded demo images."
            )
        return cls(data, CONFIGS / "cardiac.yaml", work, quick)

    def samples(self, split: Split, count: int) -> tuple[Sample, ...]:
        """Up to ``count`` images, spread over the sites."""
        samples = load_manifest(self.data).select(split=split)
        return samples[:: max(1, len(samples) // count)][:count]

    def run(self, *overrides: str) -> RunConfig:
        """The shipped config with one view and one local epoch, and changes."""
        return load_run_config(self.config, ["train.views=[identity]", "train.local_epochs=1", *overrides])


class RoundClock(Watcher):
    """Notes when each round ended: aggregated, written down, checkpoint on disk."""

    def __init__(self) -> None:
        self.ends: list[Cost] = []

    def stage(self, text: str) -> None:
        """Not shown."""

    def advance(self, done: int, total: int) -> None:
        """Not shown."""

    def round_done(self, record: Mapping[str, object]) -> None:
        """A round ended."""
        self.ends.append(now_with_children())


def virtual_sites(setup: Setup, *, name: str, num_sites: int, per_site: Mapping[Split, int]) -> Path:
    """Write a data folder with ``num_sites`` equal sites; sites share images where there are not enough.

    Args:
        setup: where the images come from.
        name: of the folder, below the scratch folder.
        num_sites: how many.
        per_site: images of each split at each site.

    Returns:
        The folder. Its images are links.
    """
    folder = setup.work / "sites" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / FILE_NAME).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "mask", "patient", "split", "site"))
        for split in SPLITS:
            pool = setup.samples(split, DISTINCT[split])
            for index in range(num_sites * per_site[split]):
                site = f"site_{index // per_site[split]:02d}"
                image, mask = _link(folder, pool[index % len(pool)], stem=f"{site}_{split}_{index}")
                writer.writerow((image, mask, f"{split}_{index}", split, site))
    return folder


def encode_first(request: SimulationRequest) -> None:
    """Fill the feature cache in a process of its own, so that what is measured afterwards only reads it."""
    in_fresh_process(_encode, request)


def _encode(request: SimulationRequest) -> None:
    encode_everything(request, make_sites(request), RoundClock())


def _link(folder: Path, sample: Sample, *, stem: str) -> tuple[str, str]:
    names = f"{stem}{sample.image.suffix}", f"{stem}_mask{sample.mask.suffix}"
    for name, target in zip(names, (sample.image, sample.mask), strict=True):
        (folder / name).symlink_to(target.resolve())
    return names
