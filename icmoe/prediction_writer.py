"""Outputs of one input: collected slice by slice, written into a folder that appears only when it is complete.

Letters: N slices, H x W pixels of one, K classes, E experts.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import psutil

from icmoe import __version__
from icmoe.checkpoint import Checkpoint, write_json
from icmoe.config import RunConfig
from icmoe.data import outputs
from icmoe.data.dicom_seg import read_sources, write_segmentation
from icmoe.data.inputs import Input, Kind
from icmoe.data.manifest import Sample
from icmoe.data.sources import load_pixels
from icmoe.data.volumes import turn
from icmoe.errors import ConfigError, DataError, RunError
from icmoe.report.pictures import class_colour
from icmoe.types import Axis

if TYPE_CHECKING:
    from icmoe.prediction import Prediction

ABOUT = "prediction.json"
MASK_FILES = {"png": "mask.png", "nifti": "mask.nii.gz", "seg": "mask.dcm"}
FORMS: dict[Kind, tuple[str, ...]] = {
    "picture": ("png",),
    "dicom_picture": ("png", "seg"),
    "nifti": ("nifti",),
    "series": ("seg", "nifti"),
}
"""Forms of the mask by kind of input, the default first."""


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line.

    Attributes:
        form: auto, png, nifti or seg.
        maps: of probability, uncertainty, votes and overlay those wanted.
        intensity: rule; empty is the default of each input.
        axis: of volumes; None is the plane of acquisition.
        frame: index of the volume in 4-D NIfTI files.
    """

    form: str = "auto"
    maps: tuple[str, ...] = ()
    intensity: str = ""
    axis: Axis | None = None
    frame: str = ""

    def mask_form(self, item: Input) -> str:
        """Form of an input's mask.

        Raises:
            ConfigError: if the input cannot have the form asked for.
        """
        allowed = FORMS[item.kind]
        if self.form not in ("auto", *allowed):
            raise ConfigError(
                f"--format {self.form} does not fit {item.path}, which is a {item.kind.replace('_', ' ')}: allowed "
                f"{'is' if len(allowed) == 1 else 'are'} {' and '.join(allowed)}. Use --format auto for a mixed folder."
            )
        return allowed[0] if self.form == "auto" else self.form


@dataclass
class Collected:
    """Labels (N, H, W) and maps (N, H, W) by name, filled slice by slice."""

    num_slices: int
    request: Request
    class_names: Sequence[str]
    expert_names: Sequence[str]
    labels: npt.NDArray[np.uint8] = field(init=False)
    maps: dict[str, npt.NDArray[np.float32]] = field(init=False, default_factory=dict)
    filled: int = field(init=False, default=0)

    def add(self, prediction: "Prediction") -> None:
        """Take the next slice.

        Raises:
            DataError: if there is no memory for all slices.
        """
        maps = self._maps_of(prediction)
        if not self.filled:
            shape = (self.num_slices, *prediction.labels.shape)
            _require_memory(int(np.prod(shape)) * (1 + 4 * len(maps)))
            self.labels = np.zeros(shape, np.uint8)
            self.maps = {name: np.zeros(shape, np.float32) for name in maps}
        self.labels[self.filled] = prediction.labels
        for name, values in maps.items():
            self.maps[name][self.filled] = values
        self.filled += 1

    def _maps_of(self, prediction: "Prediction") -> dict[str, npt.NDArray[np.float32]]:
        maps: dict[str, npt.NDArray[np.float32]] = {}
        if "probability" in self.request.maps:
            names = ("background", *self.class_names)
            maps |= {f"probability_{n}": p for n, p in zip(names, prediction.probabilities, strict=True)}
        if "uncertainty" in self.request.maps:
            maps["vote_entropy"] = prediction.vote_entropy()
        if "votes" in self.request.maps:
            maps |= {f"vote_{n}": v for n, v in zip(self.expert_names, prediction.votes, strict=True)}
        return maps


class Writer:
    """Writes the outputs of inputs below one folder.

    Args:
        out: the folder; made when missing.
        run: config of the run.
        checkpoint: that predicts.
        request: what was asked for.
    """

    def __init__(self, out: Path, run: RunConfig, checkpoint: Checkpoint, request: Request) -> None:
        self.out = out
        self.run = run
        self.request = request
        self._made_by = {
            "icmoe_fl": __version__,
            "task": run.task.name,
            "config_digest": checkpoint.config_digest,
            "server_round": checkpoint.server_round,
            "backbone": run.model.backbone,
            "backbone_digest": checkpoint.backbone_digest,
            "request": json.loads(json.dumps(asdict(request))),
        }

    def is_done(self, item: Input, *, overwrite: bool) -> bool:
        """Whether an input's outputs are there, complete and made as asked.

        Raises:
            ConfigError: if its folder holds something else.
        """
        folder = self.out / item.name
        if not folder.exists():
            return False
        about = _read_about(folder)
        if about is None:
            if folder.is_dir() and not any(folder.iterdir()):
                return False
            raise ConfigError(
                f"{folder} has the name that the outputs of {item.path} get, but holds no prediction of ours, so it is "
                "left alone. Choose another --out, or move or rename what is there."
            )
        if overwrite:
            return False
        if about.get("input") != str(item.path.resolve()) or about.get("input_state") != _state(item.path):
            raise ConfigError(
                f"{folder} holds the prediction of another input, or of {item.path} before it changed. Give "
                "--overwrite to replace it, or another --out."
            )
        if any(about.get(key) != value for key, value in self._made_by.items()):
            raise ConfigError(
                f"{folder} holds a prediction made otherwise (round {about.get('server_round')} of another run, or "
                "other options). Give --overwrite to replace it, or another --out."
            )
        return all((folder / name).is_file() for name in about["outputs"])

    def collect(self, num_slices: int, expert_names: Sequence[str]) -> Collected:
        """Begin to collect the slices of an input."""
        return Collected(num_slices, self.request, tuple(self.run.task.classes), expert_names)

    def write(self, item: Input, samples: Sequence[Sample], collected: Collected) -> None:
        """Write all outputs of an input.

        Args:
            item: the input.
            samples: its slices in order, or its one picture.
            collected: what was predicted for them.

        Raises:
            DataError: if the form does not suit this input.
            RunError: if the disk is full.
        """
        with self._complete_folder(item) as folder:
            if item.is_volume:
                volume_mm3 = self._write_volume(folder, item, cast(Axis, samples[0].axis), collected)
            else:
                volume_mm3 = None
                self._write_picture(folder, item, collected)
            if "overlay" in self.request.maps:
                self._write_overlays(folder, samples, collected.labels)
            write_json(folder / ABOUT, self._describe(folder, item, samples[0], collected.labels, volume_mm3))

    def _write_volume(self, folder: Path, item: Input, axis: Axis, collected: Collected) -> float:
        stored = item.read()
        turned, grid = turn(stored.grid, axis), stored.grid.get_geometry()
        like = item.path if item.kind == "nifti" else None
        form = self.request.mask_form(item)
        if form == "seg":
            labels = outputs.place(turned, collected.labels, grid)
            sources = read_sources(item, stored.instances)
            # Slices of single images keep their order, so that none depends on rounded coordinates.
            pixels = labels.array if len(sources) > 1 else labels
            self._write_segmentation(folder, pixels, sources)
        else:
            raw = outputs.to_raw_values(collected.labels, tuple(self.run.task.classes.values()))
            outputs.write_volume(folder / MASK_FILES[form], outputs.place(turned, raw, grid), like=like)
        for name, values in collected.maps.items():
            path = folder / f"{outputs.file_name(name)}.nii.gz"
            outputs.write_volume(path, outputs.place(turned, values, grid), like=like)
        return float(np.prod(stored.grid.spacing))

    def _write_picture(self, folder: Path, item: Input, collected: Collected) -> None:
        form = self.request.mask_form(item)
        if form == "seg":
            self._write_segmentation(folder, collected.labels, read_sources(item, ()))
        else:
            raw = outputs.to_raw_values(collected.labels[0], tuple(self.run.task.classes.values()))
            outputs.write_mask_png(folder / MASK_FILES[form], raw)
        if collected.maps:
            outputs.write_arrays(folder / "maps.npz", {name: values[0] for name, values in collected.maps.items()})

    def _write_segmentation(self, folder: Path, labels: Any, sources: Sequence[Any]) -> None:
        write_segmentation(
            folder / MASK_FILES["seg"], labels, sources, class_names=tuple(self.run.task.classes),
            model=self._made_by["config_digest"],
        )  # fmt: skip

    def _write_overlays(self, folder: Path, samples: Sequence[Sample], labels: npt.NDArray[np.uint8]) -> None:
        colours = [class_colour(class_id) for class_id in range(1, self.run.task.num_classes)]
        for index in outputs.choose_slices(labels):
            name = f"overlay_{index:04d}.png" if len(labels) > 1 else "overlay.png"
            outputs.write_overlay(folder / name, load_pixels(samples[index]), labels[index], colours=colours)

    def _describe(
        self, folder: Path, item: Input, sample: Sample, labels: npt.NDArray[np.uint8], voxel_mm3: float | None
    ) -> dict[str, Any]:
        counts = np.bincount(labels.ravel(), minlength=self.run.task.num_classes)
        return {
            **self._made_by,
            "input": str(item.path.resolve()),
            "input_state": _state(item.path),
            "kind": item.kind,
            "intensity": sample.intensity,
            "axis": sample.axis or None,
            "slices": len(labels),
            "entropy_unit": "nat",
            "classes": {
                name: {
                    "id": class_id,
                    "value": class_id if self.request.mask_form(item) == "seg" else value,
                    "voxels": int(counts[class_id]),
                    "ml": None if voxel_mm3 is None else round(float(counts[class_id]) * voxel_mm3 / 1000, 6),
                }
                for class_id, (name, value) in enumerate(self.run.task.classes.items(), start=1)
            },
            "outputs": sorted(path.name for path in folder.iterdir()),
        }

    @contextmanager
    def _complete_folder(self, item: Input) -> Iterator[Path]:
        """Give a temporary folder that takes the input's name in the end; nothing is left of a failure."""
        folder, temporary = self.out / item.name, self.out / f".{item.name}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
            temporary.mkdir(parents=True)
            yield temporary
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
        except OSError as error:
            raise RunError(
                f"cannot write {folder}: {error.strerror or error}. Free some space or choose another --out, then give "
                "the same command again: what is done already is skipped."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _state(path: Path) -> list[int]:
    """Number of files, bytes and latest change in nanoseconds: enough to notice that an input was replaced."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    states = [file.stat() for file in files]
    return [len(states), sum(one.st_size for one in states), max((one.st_mtime_ns for one in states), default=0)]


def _read_about(folder: Path) -> dict[str, Any] | None:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) and isinstance(about.get("outputs"), list) else None


def _require_memory(num_bytes: int) -> None:
    available = psutil.virtual_memory().available
    if num_bytes > available:
        raise DataError(
            f"its outputs need {num_bytes / 1e9:.3g} GB of memory, {available / 1e9:.3g} GB are free. Ask for fewer "
            "maps: leave out --probability, --votes or --uncertainty."
        )
