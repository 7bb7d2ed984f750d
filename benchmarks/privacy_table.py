"""What differential privacy costs in Dice, beside a U-Net under the same privacy, and how many patients it takes.

    make privacy-table                       # all rows: some hours on 2 cores; may be stopped and continued
    python benchmarks/privacy_table.py --data-root ../shared/data --rows nuclei-none,nuclei-image-8

Every federation is a file in ``--out``; run again, it goes on with the next one. The table in docs/privacy_table.md is
written after each; a row that was not run says so. Scores are of the validation split, of the last round.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from performance.document import around_section, number, table, write_section
from privacy.federation import IcMoeLearner, Learner, federate
from privacy.patients import noise_table
from privacy.unet import UNetLearner
from rich.console import Console

from icmoe.checkpoint import write_json
from icmoe.config import RunConfig, load_run_config
from icmoe.errors import ConfigError, IcmoeError
from icmoe.privacy.config import Unit
from icmoe.progress import ConsoleWatcher
from icmoe.simulation import SimulationRequest, encode_everything, make_sites
from icmoe_client.site import Site

ROUNDS = 5
DATA = {"nuclei": "nuclei_fluorescence", "cardiac": "cardiac_mri"}
CONFIGS = Path(__file__).parents[1] / "configs" / "run"
DOC = Path(__file__).parents[1] / "docs" / "privacy_table.md"
# With few trainable numbers the noise, which is the same in each of them, is smaller beside the gradient.
SMALL = ("model.experts.basic=0", "model.experts.adaptive=1", "model.width=16", "model.logit_stride=4")
LEARNERS: dict[str, type[IcMoeLearner] | type[UNetLearner]] = {
    "icmoe": IcMoeLearner,
    "small": IcMoeLearner,
    "unet": UNetLearner,
}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        task: name of a shipped run config.
        epsilon: of all rounds together; ``None`` is without privacy.
        unit: what epsilon protects.
        model: a key of ``LEARNERS``.
        pooled: all images as those of one site.
        noise_of: with the noise of a site that has so many units.
        seeds: one federation each.
    """

    task: str
    epsilon: int | None
    unit: Unit = "image"
    model: str = "icmoe"
    pooled: bool = False
    noise_of: int | None = None
    seeds: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        """As ``--rows`` takes it."""
        parts = [self.task, "" if self.model == "icmoe" else self.model, "pooled" if self.pooled else ""]
        parts += [self.unit, str(self.epsilon)] if self.epsilon is not None else ["none"]
        parts += [f"noise_of_{self.noise_of}"] if self.noise_of else []
        return "-".join(part for part in parts if part)


TWO = (0, 1)
# The most telling first: stopped early, the beginning of the list is what stands.
ROWS = [
    Row("nuclei", None, model="small"),
    Row("nuclei", 8, model="small", seeds=TWO),
    Row("nuclei", 1, model="small"),
    Row("cardiac", None, model="small"),
    Row("cardiac", 8, model="small", seeds=TWO),
    Row("cardiac", 8, model="unet", seeds=TWO),
    Row("cardiac", None, model="unet"),
    Row("cardiac", 8, "patient", model="small", pooled=True, seeds=TWO),
    Row("cardiac", 8, "patient", model="small", seeds=TWO),
    Row("cardiac", None, model="small", pooled=True),
    Row("cardiac", 1, model="small"),
    Row("cardiac", 1, "patient", model="small"),
    Row("cardiac", 1, "patient", model="small", pooled=True),
    Row("cardiac", 1, model="unet"),
    Row("nuclei", 8, model="small", noise_of=192),
    Row("cardiac", 8, "patient", model="small", noise_of=104),
    Row("cardiac", 8, "patient", model="small", noise_of=416),
    *(Row("cardiac", 8, "patient", model="small", pooled=True, noise_of=patients) for patients in (130, 260, 520)),
    Row("nuclei", 8, seeds=TWO),
    Row("nuclei", None),
    Row("cardiac", 8, seeds=TWO),
    Row("cardiac", None),
]

# The noise of the mean falls with the units in a step, so private steps are larger. Twice as many steps need less than
# twice the noise, so there are more of them.
PRIVATE = (
    "train.batch_size=12",
    "train.local_epochs=6",
    "train.learning_rate=3e-3",
    "train.final_learning_rate=1e-3",
)


def main(
    data_root: Annotated[
        Path, typer.Option(envvar="ICMOE_TEST_DATA", help="Folder with cardiac_mri and nuclei_fluorescence.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results, a file per federation.")] = Path("runs/privacy"),
    rows: Annotated[str, typer.Option(help="Only these, separated by commas, in this order.")] = "",
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a config value, may be repeated.")
    ] = None,
    doc: Annotated[Path, typer.Option(help="Document to write into.", show_default="docs/privacy_table.md")] = DOC,
) -> None:
    """Train what is missing, most telling first, and write the tables after each federation.

    With --set, give another --out: files are told apart by row and seed only.
    """
    try:
        around_section(doc, "privacy utility")
        chosen = _chosen(rows)
        write_section(doc, "privacy patients", patients_table())
        write_section(doc, "privacy utility", utility_table(out))
        with ConsoleWatcher(Console(stderr=True)) as watcher:
            # First seeds of all rows before the second of any.
            for seed in sorted({seed for row in chosen for seed in row.seeds}):
                for row in (row for row in chosen if seed in row.seeds and not _file(out, row, seed).exists()):
                    watcher.stage(f"{row.name}, seed {seed}")
                    run = config_of(row, seed, override or [])
                    write_json(_file(out, row, seed), train(row, run, data_root / DATA[row.task], out, watcher))
                    write_section(doc, "privacy utility", utility_table(out))
    except IcmoeError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    typer.echo(f"{utility_table(out)}\n\n{patients_table()}")


def config_of(row: Row, seed: int, overrides: Sequence[str] = ()) -> RunConfig:
    """The task's shipped config for 5 rounds; with privacy, larger and shorter steps.

    Raises:
        ConfigError: if an override is wrong.
    """
    changes = [f"train.seed={seed}", f"federation.num_rounds={ROUNDS}"]
    if row.model == "small":
        changes += SMALL
    if row.epsilon is not None:
        changes += [*PRIVATE, f"privacy.target_epsilon={row.epsilon}", f"privacy.unit={row.unit}"]
    return load_run_config(CONFIGS / f"{row.task}.yaml", [*changes, *overrides])


def train(row: Row, run: RunConfig, data: Path, out: Path, watcher: ConsoleWatcher) -> dict[str, Any]:
    """Run one federation.

    Returns:
        ``dice`` and ``noise_multiplier`` by site, seconds.
    """
    start = time.monotonic()
    request = SimulationRequest(run=run, data=data, out=out / "work")
    # Encoding takes all processors; training then as many threads as the caller gave torch.
    threads = torch.get_num_threads()
    sites = [replace(site, num_threads=threads) for site in make_sites(request)]
    bench = encode_everything(request, tuple(sites), watcher)
    torch.set_num_threads(threads)
    learner: Learner = LEARNERS[row.model](bench)
    outcome = federate(
        learner,
        bench,
        training=[_together(sites)] if row.pooled else sites,
        scored=sites,
        noise_of=row.noise_of,
    )
    return {
        "dice": outcome.dice,
        "noise_multiplier": outcome.noise_multiplier,
        "config": run.digest(),
        "seconds": round(time.monotonic() - start),
        "cpus": len(os.sched_getaffinity(0)),
    }


def utility_table(out: Path) -> str:
    """Markdown table of all rows; seeds stand beside each other."""
    header = ["task", "model", "sites", "epsilon", "unit", "sigma", "Dice, mean over sites", "worst site"]
    lines = []
    for row in sorted(ROWS, key=_place):
        files = [_file(out, row, seed) for seed in row.seeds]
        results = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        lines.append([*_labels(row), *_figures(results)])
    return table(header, lines)


def patients_table() -> str:
    """Noise by number of patients, for the cardiac config."""
    run = config_of(Row("cardiac", 8, "patient"), 0)
    delta = run.privacy.target_delta if run.privacy else 0.0
    return noise_table(num_rounds=ROUNDS, local_epochs=run.train.local_epochs, delta=delta)


def _place(row: Row) -> tuple[object, ...]:
    """Rows that are compared stand together, less privacy first."""
    return row.task != "nuclei", row.pooled, row.unit, row.model, -(row.epsilon or 99), row.noise_of or 0


def _labels(row: Row) -> list[str]:
    model = {"icmoe": "IC-MoE", "small": "IC-MoE, small", "unet": "U-Net"}[row.model]
    sites = "all patients at one" if row.pooled else "as in the data"
    if row.epsilon is None:
        return [
            row.task,
            model,
            sites,
            "none",
            "",
        ]
    epsilon = f"noise of {row.noise_of} {row.unit}s" if row.noise_of else str(row.epsilon)
    return [row.task, model, sites, epsilon, row.unit]


def _figures(results: Sequence[dict[str, Any]]) -> list[str]:
    if not results:
        return ["", "not run", "not run"]
    sigmas = sorted({sigma for result in results for sigma in result["noise_multiplier"].values()})
    sigma = " to ".join(number(value) for value in dict.fromkeys((sigmas[0], sigmas[-1]))) if sigmas else ""
    means = " ".join(f"{fmean(result['dice'].values()):.3f}" for result in results)
    worst = " ".join(f"{min(result['dice'].values()):.3f}" for result in results)
    return [sigma, means, worst]


def _together(sites: Sequence[Site]) -> Site:
    return replace(sites[0], name="all", samples=tuple(sample for site in sites for sample in site.samples))


def _file(out: Path, row: Row, seed: int) -> Path:
    return out / f"{row.name}__{seed}.json"


def _chosen(names: str) -> list[Row]:
    rows = {row.name: row for row in ROWS}
    asked = [name.strip() for name in names.split(",")] if names else list(rows)
    unknown = [name for name in asked if name not in rows]
    if unknown:
        raise ConfigError(f"--rows: there is no row {unknown[0]!r}. Choose from {', '.join(rows)}.")
    return [rows[name] for name in asked]


if __name__ == "__main__":
    typer.run(main)
