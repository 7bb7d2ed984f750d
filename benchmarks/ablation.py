"""Ablation of IC-MoE: pooled training on cached features with one part changed at a time.

    make ablation                     # cardiac on 2 seeds, nuclei on 1, 6 epochs; results in runs/ablation
    python benchmarks/ablation.py --data-root ../shared/data --out runs/ablation

Every training is a file in ``--out``; run again, it goes on where it stopped and writes the table into
docs/methods/icmoe.md. The scores are of the validation split: the test split is not for choosing.
"""

import json
import multiprocessing
import re
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.progress import Progress

from icmoe.config import RunConfig, load_run_config
from icmoe.references import ReferenceTask, train_reference
from icmoe.simulation import SimulationRequest, Watcher, encode_everything, make_sites, num_cpus
from icmoe.types import FAMILIES
from icmoe_client.site import Site

EPOCHS = 6
ROWS: dict[str, list[str]] = {
    "full": [],
    "no basic experts": ["model.experts.basic=0"],
    "no semantic experts": ["model.experts.semantic=0"],
    "no adaptive experts": ["model.experts.adaptive=0"],
    "plain softmax average instead of PPAV": ["model.voting=softmax"],
    "no label consistency": ["train.loss.consistency=0"],
    "no load balance": ["train.loss.balance=0"],
    "no contrast": ["train.loss.contrast=0"],
}
TASKS = {"cardiac": ("cardiac_mri", (0, 1)), "nuclei": ("nuclei_fluorescence", (0,))}
DOC = Path(__file__).parent.parent / "docs" / "methods" / "icmoe.md"
CONFIGS = Path(__file__).parent.parent / "configs" / "run"


@dataclass(frozen=True)
class Cell:
    """One training: a row of the table, a task, a seed."""

    row: str
    task: str
    seed: int

    @property
    def file_name(self) -> str:
        """Where its result goes."""
        return f"{re.sub('[^a-z]+', '_', self.row.lower())}__{self.task}__{self.seed}.json"


class _Bar(Watcher):
    """Progress of the encoding."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar = progress.add_task("Encoding", total=None)

    def stage(self, text: str) -> None:
        self._progress.update(self._bar, description=text)

    def advance(self, done: int, total: int) -> None:
        self._progress.update(self._bar, completed=done, total=total)

    def round_done(self, record: Any) -> None:
        """Not used: there are no rounds here."""


def main(
    data_root: Annotated[
        Path, typer.Option(envvar="ICMOE_TEST_DATA", help="Folder with cardiac_mri and nuclei_fluorescence.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/ablation"),
    rows: Annotated[str, typer.Option(help="Only these rows, separated by commas.")] = "",
) -> None:
    """Train what is missing, then write the table."""
    chosen = [row.strip() for row in rows.split(",")] if rows else list(ROWS)
    # Row by row last: when it is stopped early, whole columns of the table stand.
    cells = [Cell(row, task, seed) for task, (_, seeds) in TASKS.items() for seed in seeds for row in chosen]
    missing = [cell for cell in cells if not (out / cell.file_name).exists()]
    with Progress() as progress:
        bar = _Bar(progress)
        encoded = {task: _encode(task, data_root, out, bar) for task in {cell.task for cell in missing}}
        tasks = [
            ReferenceTask(config_of(cell), "pooled", *encoded[cell.task], out / cell.file_name, final_split="val")
            for cell in missing
        ]
        trainings = progress.add_task("Training", total=len(tasks))
        with multiprocessing.get_context("spawn").Pool(num_cpus()) as pool:
            for _ in pool.imap_unordered(train_reference, tasks):
                progress.advance(trainings)
    table = make_table(out)
    typer.echo(table)
    _write_into_doc(table)


def config_of(cell: Cell) -> RunConfig:
    """The task's shipped config with one part changed, 6 epochs, one learning-rate step per epoch.

    Logits on every second pixel: at every pixel the 24 trainings would not fit into 90 minutes on two cores.
    """
    common = [
        f"train.seed={cell.seed}",
        "train.local_epochs=1",
        f"federation.num_rounds={EPOCHS}",
        "model.logit_stride=2",
    ]
    return load_run_config(CONFIGS / f"{cell.task}.yaml", [*common, *ROWS[cell.row]])


def _encode(task: str, data_root: Path, out: Path, bar: Watcher) -> tuple[Site, tuple[Site, ...]]:
    """Encode a task's images, which no row changes; return all of them as one site, and the sites."""
    folder, seeds = TASKS[task]
    request = SimulationRequest(run=config_of(Cell("full", task, seeds[0])), data=data_root / folder, out=out / "work")
    sites = make_sites(request)
    # One thread each, because as many trainings as there are processors run side by side.
    return replace(encode_everything(request, sites, bar).site, num_threads=1), sites


def make_table(out: Path) -> str:
    """Markdown table of mean and worst-site validation Dice and of the vote mass of each family."""
    lines = [
        "| what | cardiac | difference | nuclei | difference | votes basic / semantic / adaptive (cardiac) |",
        "|---|---|---|---|---|---|",
    ]
    full = {task: _read(out, "full", task) for task in TASKS}
    for row in ROWS:
        cells = [row]
        for task in TASKS:
            results = _read(out, row, task)
            dice = [result["val_dice"] for result in results]
            base = [result["val_dice"] for result in full[task]]
            cells.append(" ".join(f"{value:.4f}" for value in dice) or "not run")
            cells.append(f"{fmean(dice) - fmean(base):+.4f}" if dice and base and row != "full" else "")
        shares = [result["expert_shares"] for result in _read(out, row, "cardiac")]
        cells.append(" / ".join(f"{_family_share(shares, family):.2f}" for family in FAMILIES) if shares else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _read(out: Path, row: str, task: str) -> list[dict[str, Any]]:
    files = [out / Cell(row, task, seed).file_name for seed in TASKS[task][1]]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def _family_share(shares: list[dict[str, float]], family: str) -> float:
    return fmean(sum(share for name, share in one.items() if name.startswith(f"{family}.")) for one in shares)


def _write_into_doc(table: str) -> None:
    start, end = "<!-- ablation table -->", "<!-- end of ablation table -->"
    text = DOC.read_text(encoding="utf-8")
    before, after = text.split(start)[0], text.split(end)[1]
    DOC.write_text(f"{before}{start}\n{table}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
