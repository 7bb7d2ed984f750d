import json
import math
from pathlib import Path
from typing import Any

import pytest

from icmoe.checkpoint import Checkpoint, save_checkpoint
from icmoe.exchange import SiteReport
from icmoe_server.books import Books, summarise_test


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for server_round in range(4):
        save_checkpoint(tmp_path, Checkpoint(server_round, "c", "b", {}, {}))
    return tmp_path


def line(server_round: int, **val_dice: float) -> dict[str, Any]:
    return {"round": server_round, "scored_round": server_round - 1, "answered": ["a"], "val_dice": val_dice}


def test_best_follows_the_highest_mean(run_dir: Path) -> None:
    books = Books(run_dir, last_round=0)
    books.add(line(1, a=0.99))
    assert books.best_round() is None  # that scored the untrained model
    assert not (run_dir / "best").exists()
    books.add(line(2, a=0.5, b=0.7))
    assert books.best_round() == 1
    books.add(line(3, a=0.6, b=0.6))
    assert books.best_round() == 1  # a tie: the earlier one
    books.add({**line(4, a=0.9, b=0.9), "round": 3, "evaluate_only": True})
    assert books.best_round() == 3
    assert (run_dir / "best").resolve().name == "round_003"


def test_lines_are_on_disk_at_once_and_read_back(run_dir: Path) -> None:
    books = Books(run_dir, last_round=0)
    for server_round in (1, 2):
        books.add(line(server_round, a=0.5))
        assert len((run_dir / "rounds.jsonl").read_text().splitlines()) == server_round
    books.add({**line(3, a=0.5), "round": 2, "evaluate_only": True})
    again = Books(run_dir, last_round=2)
    assert [record["round"] for record in again.records] == [1, 2]
    assert [record["round"] for record in Books(run_dir, last_round=1).records] == [1]


def test_num_aggregated(run_dir: Path) -> None:
    books = Books(run_dir, last_round=0)
    books.add({**line(1), "answered": ["a"], "aggregated": False})
    assert books.num_aggregated() == 0
    books.add({**line(2), "evaluate_only": True})
    assert books.num_aggregated() == 0
    books.add({**line(3), "aggregated": True})
    assert books.num_aggregated() == 1


def report(site: str, numbers: dict[str, float], per_class: list[float]) -> SiteReport:
    return SiteReport(site, 1, "", "", numbers, dice_per_class=per_class)


def test_summary_is_unweighted_and_never_nan() -> None:
    summary = summarise_test(
        {
            "b": report("b", {"dice": 0.5, "hd95": 2.0, "hd95_in_mm": 1.0, "num_scored": 9}, [0.5, math.nan]),
            "a": report("a", {"dice": 0.9, "num_scored": 1}, [0.8, 1.0]),
            "c": report("c", {"num_scored": 0}, []),
        },
        ["ring", "core"],
    )
    assert list(summary["sites"]) == ["a", "b", "c"]
    assert summary["mean_dice"] == pytest.approx(0.7)
    assert summary["worst_site"] == {"name": "b", "dice": 0.5}
    assert summary["sites"]["b"]["dice_per_class"] == {"ring": 0.5, "core": None}
    assert summary["sites"]["b"]["hd95_unit"] == "mm"
    assert summary["sites"]["a"]["hd95"] is None
    assert summary["sites"]["c"] == {
        "dice": None,
        "dice_per_class": {"ring": None, "core": None},
        "hd95": None,
        "hd95_unit": "px",
        "num_test": 0,
    }
    json.dumps(summary, allow_nan=False)


def test_summary_of_nothing() -> None:
    summary = summarise_test({}, ["ring"])
    assert summary == {"sites": {}, "mean_dice": None, "worst_site": {"name": None, "dice": None}}


def test_recent_norms_are_those_of_the_last_two_rounds_that_counted(run_dir: Path) -> None:
    books = Books(run_dir, last_round=0)
    assert books.recent_norms() == []
    for server_round, aggregated in enumerate([True, True, False, True], start=1):
        norms = {"a": float(server_round), "b": 0.5}
        books.add({**line(server_round), "aggregated": aggregated, "update_norm": norms})
    assert books.recent_norms() == [2.0, 0.5, 4.0, 0.5]


def test_lines_of_an_older_version_have_no_norms(run_dir: Path) -> None:
    books = Books(run_dir, last_round=0)
    books.add({**line(1), "aggregated": True})
    assert books.recent_norms() == []
