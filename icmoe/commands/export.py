"""``icmoe-fl export``: a model that others can run."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from icmoe.errors import ConfigError

if TYPE_CHECKING:
    from icmoe.prediction import Predictor

FORMATS = ("adapters", "onnx", "monai")


def export(
    run_dir: Annotated[Path, typer.Argument(help="Run directory of the model.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    form: Annotated[
        str, typer.Option("--format", help="Any of adapters, onnx, monai, separated by commas.")
    ] = "adapters",
    checkpoint: Annotated[str, typer.Option(help="best, final, or a round such as round_003.")] = "best",
    backbone_checkpoint: Annotated[
        Path | None, typer.Option(help="File with pretrained weights, for sam_vit_* and medsam_vit_b.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Export a checkpoint: adapters with a model card, ONNX, or a MONAI bundle.

    adapters: adapters.safetensors, config.yaml, README.md (the card) and model_card.json. onnx: model.onnx, from the
    normalised (1, 3, S, S) image to probabilities, compared with torch before it counts. monai: a bundle that
    'python -m monai.bundle run --config_file configs/inference.json' runs, from input/*.png to output/. ONNX and the
    bundle hold the backbone too: mind its licence.

    Example: icmoe-fl export runs/cardiac --out cardiac_model --format adapters,onnx
    """
    wanted = tuple(dict.fromkeys(part.strip() for part in form.split(",") if part.strip()))
    unknown = [part for part in wanted if part not in FORMATS]
    if unknown or not wanted:
        raise ConfigError(f"--format takes {', '.join(FORMATS)}, separated by commas; got {form!r}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ConfigError(f"{out} is not empty. Choose another --out, or give --overwrite.")

    from icmoe.export.card import CARD, write_adapters
    from icmoe.export.onnx_file import onnx_files
    from icmoe.prediction import Predictor, load_run

    console = Console(stderr=True)
    # Of another export: what stands beside a new model card has to be of the same checkpoint.
    for old in onnx_files(out):
        old.unlink()
    shutil.rmtree(out / "monai_bundle", ignore_errors=True)
    run, weights = load_run(run_dir, checkpoint)
    write_adapters(out, run_dir, run, weights)
    console.print(f"Adapters and model card: {out}", soft_wrap=True)
    if wanted == ("adapters",):
        return

    predictor = Predictor.load(run, weights, backbone_checkpoint=backbone_checkpoint)
    if "onnx" in wanted:
        _write_onnx(out, run_dir, predictor, console)
    if "monai" in wanted:
        from icmoe.export.monai_bundle import write_bundle
        from icmoe.export.network import DeployedNetwork

        network = DeployedNetwork.of(predictor)
        write_bundle(out / "monai_bundle", network, run, (out / CARD).read_text(encoding="utf-8"))
        console.print(f"MONAI bundle: {out / 'monai_bundle'}", soft_wrap=True)


def _write_onnx(out: Path, run_dir: Path, predictor: "Predictor", console: Console) -> None:
    from icmoe.export.check_images import check_images
    from icmoe.export.network import DeployedNetwork
    from icmoe.export.onnx_file import write_onnx

    network = DeployedNetwork.of(predictor)
    images = check_images(network, predictor.spec, run_dir)
    with console.status("Writing ONNX and comparing it with torch"):
        check = write_onnx(network, out / "model.onnx", images)
    console.print(
        f"ONNX: {out / 'model.onnx'}; differs from torch by at most {check.max_difference:.1e}, same class on at least "
        f"{check.agreement:.2%} of pixels of each of {len(check.images)} images: {', '.join(check.images)}",
        soft_wrap=True,
        highlight=False,
    )
    if len(check.files) > 1:
        console.print(f"Its weights are too large for one file: keep {' and '.join(check.files)} together.")
