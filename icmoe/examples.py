"""Pictures for the report: image, truth, prediction and which expert won each pixel, for some test images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from icmoe.checkpoint import Checkpoint, load_checkpoint
from icmoe.data.dataset import SegmentationDataset
from icmoe.data.sources import load_pixels
from icmoe.metrics import score_image
from icmoe.training import load_arrays, predict
from icmoe_client.site import Site
from icmoe_client.workbench import Workbench

MAX_EXAMPLES = 12


def write_examples(run_dir: Path, bench: Workbench, sites: Sequence[Site]) -> None:
    """Write ``examples/NN.npz`` from the best checkpoint: per site a typical image and its worst.

    Args:
        run_dir: of the finished run.
        bench: any workbench of the run; its model's weights are replaced.
        sites: of the federation.
    """
    folder = run_dir / "examples"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.npz"):
        old.unlink()
    per_site = 2 if len(sites) <= MAX_EXAMPLES // 2 else 1
    number = 0
    for site in sites[: MAX_EXAMPLES // per_site]:
        here = Workbench(site, bench.run, bench.backbone, bench.model, bench.device)
        if not here.select("test"):
            continue
        load_weights(here, load_checkpoint(run_dir / "best"))
        data = here.dataset("test")
        for index in _typical_and_worst(here, data)[:per_site]:
            write_example(folder / f"{number:02d}.npz", here, data, index)
            number += 1


def load_weights(bench: Workbench, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into a workbench, with what the site kept to itself until that round."""
    load_arrays(bench.model, checkpoint.arrays)
    local = bench.latest_local_file(checkpoint.server_round)
    if local is not None:
        load_arrays(bench.model, load_file(local))


def _typical_and_worst(bench: Workbench, data: SegmentationDataset) -> list[int]:
    """Indices of the image with the median Dice and of the one with the lowest."""
    dice = []
    for index in range(len(data)):
        score = score_image(
            predict_one(bench, data, index)[0],
            data.original_labels(index),
            num_classes=bench.run.task.num_classes,
        ).mean_dice
        if score is not None:
            dice.append((score, index))
    ranked = [index for _, index in sorted(dice)] or [0]
    return list(dict.fromkeys((ranked[len(ranked) // 2], ranked[0])))


def predict_one(bench: Workbench, data: SegmentationDataset, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Label map and index of the winning expert, both (H, W) uint8."""
    probabilities, votes = predict(
        bench.model, bench.backbone.decoder, [data.load(index, "identity")], precision=bench.run.train.precision
    )
    labels = data.restore(index, probabilities[0]).argmax(dim=0)
    winner = data.restore(index, votes[0]).argmax(dim=0)
    return labels.numpy().astype(np.uint8), winner.numpy().astype(np.uint8)


def write_example(path: Path, bench: Workbench, data: SegmentationDataset, index: int) -> None:
    """Write one image with its truth, prediction and winning experts, as ``icmoe.report.pictures`` reads it."""
    prediction, winner = predict_one(bench, data, index)
    truth = data.original_labels(index)
    pixels = load_pixels(data.samples[index])
    low, high = float(pixels.min()), float(pixels.max())
    score = score_image(prediction, truth, num_classes=bench.run.task.num_classes).mean_dice
    np.savez_compressed(
        path,
        image=((pixels - low) / max(high - low, 1e-8) * 255).round().astype(np.uint8),
        truth=truth,
        prediction=prediction,
        winner=winner,
        expert_names=np.array(bench.model.expert_names),
        site=np.array(bench.site.name),
        dice=np.array(np.nan if score is None else score),
    )
