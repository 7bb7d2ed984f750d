"""Cost of a private step against the plain one, by running both trainings on made-up features of the real sizes.

    python benchmarks/dp_step.py                                  # default model, 4 images a step
    python benchmarks/dp_step.py --config configs/run/cardiac.yaml
    python benchmarks/dp_step.py --device cuda --precision bf16

Both trainings are the shipped ones, ``train_local`` and ``train_private``, on the same images in every step: each image
a unit, then all images of a step two patients. They take turns in one process; a turn's first step is left out (the
optimiser's state and the check of separability are made in it). The ratio is the median over turns of one turn's cost
by the other's, in CPU seconds (on a GPU, wall seconds).
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
import typer

from icmoe.allocator import keep_memory
from icmoe.config import ModelConfig, TrainConfig, load_run_config
from icmoe.modeling.backbone import Backbone, load_backbone
from icmoe.modeling.build import build_icmoe, detail_size
from icmoe.privacy.accounting import Spend
from icmoe.privacy.config import PrivacyConfig
from icmoe.privacy.dp_sgd import train_private
from icmoe.privacy.sampling import os_noise
from icmoe.training import TrainData, TrainItem, train_local

NUM_CLASSES = 4
STEPS = 3
"""Steps of a turn that count."""
BARS = {"whole model": 1.5, "trainable part alone": 2.0}


class MadeUp:
    """Features in memory, of the sizes a backbone gives."""

    def __init__(self, num_images: int, backbone: Backbone, detail: int) -> None:
        random = torch.Generator().manual_seed(0)
        side = backbone.embedding_size
        self._items = [
            _Item(
                torch.randn(256, side, side, generator=random),
                torch.rand(3, detail, detail, generator=random),
                torch.randint(0, NUM_CLASSES, (8, 8), generator=random)
                .repeat_interleave(detail // 8, 0)
                .repeat_interleave(detail // 8, 1),
            )
            for _ in range(num_images)
        ]

    def __len__(self) -> int:
        """Count images."""
        return len(self._items)

    def load(self, index: int, view: str) -> TrainItem:
        """Give an image."""
        return self._items[index]


class _Item:
    def __init__(self, embeddings: torch.Tensor, detail: torch.Tensor, labels: torch.Tensor) -> None:
        self.embeddings, self.detail, self.labels = embeddings, detail, labels


class _Clock:
    """Seconds of the steps of a turn, told by the training's progress; without the first."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._times: list[float] = []

    def __call__(self, done: int, total: int) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
        self._times.append(time.process_time() if self._device == "cpu" else time.perf_counter())

    @property
    def per_step(self) -> float:
        return (self._times[-1] - self._times[0]) / (len(self._times) - 1)


Turn = Callable[[_Clock], object]


def main(
    config: Annotated[Path | None, typer.Option(help="A run config; without it, the default model.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step, even.")] = None,
    precision: Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="Instead of the config's.")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option()] = "cpu",
    turns: Annotated[int, typer.Option(help="Turns of each training.")] = 7,
) -> None:
    """Print a table of ratios."""
    keep_memory()
    run = load_run_config(config, []) if config else None
    model_config, train = (run.model, run.train) if run else (ModelConfig(), TrainConfig())
    changes = {"batch_size": batch_size or train.batch_size, "precision": precision or train.precision}
    train = train.model_copy(update={**changes, "local_epochs": STEPS + 1, "embedding_noise": 0.0})
    loaded = load_backbone(model_config.backbone, image_size=model_config.image_size)
    backbone: Backbone = loaded.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = MadeUp(train.batch_size, backbone, detail_size(model_config, backbone))
    typer.echo(
        f"{train.batch_size} images a step, {train.precision}, {device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, median of {turns} turns of {STEPS} steps\n\n"
        "| step | plain, seconds | unit image | unit patient, 2 a step | bar |\n| --- | ---: | ---: | ---: | ---: |"
    )
    # The step that counts from is the first; the basic experts, with the frozen decoder, are only in it.
    for part, basic_every in (("whole model", 1), ("trainable part alone", STEPS + 1)):
        settings = train.model_copy(update={"basic_every": basic_every})
        plain, ratios = _compare(model_config, settings, backbone, data, device=device, turns=turns)
        worst = max(ratios)
        verdict = "met" if worst <= BARS[part] else "NOT met"
        typer.echo(f"| {part} | {plain:.3f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {BARS[part]}, {verdict} |")


def _compare(
    model_config: ModelConfig, config: TrainConfig, backbone: Backbone, data: TrainData, *, device: str, turns: int
) -> tuple[float, list[float]]:
    """Seconds of the plain step, and the ratios of both units."""
    trainings = _trainings(model_config, config, backbone, data, device)
    seconds: list[list[float]] = [[] for _ in trainings]
    for _ in range(turns + 1):
        for training, each in zip(trainings, seconds, strict=True):
            clock = _Clock(device)
            training(clock)
            each.append(clock.per_step)
    plain, *private = (each[1:] for each in seconds)  # the first turn warms up
    return median(plain), [median(one / two for one, two in zip(each, plain, strict=True)) for each in private]


def _trainings(
    model_config: ModelConfig, config: TrainConfig, backbone: Backbone, data: TrainData, device: str
) -> list[Turn]:
    """The plain training, then the private one with every image a unit and with two patients."""
    model = build_icmoe(model_config, num_classes=NUM_CLASSES, backbone=backbone, seed=0).to(device)

    def plain(clock: _Clock) -> object:
        return train_local(
            model,
            backbone.decoder,
            data,
            config=config,
            views=["identity"],
            learning_rate=1e-6,
            seed=(0,),
            progress=clock,
        )

    def private(unit_of: Sequence[int]) -> Turn:
        def turn(clock: _Clock) -> object:
            return train_private(
                model,
                backbone.decoder,
                data,
                config=config,
                privacy=PrivacyConfig(noise_multiplier=1.0),
                spend=Spend(noise_multiplier=1.0, sample_rate=1.0, num_steps=STEPS + 1),
                unit_of=unit_of,
                views=["identity"],
                learning_rate=1e-4,
                noise=os_noise(),
                progress=clock,
            )

        return turn

    images = range(len(data))
    return [plain, private(images), private([image % 2 for image in images])]


if __name__ == "__main__":
    typer.run(main)
