import io
from typing import Any

import pytest
from rich.console import Console

from icmoe.progress import ConsoleWatcher, print_results

SITES = {"oslo": {"dice": 0.81234}, "bergen": {"dice": None}}
SCORES: dict[str, Any] = {"sites": SITES, "mean_dice": 0.81234, "worst_site": {"name": "oslo", "dice": 0.81234}}


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def record(**changes: Any) -> dict[str, Any]:
    line = {"round": 2, "scored_round": 1, "asked": ["a", "b"], "answered": ["a"], "val_dice": {"a": 0.5, "b": 0.7}}
    return {**line, "failed": {}, "quarantined": {}, **changes}


def test_a_line_a_round() -> None:
    target = console()
    with ConsoleWatcher(target) as watcher:
        watcher.advance(1, 2)  # before any stage: nothing happens
        watcher.stage("Training")
        watcher.round_done(record())
        watcher.advance(1, 2)
        watcher.stage("Report")
    assert "round 2: 1 of 2 sites, validation Dice of round 1: 0.600" in printed(target)
    assert "Training" in printed(target)


def test_failures_are_said_and_nothing_scored_is_too() -> None:
    target = console()
    with ConsoleWatcher(target) as watcher:
        watcher.round_done(record(val_dice={}, failed={"b": "[bold] no answer"}, quarantined={"c": "NaN"}))
    assert "nothing scored; b: [bold] no answer; c: NaN" in printed(target)


def test_the_bar_is_gone_when_an_error_passes() -> None:
    def fail() -> None:
        with ConsoleWatcher(console()) as watcher:
            watcher.stage("Training")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()


def test_table_of_one_run_beside_its_references() -> None:
    target = console()
    local = {"sites": {"oslo": {"dice": 0.7}}, "mean_dice": 0.7, "worst_site": {"name": "oslo", "dice": 0.7}}
    print_results(target, {"task": "discs", **SCORES, "reference": {"local": local}})
    lines = printed(target).splitlines()
    assert any("federated" in line and "local" in line for line in lines)
    assert next(line for line in lines if "oslo" in line).split()[-4::2] == ["0.812", "0.700"]
    assert next(line for line in lines if "bergen" in line).count(" - ") == 2
    assert any("worst site" in line for line in lines)


def test_table_of_several_seeds() -> None:
    spread = {"mean": 0.8, "std": 0.012}
    target = console()
    print_results(
        target,
        {"task": "discs", "mean_dice": spread, "worst_site": spread, "sites": {"oslo": {"dice": spread}}},
    )
    assert printed(target).count("0.800 ± 0.012") == 3


def test_table_where_nothing_was_scored() -> None:
    target = console()
    nothing = {"sites": {"oslo": {"dice": None}}, "mean_dice": None, "worst_site": {"name": None, "dice": None}}
    print_results(target, {"task": "discs", **nothing})
    print_results(target, {"task": "discs", "mean_dice": None, "worst_site": None, "sites": {"oslo": {"dice": None}}})
    assert "mean over sites" in printed(target)
