"""``icmoe-fl evaluate``: how good is a checkpoint, how sure are we, and where does it fail."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from icmoe.errors import ConfigError


def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="Run directory of the model.")],
    data: Annotated[Path, typer.Option(help="Folder with manifest.csv.")],
    out: Annotated[Path | None, typer.Option(help="Default: RUN_DIR/evaluation.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    checkpoint: Annotated[str, typer.Option(help="best, final, or a round such as round_003.")] = "best",
    against: Annotated[Path | None, typer.Option(help="Run directory of a model to compare with, in pairs.")] = None,
    against_checkpoint: Annotated[str, typer.Option(help="Of that run.")] = "best",
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Of the surface Dice; mm where the spacing is known.")
    ] = 2.0,
    backbone_checkpoint: Annotated[
        Path | None, typer.Option(help="File with pretrained weights, for sam_vit_* and medsam_vit_b.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Score a checkpoint: Dice, HD95, surface Dice and volumes per class, patient and site, with 95 % intervals.

    Writes cases.csv (a line per image and class), volumes.csv (a line per volume and class), evaluation.json and
    evaluation.html, which shows the worst images. Images that 'icmoe-fl data check' left out are not scored. HD95 and
    surface Dice are taken in 3-D where all images are slices of volumes, else per slice.

    Example: icmoe-fl evaluate runs/cardiac --data ../shared/data/cardiac_mri --against runs/other
    """
    from icmoe.evaluation import EvaluationRequest, evaluate_run
    from icmoe.report.evaluation_page import write_evaluation_page
    from icmoe.types import SPLITS

    chosen = next((name for name in SPLITS if name == split), None)
    if chosen is None:
        raise ConfigError(f"--split takes {', '.join(SPLITS)}; got {split!r}.")
    folder = out or run_dir / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    request = EvaluationRequest(
        run_dir=run_dir,
        data=data,
        out=folder,
        split=chosen,
        checkpoint=checkpoint,
        against=against,
        against_checkpoint=against_checkpoint,
        tolerance=tolerance,
        backbone_checkpoint=backbone_checkpoint,
    )
    with Progress(console=Console(stderr=True)) as progress:
        bars: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage)
            progress.update(bars[stage], completed=done, total=total)

        result = evaluate_run(request, show)
    page = write_evaluation_page(folder, run_dir, result)
    if as_json:
        typer.echo(json.dumps(result))
        return
    _print(result)
    typer.echo(f"Page: {page}")


def _print(result: dict[str, Any]) -> None:
    table = Table(title="means, with 95 % intervals over patients")
    surface = result["geometry"]
    columns = ("patients", "Dice", "unit", f"HD95 ({surface})", f"surface Dice ({surface})", "volume", "|volume|")
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    for group in ("sites", "classes"):
        for name, row in result[group].items():
            volumes = (_cell(row[m], percent=True) for m in ("volume_difference", "absolute_volume_difference"))
            distances = (_cell(row[metric]) for metric in ("hd95", "surface_dice"))
            table.add_row(name, str(row["num_patients"]), _cell(row["dice"]), row["unit"] or "-", *distances, *volumes)
        table.add_section()
    Console().print(table)
    _print_notes(result)
    if against := result.get("against"):
        p_value = "too few patients for a test" if against["p_value"] is None else f"p = {against['p_value']:.2g}"
        bounds = " ({:+.4f} to {:+.4f})".format(*against["ci95"]) if against["ci95"] else ""
        typer.echo(f"Against {against['run']}: {against['difference']:+.4f} Dice{bounds}, {p_value}.")


def _print_notes(result: dict[str, Any]) -> None:
    typer.echo(f"HD95 and surface Dice are {result['geometry']}: {result['geometry_reason']}.")
    what = "volumes without 3 consecutive slices" if result["geometry"] == "3-D" else "images without a spacing"
    for name, row in result["sites"].items():
        if row["num_surfaces_left_out"]:
            typer.echo(f"{name}: {row['num_surfaces_left_out']} {what} are left out of HD95 and surface Dice.")
    for name, number in result["left_out_by_check"].items():
        typer.echo(f"{name}: {number} images that the data check left out are not scored.")


def _cell(value: dict[str, Any] | None, *, percent: bool = False) -> str:
    if value is None:
        return "-"
    numbers = [value["mean"], *(value["ci95"] or ())]
    texts = [f"{100 * number:.1f} %" if percent else f"{number:.3f}" for number in numbers]
    return texts[0] + (f" ({texts[1]} to {texts[2]})" if len(texts) > 1 else "")
