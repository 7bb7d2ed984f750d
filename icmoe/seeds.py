"""Several seeds of one run: a run directory each, mean and deviation above them."""

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from icmoe.checkpoint import holds_run, write_json
from icmoe.config import RunConfig
from icmoe.report import write_report
from icmoe.simulation import SimulationRequest, Watcher, simulate


def simulate_seeds(request: SimulationRequest, seeds: Sequence[int], watcher: Watcher) -> dict[str, Any]:
    """Run ``request`` once per seed in ``out/seed_N``; finished seeds are not repeated on resume.

    Returns:
        What stands in ``out/results.json``: means and deviations over seeds.
    """
    runs = {}
    for seed in seeds:
        folder = request.out / f"seed_{seed}"
        config = RunConfig.model_validate(
            {**request.run.model_dump(), "train": {**request.run.train.model_dump(), "seed": seed}}
        )
        watcher.stage(f"Seed {seed}")
        single = dataclasses.replace(request, run=config, out=folder, resume=request.resume and holds_run(folder))
        runs[folder.name] = simulate(single, watcher)
        request = dataclasses.replace(
            request, replaces=None
        )  # the old run is gone; the next seed must not take this one
    results = {"seeds": list(seeds), "runs": list(runs), **summarise_seeds(list(runs.values()))}
    write_json(request.out / "results.json", results)
    write_report(request.out)
    return results


def summarise_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample deviation over runs, for the federation and each reference."""
    first = runs[0]
    summary = {"task": first["task"], "backbone": first["backbone"], **_summarise_scores(runs)}
    for key in ("trainable_params", "bytes_up_per_round_per_site", "num_rounds"):
        summary[key] = first[key]
    for key in ("seconds", "cpu_seconds"):
        summary[key] = sum(run[key] for run in runs)
    if "reference" in first:
        summary["reference"] = {
            kind: _summarise_scores([run["reference"][kind] for run in runs]) for kind in first["reference"]
        }
    return summary


def _summarise_scores(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sites = sorted({site for run in runs for site in run["sites"]})
    return {
        "mean_dice": _mean_std([run["mean_dice"] for run in runs]),
        "worst_site": _mean_std([run["worst_site"]["dice"] for run in runs]),
        "sites": {
            site: {"dice": _mean_std([run["sites"].get(site, {}).get("dice") for run in runs])} for site in sites
        },
    }


def _mean_std(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": fmean(known), "std": stdev(known) if len(known) > 1 else 0.0}
