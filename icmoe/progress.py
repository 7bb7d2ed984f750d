"""How a run looks in a terminal: progress bars while it works, a table at the end."""

from collections.abc import Mapping
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

DASH = "-"


class ConsoleWatcher:
    """A bar per stage, a line per round."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """Begin a new bar."""
        if not self._progress.console.is_terminal:
            # A log file shows no bars.
            self._progress.console.print(text)
        if self._task is not None:
            self._progress.stop_task(self._task)
        self._task = self._progress.add_task(text, total=None)

    def advance(self, done: int, total: int) -> None:
        """Move the bar of the stage."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def round_done(self, record: Mapping[str, Any]) -> None:
        """One line: who answered, how good the received weights were."""
        dice = record["val_dice"].values()
        score = f"validation Dice of round {record['scored_round']}: {fmean(dice):.3f}" if dice else "nothing scored"
        line = f"round {record['round']}: {len(record['answered'])} of {len(record['asked'])} sites, {score}"
        missing = {**record["failed"], **record["quarantined"]}
        if missing:
            line += "; " + "; ".join(f"{site}: {reason}" for site, reason in missing.items())
        self._progress.console.print(line, markup=False, highlight=False)


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """Print test Dice per site beside the references."""
    columns = {"federated": results, **results.get("reference", {})}
    table = Table(title=f"{results['task']}: test Dice")
    table.add_column("site")
    for name in columns:
        table.add_column(name, justify="right")
    for site in results["sites"]:
        table.add_row(site, *(_text(scores["sites"].get(site, {}).get("dice")) for scores in columns.values()))
    table.add_section()
    table.add_row("mean over sites", *(_text(scores["mean_dice"]) for scores in columns.values()))
    table.add_row("worst site", *(_text(_worst(scores)) for scores in columns.values()))
    console.print(table)


def _worst(scores: Mapping[str, Any]) -> Any:
    worst = scores["worst_site"]
    return worst["dice"] if worst and "dice" in worst else worst


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['mean']:.3f} ± {value['std']:.3f}"
    return DASH if value is None else f"{value:.3f}"
