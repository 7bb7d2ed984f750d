"""``icmoe-fl data check``: run the pre-flight check and say what to do next."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import psutil
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from icmoe.config import RunConfig
    from icmoe.data.check_report import CheckReport

PAGE = "check.html"
MAX_LINES_PER_KIND = 5
CACHE_VARIABLE = "ICMOE_CACHE_DIR"


def check(
    folder: Annotated[Path, typer.Argument(help="Folder with manifest.csv.")],
    config: Annotated[
        Path | None, typer.Option(help="Run config: compares mask values with its classes and tries a training step.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a config value, may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report for scripts.")] = False,
    accept: Annotated[bool, typer.Option("--accept", help="Accept the warnings.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The page; check.json goes beside it. Default: check.html in FOLDER.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one per processor core.")] = None,
    max_bad_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of damaged images that training may leave out.")
    ] = 0.02,
    step: Annotated[bool, typer.Option("--step/--no-step", help="With --config, try a training step.")] = True,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File with pretrained weights, for the training step of sam_vit_* backbones.")
    ] = None,
) -> None:
    """Open every image and mask of a folder before anything is trained on them.

    Errors stop. Warnings have to be looked at in check.html and accepted. What passed is recorded in check.json, which
    training at a site asks for.

    Example: icmoe-fl data check /data/hospital --config configs/run/cardiac.yaml
    """
    from icmoe.config import load_run_config
    from icmoe.data.checked import withdraw_checked, write_checked

    if override and config is None:
        raise ConfigError("--set changes values of a run config; give one with --config.")
    run = load_run_config(config, override or []) if config is not None else None
    page = out or (folder.parent if folder.suffix.lower() == ".csv" else folder) / PAGE
    report = examine(
        folder, run, page=page, num_workers=workers, max_bad_share=max_bad_share, step=step, checkpoint=checkpoint
    )
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        print_report(Console(), report)
    if report.stopping or (report.warnings and not accept):
        withdraw_checked(page.parent)
        raise DataError(_what_stops(report, page))
    record = write_checked(report, page.parent)
    passed = f"Passed: used {report.usable} of {report.found}. Page: {page}. Record: {record}"
    Console(stderr=True).print(passed, markup=False, soft_wrap=True)


def examine(
    folder: Path,
    run: "RunConfig | None",
    *,
    page: Path,
    num_workers: int | None,
    max_bad_share: float,
    step: bool,
    checkpoint: Path | None,
) -> "CheckReport":
    """Check the data, estimate the cache, try a step, and write the page.

    Raises:
        IcmoeError: if a part of it cannot be done.
    """
    from icmoe.data.checking import check_data, num_processes
    from icmoe.progress import ConsoleWatcher
    from icmoe.report.check_page import write_check_page

    with ConsoleWatcher(Console(stderr=True)) as watcher:
        watcher.stage("opening images and masks")
        report = check_data(
            folder,
            classes=run.task.classes if run is not None else None,
            ignore=run.task.ignore if run is not None else (),
            max_bad_share=max_bad_share,
            num_workers=num_workers or num_processes(),
            progress=watcher.advance,
        )
        report = replace(report, cache_bytes=cache_bytes(report, run))
        # A step that takes more memory than there is ends this process: what was found must be on disk by then.
        write_check_page(report, page)
        if run is not None and step and not report.stopping:
            watcher.stage("trying a training step")
            report = replace(report, step_bytes=step_bytes(folder, report, run, checkpoint=checkpoint))
            write_check_page(report, page)
    return report


def cache_bytes(report: "CheckReport", run: "RunConfig | None") -> int:
    """Size of the feature cache that the usable images will need, at the config's or the default backbone."""
    from icmoe.config import ModelConfig
    from icmoe.data.features import FeatureSpec

    model = run.model if run is not None else ModelConfig()
    light = model.backbone == "lite_medsam"
    side = model.image_size or (256 if light else 1024)
    spec = FeatureSpec(
        backbone_digest="",
        image_size=side,
        # LiteMedSAM has a grid of 64 x 64 for 256 pixels, SAM's ViT a cell per 16 pixels.
        embedding_size=side // (4 if light else 16),
        pixel_norm="minmax",
        detail_size=model.detail_size or side,
        precision="bf16",
    )
    views = len({"identity", *(run.train.views if run is not None else ())})
    training = sum(site.images["train"] for site in report.sites)
    return (report.usable + training * (views - 1)) * spec.entry_bytes


def step_bytes(folder: Path, report: "CheckReport", run: "RunConfig", *, checkpoint: Path | None) -> int:
    """Make one training step on the first usable images of a site and measure what it takes at its peak.

    Encoding these images counts, and so do backbone and model: it is what a training process needs beyond its code.

    Raises:
        BackboneError: if the pretrained weights are missing or wrong.
        DataError: if the features do not fit the cache.
    """
    from icmoe.data.check_opening import sample_name
    from icmoe.data.manifest import load_manifest
    from icmoe.training import train_local
    from icmoe_client.site import Site
    from icmoe_client.workbench import Workbench

    manifest = load_manifest(folder)
    skipped = {one.name for one in report.skipped}
    usable = [sample for sample in manifest.samples if sample_name(sample, manifest.root) not in skipped]
    batch = tuple(sample for sample in usable if sample.split == "train")[: run.train.batch_size]
    once = run.train.model_copy(update={"local_epochs": 1, "views": ("identity",)})
    with TemporaryDirectory() as state, _own_cache(Path(state)), _watching_memory() as taken:
        site = Site(name=batch[0].site, samples=batch, state_dir=Path(state), checkpoint=checkpoint)
        bench = Workbench.prepare(site, run.model_copy(update={"train": once}))
        bench.encode("train")
        data = bench.dataset("train")
        train_local(
            bench.model, bench.backbone.decoder, data, config=once, views=once.views,
            learning_rate=once.learning_rate, seed=(0,),
        )  # fmt: skip
    return taken()


@contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Encode into a cache that goes away: the figure must not depend on what is in the site's, nor fill it."""
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(folder / "features")
    try:
        yield
    finally:
        if before is None:
            del os.environ[CACHE_VARIABLE]
        else:
            os.environ[CACHE_VARIABLE] = before


@contextmanager
def _watching_memory() -> "Iterator[_Taken]":
    process = psutil.Process()
    taken = _Taken(process.memory_info().rss)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            taken.peak = max(taken.peak, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        done.set()
        thread.join()


class _Taken:
    """Resident memory in bytes beyond that at the start, at its peak."""

    def __init__(self, start: int) -> None:
        self.start = self.peak = start

    def __call__(self) -> int:
        return self.peak - self.start


def print_report(console: Console, report: "CheckReport") -> None:
    """Counts, tables and findings, errors last so that they stand at the end of the screen."""
    from icmoe.report.check_page import describe_spread, group_findings, list_files

    sites = Table(title=f"used {report.usable} of {report.found} images")
    for column in ("site", "train", "val", "test", "height", "width", "row spacing (mm)", "mean grey"):
        sites.add_column(column, justify="left" if column == "site" else "right")
    for site in report.sites:
        counts = [str(site.images[split]) for split in ("train", "val", "test")]
        spreads = (site.height, site.width, site.row_spacing, site.brightness)
        sites.add_row(escape(site.site), *counts, *(describe_spread(spread) for spread in spreads))
    console.print(sites)
    labels = Table(title="classes" if report.classes is not None else "mask values (give --config to judge them)")
    for column in ("class", "value", "pixels", "images"):
        labels.add_column(column, justify="left" if column == "class" else "right")
    for label in report.labels:
        labels.add_row(escape(label.name), str(label.value), f"{label.pixels:,}", f"{label.images:,}")
    console.print(labels)
    if report.cache_bytes is not None:
        console.print(f"feature cache to come: {report.cache_bytes / 1e6:,.0f} MB")
    if report.step_bytes is not None:
        console.print(f"memory of one training step: {report.step_bytes / 1e6:,.0f} MB (measured)")
    for reason, count in report.skipped_by_reason.items():
        console.print(f"left out: {count} ({reason})", markup=False)
    for group in reversed(group_findings(report.findings)):
        colour = "red" if group.kind.severity == "error" else "yellow"
        console.print(f"[bold {colour}]{group.kind.severity}[/]: {group.kind.title}")
        for finding in group.lines[:MAX_LINES_PER_KIND]:
            line = f"  {finding.message} {list_files(finding.files, 3)}"
            if len(finding.files) == 1:
                line = f"  {finding.files[0]}: {finding.message}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        more = len(group.lines) + group.left_out - MAX_LINES_PER_KIND
        if more > 0:
            console.print(f"  ... and {more} more")
        console.print(f"  Remedy: {group.kind.remedy}", markup=False, highlight=False)


def _what_stops(report: "CheckReport", page: Path) -> str:
    if not report.stopping:
        return f"{len(report.warnings)} warnings. Look at {page}, then run again with --accept."
    if report.bad_share > report.max_bad_share:
        limit = f" {report.bad_share:.1%} of the images cannot be used, above --max-bad-share {report.max_bad_share:g}."
    else:
        limit = ""
    titles = ", ".join(dict.fromkeys(finding.kind.title.lower() for finding in report.stopping))
    return f"{len(report.stopping)} errors stop the training: {titles}.{limit} Look at {page} and repair them."
