"""Score a checkpoint image by image, with intervals that respect patients, and against another checkpoint.

Part of the composition root: it uses the client's workbench.
"""

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from icmoe.checkpoint import Checkpoint, write_json
from icmoe.data.check_opening import sample_name
from icmoe.data.manifest import load_manifest
from icmoe.errors import ConfigError, DataError
from icmoe.examples import load_weights, predict_one, write_example
from icmoe.metrics import Labels, score_image, surface_dice
from icmoe.prediction import load_run
from icmoe.statistics import bootstrap_means, interval, paired_p_value
from icmoe.types import IGNORE_INDEX, Split
from icmoe_client.site import Site
from icmoe_client.workbench import Workbench

MAX_WORST = 12
METRICS = ("dice", "hd95", "surface_dice", "volume_error")


@dataclass(frozen=True)
class Case:
    """One class of one image; a metric is ``None`` where the class is not in the truth.

    ``hd95`` is in mm where the spacing is known, else in pixels. ``volume_error`` is (predicted - true) / true area.
    """

    site: str
    patient: str
    image: str
    slice: str
    class_name: str
    dice: float | None
    hd95: float | None
    surface_dice: float | None
    volume_error: float | None
    true_pixels: int
    predicted_pixels: int
    in_mm: bool


@dataclass(frozen=True)
class EvaluationRequest:
    """What ``icmoe-fl evaluate`` was asked to do.

    Attributes:
        run_dir: of the model.
        data: folder with ``manifest.csv``.
        out: folder for ``cases.csv``, ``evaluation.json`` and ``worst/``.
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


def evaluate_run(request: EvaluationRequest, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Score all images of a split, write the tables and the worst images.

    Args:
        request: what to do.
        progress: called with (stage, images done, images in all).

    Returns:
        What stands in ``evaluation.json``.

    Raises:
        DataError: if the split has no image.
        IcmoeError: of any kind, from loading run, backbone or data.
    """
    cases, worst = _score(request, request.run_dir, request.checkpoint, progress)
    _write_worst(request, worst)
    result: dict[str, Any] = {
        "run": f"{request.run_dir} {request.checkpoint}",
        "split": request.split,
        "tolerance": request.tolerance,
        "unit": "mm" if all(case.in_mm for case in cases) else "px",
        **summarise(cases, seed=request.seed),
    }
    if request.against is not None:
        others, _ = _score(request, request.against, request.against_checkpoint, progress)
        result["against"] = {
            "run": f"{request.against} {request.against_checkpoint}",
            **compare(cases, others, seed=request.seed),
        }
    _write_cases(request.out / "cases.csv", sorted(cases, key=lambda case: (case.dice is None, case.dice or 0.0)))
    write_json(request.out / "evaluation.json", result)
    return result


def summarise(cases: Sequence[Case], *, seed: int) -> dict[str, Any]:
    """Means with 95 % intervals per site, per class and over sites, and the means of each patient."""
    sites = {site: [case for case in cases if case.site == site] for site in sorted({case.site for case in cases})}
    per_site = {site: _summary(own, seed=seed) for site, own in sites.items()}
    classes = list(dict.fromkeys(case.class_name for case in cases))
    draws = [_draws(own, "dice", seed=seed + number) for number, own in enumerate(sites.values())]
    known = [one for one in draws if one is not None]
    dice = [summary["dice"]["mean"] for summary in per_site.values() if summary["dice"] is not None]
    return {
        "mean_over_sites": {"dice": {"mean": fmean(dice), "ci95": interval(np.mean(known, axis=0))}} if known else None,
        "sites": per_site,
        "classes": {name: _summary([case for case in cases if case.class_name == name], seed=seed) for name in classes},
        "patients": _patients(cases),
    }


def compare(cases: Sequence[Case], others: Sequence[Case], *, seed: int) -> dict[str, Any]:
    """Paired difference of Dice, this model minus the other: the mean over patients of their images' mean difference.

    Raises:
        DataError: if both were not scored on the same images and classes, or no image has a foreground.
    """
    mine, theirs = (
        {(case.site, case.patient, case.image, case.class_name): case.dice for case in one if case.dice is not None}
        for one in (cases, others)
    )
    if mine.keys() != theirs.keys() or not mine:
        raise DataError(
            "the two models cannot be compared in pairs: they were not scored on the same images and classes, or no "
            "image has a foreground."
        )
    first, second = _per_image(cases, "dice"), _per_image(others, "dice")
    by_patient: dict[str, list[float]] = {}
    for key in first:
        by_patient.setdefault(f"{key[0]}/{key[1]}", []).append(first[key] - second[key])
    means = [fmean(values) for values in by_patient.values()]
    return {
        "difference": fmean(means),
        "ci95": interval(bootstrap_means(means, list(by_patient), seed=seed)) if len(means) > 1 else None,
        "p_value": paired_p_value(means, [0.0] * len(means)),
        "test": "Wilcoxon signed-rank over patients' mean differences, two-sided",
        "num_patients": len(means),
        "num_better": sum(mean > 0 for mean in means),
    }


Ranked = tuple[float, Workbench, int]


def _score(
    request: EvaluationRequest, run_dir: Path, checkpoint: str, progress: Callable[[str, int, int], None]
) -> tuple[list[Case], list[Ranked]]:
    """All cases of a split, and the images with the lowest Dice."""
    run, weights = load_run(run_dir, checkpoint)
    manifest = load_manifest(request.data)
    chosen = {name: manifest.select(site=name, split=request.split) for name in manifest.sites}
    total = sum(len(samples) for samples in chosen.values())
    if not total:
        raise DataError(f"{request.data} has no image in the split {request.split}. Choose another with --split.")
    cases: list[Case] = []
    ranked: list[Ranked] = []
    for name, samples in chosen.items():
        site = Site(name, samples, run_dir / "sites" / name, checkpoint=request.backbone_checkpoint)
        bench = Workbench.prepare(site, run)
        bench.encode(request.split, progress=lambda done, all_: progress("Encoding", done, all_))
        data = bench.dataset(request.split)
        _load(bench, weights)
        for index, sample in enumerate(samples):
            prediction, _ = predict_one(bench, data, index)
            own = score_case(
                prediction,
                data.original_labels(index),
                where=(name, sample.patient, sample_name(sample, manifest.root), sample.slice),
                classes=tuple(run.task.classes),
                spacing=sample.spacing,
                tolerance=request.tolerance,
            )
            cases += own
            dice = [case.dice for case in own if case.dice is not None]
            ranked += [(fmean(dice), bench, index)] if dice else []
            progress("Scoring", len(cases) // len(own), total)
    return cases, sorted(ranked, key=lambda item: item[0])[:MAX_WORST]


def _load(bench: Workbench, weights: Checkpoint) -> None:
    load_weights(bench, weights)
    kept_local = set(bench.model.adapter_params()) - set(weights.arrays)
    if kept_local and bench.latest_local_file(weights.server_round) is None:
        raise ConfigError(
            f"the run kept {len(kept_local)} tensors at its sites (federation.scope: local); {bench.site.state_dir} "
            f"has none of {bench.site.name}. Evaluate on the sites that trained, or with their run directory."
        )


def score_case(
    prediction: Labels,
    truth: Labels,
    *,
    where: tuple[str, str, str, str],
    classes: Sequence[str],
    spacing: tuple[float, float] | None,
    tolerance: float,
) -> list[Case]:
    """All metrics of one image, a case per foreground class.

    Args:
        prediction: (H, W) class ids.
        truth: (H, W) class ids with ``IGNORE_INDEX``.
        where: site, patient, image, slice.
        classes: names in order.
        spacing: mm per pixel (row, column).
        tolerance: of the surface Dice.
    """
    num_classes = len(classes) + 1
    score = score_image(prediction, truth, num_classes=num_classes, with_hd95=True, spacing=spacing)
    surface = surface_dice(prediction, truth, num_classes=num_classes, tolerance=tolerance, spacing=spacing)
    counted = truth != IGNORE_INDEX
    cases = []
    for index, name in enumerate(classes):
        true = int(((truth == index + 1) & counted).sum())
        predicted = int(((prediction == index + 1) & counted).sum())
        cases.append(
            Case(
                *where,
                class_name=name,
                dice=score.dice[index],
                hd95=score.hd95[index] if score.hd95 else None,
                surface_dice=surface[index],
                volume_error=(predicted - true) / true if true else None,
                true_pixels=true,
                predicted_pixels=predicted,
                in_mm=spacing is not None,
            )
        )
    return cases


def _summary(cases: Sequence[Case], *, seed: int) -> dict[str, Any]:
    scored = [case for case in cases if case.dice is not None]
    summary: dict[str, Any] = {
        "num_images": len({(case.site, case.patient, case.image) for case in scored}),
        "num_patients": len({(case.site, case.patient) for case in scored}),
    }
    for metric in METRICS:
        values = list(_per_image(cases, metric).values())
        draws = _draws(cases, metric, seed=seed)
        summary[metric] = None if draws is None else {"mean": fmean(values), "ci95": _interval(draws, summary)}
    return summary


def _interval(draws: Any, summary: dict[str, Any]) -> tuple[float, float] | None:
    """``None`` for a single patient, who says nothing about the next one."""
    return interval(draws) if summary["num_patients"] > 1 else None


def _draws(cases: Sequence[Case], metric: str, *, seed: int) -> Any:
    values = _per_image(cases, metric)
    if not values:
        return None
    return bootstrap_means(list(values.values()), [f"{site}/{patient}" for site, patient, _ in values], seed=seed)


def _per_image(cases: Iterable[Case], metric: str) -> dict[tuple[str, str, str], float]:
    """Mean over the classes present, by site, patient and image."""
    images: dict[tuple[str, str, str], list[float]] = {}
    for case in cases:
        value = getattr(case, metric)
        if value is not None:
            images.setdefault((case.site, case.patient, case.image), []).append(value)
    return {image: fmean(values) for image, values in images.items()}


def _patients(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Per patient: means over images, and the volume error over all slices together; lowest Dice first."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.site, case.patient), []).append(case)
    rows = []
    for (site, patient), own in groups.items():
        true = sum(case.true_pixels for case in own)
        row: dict[str, Any] = {"site": site, "patient": patient, "num_images": len({case.image for case in own})}
        for metric in ("dice", "hd95", "surface_dice"):
            values = _per_image(own, metric).values()
            row[metric] = fmean(values) if values else None
        row["volume_error"] = (sum(case.predicted_pixels for case in own) - true) / true if true else None
        rows.append(row)
    return sorted(rows, key=lambda row: (row["dice"] is None, row["dice"] or 0.0))


def _write_worst(request: EvaluationRequest, worst: Sequence[Ranked]) -> None:
    folder = request.out / "worst"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.npz"):
        old.unlink()
    for number, (_, bench, index) in enumerate(worst):
        write_example(folder / f"{number:02d}.npz", bench, bench.dataset(request.split), index)


def _write_cases(path: Path, cases: Sequence[Case]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Case)])
        writer.writeheader()
        writer.writerows(asdict(case) for case in cases)
    temporary.replace(path)
