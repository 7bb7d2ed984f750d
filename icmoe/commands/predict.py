"""``icmoe-fl predict``: which inputs, in which form, what is done already, what failed."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from icmoe.errors import ConfigError, DataError, ManifestError
from icmoe.types import AXES, Axis

if TYPE_CHECKING:
    from icmoe.checkpoint import Checkpoint
    from icmoe.config import RunConfig
    from icmoe.data.inputs import Input
    from icmoe.prediction import Predictor
    from icmoe.prediction_writer import Request, Writer

FORMATS = ("auto", "png", "nifti", "seg")


MAPS = ("probability", "uncertainty", "votes", "overlay")

Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="Of the mask: png (pictures), nifti (volumes), seg (DICOM SEG, for DICOM). auto: png for pictures, "
        "nifti for NIfTI, seg for DICOM series.",
    ),
]
Intensity = Annotated[
    str,
    typer.Option(
        metavar="RULE",
        help="stored, window:LOW:HIGH or percentile:LOW:HIGH. Default: as in training where the run says so, "
        "else by modality.",
    ),
]
Source = Annotated[
    Path,
    typer.Argument(
        metavar="INPUT", help="A picture, a NIfTI volume, the folder of a DICOM series, or a folder with many."
    ),
]
PlaneOfSlices = Annotated[
    str, typer.Option(help="axial, coronal or sagittal: cut volumes across it. Default: plane of acquisition.")
]
Uncertainty = Annotated[
    bool, typer.Option("--uncertainty", help="Also the entropy of the experts' vote per voxel, in nats.")
]
Overlay = Annotated[bool, typer.Option("--overlay", help="Also PNGs with outlines; of a volume, up to 12 slices.")]
PretrainedWeights = Annotated[
    Path | None, typer.Option(help="File with pretrained weights, for sam_vit_* and medsam_vit_b.")
]


def predict(
    run_dir: Annotated[Path, typer.Argument(help="A run directory with config.yaml and checkpoints.")],
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder for the outputs, one folder in it per input.")],
    form: Format = "auto",
    probability: Annotated[bool, typer.Option("--probability", help="Also a probability map per class.")] = False,
    uncertainty: Uncertainty = False,
    votes: Annotated[bool, typer.Option("--votes", help="Also each expert's share of the vote.")] = False,
    overlay: Overlay = False,
    intensity: Intensity = "",
    axis: PlaneOfSlices = "",
    frame: Annotated[str, typer.Option(metavar="N", help="Which volume of 4-D NIfTI files, from 0.")] = "",
    checkpoint: Annotated[str, typer.Option(help="best, final or round_NNN.")] = "best",
    backbone_checkpoint: PretrainedWeights = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Predict again what is in --out already.")] = False,
) -> None:
    """Segment images with a trained model; masks come in the geometry of their images.

    Images are prepared as in training. An input that is in --out already is skipped, so that an interrupted folder goes
    on where it stopped; a bad file is reported at the end and the others go on. Box prompts are left out: training
    has none, so no expert has learned to follow one.

    Example: icmoe-fl predict runs/cardiac patient7.nii.gz --out masks --overlay
    """
    from icmoe.data.inputs import find_inputs
    from icmoe.prediction import load_run, trained_intensity
    from icmoe.prediction_writer import Request, Writer

    wanted = zip(MAPS, (probability, uncertainty, votes, overlay), strict=True)
    maps = tuple(name for name, is_wanted in wanted if is_wanted)
    request = Request(form=form, maps=maps, intensity=intensity, axis=_choose_axis(axis), frame=frame)
    _check_options(request, source, out)
    items = find_inputs(source, out=out, frame=frame)
    for item in items:
        request.mask_form(item)
    run, found = load_run(run_dir, checkpoint)
    request = replace(request, intensity=intensity or trained_intensity(run_dir))
    writer = Writer(out, run, found, request)
    todo = [item for item in items if not writer.is_done(item, overwrite=overwrite)]
    failed = _predict_what_is_left(todo, len(items), writer, (run, found, backbone_checkpoint))
    typer.echo(f"Masks of {len(items) - len(failed)} of {len(items)} inputs: {out}")
    _report_failures(failed, len(items))


def _predict_what_is_left(
    todo: "list[Input]", num_inputs: int, writer: "Writer", model: "tuple[RunConfig, Checkpoint, Path | None]"
) -> dict[str, str]:
    """Reasons of the inputs that failed, by name. Without anything left to do no model is loaded."""
    from icmoe.prediction import Predictor

    console = Console(stderr=True)
    if len(todo) < num_inputs:
        console.print(f"{num_inputs - len(todo)} of {num_inputs} inputs are done already and skipped")
    if not todo:
        return {}
    run, checkpoint, backbone_checkpoint = model
    predictor = Predictor.load(run, checkpoint, backbone_checkpoint=backbone_checkpoint)
    return predict_inputs(todo, writer, predictor, console)


def _report_failures(failed: dict[str, str], num_inputs: int) -> None:
    from icmoe.data.manifest import list_findings

    if failed:
        findings = list_findings([f"{name}: {reason}" for name, reason in failed.items()])
        raise DataError(f"{len(failed)} of {num_inputs} inputs could not be segmented:\n{findings}")


def _check_options(request: "Request", source: Path, out: Path) -> None:
    from icmoe.data.intensity import IntensityRule

    if request.form not in FORMATS:
        raise ConfigError(f"--format takes {', '.join(FORMATS)}; got {request.form!r}.")
    try:
        IntensityRule.parse(request.intensity)
    except ManifestError as error:
        raise ConfigError(f"--intensity: {error}") from error
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --out takes a folder.")
    # What lies in --out counts as output and is never segmented.
    if source.is_dir() and source.resolve().is_relative_to(out.resolve()):
        raise ConfigError(
            f"the input {source} lies in --out {out}, where only outputs are looked for. Choose a folder for --out "
            f"that does not hold the images, such as {source.resolve().with_name(source.resolve().name + '_masks')}."
        )


def _choose_axis(text: str) -> Axis | None:
    chosen = next((axis for axis in AXES if axis == text), None)
    if text and chosen is None:
        raise ConfigError(f"--axis takes {', '.join(AXES)}; got {text!r}.")
    return chosen


def predict_inputs(items: "list[Input]", writer: "Writer", predictor: "Predictor", console: Console) -> dict[str, str]:
    """Segment inputs, pictures several at a time.

    Args:
        items: what to segment.
        writer: takes the results.
        predictor: the model.
        console: shows progress.

    Returns:
        Reasons of those that failed, by name; the others are written.

    Raises:
        RunError: if the disk is full.
    """
    from icmoe.prediction import BATCH_SIZE

    failed: dict[str, str] = {}
    pictures = [item for item in items if not item.is_volume]
    groups = [pictures[first : first + BATCH_SIZE] for first in range(0, len(pictures), BATCH_SIZE)]
    groups += [[item] for item in items if item.is_volume]
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    if pictures:
        console.print(
            f"{len(pictures)} pictures, {_describe_rule(writer.request, 'stored')}", highlight=False, soft_wrap=True
        )
    with bars:
        whole = bars.add_task("inputs", total=len(items))
        for group in groups:
            segment = _predict_volume if group[0].is_volume else _predict_pictures
            failed |= segment(group, writer, predictor, bars)
            bars.advance(whole, len(group))
    return failed


def _predict_volume(group: "list[Input]", writer: "Writer", predictor: "Predictor", bars: Progress) -> dict[str, str]:
    from icmoe.data.inputs import slices_of
    from icmoe.data.sources import load_pixels
    from icmoe.prediction import BATCH_SIZE

    (item,) = group
    bar = bars.add_task(item.name, total=None)
    try:
        samples = slices_of(item, axis=writer.request.axis, intensity=writer.request.intensity)
        rule = _describe_rule(writer.request, samples[0].intensity)
        bars.console.print(
            f"{item.name}: {len(samples)} {samples[0].axis} slices, {rule}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        collected = writer.collect(len(samples), predictor.model.expert_names)
        for first in range(0, len(samples), BATCH_SIZE):
            batch = [load_pixels(sample) for sample in samples[first : first + BATCH_SIZE]]
            for prediction in predictor.predict(batch):
                collected.add(prediction)
            bars.update(bar, completed=collected.filled, total=len(samples))
        writer.write(item, samples, collected)
    except DataError as error:
        return {item.name: str(error)}
    finally:
        bars.remove_task(bar)
    return {}


def _predict_pictures(group: "list[Input]", writer: "Writer", predictor: "Predictor", bars: Progress) -> dict[str, str]:
    from icmoe.data.inputs import slices_of
    from icmoe.data.sources import load_pixels

    failed, ready = {}, []
    for item in group:
        try:
            (sample,) = slices_of(item, axis=None, intensity=writer.request.intensity)
            ready.append((item, sample, load_pixels(sample)))
        except DataError as error:
            failed[item.name] = str(error)
    try:
        predictions = predictor.predict([pixels for _, _, pixels in ready]) if ready else []
    except DataError as error:
        if len(ready) == 1:
            return failed | {ready[0][0].name: str(error)}
        # One of them spoils the batch: find it.
        for item, _, _ in ready:
            failed |= _predict_pictures([item], writer, predictor, bars)
        return failed
    for (item, sample, _), prediction in zip(ready, predictions, strict=True):
        collected = writer.collect(1, predictor.model.expert_names)
        try:
            collected.add(prediction)
            writer.write(item, [sample], collected)
        except DataError as error:
            failed[item.name] = str(error)
    return failed


def _describe_rule(request: "Request", rule: str) -> str:
    return f"intensity {rule}" + (
        "" if request.intensity else " (by modality; the run does not say: change it with --intensity)"
    )
