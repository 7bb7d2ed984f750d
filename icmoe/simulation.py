"""A whole federation on this machine: the composition behind ``icmoe-fl simulate``.

Part of the composition root: it may import both the server's and the client's package.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from icmoe.checkpoint import holds_run, write_json
from icmoe.config import RunConfig
from icmoe.cpu_time import CpuMeter
from icmoe.data.check_opening import sample_name
from icmoe.data.checked import load_check, require_checked
from icmoe.data.intensity import STORED
from icmoe.data.manifest import load_manifest
from icmoe.data.partition import partition_sites
from icmoe.errors import ConfigError
from icmoe.examples import write_examples
from icmoe.first_checkpoint import open_run_directory
from icmoe.flower import Context, run_in_simulation
from icmoe.references import run_references
from icmoe.report import write_report, write_tensorboard
from icmoe.types import SPLITS
from icmoe_client.app import make_client_app
from icmoe_client.site import Site
from icmoe_client.workbench import Workbench
from icmoe_server.app import Plan, make_server_app

logger = logging.getLogger(__name__)


class Watcher(Protocol):
    """Shows a person how far the run is."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def advance(self, done: int, total: int) -> None:
        """Progress inside the stage."""

    def round_done(self, record: Mapping[str, Any]) -> None:
        """A federated round ended; its line of ``rounds.jsonl``."""


@dataclass(frozen=True)
class SimulationRequest:
    """What ``icmoe-fl simulate`` was asked to do.

    Attributes:
        run: the run config.
        data: folder with ``manifest.csv``.
        out: run directory.
        references: any of ``local`` and ``pooled``.
        resume: continue the run in ``out``.
        checkpoint: file of the pretrained weights, for backbones that do not ship with a package.
        verify_checkpoint: compare it with the published digest.
        verbose: show Flower's and Ray's own logs.
        replaces: folder of an old run, removed as late as possible: when this one can start.
    """

    run: RunConfig
    data: Path
    out: Path
    references: tuple[str, ...] = ()
    resume: bool = False
    checkpoint: Path | None = None
    verify_checkpoint: bool = True
    verbose: bool = False
    replaces: Path | None = None


@dataclass(frozen=True)
class _ByPartition:
    """Tells sites apart by Flower's partition id; a class, so that Ray can send it to its workers."""

    sites: tuple[Site, ...] = field(repr=False)

    def __call__(self, context: Context) -> Site:
        return self.sites[int(context.node_config["partition-id"])]


def simulate(request: SimulationRequest, watcher: Watcher) -> dict[str, Any]:
    """Encode, train federated, train the references, test, report.

    Returns:
        What stands in ``results.json``.

    Raises:
        IcmoeError: of any kind; the run directory keeps the last finished round.
    """
    with CpuMeter() as meter:
        sites = make_sites(request)
        _check_request(request, sites)
        bench = encode_everything(request, sites, watcher)
        if request.replaces is not None and request.replaces.exists():
            shutil.rmtree(request.replaces)
        open_run_directory(request.out, request.run, bench.backbone, bench.model)
        if not (request.out / "results.json").exists():
            watcher.stage("Training")
            _run_flower(request, sites, watcher)
        if request.references:
            watcher.stage(f"References: {', '.join(request.references)}")
            _add_to_results(
                request.out,
                reference=run_references(request.run, sites, request.references, request.out, watcher.advance),
            )
        if request.run.privacy is not None:
            _add_to_results(request.out, epsilon_valid=False)
        watcher.stage("Report")
        write_examples(request.out, bench, sites)
        rules = sorted({sample.intensity or STORED for sample in bench.site.samples})
        _add_to_results(request.out, intensity=rules, cpu_seconds=meter.seconds())
    write_tensorboard(request.out)
    write_report(request.out)
    return read_results(request.out)


def make_sites(request: SimulationRequest) -> tuple[Site, ...]:
    """Sites of the manifest, or of the simulated partition, without images that the data check left out.

    Raises:
        ManifestError: if the data folder has no usable manifest.
        DataError: if it was checked and has changed since.
    """
    left_out = _left_out(request.data)
    simulation = request.run.simulation
    manifest = partition_sites(
        load_manifest(request.data),
        partition=simulation.partition,
        num_sites=simulation.num_sites,
        alpha=simulation.alpha,
        seed=request.run.train.seed,
    )
    num_workers = 1 if torch.cuda.is_available() else min(num_cpus(), len(manifest.sites))
    sites = []
    for name in manifest.sites:
        samples = manifest.select(site=name)
        usable = tuple(sample for sample in samples if sample_name(sample, manifest.root) not in left_out)
        site = Site(
            name=name,
            samples=usable,
            state_dir=request.out / "sites" / name,
            checkpoint=request.checkpoint,
            verify_checkpoint=request.verify_checkpoint,
            num_threads=max(1, num_cpus() // num_workers),
            num_left_out=sum(sample.split == "train" for sample in set(samples) - set(usable)),
            # Under differential privacy a hospital fixes its weight; a simulated one takes its true number.
            num_examples=sum(sample.split == "train" for sample in usable) if request.run.privacy else None,
            simulated=True,
        )
        sites.append(site)
    return tuple(sites)


def _left_out(folder: Path) -> frozenset[str]:
    """Names of images that ``data check`` told training to leave out. A simulation may go without a check."""
    if load_check(folder.parent if folder.suffix.lower() == ".csv" else folder) is None:
        return frozenset()
    return frozenset(one.name for one in require_checked(folder).skipped)


def num_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def read_results(run_dir: Path) -> dict[str, Any]:
    """Read ``results.json``."""
    return dict(json.loads((run_dir / "results.json").read_text(encoding="utf-8")))


def encode_everything(request: SimulationRequest, sites: tuple[Site, ...], watcher: Watcher) -> Workbench:
    """Encode every site's images in this process, with all CPUs, and check every mask."""
    watcher.stage("Encoding images with the frozen backbone")
    everything = Site(
        name="all",
        samples=tuple(sample for site in sites for sample in site.samples),
        state_dir=request.out / "sites",
        checkpoint=request.checkpoint,
        verify_checkpoint=request.verify_checkpoint,
        num_threads=num_cpus(),
    )
    bench = Workbench.prepare(everything, request.run)
    splits = [split for split in SPLITS if bench.select(split)]
    for split in splits:
        bench.dataset(split)
    for split in splits:
        bench.encode(split, progress=watcher.advance)
    return bench


def _check_request(request: SimulationRequest, sites: tuple[Site, ...]) -> None:
    """Refuse what cannot work before an hour is spent on it.

    Raises:
        ConfigError: if the run needs more sites than there are, or the folder holds a run and neither resuming was
            asked for, nor is it the same run.
    """
    out, digest, federation = request.out, request.run.digest(), request.run.federation
    names = {site.name for site in sites}
    if federation.sites and set(federation.sites) != names:
        raise ConfigError(
            f"federation.sites expects {', '.join(sorted(federation.sites))}, but the data has "
            f"{', '.join(sorted(names))}. Make them the same, or leave federation.sites out of a simulation."
        )
    num_asked = request.run.simulation.num_asked(len(sites))
    if federation.updates_needed(num_asked) > num_asked:
        raise ConfigError(
            f"federation.quorum is {federation.quorum}, but each round asks {num_asked} of the {len(sites)} sites in "
            "the data; lower it, or raise simulation.fraction_train."
        )
    if holds_run(out) and request.replaces is None:
        if not request.resume:
            raise ConfigError(f"{out} already holds a run; use --resume to continue it or --overwrite to start anew.")
        if (out / "config.sha256").read_text(encoding="utf-8").strip() != digest:
            raise ConfigError(
                f"{out} holds a run of another config, so it cannot be resumed with this one. "
                f"Resume with {out / 'config.yaml'}, or choose another --out."
            )


def _run_flower(request: SimulationRequest, sites: tuple[Site, ...], watcher: Watcher) -> None:
    plan = Plan(
        run=request.run,
        run_dir=request.out,
        sites=tuple(site.name for site in sites),
        on_round=_reporter(request.run.federation.num_rounds, watcher),
    )
    run_in_simulation(
        make_server_app(plan),
        make_client_app(_ByPartition(sites), simulated=True),
        num_sites=len(sites),
        num_cpus=num_cpus(),
        num_gpus=int(torch.cuda.is_available()),
        verbose=request.verbose,
    )


def _reporter(num_rounds: int, watcher: Watcher) -> Callable[[Mapping[str, Any]], None]:
    def on_round(record: Mapping[str, Any]) -> None:
        watcher.round_done(record)
        watcher.advance(record["round"], num_rounds)

    return on_round


def _add_to_results(run_dir: Path, **more: Any) -> None:
    results = read_results(run_dir)
    # A resumed run adds to the time of the part before.
    if "cpu_seconds" in more:
        more["cpu_seconds"] += results.get("cpu_seconds", 0.0)
    write_json(run_dir / "results.json", {**results, **more})
