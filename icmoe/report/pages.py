"""The page: what is known of a run, handed to the templates. Every value is escaped there."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from icmoe import __version__
from icmoe.errors import RunError
from icmoe.report.figures import (
    LINE_COLOURS,
    LINE_DASHES,
    LineChart,
    Points,
    Series,
    line_chart,
    mean_points,
    site_series,
)
from icmoe.report.formats import FORMATS
from icmoe.report.pictures import class_colour, expert_colour, load_gallery
from icmoe.report.records import Round, Run, SeedsRun, read_run
from icmoe.report.tables import (
    REFERENCE_TITLES,
    incidents,
    last_shares,
    participation,
    score_table,
    seeds_table,
    traffic,
)

PAGE_LIMIT = 15_000_000
CHARACTERS_PER_SITE_AND_ROUND = 300  # 230 measured, in tables, curves and the grid of participation


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory. The page loads nothing from anywhere and holds no date.

    A directory of several seeds gets a summary page, and each of its runs a page of its own.

    Args:
        run_dir: directory of a finished run.

    Returns:
        Path of the page.

    Raises:
        RunError: if ``results.json`` is missing, a file is damaged or the page cannot be written.
        ConfigError: if ``config.yaml`` is not a valid run config.
    """
    return _write_page(read_run(run_dir))


def _write_page(run: Run | SeedsRun) -> Path:
    if isinstance(run, SeedsRun):
        for seed_run in run.runs.values():
            _write_page(seed_run)
        return replace_text(run.directory / "report.html", render("seeds.html.j2", _seeds_view(run)))
    return replace_text(run.directory / "report.html", render("run.html.j2", _run_view(run)))


def replace_text(path: Path, text: str) -> Path:
    """Write a page, complete or not at all.

    Raises:
        RunError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}. Free some space or check who may write there."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def render(template: str, view: Mapping[str, Any]) -> str:
    """Fill a template; every value is escaped."""
    environment = Environment(
        loader=PackageLoader("icmoe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FORMATS)
    return environment.get_template(template).render(version=__version__, **view)


def _run_view(run: Run) -> dict[str, Any]:
    shares_round, shares = last_shares(run.training_rounds)
    experts = tuple(dict.fromkeys(name for by_expert in shares.values() for name in by_expert))
    classes = run.config.task.classes
    return {
        "run": run,
        "results": run.results,
        "config": run.config,
        "scores": score_table(run.results),
        "reference_titles": REFERENCE_TITLES,
        "dice_chart": _dice_chart(run),
        "dice_values": _dice_points(run),
        "loss_chart": _loss_chart(run),
        "loss_values": _loss_points(run),
        "participation": participation(run),
        "incidents": incidents(run),
        "traffic": traffic(run),
        "shares_round": shares_round,
        "shares": shares,
        "experts": {name: expert_colour(name) for name in experts},
        "shares_chart": _shares_chart(run, experts),
        "gallery": load_gallery(run.directory / "examples", budget=_picture_budget(run)),
        "class_colours": {name: class_colour(class_id) for class_id, name in enumerate(classes, start=1)},
        "expert_colour": expert_colour,
    }


def _picture_budget(run: Run) -> int:
    """Characters left for pictures by the tables; one million is kept for everything else."""
    tables = CHARACTERS_PER_SITE_AND_ROUND * len(run.sites) * len(run.rounds)
    return max(0, PAGE_LIMIT - 1_000_000 - tables)


def _seeds_view(run: SeedsRun) -> dict[str, Any]:
    references, rows = seeds_table(run.results)
    first = next(iter(run.runs.values()), None)
    if first is None:
        raise RunError(
            f"none of the runs {', '.join(run.results.runs)} is left in {run.directory}; the summary needs one"
        )
    series = [
        Series(name, mean_points(_dice_points(seed_run).values()), LINE_COLOURS[index % 7], LINE_DASHES[index % 7])
        for index, (name, seed_run) in enumerate(run.runs.items())
    ]
    return {
        "run": first,
        "config": first.config,
        "results": run.results,
        "runs": [
            (seed, name, run.runs.get(name)) for seed, name in zip(run.results.seeds, run.results.runs, strict=True)
        ],
        "references": references,
        "reference_titles": REFERENCE_TITLES,
        "rows": rows,
        "dice_chart": line_chart(
            series,
            title="Validation Dice, mean over sites, per seed",
            description="Line chart of the mean validation Dice over rounds, one line for each seed.",
            x_label="aggregate of round",
            y_label="Dice",
        ),
    }


def _points_by_site(run: Run, point: Callable[[Round, str], tuple[int | None, float | None]]) -> dict[str, Points]:
    by_site: dict[str, Points] = {}
    for site in run.sites:
        points = [(float(x), y) for x, y in (point(line, site) for line in run.rounds) if x is not None]
        if any(y is not None for _, y in points):
            by_site[site] = points
    return by_site


def _dice_points(run: Run) -> dict[str, Points]:
    return _points_by_site(run, lambda line, site: (line.scored_round, line.val_dice.get(site)))


def _loss_points(run: Run) -> dict[str, Points]:
    return _points_by_site(
        run, lambda line, site: (None if line.evaluate_only else line.round, line.train_loss.get(site))
    )


def _dice_chart(run: Run) -> LineChart | None:
    best = run.results.best_round
    return line_chart(
        site_series(_dice_points(run)),
        title="Validation Dice",
        description="Line chart of each site's validation Dice over rounds, with the mean over sites. "
        "The values are in the table below.",
        x_label="aggregate of round (0: before training)",
        y_label="Dice",
        marker=(float(best), "chosen") if best is not None else None,
    )


def _loss_chart(run: Run) -> LineChart | None:
    return line_chart(
        site_series(_loss_points(run)),
        title="Training loss",
        description="Line chart of each site's training loss over rounds. The values are in the table below.",
        x_label="round",
        y_label="loss",
    )


def _shares_chart(run: Run, experts: tuple[str, ...]) -> LineChart | None:
    series = [
        Series(expert, _share_points(run, expert), expert_colour(expert), LINE_DASHES[index % 4], 2.4)
        for index, expert in enumerate(experts)
    ]
    return line_chart(
        series,
        title="Share of the votes, mean over sites",
        description="Line chart of each expert's share of the votes over rounds, mean over sites.",
        x_label="round",
        y_label="share",
    )


def _share_points(run: Run, expert: str) -> Points:
    """An expert's share by round, mean over sites."""
    by_site = _points_by_site(run, lambda line, site: (line.round, line.expert_shares.get(site, {}).get(expert)))
    return mean_points(by_site.values())
