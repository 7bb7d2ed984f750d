"""The page of ``icmoe-fl evaluate``: tables with intervals, and the worst images first."""

from pathlib import Path
from typing import Any

from icmoe.config import load_run_config
from icmoe.report.pages import PAGE_LIMIT, render, replace_text
from icmoe.report.pictures import class_colour, read_example


def write_evaluation_page(folder: Path, run_dir: Path, result: dict[str, Any]) -> Path:
    """Write ``evaluation.html`` beside ``evaluation.json`` and ``worst/``.

    Args:
        folder: of the evaluation.
        run_dir: of the model.
        result: what ``icmoe.evaluation.evaluate_run`` returned.

    Returns:
        Path of the page.

    Raises:
        RunError: if a picture cannot be read or the page cannot be written.
    """
    config = load_run_config(run_dir / "config.yaml")
    worst, size = [], 0
    for path in sorted((folder / "worst").glob("*.npz")):
        example = read_example(path)
        size += example.characters
        if size > PAGE_LIMIT - 1_000_000:
            break
        worst.append(example)
    view = {
        "config": config,
        "result": result,
        "worst": worst,
        "class_colours": {name: class_colour(index) for index, name in enumerate(config.task.classes, start=1)},
    }
    return replace_text(folder / "evaluation.html", render("evaluation.html.j2", view))
