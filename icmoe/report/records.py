"""What a run directory holds, read back and checked. The report knows nothing else of a run."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from icmoe.config import RunConfig, describe_validation, load_run_config
from icmoe.errors import RunError

logger = logging.getLogger(__name__)


class _Record(BaseModel):
    """Keys this version does not know are ignored, so that a newer run still gives a page."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class SiteScore(_Record):
    """Test scores of one site. Dice in 0..1; HD95 in ``hd95_unit``; None where it is not defined."""

    dice: float | None = None
    dice_per_class: dict[str, float | None] = {}
    hd95: float | None = None
    hd95_unit: str = "px"
    num_test: int | None = None


class WorstSite(_Record):
    """The site with the lowest Dice."""

    name: str | None = None
    dice: float | None = None


class Scores(_Record):
    """Test scores of one way of training: federated, local or pooled."""

    mean_dice: float | None = None
    worst_site: WorstSite = WorstSite()
    sites: dict[str, SiteScore]


class Results(Scores):
    """``results.json`` of one run."""

    task: str = ""
    backbone: str = ""
    trainable_params: int | None = None
    bytes_up_per_round_per_site: int | None = None
    backbone_sha256_before: str | None = None
    backbone_sha256_after: str | None = None
    best_round: int | None = None
    num_rounds: int | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    epsilon: dict[str, float | None] = {}
    epsilon_valid: bool = True
    empty_masks: dict[str, int | None] = {}
    reference: dict[str, Scores] = {}


class Spread(_Record):
    """Mean and standard deviation over seeds."""

    mean: float | None = None
    std: float | None = None


class SeedsSite(_Record):
    """Dice of one site over seeds."""

    dice: Spread = Spread()


class SeedsScores(_Record):
    """Scores over seeds of one way of training."""

    mean_dice: Spread = Spread()
    worst_site: Spread = Spread()
    sites: dict[str, SeedsSite] = {}


class SeedsResults(SeedsScores):
    """``results.json`` of several runs that differ in their seed alone; ``runs`` are folders beside it."""

    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    reference: dict[str, SeedsScores] = {}

    @model_validator(mode="after")
    def _one_run_per_seed(self) -> Self:
        if len(self.seeds) != len(self.runs):
            raise ValueError(f"{len(self.seeds)} seeds but {len(self.runs)} runs")
        return self


class Round(_Record):
    """One line of ``rounds.jsonl``. ``val_dice`` scores the aggregate of round ``scored_round``."""

    round: int | None = None
    evaluate_only: bool = False
    scored_round: int | None = None
    asked: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    failed: dict[str, str] = {}
    quarantined: dict[str, str] = {}
    val_dice: dict[str, float | None] = {}
    train_loss: dict[str, float | None] = {}
    num_examples: dict[str, int | None] = {}
    used: dict[str, int | None] = {}
    found: dict[str, int | None] = {}
    skipped: dict[str, int | None] = {}
    bytes_up: dict[str, int | None] = {}
    bytes_down: dict[str, int | None] = {}
    expert_shares: dict[str, dict[str, float | None]] = {}
    seconds: float | None = None


@dataclass(frozen=True)
class Run:
    """One run: its config, its rounds and its test scores."""

    directory: Path
    config: RunConfig
    config_text: str
    config_sha256: str
    rounds: tuple[Round, ...]
    results: Results

    @property
    def training_rounds(self) -> tuple[Round, ...]:
        """The rounds in which sites trained, without the closing evaluation."""
        return tuple(line for line in self.rounds if not line.evaluate_only)

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that was scored, asked or answered; the scored ones first, in the order of the results."""
        names = dict.fromkeys(self.results.sites)
        for line in self.rounds:
            names.update(dict.fromkeys((*line.asked, *line.answered, *line.failed, *line.quarantined)))
        return tuple(names)


@dataclass(frozen=True)
class SeedsRun:
    """Several runs that differ in their seed alone. ``runs`` holds those whose folder is still there."""

    directory: Path
    results: SeedsResults
    runs: dict[str, Run]


Model = TypeVar("Model", bound=BaseModel)


def read_run(run_dir: Path) -> Run | SeedsRun:
    """Read a run directory, of one seed or of several.

    Args:
        run_dir: a directory with ``results.json``.

    Returns:
        ``SeedsRun`` if ``results.json`` speaks of several seeds, else ``Run``.

    Raises:
        RunError: if a needed file is missing or damaged.
        ConfigError: if ``config.yaml`` is not a valid run config.
    """
    text = _read_text(run_dir / "results.json", run_dir)
    raw = _parse_json(text, run_dir / "results.json")
    if isinstance(raw, dict) and "seeds" in raw:
        return _read_seeds(run_dir, _validate(SeedsResults, raw, run_dir / "results.json"))
    config_file = run_dir / "config.yaml"
    return Run(
        directory=run_dir,
        config_text=_read_text(config_file, run_dir),
        config=load_run_config(config_file),
        config_sha256=_read_text(run_dir / "config.sha256", run_dir).strip(),
        rounds=_read_rounds(run_dir),
        results=_validate(Results, raw, run_dir / "results.json"),
    )


def _read_seeds(run_dir: Path, results: SeedsResults) -> SeedsRun:
    runs = {}
    for name in results.runs:
        # a name with a separator would lead out of the run directory
        if name != Path(name).name or not (run_dir / name / "results.json").is_file():
            logger.warning("%s has no finished run of the name %r; the summary goes without it", run_dir, name)
            continue
        run = read_run(run_dir / name)
        if isinstance(run, SeedsRun):
            raise RunError(f"{run.directory} holds several seeds again; a seed's folder must hold one run")
        runs[name] = run
    return SeedsRun(directory=run_dir, results=results, runs=runs)


def _read_rounds(run_dir: Path) -> tuple[Round, ...]:
    path = run_dir / "rounds.jsonl"
    lines: dict[tuple[int | None, bool], Round] = {}
    for number, text in enumerate(_read_text(path, run_dir).splitlines(), start=1):
        if text.strip():
            where = f"{path}, line {number}"
            line = _validate(Round, _parse_json(text, where), where)
            # a resumed run may write a round again: its last line counts
            lines[(line.round, line.evaluate_only)] = line
    return tuple(sorted(lines.values(), key=lambda line: (line.evaluate_only, line.round or 0)))


def _read_text(path: Path, run_dir: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(
            f"{run_dir} has no {path.name}: a report needs the directory of a finished run, as `icmoe-fl simulate "
            "--out DIR` writes it. Finish an interrupted run with --resume, then ask for the report again."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read {path}: {error}") from error


def _parse_json(text: str, where: object) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RunError(
            f"{where} is not valid JSON ({error}). Restore it, or repeat the run with --overwrite."
        ) from error


def _validate(model: type[Model], raw: object, where: object) -> Model:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise RunError(
            f"{where} is not what a run writes:\n{describe_validation(error, model)}\n"
            "It may come from another version of icmoe-fl: make the report with that version, or repeat the run."
        ) from error
