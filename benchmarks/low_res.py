"""What a smaller image costs in Dice: pooled IC-MoE on a SAM backbone at its native size and below.

    python benchmarks/low_res.py --checkpoint sam_vit_b_01ec64.pth --data ../shared/data/cardiac_mri

Needs real pretrained weights. The result goes into docs/performance.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from performance.document import DOC, around_section, number, table, write_section
from rich.console import Console

from icmoe.config import RunConfig, load_run_config
from icmoe.errors import ConfigError, IcmoeError
from icmoe.modeling.backbone import REGISTRY, load_backbone
from icmoe.modeling.low_res import PATCH_SIZE, choose_image_size
from icmoe.progress import ConsoleWatcher
from icmoe.references import ReferenceTask, read_reference, train_reference
from icmoe.simulation import SimulationRequest, Watcher, encode_everything, make_sites, num_cpus
from icmoe_server.books import summarise_test

CARDIAC = Path(__file__).parents[1] / "configs" / "run" / "cardiac.yaml"


@dataclass(frozen=True)
class Inputs:
    """What is the same at every size.

    Attributes:
        data: folder with ``manifest.csv``.
        checkpoint: the backbone's published weights; their digest is verified.
        out: folder of the results, a file per size.
    """

    data: Path
    checkpoint: Path | None
    out: Path


def main(
    data: Annotated[Path, typer.Option(help="Folder with manifest.csv.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The backbone's published weights, such as sam_vit_b_01ec64.pth. Needed.")
    ] = None,
    backbone: Annotated[str, typer.Option(help="sam_vit_b, sam_vit_l, sam_vit_h or medsam_vit_b.")] = "sam_vit_b",
    sizes: Annotated[str, typer.Option(help="Image sides in pixels, the native 1024 among them.")] = "1024,512,256",
    config: Annotated[
        Path, typer.Option(help="Run config of the task.", show_default="configs/run/cardiac.yaml")
    ] = CARDIAC,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a config value, may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results, a file per size.")] = Path("runs/low_res"),
    doc: Annotated[
        Path, typer.Option(help="Document whose table is replaced.", show_default="docs/performance.md")
    ] = DOC,
) -> None:
    """Train pooled adapters on cached features at each size, and compare test Dice with the native size.

    At each size: all sites' images in one training, with the config's rounds times local epochs. Encoding is what
    takes long: SAM ViT-B at 1024 px costs a CPU core some 10 s an image, so use a GPU, or an evening. Features stay
    in the cache and finished sizes in --out; start again to go on.

    A config with its own model.logit_stride means that stride in pixels at every size; at 1024 px give a larger one,
    such as --set model.logit_stride=4.

    Example: python benchmarks/low_res.py --checkpoint sam_vit_b_01ec64.pth --data ../shared/data/cardiac_mri
    """
    try:
        runs = plan(config, override or [], backbone=backbone, sizes=_sizes(sizes, backbone))
        around_section(doc, "low_res")
        # Wrong weights have to show before hours of encoding at the largest size.
        load_backbone(backbone, checkpoint=checkpoint, image_size=min(runs))
        with ConsoleWatcher(Console(stderr=True)) as watcher:
            results = {size: train(run, Inputs(data, checkpoint, out), watcher) for size, run in runs.items()}
        text = f"{backbone}, {runs[max(runs)].task.name}, pooled, test split:\n\n{render(results)}"
        typer.echo(text)
        write_section(doc, "low_res", text)
    except IcmoeError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(error.exit_code) from error


def plan(config: Path, overrides: Sequence[str], *, backbone: str, sizes: Sequence[int]) -> dict[int, RunConfig]:
    """The run of each size, largest first.

    Raises:
        ConfigError: if the config or an override is wrong.
    """
    return {
        size: load_run_config(config, [*overrides, f"model.backbone={backbone}", f"model.image_size={size}"])
        for size in sorted(set(sizes), reverse=True)
    }


def train(run: RunConfig, inputs: Inputs, watcher: Watcher) -> dict[str, Any]:
    """Encode, train pooled and test, unless that is done.

    Returns:
        ``mean_dice`` and ``worst_site`` of the test split, as in ``results.json``.
    """
    size = run.model.image_size
    request = SimulationRequest(run=run, data=inputs.data, out=inputs.out / "work", checkpoint=inputs.checkpoint)
    sites = make_sites(request)
    file = inputs.out / f"{run.model.backbone}_{size}_{run.digest()[:12]}.json"
    everything = replace(
        sites[0], name="all", samples=tuple(sample for site in sites for sample in site.samples), num_threads=num_cpus()
    )
    task = ReferenceTask(run, "pooled", everything, sites, file)
    if not file.exists():
        encode_everything(request, sites, watcher)
        watcher.stage(f"Training at {size} px")
        train_reference(task)
    return summarise_test(read_reference(task), list(run.task.classes))


def render(results: Mapping[int, Mapping[str, Any]]) -> str:
    """Dice by size, and how far it is below that of the largest."""
    native = results[max(results)]["mean_dice"]
    rows = [
        [
            f"{size} px",
            f"{size // PATCH_SIZE} x {size // PATCH_SIZE}",
            f"{result['mean_dice']:.4f}",
            f"{result['worst_site']['dice']:.4f}",
            number(native - result["mean_dice"]),
        ]
        for size, result in results.items()
    ]
    return table(["image side", "embedding grid", "mean Dice over sites", "worst site", "drop against native"], rows)


def _sizes(text: str, backbone: str) -> list[int]:
    """Check what was asked for, before anything is loaded."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--sizes takes whole numbers such as 1024,512,256; got {text!r}.") from error
    if backbone not in REGISTRY or not REGISTRY[backbone].resizable:
        able = ", ".join(name for name, spec in REGISTRY.items() if spec.resizable)
        raise ConfigError(f"--backbone {backbone} has no other sizes to compare. Choose from {able}.")
    native = REGISTRY[backbone].native_size
    for size in sizes:
        choose_image_size(size, name=backbone, native_size=native, resizable=True)
    if native not in sizes or len(set(sizes)) < 2:
        raise ConfigError(f"--sizes {text}: give the native size {native}, to compare with, and smaller ones.")
    return sizes


if __name__ == "__main__":
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(main)
    app()
