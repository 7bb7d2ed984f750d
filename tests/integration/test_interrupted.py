"""Runs that are killed, stopped or abandoned by their sites: nothing is lost, and resuming gives the same numbers."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

# A busy machine takes several times as long as a quiet one.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SECONDS_TO_END = 10.0


def survivors(processes: list[psutil.Process], *, within: float) -> list[psutil.Process]:
    """Wait, then say which processes are still there."""
    deadline = time.monotonic() + within
    alive = processes
    while alive and time.monotonic() < deadline:
        alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.1)
    return alive


def checkpoint(out: Path, server_round: int) -> Path:
    return out / "checkpoints" / f"round_{server_round:03d}" / "manifest.json"


def test_killed_and_stopped_the_run_ends_with_the_same_figures(
    finished: Path,
    icmoe_fl: Any,
    config: Path,
    discs: Path,
    results_of: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    command = ("simulate", config, "--data", discs, "--out", out)

    # kill -9 of everything, in the middle of round 2
    running = icmoe_fl.start(*command)
    running.wait_for(checkpoint(out, 1))
    time.sleep(0.3)
    running.descendants()
    os.killpg(running.process.pid, signal.SIGKILL)
    assert running.process.wait(30) == -signal.SIGKILL
    assert not checkpoint(out, 2).exists()
    assert not (out / "results.json").exists()

    # Ctrl-C in the middle of round 3
    running = icmoe_fl.start(*command, "--resume")
    running.wait_for(checkpoint(out, 2))
    time.sleep(0.3)
    children = running.descendants()
    assert children
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(30) == 130, running.output
    assert "--resume" in running.output
    assert "Traceback" not in running.output
    assert survivors(children, within=SECONDS_TO_END) == []
    assert checkpoint(out, 2).exists()
    assert not (out / "results.json").exists()

    done = icmoe_fl.run(*command, "--resume")
    assert done.process.returncode == 0, done.output
    assert results_of(out) == results_of(finished)
    for server_round in range(4):
        name = Path("checkpoints") / f"round_{server_round:03d}" / "adapters.safetensors"
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_sites_that_drop_out_are_written_down_and_leftovers_of_a_killed_run_do_no_harm(
    icmoe_fl: Any, config: Path, discs: Path, tmp_path: Path
) -> None:
    """With this seed site a fails in rounds 1 and 3, sites b and c in round 2."""
    out = tmp_path / "run"
    dropping = ("simulation.dropout=0.5", "federation.quorum=1", "train.seed=3")
    changes = (*dropping, "federation.strategy=fedadam", "federation.scope.norm=local")
    command = ("simulate", config, "--data", discs, "--out", out, *(part for c in changes for part in ("--set", c)))

    # As the kernel does where memory is short: the main process alone dies, Ray's processes are left.
    running = icmoe_fl.start(*command)
    running.wait_for(checkpoint(out, 1))
    time.sleep(0.3)
    running.descendants()
    running.process.kill()
    running.process.wait(30)

    done = icmoe_fl.run(*command, "--resume")
    assert done.process.returncode == 0, done.output
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in rounds] == [1, 2, 3, 3]
    assert [line["answered"] for line in rounds[:3]] == [["b", "c"], ["a"], ["b", "c"]]
    reason = "simulated dropout"
    assert [line["failed"] for line in rounds[:3]] == [{"a": reason}, {"b": reason, "c": reason}, {"a": reason}]
    assert all(line["asked"] == ["a", "b", "c"] for line in rounds)
    assert (out / "checkpoints" / "round_003" / "strategy.safetensors").exists()
    assert "a: simulated dropout" in done.output
    results = json.loads((out / "results.json").read_text())
    assert set(results["sites"]) == {"a", "b", "c"}


def test_a_run_without_one_good_reply_fails(icmoe_fl: Any, config: Path, discs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ("simulation.dropout=0.99", "federation.quorum=1", "federation.num_rounds=2")
    done = icmoe_fl.run(
        "simulate", config, "--data", discs, "--out", out, *(part for c in changes for part in ("--set", c))
    )
    assert done.process.returncode == 6, done.output
    assert "RunError" in done.output
    assert "simulated dropout" in done.output
    assert "Traceback" not in done.output
    assert not (out / "results.json").exists()
