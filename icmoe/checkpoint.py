"""Files of a run directory, each complete or absent. Numpy and safetensors only.

``checkpoints/round_NNN/{adapters.safetensors, manifest.json}`` and ``best/`` hold the global tensors; the manifest
binds them to round, config and backbone.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from icmoe.errors import CheckpointError, RunError
from icmoe.types import Array, Arrays

ADAPTERS, STRATEGY, MANIFEST = "adapters.safetensors", "strategy.safetensors", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """Global state after a round.

    Attributes:
        server_round: 0 is the initial model.
        config_digest: of the run.
        backbone_digest: of the frozen weights the adapters belong to.
        arrays: global tensors.
        strategy_state: moments of an adaptive server optimiser, empty for others.
    """

    server_round: int
    config_digest: str
    backbone_digest: str
    arrays: Arrays
    strategy_state: Arrays


def holds_run(folder: Path) -> bool:
    """Whether a folder is a run directory, or holds one per seed."""
    return any(folder.glob("config.sha256")) or any(folder.glob("seed_*/config.sha256"))


def round_folder(run_dir: Path, server_round: int) -> Path:
    """Where the checkpoint of a round is."""
    return run_dir / "checkpoints" / f"round_{server_round:03d}"


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint under a temporary name and rename it.

    Raises:
        RunError: if the disk is full.
    """
    folder = round_folder(run_dir, checkpoint.server_round)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_arrays(temporary / ADAPTERS, checkpoint.arrays)
        if checkpoint.strategy_state:
            write_arrays(temporary / STRATEGY, checkpoint.strategy_state)
        about = {key: value for key, value in asdict(checkpoint).items() if key not in ("arrays", "strategy_state")}
        write_json(temporary / MANIFEST, about)
        _replace_folder(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"cannot write the checkpoint {folder}: {error.strerror}. Free some space and use --resume."
        ) from error
    return folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        strategy = folder / STRATEGY
        return Checkpoint(
            **about,
            arrays=load_file(folder / ADAPTERS),
            strategy_state=load_file(strategy) if strategy.exists() else {},
        )
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} cannot be read ({error}). Resume from an earlier round or start anew."
        ) from error


def latest_checkpoint(run_dir: Path) -> Checkpoint:
    """Read the checkpoint of the last finished round.

    Raises:
        CheckpointError: if there is none.
    """
    folders = sorted((run_dir / "checkpoints").glob("round_*"), key=lambda folder: int(folder.name.split("_")[1]))
    if not folders:
        raise CheckpointError(f"{run_dir} holds no checkpoint; start the run without --resume.")
    return load_checkpoint(folders[-1])


def mark_best(run_dir: Path, server_round: int) -> None:
    """Make ``best/`` the checkpoint of a round: a link, because only a link can be replaced in one step.

    Raises:
        RunError: if it cannot be written.
    """
    best, temporary = run_dir / "best", run_dir / ".best.tmp"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(round_folder(run_dir, server_round).relative_to(run_dir))
        temporary.replace(best)
    except OSError as error:
        raise RunError(
            f"cannot mark the best checkpoint {best}: {error.strerror}. Free some space and use --resume."
        ) from error


def _replace_folder(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``.

    A folder cannot be replaced in one step: the old one is moved aside first, so that a kill leaves the old, none, or
    the new one, but never a part.
    """
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    new.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write tensors as safetensors, complete or not at all."""
    _write_atomically(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, complete or not at all. NaN is refused: readers other than Python's cannot take it."""
    _write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one JSON record a line, complete or not at all."""
    _write_atomically(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode())


def write_text(path: Path, text: str) -> None:
    """Write text, complete or not at all."""
    _write_atomically(path, text.encode())


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
