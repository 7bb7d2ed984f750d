"""The command line of ``benchmarks/bench.py``: measure part by part, write each table as soon as it is there."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from icmoe.checkpoint import write_json
from icmoe.errors import IcmoeError

from . import convolutions, encode, epoch, features, memory, rounds, update
from .document import DOC, around_section, conditions, machine, write_section
from .sites import Setup
from .stopwatch import Figures, in_fresh_process


@dataclass(frozen=True)
class Part:
    """One thing to measure.

    Attributes:
        measure: runs in a process of its own.
        render: figures to Markdown.
    """

    measure: Callable[[Setup], Figures]
    render: Callable[[Figures], str]


PARTS = {
    "update": Part(update.measure, update.render),
    "convolutions": Part(convolutions.measure, convolutions.render),
    "features": Part(features.measure, features.render),
    "encode": Part(encode.measure, encode.render),
    "epoch": Part(epoch.measure, epoch.render),
    "rounds": Part(rounds.measure, rounds.render),
    "memory": Part(memory.measure, memory.render),
}
"""Quick ones first."""


def main(
    only: Annotated[str, typer.Option(help=f"Parts, separated by commas: {', '.join(PARTS)}. Default: all.")] = "",
    data_root: Annotated[
        Path | None,
        typer.Option(
            envvar="ICMOE_TEST_DATA", help="Folder that holds cardiac_mri. Without it: the embedded demo images."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for figures (PART.json) and scratch files.")] = Path("runs/bench"),
    doc: Annotated[
        Path, typer.Option(help="Document whose tables are replaced.", show_default="docs/performance.md")
    ] = DOC,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep parts that --out has figures of; only write their tables again.")
    ] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Fewest repetitions, to see that it runs. Prints tables, writes no document."),
    ] = False,
) -> None:
    """Measure what docs/performance.md reports and write its tables.

    Takes about 15 minutes on 2 cores; let the machine do nothing else meanwhile. Every part runs in a process of its
    own, on the CPU, and its table is in the document as soon as it is measured: stop at any time and go on with
    --resume.

    Example: python benchmarks/bench.py --only encode,epoch --data-root ../shared/data
    """
    chosen = _choose(only)
    try:
        for name in chosen:
            around_section(doc, name)  # a document without the place must fail before the measuring, not after it
        setup = _prepare(data_root, out=out, quick=quick)
        for name in chosen:
            record = _measure(name, setup, out / f"{name}.json", keep=resume)
            text = _describe(name, record)
            typer.echo(f"## {name}\n\n{text}\n")
            if not quick:
                write_section(doc, name, text)
    except IcmoeError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(error.exit_code) from error


def _choose(only: str) -> list[str]:
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is no part; choose from {', '.join(PARTS)}.", param_hint="--only")
    return [name for name in PARTS if not names or name in names]


def _prepare(data_root: Path | None, *, out: Path, quick: bool) -> Setup:
    # For every process from here on: features of our own, and the CPU even where there is a GPU.
    os.environ["ICMOE_CACHE_DIR"] = str((out / "cache").resolve())
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    out.mkdir(parents=True, exist_ok=True)
    return Setup.choose(data_root, work=out.resolve() / "work", quick=quick)


def _measure(name: str, setup: Setup, file: Path, *, keep: bool) -> Figures:
    if keep and file.exists():
        record: Figures = json.loads(file.read_text(encoding="utf-8"))
        return record
    typer.echo(f"measuring: {name}", err=True)
    before, start = machine(), time.perf_counter()
    figures = in_fresh_process(PARTS[name].measure, setup)
    record = {"machine": before, "data": setup.data.name, "took": time.perf_counter() - start, "figures": figures}
    if not setup.quick:
        write_json(file, record)
    return record


def _describe(name: str, record: Figures) -> str:
    line = conditions(record["machine"], data=record["data"], took=record["took"])
    return f"{line}\n\n{PARTS[name].render(record['figures'])}"
