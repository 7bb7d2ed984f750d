"""Hospitals whose replies are broken or hostile, over the real network: they count for nothing, and people see why."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEP = 0.01
QUARANTINED = {
    1: ("nan", "is not finite"),
    2: ("shape", "expected float32"),
    3: ("extra", "unknown tensors, first image_encoder.x"),
    4: ("stale", "the reply is for round 3, expected 4"),
    5: ("config", "the reply is for run config 000000000000, expected"),
    6: ("norm", "100 times the usual"),
}
"""What b does by round, and what is said of it."""
LATE, TWICE = 7, 8
# Flower keeps a message for 60 s at least: a reply after this deadline still reaches the centre.
CONFIG = f"""\
task: {{name: discs, classes: {{disc: 1}}}}
model: {{backbone: lite_medsam, width: 16, residual_rank: 2}}
federation: {{num_rounds: {TWICE}, sites: [a, b, c], quorum: 1, on_missing: continue, round_deadline: 45}}
"""


@pytest.fixture(scope="module")
def told(federation: Any) -> Iterator[dict[str, Any]]:
    """The whole run once: a is honest, b breaks a rule a round, c says that it is a."""
    go = federation.root / "go"
    plans: dict[str, dict[str, Any]] = {
        "a": {"claims": "a", "rounds": {1: "hold"}, "scores": "honest"},
        "b": {
            "claims": "b",
            "rounds": {n: how for n, (how, _) in QUARANTINED.items()} | {LATE: "late", TWICE: "twice"},
        },
        "c": {"claims": "a", "rounds": {}},
    }
    federation.config.write_text(CONFIG)
    centre = federation.start_centre()
    federation.wait_for(
        "the registration", lambda: all(f"{site} may take part" in centre.output for site in plans), seconds=120
    )
    watch = federation.start("watch", "server", "watch", "--dir", federation.centre)
    hospitals = []
    for site, plan in plans.items():
        path = federation.root / f"{site}.plan.json"
        common = {"run_dir": str(federation.run_dir), "step": STEP, "scores": "nan", "go": str(go)}
        path.write_text(json.dumps(common | plan))
        hospitals.append(start_fake(federation.root, site, path))
    try:
        # No round may end before all have been asked.
        federation.wait_for("all sites", lambda: {"b", "c"} <= asked(federation))
        go.touch()
        code = centre.process.wait(400)
        watch.process.wait(30)
        yield {"exit": code, "output": centre.output, "watched": watch.output}
    finally:
        for hospital in hospitals:
            kill(hospital)


def start_fake(root: Path, site: str, plan: Path) -> "subprocess.Popen[bytes]":
    program = Path(__file__).with_name("fake_hospital.py")
    with (root / f"fake-{site}.log").open("wb") as log:
        command = [sys.executable, str(program), str(root / "sites" / f"{site}.yaml"), str(plan)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """It and what it started."""
    if process.poll() is None:
        top = psutil.Process(process.pid)
        for one in [*top.children(recursive=True), top]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(30)


def asked(federation: Any) -> set[str]:
    roll_call = federation.status().get("roll_call", {})
    return {site for site, how in roll_call.items() if how["state"] in ("asked", "answered")}


def expect_step(federation: Any, server_round: int, step: float) -> None:
    before, after = federation.weights(server_round - 1), federation.weights(server_round)
    assert set(after) == set(before)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array + np.float32(step), rtol=0, atol=1e-6)


@pytest.mark.parametrize("server_round", QUARANTINED)
def test_attack_by_reply_is_quarantined_and_the_round_is_the_honest_site_alone(
    federation: Any, told: dict[str, Any], server_round: int
) -> None:
    line = federation.rounds()[server_round - 1]
    assert line["round"] == server_round
    assert line["answered"] == ["a"]
    assert line["aggregated"]
    assert line["failed"] == line["missing"] == {}
    assert QUARANTINED[server_round][1] in line["quarantined"]["b"]
    assert list(line["val_dice"]) == ["a"]
    expect_step(federation, server_round, STEP)


@pytest.mark.parametrize("server_round", [*QUARANTINED, LATE, TWICE])
def test_attack_with_the_name_of_another_site_is_refused_by_name(
    federation: Any, told: dict[str, Any], server_round: int
) -> None:
    line = federation.rounds()[server_round - 1]
    assert line["quarantined"]["c"] == "the reply claims to come from site 'a', but its key is that of 'c'"
    assert "a" in line["answered"]


def test_attack_by_late_reply_is_dropped_and_the_site_comes_back(federation: Any, told: dict[str, Any]) -> None:
    late, after = federation.rounds()[LATE - 1 : LATE + 1]
    assert late["answered"] == ["a"]
    assert late["failed"] == {"b": "no answer before the round's deadline"}
    expect_step(federation, LATE, STEP)
    assert after["late"] == 1
    assert after["answered"] == ["a", "b"]
    assert sorted(after["quarantined"]) == ["c"]


def test_attack_by_second_reply_counts_once(federation: Any, told: dict[str, Any]) -> None:
    """The first of b is as large as that of a, its second three times; the second would move the average."""
    expect_step(federation, TWICE, STEP)
    assert "Failed to store Message reply" in (federation.centre / "logs" / "superlink.log").read_text()


def test_attack_is_shown_to_who_watches(federation: Any, told: dict[str, Any]) -> None:
    """Round by round while the run lasts, and in the roll-call it left behind."""
    by_round = {line.split(":")[0]: line for line in told["watched"].splitlines() if line.startswith("round ")}
    for server_round, (_, said) in QUARANTINED.items():
        line = by_round[f"round {server_round}"]
        assert "1 of 3 sites" in line
        assert said in line.partition("; b: ")[2]
        assert "; c: the reply claims to come from site 'a', but its key is that of 'c'" in line
    roll_call = federation.status()["roll_call"]
    assert {site: how["state"] for site, how in roll_call.items()} == {
        "a": "answered",
        "b": "quarantined",
        "c": "quarantined",
    }
    assert "dice is nan" in roll_call["b"]["reason"]
    assert "its key is that of 'c'" in roll_call["c"]["reason"]
    log = (federation.centre / "logs" / "serverapp.log").read_text()
    for site, said in {"b": "tensor", "c": "the reply claims to come from site 'a'"}.items():
        assert f"WARNING quarantined the reply of {site}: {said}" in log


def test_attack_leaves_a_run_that_finishes_with_its_honest_site(federation: Any, told: dict[str, Any]) -> None:
    assert told["exit"] == 0, told["output"]
    assert [line["round"] for line in federation.rounds()] == [*range(1, TWICE + 1), TWICE]
    assert federation.status()["state"] == "finished"
    results = federation.results()
    assert list(results["sites"]) == ["a"]
    assert sorted(results["not_scored"]) == ["b", "c"]
    assert results["best_round"] == TWICE
    assert (federation.run_dir / "report.html").stat().st_size > 10_000
