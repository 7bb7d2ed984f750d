"""Score a checkpoint image by image and volume by volume, also against another checkpoint.

Part of the composition root: it uses the client's workbench.
"""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from icmoe.checkpoint import Checkpoint, write_json
from icmoe.data.check_opening import sample_name
from icmoe.data.checked import load_check, require_checked
from icmoe.data.manifest import Manifest, Sample, load_manifest
from icmoe.errors import ConfigError, DataError
from icmoe.evaluation_cases import (
    Case,
    Geometry,
    SliceGroup,
    VolumeCase,
    choose_geometry,
    group_slices,
    score_case,
    score_volume,
    surface_scores,
    voxel_size,
)
from icmoe.evaluation_tables import compare, summarise
from icmoe.examples import load_weights, predict_one, write_example
from icmoe.prediction import load_run
from icmoe.types import Split
from icmoe_client.site import Site
from icmoe_client.workbench import Workbench

MAX_WORST = 12

Ranked = tuple[float, Workbench, int]


@dataclass(frozen=True)
class EvaluationRequest:
    """What ``icmoe-fl evaluate`` was asked to do.

    Attributes:
        run_dir: of the model.
        data: folder with ``manifest.csv``.
        out: folder for ``cases.csv``, ``volumes.csv``, ``evaluation.json`` and ``worst/``.
        split: which images.
        checkpoint: ``best``, ``final`` or ``round_NNN``.
        against: run directory of the model to compare with.
        against_checkpoint: of that run.
        tolerance: of the surface Dice, in mm or pixels.
        backbone_checkpoint: file of the pretrained weights, for backbones that do not ship with a package.
        seed: of the bootstrap.
    """

    run_dir: Path
    data: Path
    out: Path
    split: Split = "test"
    checkpoint: str = "best"
    against: Path | None = None
    against_checkpoint: str = "best"
    tolerance: float = 2.0
    backbone_checkpoint: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Selection:
    """The images to score.

    Attributes:
        root: the data folder.
        sites: samples by site; a site without any is not in it.
        left_out: by site, how many images ``data check`` told to leave out.
    """

    root: Path
    sites: Mapping[str, tuple[Sample, ...]]
    left_out: Mapping[str, int]

    def name(self, sample: Sample) -> str:
        """What an image is called in the tables."""
        return sample_name(sample, self.root)

    def groups(self, site: str) -> list[SliceGroup]:
        """The volumes of a site."""
        samples = self.sites[site]
        return group_slices(samples, names=[self.name(sample) for sample in samples])


@dataclass
class Scores:
    """What was measured so far, and the images with their Dice."""

    cases: list[Case] = field(default_factory=list)
    volumes: list[VolumeCase] = field(default_factory=list)
    ranked: list[Ranked] = field(default_factory=list)


def evaluate_run(request: EvaluationRequest, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Score all images of a split, write the tables and the worst images.

    Args:
        request: what to do.
        progress: called with (stage, images done, images in all).

    Returns:
        What stands in ``evaluation.json``.

    Raises:
        DataError: if the split has no usable image, or the data changed since they were checked.
        IcmoeError: of any kind, from loading run, backbone or data.
    """
    selection = select_images(load_manifest(request.data), request)
    geometry, reason = choose_geometry([group for site in selection.sites for group in selection.groups(site)])
    mine = _score(request, selection, geometry, (request.run_dir, request.checkpoint), progress)
    _write_worst(request, sorted(mine.ranked, key=lambda item: item[0])[:MAX_WORST])
    result: dict[str, Any] = {
        "run": f"{request.run_dir} {request.checkpoint}",
        "split": request.split,
        "tolerance": request.tolerance,
        "geometry": geometry,
        "geometry_reason": reason,
        "left_out_by_check": dict(selection.left_out),
        "against": None,
        **summarise(mine.cases, mine.volumes, geometry=geometry, seed=request.seed),
    }
    if request.against is not None:
        other = _score(request, selection, geometry, (request.against, request.against_checkpoint), progress)
        result["against"] = {
            "run": f"{request.against} {request.against_checkpoint}",
            **compare(mine.cases, other.cases, seed=request.seed),
        }
    write_cases(request.out / "cases.csv", sorted(mine.cases, key=lambda case: (case.dice is None, case.dice or 0.0)))
    write_cases(request.out / "volumes.csv", mine.volumes)
    write_json(request.out / "evaluation.json", result)
    return result


def select_images(manifest: Manifest, request: EvaluationRequest) -> Selection:
    """Images of the split, without those that ``data check`` told training to leave out, as in a simulation.

    Raises:
        DataError: if none is left, or the data changed since they were checked.
    """
    skipped = _skipped(request.data)
    sites, left_out = {}, {}
    for name in manifest.sites:
        samples = manifest.select(site=name, split=request.split)
        usable = tuple(sample for sample in samples if sample_name(sample, manifest.root) not in skipped)
        if usable:
            sites[name] = usable
        if len(usable) < len(samples):
            left_out[name] = len(samples) - len(usable)
    if not sites:
        why = f": the data check left out all {sum(left_out.values())}" if left_out else ""
        raise DataError(
            f"{request.data} has no image to score in the split {request.split}{why}. Choose another with --split"
            + (f", or repair the images and run 'icmoe-fl data check {request.data}' again." if left_out else ".")
        )
    return Selection(manifest.root, sites, left_out)


def _skipped(data: Path) -> frozenset[str]:
    """Names of images to leave out. An evaluation may go without a check."""
    if load_check(data.parent if data.suffix.lower() == ".csv" else data) is None:
        return frozenset()
    return frozenset(one.name for one in require_checked(data).skipped)


def _score(
    request: EvaluationRequest,
    selection: Selection,
    geometry: Geometry,
    model: tuple[Path, str],
    progress: Callable[[str, int, int], None],
) -> Scores:
    """Score a model, given as run directory and checkpoint, on all images."""
    run_dir, checkpoint = model
    run, weights = load_run(run_dir, checkpoint)
    total = sum(len(samples) for samples in selection.sites.values())
    scores, done = Scores(), 0
    for name, samples in selection.sites.items():
        site = Site(name, samples, run_dir / "sites" / name, checkpoint=request.backbone_checkpoint)
        bench = Workbench.prepare(site, run)
        bench.encode(request.split, progress=lambda done, all_: progress("Encoding", done, all_))
        _load(bench, weights)
        for group in selection.groups(name):
            _score_group(request, selection, geometry, (bench, group), scores)
            done += len(group.indices)
            progress("Scoring", done, total)
    return scores


def _score_group(
    request: EvaluationRequest,
    selection: Selection,
    geometry: Geometry,
    of: tuple[Workbench, SliceGroup],
    scores: Scores,
) -> None:
    """Add one volume, or the pictures of one patient."""
    bench, group = of
    data = bench.dataset(request.split)
    classes = tuple(bench.run.task.classes)
    voxel = voxel_size(data.samples[group.indices[0]])
    own, spacings, stack = [], [], []
    for index in group.indices:
        sample = data.samples[index]
        prediction, _ = predict_one(bench, data, index)
        truth = data.original_labels(index)
        spacing = sample.spacing or (voxel[1:] if voxel else None)
        where = (sample.site, sample.patient, selection.name(sample), sample.slice)
        cases = score_case(
            prediction, truth, where=where, classes=classes, spacing=spacing, tolerance=request.tolerance
        )
        dice = [case.dice for case in cases if case.dice is not None]
        scores.ranked += [(fmean(dice), bench, index)] if dice else []
        own += cases
        spacings.append(spacing)
        if geometry == "3-D" and group.is_whole:
            stack.append((prediction, truth))
    scores.cases += own
    distance = voxel[0] if voxel and group.is_whole else None
    volumes = score_volume(own, volume=group.volume, spacings=spacings, slice_distance=distance)
    if stack and voxel:
        volumes = _add_surfaces(volumes, stack, spacing=voxel, tolerance=request.tolerance)
    scores.volumes += volumes


def _add_surfaces(
    volumes: Sequence[VolumeCase],
    stack: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    spacing: tuple[float, float, float],
    tolerance: float,
) -> list[VolumeCase]:
    prediction, truth = (np.stack(slices) for slices in zip(*stack, strict=True))
    found = []
    for class_id, volume in enumerate(volumes, start=1):
        hd95, share = surface_scores(prediction, truth, class_id=class_id, spacing=spacing, tolerance=tolerance)
        found.append(replace(volume, hd95=hd95, surface_dice=share, unit="mm"))
    return found


def _load(bench: Workbench, weights: Checkpoint) -> None:
    load_weights(bench, weights)
    kept_local = set(bench.model.adapter_params()) - set(weights.arrays)
    if kept_local and bench.latest_local_file(weights.server_round) is None:
        raise ConfigError(
            f"the run kept {len(kept_local)} tensors at its sites (federation.scope: local); {bench.site.state_dir} "
            f"has none of {bench.site.name}. Evaluate on the sites that trained, or with their run directory."
        )


def _write_worst(request: EvaluationRequest, worst: Sequence[Ranked]) -> None:
    folder = request.out / "worst"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.npz"):
        old.unlink()
    for number, (_, bench, index) in enumerate(worst):
        write_example(folder / f"{number:02d}.npz", bench, bench.dataset(request.split), index)


def write_cases(path: Path, cases: Sequence[Case] | Sequence[VolumeCase]) -> None:
    """Write a line per case; there is at least one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(cases[0])])
        writer.writeheader()
        writer.writerows(asdict(case) for case in cases)
    temporary.replace(path)
