"""Does it protect? Attacks on small models trained without privacy and at epsilon 8, 3 and 1.

    make privacy-attack                     # continues where it stopped
    python benchmarks/privacy_attack.py --data-root ../shared/data --levels none,8

Membership inference against 16 models, each trained on half of 100 nuclei images with cached features; canaries in
one round's update, with the lower bound of epsilon they prove. Every training is a file in ``--out``; the table in
docs/privacy_table.md is written after each epsilon, and what was not run says so. Dice is of the validation split.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import numpy as np
import torch
import typer
from performance.document import around_section, number, table, write_section
from privacy.attack_model import Images, fresh_model, image_losses, spend_for, train
from privacy.canaries import audit_mechanism, audit_round, epsilon_at_least, guess, make_canaries
from privacy.membership import auc, lira_aucs, split_members, threshold_aucs
from rich.console import Console

from icmoe.checkpoint import write_json
from icmoe.config import load_run_config
from icmoe.errors import ConfigError, IcmoeError
from icmoe.privacy.accounting import Spend
from icmoe.privacy.config import PrivacyConfig
from icmoe.privacy.sampling import planned
from icmoe.progress import ConsoleWatcher
from icmoe.simulation import SimulationRequest, encode_everything, make_sites
from icmoe.training import TrainItem
from icmoe_client.trainer import score_split
from icmoe_client.workbench import Workbench

LEVELS: tuple[int | None, ...] = (None, 8, 3, 1)
NUM_MODELS, NUM_IMAGES = 16, 100
NUM_CANARIES, NUM_REGULAR = 64, 32
WORST_RUNS, WORST_CANARIES, WORST_SHARE = 8, 256, 16
DELTA = PrivacyConfig(target_epsilon=1.0).target_delta
NUCLEI = Path(__file__).parents[1] / "configs" / "run" / "nuclei.yaml"
DOC = Path(__file__).parents[1] / "docs" / "privacy_table.md"
# Small: 64 trainings have to fit into an evening. Features are those of the nuclei run.
SMALL = (
    "model.experts.basic=0",
    "model.experts.adaptive=1",
    "model.width=16",
    "model.logit_stride=4",
    "train.views=[identity]",
    "train.batch_size=10",
)


@dataclass(frozen=True)
class Lab:
    """What all attacks share.

    Attributes:
        bench: run of the membership attack, with all sites' images.
        round_bench: the same with the epochs of one round.
        items: training images in memory, in a random order that never changes.
        out: folder of the results.
    """

    bench: Workbench
    round_bench: Workbench
    items: Sequence[TrainItem]
    out: Path


def main(
    data_root: Annotated[Path, typer.Option(envvar="ICMOE_TEST_DATA", help="Folder with nuclei_fluorescence.")],
    out: Annotated[Path, typer.Option(help="Folder of the results, a file per training.")] = Path(
        "runs/privacy_attack"
    ),
    levels: Annotated[str, typer.Option(help="Epsilons, separated by commas.")] = "none,8,3,1",
    epochs: Annotated[int, typer.Option(help="Of a model under the membership attack.")] = 20,
    round_epochs: Annotated[int, typer.Option(help="Of the round that canaries are in.")] = 2,
    audits: Annotated[int, typer.Option(help="Rounds with canaries, for each epsilon.")] = 10,
    doc: Annotated[Path, typer.Option(help="Document to write into.", show_default="docs/privacy_table.md")] = DOC,
) -> None:
    """Train what is missing and write the table. With other epochs, give another --out."""
    try:
        around_section(doc, "privacy attack")
        chosen = _levels(levels)
        with ConsoleWatcher(Console(stderr=True)) as watcher:
            lab = prepare(data_root / "nuclei_fluorescence", out, watcher, epochs=epochs, round_epochs=round_epochs)
            for level in chosen:
                watcher.stage(f"Canaries at epsilon {_text(level)}")
                run_audits(lab, level, audits, watcher)
                write_section(doc, "privacy attack", attack_table(out))
            for level in chosen:
                watcher.stage(f"Shadow models at epsilon {_text(level)}")
                run_shadows(lab, level, watcher)
                write_section(doc, "privacy attack", attack_table(out))
    except IcmoeError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    typer.echo(attack_table(out))


def prepare(data: Path, out: Path, watcher: ConsoleWatcher, *, epochs: int, round_epochs: int) -> Lab:
    """Encode all images and hold those of the training split in memory."""
    run, one_round = (load_run_config(NUCLEI, [*SMALL, f"train.local_epochs={n}"]) for n in (epochs, round_epochs))
    request = SimulationRequest(run=run, data=data, out=out / "work")
    # Encoding takes all processors; training then as many threads as the caller gave torch.
    threads = torch.get_num_threads()
    bench = encode_everything(request, make_sites(request), watcher)
    torch.set_num_threads(threads)
    dataset = bench.dataset("train")
    order = np.random.default_rng(0).permutation(len(dataset))
    items = [dataset.load(int(index), "identity") for index in order]
    return Lab(bench, replace(bench, run=one_round), items, out)


def run_audits(lab: Lab, level: int | None, count: int, watcher: ConsoleWatcher) -> None:
    """Train rounds with canaries that are missing."""
    bench = lab.round_bench
    # Steps and noise are fixed before coins are tossed, for the number of images that is expected.
    spend = spend_for(bench.run, level, num_units=NUM_REGULAR + NUM_CANARIES // 2)
    for seed in range(count):
        file = lab.out / f"canaries__{_text(level)}__{seed}.json"
        if not file.exists():
            regular, rest = lab.items[:NUM_REGULAR], lab.items[NUM_REGULAR : NUM_REGULAR + NUM_CANARIES]
            canaries = make_canaries(rest, num_classes=bench.run.task.num_classes, seed=seed)
            scores, included = audit_round(bench, regular, canaries, spend=spend, seed=seed)
            write_json(file, {"scores": scores.tolist(), "included": included.tolist()})
        watcher.advance(seed + 1, count)
    _audit_worst(lab, level, spend)


def _audit_worst(lab: Lab, level: int | None, spend: Spend | None) -> None:
    """The same steps with worst-case gradients; costs next to nothing, so it is done again each time."""
    run = lab.round_bench.run
    steps = spend or Spend(1.0, *planned(num_units=NUM_REGULAR + NUM_CANARIES // 2, config=run.train))
    sigma = spend.noise_multiplier if spend else 0.0
    guesses = []
    for seed in range(WORST_RUNS):
        found = audit_mechanism(steps, noise_multiplier=sigma, num_canaries=WORST_CANARIES, seed=seed)
        guesses.append(guess(*found, share=WORST_SHARE))
    write_json(lab.out / f"worst__{_text(level)}.json", {"guesses": guesses})


def run_shadows(lab: Lab, level: int | None, watcher: ConsoleWatcher) -> None:
    """Train shadow models that are missing."""
    bench, items = lab.bench, lab.items[:NUM_IMAGES]
    spend = spend_for(bench.run, level, num_units=NUM_IMAGES // 2)
    for index, members in enumerate(split_members(NUM_MODELS, NUM_IMAGES, seed=0)):
        file = lab.out / f"shadow__{_text(level)}__{index}.json"
        if not file.exists():
            model = fresh_model(bench, index)
            held = [item for item, is_member in zip(items, members, strict=True) if is_member]
            train(bench, model, Images(held), spend=spend, seed=(index,))
            losses = image_losses(bench, model, items).tolist()
            dice = score_split(replace(bench, model=model), "val")[0]["dice"]
            sigma = spend.noise_multiplier if spend else None
            write_json(file, {"losses": losses, "dice": dice, "noise_multiplier": sigma})
        watcher.advance(index + 1, NUM_MODELS)


def attack_table(out: Path) -> str:
    """Markdown table of all epsilons."""
    header = [
        "epsilon",
        "sigma",
        "Dice",
        "loss threshold, AUC",
        "LiRA, AUC",
        "canaries, AUC",
        "epsilon proven by canaries",
    ]
    header += ["by worst-case gradients"]
    rows = [[_text(level), *_shadow_cells(out, level), *_canary_cells(out, level)] for level in LEVELS]
    return table(header, rows)


def _shadow_cells(out: Path, level: int | None) -> list[str]:
    results = _read(out, f"shadow__{_text(level)}", NUM_MODELS)
    if len(results) < NUM_MODELS:
        return ["", "not run", "not run", "not run"]
    losses = np.array([result["losses"] for result in results])
    members = split_members(NUM_MODELS, NUM_IMAGES, seed=0)
    sigma = results[0]["noise_multiplier"]
    return [
        number(sigma) if sigma else "",
        f"{fmean(result['dice'] for result in results):.3f}",
        _mean_error(threshold_aucs(losses, members).tolist()),
        _mean_error(lira_aucs(losses, members).tolist()),
    ]


def _canary_cells(out: Path, level: int | None) -> list[str]:
    results = _read(out, f"canaries__{_text(level)}", None)
    if len(results) < 2 or not (out / f"worst__{_text(level)}.json").exists():
        return ["not run"] * 3
    pairs = [(np.array(result["scores"]), np.array(result["included"])) for result in results]
    proven = _proven([guess(*pair) for pair in pairs], level, num_canaries=len(pairs) * NUM_CANARIES)
    worst = json.loads((out / f"worst__{_text(level)}.json").read_text(encoding="utf-8"))["guesses"]
    aucs = [auc(scores, included) for scores, included in pairs]
    return [_mean_error(aucs), proven, _proven(worst, level, num_canaries=WORST_RUNS * WORST_CANARIES)]


def _proven(guesses: Sequence[Sequence[int]], level: int | None, *, num_canaries: int) -> str:
    """The lower bound, what it rests on, and whether the claim holds."""
    num_guesses, num_right = (sum(one) for one in zip(*guesses, strict=True))
    delta = 0.0 if level is None else DELTA
    bound = epsilon_at_least(num_guesses, num_right, num_canaries=num_canaries, delta=delta)
    verdict = ", ABOVE THE CLAIM" if level is not None and bound > level else ""
    return f"{bound:.2f} ({num_right} of {num_guesses} right){verdict}"


def _mean_error(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ± {stdev(values) / len(values) ** 0.5:.3f}"


def _read(out: Path, stem: str, count: int | None) -> list[dict[str, Any]]:
    """Results in order; all there are where ``count`` is ``None``."""
    files = [out / f"{stem}__{index}.json" for index in range(count or len(list(out.glob(f"{stem}__*.json"))))]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def _text(level: int | None) -> str:
    return "none" if level is None else str(level)


def _levels(text: str) -> list[int | None]:
    known = {_text(level): level for level in LEVELS}
    asked = [part.strip() for part in text.split(",")]
    unknown = [part for part in asked if part not in known]
    if unknown:
        raise ConfigError(f"--levels: {unknown[0]!r} is none of {', '.join(known)}.")
    return [known[part] for part in asked]


if __name__ == "__main__":
    typer.run(main)
