"""What federation is measured against: the same model on each site alone, and on all data together.

A reference makes the same number of optimiser steps on its data as the federation made there: local as many as its
site, pooled as many as all sites together. It runs through the same rounds (learning rate, fresh optimiser, best
checkpoint by validation Dice) with nobody to average with.
"""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from icmoe.checkpoint import write_json
from icmoe.config import RunConfig
from icmoe.exchange import SiteReport
from icmoe.training import dump_arrays, load_arrays, round_learning_rate, train_local
from icmoe.types import Split
from icmoe_client.site import Site
from icmoe_client.trainer import score_split, training_seed
from icmoe_client.workbench import Workbench
from icmoe_server.books import summarise_test


@dataclass(frozen=True)
class ReferenceTask:
    """One reference training.

    Attributes:
        run: the run config.
        name: ``pooled`` or a site's.
        training: holds the images to train on.
        scored: sites whose validation and test images are scored.
        file: JSON with the final scores per site and the experts' shares of the vote; written at the end.
        final_split: which split the best checkpoint is scored on at the end; comparisons that choose must not say test.
    """

    run: RunConfig
    name: str
    training: Site
    scored: tuple[Site, ...]
    file: Path
    final_split: Split = "test"


def run_references(
    run: RunConfig,
    sites: Sequence[Site],
    kinds: Sequence[str],
    run_dir: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Train what is asked for, in parallel; finished ones are kept in ``references/`` and not trained again.

    Args:
        run: the run config.
        sites: of the federation.
        kinds: any of ``local`` and ``pooled``.
        run_dir: of the federated run.
        progress: called with (trainings done, trainings in all).

    Returns:
        For each kind ``sites``, ``mean_dice`` and ``worst_site`` as in ``results.json``.
    """
    tasks = [task for kind in kinds for task in _tasks(run, sites, kind, run_dir)]
    missing = [task for task in tasks if not task.file.exists()]
    done = len(tasks) - len(missing)
    progress(done, len(tasks))
    workers = 1 if torch.cuda.is_available() else max(1, torch.get_num_threads() // (sites[0].num_threads or 1))
    if missing:
        # Longest first, so that the last worker is not left alone with the pooled training.
        missing.sort(key=lambda task: -len(task.training.samples))
        with multiprocessing.get_context("spawn").Pool(min(workers, len(missing))) as pool:
            for _ in pool.imap_unordered(train_reference, missing):
                done += 1
                progress(done, len(tasks))
    class_names = list(run.task.classes)
    result = {}
    for kind in kinds:
        reports: dict[str, SiteReport] = {}
        for task in _tasks(run, sites, kind, run_dir):
            reports |= read_reference(task)
        result[kind] = summarise_test(reports, class_names)
    return result


def read_reference(task: ReferenceTask) -> dict[str, SiteReport]:
    """Test scores by site that ``train_reference`` wrote."""
    content = json.loads(task.file.read_text(encoding="utf-8"))
    return {name: _from_json(name, entry, content, task.run) for name, entry in content["sites"].items()}


def _tasks(run: RunConfig, sites: Sequence[Site], kind: str, run_dir: Path) -> list[ReferenceTask]:
    folder = run_dir / "references"
    if kind == "local":
        return [ReferenceTask(run, site.name, site, (site,), folder / f"local_{site.name}.json") for site in sites]
    everything = Site(
        name="pooled",
        samples=tuple(sample for site in sites for sample in site.samples),
        state_dir=sites[0].state_dir.parent / "pooled",
        checkpoint=sites[0].checkpoint,
        verify_checkpoint=sites[0].verify_checkpoint,
        num_threads=sites[0].num_threads,
    )
    return [ReferenceTask(run, "pooled", everything, tuple(sites), folder / "pooled.json")]


def train_reference(task: ReferenceTask) -> None:
    """Train and test one reference, and write its file. Runs in a process of its own."""
    run, rounds = task.run, task.run.federation.num_rounds
    bench = Workbench.prepare(task.training, run)
    benches = [Workbench(site, run, bench.backbone, bench.model, bench.device) for site in task.scored]
    encoded, data = bench.encode("train"), bench.dataset("train")
    best, best_dice, shares = dump_arrays(bench.model), -1.0, dict[str, float]()
    for server_round in range(1, rounds + 1):
        result = train_local(
            bench.model,
            bench.backbone.decoder,
            data,
            config=run.train,
            views=[view for view in run.train.views if view in encoded.views],
            learning_rate=round_learning_rate(run.train, server_round=server_round, num_rounds=rounds),
            seed=training_seed(run, task.name, server_round),
            max_physical_batch_size=task.training.max_physical_batch_size,
        )
        dice = _mean_dice(benches, "val")
        # Without validation images the last round counts, as in the federation.
        if dice is None or dice > best_dice:
            best, best_dice = dump_arrays(bench.model), -1.0 if dice is None else dice
            shares = result.expert_shares
    load_arrays(bench.model, best)
    sites = {b.site.name: _to_json(*score_split(b, task.final_split)) for b in benches}
    write_json(task.file, {"sites": sites, "expert_shares": shares, "val_dice": best_dice})


def _mean_dice(benches: Sequence[Workbench], split: Split) -> float | None:
    scores = [score_split(bench, split)[0].get("dice") for bench in benches]
    known = [dice for dice in scores if dice is not None]
    return fmean(known) if known else None


def _to_json(numbers: dict[str, float], per_class: list[float]) -> dict[str, Any]:
    return {"numbers": numbers, "dice_per_class": [None if dice != dice else dice for dice in per_class]}


def _from_json(name: str, entry: dict[str, Any], content: dict[str, Any], run: RunConfig) -> SiteReport:
    return SiteReport(
        site=name,
        server_round=run.federation.num_rounds,
        config_digest=run.digest(),
        backbone_digest="",
        numbers=entry["numbers"],
        expert_shares=content["expert_shares"],
        dice_per_class=[float("nan") if dice is None else dice for dice in entry["dice_per_class"]],
    )
