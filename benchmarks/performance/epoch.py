"""An epoch from the feature cache against one that encodes its images, with and without the training itself.

Encoding is ``encode_samples`` into an empty cache, in batches as in a run. Reading is what training reads: features and
labels of every image, stacked into batches; first with the files dropped from the page cache, then again. The epoch
that encodes is the cached one with encoding in the place of reading. All on one thread, as a site's process of the
simulation has it.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from icmoe.config import RunConfig
from icmoe.data.cache import FeatureCache
from icmoe.data.dataset import SegmentationDataset
from icmoe.data.features import EncodeReport, FeatureSpec, encode_samples
from icmoe.data.manifest import Sample
from icmoe.modeling.build import detail_size
from icmoe.training import train_local
from icmoe_client.site import Site
from icmoe_client.workbench import ENCODE_BATCH_SIZE, Workbench

from .document import number, seconds, table
from .sites import Setup
from .stopwatch import Cost, Figures, timed

NUM_IMAGES = 24
BAR = 20.0
"""Encoding has to cost this many times what reading costs."""
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Desk:
    """A workbench whose features go into caches of our own."""

    bench: Workbench
    samples: tuple[Sample, ...]

    def encode(self, folder: Path, precision: Precision, count: int) -> EncodeReport:
        """Encode the first ``count`` images into an empty cache."""
        shutil.rmtree(folder, ignore_errors=True)
        return encode_samples(
            self.bench.backbone,
            self.samples[:count],
            views=("identity",),
            cache=FeatureCache(folder),
            detail_size=detail_size(self.bench.run.model, self.bench.backbone),
            precision=precision,
            batch_size=ENCODE_BATCH_SIZE,
        )

    def dataset(self, folder: Path, precision: Precision, count: int) -> SegmentationDataset:
        """Open what ``encode`` wrote."""
        run, size = self.bench.run, detail_size(self.bench.run.model, self.bench.backbone)
        return SegmentationDataset(
            self.samples[:count],
            cache=FeatureCache(folder),
            features=FeatureSpec.of(self.bench.backbone, detail_size=size, precision=precision),
            classes=tuple(run.task.classes.values()),
            ignore=run.task.ignore,
            label_size=size,
        )


def measure(setup: Setup) -> Figures:
    """Encode, read and train on the same images."""
    run, samples = setup.run(), setup.samples("train", ENCODE_BATCH_SIZE if setup.quick else NUM_IMAGES)
    site = Site(name="bench", samples=samples, state_dir=setup.work, num_threads=1)
    desk = Desk(Workbench.prepare(site, run), samples)
    folder = setup.work / "epoch_cache"
    results: Figures = {"num_images": len(samples)}
    for precision in _precisions():
        if not setup.quick:
            desk.encode(folder, precision, ENCODE_BATCH_SIZE)  # warms up
        encode, _ = timed(desk.encode, folder, precision, len(samples))
        data = desk.dataset(folder, precision, len(samples))
        _drop_from_page_cache(folder)
        cold, _ = timed(_read_epoch, data, run.train.batch_size)
        warm, _ = timed(_read_epoch, data, run.train.batch_size)
        results[precision] = {"encode": encode.figures(), "cold": cold.figures(), "warm": warm.figures()}
    results["train"] = _time_training(desk, folder, run, quick=setup.quick).figures()
    results["training"] = f"{run.train.precision}, basic_every {run.train.basic_every}, batch {run.train.batch_size}"
    shutil.rmtree(folder)
    return results


def _precisions() -> Iterator[Precision]:
    """The last one's features are those that are trained on."""
    yield "fp32"
    yield "bf16"


def _time_training(desk: Desk, folder: Path, run: RunConfig, *, quick: bool) -> Cost:
    if not quick:
        _train_epoch(desk, desk.dataset(folder, "bf16", run.train.batch_size), run)  # warms up
    return timed(_train_epoch, desk, desk.dataset(folder, "bf16", len(desk.samples)), run)[0]


def _read_epoch(data: SegmentationDataset, batch_size: int) -> None:
    for start in range(0, len(data), batch_size):
        items = [data.load(index, "identity") for index in range(start, min(start + batch_size, len(data)))]
        for name in ("embeddings", "detail"):
            stacked = torch.stack([getattr(item, name) for item in items])
            stacked.contiguous(memory_format=torch.channels_last)
        torch.stack([item.labels for item in items])


def _train_epoch(desk: Desk, data: SegmentationDataset, run: RunConfig) -> None:
    train_local(
        desk.bench.model,
        desk.bench.backbone.decoder,
        data,
        config=run.train,
        views=("identity",),
        learning_rate=run.train.learning_rate,
        seed=(0,),
    )


def _drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only what is on disk can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def render(figures: Figures) -> str:
    """Reading against encoding, then whole epochs."""
    train = figures["train"]
    rows, whole = [], []
    for precision in _precisions():
        part = figures[precision]
        encode, cold, warm = part["encode"], part["cold"], part["warm"]
        shares = {clock: encode[clock] / max(cold[clock], warm[clock]) for clock in ("wall", "cpu")}
        verdict = "met" if min(shares.values()) >= BAR else "NOT met"
        rows.append(
            [
                f"encoding in {precision}",
                *(seconds(cost) for cost in (encode, cold, warm)),
                f"1/{number(shares['wall'])} / 1/{number(shares['cpu'])}",
                verdict,
            ]
        )
        uncached = {clock: train[clock] - warm[clock] + encode[clock] for clock in train}
        share = " / ".join(f"1/{number(uncached[clock] / train[clock])}" for clock in ("wall", "cpu"))
        whole.append([f"encoding in {precision}", seconds(uncached), seconds(train), share])
    count = figures["num_images"]
    reading = ("read, from disk", "read, from page cache", "slower reading against encoding", "bar 1/20")
    first = table(["wall / CPU seconds", f"encode {count} images", *reading], rows)
    second = table(["wall / CPU seconds", "epoch that encodes", "cached epoch", "cached against encoding"], whole)
    return f"{first}\n\nWhole epochs, training ({figures['training']}) included:\n\n{second}"
