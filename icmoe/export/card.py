"""The model card: what the model was trained on, how good it was, and what it is not for."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from icmoe import __version__
from icmoe.checkpoint import ADAPTERS, Checkpoint, write_arrays, write_json, write_text
from icmoe.config import RunConfig
from icmoe.errors import RunError

logger = logging.getLogger(__name__)

CARD, FACTS = "README.md", "model_card.json"


def write_adapters(out: Path, run_dir: Path, run: RunConfig, checkpoint: Checkpoint) -> None:
    """Write ``adapters.safetensors``, ``config.yaml``, the card and its facts as JSON.

    Args:
        out: folder.
        run_dir: of the run.
        run: its config.
        checkpoint: whose tensors are exported.

    Raises:
        RunError: if the run is not finished, or the folder cannot be written.
    """
    facts = collect_facts(run_dir, run, checkpoint)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_arrays(out / ADAPTERS, checkpoint.arrays)
        write_text(out / "config.yaml", (run_dir / "config.yaml").read_text(encoding="utf-8"))
        write_json(out / FACTS, facts)
        write_text(out / CARD, _render(facts))
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}. Free some space or choose another --out.") from error


def collect_facts(run_dir: Path, run: RunConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything the card says, from the run directory.

    Raises:
        RunError: if the run is not finished.
    """
    try:
        results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
        rounds = _read_rounds(run_dir / "rounds.jsonl")
    except (OSError, ValueError) as error:
        raise RunError(
            f"{run_dir} has no readable results.json and rounds.jsonl: {error}. Finish the run first (--resume)."
        ) from error
    trained = [record for record in rounds if record.get("num_examples")]
    return {
        "task": run.task.name,
        "note": run.task.note,
        "classes": dict(run.task.classes),
        "version": __version__,
        "backbone": run.model.backbone,
        "backbone_sha256": checkpoint.backbone_digest,
        "config_sha256": checkpoint.config_digest,
        "round": checkpoint.server_round,
        "num_rounds": run.federation.num_rounds,
        "is_best": checkpoint.server_round == results["best_round"],
        "strategy": run.federation.strategy,
        "trainable_params": results["trainable_params"],
        "sites": {name: _site_facts(name, entry, trained) for name, entry in results["sites"].items()},
        "mean_dice": results["mean_dice"],
        "worst_site": results["worst_site"],
        "epsilon": results["epsilon"] if results.get("epsilon_valid", True) else {},
    }


def _read_rounds(path: Path) -> list[dict[str, Any]]:
    """Records of the rounds, but for a last line that was cut off: a crash or an unfinished copy.

    Raises:
        ValueError: if another line is damaged.
        OSError: if the file cannot be read.
    """
    lines = path.read_bytes().splitlines()
    rounds = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                logger.warning("the last line of %s is cut off: the model card does without that round", path)
                break
            raise ValueError(f"line {number} of {path.name} is damaged ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number} of {path.name} is no record of a round")
        rounds.append(record)
    return rounds


def _site_facts(name: str, entry: Mapping[str, Any], trained: list[dict[str, Any]]) -> dict[str, Any]:
    own = [record for record in trained if name in record["num_examples"]]
    return {
        "training_images": own[-1]["num_examples"][name] if own else None,
        "rounds_answered": len(own),
        "test_images": entry["num_test"],
        "dice": entry["dice"],
        "dice_per_class": entry["dice_per_class"],
        "hd95": entry["hd95"],
        "hd95_unit": entry["hd95_unit"],
    }


def _render(facts: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("icmoe.export"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["score"] = lambda value: "-" if value is None else f"{value:.3f}"
    return environment.get_template("model_card.md.j2").render(**facts)
