"""The run directory before round 1: config, its digest and the weights everybody starts from.

A centre runs this as a process of its own (``python -m icmoe.first_checkpoint``), because building the model needs
torch and no process of a running centre does.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from icmoe.checkpoint import Checkpoint, save_checkpoint, write_text
from icmoe.config import RunConfig, load_run_config
from icmoe.errors import IcmoeError, RunError
from icmoe.exchange import shared_names

if TYPE_CHECKING:
    from icmoe.modeling.backbone import Backbone
    from icmoe.modeling.icmoe import IcMoe


def open_run_directory(out: Path, run: RunConfig, backbone: "Backbone", model: "IcMoe") -> None:
    """Write config and first checkpoint where a resumed run has not done so already.

    The digest comes first: it makes the folder a run that --resume and --overwrite accept, whatever is killed after it.

    Raises:
        RunError: if the folder cannot be written.
    """
    from icmoe.modeling.build import normalisation_params
    from icmoe.training import dump_arrays

    digest = run.digest()
    try:
        write_text(out / "config.sha256", digest + "\n")
        write_text(out / "config.yaml", yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))
        if any((out / "checkpoints").glob("round_*")):
            return
        shared = set(shared_names(model.adapter_params(), run.federation.scope, normalisation_params(model)))
        initial = {name: array for name, array in dump_arrays(model).items() if name in shared}
        save_checkpoint(out, Checkpoint(0, digest, backbone.digest(), initial, {}))
    except OSError as error:
        raise RunError(f"cannot write the run directory {out}: {error.strerror}. Choose another --out.") from error


def main(
    config: Annotated[Path, typer.Argument(help="Run config.")],
    out: Annotated[Path, typer.Argument(help="Run directory.")],
    override: Annotated[list[str] | None, typer.Option("--set")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="File with the backbone's pretrained weights.")] = None,
    trust_checkpoint: Annotated[bool, typer.Option("--trust-checkpoint")] = False,
) -> None:
    """Build the model once and write the run directory."""
    try:
        run = load_run_config(config, override or [])
        # Costs seconds, which a wrong config need not wait for.
        from icmoe.modeling.backbone import load_backbone
        from icmoe.modeling.build import build_icmoe

        backbone = load_backbone(
            run.model.backbone,
            checkpoint=checkpoint,
            image_size=run.model.image_size,
            verify_checkpoint=not trust_checkpoint,
        )
        model = build_icmoe(run.model, num_classes=run.task.num_classes, backbone=backbone, seed=run.train.seed)
        open_run_directory(out, run, backbone, model)
    except IcmoeError as error:
        # The process that started this one shows the text as its own.
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    typer.run(main)
