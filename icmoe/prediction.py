"""A run's checkpoint, ready to segment images that are in no data set.

An image takes the way it takes in training: ``sources.load_pixels``, ``features.draw_squares`` and ``features.embed``
with their rounding, ``training.predict``, ``transforms.restore``. Nothing is written to the feature cache.

Letters: K classes, E experts, H x W the image's own size.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from icmoe.allocator import keep_memory
from icmoe.checkpoint import Checkpoint, load_checkpoint
from icmoe.config import RunConfig, load_run_config
from icmoe.data.dataset import Item
from icmoe.data.features import FeatureSpec, draw_squares, embed
from icmoe.data.transforms import restore
from icmoe.errors import BackboneError, CheckpointError, ConfigError, DataError
from icmoe.modeling.backbone import Backbone, load_backbone
from icmoe.modeling.build import build_icmoe, detail_size
from icmoe.modeling.icmoe import IcMoe
from icmoe.training import load_arrays, predict

BATCH_SIZE = 4
"""Images in a pass, the number that ``icmoe_client.workbench`` encodes with: the same bits on every device."""

Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image, at the image's own size.

    Attributes:
        labels: (H, W) class ids.
        probabilities: (K, H, W), summing to 1 over the classes.
        votes: (E, H, W), the experts' shares of the vote, summing to 1.
    """

    labels: npt.NDArray[np.uint8]
    probabilities: npt.NDArray[np.float32]
    votes: npt.NDArray[np.float32]

    def vote_entropy(self) -> npt.NDArray[np.float32]:
        """Entropy of the vote per pixel in nats, (H, W): 0 where one expert decides, ln E where all have equal say."""
        shares = np.maximum(self.votes, 0)
        logarithms = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        entropy: npt.NDArray[np.float32] = np.maximum(-(shares * logarithms).sum(axis=0), 0)
        return entropy


def load_run(run_dir: Path, checkpoint: str) -> tuple[RunConfig, Checkpoint]:
    """Read config and checkpoint of a run directory.

    Args:
        run_dir: as ``simulate`` or a server wrote it.
        checkpoint: ``best``, ``final`` (of the last finished round) or ``round_NNN``.

    Raises:
        ConfigError: if the folder is no run directory, or its config is damaged.
        CheckpointError: if it has no such checkpoint, or one of another run.
    """
    if not (run_dir / "config.yaml").is_file():
        seeds = sorted(folder.name for folder in run_dir.glob("seed_*") if (folder / "config.yaml").is_file())
        hint = f"It holds a run per seed: give one, such as {run_dir / seeds[0]}." if seeds else "Give one."
        raise ConfigError(f"{run_dir} is no run directory, which holds config.yaml and checkpoints. {hint}")
    run = load_run_config(run_dir / "config.yaml")
    found = load_checkpoint(_checkpoint_folder(run_dir, checkpoint))
    if found.config_digest != run.digest():
        raise CheckpointError(
            f"the checkpoint {checkpoint} in {run_dir} belongs to another run config than config.yaml beside it. "
            "Bring back the config that the run was started with."
        )
    return run, found


def trained_intensity(run_dir: Path) -> str:
    """The intensity rule all training images had; empty where they had several, or the run did not note it."""
    try:
        rules = json.loads((run_dir / "results.json").read_text(encoding="utf-8")).get("intensity", [])
    except (OSError, ValueError):
        return ""
    return str(rules[0]) if len(rules) == 1 else ""


def _checkpoint_folder(run_dir: Path, checkpoint: str) -> Path:
    rounds = sorted(folder.name for folder in (run_dir / "checkpoints").glob("round_*"))
    folder = run_dir / "best" if checkpoint == "best" else run_dir / "checkpoints" / checkpoint
    if checkpoint == "final" and rounds:
        return run_dir / "checkpoints" / max(rounds, key=lambda name: int(name.removeprefix("round_")))
    if (checkpoint == "best" or checkpoint in rounds) and folder.is_dir():
        return folder
    kept = f"Its rounds: {', '.join(rounds)}." if rounds else "It has none yet: let the run finish a round."
    raise CheckpointError(f"{run_dir} has no checkpoint {checkpoint!r}. Allowed are best, final and round_NNN. {kept}")


@dataclass(frozen=True)
class Predictor:
    """A model with its frozen backbone; make one with ``load``."""

    run: RunConfig
    model: IcMoe
    backbone: Backbone
    spec: FeatureSpec

    @classmethod
    def load(cls, run: RunConfig, checkpoint: Checkpoint, *, backbone_checkpoint: Path | None = None) -> Self:
        """Build the model of a run with a checkpoint's weights, on a GPU where there is one.

        Args:
            run: config of the run.
            checkpoint: its global tensors.
            backbone_checkpoint: file of the pretrained weights, for a backbone that ships without.

        Raises:
            BackboneError: if the pretrained weights cannot be read or are not those the run was trained on.
            ConfigError: if the run kept some tensors at its sites.
        """
        keep_memory()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # No need to compare with published digests: the run's own is compared below.
        frozen = load_backbone(
            run.model.backbone,
            checkpoint=backbone_checkpoint,
            image_size=run.model.image_size,
            verify_checkpoint=False,
        )
        backbone = cast(Backbone, frozen.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]
        spec = FeatureSpec.of(backbone, detail_size=detail_size(run.model, backbone), precision=run.train.precision)
        if spec.backbone_digest != checkpoint.backbone_digest:
            raise BackboneError(
                f"the weights of {run.model.backbone} have digest {spec.backbone_digest}, the run was trained on "
                f"{checkpoint.backbone_digest}. Give the file it was trained on with --backbone-checkpoint."
            )
        model = build_icmoe(run.model, num_classes=run.task.num_classes, backbone=backbone, seed=run.train.seed)
        local = sorted(set(model.adapter_params()) - set(checkpoint.arrays))
        if local:
            raise ConfigError(
                f"the run kept {len(local)} tensors at its sites (federation.scope: local), such as {local[0]}. "
                "Its checkpoint alone gives no model: predictions need the site's own file as well, which this "
                "command does not take."
            )
        load_arrays(model, checkpoint.arrays)
        return cls(run, model.to(device), backbone, spec)

    def predict(self, images: Sequence[Pixels]) -> list[Prediction]:
        """Segment up to ``BATCH_SIZE`` images.

        Args:
            images: (H, W, 3) each, as ``sources.load_pixels`` gives them; sizes may differ.

        Raises:
            DataError: if the backbone's features of an image are not finite.
        """
        squares, details = zip(*(draw_squares(pixels, spec=self.spec) for pixels in images), strict=True)
        embeddings = embed(self.backbone, squares, precision=self.spec.precision, batch_size=BATCH_SIZE)
        if not torch.isfinite(embeddings).all():
            raise DataError(
                "the backbone's features are not finite in half precision. Look at the image: an empty or broken one "
                "is the usual cause."
            )
        items = [
            Item(embeddings=one.float(), detail=detail.float().div_(255), labels=torch.empty(0))
            for one, detail in zip(embeddings, details, strict=True)
        ]
        probabilities, votes = predict(self.model, self.backbone.decoder, items, precision=self.spec.precision)
        return [
            _at_own_size(image_probabilities, image_votes, (pixels.shape[0], pixels.shape[1]))
            for image_probabilities, image_votes, pixels in zip(probabilities, votes, images, strict=True)
        ]


def _at_own_size(probabilities: Tensor, votes: Tensor, original_size: tuple[int, int]) -> Prediction:
    restored = restore(probabilities, original_size=original_size)
    return Prediction(
        labels=restored.argmax(dim=0).numpy().astype(np.uint8),
        probabilities=restored.numpy(),
        votes=restore(votes, original_size=original_size).numpy(),
    )
