"""Differential privacy between real processes: what is booked, what leaves, what is signed, and when a site says no."""

import json
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from icmoe.audit import RECEIPTS
from icmoe.receipts import Receipt, parse_line
from icmoe_client.egress import METRICS
from icmoe_client.egress_log import LOG
from icmoe_client.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SITES = ("a", "b", "c")
ROUNDS = 3
SETTINGS = f"""\
task: {{name: discs, classes: {{disc: 1}}}}
model: {{backbone: lite_medsam, width: 16, residual_rank: 2}}
train: {{local_epochs: 1, batch_size: 2, basic_every: 2}}
federation: {{num_rounds: {ROUNDS}, sites: [a, b, c], quorum: 2, on_missing: continue, round_deadline: 600}}
privacy: {{noise_multiplier: 2.0, target_delta: 1.0e-5}}
"""
DELTA = 1e-5
LEDGER = "ledger.sqlite"


@pytest.fixture(scope="module")
def private(new_federation: Any) -> Any:
    return new_federation(settings=SETTINGS)


def change_site(federation: Any, site: str, *, policy: dict[str, Any], **changes: Any) -> None:
    path = federation.root / "sites" / f"{site}.yaml"
    content = yaml.safe_load(path.read_text())
    content |= changes
    content["policy"] |= policy
    path.write_text(yaml.safe_dump(content))


def live(federation: Any, site: str) -> Path:
    return Path(federation.root / "sites" / site / "state")


def state(federation: Any, site: str) -> Path:
    """What a site had at the end of the run, before its ledger was lost."""
    return Path(federation.root / "saved" / site)


@pytest.fixture(scope="module")
def finished(private: Any) -> dict[str, Any]:
    """Three rounds, the budget of b enough for the first; then a loses its ledger and is asked again."""
    told: dict[str, Any] = {}
    for site in SITES:
        change_site(private, site, policy={"require_dp": True}, num_examples=3)
    change_site(private, "b", policy={"max_epsilon": 3.0})
    sites = {site: private.start_site(site) for site in SITES}
    centre = private.start_centre()
    assert centre.process.wait(600) == 0, centre.output
    end(sites.values())
    for site in SITES:
        state(private, site).mkdir(parents=True)
        for name in (LOG, LEDGER):
            shutil.copy(live(private, site) / name, state(private, site) / name)
    site_file = private.root / "sites" / "a.yaml"
    told["shown"] = json.loads(private.run("privacy", "show", "--site", "a", "--config", site_file, "--json"))
    told["refusal"] = lose_ledger(private)
    told["spent"] = f"{Ledger(state(private, 'a') / LEDGER).highest(delta=DELTA) + 1e-6:.6f}"
    confirm = ("privacy", "confirm", "--site", "a", "--config", site_file, "--reason", "the disk was lost", "--yes")
    told["too little"] = private.run(*confirm, "--epsilon", "0.1", exit_code=2)
    private.run(*confirm, "--epsilon", told["spent"])
    return told


def lose_ledger(federation: Any) -> str:
    """The reason that the centre gets from a site whose ledger is gone."""
    (live(federation, "a") / LEDGER).unlink()
    config = federation.root / "again.yaml"
    config.write_text(SETTINGS.replace(f"num_rounds: {ROUNDS}", "num_rounds: 1"))
    status = federation.centre / "runs" / "again" / "status.json"
    sites = [federation.start_site(site) for site in ("a", "c")]
    centre = federation.start("centre", "server", "start", "--dir", federation.centre, "--config", config)

    def reason() -> str:
        standing = json.loads(status.read_text())["roll_call"].get("a") if status.exists() else None
        return str(standing["reason"]) if standing and standing["state"] == "failed" else ""

    federation.wait_for("the refusal of a", reason)
    found = reason()
    end([centre, *sites])
    return found


def end(commands: Iterable[Any]) -> None:
    for running in commands:
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(60)


def receipts(federation: Any, site: str) -> list[Receipt]:
    lines = [parse_line(line) for line in (state(federation, site) / LOG).read_bytes().splitlines()]
    assert all(isinstance(line, Receipt) for line in lines)
    return [line for line in lines if isinstance(line, Receipt)]


def test_ledger_refuses_beyond_the_budget_and_the_others_go_on(private: Any, finished: dict[str, Any]) -> None:
    *rounds, scored = private.rounds()
    assert [line["answered"] for line in rounds] == [["a", "b", "c"], ["a", "c"], ["a", "c"]]
    for line in rounds[1:]:
        assert line["failed"]["b"].startswith("BudgetExhaustedError")
    assert scored["evaluate_only"]
    assert {site: len(Ledger(state(private, site) / LEDGER).entries()) for site in SITES} == {
        "a": 3,
        "b": 1,
        "c": 3,
    }


def test_ledger_is_what_the_centre_and_the_receipts_say(private: Any, finished: dict[str, Any]) -> None:
    last = private.rounds()[ROUNDS - 1]["epsilon"]
    for site in ("a", "c"):
        booked = Ledger(state(private, site) / LEDGER).highest(delta=DELTA)
        assert last[site] == pytest.approx(booked)
        assert private.results()["epsilon"][site] == pytest.approx(booked)
        trained = [receipt for receipt in receipts(private, site) if receipt.job == "train"]
        assert [receipt.epsilon.value for receipt in trained if receipt.epsilon][-1] == pytest.approx(booked)
    assert finished["shown"]["epsilon_rdp"] == pytest.approx(last["a"])


def test_egress_of_a_whole_run_holds_only_what_is_on_the_lists(private: Any, finished: dict[str, Any]) -> None:
    start = load_file(private.run_dir / "checkpoints" / "round_000" / "adapters.safetensors")
    withheld = {name for name, rule in METRICS.items() if rule.leaves == "without_dp"}
    for site in SITES:
        sent = receipts(private, site)
        assert sent
        for receipt in sent:
            names = {name.split(".")[0] for name in receipt.metrics}
            assert names <= set(METRICS) - withheld
            assert receipt.patients is receipt.images is None
            assert {one.name: one.shape for one in receipt.tensors} in (
                {},
                {name: array.shape for name, array in start.items()},
            )
    for line in private.rounds()[:ROUNDS]:
        assert set(line["train_loss"].values()) == {None}
        assert set(line["used"].values()) == {None}
        assert all(shares == {} for shares in line["expert_shares"].values())


def test_audit_of_every_site_holds_against_the_centre(private: Any, finished: dict[str, Any]) -> None:
    for site in SITES:
        log = state(private, site) / LOG
        output = private.run("audit", "verify", log, "--against", private.run_dir)
        assert str(len(receipts(private, site))) in output
    kept = (private.run_dir / "checkpoints" / "round_001" / RECEIPTS).read_text().splitlines()
    assert {json.loads(line)["receipt"]["site"] for line in kept} >= set(SITES)


def test_audit_finds_a_cut_tail_and_an_edit(private: Any, finished: dict[str, Any], tmp_path: Path) -> None:
    whole = (state(private, "a") / LOG).read_bytes().splitlines(keepends=True)
    cut, edited = tmp_path / "cut.jsonl", tmp_path / "edited.jsonl"
    cut.write_bytes(b"".join(whole[:-1]))
    edited.write_bytes(b"".join([whole[0].replace(b'"round":1', b'"round":2'), *whole[1:]]))
    private.run("audit", "verify", cut)
    assert "is gone" in private.run("audit", "verify", cut, "--against", private.run_dir, exit_code=4)
    assert "line 1" in private.run("audit", "verify", edited, exit_code=4)


def test_a_lost_ledger_is_refused_until_what_was_spent_is_confirmed(private: Any, finished: dict[str, Any]) -> None:
    """The site's own receipts, and the centre's signature, know of more than an empty ledger does."""
    assert "privacy ledger knows of less" in finished["refusal"]
    assert "less was not spent" in finished["too little"]
    assert Ledger(live(private, "a") / LEDGER).highest(delta=DELTA) == pytest.approx(float(finished["spent"]))
