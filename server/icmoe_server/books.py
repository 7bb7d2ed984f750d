"""What the centre writes down: ``rounds.jsonl``, the best round, ``results.json``."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from icmoe.checkpoint import mark_best, write_lines
from icmoe.exchange import SiteReport

Record = dict[str, Any]

RECENT_ROUNDS = 2
"""Rounds whose updates say what a usual one is; learning rates fall, so older ones say less."""


class Books:
    """The lines of ``rounds.jsonl``, rewritten as a whole each round so that no line is ever torn.

    Args:
        run_dir: of the run.
        last_round: round of the checkpoint the run continues from; later lines of a killed run are dropped.
    """

    def __init__(self, run_dir: Path, *, last_round: int) -> None:
        self._run_dir = run_dir
        self._path = run_dir / "rounds.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        records = [json.loads(line) for line in lines]
        self.records: list[Record] = [
            record for record in records if record["round"] <= last_round and not record.get("evaluate_only")
        ]

    def add(self, record: Record) -> None:
        """Append a line, on disk before this returns, and keep ``best/`` up to date."""
        self.records.append(record)
        write_lines(self._path, self.records)
        scored = record["scored_round"]
        if scored > 0 and record["val_dice"] and self.best_round() == scored:
            mark_best(self._run_dir, scored)

    def best_round(self) -> int | None:
        """Round whose aggregate has the highest mean validation Dice over sites; the earlier one wins a tie."""
        means = {
            record["scored_round"]: fmean(record["val_dice"].values())
            for record in self.records
            if record["val_dice"] and record["scored_round"] > 0
        }
        return max(means, key=lambda scored: (means[scored], -scored)) if means else None

    def recent_norms(self) -> list[float]:
        """L2 norms of the changes that counted in the last rounds."""
        rounds = [record for record in self.records if record.get("aggregated")][-RECENT_ROUNDS:]
        return [norm for record in rounds for norm in record.get("update_norm", {}).values()]

    def num_aggregated(self) -> int:
        """Rounds in which the model learnt something: enough good replies came."""
        return sum(bool(record.get("aggregated")) for record in self.records)


def summarise_test(reports: Mapping[str, SiteReport], class_names: list[str]) -> Record:
    """Test scores in the form of ``results.json``: sites, their unweighted mean, the worst.

    Args:
        reports: of the test message, by site.
        class_names: foreground classes in order.

    Returns:
        ``sites``, ``mean_dice`` and ``worst_site``; ``None`` where nothing was scored. Never NaN.
    """
    sites = {name: _site_entry(report, class_names) for name, report in sorted(reports.items())}
    scored = {name: entry["dice"] for name, entry in sites.items() if entry["dice"] is not None}
    worst = min(scored, key=lambda name: scored[name]) if scored else None
    return {
        "sites": sites,
        "mean_dice": fmean(scored.values()) if scored else None,
        "worst_site": {"name": worst, "dice": scored[worst]} if worst else {"name": None, "dice": None},
    }


def _site_entry(report: SiteReport, class_names: list[str]) -> Record:
    numbers = report.numbers
    per_class = list(report.dice_per_class) or [math.nan] * len(class_names)
    return {
        "dice": numbers.get("dice"),
        "dice_per_class": {
            name: None if math.isnan(dice) else dice for name, dice in zip(class_names, per_class, strict=True)
        },
        "hd95": numbers.get("hd95"),
        "hd95_unit": "mm" if numbers.get("hd95_in_mm") else "px",
        "num_test": int(numbers["num_scored"]) if "num_scored" in numbers else None,
    }
